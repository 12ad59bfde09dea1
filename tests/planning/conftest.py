"""Fixtures that skip a test where XLA's compiler for GPUs or for TPUs is not installed."""

import importlib.util
import pkgutil

import pytest


def _has_gpu_compiler():
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    import jax_plugins

    return any("cuda" in info.name for info in pkgutil.iter_modules(jax_plugins.__path__))


@pytest.fixture(scope="session")
def needs_gpu_compiler():
    """For `pytest.mark.usefixtures`: the test compiles for GPUs."""
    if not _has_gpu_compiler():
        pytest.skip("XLA's compiler for GPUs is not installed: pip install 'jfed[plan-gpu]'")


@pytest.fixture(scope="session")
def needs_tpu_compiler():
    """For `pytest.mark.usefixtures`: the test compiles for TPUs."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("XLA's compiler for TPUs is not installed: pip install 'jfed[plan-tpu]'")
