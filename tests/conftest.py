"""Strict JAX settings and checked array shapes for every test."""

import jax
import jaxtyping

jaxtyping.install_import_hook("jfed", "beartype.beartype")

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
