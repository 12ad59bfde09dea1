"""The round loop: rounds in flight, records as they finish, and the result."""

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from jfed.engine.lanes import EngineConfig
from jfed.engine.server import ServerState
from jfed.errors import (
    CallbackError,
    ConfigError,
    DeviceMemoryError,
    DivergedError,
    check_sequence,
    name_of,
)
from jfed.models.model import Params
from jfed.simulation.federation import Federation, UnderWay
from jfed.simulation.records import Record
from jfed.tiers import Tier, Tiers
from jfed.tiers.communication import Traffic

# Rounds that may be under way on the device before the host waits for the oldest one's metrics.
_IN_FLIGHT = 2

Callback = Callable[[Record], Any]  # told of each round, in order, as soon as it is known


@dataclasses.dataclass(frozen=True)
class Result:
    """What `jfed.simulate` returns.

    Attributes:
      history: one record a round.
      variables: the global ones after the last round.
      tiers: as trained; None where `jfed.load` cannot know them.
      evaluated: the tiers that were tested, trained ones first.
      traffic: bytes of one client in one round, by tier name.
      compile_seconds: how long tracing and compiling all programs took.
      engine: devices, lanes and mapping that were used.
    """

    history: tuple[Record, ...]
    variables: Params
    tiers: Tiers | None
    evaluated: tuple[Tier, ...]
    traffic: dict[str, Traffic]
    compile_seconds: float
    engine: EngineConfig

    @property
    def accuracies(self) -> dict[str, float]:
        """Test accuracy after the last round, by tier name."""
        last = self.history[-1].evaluations if self.history else {}
        return {name: evaluation.accuracy for name, evaluation in last.items()}

    def plot(self) -> Any:
        """A matplotlib figure of test accuracy over rounds, one line a tier."""
        import matplotlib.pyplot  # noqa: F401  (teaches a notebook to show figures)

        from jfed.reports import plots

        return plots.accuracy(self.history, self.tiers.kind if self.tiers else "tier")


def run(federation: Federation, callbacks: Sequence[Callback] = ()) -> Result:
    """Runs every round of a federation; see `jfed.simulate`."""
    history: list[Record] = []
    last = federation.start
    for state, record in iterate(federation):
        last = state
        history.append(record)
        tell(callbacks, record)
    return make_result(federation, last, history)


def check_callbacks(callbacks: Sequence[Callback]) -> tuple[Callback, ...]:
    """Returns the callbacks; ConfigError unless they are a sequence of functions."""
    for callback in check_sequence("callbacks", callbacks):
        if not callable(callback):
            raise ConfigError(f"callbacks must be functions of a Record, got {callback!r}.")
    return tuple(callbacks)


def tell(callbacks: Sequence[Callback], record: Record) -> None:
    """Calls all callbacks with a record; CallbackError names the first one that raises."""
    for callback in callbacks:
        try:
            callback(record)
        except Exception as error:
            raise CallbackError(
                f"the callback {name_of(callback)} raised {error!r} after round {record.round}."
            ) from error


def make_result(federation: Federation, state: ServerState, history: Sequence[Record]) -> Result:
    """The result of a federation whose last state and records these are."""
    return Result(
        history=tuple(history),
        variables=state.variables,
        tiers=federation.tiers,
        evaluated=federation.evaluated,
        traffic=federation.traffic,
        compile_seconds=federation.compile_seconds,
        engine=federation.engine,
    )


def iterate(
    federation: Federation,
    history: Sequence[Record] = (),
    state: ServerState | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[ServerState, Record]]:
    """Runs the rounds that follow `history`; yields the state after each, and its record.

    Args:
      federation: compiled or not.
      history: records of the rounds done so far.
      state: after them; not needed before the first round.
      stop: asked often while waiting for the devices; once it says True, no more rounds follow.

    Raises:
      DivergedError, DeviceMemoryError: see `jfed.simulate`.
    """
    if len(history) == federation.rounds:
        return
    history = list(history)
    with explain_memory(federation):
        federation.compile()
        began = time.perf_counter() - (history[-1].seconds if history else 0.0)
        state = federation.start if state is None else state
        for after, started in _in_flight(federation, state, len(history)):
            if not _wait(started, stop):
                return
            record = started.fetch(history[-1] if history else None, began)
            check_finite(record, bool(started.finite), history, diverged=started.diverged())
            history.append(record)
            yield after, record
            if stop():
                return


def _in_flight(
    federation: Federation, state: ServerState, first: int
) -> Iterator[tuple[ServerState, UnderWay]]:
    """Starts round after round; yields each once `_IN_FLIGHT` later ones are under way."""
    under_way = collections.deque[tuple[ServerState, UnderWay]]()
    for number in range(first, federation.rounds):
        state, started = federation.round(state, number)
        under_way.append((state, started))
        if len(under_way) > _IN_FLIGHT:
            yield under_way.popleft()
    yield from under_way


def _wait(started: UnderWay, stop: Callable[[], bool]) -> bool:
    """Waits for a round; False if asked to stop before its end. Signals are heard meanwhile."""
    pause = 1e-4
    while not started.ready():
        if stop():
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    return True


@contextlib.contextmanager
def explain_memory(federation: Federation) -> Iterator[None]:
    """Turns the device's "out of memory" into an error that says what to lower."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        engine, first_line = federation.engine, str(error).splitlines()[0]
        raise DeviceMemoryError(
            f"out of device memory with {engine.lanes} lanes on each of {engine.devices} devices "
            f"and client batches of {federation.client.batch_size}; lower lanes, the clients' "
            f"batch_size or evaluation's batch_size ({federation.evaluation.batch_size}). "
            f"JAX: {first_line}"
        ) from error


def check_finite(
    record: Record, finite: bool, history: Sequence[Record], *, diverged: bool = False
) -> None:
    """Raises DivergedError if a loss of the round, or a variable after it, is not finite.

    Args:
      record: of the round.
      finite: whether the variables after it are.
      history: of the rounds before.
      diverged: whether clients trained honestly and the updates of all of them were rejected.
    """
    losses = {"training loss": record.train_loss} if record.examples else {}
    losses |= {f"test loss at {name}": e.loss for name, e in record.evaluations.items()}
    wrong = [f"its {name} is {loss}" for name, loss in losses.items() if not math.isfinite(loss)]
    if diverged:
        wrong.insert(0, "no client that trained honestly sent a finite update")
    if not finite:
        wrong.append("the variables after it are not all finite")
    if wrong:
        raise DivergedError(
            f"round {record.round} diverged: {wrong[0]}. A learning rate lower than "
            f"{record.learning_rate:g}, or clip_norm, may help.",
            history,
        )
