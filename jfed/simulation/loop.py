"""The round loop: rounds in flight, records as they finish, and the result."""

import collections
import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Shaped

from jfed.data import Dataset, Split
from jfed.data.preprocessing import ModelInputs
from jfed.engine.devices import EngineConfig, to_host
from jfed.errors import (
    CallbackError,
    ConfigError,
    DeviceMemoryError,
    DivergedError,
    check_sequence,
    check_type,
    name_of,
)
from jfed.models.model import Params, Statistics
from jfed.simulation import exports
from jfed.simulation.federation import Federation, State
from jfed.simulation.prediction import Predictor
from jfed.simulation.records import Record
from jfed.simulation.scores import Test, score
from jfed.simulation.under_way import UnderWay
from jfed.tiers import Iterations, Tier, Tiers
from jfed.tiers.communication import Traffic

# Rounds that may be under way on the devices while the host waits for an older one's metrics.
_IN_FLIGHT = 1
Callback = Callable[[Record], Any]  # told of each round, in order, as soon as it is known


@dataclasses.dataclass(frozen=True, repr=False)
class Result:
    """What `jfed.simulate` returns.

    Attributes:
      history: one record a round.
      variables: the global ones after the last round.
      tiers: as trained; None where `jfed.load` cannot know them.
      evaluated: the tiers that were tested, trained ones first.
      traffic: bytes of one client in one round, by tier name; with codecs, as last measured.
      compile_seconds: how long tracing and compiling all programs took.
      engine: devices, lanes and mapping that were used.
      memory: what a client remembers after the last round, by its number; None where the algorithm
        keeps nothing of the clients, and in a result that was loaded.
      norms: the statistics of batch norms that each evaluated tier was last tested with, by name;
        None for models without.
      inputs: what its models take; None where `jfed.load` cannot know it.
      client_names: by number; () in a result that was loaded.
      noise: on the sum of clipped messages, in units of the clip, where clients are private; None
        in a result that was loaded.
    """

    history: tuple[Record, ...]
    variables: Params
    tiers: Tiers | None
    evaluated: tuple[Tier, ...]
    traffic: dict[str, Traffic]
    compile_seconds: float
    engine: EngineConfig
    memory: Callable[[int], Any] | None = None
    norms: Mapping[str, Statistics | None] = dataclasses.field(default_factory=dict)
    inputs: ModelInputs | None = None
    client_names: tuple[str, ...] = ()
    noise: float | None = None

    def __repr__(self) -> str:
        """Rounds and accuracies, not the weights."""
        accuracies = ", ".join(f"{name}: {value:.2%}" for name, value in self.accuracies.items())
        return f"Result(rounds={len(self.history)}, accuracies={{{accuracies}}})"

    def predict(
        self,
        images: Shaped[np.ndarray, "N ..."],
        *,
        tier: str | None = None,
        iterations: Iterations | None = None,
        solver: str | None = None,
        batch_size: int = 250,
    ) -> Float[np.ndarray, "N classes"]:
        """The probabilities of each class, float32.

        Args:
          images: `[N, H, W, C]` as those that were trained on, in the same units; they are
            normalised as those were.
          tier: an evaluated tier, by its name; by default the last that clients ran.
          iterations: in place of it, for tiers of iteration counts: a count that was tested.
          solver: that takes them, by default the one that was trained.
          batch_size: images at a time.

        Raises:
          ConfigError: there is no such tier, or it was not tested, so that its norms are unknown.
          DataError: images of another shape.
        """
        predictor = self.predictor()
        chosen = predictor.choose(tier, iterations, solver)
        return predictor.probabilities(chosen, images, batch_size)

    def evaluate(self, data: Split | Dataset, **options: Any) -> Test:
        """How the model does on other examples.

        Args:
          data: a split, or a data set, of which the test split is taken.
          **options: see `predict`.
        """
        split = data.test if isinstance(data, Dataset) else check_type("data", data, Split)
        return score(self.predict(split.images, **options), split)

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        format: str,
        tier: str | None = None,
        iterations: Iterations | None = None,
        solver: str | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Writes one tier's model into a file, for a device that can afford that tier.

        The file is there whole or not at all; one that was there is replaced. See
        `jfed.simulation.exports` for what the program of "stablehlo" and "onnx" takes and gives.

        "safetensors": arrays `params/PATH`, the tier's parameters by their path in its model's
        tree; `norms/PATH/mean` and `norms/PATH/var`, what its batch norms normalise with (of an ODE
        block `[steps, solver's stages, C]`, zeros in steps that the tier does not take);
        `images/mean` and `images/std`, `[C]`, of the pixels. Where tiers keep entries for
        themselves, these are `params/shared/NAME` and `params/own/NAME`, with one row. Its metadata
        tell tier, iterations, solver, class names, and shape and type of the images.

        "stablehlo": `jax.export.deserialize(bytes).call(pixels)` runs it on CPU, CUDA and TPU; JAX
        promises to read it for half a year. It has no place for metadata.

        "onnx", by jax2onnx (`pip install 'jfed[onnx]'`): from `pixels` to `logits`, with
        safetensors' metadata. Convolutions in bfloat16 stay so, which ONNX Runtime has for few
        devices.

        Args:
          path: of the file, local or remote.
          format: "safetensors", "stablehlo" or "onnx".
          tier: see `predict`, as `iterations` and `solver`.
          iterations: see `predict`.
          solver: see `predict`.
          batch_size: images at a time; None: any number.

        Raises:
          ConfigError: no such format or tier, or one that was not tested; jax2onnx is not
            installed, or does not know what a model of the user's own computes.
          RunFolderError: the file cannot be written.
        """
        predictor = self.predictor()
        chosen = predictor.choose(tier, iterations, solver)
        exports.write(predictor, chosen, path, format=format, batch_size=batch_size)

    def predictor(self) -> Predictor:
        """What predictions and exports are made of; ConfigError if the result lacks some of it."""
        if self.tiers is None:
            raise ConfigError(
                "the result does not know its tiers: load it with those that it was trained with, "
                "jfed.load(workdir, tiers)."
            )
        if self.inputs is None:
            raise ConfigError(
                f"the run has not finished: {len(self.history)} rounds are done. What its norms "
                "and images are normalised with is known at its end."
            )
        return Predictor(self.tiers, self.evaluated, self.variables, self.norms, self.inputs)

    @property
    def accuracies(self) -> dict[str, float]:
        """Test accuracy after the last round, by tier name."""
        last = self.history[-1].evaluations if self.history else {}
        return {name: evaluation.accuracy for name, evaluation in last.items()}

    def plot(self) -> Any:
        """A matplotlib figure of test accuracy over rounds, one line a tier; notebooks show it."""
        from jfed.reports import plots

        return plots.accuracy(self.history, self.tiers.kind if self.tiers else "tier")


def run(
    federation: Federation,
    callbacks: Sequence[Callback] = (),
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Runs every round of a federation; see `jfed.simulate`, and `iterate` for `stop`."""
    history: list[Record] = []
    last: State | None = None
    for state, record in iterate(federation, stop=stop):
        last = state
        history.append(record)
        tell(callbacks, record)
    assert last is not None
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


def make_result(federation: Federation, state: State, history: Sequence[Record]) -> Result:
    """The result of a federation whose last state and records these are."""
    return Result(
        history=tuple(history),
        variables=state.server.variables,
        tiers=federation.tiers,
        evaluated=federation.evaluated,
        traffic=federation.traffic_of(state),
        compile_seconds=federation.compile_seconds,
        engine=federation.engine,
        memory=federation.recall(state),
        norms=to_host(federation.norms),
        inputs=federation.inputs,
        client_names=federation.client_names,
        noise=federation.noise,
    )


def iterate(
    federation: Federation,
    history: Sequence[Record] = (),
    state: State | None = None,
    stop: Callable[[], bool] = lambda: False,
    keep: Callable[[int], bool] = lambda round_: False,
) -> Iterator[tuple[State | None, Record]]:
    """Runs the rounds that follow `history`; yields each one's record, and the state after some.

    A round takes over the state before it, so states are copied where they are asked for.

    Args:
      federation: compiled or not.
      history: records of the rounds done so far.
      state: after them; not needed before the first round.
      stop: asked often while waiting for the devices; once it says True, no more rounds begin, and
        that under way is the last.
      keep: whether the state after a round (numbered from 1) is wanted. That after the last round
        is given in any case.

    Raises:
      ConfigError: a sampler or a schedule of the user's own gives what cannot be; the rounds before
        are given first, and the state after them.
      DivergedError, DeviceMemoryError: see `simulate`.
    """
    if len(history) == federation.rounds:
        return
    history = list(history)
    with explain_memory(federation):
        federation.compile()
        began = time.perf_counter() - (history[-1].seconds if history else 0.0)
        state = federation.start if state is None else state
        for after, started in _in_flight(federation, state, len(history), stop, keep):
            _wait(started, stop)
            record = started.fetch(history[-1] if history else None, began)
            check_finite(record, federation, bool(started.finite), history, started.diverged())
            history.append(record)
            yield after, record


def _in_flight(
    federation: Federation,
    state: State,
    first: int,
    stop: Callable[[], bool],
    keep: Callable[[int], bool],
) -> Iterator[tuple[State | None, UnderWay]]:
    """Starts round after round; yields each once `_IN_FLIGHT` later ones are under way."""
    under_way = collections.deque[tuple[State | None, UnderWay]]()
    failure: ConfigError | None = None
    for number in range(first, federation.rounds):
        if stop() and under_way:
            break
        try:
            state, started = federation.round(state, number)
        except ConfigError as error:
            if _is_gone(state):  # another host's: there is no state any more
                raise
            failure = error
            break
        under_way.append((federation.copy(state) if keep(number + 1) else None, started))
        if len(under_way) > _IN_FLIGHT:
            yield under_way.popleft()
    while len(under_way) > 1:
        yield under_way.popleft()
    if under_way:
        yield state, under_way.popleft()[1]
    if failure is not None:
        raise failure


def _is_gone(state: State) -> bool:
    """Whether the state was given to a program that may write where it was."""
    arrays = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    return any(array.is_deleted() for array in arrays)


def _wait(started: UnderWay, stop: Callable[[], bool]) -> None:
    """Waits for a round; signals are heard meanwhile."""
    pause = 1e-4
    while not started.ready():
        stop()
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


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
            f"batch_size or evaluation's batch_size ({federation.evaluation.batch_size}), or keep "
            "the training images on the host (engine images). "
            f"JAX: {first_line}"
        ) from error


def check_finite(
    record: Record, federation: Federation, finite: bool, history: Sequence[Record], diverged: bool
) -> None:
    """Raises DivergedError if a loss of the round, or a variable after it, is not finite.

    The test loss of a tier that no client trains may be anything.

    Args:
      record: of the round.
      federation: whose members' tests count.
      finite: whether the variables after it are.
      history: of the rounds before.
      diverged: whether clients trained honestly and the updates of all of them were rejected.
    """
    trained = {tier.name for tier in federation.tiers.members}
    losses = {"training loss": record.train_loss} if record.examples else {}
    losses |= {
        f"test loss at {name}": e.loss for name, e in record.evaluations.items() if name in trained
    }
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
