"""One object for equal settings, so that an algorithm's programs are compiled once in a process."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

from jfed.algorithms.algorithm import Algorithm
from jfed.algorithms.clients import OPTIMIZER, ClientConfig
from jfed.algorithms.servers import SERVER_OPTIMIZER, ServerConfig
from jfed.errors import ConfigError, check_type, name_of

_P = ParamSpec("_P")


def shared(
    make: Callable[Concatenate[ClientConfig, ServerConfig, _P], Algorithm],
) -> Callable[..., Algorithm]:
    """A maker of algorithms that gives the same object where optimizers and settings are equal.

    What else the two configurations hold is the simulation's, or data; they may be left out, for
    `ClientConfig()` and `ServerConfig()`, as its signature tells.
    """

    @functools.lru_cache(maxsize=64, typed=True)  # so that True is not taken for 1
    def made(client: ClientConfig, server: ServerConfig, **settings: Any) -> Algorithm:
        told = ", ".join(f"{name}={_told(value)}" for name, value in settings.items())
        name = f"{make.__name__}({told})" if told else make.__name__
        return dataclasses.replace(make(client, server, **settings), name=name)  # type: ignore[call-arg]

    @functools.wraps(make)
    def equal(
        client: ClientConfig | None = None, server: ServerConfig | None = None, **settings: Any
    ) -> Algorithm:
        settings = {name: _hashable(name, value) for name, value in settings.items()}
        check_type("client", client, ClientConfig, type(None))
        check_type("server", server, ServerConfig, type(None))
        clients, servers = client or ClientConfig(), server or ServerConfig()
        own = ClientConfig(**{name: getattr(clients, name) for name in OPTIMIZER})
        return made(
            own,
            ServerConfig(**{name: getattr(servers, name) for name in SERVER_OPTIMIZER}),
            **settings,
        )

    signature = inspect.signature(make)
    client, server, *others = signature.parameters.values()
    optional = [p.replace(default=None, annotation=p.annotation | None) for p in (client, server)]
    equal.__signature__ = signature.replace(parameters=[*optional, *others])  # type: ignore[attr-defined]
    return equal


def _hashable(name: str, value: Any) -> Any:
    """A setting that can be compared: lists become tuples, arrays of one number that number."""
    if isinstance(value, list):
        value = tuple(value)
    if getattr(value, "shape", None) == ():
        value = value.item()
    try:
        hash(value)
    except TypeError as error:
        raise ConfigError(
            f"{name} must be a number, a function or a tuple, got {value!r}."
        ) from error
    return value


def _told(value: Any) -> str:
    return name_of(value) if callable(value) else repr(value)
