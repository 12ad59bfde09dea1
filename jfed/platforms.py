"""What a program is made for, where its text depends on that."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax

_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)
_LANES = contextvars.ContextVar("lanes", default=1)


def platform() -> str:
    """Where what is being traced will run: "cpu", "gpu" or "tpu"."""
    return _PLATFORM.get() or jax.default_backend()


def lanes() -> int:
    """Over how many lanes, each with weights of its own, what is being traced is vmapped."""
    return _LANES.get()


def made_for(name: str) -> contextlib.AbstractContextManager[None]:
    """What is traced meanwhile is made for that platform, whatever JAX's default one is."""
    return _meanwhile(_PLATFORM, name)


def vmapped(count: int) -> contextlib.AbstractContextManager[None]:
    """What is traced meanwhile is vmapped over so many lanes."""
    return _meanwhile(_LANES, count)


@contextlib.contextmanager
def _meanwhile(variable: contextvars.ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
