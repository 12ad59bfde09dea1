"""Several hosts that do one run: what one of them finds wrong ends all, with the same error.

A collective, or a barrier, waits for ever for a host that does not come. So hosts go through phases
instead, the same ones in the same order, and tell each other how each phase ended through the
key-value store of JAX's coordination service, where nobody waits who does not want to. A process
that ends tells that too, if it has got as far as this module; without a word, JAX notices by itself
that it is gone, in half a minute to five.
"""

import atexit
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax._src import distributed  # the public part gives no access to the key-value store

from jfed import errors
from jfed.errors import ConfigError, HostError, JfedError
from jfed.settings import flat

_T = TypeVar("_T")
_PREFIX = "jfed/phases"
_ENDED = "jfed/ended"  # hosts whose process ends
_PHASES = itertools.count()  # every host counts alike
_OPEN: list[str] = []  # the phases that this host is in, the outermost first
_POLL = 1.0  # seconds between two looks at how the others do
_HEARTBEAT = 30  # seconds without a sign of life, after which JAX gives a process up
_GRACE = 20.0  # seconds to end by itself for a process that waits for a host that failed
_LAST = 10.0  # seconds more for the first, whose end JAX answers by aborting those still there


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """Which of the processes that share a run this one is.

    Attributes:
      distributed: this is one of several processes, on as many hosts, that run the same command
        and share the work, see `jax.distributed.initialize`. The first one writes.
      coordinator_address: host:port of the first process; found out on TPUs, Slurm and Open MPI.
      num_processes: how many; likewise.
      process_id: which of them this is, from 0; likewise.
    """

    distributed: bool = False
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def is_first() -> bool:
    """Whether this process writes files: of several hosts the first one."""
    return distributed.global_state.process_id == 0


def join(config: HostsConfig) -> None:
    """Joins the other processes, if there are any, before JAX starts its devices.

    Raises:
      ConfigError: they cannot be joined.
    """
    process = {name: value for name, value in vars(config).items() if name != "distributed"}
    given = [f"{name} {value!r}" for name, value in process.items() if value is not None]
    if given and not config.distributed:
        raise ConfigError(f"{given[0]} goes with --distributed.")
    if config.distributed:
        try:
            jax.distributed.initialize(**process, heartbeat_timeout_seconds=_HEARTBEAT)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"cannot join the other processes: {error}") from error
        _watch()


def agree(what: str, function: Callable[[], _T]) -> _T:
    """Calls a function on every host; each gets what its own call returned.

    Args:
      what: the phase, for messages.
      function: of no arguments.

    Raises:
      JfedError: what the call raised, on any host; all raise it, and it names the host.
    """
    return Phase(what).run(function)


def gather(what: str, function: Callable[[], Any]) -> list[Any]:
    """As `agree`, and each gets what the calls on all hosts returned (plain JSON values)."""
    phase = Phase(what)
    phase.run(function)
    return phase.returned


def same(what: str, values: Callable[[], Mapping[str, Any]]) -> None:
    """Raises ConfigError on every host unless these values, flat or nested, are the same on all.

    Where there is one host, they are not even asked for.
    """
    if distributed.global_state.client is None:
        return
    found = [flat(told) for told in gather(what, values)]
    for host, there in enumerate(found):
        for name in sorted(found[0].keys() | there.keys()):
            first, other = (values.get(name, "not set") for values in (found[0], there))
            if first != other:
                raise ConfigError(
                    f"hosts differ in {what}: {name} is {first!r} on host 0, {other!r} on host "
                    f"{host}; give all of them the same."
                )


def wait_for(arrays: Any) -> None:
    """Waits for arrays of the devices, or raises what another host raised meanwhile."""
    waiting = Phase("waiting for the devices")
    while not all(x.is_ready() for x in jax.tree.leaves(arrays)):
        waiting.check()
        time.sleep(0.001)


class Phase:
    """A part of a run that all hosts go through.

    Attributes:
      returned: what the call of each host returned, once `run` has; None for what JSON cannot tell.
    """

    def __init__(self, what: str) -> None:
        self._what, self._key = what, f"{_PREFIX}/{next(_PHASES):06d}"
        self._looked = time.monotonic()
        self.returned: list[Any] = []

    def run(self, function: Callable[[], _T]) -> _T:
        """See `agree`."""
        client, hosts = distributed.global_state.client, distributed.global_state.num_processes
        if client is None:
            result = function()
            self.returned = [result]
            return result
        _watch()
        _OPEN.append(self._key)
        try:
            result = self._call(client, function)
            while len(outcomes := _outcomes(client, self._key)) < hosts:
                _raise_failure(outcomes)
                self.check()
                time.sleep(0.02)
            _raise_failure(outcomes)
        finally:
            _OPEN.remove(self._key)
        self.returned = [outcomes[host]["returned"] for host in sorted(outcomes)]
        return result

    def _call(self, client: Any, function: Callable[[], _T]) -> _T:
        """Calls the function, and tells the other hosts how that ended."""
        try:
            result = function()
        except BaseException as error:
            told = self._cause(client, error) or _as_seen(error, self._what)
            self._tell(client, {"error": [type(told).__name__, str(told)]})
            if isinstance(error, Exception | SystemExit):
                raise told from error
            raise
        self._tell(client, {"returned": _json_or_none(result)})
        return result

    def _cause(self, client: Any, error: BaseException) -> JfedError | None:
        """What another host has failed by, where that made the devices of this one fail too."""
        until = time.monotonic() + _POLL
        while isinstance(error, jax.errors.JaxRuntimeError) and time.monotonic() < until:
            try:
                for key in dict.fromkeys((*_OPEN, self._key)):
                    _raise_failure(_outcomes(client, key))
            except JfedError as other:
                return other
            time.sleep(0.05)
        return None

    def check(self) -> None:
        """Raises what another host raised, in this phase or one around it. Looks once a second."""
        client, now = distributed.global_state.client, time.monotonic()
        if client is not None and now - self._looked > _POLL:
            self._looked = now
            for key in dict.fromkeys((*_OPEN, self._key)):
                _raise_failure(_outcomes(client, key))
            for host in _missing(client):
                raise HostError(f"host {host} has ended, before {self._what}.")

    def _tell(self, client: Any, outcome: dict[str, Any]) -> None:
        key = f"{self._key}/{distributed.global_state.process_id}"
        client.key_value_set(key, json.dumps(outcome), allow_overwrite=True)


def _outcomes(client: Any, key: str) -> dict[int, dict[str, Any]]:
    """How the phase has ended so far, by host."""
    found = client.key_value_dir_get(key)
    return {int(name.rpartition("/")[2]): json.loads(text) for name, text in found}


def _missing(client: Any) -> list[int]:
    """The hosts whose process ends, and that never told how a phase ended that this one is in."""
    ended = {int(name.rpartition("/")[2]) for name, _ in client.key_value_dir_get(_ENDED)}
    open_ = tuple(_OPEN) if ended else ()
    return sorted({host for key in open_ for host in ended - _outcomes(client, key).keys()})


def _raise_failure(outcomes: Mapping[int, Mapping[str, Any]]) -> None:
    """Raises the error of the first host that failed, if any did."""
    if failure := _failure([outcomes[host] for host in sorted(outcomes)]):
        raise _error(*failure)


def _failure(outcomes: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    """The class and the text of the first error, if there is one."""
    return next((tuple(one["error"]) for one in outcomes if "error" in one), None)


def _as_seen(error: BaseException, what: str) -> JfedError:
    """The error of this host as all hosts shall see it."""
    where = f"host {distributed.global_state.process_id}: "
    if isinstance(error, HostError):
        return error
    if isinstance(error, JfedError):
        told = _error(type(error).__name__, f"{where}{error}")
        told.__dict__.update(vars(error))
        return told
    if isinstance(error, SystemExit):
        return HostError(f"{where}{what} ended the process with status {error.code}.")
    return HostError(f"{where}{what} failed with {type(error).__name__}: {error}")


def _error(name: str, text: str) -> JfedError:
    kind = getattr(errors, name, HostError)
    return kind(text)


def _json_or_none(value: Any) -> Any:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return None
    return value


@functools.cache
def _watch() -> None:
    """Sees to it that this process does not outlive a failure of another in a collective."""
    threading.Thread(target=_end_if_stuck, daemon=True).start()


@atexit.register
def _tell_end() -> None:
    """Tells the other hosts, which may wait for this one in a phase that it never comes to."""
    client = distributed.global_state.client
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service has gone
        if client is not None:
            key = f"{_ENDED}/{distributed.global_state.process_id}"
            client.key_value_set(key, "", allow_overwrite=True)


def _end_if_stuck() -> None:
    """Ends this process some time after any host has failed, if it has not ended by itself."""
    while True:
        time.sleep(_POLL)
        if (client := distributed.global_state.client) is None:
            continue
        try:
            told = _trouble(client)
        except jax.errors.JaxRuntimeError:  # the service has gone, and JAX ends the process
            return
        if told is None:
            continue
        time.sleep(_GRACE + _LAST * is_first())
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            told = _trouble(client)
        if told is not None:
            print(f"\njfed: error: {told}", file=sys.stderr, flush=True)
            os._exit(2)


def _trouble(client: Any) -> str | None:
    """What a host has failed by, or that one has ended on which this one waits."""
    found = client.key_value_dir_get(_PREFIX)
    if failure := _failure([json.loads(text) for _, text in found]):
        return failure[1]
    return next((f"host {host} has ended." for host in _missing(client)), None)
