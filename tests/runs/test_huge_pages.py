"""Whether a process asks for huge pages, and starts again to do so."""

import importlib.metadata
import os
import pathlib
import subprocess
import sys
import types

import pytest

from jfed.benchmark.contenders import Contender
from jfed.benchmark.workers import started
from jfed.cli import main
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
        pytest.param(  # not for ever
            "os.environ.pop(huge_pages.VARIABLE, None), command()",
            ["None", ASK],
            marks=pytest.mark.slow,
        ),
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


@pytest.fixture
def restarted(on_request, monkeypatch):
    """What `restart` starts, in place of starting it."""
    started = []
    monkeypatch.setattr(os, "execve", lambda *given: started.append(given))
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    monkeypatch.setattr(sys, "getprofile", lambda: None)
    monkeypatch.delenv("JFED_RESTARTED", raising=False)
    monkeypatch.setattr(huge_pages, "_ROOT", on_request.parent)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME"):
        monkeypatch.delenv(name, raising=False)
    return started


def test_a_process_that_lacks_them_starts_again(restarted):
    huge_pages.restart()
    ((program, arguments, environment),) = restarted
    assert (program, arguments) == (sys.executable, sys.orig_argv)
    assert environment[huge_pages.VARIABLE] == ASK


def _plugin(monkeypatch, tmp_path, name):
    """Installs a plugin for JAX, as a module where JAX looks for them."""
    (tmp_path / "site" / "jax_plugins" / name).mkdir(parents=True)
    (tmp_path / "site" / "jax_plugins" / name / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")


@pytest.mark.parametrize(
    ("plugin", "device", "accelerated"),
    [
        ("xla_cuda13", None, False),
        ("xla_cuda13", "nvidia0", True),
        ("xla_cuda13", "kfd", False),
        ("xla_rocm7", "kfd", True),
        ("xla_of_tomorrow", None, True),  # nothing is known of what it needs
    ],
)
def test_a_process_with_an_accelerator_goes_on(
    restarted, tmp_path, monkeypatch, plugin, device, accelerated
):
    _plugin(monkeypatch, tmp_path, plugin)
    if device:
        (tmp_path / "dev").mkdir()
        (tmp_path / "dev" / device).touch()
    huge_pages.restart()
    assert bool(restarted) != accelerated


def test_a_plugin_may_be_an_entry_point(restarted, monkeypatch):
    point = importlib.metadata.EntryPoint("tpu", "jax_plugins.tpu:initialize", "jax_plugins")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point])
    huge_pages.restart()
    assert not restarted


@pytest.mark.parametrize(
    ("platforms", "accelerated"), [("cpu", False), ("cuda,cpu", True), ("tpu", True)]
)
def test_a_platform_that_was_named_decides(
    restarted, tmp_path, monkeypatch, platforms, accelerated
):
    if not accelerated:
        _plugin(monkeypatch, tmp_path, "xla_of_tomorrow")
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    huge_pages.restart()
    assert bool(restarted) != accelerated


def test_asking_takes_no_imports():
    """The command starts again before it has spent seconds on them."""
    code = """if True:
        import sys
        from jfed.cli import commands, main
        main(["--help"])
        commands.huge_pages.accelerated()
        assert not {"jax", "numpy", "tyro"} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def _debugger(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "gettrace", lambda: print)


def _profiler(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "getprofile", lambda: print)


def _monitoring(monkeypatch, tmp_path):
    tools = types.SimpleNamespace(get_tool={n: "pdb" if n == 0 else None for n in range(6)}.get)
    monkeypatch.setattr(sys, "monitoring", tools, raising=False)


def _debugpy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "debugpy", types.ModuleType("debugpy"))


def _tracer(monkeypatch, tmp_path):
    (tmp_path / "status").write_text("Name:\tpython\nTracerPid:\t41\nUid:\t0\n")
    monkeypatch.setattr(huge_pages, "_STATUS", tmp_path / "status")


@pytest.mark.parametrize("attach", [_debugger, _profiler, _monitoring, _debugpy, _tracer])
def test_a_process_that_is_watched_goes_on(restarted, monkeypatch, tmp_path, attach):
    attach(monkeypatch, tmp_path)
    huge_pages.restart()
    assert not restarted


def test_nobody_watches_by_default(restarted, monkeypatch, tmp_path):
    monkeypatch.setattr(
        sys, "monitoring", types.SimpleNamespace(get_tool=lambda n: None), raising=False
    )
    (tmp_path / "status").write_text("TracerPid:\t0\n")
    monkeypatch.setattr(huge_pages, "_STATUS", tmp_path / "status")
    assert not huge_pages.watched()
    monkeypatch.setattr(huge_pages, "_STATUS", tmp_path / "nowhere")  # as on macOS
    assert not huge_pages.watched()


@pytest.mark.parametrize(
    ("flags", "on"),
    [
        ([], True),
        (["--no-huge-pages"], False),
        (["--no_huge_pages"], False),
        (["--no-huge-pages", "--huge-pages"], True),  # the last counts
    ],
)
def test_a_switch_turns_them_off(restarted, monkeypatch, tmp_path, flags, on):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    assert main(["run", "--workdir", "taken", "--no-cache", *flags], own_process=True) == 2
    assert bool(restarted) == on


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
