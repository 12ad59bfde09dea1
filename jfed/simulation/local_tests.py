"""Tests of clients on examples of their own: of personal models, or of the global one."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jfed.algorithms.algorithm import Algorithm, Client
from jfed.algorithms.clients import ClientConfig, make_optimizer
from jfed.algorithms.training import local_training
from jfed.data.partitions import Partition
from jfed.data.preprocessing import Augmentation
from jfed.engine.devices import AXIS, EVERYWHERE, SPREAD, put
from jfed.engine.lanes import Inputs, spread_inputs
from jfed.engine.packing import client_batches
from jfed.errors import ConfigError
from jfed.models.losses import Metrics, cross_entropy, training_loss
from jfed.models.model import Model, Params, Statistics
from jfed.seeds import generator
from jfed.simulation.evaluation import (
    SPREAD_EXAMPLES,
    EvaluationConfig,
    Examples,
    batch_of,
    pool,
    recalibrate,
)
from jfed.simulation.population import Population
from jfed.simulation.records import LocalEvaluation
from jfed.simulation.training_images import Needed, TrainingImages
from jfed.tiers.parts import map_parts
from jfed.tiers.tier import Tier, settings_of

_AT_ONCE = 16  # clients a device is given in one call: as many rows of client memory are on it
_TUNING = np.uint32(2**32 - 6)  # folded into the run's key: of fine-tuning

Parts = Sequence[Int[np.ndarray, " _"]]


def split(partition: Parts, share: float, *, seed: int) -> tuple[Partition, Partition]:
    """Of each client's examples those that it trains on, and those that it is tested on.

    Drawn at random; a client with two examples or more has at least one of each.

    Args:
      partition: all examples of each client.
      share: of them that are held out, above 0 and below 1.
      seed: of the draw.

    Raises:
      ConfigError: a client has a single example.
    """
    train, test = [], []
    for client, examples in enumerate(partition):
        if len(examples) < 2:
            raise ConfigError(
                f"local_test {share:g} leaves client {client}, which has {len(examples)} example, "
                "none to train or none to test on; raise min_examples to 2 or more."
            )
        count = min(max(round(share * len(examples)), 1), len(examples) - 1)
        shuffled = generator(seed, "local test", client).permutation(examples)
        test.append(np.sort(shuffled[:count]))
        train.append(np.sort(shuffled[count:]))
    return tuple(train), tuple(test)


class Tested(NamedTuple):
    """Clients that are tested in one call, and on what; each axis begins with theirs.

    Attributes:
      client: `[C]` their numbers.
      tier: `[C]` their tiers, by place among those of the program.
      train: `[C, S, B]` indices of the examples that it trained on, in batches, shuffled anew for
        each epoch of fine-tuning; the client's own also where a batch is padded.
      train_real: `[C, S]` how many of a batch count, the first ones.
      epoch: `[C]` batches of the first epoch.
      steps: `[C]` batches of all epochs.
      test: `[C, T, B]` indices of those that it is tested on.
      test_real: `[C, T]` as above.
      tests: `[C]` batches to test on; 0 where there is no client.
    """

    client: Any
    tier: Any
    train: Any
    train_real: Any
    epoch: Any
    steps: Any
    test: Any
    test_real: Any
    tests: Any


@dataclasses.dataclass(frozen=True)
class LocalTesting:
    """What decides the program that tests clients of tiers which share one.

    Attributes:
      tiers: that differ in their settings only.
      algorithm: whose personal models are tested.
      client: the optimizer that fine-tunes; None for no fine-tuning.
      augmentation: of what is fine-tuned on.
      mesh: that clients are spread over.
      streamed: see `jfed.engine.lanes.Training`.
    """

    tiers: tuple[Tier, ...]
    algorithm: Algorithm
    client: ClientConfig | None
    augmentation: Augmentation
    mesh: Mesh
    streamed: bool = False

    @property
    def has_own_models(self) -> bool:
        """Whether clients differ in what is tested, so that norms are measured for each."""
        return self.algorithm.personalise is not None or self.client is not None

    @property
    def reads_training(self) -> bool:
        """Whether clients' training examples are needed, to fine-tune or to measure norms."""
        measured = self.has_own_models and self.tiers[0].bound().measure is not None
        return self.client is not None or measured

    @property
    def has_common_norms(self) -> bool:
        """Whether all clients of a tier are tested with the same statistics of norms."""
        return not self.has_own_models and self.tiers[0].bound().measure is not None


def make_local_tester(config: LocalTesting) -> jax.stages.Wrapped:
    """The program that tests clients.

    Returns:
      A jitted `test(inputs, tested, memory, statistics) -> Metrics`, `[C]` sums over the examples
      that each client is tested on. `memory` are the clients' rows, () where models are not
      personal; `statistics` those of norms, `[tiers, ...]`, where all clients of a tier have the
      same model, else None.
    """
    testing = _Tester(config)

    def test(inputs: Inputs, tested: Tested, memory: Any, statistics: Any) -> Metrics:
        def one(given: tuple[Tested, Any]) -> Metrics:
            return testing.one(inputs, given[0], given[1], statistics)

        found = jax.lax.map(one, (tested, memory))
        return jax.tree.map(lambda m: jax.lax.all_gather(m, AXIS, tiled=True), found)

    specs = (spread_inputs(config.streamed), SPREAD, SPREAD, EVERYWHERE)
    # Unchecked for the reason given in `jfed.engine.lanes.make_trainer`.
    return jax.jit(
        jax.shard_map(test, mesh=config.mesh, in_specs=specs, out_specs=EVERYWHERE, check_vma=False)
    )


class _Tester:
    """The program of `make_local_tester` while it is traced."""

    def __init__(self, config: LocalTesting) -> None:
        self.config, self.tier = config, config.tiers[0]
        self.settings = settings_of(config.tiers)

    def one(self, inputs: Inputs, tested: Tested, row: Any, statistics: Any) -> Metrics:
        """Sums over the examples that one client is tested on."""
        setting = jax.tree.map(lambda values: jnp.asarray(values)[tested.tier], self.settings)
        model = self.tier.bound(setting)
        params = self.params(inputs, row)
        if self.config.client is not None:
            params = self.tuned(model, params, inputs, tested)
        if model.measure is None:
            own = None
        elif self.config.has_own_models:
            own = _measured(model, params, inputs, tested)
        else:
            own = jax.tree.map(lambda s: s[tested.tier], statistics)

        def add(i: Array, total: Metrics) -> Metrics:
            batch = batch_of(inputs.images, tested.test[i], tested.test_real[i])
            rest = () if own is None else (None, own)
            _, found = cross_entropy(model.apply(params, batch.images, *rest), batch)
            return jax.tree.map(jnp.add, total, found)

        zero = jnp.zeros(())
        with jax.named_scope("tests"):
            return jax.lax.fori_loop(0, tested.tests, add, Metrics(zero, zero, zero))

    def params(self, inputs: Inputs, row: Any) -> Params:
        """A client's own model, or its tier's part of the global one."""
        variables, algorithm = inputs.server.variables, self.config.algorithm

        def cut(tree: Any) -> Any:
            return map_parts(lambda v: self.tier.extract(v, 0), variables, tree)

        if algorithm.personalise is None:
            return cut(variables)
        return algorithm.personalise(cut(algorithm.send(inputs.server)), cut(row))

    def tuned(self, model: Model, params: Params, inputs: Inputs, tested: Tested) -> Params:
        """A model after training on the client's own examples."""
        assert self.config.client is not None
        training = local_training(
            make_optimizer(self.config.client), start=lambda client, memory: memory
        )
        key = jax.random.fold_in(jax.random.fold_in(inputs.key, _TUNING), tested.client)
        rest = (tested.client, jnp.int32(0), tested.steps, jnp.float32(1), inputs.round)
        client = Client(params, training_loss(model), *rest, inputs.learning_rate)

        def step(i: Array, local: Any) -> Any:
            data_key, loss_key = jax.random.split(jax.random.fold_in(key, i))
            batch = batch_of(
                inputs.images,
                tested.train[i],
                tested.train_real[i],
                self.config.augmentation,
                data_key,
            )
            batch = batch._replace(round=inputs.round)
            if inputs.present is not None:
                batch = batch._replace(present=inputs.present[tested.client])
            return training.client_step(client, local, batch, loss_key)[0]

        local = training.client_init(client, params, key)
        with jax.named_scope("tuning"):
            return jax.lax.fori_loop(0, tested.steps, step, local).params


def _measured(model: Model, params: Params, inputs: Inputs, tested: Tested) -> Statistics:
    """Statistics of norms over the examples that a client trained on."""
    measure = model.measure
    assert measure is not None

    def of(i: Array | int) -> tuple[Statistics, Float[Array, ""]]:
        batch = batch_of(inputs.images, tested.train[i], tested.train_real[i])
        return measure(params, batch.images, batch.mask), batch.mask.sum()

    def add(i: Array, before: tuple[Statistics, Array]) -> tuple[Statistics, Array]:
        found, count = of(i)
        stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), before[0], found)
        return pool(stacked, jnp.stack([before[1], count])), before[1] + count

    with jax.named_scope("norms"):
        return jax.lax.fori_loop(1, tested.epoch, add, of(0))[0]


def make_measurer(config: LocalTesting) -> jax.stages.Wrapped:
    """The program `(variables, calibration) -> statistics` of norms in the global model.

    They are `[tiers, ...]`, those of `make_local_tester`.
    """
    testing = _Tester(config)

    def measure(variables: Params, calibration: Examples) -> Statistics | None:
        params = testing.tier.extract(variables, 0)

        def of(setting: Any) -> Statistics | None:
            return recalibrate(testing.tier.bound(setting), params, calibration, AXIS)

        if not jax.tree.leaves(testing.settings):
            return jax.tree.map(lambda s: s[None], of(testing.settings))
        return jax.lax.map(of, jax.tree.map(jnp.asarray, testing.settings))

    specs = (EVERYWHERE, SPREAD_EXAMPLES)
    return jax.jit(
        jax.shard_map(
            measure, mesh=config.mesh, in_specs=specs, out_specs=EVERYWHERE, check_vma=False
        )
    )


class Chunk(NamedTuple):
    """Clients that one call tests.

    Attributes:
      clients: their numbers, in the order of their places.
      tested: on what, on the devices.
      needed: images for it.
      images: the most that a device needs for any of the calls.
      numbers: of `tested`, on the host, without examples; zeros where there is no client.
    """

    clients: list[int]
    tested: Tested
    needed: Needed
    images: int
    numbers: Tested


def chunks(
    config: LocalTesting,
    population: Population,
    tiers: Sequence[int],
    test: Parts,
    evaluation: EvaluationConfig,
    images: TrainingImages,
) -> list[Chunk]:
    """The clients of a program, cut into calls of one shape, with their examples on the devices.

    Args:
      config: of the program.
      population: all clients, with what they train on.
      tiers: numbers of the program's.
      test: examples that each client is tested on.
      evaluation: how long clients are fine-tuned, and how large batches of tests are.
      images: of the federation.
    """
    clients = np.flatnonzero(np.isin(population.tier, tiers)).tolist()
    epochs = max(evaluation.finetune_epochs, 1)
    tuning = dataclasses.replace(population.client, epochs=epochs, steps=None)
    size = min(evaluation.batch_size, max(len(test[c]) for c in clients))
    rows: list[Any] = []
    for c in clients:
        rng = generator(population.seed, "fine-tuning", c)
        batches = client_batches(population.partition[c], tuning, rng)
        tests = np.full((-(-len(test[c]) // size), size), -1)
        tests.reshape(-1)[: len(test[c])] = test[c]
        rows.append((c, tiers.index(population.tier[c]), batches, len(batches) // epochs, tests))
    mesh = config.mesh
    together = min(_AT_ONCE * mesh.size, -(-len(clients) // mesh.size) * mesh.size)
    shapes = max(len(row[2]) for row in rows), max(len(row[4]) for row in rows)
    found = []
    for first in range(0, len(rows), together):
        some = rows[first : first + together]
        tested = _stacked(some, together, shapes)
        unread = np.zeros_like(tested.train_real)
        trains = tested.train, tested.train_real if config.reads_training else unread
        needed = images.needed(trains, (tested.test, tested.test_real))
        tested = tested._replace(train=needed.indices[0], test=needed.indices[1])
        numbers = tested._replace(train=(), train_real=(), test=(), test_real=())
        there = put(tested, mesh, SPREAD)
        found.append(Chunk([row[0] for row in some], there, needed, 0, numbers))
    most = max((len(rows) for chunk in found for rows in chunk.needed.rows), default=0)
    return [chunk._replace(images=most) for chunk in found]


def _stacked(rows: Sequence[Any], length: int, shapes: tuple[int, int]) -> Tested:
    """Rows of clients as arrays, padded to so many clients, and batches of each."""

    def numbers(values: list[int]) -> np.ndarray:
        return np.pad(np.asarray(values, np.int32), (0, length - len(values)))

    def batches(which: int, most: int) -> tuple[np.ndarray, np.ndarray]:
        found = np.zeros((length, most, rows[0][which].shape[1]), np.int32)
        real = np.zeros((length, most), np.int32)
        for i, row in enumerate(rows):
            own = row[which]
            found[i, : len(own)] = np.where(own < 0, own[:, :1], own)
            real[i, : len(own)] = (own >= 0).sum(1)
        return found, real

    train, test = batches(2, shapes[0]), batches(4, shapes[1])
    return Tested(
        client=numbers([row[0] for row in rows]),
        tier=numbers([row[1] for row in rows]),
        train=train[0],
        train_real=train[1],
        epoch=numbers([row[3] for row in rows]),
        steps=numbers([len(row[2]) for row in rows]),
        test=test[0],
        test_real=test[1],
        tests=numbers([len(row[4]) for row in rows]),
    )


def local_evaluation(
    found: Sequence[tuple[Sequence[int], Metrics]], tier_of: Callable[[int], str]
) -> LocalEvaluation:
    """What clients came to, of metrics that are on the host.

    Args:
      found: for each call the numbers of its clients, and sums for each.
      tier_of: the name of a client's tier.
    """
    lines = sorted(
        (client, float(metrics.correct[i]), float(metrics.examples[i]))
        for clients, metrics in found
        for i, client in enumerate(clients)
    )
    return LocalEvaluation(
        clients=tuple(client for client, *_ in lines),
        tiers=tuple(tier_of(client) for client, *_ in lines),
        accuracies=tuple(correct / examples for _, correct, examples in lines),
        examples=tuple(round(examples) for *_, examples in lines),
    )
