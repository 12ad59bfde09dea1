"""Which programs a federation compiles, and how busy they keep its devices."""

import collections
import dataclasses
import re

import jax
import numpy as np
import pytest

import jfed
from jfed.algorithms.clients import ClientConfig
from jfed.data import Dataset, Split
from jfed.engine.packing import Load, Packing, capacity, load, pack
from jfed.models.flops import forward_flops
from jfed.runs.config import run_preset
from jfed.simulation.population import make_population
from jfed.tiers import make_tiers

NETWORK = jfed.models.ODENetConfig(
    widths=(4, 4), channels=1, classes=3, unroll=False, conv="transposed"
)
NORMS = {"sharing": "norms-per-depth"}


@pytest.fixture
def compiled(monkeypatch):
    """How often each program was compiled, by the name of its function."""
    found, compile_ = collections.Counter(), jax.stages.Lowered.compile

    def counted(lowered, *args, **options):
        found[re.search(r"module @jit_(\w+)", lowered.as_text()).group(1)] += 1
        return compile_(lowered, *args, **options)

    monkeypatch.setattr(jax.stages.Lowered, "compile", counted)
    return found


def _simulate(tiers, *, data_seed=0, solvers=(), **options):
    rng = np.random.default_rng(data_seed)
    images = rng.integers(0, 256, (36, 4, 4, 1)).astype(np.uint8)
    split = Split(images, rng.integers(0, 3, 36).astype(np.int32))
    evaluation = jfed.EvaluationConfig(
        every=0, batch_size=18, iterations=(3,), solvers=solvers, calibration_examples=18
    )
    parts = tuple(np.split(rng.permutation(36), 6))
    client = ClientConfig(batch_size=3)
    given = {"rounds": 1, "client": client, "evaluation": evaluation, "seed": 0} | options
    return jfed.simulate(Dataset("noise", split, split, tuple("abc")), parts, tiers, **given)


@pytest.mark.parametrize("options", [{}, NORMS], ids=["all shared", "norms per depth"])
def test_all_counts_share_one_program_to_train_and_one_to_test(options, compiled):
    result = _simulate(jfed.tiers.ode(NETWORK, (1, 2, (0, 4)), **options))
    assert list(result.accuracies) == ["1", "2", "0-4", "3"]
    assert compiled == {"train": 1, "evaluate": 1, "step": 1}


@pytest.mark.slow
def test_another_solver_has_one_program_to_test_of_its_own(compiled):
    result = _simulate(jfed.tiers.ode(NETWORK, (1, 2)), solvers=("Midpoint", "Heun"))
    assert len(result.accuracies) == 9
    assert compiled == {"train": 1, "evaluate": 3, "step": 1}


def test_another_seed_or_data_set_compiles_nothing(compiled):
    tiers = jfed.tiers.ode(NETWORK, (1, 3))
    first = _simulate(tiers)
    compiled.clear()
    other = _simulate(jfed.tiers.ode(NETWORK, (1, 3)), seed=1, data_seed=1)
    assert not compiled
    assert first.history[0].train_loss != other.history[0].train_loss


_KINDS = {
    "aggregator": lambda: {"server": jfed.ServerConfig(aggregator="median")},
    "private": lambda: {
        "server": jfed.ServerConfig(weights="count"),
        "privacy": jfed.algorithms.PrivacyConfig(clip=1.0, noise=1.0, delta=1e-3),
    },
}


@pytest.mark.parametrize("kind", _KINDS)
def test_another_seed_compiles_nothing_whatever_clients_and_server_do(kind, compiled):
    model = jfed.models.Model(
        lambda key: 0.1 * jax.random.normal(key, (16, 3)),
        lambda params, images: images.reshape(len(images), -1) @ params,
    )
    common = {"evaluation": jfed.EvaluationConfig(every=0)}
    first = _simulate(model, **common, **_KINDS[kind]())
    compiled.clear()
    other = _simulate(model, **common, seed=1, **_KINDS[kind]())
    assert not compiled
    assert first.history[0].train_loss != other.history[0].train_loss


@pytest.mark.slow
def test_traced_steps_compile_once_for_each_count(compiled):
    tiers = jfed.tiers.ode(dataclasses.replace(NETWORK, unroll=True), (0, 1))
    _simulate(tiers)
    assert compiled == {"train": 2, "evaluate": 3, "step": 1}
    compiled.clear()
    _simulate(tiers, seed=1)
    assert not compiled


@pytest.mark.parametrize(("scheme", "least"), [("iid", 0.7), ("dirichlet", 0.5)])
def test_the_flexible_preset_keeps_eight_devices_busy(scheme, least):
    """Tiers of 2, 4 and 8 iterations, ten clients a round; none can be split between devices."""
    config = run_preset("cifar10-flexible").replace(partition=scheme)
    labels = np.repeat(np.arange(10), 5000)
    partition = jfed.data.partition(config.partition, labels, config.population.clients, seed=0)
    tiers = make_tiers(config.network.make(10, 3), config.tiers)
    like = jax.eval_shape(tiers.init, jax.random.key(0))
    costs = tuple(
        float(forward_flops(tier.bound(), tier.shapes(like), (32, 32, 3))) for tier in tiers.members
    )
    assert 2 < costs[2] / costs[0] < 4  # iterations are 4 to 1, what surrounds them is the same
    population = make_population(
        partition, tiers=3, shares=None, cohort=10, draw_tiers=0, client=config.client, seed=0
    )
    steps = capacity(population.steps(), 10, 8, costs)
    packing = Packing(8, 8, False, config.client.batch_size, steps, 10, 10, costs)
    total, shortest, by_tier = Load(), 0.0, 0.0
    for number in range(50):
        work = population.work(number, population.sample(number))
        each = [[costs[item.tier] * len(item.batches) for item in items] for items in work]
        items = [item for of_tier in work for item in of_tier]
        total = total.plus(load(items, pack(items, packing), packing))
        shortest += 8 * max(max(map(max, filter(None, each))), sum(map(sum, each)) / 8)
        by_tier += 8 * sum(max(of_tier, default=0.0) for of_tier in each)
    assert total.cost / total.spent >= least
    assert total.spent <= 1.03 * shortest
    assert total.spent <= 0.6 * by_tier  # one tier after the other, each packed by itself
