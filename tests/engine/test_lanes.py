"""Packing by property tests, and the engine against training one client after another."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jfed.algorithms.clients import ClientConfig, make_optimizer, make_step
from jfed.data import dirichlet
from jfed.data.preprocessing import gather, make_preprocess
from jfed.engine.devices import make_mesh
from jfed.engine.lanes import EngineConfig, make_trainer, put_schedule
from jfed.engine.packing import Work, capacity, client_batches, client_steps, load, pack
from jfed.errors import ConfigError
from jfed.models import Model, ODENetConfig, cnn, odenet
from jfed.models.model import initialise
from jfed.tiers import Tier
from jfed.tiers.communication import tree_bytes


@settings(deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 3),
    st.none() | st.integers(1, 12),
    st.integers(0, 99),
)
def test_a_client_sees_every_example_once_an_epoch(examples, size, epochs, steps, seed):
    config = ClientConfig(batch_size=size, epochs=epochs, steps=steps)
    own = np.arange(100, 100 + examples)
    batches = client_batches(own, config, np.random.default_rng(seed))
    per_epoch = -(-examples // size)
    assert batches.shape == (client_steps(examples, config), size)
    assert len(batches) == (steps or epochs * per_epoch)
    for epoch in range(len(batches) // per_epoch):
        seen = batches[epoch * per_epoch : (epoch + 1) * per_epoch].ravel()
        assert sorted(seen[seen >= 0]) == own.tolist()


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(1, 8), st.randoms())
def test_packing_loses_nothing_and_is_even(sizes, lanes, shuffler):
    work = [Work(c, np.full((n, 2), c, np.int32), float(n)) for c, n in enumerate(sizes, start=1)]
    steps = capacity(sizes, len(sizes), lanes)
    schedule = pack(work, lanes, 2, steps)
    done = {}
    for lane in range(lanes):
        starts = np.flatnonzero(schedule.steps.start[lane])
        ends = np.flatnonzero(schedule.steps.weight[lane]) + 1
        used = int((schedule.steps.examples[lane, :, 0] >= 0).sum())
        assert starts.tolist() == [0, *ends[:-1].tolist()][: len(starts)]
        assert ends.max(initial=0) == used <= schedule.length
        for a, b in zip(starts, ends, strict=True):
            client = schedule.steps.client[lane, a]
            np.testing.assert_array_equal(schedule.steps.client[lane, a:b], client)
            np.testing.assert_array_equal(schedule.steps.examples[lane, a:b], client)
            np.testing.assert_array_equal(schedule.steps.step[lane, a:b], np.arange(b - a))
            done[int(client)] = (b - a, schedule.steps.weight[lane, b - 1])
            np.testing.assert_array_equal(schedule.steps.slot[lane, a:b], client - 1)
    assert done == {c: (n, float(n)) for c, n in enumerate(sizes, start=1)}
    # Graham's bound for lists: no lane starts a client later than all lanes would be even.
    assert schedule.length <= sum(sizes) / lanes + max(sizes)
    shuffler.shuffle(work)
    jax.tree.map(np.testing.assert_array_equal, pack(work, lanes, 2, steps), schedule)


LINEAR = Tier(
    "linear", Model(lambda key: jnp.zeros((64, 10)), lambda p, x: x.reshape(x.shape[0], -1) @ p)
)


@pytest.fixture(scope="module")
def task():
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (40, 8, 8, 1)), jnp.uint8)
    labels = jnp.asarray(rng.integers(0, 10, 40), jnp.int32)
    model = odenet(ODENetConfig(widths=(4,), iterations=2, channels=1, unroll=False))
    config = ClientConfig(batch_size=4, momentum=0.9, weight_decay=1e-3, learning_rate=0.05)
    preprocess = make_preprocess((128.0,), (64.0,), pad=1, flip=True)
    cut = np.split(np.arange(40), [3, 12, 13, 27])
    work = [
        Work(c, client_batches(own, config, np.random.default_rng(c)), float(len(own)))
        for c, own in enumerate(cut)
    ]
    variables = initialise(model.init, jax.random.key(0))
    return images, labels, Tier("2", model), config, preprocess, work, variables


def _one_after_another(task, key):
    """The same training as a plain Python loop over clients and batches."""
    images, labels, tier, config, preprocess, work, variables = task
    optimizer = make_optimizer(config)(config.learning_rate)
    step = make_step(tier.model)

    @jax.jit
    def batch_step(params, state, examples, step_key):
        batch = gather(images, labels, examples, preprocess, step_key)
        return step(optimizer, params, state, batch)

    total, weight, loss = jax.tree.map(jnp.zeros_like, variables), 0.0, 0.0
    for client in work:
        params, state = variables, optimizer.init(variables)
        for i, examples in enumerate(client.batches):
            step_key = jax.random.fold_in(jax.random.fold_in(key, client.client), i)
            params, state, metrics = batch_step(params, state, jnp.asarray(examples), step_key)
            loss += float(metrics.loss)
        total = jax.tree.map(
            lambda t, p, v, w=client.weight: t + w * (p - v), total, params, variables
        )
        weight += client.weight
    return total, weight, loss


@pytest.mark.parametrize(
    ("devices", "lanes", "mapping"),
    [(1, 1, "vmap"), (1, 3, "vmap"), (1, 3, "map"), (4, 1, "vmap"), (2, 2, "unroll")],
)
def test_engine_equals_training_one_client_after_another(task, devices, lanes, mapping):
    images, labels, tier, config, preprocess, work, variables = task
    key = jax.random.key(7)
    mesh = make_mesh(devices)
    train = make_trainer(tier, config, preprocess, mesh, mapping=mapping)
    lanes *= devices
    steps = capacity([len(w.batches) for w in work], len(work), lanes)
    schedule = put_schedule(pack(work, lanes, config.batch_size, steps), mesh)
    arguments = (variables, images, labels, schedule, key, np.int32(3), np.float32(0.05))
    update, metrics = train(*arguments)
    total, weight, loss = _one_after_another(task, jax.random.fold_in(key, 3))
    assert update.weight == weight == 40
    assert metrics.examples == 40
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), update.total, total
    )
    again, _ = train(*arguments)
    jax.tree.map(np.testing.assert_array_equal, again, update)


def test_rounds_of_other_cohorts_run_the_same_program(task):
    images, labels, tier, config, preprocess, work, variables = task
    mesh = make_mesh(1)
    traced, traces = [], 0

    def spy(*args):
        traced.append(args)
        return preprocess(*args)

    train = make_trainer(tier, config, spy, mesh, mapping="vmap")
    for cohort in (work[:2], work[1:4], work):
        schedule = pack(cohort, 2, 4, capacity([len(w.batches) for w in work], len(work), 2))
        schedule = put_schedule(schedule, mesh)
        train(variables, images, labels, schedule, jax.random.key(0), np.int32(0), np.float32(0.1))
        traces = traces or len(traced)
    assert len(traced) == traces


def test_the_only_collective_is_one_sum_over_devices(task):
    images, labels, tier, config, preprocess, work, variables = task
    mesh = make_mesh(4)
    schedule = pack(work, 4, 4, capacity([len(w.batches) for w in work], len(work), 4))
    train = make_trainer(tier, config, preprocess, mesh, mapping="map")
    arguments = (variables, images, labels, put_schedule(schedule, mesh), jax.random.key(0))
    text = train.lower(*arguments, np.int32(0), np.float32(0.1)).compile().as_text()
    collectives = re.findall(r"(all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", text)
    assert set(collectives) == {"all-reduce"}
    assert all("while" not in line for line in text.splitlines() if "all-reduce(" in line)


@pytest.mark.parametrize(
    ("devices", "mapping", "linear"),
    [(1, "map", True), (2, "vmap", True), pytest.param(2, "vmap", False, marks=pytest.mark.slow)],
)
def test_stacked_updates_are_those_that_are_summed(task, devices, mapping, linear):
    images, labels, tier, config, preprocess, work, variables = task
    if linear:
        tier, variables = LINEAR, jnp.zeros((64, 10))
    mesh, lanes = make_mesh(devices), 2 * devices
    steps = capacity([len(w.batches) for w in work], len(work), lanes)

    def run(work, slots):
        train = make_trainer(tier, config, preprocess, mesh, mapping=mapping, slots=slots)
        schedule = put_schedule(pack(work, lanes, config.batch_size, steps), mesh)
        scalars = (jax.random.key(7), np.int32(3), np.float32(0.05))
        return train(variables, images, labels, schedule, *scalars)

    total, told = run(work, None)
    stacked, told_stacked = run(work, 7)
    np.testing.assert_array_equal(stacked.weight, [w.weight for w in work] + [0, 0])
    assert told.delivered == 5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), told, told_stacked)
    jax.tree.map(
        lambda s, t: np.testing.assert_allclose(
            np.tensordot(stacked.weight, s, 1), t, rtol=1e-4, atol=1e-5
        ),
        stacked.updates,
        total.total,
    )
    alone, _ = run(work[1:2], 7)
    jax.tree.map(
        lambda a, s: np.testing.assert_allclose(a[0], s[1], rtol=1e-5, atol=1e-6),
        alone.updates,
        stacked.updates,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lanes": 0}, "lanes must be 1 or more, got 0"),
        ({"devices": 0}, "devices must be 1 or more, got 0"),
        ({"devices": 99}, r"at most the \d+ there are, got 99"),
        ({"mapping": "vmapp"}, r"unknown mapping 'vmapp'\. Did you mean 'vmap'"),
    ],
)
def test_bad_engine_settings_are_quoted(changes, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**changes).resolve(10)


def test_the_engine_picks_by_backend():
    assert EngineConfig(devices=2).resolve(10, "cpu") == EngineConfig(2, 1, "map")
    assert EngineConfig(devices=2).resolve(10, "gpu") == EngineConfig(2, 5, "vmap")
    assert EngineConfig(devices=4).resolve(2, "tpu") == EngineConfig(4, 1, "vmap")
    assert EngineConfig(devices=2).resolve(100, "gpu").lanes == 8
    given = EngineConfig(devices=1, lanes=3, mapping="unroll")
    assert given.resolve(10, "gpu") == given.resolve(10, "cpu") == given


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16])
def test_uneven_clients_fill_the_lanes(lanes):
    """100 clients of CIFAR-10's size, Dirichlet(0.1), all in one round."""
    labels = np.repeat(np.arange(10), 5000)
    config = ClientConfig(batch_size=32)
    for seed in range(3):
        parts = dirichlet(labels, 100, alpha=0.1, min_examples=1, seed=seed)
        batches = [np.zeros((client_steps(len(own), config), 32), np.int32) for own in parts]
        work = [Work(c, b, 1.0) for c, b in enumerate(batches)]
        steps = capacity([len(b) for b in batches], 100, lanes)
        filled = load(work, pack(work, lanes, 32, steps))
        assert filled.steps == sum(len(b) for b in batches)
        assert filled.steps / filled.lanes >= 0.95
        assert filled.steps / filled.padded < 0.5
        assert load(work, pack(work, 1, 32, sum(map(len, batches)))).lanes == filled.steps


def test_memory_does_not_grow_with_the_cohort(task):
    images, labels, _, config, preprocess, _, _ = task
    model = cnn(channels=1, size=8, form="transposed")
    tier, variables = Tier("cnn", model), jax.eval_shape(model.init, jax.random.key(0))
    mesh = make_mesh(1)
    train = make_trainer(tier, config, preprocess, mesh, mapping="map")

    def working_bytes(clients):
        own = client_batches(np.arange(8), config, np.random.default_rng(0))
        work = [Work(c, own, 8.0) for c in range(clients)]
        schedule = pack(work, 2, config.batch_size, capacity([len(own)] * clients, clients, 2))
        scalars = (jax.random.key(0), np.int32(0), np.float32(0.1))
        compiled = train.lower(variables, images, labels, schedule, *scalars).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = working_bytes(10), working_bytes(1000)
    assert few > 4 * tree_bytes(variables)
    assert many <= 1.1 * few


def _linear(task, devices):
    """One step of a linear model for each of four clients on that many devices."""
    images, labels, _, _, _, _, _ = task
    config = ClientConfig(batch_size=10)
    work = [Work(c, np.arange(10, dtype=np.int32)[None] + 10 * c, 10.0) for c in range(4)]
    mesh = make_mesh(devices)
    preprocess = make_preprocess((128.0,), (64.0,), pad=0, flip=False)
    train = make_trainer(LINEAR, config, preprocess, mesh, mapping="map")
    schedule = put_schedule(pack(work, devices, 10, 4 if devices == 1 else 2), mesh)
    scalars = (jax.random.key(0), np.int32(0), np.float32(0.1))
    return train(jnp.zeros((64, 10)), images, labels, schedule, *scalars)[0].total


def test_gradients_are_not_summed_over_devices(task):
    """What `shard_map` does to gradients of replicated parameters, were it to check replication."""
    images, labels = np.asarray(task[0], np.float64), np.asarray(task[1])
    x = ((images - 128) / 64).reshape(40, 64)
    p = np.full((40, 10), 0.1)
    p[np.arange(40), labels] -= 1
    expected = -0.1 * x.T @ p
    np.testing.assert_allclose(_linear(task, 1), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(_linear(task, 4), expected, rtol=1e-4, atol=1e-5)


def test_a_clients_transform_sees_its_whole_update(task):
    """Clipping to a norm, and a random mask: a key of its own for each client."""
    images, labels, tier, config, preprocess, work, variables = task
    mesh, key = make_mesh(2), jax.random.key(7)
    norms = [0.5, 3.0]

    def clip(update, key):
        norm = optax.tree.norm(update)
        scale = jnp.where(jax.random.bernoulli(key), norms[0], norms[1]) / norm
        return jax.tree.map(lambda u: u * scale, update)

    clipped = dataclasses.replace(config, transform=clip)
    train = make_trainer(tier, clipped, preprocess, mesh, mapping="map")
    steps = capacity([len(w.batches) for w in work], len(work), 2)

    def total(work):
        schedule = put_schedule(pack(work, 2, config.batch_size, steps), mesh)
        return train(variables, images, labels, schedule, key, np.int32(0), np.float32(0.05))[0]

    alone = [total([w]).total for w in work]
    found = [float(optax.tree.norm(a)) / w.weight for a, w in zip(alone, work, strict=True)]
    assert all(min(abs(f - n) for n in norms) < 1e-4 for f in found)
    assert len({round(f, 3) for f in found}) == 2
    together = jax.tree.map(lambda *x: sum(x[1:], start=x[0]), *alone)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        total(work).total,
        together,
    )
