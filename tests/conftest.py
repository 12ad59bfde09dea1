"""Strict JAX settings and checked array shapes for every test."""

import jax
import jaxtyping
import pytest

jaxtyping.install_import_hook("jfed", "beartype.beartype")

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
# Most of the time of the tests goes into compiling; commands that they start optimise as always.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory, worker_id):
    """The folder of compiled programs that the commands of all tests share."""
    own = tmp_path_factory.getbasetemp()
    return (own if worker_id == "master" else own.parent) / "compiled"
