"""What a plan tells, against sums done by hand."""

import dataclasses
import math

import pytest

from jfed.engine.devices import EngineConfig
from jfed.planning import tables
from jfed.planning.counting import Collective, Counts, Unknown
from jfed.planning.hardware import CHIPS
from jfed.planning.plans import ProgramPlan, RunPlan, peak

GB = 10**9
COUNTS = Counts(
    flops={"bfloat16": 989.4e12, "float32/highest": 66.9e12},
    bytes=3.352e12,
    kernels=1000.0,
    collectives=[Collective("all-reduce", 450 * GB, 4.0)],
)
TRAIN = ProgramPlan(
    *("train", "train 1, 2", 10, 1.0),
    arguments=1 * GB,
    outputs=1 * GB,
    temporary=18 * GB,
    counts=COUNTS,
    step=Counts(kernels=7.0),
)
SERVER = ProgramPlan("server", "server", 10, 1.0, temporary=GB)
TEST = ProgramPlan("evaluate", "evaluate 1, 2", 4, 1.0, counts=Counts(bytes=3.352e12))


def _plan(*programs, chip="h100", devices=2, lanes=4, cohort=100):
    engine = EngineConfig(devices, lanes, "vmap")
    held = {"images": 2 * GB, "variables": GB}
    return RunPlan(chip, CHIPS[chip], devices, 1, engine, cohort, 10, held, programs)


def test_what_takes_longest_counts():
    plan = _plan(TRAIN, SERVER, TEST)
    floor = plan.floor(COUNTS)
    assert floor.arithmetic == pytest.approx(2.0)
    assert floor.memory == pytest.approx(1.0)
    assert floor.links == pytest.approx(4.0)
    assert floor.launches == pytest.approx(1e-3)
    assert plan.least_seconds(plan.of_round, calls=False) == pytest.approx(4.0)
    assert plan.least_seconds(plan.programs, calls=True) == pytest.approx(10 * 4.0 + 4 * 1.0)
    alone = _plan(TRAIN, SERVER, TEST, devices=1)
    assert alone.floor(COUNTS).links == 0
    assert alone.least_seconds(alone.of_round, calls=False) == pytest.approx(2.0)


def test_memory_and_the_lanes_that_have_room():
    plan = _plan(TRAIN, SERVER, TEST)
    assert plan.memory == 23 * GB
    assert plan.room == int(0.75 * 84_942_979_072)
    assert plan.fits is True
    assert plan.most_lanes == int((plan.room - 3 * GB) / (5 * GB))
    assert "It fits." in tables.text(plan)
    assert "room for about 12 lanes." in tables.text(plan)
    few = _plan(TRAIN, SERVER, TEST, cohort=9)  # on two devices
    assert few.most_lanes == 5
    assert "room for about 5 lanes, one for each client of a round." in tables.text(few)
    small = _plan(TRAIN, SERVER, TEST, chip="t4")
    assert small.fits is False
    advice = (
        "It does NOT fit: lower --lanes (now 4), or lower --batch-size, or take --dtype bfloat16."
    )
    assert advice in tables.text(small)
    large = dataclasses.replace(TEST, temporary=99 * GB, counts=Counts(flops={"bfloat16": 1.0}))
    told = tables.text(_plan(TRAIN, SERVER, large))
    assert "It does NOT fit: lower --eval-batch-size. There is room" in told
    assert "10 rounds of 9 clients. All" in tables.text(few)
    assert "of 3 clients (5 of 8 lanes have none)" in tables.text(_plan(TRAIN, TEST, cohort=3))


@pytest.mark.parametrize(
    ("error", "fits"), [("RESOURCE_EXHAUSTED: exceeds available HBM", False), ("INTERNAL: x", None)]
)
def test_a_program_that_cannot_be_compiled_is_told_and_the_others_go_on(error, fits):
    failed = ProgramPlan("train", "train 1, 2", 10, 1.0, error)
    plan = _plan(failed, SERVER, TEST)
    assert plan.fits is fits
    assert plan.least_seconds(plan.of_round, calls=False) is None
    told = tables.text(plan)
    assert f"'train 1, 2' cannot be compiled: {error}" in told
    assert ("It does NOT fit" in told) == (fits is False)
    assert "train 1, 2" in tables.comparison({"a": plan, "b": _plan(TRAIN, SERVER)})
    tables.text(_plan(failed))  # nothing compiled
    assert tables.as_json(plan)["fits"] is fits


def test_a_test_that_cannot_be_compiled_leaves_the_round_told():
    told = tables.text(_plan(TRAIN, SERVER, dataclasses.replace(TEST, error="INTERNAL: x")))
    assert "A round takes 4 s on the devices at best." in told
    unread = dataclasses.replace(TRAIN, unread="KeyError: 'x' (JAX 1.0)")
    plan = _plan(unread, SERVER, TEST)
    assert "'train 1, 2' is compiled, but what it does cannot be read: KeyError" in (
        tables.text(plan)
    )
    assert plan.fits is True
    assert plan.least_seconds(plan.of_round, calls=False) is None
    assert "KeyError" in tables.comparison({"a": plan, "b": _plan(TRAIN, SERVER)})


def test_precisions_of_products_are_told():
    told = tables.text(_plan(TRAIN, SERVER, TEST))
    assert "of a round 94% in bfloat16, 6% in float32/highest." in told
    assert "default precision" not in told
    counts = Counts(flops={"float32": 1e12})
    plan = _plan(dataclasses.replace(TRAIN, counts=counts), SERVER, TEST)
    assert "JAX's default precision multiplies float32 as tensorfloat32 here" in tables.text(plan)


def test_a_loop_of_unknown_length_is_told():
    told = tables.text(_plan(SERVER, TEST, TRAIN))
    assert "its length is not known" not in told
    counts = Counts(unknown=[Unknown("while.1", "jit(train)/mine/while")])
    plan = _plan(dataclasses.replace(SERVER, counts=counts), TEST, TRAIN)
    assert "its length is not known: jit(train)/mine/while" in tables.text(plan)


@pytest.mark.parametrize(
    ("chip", "dtype", "expected"),
    [
        ("a100", "float32", 156e12),
        ("a100", "float32/high", 156e12),
        ("a100", "float32/highest", 19.5e12),
        ("t4", "bfloat16", 8.1e12),
        ("t4", "float32", 8.1e12),
        ("v5e", "float32", 197e12),
        ("v5e", "float32/high", 197e12 / 3),
        ("v5e", "float32/highest", 197e12 / 6),
        ("h100", "bfloat16/6", 989.4e12 / 6),
        ("h100", "tensorfloat32/3", 494.7e12 / 3),
        ("h100", "f8e4m3fn", math.inf),
    ],
)
def test_peaks_by_type_and_precision(chip, dtype, expected):
    assert peak(CHIPS[chip], dtype) == pytest.approx(expected)
