"""A federation set up on its devices, its state, and one round of it."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jfed.algorithms.aggregators import make_aggregator
from jfed.algorithms.algorithm import Algorithm, Server
from jfed.algorithms.catalogue import AlgorithmConfig, make_algorithm
from jfed.algorithms.clients import ClientConfig, learning_rate
from jfed.algorithms.privacy import PrivacyConfig, check_guarantee, check_sum, private_rounds
from jfed.algorithms.servers import ServerConfig, client_weights
from jfed.data import Dataset, check_partition, class_counts
from jfed.data.preprocessing import Augmentation, ModelInputs, channel_moments
from jfed.engine.devices import EVERYWHERE, EngineConfig, make_mesh, platform_of, put, to_host
from jfed.engine.faults import FaultConfig
from jfed.engine.lanes import Inputs, Training
from jfed.engine.memory import ClientMemory
from jfed.engine.packing import Packing, Schedule, pack
from jfed.errors import ConfigError, check_integer, check_type, name_of
from jfed.models.losses import Metrics
from jfed.models.model import Model, Params, by_name, initialise
from jfed.seeds import check_seed
from jfed.simulation import local_tests
from jfed.simulation.checks import (
    check_aggregator,
    check_init,
    check_measure,
    check_model,
    check_training,
)
from jfed.simulation.client_rows import ClientRows
from jfed.simulation.cohort_training import CohortTraining, Outcome
from jfed.simulation.evaluation import EvaluationConfig, Tested, evaluated_tiers
from jfed.simulation.exchanges import Exchange, check_algorithm, check_parts, check_weights
from jfed.simulation.groups import group_tiers, make_groups
from jfed.simulation.local_tests import Chunk, LocalTesting
from jfed.simulation.measured_traffic import Sizes, as_sizes, measure, round_traffic
from jfed.simulation.population import Sampler, make_population
from jfed.simulation.programs import Arguments, Program, RoundStart, Specification, programs
from jfed.simulation.records import columns
from jfed.simulation.scores import column
from jfed.simulation.simulated_time import Clock, TimeConfig, make_devices
from jfed.simulation.testing import Testing
from jfed.simulation.training_costs import TrainingCost, TrainingCosts
from jfed.simulation.training_images import Resident, Streamed, TrainingImages
from jfed.simulation.under_way import UnderWay
from jfed.tiers import Tiers
from jfed.tiers.communication import Traffic, traffic
from jfed.tiers.tier import as_tiers


class State(NamedTuple):
    """A federation between two rounds, all that a checkpoint needs.

    Attributes:
      server: what the server keeps, on the devices. A round takes it over: a state is used once.
      latest: `[clients]` which round's row of memory each client has, see
        `jfed.engine.memory.ClientMemory`; () where clients remember nothing.
      sizes: `[tiers, 2]` bytes of a client in a round, as last measured, or as counted from shapes.
    """

    server: Server
    latest: Any
    sizes: Any


# What `Federation` takes, if it is given.
_KINDS = {
    "algorithm": Algorithm,
    "client": ClientConfig,
    "server": ServerConfig,
    "evaluation": EvaluationConfig,
    "augmentation": Augmentation,
    "engine": EngineConfig,
    "faults": FaultConfig,
    "privacy": PrivacyConfig,
    "time": TimeConfig,
}


def _check_kinds(given: Mapping[str, Any]) -> None:
    if isinstance(algorithm := given["algorithm"], str):
        raise ConfigError(
            "algorithm must be an Algorithm, such as jfed.algorithms.scaffold(client, server), "
            f"got {algorithm!r}."
        )
    for name, value in given.items():
        check_type(name, value, _KINDS[name], type(None))


class Federation:
    """A federation: settings checked, data on the devices, programs ready to be compiled.

    Takes the arguments of `jfed.simulate`, and the devices, see `make_mesh`; on devices that are
    only described, its programs can be compiled, not run. `round` is a function of the state and
    the round's number alone, so a run can be continued from any state.
    """

    def __init__(
        self,
        data: Dataset,
        partition: Sequence[Any],
        tiers: Tiers | Model,
        *,
        rounds: int,
        cohort: int | None = None,
        sampler: Sampler | None = None,
        shares: Sequence[float] | None = None,
        draw_tiers: int = 0,
        algorithm: Algorithm | None = None,
        client: ClientConfig | None = None,
        server: ServerConfig | None = None,
        evaluation: EvaluationConfig | None = None,
        augmentation: Augmentation | None = None,
        engine: EngineConfig | None = None,
        faults: FaultConfig | None = None,
        privacy: PrivacyConfig | None = None,
        time: TimeConfig | None = None,
        allow_unused: bool = False,
        allow_overlap: bool = False,
        seed: int = 0,
        memory_folder: epath.Path | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        check_type("data", data, Dataset)
        given = algorithm, client, server, evaluation, augmentation, engine, faults, privacy, time
        _check_kinds(dict(zip(_KINDS, given, strict=True)))
        self.rounds = check_integer("rounds", rounds, least=1)
        self.compile_seconds = 0.0
        self.client = client or ClientConfig()
        self.server = server or ServerConfig()
        self.evaluation = evaluation or EvaluationConfig()
        self.time = time or TimeConfig()
        self.augmentation = augmentation or Augmentation()
        if self.augmentation and len(data.image_shape) != 3:
            raise ConfigError(
                f"augmentation needs images [N, H, W, C], got shape {data.train.images.shape}."
            )
        self.tiers = as_tiers(tiers)
        if self.server.weights is None:
            self.server = dataclasses.replace(self.server, weights=self.tiers.weights)
        self.algorithm = algorithm or make_algorithm(
            AlgorithmConfig(), self.client, self.server, self.tiers.algorithm
        )
        self.key = jax.random.key(check_seed(seed))
        self.seed = seed
        examples = check_partition(
            partition,
            len(data.train),
            allow_unused=allow_unused,
            allow_overlap=allow_overlap,
        )
        self._tested: Any = None  # what each client is tested on, if anything
        if share := self.evaluation.local_test:
            examples, self._tested = local_tests.split(examples, share, seed=seed)
        self.noise: float | None = None
        self._spent: Callable[[int], float] | None = None
        attacks = faults is not None and max(faults.exploding, faults.hostile) > 0
        if privacy is not None and privacy.clip is not None:
            cohort, sampler = self._be_private(privacy, len(examples), cohort, sampler, attacks)
        elif self.algorithm.is_private:
            check_sum(self.server, attacks=attacks)
        self.population = make_population(
            examples,
            tiers=len(self.tiers.members),
            shares=shares,
            cohort=cohort,
            sampler=sampler,
            weights=client_weights(self.server, list(map(len, examples))),
            draw_tiers=draw_tiers,
            client=self.client,
            seed=seed,
            idle=self.tiers.idle,
            faults=faults,
        )
        self.client_names = data.names_of(examples)
        like = self._check(data)
        self._choose_devices(engine or EngineConfig(), devices, data, like, memory_folder)
        self._place(data)

    def _be_private(
        self,
        privacy: PrivacyConfig,
        clients: int,
        cohort: int | None,
        sampler: Sampler | None,
        attacks: bool,
    ) -> tuple[int, Sampler | None]:
        """Makes the algorithm private; returns who is drawn: at most how many, and by what."""
        if sampler is not None:
            raise ConfigError(f"dp_clip draws clients itself, got sampler {name_of(sampler)}.")
        check_guarantee(
            privacy,
            self.server,
            clients,
            attacks=attacks,
            late_by_message=self.time.deadline is not None and self.algorithm.measured,
        )
        found = private_rounds(self.algorithm, privacy, clients, cohort, self.rounds)
        self.algorithm, self.noise, self._spent = found.algorithm, found.noise, found.epsilon
        if (draw := found.draw) is None:
            return found.cohort, None
        return found.cohort, lambda number, rng: draw(clients, rng)

    def _check(self, data: Dataset) -> Params:
        """Checks what clients and server do, and tells what travels and what is recorded.

        Returns:
          Shapes and dtypes of the global variables.
        """
        self.server.check_cohort(self.population.cohort)
        self.evaluated = evaluated_tiers(self.tiers, self.evaluation)
        like = check_init(self.tiers, self.key)
        for tier in self.evaluated:
            check_model(tier, like, data, self.evaluation.batch_size)
        self.traffic: dict[str, Traffic] = {}
        self._exchanges: dict[int, Exchange] = {}  # by tier
        trained: dict[str, None] = {}
        for group in group_tiers(self.tiers.members):  # which differ in numbers only
            tiers = [self.tiers.members[i] for i in group]
            check_training(tiers[0], like, self.client, data)
            found = check_algorithm(tiers[0], like, self.algorithm, self.client, data)
            check_parts(found.message, self.server)
            self._exchanges |= dict.fromkeys(group, found)
            trained |= dict.fromkeys(by_name(found.metrics.others))
            for tier in tiers:
                self.traffic[tier.name] = traffic(
                    tier, like, (found.sent, found.message), self.algorithm.personal
                )
        told = self.population.able()
        check_weights(self.algorithm, self.tiers.members[0], self._exchanges[0].sent, told)
        own = check_measure(self.evaluation, data)
        tested = (*map(column, self.evaluation.metrics), *own)
        local = [tier.name for tier in self.tiers.members] if self._tested else []
        self.columns = columns(
            [tier.name for tier in self.evaluated],
            tuple(trained),
            tested,
            local,
            is_private=self._spent is not None,
            is_timed=bool(self.time.devices_of_clients),
        )
        check_aggregator(make_aggregator(self.server), like, self.population.cohort)
        self.population.sample(0)
        for number in (0, self.rounds - 1):
            learning_rate(self.client, number, self.rounds)
        return like

    def _choose_devices(
        self,
        engine: EngineConfig,
        devices: Sequence[jax.Device] | None,
        data: Dataset,
        like: Params,
        memory_folder: epath.Path | None,
    ) -> None:
        """Chooses devices and lanes by what training costs, and what each program trains there."""
        self._costs = TrainingCosts(
            self.tiers.members, like, self._exchanges, data.image_shape, self.client.batch_size
        )
        self.clock = self._make_clock() if self.time.devices_of_clients else None
        self.engine = engine.resolve(self.population.cohort, devices, self._costs.useful_lanes)
        self._mesh = make_mesh(self.engine.devices, devices)
        self._rows = ClientRows(
            jax.eval_shape(self.algorithm.memory_init, like),
            lambda: jax.tree.map(jnp.asarray, self.algorithm.memory_init(self._variables)),
            len(self.population.partition),
            memory_folder,
            self._mesh,
        )
        self._groups = make_groups(
            self.tiers.members, like, self.population, self.engine, data, self._rows.remember
        )

    def _make_clock(self) -> Clock:
        clock = Clock(
            make_devices(self.time, self.population), self._costs.flops, self.time.deadline
        )
        # What codecs come to is known only once they ran.
        none = np.zeros_like(self._counted)
        clock.check(self.population, none if self.algorithm.measured else self._counted)
        return clock

    def training_costs(self) -> dict[str, TrainingCost]:
        """What training costs a client, by the name of its tier; takes a moment for each."""
        return self._costs.of_clients(self.population)

    @functools.cached_property
    def _spec(self) -> Specification:
        aggregator = make_aggregator(self.server)
        trainings = tuple(
            Training(
                tiers=group.program.tiers,
                algorithm=self.algorithm,
                augmentation=self.augmentation,
                mesh=self._mesh,
                mapping=self.engine.mapping,
                slots=group.packing.slots,
                stacked=aggregator is not None,
                clip=self.server.clip_updates,
                streamed=self.engine.images == "host",
                faults=self.population.faults,
                metrics=jax.tree.structure(self._exchanges[group.tiers[0]].metrics),
            )
            for group in self._groups
        )
        counts = np.bincount(self.population.tier, minlength=len(self.tiers.members)).tolist()
        tuning = self.client if self.evaluation.finetune_epochs else None
        tested = group_tiers(self.evaluated)
        return Specification(
            trainings=trainings,
            evaluated=tuple(tuple(self.evaluated[i] for i in members) for members in tested),
            aggregator=aggregator,
            population=tuple(tuple(counts[i] for i in group.tiers) for group in self._groups),
            clients=len(self.population.partition),
            measure=self.evaluation.measure,
            keep=bool(self.evaluation.metrics),
            local=tuple(
                LocalTesting(t.tiers, t.algorithm, tuning, t.augmentation, t.mesh, t.streamed)
                for t in trainings
                if self._tested
            ),
        )

    def _place(self, data: Dataset) -> None:
        """Puts images on the devices, once for the whole run, but for those that are streamed."""
        moments = channel_moments(data.train.images)
        pixels = str(data.train.images.dtype)
        self.inputs = ModelInputs(data.image_shape, *moments, data.class_names, pixels)
        everywhere = functools.partial(put, mesh=self._mesh, spec=EVERYWHERE)
        lying = Streamed if self.engine.images == "host" else Resident
        self._images: TrainingImages = lying(data.train, moments, self._mesh)
        self._present = None
        if self.client.mask_absent_classes:
            partition = self.population.partition
            present = class_counts(data.train.labels, partition, data.num_classes) > 0
            self._present = everywhere(present)
        self._key = everywhere(jax.random.fold_in(self.key, 1))
        calls = {
            Program("local", config.tiers): local_tests.chunks(
                config, self.population, group.tiers, self._tested, self.evaluation, self._images
            )
            for config, group in zip(self._spec.local, self._groups, strict=False)
        }
        placed = self._spec, self._images, self._rows
        self.norms: dict[str, Any] = {}  # statistics of each evaluated tier, as last measured
        self._testing = Testing(*placed, calls, self.evaluation, data, self.inputs, self.seed)
        self._training = CohortTraining(*placed, self._groups, self._exchanges[0].message)

    @functools.cached_property
    def _variables(self) -> Params:
        """What the global variables begin with."""
        return initialise(self.tiers.init, jax.random.fold_in(self.key, 0))

    @functools.cached_property
    def _first(self) -> Server:
        """What the server begins with, on the host."""
        return to_host(Server(self._variables, self.algorithm.server_init(self._variables)))

    @property
    def memory(self) -> ClientMemory | None:
        """What clients remember, on the host; None where the algorithm keeps nothing of theirs."""
        return self._rows.memory

    def recall(self, state: State) -> Callable[[int], Any] | None:
        """What each client remembers in a state, by its number."""
        return self._rows.recall(state.latest)

    @property
    def start(self) -> State:
        """The state before the first round."""
        return self.place(State(self._first, self._rows.begin(), self._counted))

    @property
    def state_shapes(self) -> State:
        """Shapes and dtypes of the state."""
        variables = jax.eval_shape(self.tiers.init, self.key)
        server = Server(variables, jax.eval_shape(self.algorithm.server_init, variables))
        return State(server, self._rows.begin(), self._counted)

    @property
    def _counted(self) -> Sizes:
        return as_sizes([self.traffic[tier.name] for tier in self.tiers.members])

    def traffic_of(self, state: State) -> dict[str, Traffic]:
        """Bytes of a client in a round, by the name of its tier."""
        names = [tier.name for tier in self.tiers.members]
        return {n: Traffic(*map(int, row)) for n, row in zip(names, state.sizes, strict=True)}

    def place(self, state: State) -> State:
        """Puts a state on the devices."""
        return state._replace(server=put(state.server, self._mesh, EVERYWHERE))

    def copy(self, state: State) -> State:
        """A state that outlives the next round."""
        return state._replace(server=jax.tree.map(jnp.copy, state.server))

    @functools.cached_property
    def _compiled(self) -> tuple[dict[Program, jax.stages.Compiled], float]:
        """The programs, and the seconds that tracing and compiling them took."""
        began = time.perf_counter()
        compiled = programs(self._spec).compile(self.arguments())
        return compiled, time.perf_counter() - began

    def _program(self, program: Program) -> jax.stages.Compiled:
        return self._compiled[0][program]

    def lower(self, arguments: Arguments) -> dict[Program, jax.stages.Lowered]:
        """The programs for such arguments (see `arguments`), traced for the devices, no more."""
        return programs(self._spec).lower(arguments)

    @property
    def platform(self) -> str:
        """Of the devices: "cpu", "gpu" or "tpu"."""
        return platform_of(self._mesh)

    def arguments(self) -> Arguments:
        """The arguments of every program, as of the first round, or like them."""
        start = self._begin(self.start, 0, 0.0)
        if self.engine.mapping == "debug":
            return self._testing.arguments(start)
        return {**self._testing.arguments(start), **self._training.arguments(start)}

    def compile(self) -> float:
        """Compiles every program, several at a time, once; returns the seconds that it took."""
        self.compile_seconds = self._compiled[1]
        return self.compile_seconds

    def round(self, state: State, number: int) -> tuple[State, UnderWay]:
        """Starts round `number` (from 0) on the devices and returns without waiting for it.

        Where clients remember, it waits for the round, whose rows the next one may need.
        """
        rate = learning_rate(self.client, number, self.rounds)
        cohort = self.population.sample(number)
        by_tier = self.population.work(number, cohort)
        start = self._begin(state, number, rate)
        due = self._due(number)
        # When a run is tested, and for how long it goes on, must not decide who is late.
        if self.algorithm.measured and (number == 0 or (due and self.time.deadline is None)):
            given = self._training, self.population, self._program, start, by_tier
            state = state._replace(sizes=measure(*given, state.sizes))
        lasts: float | None = None
        if self.clock is not None:
            by_tier, lasts = self.clock.round(cohort, by_tier, state.sizes)
        work = [group.own(by_tier) for group in self._groups]
        done = Outcome(state.server, state.latest)
        if any(work) or self.algorithm.is_private:
            done = self._training.run(self._program, start, work)
            state = State(done.server, done.latest, state.sizes)
        evaluations = self.evaluate(state) if due else {}
        local: list[tuple[Sequence[int], Metrics]] = []
        if due:  # fine-tuned at the first round's learning rate
            first = learning_rate(self.client, 0, self.rounds)
            local = self._testing.test_clients(self._program, self._begin(state, number, first))
        under_way = UnderWay(
            number=number,
            clients=sum(map(len, cohort)),
            work=work,
            learning_rate=rate,
            traffic=round_traffic(state.sizes, cohort, by_tier),
            load=done.load,
            reports=done.reports,
            evaluations=evaluations,
            finite=done.finite,
            local=local,
            epsilon=self._spent(number + 1) if self._spent and due else None,
            lasts=lasts,
            score=self._testing.score,
            tier_of=lambda client: self.tiers.members[self.population.tier[client]].name,
        )
        return state, under_way

    def _begin(self, state: State, number: int, rate: float) -> RoundStart:
        numbers = put((np.int32(number), np.float32(rate)), self._mesh, EVERYWHERE)
        inputs = Inputs(state.server, self._images.whole, self._present, self._key, *numbers)
        return RoundStart(number, inputs, state.latest)

    def evaluate(self, state: State) -> dict[str, Tested]:
        """Tests of each evaluated tier, arrays on the device, by name."""
        found = self._testing.evaluate(self._program, state.server.variables)
        self.norms = {name: tested.statistics for name, tested in found.items()}
        return {tier.name: found[tier.name] for tier in self.evaluated}

    def host_seconds(self, number: int) -> float:
        """Seconds of a round's work on the host: sampling, packing, sending the schedule."""
        began = time.perf_counter()
        for group, (_, packed) in zip(self._groups, self.schedules(number), strict=True):
            jax.block_until_ready(self._training.send(group, packed))
        return time.perf_counter() - began

    def schedules(self, number: int) -> list[tuple[Packing, Schedule]]:
        """What each training program does in a round, were nobody late."""
        by_tier = self.population.work(number, self.population.sample(number))
        return [(g.packing, pack(g.own(by_tier), g.packing)) for g in self._groups]

    @property
    def local_calls(self) -> Mapping[Program, Sequence[Chunk]]:
        """The calls of each program that tests clients on examples of their own."""
        return self._testing.calls

    def _due(self, number: int) -> bool:
        every = self.evaluation.every
        return number + 1 == self.rounds or (every > 0 and (number + 1) % every == 0)
