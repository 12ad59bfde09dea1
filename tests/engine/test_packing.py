"""Packing by property tests, and its load by numbers worked out by hand."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jfed.algorithms.clients import ClientConfig
from jfed.data import dirichlet
from jfed.engine.packing import (
    Load,
    Packing,
    Work,
    capacity,
    client_batches,
    client_examples,
    client_steps,
    load,
    pack,
)

SIZE = 3  # examples in a batch


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
    assert client_examples(examples, config) == (batches >= 0).sum()
    for first in range(len(batches)):
        assert client_examples(examples, config, first) == (batches[:first] >= 0).sum()


def _work(client, tier, steps, missing=0, fault=0):
    """A client whose examples are all different from those of others; `missing` in the last."""
    batches = 1000 * client + np.arange(steps * SIZE, dtype=np.int32).reshape(steps, SIZE)
    batches[-1, SIZE - missing :] = -1
    return Work(client, tier, batches, steps * SIZE - missing, 0.5 + client, fault)


COSTS = st.lists(st.sampled_from([1.0, 2.0, 3.5, 10.0]), min_size=1, max_size=3)
# Of each client: tier, steps, examples missing from the last batch.
CLIENTS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 20), st.integers(0, SIZE - 1)),
    min_size=1,
    max_size=24,
)
# Devices, lanes of each, empty slots.
ROOM = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 3))


def _cohort(clients, costs, room):
    """Clients, and what they are packed on: devices with as many rows of memory as in a run."""
    devices, per_device, empty = room
    slots = len(clients) + empty
    work = [
        _work(7 * i + 3, tier % len(costs), steps, missing, fault=2)
        for i, (tier, steps, missing) in enumerate(clients)
    ]
    steps, lanes = [len(w.batches) for w in work], devices * per_device
    packing = Packing(
        devices=devices,
        lanes=lanes,
        lockstep=False,
        batch_size=SIZE,
        steps=capacity(steps, len(work), lanes, costs),
        slots=slots,
        rows=min(slots, 2 * -(-slots // devices)),
        costs=tuple(costs),
    )
    return work, packing


@settings(deadline=None)
@given(CLIENTS, COSTS, ROOM, st.randoms())
def test_packing_loses_nothing(clients, costs, room, shuffler):
    work, packing = _cohort(clients, costs, room)
    schedule = pack(work, packing)
    lanes, table = schedule.lanes, schedule.cohort
    assert max(schedule.length) <= packing.steps
    seen, steps_of = {}, {}
    for lane in range(packing.lanes):
        for at in range(packing.steps):
            slot = int(lanes.slot[lane, at])
            assert (at < schedule.length[lane]) == (slot < packing.slots)
            if slot == packing.slots:
                assert lanes.real[lane, at] == 0
                continue
            real = lanes.examples[lane, at, : lanes.real[lane, at]].tolist()
            seen.setdefault((slot, lane), []).append(real)
            steps_of.setdefault(slot, []).append(int(lanes.step[lane, at]))
            # Also what does not count is the client's own.
            assert set(lanes.examples[lane, at] // 1000) == {table.client[slot]}
    assert len(seen) == len(work)  # each client is on one lane
    of = {item.client: item for item in work}
    for (slot, _), batches in seen.items():
        item = of[int(table.client[slot])]
        assert batches == [[e for e in batch if e >= 0] for batch in item.batches.tolist()]
        assert steps_of[slot] == list(range(len(item.batches)))
    assert table.client[: len(work)].tolist() == sorted(of)
    for slot, client in enumerate(table.client[: len(work)].tolist()):
        item, row = of[client], [column[slot] for column in table[1:6]]
        expected = [item.tier, item.examples, len(item.batches), item.weight, item.fault]
        np.testing.assert_array_equal(row, expected)
    assert not table.steps[len(work) :].any()
    shuffler.shuffle(work)
    jax.tree.map(np.testing.assert_array_equal, pack(work, packing), schedule)


def _queues(schedule, packing):
    """For each lane the slots of its clients, in the order in which it trains them."""
    slots = [list(dict.fromkeys(lane.tolist())) for lane in schedule.lanes.slot]
    return [[slot for slot in lane if slot < packing.slots] for lane in slots]


@settings(deadline=None)
@given(CLIENTS, COSTS, ROOM)
def test_the_costliest_clients_go_first_to_the_lane_with_the_least_cost(clients, costs, room):
    work, packing = _cohort(clients, costs, room)
    packing = packing._replace(rows=packing.slots)
    schedule = pack(work, packing)
    table, whole = schedule.cohort, 0.0
    cost = [packing.costs[t] * n for t, n in zip(table.tier, table.steps, strict=True)]
    for queue in _queues(schedule, packing):
        tiers = [packing.costs[table.tier[slot]] for slot in queue]
        assert tiers == sorted(tiers, reverse=True)
        # The last client a lane was given is its cheapest; it had no more than its share before.
        if queue:
            bound = sum(cost) / packing.lanes + (1 - 1 / packing.lanes) * min(
                cost[slot] for slot in queue
            )
            assert sum(cost[slot] for slot in queue) <= bound + 1e-9
        whole += sum(cost[slot] for slot in queue)
    assert whole == pytest.approx(sum(cost))


@settings(deadline=None)
@given(CLIENTS, COSTS, ROOM, st.booleans())
def test_rows_of_memory_are_each_their_clients_own(clients, costs, room, tight):
    work, packing = _cohort(clients, costs, room)
    if tight:  # as few as can be
        rows = -(-len(work) // packing.devices)
        packing = packing._replace(rows=rows, steps=sum(len(w.batches) for w in work))
    schedule = pack(work, packing)
    per_device = packing.lanes // packing.devices
    taken = [[] for _ in range(packing.devices)]
    for lane, queue in enumerate(_queues(schedule, packing)):
        taken[lane // per_device] += [int(schedule.cohort.row[slot]) for slot in queue]
    assert all(sorted(rows) == list(range(len(rows))) for rows in taken)
    assert max(map(len, taken)) <= packing.rows


@pytest.mark.parametrize("seed", range(5))
def test_a_lane_has_room_for_any_cohort_of_a_population(seed):
    """Cohorts of uneven clients in tiers of uneven cost, drawn from a larger population."""
    rng = np.random.default_rng(seed)
    for _ in range(60):
        steps = np.ceil(rng.pareto(1.0, 60) * 3).clip(1, 200).astype(int).tolist()
        costs = tuple(rng.choice([1.0, 2.0, 5.0, 9.0], 2).tolist())
        cohort, devices = int(rng.integers(1, 40)), int(rng.choice([1, 2, 4, 8]))
        lanes = devices * int(rng.integers(1, 4))
        room = capacity(steps, cohort, lanes, costs)
        rows = min(cohort, 2 * -(-cohort // devices))
        packing = Packing(devices, lanes, False, SIZE, room, cohort, rows, costs)
        chosen = rng.choice(60, cohort, replace=False).tolist()
        work = [_work(c, int(rng.integers(2)), steps[c]) for c in chosen]
        assert max(pack(work, packing).length) <= room
        assert room <= 1.5 * max(1, sum(sorted(steps)[-cohort:]))


def test_capacity_by_hand():
    # Half of 12 and the largest client are 9, which 12 is the next one and a half powers from.
    assert capacity([3, 3, 3, 3], 4, 2, (1.0,)) == 12
    assert capacity([3, 3, 3, 3], 2, 2, (1.0,)) == 6
    assert capacity([1, 9, 4, 2], 2, 1, (1.0,)) == 16  # the largest two, 13, on the only lane
    assert capacity([1] * 64, 64, 4, (1.0,)) == 24  # 16 and 1
    assert capacity([1] * 64, 64, 4, (2.0, 4.0)) == 48  # twice as many of the cheaper tier
    assert capacity([1], 1, 8, (1.0,)) == 1


def _packing(devices, lanes, lockstep, costs=(3.0, 1.0)):
    return Packing(devices, devices * lanes, lockstep, SIZE, 12, 8, 8, costs)


# In costs of 3 and 1: 6, then 3, then 1.
THREE = [_work(0, 0, 2), _work(1, 1, 3), _work(2, 1, 1)]


@pytest.mark.parametrize(
    ("work", "devices", "lanes", "lockstep", "expected"),
    [
        # Lanes [0 0] and [1 1 1 2], steps of which cost 3 3 1 1, for both lanes.
        (THREE, 1, 2, True, Load(10, 16, 12)),
        (THREE, 1, 2, False, Load(10, 10, 12)),
        # One lane to a device, which are done after 6 and 4.
        (THREE, 2, 1, True, Load(10, 12, 12)),
        (THREE, 2, 1, False, Load(10, 12, 12)),
        # Lanes [0 0 2] and [3 1 1 1]: 3 3 1 1 again.
        ([*THREE, _work(3, 0, 1)], 1, 2, True, Load(13, 16, 18)),
        ([*THREE, _work(3, 0, 1)], 2, 1, True, Load(13, 14, 18)),
        # Two devices of two lanes: [0 0] and [1 1 1], which cost 3 3 1 together; [2] and nobody.
        (THREE, 2, 2, True, Load(10, 28, 12)),
        (THREE, 2, 2, False, Load(10, 18, 12)),
        ([], 2, 2, True, Load(0, 0, 0)),
    ],
)
def test_load_by_hand(work, devices, lanes, lockstep, expected):
    packing = _packing(devices, lanes, lockstep)
    found = load(work, pack(work, packing), packing)
    assert found == expected
    assert found.plus(Load(1, 2, 3)) == Load(*np.add(expected, (1, 2, 3)))


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16])
def test_uneven_clients_fill_the_lanes(lanes):
    """100 clients of CIFAR-10's size, Dirichlet(0.1), all in one round."""
    labels = np.repeat(np.arange(10), 5000)
    config = ClientConfig(batch_size=SIZE)
    for seed in range(3):
        parts = dirichlet(labels, 100, alpha=0.1, min_examples=1, seed=seed)
        steps = [client_steps(len(own), config) for own in parts]
        work = [_work(c, 0, n) for c, n in enumerate(steps)]
        room = capacity(steps, 100, lanes, (1.0,))
        packing = Packing(lanes, lanes, False, SIZE, room, 100, 100, (1.0,))
        filled = load(work, pack(work, packing), packing)
        assert filled.cost == sum(steps)
        assert filled.cost / filled.spent >= 0.95
        assert filled.cost / filled.padded < 0.5
