"""Compiled programs, kept on disk for later processes."""

import os
import pathlib

import jax


def keep_compiled(folder: str | os.PathLike[str] | None = None) -> None:
    """Keeps compiled programs for later processes, which then need not compile them.

    Call it before the first `jfed.simulate`; `jfed run` does so by itself.

    Args:
      folder: where they are kept; JAX's own setting (`JAX_COMPILATION_CACHE_DIR`) where not given,
        else `~/.cache/jfed`.
    """
    own = folder or jax.config.values["jax_compilation_cache_dir"]
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(own or pathlib.Path(home) / "jfed"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
