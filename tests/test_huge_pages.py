"""Whether a process asks for huge pages, and starts again to do so."""

import os
import subprocess
import sys

import pytest

from jfed import huge_pages

ASK = "glibc.malloc.hugetlb=1"


@pytest.fixture
def on_request(tmp_path, monkeypatch):
    """A system that gives huge pages to those who ask, whatever this one does."""
    mode = tmp_path / "enabled"
    mode.write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "_MODE", mode)
    monkeypatch.setattr(os, "confstr", {"CS_GNU_LIBC_VERSION": "glibc 2.36"}.get)
    monkeypatch.delenv(huge_pages.VARIABLE, raising=False)
    return mode


def test_they_are_asked_for_where_that_helps(on_request, monkeypatch):
    assert huge_pages.tunables() == ASK
    monkeypatch.setenv(huge_pages.VARIABLE, "glibc.malloc.arena_max=2")
    assert huge_pages.tunables() == f"glibc.malloc.arena_max=2:{ASK}"
    monkeypatch.setenv(huge_pages.VARIABLE, "glibc.malloc.hugetlb=0")  # the user's own choice
    assert huge_pages.tunables() is None


@pytest.mark.parametrize("mode", ["[always] madvise never", "always madvise [never]"])
def test_they_are_not_asked_for_where_the_system_decides(on_request, mode):
    on_request.write_text(mode)
    assert huge_pages.tunables() is None


def test_they_are_not_asked_for_elsewhere(on_request, monkeypatch):
    on_request.unlink()
    assert huge_pages.tunables() is None
    on_request.write_text("[madvise]")
    monkeypatch.setattr(os, "confstr", {}.get)
    assert huge_pages.tunables() is None
    monkeypatch.delattr(os, "confstr")  # as on Windows
    assert huge_pages.tunables() is None


@pytest.mark.parametrize("before", [None, "glibc.malloc.arena_max=2"])
def test_children_are_given_them_and_the_environment_is_put_back(on_request, monkeypatch, before):
    if before:
        monkeypatch.setenv(huge_pages.VARIABLE, before)
    with huge_pages.for_children():
        assert os.environ[huge_pages.VARIABLE].endswith(ASK)
    assert os.environ.get(huge_pages.VARIABLE) == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has them")
@pytest.mark.parametrize("own", [True, False])
def test_the_command_starts_again_with_them_once(on_request, tmp_path, own):
    main = "main()" if own else "main(sys.argv[1:])"  # a program that calls it goes on as it is
    code = f"""if True:
        import os, pathlib, sys
        from jfed import huge_pages
        from jfed.cli import main
        os.confstr = {{"CS_GNU_LIBC_VERSION": "glibc 2.36"}}.get
        huge_pages._MODE = pathlib.Path({str(on_request)!r})
        print(os.getpid(), os.environ.get(huge_pages.VARIABLE))
        sys.exit({main})"""
    (tmp_path / "taken").touch()
    command = [sys.executable, "-c", code, "run", "--workdir", "taken", "--cohort", "99"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len({pid for pid, _ in lines}) == 1
    assert [value for _, value in lines] == (["None", ASK] if own else ["None"])
