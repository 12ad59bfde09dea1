"""The round loop: sample, train, merge, server step, evaluate, record."""

import collections
import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jfed.data import Dataset, check_partition
from jfed.errors import ConfigError, DivergedError
from jfed.evaluation import Examples, in_batches, make_evaluator
from jfed.federation import tiers as tiers_lib
from jfed.federation.aggregation import TierUpdate
from jfed.federation.client import ClientConfig, Metrics, learning_rate, make_preprocess
from jfed.federation.communication import Traffic, traffic
from jfed.federation.engine import (
    EngineConfig,
    Schedule,
    Work,
    capacity,
    client_batches,
    client_steps,
    make_trainer,
    pack,
    put_everywhere,
    put_schedule,
)
from jfed.federation.server import (
    ServerConfig,
    ServerState,
    make_server_optimizer,
    make_server_step,
)
from jfed.federation.tiers import Iterations, Tier, Tiers
from jfed.metrics import Evaluation, Record
from jfed.models.model import Model, Params, initialise

# Rounds that may be under way on the device before the host waits for the oldest one's metrics.
_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """When and how the global model is tested.

    Attributes:
      every: rounds between evaluations; the last round is always evaluated. 0: only the last.
      iterations: iteration counts to test beside those that clients run.
      batch_size: examples in a batch.
      calibration_examples: training examples that batch-norm statistics are measured on.
    """

    every: int = 1
    iterations: tuple[Iterations, ...] = ()
    batch_size: int = 250
    calibration_examples: int = 2000

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("batch_size", 1), ("calibration_examples", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"evaluation {name} must be {least} or more, got {value!r}.")


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random changes to training images, on the device.

    Attributes:
      pad: zeros around an image before a random crop of its old size; 0 for no crop.
      flip: mirror half of the images left to right.
    """

    pad: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.pad, int) or self.pad < 0:
            raise ConfigError(f"augmentation pad must be 0 or more, got {self.pad!r}.")


@dataclasses.dataclass(frozen=True)
class Result:
    """What `simulate` returns.

    Attributes:
      history: one record a round.
      variables: the global ones after the last round.
      tiers: as trained.
      evaluated: the tiers that were tested, trained ones first.
      traffic: bytes of one client in one round, by tier name.
      compile_seconds: how long tracing and compiling all programs took.
    """

    history: tuple[Record, ...]
    variables: Params
    tiers: Tiers
    evaluated: tuple[Tier, ...]
    traffic: dict[str, Traffic]
    compile_seconds: float

    @property
    def accuracies(self) -> dict[str, float]:
        """Test accuracy after the last round, by tier name."""
        last = self.history[-1].evaluations if self.history else {}
        return {name: evaluation.accuracy for name, evaluation in last.items()}

    def plot(self) -> Any:
        """A matplotlib figure of test accuracy over rounds, one line a tier."""
        from jfed import plots

        return plots.accuracy(self.history)


def simulate(
    data: Dataset,
    partition: Sequence[np.ndarray],
    tiers: Tiers | Model,
    *,
    rounds: int,
    cohort: int | None = None,
    shares: Sequence[float] | None = None,
    draw_tiers: bool = False,
    client: ClientConfig | None = None,
    server: ServerConfig | None = None,
    evaluation: EvaluationConfig | None = None,
    augmentation: Augmentation | None = None,
    engine: EngineConfig | None = None,
    seed: int = 0,
    on_round: Callable[[Record], None] | None = None,
) -> Result:
    """Runs federated learning and returns what came of it.

    The same arguments give the same bits on the same machine.

    Args:
      data: training images for the clients, test images for the evaluation.
      partition: for each client the indices of its training examples, see `jfed.data.partition`.
      tiers: what clients train, see `jfed.federation.tiers`; a `Model` makes one tier.
      rounds: how many.
      cohort: clients that train in a round, drawn without replacement; all by default.
      shares: of the clients, for each tier, summing to 1; equal by default.
      draw_tiers: each sampled client draws its tier anew in each round, with `shares` as
        probabilities, instead of keeping one.
      client: how clients train.
      server: how the server uses their mean update.
      evaluation: when and how the global model is tested.
      augmentation: of training images.
      engine: how clients are spread over devices.
      seed: of everything random.
      on_round: called with each record, in order, as soon as it is known.

    Raises:
      ConfigError: settings that cannot work, before anything is compiled.
      DivergedError: a round's training loss is not finite.
    """
    return Federation(
        data,
        partition,
        tiers,
        rounds=rounds,
        cohort=cohort,
        shares=shares,
        draw_tiers=draw_tiers,
        client=client,
        server=server,
        evaluation=evaluation,
        augmentation=augmentation,
        engine=engine,
        seed=seed,
    ).run(on_round)


class UnderWay(NamedTuple):
    """A round under way on the device: what the host knows of it, and arrays to come."""

    number: int
    clients: int
    learning_rate: float
    traffic: Traffic
    metrics: list[Metrics]
    evaluations: dict[str, Metrics]

    def fetch(self, before: Record | None, seconds: float) -> Record:
        """Waits for the arrays and makes the record that follows `before`."""
        trained = jax.tree.map(lambda *x: sum(map(float, x)), *jax.device_get(self.metrics))
        tested = jax.tree.map(float, jax.device_get(self.evaluations))
        return Record(
            round=self.number + 1,
            clients=self.clients,
            examples=int(trained.examples),
            learning_rate=self.learning_rate,
            train_loss=trained.loss / trained.examples,
            train_accuracy=trained.correct / trained.examples,
            bytes_down=self.traffic.down,
            bytes_up=self.traffic.up,
            bytes_down_total=self.traffic.down + (before.bytes_down_total if before else 0),
            bytes_up_total=self.traffic.up + (before.bytes_up_total if before else 0),
            seconds=seconds,
            evaluations={
                name: Evaluation(m.correct / m.examples, m.loss / m.examples)
                for name, m in tested.items()
            },
        )


class Federation:
    """A federation set up: settings checked, data on the device, programs ready to be compiled.

    Takes the arguments of `simulate`. `init` and `round` are functions of the state and the round's
    number alone, so a run can be continued from any state.
    """

    def __init__(
        self,
        data: Dataset,
        partition: Sequence[np.ndarray],
        tiers: Tiers | Model,
        *,
        rounds: int,
        cohort: int | None = None,
        shares: Sequence[float] | None = None,
        draw_tiers: bool = False,
        client: ClientConfig | None = None,
        server: ServerConfig | None = None,
        evaluation: EvaluationConfig | None = None,
        augmentation: Augmentation | None = None,
        engine: EngineConfig | None = None,
        seed: int = 0,
    ) -> None:
        check_partition(partition, len(data.train))
        self.partition = partition
        self.tiers = tiers_lib.single(tiers) if isinstance(tiers, Model) else tiers
        self.rounds, self.seed = rounds, seed
        self.cohort = len(partition) if cohort is None else cohort
        self.draw_tiers = draw_tiers
        self.client = client or ClientConfig()
        self.evaluation = evaluation or EvaluationConfig()
        self._check()
        engine = engine or EngineConfig()
        self._mesh = engine.mesh()
        self._lanes = engine.lanes * self._mesh.size
        members = self.tiers.members
        self.shares = tiers_lib.check_shares(shares, len(members))
        self.assigned = tiers_lib.assign(len(partition), len(members), shares, seed=seed)
        self.key = jax.random.key(seed)
        like = jax.eval_shape(self.tiers.init, self.key)
        self.evaluated = self._evaluated_tiers()
        for tier in self.evaluated:
            check_model(tier, like, data)
        self.traffic = {tier.name: traffic(tier, like) for tier in members}
        self._programs: dict[str, jax.stages.Compiled] = {}
        steps = [client_steps(len(examples), self.client) for examples in partition]
        self._capacity = capacity(steps, self.cohort, self._lanes)

        augmentation = augmentation or Augmentation()
        mean, std = _channel_moments(data.train.images)
        preprocess = make_preprocess(mean, std, pad=augmentation.pad, flip=augmentation.flip)
        self._optimizer = make_server_optimizer(server or ServerConfig())
        self._server_step = make_server_step(members, self._optimizer)
        self._trainers = {
            tier.name: make_trainer(
                tier, self.client, preprocess, self._mesh, mapping=engine.mapping
            )
            for tier in members
        }
        self._evaluators = {tier.name: make_evaluator(tier, preprocess) for tier in self.evaluated}
        self._no_update = put_everywhere(
            {tier.name: _no_update(tier, like) for tier in members}, self._mesh
        )
        self._train = put_everywhere((data.train.images, data.train.labels), self._mesh)
        self._calibration, self._test = self._evaluation_sets(data)

    def _check(self) -> None:
        clients, extra = len(self.partition), self.evaluation.iterations
        for name, value, least in (
            ("rounds", self.rounds, 1),
            ("cohort", self.cohort, 1),
            ("seed", self.seed, 0),
        ):
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be {least} or more, got {value!r}.")
        if self.cohort > clients:
            raise ConfigError(f"cohort must be at most the {clients} clients, got {self.cohort}.")
        if extra and self.tiers.at is None:
            raise ConfigError(f"evaluation iterations {extra} need tiers of iteration counts.")

    def _evaluated_tiers(self) -> tuple[Tier, ...]:
        at = self.tiers.at
        extra = () if at is None else tuple(at(count) for count in self.evaluation.iterations)
        known = {tier.name for tier in self.tiers.members}
        return (*self.tiers.members, *(tier for tier in extra if tier.name not in known))

    def _evaluation_sets(self, data: Dataset) -> tuple[Examples, Examples]:
        size, count = self.evaluation.batch_size, self.evaluation.calibration_examples
        rng = np.random.default_rng([self.seed, 2])
        chosen = rng.permutation(len(data.train))[:count]
        batches = in_batches(chosen, size), in_batches(np.arange(len(data.test)), size)
        calibration, tested = put_everywhere(batches, self._mesh)
        images, labels = put_everywhere((data.test.images, data.test.labels), self._mesh)
        train_images, train_labels = self._train
        return (
            Examples(train_images, train_labels, calibration),
            Examples(images, labels, tested),
        )

    def init(self) -> ServerState:
        """The state before the first round."""
        variables = initialise(self.tiers.init, jax.random.fold_in(self.key, 0))
        return put_everywhere(ServerState(variables, self._optimizer.init(variables)), self._mesh)

    def run(self, on_round: Callable[[Record], None] | None = None) -> Result:
        """Runs every round; see `simulate`."""
        history: list[Record] = []
        state, under_way = self.init(), collections.deque[UnderWay]()
        compile_seconds = self.compile(state)
        began = time.perf_counter()

        def finish(started: UnderWay) -> None:
            record = started.fetch(history[-1] if history else None, time.perf_counter() - began)
            if not np.isfinite(record.train_loss):
                raise DivergedError(
                    f"round {record.round} of {self.rounds} diverged: its training loss is "
                    f"{record.train_loss}. A learning rate lower than "
                    f"{record.learning_rate:g}, or clip_norm, may help."
                )
            history.append(record)
            if on_round is not None:
                on_round(record)

        for number in range(self.rounds):
            state, started = self.round(state, number)
            under_way.append(started)
            if len(under_way) > _IN_FLIGHT:
                finish(under_way.popleft())
        while under_way:
            finish(under_way.popleft())
        return Result(
            tuple(history),
            state.variables,
            self.tiers,
            self.evaluated,
            self.traffic,
            compile_seconds,
        )

    def compile(self, state: ServerState) -> float:
        """Compiles every program for states like this one; returns the seconds it took.

        Compiling happens in parallel, on as many threads as there are processors.
        """
        began = time.perf_counter()
        schedule = put_schedule(self._pack([]), self._mesh)
        training = (state.variables, *self._train, schedule, self.key, np.float32(0))
        testing = (state.variables, self._calibration, self._test)
        lowered = {f"train {t}": run.lower(*training) for t, run in self._trainers.items()}
        lowered |= {f"evaluate {t}": run.lower(*testing) for t, run in self._evaluators.items()}
        lowered["server"] = self._server_step.lower(state, list(self._no_update.values()))
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = pool.map(lambda program: program.compile(), lowered.values())
            self._programs = dict(zip(lowered, compiled, strict=True))
        return time.perf_counter() - began

    def round(self, state: ServerState, number: int) -> tuple[ServerState, UnderWay]:
        """Starts round `number` (from 0) on the device and returns without waiting for it.

        `compile` must have been called.
        """
        key = jax.random.fold_in(jax.random.fold_in(self.key, 1), number)
        rate = learning_rate(self.client, number, self.rounds)
        updates, metrics = [], []
        members = self._sample(number)
        for tier in self.tiers.members:
            clients = members[tier.name]
            if not len(clients):
                updates.append(self._no_update[tier.name])
                continue
            schedule = put_schedule(self._pack(self._work(number, clients)), self._mesh)
            update, sums = self._programs[f"train {tier.name}"](
                state.variables, *self._train, schedule, key, np.float32(rate)
            )
            updates.append(update)
            metrics.append(sums)
        state = self._programs["server"](state, updates)
        under_way = UnderWay(
            number=number,
            clients=self.cohort,
            learning_rate=rate,
            traffic=self._bytes(members),
            metrics=metrics,
            evaluations=self.evaluate(state) if self._due(number) else {},
        )
        return state, under_way

    def evaluate(self, state: ServerState) -> dict[str, Metrics]:
        """Test metrics of each evaluated tier, device arrays, by name."""
        return {
            tier.name: self._programs[f"evaluate {tier.name}"](
                state.variables, self._calibration, self._test
            )
            for tier in self.evaluated
        }

    def _sample(self, number: int) -> dict[str, np.ndarray]:
        """The cohort of a round: client numbers by tier name."""
        rng = np.random.default_rng([self.seed, 3, number])
        cohort = rng.choice(len(self.partition), self.cohort, replace=False)
        tier = self.assigned[cohort]
        if self.draw_tiers:
            tier = rng.choice(len(self.shares), self.cohort, p=self.shares)
        return {t.name: np.sort(cohort[tier == i]) for i, t in enumerate(self.tiers.members)}

    def _work(self, number: int, clients: np.ndarray) -> list[Work]:
        """What each client of a cohort does; depends on the client and the round alone."""
        work = []
        for client in clients.tolist():
            examples = self.partition[client]
            rng = np.random.default_rng([self.seed, 4, number, client])
            batches = client_batches(examples, self.client, rng)
            work.append(Work(client, batches, float(len(examples))))
        return work

    def _pack(self, work: Sequence[Work]) -> Schedule:
        return pack(work, self._lanes, self.client.batch_size, self._capacity)

    def _bytes(self, members: dict[str, np.ndarray]) -> Traffic:
        down = sum(len(c) * self.traffic[name].down for name, c in members.items())
        up = sum(len(c) * self.traffic[name].up for name, c in members.items())
        return Traffic(down, up)

    def _due(self, number: int) -> bool:
        every = self.evaluation.every
        return number + 1 == self.rounds or (every > 0 and (number + 1) % every == 0)


def _no_update(tier: Tier, like: Params) -> TierUpdate:
    """What a tier delivers in a round in which none of its clients take part."""
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tier.shapes(like))
    return TierUpdate(zeros, np.zeros((), np.float32))


def check_model(tier: Tier, like: Params, data: Dataset) -> None:
    """Raises ConfigError unless the tier's model maps the data's images to logits."""
    images = jax.ShapeDtypeStruct((2, *data.image_shape), jnp.float32)
    mask = jax.ShapeDtypeStruct((2,), jnp.float32)
    batch = (images,) if tier.model.measure is None else (images, mask)
    logits = jax.eval_shape(tier.model.apply, tier.shapes(like), *batch)
    expected = (2, data.num_classes)
    if getattr(logits, "shape", None) != expected or logits.dtype != jnp.float32:
        raise ConfigError(
            f"the model of tier {tier.name!r} maps images {images.shape} to "
            f"{jax.tree.map(lambda x: (x.shape, str(x.dtype)), logits)}; expected logits "
            f"{expected} float32 for the {data.num_classes} classes of {data.name!r}."
        )


def _channel_moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all images, in units of 0 to 255."""
    counts = [np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])]
    values = np.arange(256)
    means = [(n @ values) / n.sum() for n in counts]
    stds = [
        max(np.sqrt((n @ np.square(values - m)) / n.sum()), 1e-3)
        for n, m in zip(counts, means, strict=True)
    ]
    return tuple(map(float, means)), tuple(map(float, stds))
