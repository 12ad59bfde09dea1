"""Compiled programs, kept for later runs."""

import os
import pathlib

import jax


def keep_compiled(folder: pathlib.Path | None = None) -> None:
    """Keeps compiled programs for later runs, in JAX's own setting or ~/.cache/jfed by default."""
    own = folder or jax.config.values["jax_compilation_cache_dir"]
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(own or pathlib.Path(home) / "jfed"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
