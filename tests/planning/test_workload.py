"""Lengths of loops, of two lanes that are short enough to follow by hand."""

import numpy as np
import pytest

import jfed
from jfed.engine.packing import Cohort, Lanes, Packing, Schedule
from jfed.planning import workload

TIERS = jfed.tiers.ode(jfed.models.ODENetConfig(widths=(4,)), (2, 5)).members
# By slots: clients of 3, 1, 2 and 2 steps.
TIER, STEPS = np.int32([1, 0, 0, 1]), np.int32([3, 1, 2, 2])
NOBODY = 4


def _round(slot, step, devices=1):
    lanes, steps = np.shape(slot)
    packing = Packing(devices, lanes, False, 1, steps, NOBODY, 0, (1.0, 2.0))
    empty = np.zeros((lanes, steps), np.int32)
    nothing = np.zeros(NOBODY, np.int32)
    cohort = Cohort(nothing, TIER, nothing, STEPS, np.float32(nothing), nothing, nothing)
    length = (np.asarray(slot) < NOBODY).sum(1)
    return packing, Schedule(
        Lanes(empty[..., None], empty, *map(np.asarray, (slot, step))), cohort, length
    )


SLOT = [[0, 0, 0, 1], [2, 2, 3, 3]]
STEP = [[0, 1, 2, 0], [0, 1, 0, 1]]


@pytest.mark.parametrize("mapping", ["map", "unroll"])
def test_lanes_one_after_another(mapping):
    """Each has two clients in four steps; a step loops over 4 4 4 1 and 1 1 4 4 iterations."""
    lengths = workload.of_training([_round(SLOT, STEP)], TIERS, mapping)
    assert lengths == {"turns": 2, "steps": 2, "ode0": 23 / 8}


def test_lanes_together():
    """A client ends after steps 1, 2 and 3, in the last one two; the most iterations count."""
    lengths = workload.of_training([_round(SLOT, STEP)], TIERS, "vmap")
    assert lengths == {"turns": 3, "steps": 4 / 3, "ode0": 4}


def test_the_busiest_device_counts():
    """The first one's iterations cost 3 * 2 + 1, the other's 2 * 1 + 2 * 2."""
    lengths = workload.of_training([_round(SLOT, STEP, devices=2)], TIERS, "map")
    assert lengths == {"turns": 2, "steps": 2, "ode0": 13 / 4}


def test_rounds_without_work():
    idle = _round(np.full((2, 4), NOBODY), np.zeros((2, 4), int))
    half = workload.of_training([_round(SLOT, STEP), idle], TIERS, "vmap")
    assert half == {"turns": 3 / 2, "steps": 4 / 3, "ode0": 4}
    assert workload.of_training([idle], TIERS, "vmap") == {"turns": 0, "steps": 0, "ode0": 0}
