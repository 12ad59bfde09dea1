"""The errors that jfed raises. Each message quotes the offending value and says what is allowed."""

import contextlib
import difflib
import functools
import importlib
import inspect
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

_SHOWN = 300  # characters of a value that errors quote


class JfedError(Exception):
    """Base class of every error that jfed raises on purpose."""


class ConfigError(JfedError, ValueError):
    """A setting that cannot work: out of range, unknown, or contradicting another one."""


class DataError(JfedError, ValueError):
    """Images, labels or a data set that cannot be used as given."""


class DataNotFoundError(DataError, FileNotFoundError):
    """A data set that is not prepared where jfed looked for it."""


class RunFolderError(JfedError, FileExistsError):
    """A run folder that cannot be written to, or that already holds a run."""


class PreemptedError(JfedError):
    """A run was asked to stop; it saved what it had and can go on."""


class DeviceMemoryError(JfedError, MemoryError):
    """The devices have too little memory for the run."""


class CallbackError(JfedError, RuntimeError):
    """A callback of the user's raised an exception, which is the cause of this one."""


class HostError(JfedError, RuntimeError):
    """One of several hosts that do a run failed, with an error that is none of jfed's own."""


class DivergedError(JfedError, ArithmeticError):
    """Training or evaluation produced a number that is not finite.

    Attributes:
      history: the records of the rounds before.
    """

    def __init__(self, message: str, history: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.history = tuple(history)


def one_of(kind: str, value: str, allowed: Sequence[str]) -> str:
    """Returns `value` if it is allowed; else raises ConfigError naming the close matches."""
    if isinstance(value, str) and value in allowed:
        return value
    told = ", ".join(map(repr, allowed))
    asked = did_you_mean(value, allowed)
    raise ConfigError(f"unknown {kind} {shown(value)}.{asked} Allowed: {told}.")


def shown(value: Any) -> str:
    """A value as errors quote it: as it is written, but not for pages."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 20]} ... {text[-15:]}"


def did_you_mean(value: Any, allowed: Sequence[str]) -> str:
    """A question that names the close matches, with a space before it; "" if there are none."""
    close = difflib.get_close_matches(str(value), allowed, n=3, cutoff=0.4)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def check_integer(name: str, value: Any, *, least: int, most: int | None = None) -> int:
    """Returns `value`, of any integer type, as an int; ConfigError if it is out of bounds."""
    bound = f"{least} or more" if most is None else f"from {least} to {most}"
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise ConfigError(f"{name} must be an integer, {bound}, got {shown(value)}.")
    if number < least or (most is not None and number > most):
        raise ConfigError(f"{name} must be {bound}, got {shown(value)}.")
    return number


def check_type(name: str, value: Any, *kinds: type) -> Any:
    """Returns `value`; ConfigError unless it is an instance of one of the types."""
    if not isinstance(value, kinds):
        names = ["None" if kind is type(None) else kind.__name__ for kind in kinds]
        article = "an" if names[0][0] in "AEIOU" else "a"
        call = " Call it?" if inspect.isfunction(value) else ""
        raise ConfigError(
            f"{name} must be {article} {' or '.join(names)}, got {shown(value)}.{call}"
        )
    return value


def check_sequence(name: str, value: Any) -> tuple[Any, ...]:
    """Returns a sequence other than text as a tuple; ConfigError if it is none."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise ConfigError(f"{name} must be a sequence, got {shown(value)}.")
    return tuple(value)


def check_share(name: str, value: Any) -> float:
    """Returns `value` as a float; ConfigError unless it is a number from 0 to 1."""
    try:
        number = check_number(name, value, least=0.0)
    except ConfigError:
        number = math.inf
    if number > 1:
        raise ConfigError(f"{name} must be a number from 0 to 1, got {shown(value)}.")
    return number


def check_number(
    name: str, value: Any, *, above: float = -math.inf, least: float = -math.inf
) -> float:
    """Returns `value` as a float; ConfigError unless it is finite and within its bounds.

    True and False are no numbers.
    """
    bound = f"above {above:g}" if above > -math.inf else f"{least:g} or more"
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    wrong_type = isinstance(value, str | bytes | bool) or getattr(value, "ndim", 0) > 0
    wrong_type |= getattr(value, "dtype", None) == "bool"
    if wrong_type or not math.isfinite(number) or number <= above or number < least:
        raise ConfigError(f"{name} must be a number, {bound}, got {shown(value)}.")
    return number


def optional(module: str, extra: str) -> Any:
    """Imports what an extra of jfed installs; ConfigError if it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{module} is not installed: pip install 'jfed[{extra}]' ({error})."
        ) from error


def name_of(function: Any) -> str:
    """How to call a function, or an object that can be called: by its module and its name there.

    Anything else is called as it is written.
    """
    if isinstance(function, functools.partial):
        return f"partial of {name_of(function.func)}"
    if not callable(function):
        return repr(function)
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


@contextlib.contextmanager
def calling(what: str, **given: Any) -> Iterator[None]:
    """Turns any exception of a user's function into a ConfigError that says what was called.

    Args:
      what: is called, such as "the model of tier 'full'".
      given: to it, by name: values, or pytrees whose shapes are told.
    """
    try:
        yield
    except JfedError:
        raise
    except Exception as error:
        told = ", ".join(f"{name} {_told(value)}" for name, value in given.items())
        reason = str(error).strip() or type(error).__name__
        reason = f"KeyError: {reason}" if isinstance(error, KeyError) else reason
        on = f" on {told}" if told else ""
        raise ConfigError(f"{what} cannot be used{on}: {reason}") from error


def _told(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return shown(value) if shape is None else f"of shape {tuple(shape)} {value.dtype}"
