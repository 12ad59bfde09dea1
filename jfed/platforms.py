"""What a program is made for, where its text depends on that."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)
_LANES = contextvars.ContextVar("lanes", default=1)


def platform() -> str:
    """Where what is being traced will run: "cpu", "gpu" or "tpu"."""
    return _PLATFORM.get() or jax.default_backend()


def lanes() -> int:
    """Over how many lanes, each with weights of its own, what is being traced is vmapped."""
    return _LANES.get()


@contextlib.contextmanager
def made_for(name: str) -> Iterator[None]:
    """What is traced meanwhile is made for that platform, whatever JAX's default one is."""
    token = _PLATFORM.set(name)
    try:
        yield
    finally:
        _PLATFORM.reset(token)


@contextlib.contextmanager
def vmapped(count: int) -> Iterator[None]:
    """What is traced meanwhile is vmapped over so many lanes."""
    token = _LANES.set(count)
    try:
        yield
    finally:
        _LANES.reset(token)
