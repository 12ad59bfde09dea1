"""A federation set up on its devices, and one round of it."""

import concurrent.futures
import functools
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from jfed import tiers as tiers_lib
from jfed.data import Dataset, check_partition, class_counts
from jfed.data.preprocessing import Augmentation, make_preprocess
from jfed.engine.client import ClientConfig, learning_rate
from jfed.engine.devices import EVERYWHERE, SPREAD, make_mesh, put
from jfed.engine.faults import FaultConfig
from jfed.engine.lanes import EngineConfig, make_trainer, put_schedule
from jfed.engine.merging import Updates, nothing
from jfed.engine.packing import Load, Schedule, Work, load, pack
from jfed.engine.server import (
    ServerConfig,
    ServerState,
    make_server_optimizer,
    make_server_step,
)
from jfed.errors import ConfigError, check_integer, check_type
from jfed.models.losses import Metrics
from jfed.models.model import Model, Params, initialise
from jfed.seeds import check_seed, generator
from jfed.simulation.checks import check_model, check_training
from jfed.simulation.evaluation import EvaluationConfig, Examples, in_batches, make_evaluator
from jfed.simulation.population import make_population
from jfed.simulation.under_way import UnderWay
from jfed.tiers import Tier, Tiers
from jfed.tiers.communication import Traffic, traffic


class Federation:
    """A federation: settings checked, data on the devices, programs ready to be compiled.

    Takes the arguments of `jfed.simulate`. `round` is a function of the state and the round's
    number alone, so a run can be continued from any state.
    """

    def __init__(
        self,
        data: Dataset,
        partition: Sequence[Any],
        tiers: Tiers | Model,
        *,
        rounds: int,
        cohort: int | None = None,
        shares: Sequence[float] | None = None,
        draw_tiers: int = 0,
        client: ClientConfig | None = None,
        server: ServerConfig | None = None,
        evaluation: EvaluationConfig | None = None,
        augmentation: Augmentation | None = None,
        engine: EngineConfig | None = None,
        faults: FaultConfig | None = None,
        seed: int = 0,
    ) -> None:
        check_type("data", data, Dataset)
        for name, value, kind in (
            ("client", client, ClientConfig),
            ("server", server, ServerConfig),
            ("evaluation", evaluation, EvaluationConfig),
            ("augmentation", augmentation, Augmentation),
            ("engine", engine, EngineConfig),
            ("faults", faults, FaultConfig),
        ):
            check_type(name, value, kind, type(None))
        self.rounds = check_integer("rounds", rounds, least=1)
        self.compile_seconds = 0.0
        self.client = client or ClientConfig()
        self.server = server or ServerConfig()
        self.evaluation = evaluation or EvaluationConfig()
        self.tiers = as_tiers(tiers)
        self.key = jax.random.key(check_seed(seed))
        self.seed = seed
        self.population = make_population(
            check_partition(partition, len(data.train)),
            tiers=len(self.tiers.members),
            shares=shares,
            cohort=cohort,
            draw_tiers=draw_tiers,
            client=self.client,
            seed=seed,
            idle=self.tiers.idle,
            faults=faults,
        )
        self.server.aggregation.check_cohort(self.population.cohort)
        self.evaluated = evaluated_tiers(self.tiers, self.evaluation)
        like = jax.eval_shape(self.tiers.init, self.key)
        for tier in self.evaluated:
            check_model(tier, like, data)
        for tier in self.tiers.members:
            check_training(tier, like, self.client, data)
        labels, classes = data.train.labels, data.num_classes
        present = class_counts(labels, self.population.partition, classes) > 0
        self._present = present if self.client.mask_absent_classes else None
        self.traffic = {tier.name: traffic(tier, like) for tier in self.tiers.members}
        clients = -(-self.population.cohort // len(self.tiers.members))
        self.engine = (engine or EngineConfig()).resolve(clients)
        self._mesh = make_mesh(self.engine.devices)
        self._lanes = (self.engine.lanes or 1) * self._mesh.size
        stacked = self.server.aggregation.stacked
        self._slots = [
            self.population.slots(i) if stacked else None for i in range(len(self.tiers.members))
        ]
        self._capacity = self.population.capacity(self._lanes)
        self._optimizer = make_server_optimizer(self.server)
        self._make_programs(data, augmentation or Augmentation())
        self._place(data, like)

    def _make_programs(self, data: Dataset, augmentation: Augmentation) -> None:
        mean, std = _channel_moments(data.train.images)
        preprocess = make_preprocess(mean, std, pad=augmentation.pad, flip=augmentation.flip)
        self._server_step = make_server_step(
            self.tiers.members, self._optimizer, self.server.aggregation
        )
        self._trainers = {
            tier.name: make_trainer(
                tier,
                self.client,
                preprocess,
                self._mesh,
                mapping=self.engine.mapping,
                present=self._present,
                slots=slots,
                clip=self.server.clip_updates,
                faults=self.population.faults,
            )
            for tier, slots in zip(self.tiers.members, self._slots, strict=True)
        }
        self._evaluators = {
            tier.name: make_evaluator(tier, preprocess, self._mesh) for tier in self.evaluated
        }

    def _place(self, data: Dataset, like: Params) -> None:
        """Puts the images on the devices, once for the whole run."""
        size, count = self.evaluation.batch_size, self.evaluation.calibration_examples
        chosen = generator(self.seed, "calibration").permutation(len(data.train))[:count]

        def batches(examples: np.ndarray) -> Array:
            return put(in_batches(examples, size, self._mesh.size), self._mesh, SPREAD)

        everywhere = functools.partial(put, mesh=self._mesh, spec=EVERYWHERE)
        images, labels = self._train = everywhere((data.train.images, data.train.labels))
        self._calibration = Examples(images, labels, batches(chosen))
        images, labels = everywhere((data.test.images, data.test.labels))
        self._test = Examples(images, labels, batches(np.arange(len(data.test))))
        self._no_update = everywhere(
            [_no_update(t, like, s) for t, s in zip(self.tiers.members, self._slots, strict=True)]
        )
        key_data = everywhere(jax.random.key_data(jax.random.fold_in(self.key, 1)))
        self._train_key = jax.random.wrap_key_data(key_data)

    @functools.cached_property
    def start(self) -> ServerState:
        """The state before the first round."""
        variables = initialise(self.tiers.init, jax.random.fold_in(self.key, 0))
        return self.place(ServerState(variables, self._optimizer.init(variables)))

    @property
    def state_shapes(self) -> ServerState:
        """Shapes and dtypes of the state."""
        variables = jax.eval_shape(self.tiers.init, self.key)
        return ServerState(variables, jax.eval_shape(self._optimizer.init, variables))

    def place(self, state: ServerState) -> ServerState:
        """Puts a state on the devices."""
        return put(state, self._mesh, EVERYWHERE)

    @functools.cached_property
    def _compiled(self) -> tuple[dict[str, jax.stages.Compiled], float]:
        """The programs, and the seconds that tracing and compiling them took."""
        began = time.perf_counter()
        variables, schedule = self.start.variables, put_schedule(self._pack([]), self._mesh)
        number, rate = self._scalars(0, 0.0)
        training = (variables, *self._train, schedule, self._train_key, number, rate)
        testing = (variables, self._calibration, self._test)
        lowered = {f"train {t}": run.lower(*training) for t, run in self._trainers.items()}
        lowered |= {f"evaluate {t}": run.lower(*testing) for t, run in self._evaluators.items()}
        lowered["server"] = self._server_step.lower(self.start, self._no_update, number)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = pool.map(lambda program: program.compile(), lowered.values())
            programs = dict(zip(lowered, compiled, strict=True))
        return programs, time.perf_counter() - began

    def compile(self) -> float:
        """Compiles every program, several at a time, once; returns the seconds that it took."""
        self.compile_seconds = self._compiled[1]
        return self.compile_seconds

    def round(self, state: ServerState, number: int) -> tuple[ServerState, UnderWay]:
        """Starts round `number` (from 0) on the devices and returns without waiting for it."""
        rate = learning_rate(self.client, number, self.rounds)
        round_, rate_ = self._scalars(number, rate)
        cohort = self.population.sample(number)
        updates, reports, loads = list(self._no_update), [], []
        done: list[list[Work]] = []
        for i, (tier, clients) in enumerate(zip(self.tiers.members, cohort, strict=True)):
            done.append(work := self.population.work(number, clients))
            if work:
                schedule = self._pack(work)
                loads.append(load(work, schedule))
                updates[i], report = self._compiled[0][f"train {tier.name}"](
                    state.variables,
                    *self._train,
                    put_schedule(schedule, self._mesh),
                    self._train_key,
                    round_,
                    rate_,
                )
                reports.append(report)
        finite: Array | np.bool_ = np.bool_(True)
        if reports:
            state, finite = self._compiled[0]["server"](state, updates, round_)
        under_way = UnderWay(
            number=number,
            clients=(sampled := sum(map(len, cohort))),
            dropped=sampled - sum(map(len, done)),
            honest=sum(item.fault == 0 for work in done for item in work),
            learning_rate=rate,
            traffic=self._bytes(cohort, done),
            load=functools.reduce(Load.plus, loads, Load(0, 0, 0)),
            reports=reports,
            evaluations=self.evaluate(state) if self._due(number) else {},
            finite=finite,
        )
        return state, under_way

    def evaluate(self, state: ServerState) -> dict[str, Metrics]:
        """Test metrics of each evaluated tier, arrays on the device, by name."""
        return {
            tier.name: self._compiled[0][f"evaluate {tier.name}"](
                state.variables, self._calibration, self._test
            )
            for tier in self.evaluated
        }

    def _scalars(self, number: int, rate: float) -> tuple[Array, Array]:
        """The round's number and learning rate on the devices."""
        return put((np.int32(number), np.float32(rate)), self._mesh, EVERYWHERE)

    def _pack(self, work: Sequence[Work]) -> Schedule:
        return pack(work, self._lanes, self.client.batch_size, self._capacity)

    def _bytes(self, cohort: Sequence[np.ndarray], done: Sequence[Sequence[Work]]) -> Traffic:
        """The model to the whole cohort, and an update from each client that did work."""
        each = [self.traffic[tier.name] for tier in self.tiers.members]
        return Traffic(
            sum(len(c) * t.down for c, t in zip(cohort, each, strict=True)),
            sum(len(work) * t.up for work, t in zip(done, each, strict=True)),
        )

    def _due(self, number: int) -> bool:
        every = self.evaluation.every
        return number + 1 == self.rounds or (every > 0 and (number + 1) % every == 0)


def as_tiers(tiers: Tiers | Model) -> Tiers:
    """The tiers, or the one tier of a model; ConfigError for anything else."""
    if isinstance(tiers, Model):
        return tiers_lib.single(tiers)
    if not isinstance(tiers, Tiers):
        raise ConfigError(
            f"tiers must be a Model, or Tiers as jfed.tiers.ode(config, ...) makes them, got "
            f"{tiers!r}."
        )
    return tiers


def evaluated_tiers(tiers: Tiers, evaluation: EvaluationConfig) -> tuple[Tier, ...]:
    """The tiers that clients run, then others: those to be tested, other counts, other solvers."""
    if tiers.at is None:
        for name in ("iterations", "solvers"):
            if given := getattr(evaluation, name):
                raise ConfigError(f"evaluation {name} {given!r} need tiers of iteration counts.")
        return (*tiers.members, *tiers.tested)
    others = [tiers.at(count) for count in evaluation.iterations]
    counts = [tier.iterations for tier in (*tiers.members, *others) if tier.iterations is not None]
    others += [
        tiers.at(count, solver) for solver in evaluation.solvers for count in counts if any(count)
    ]
    found: dict[str, Tier] = {}
    for tier in (*tiers.members, *tiers.tested, *others):
        found.setdefault(tier.name, tier)
    return tuple(found.values())


def _no_update(tier: Tier, like: Params, slots: int | None) -> Updates:
    """What a tier delivers in a round in which none of its clients take part."""
    shapes = jax.eval_shape(lambda: nothing(tier.shapes(like), slots))
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


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
