"""The errors that jfed raises. Each message quotes the offending value and says what is allowed."""

import difflib


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


class DivergedError(JfedError, ArithmeticError):
    """Training produced a non-finite loss."""


def one_of(kind: str, value: str, allowed: list[str] | tuple[str, ...]) -> str:
    """Returns `value` if it is allowed; else raises ConfigError naming the close matches."""
    if value in allowed:
        return value
    close = difflib.get_close_matches(value, allowed, n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ConfigError(f"unknown {kind} {value!r}.{hint} Allowed: {', '.join(map(repr, allowed))}.")
