"""Whether a process asks for huge pages, and starts again to do so."""

import os
import pathlib
import subprocess
import sys

import pytest

from jfed.benchmark.contenders import Contender
from jfed.benchmark.workers import started
from jfed.runs import huge_pages

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
    for libc in ({}, {"CS_GNU_LIBC_VERSION": "glibc 2.34"}):  # none, and one that cannot ask
        monkeypatch.setattr(os, "confstr", libc.get)
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
@pytest.mark.parametrize(
    ("main", "expected"),
    [
        ("command()", ["None", ASK]),
        ("os.environ.pop(huge_pages.VARIABLE, None), command()", ["None", ASK]),  # not for ever
        ("main()", ["None"]),  # a program that calls it goes on as it is
    ],
)
def test_the_command_starts_again_with_them_once(on_request, tmp_path, main, expected):
    code = f"""if True:
        import os, pathlib, sys
        from jfed.runs import huge_pages
        from jfed.cli import command, main
        os.confstr = {{"CS_GNU_LIBC_VERSION": "glibc 2.36"}}.get
        huge_pages._MODE = pathlib.Path({str(on_request)!r})
        print(os.getpid(), os.environ.get(huge_pages.VARIABLE))
        sys.exit(({main},)[-1])"""
    (tmp_path / "taken").touch()
    command = [sys.executable, "-c", code, "run", "--workdir", "taken", "--cohort", "99"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 2, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len({pid for pid, _ in lines}) == 1
    assert [value for _, value in lines] == expected


def test_a_process_that_cannot_start_again_goes_on(on_request, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    huge_pages.restart()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has them")
def test_workers_have_them(on_request):
    contender = Contender("products", "matmul-xla", matrix=8)
    with started([contender], "cpu") as workers:
        workers[0].ready()
        environment = pathlib.Path(f"/proc/{workers[0]._process.pid}/environ").read_bytes()
    assert f"{huge_pages.VARIABLE}={ASK}".encode() in environment.split(b"\0")
