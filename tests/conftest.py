"""Strict JAX settings and checked array shapes for every test; what several test files share."""

import os
import subprocess

import jax
import jaxtyping
import pytest

# Most of the time of the tests goes into compiling, and half of that into XLA's newer emitters of
# fused loops. Commands that the tests start do without those too, but optimise as always.
if jax.__version_info__ < (0, 12):  # which has no others any more
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"

jaxtyping.install_import_hook("jfed", "beartype.beartype")

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def nothing_left_running(monkeypatch):
    """Ends the processes that a test has started, should it fail before they have ended."""
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    yield
    for process in started:
        process.kill()


@pytest.fixture(scope="session")
def compiled(tmp_path_factory, worker_id):
    """The folder of compiled programs that the commands of all tests share."""
    own = tmp_path_factory.getbasetemp()
    return (own if worker_id == "master" else own.parent) / "compiled"


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """A function that puts shell texts before the commands of their names.

    They find the folder that they are in as $HERE; each call is a line of its file `calls`.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("HERE", str(folder))

    def put(**texts):
        for name, text in texts.items():
            path = folder / name
            path.write_text(f'#!/bin/bash\necho "{name} $*" >> "$HERE/calls"\n{text}\n')
            path.chmod(0o755)
        return folder

    return put
