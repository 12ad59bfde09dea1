"""Contenders in processes of their own: turns, agreement, failures."""

import dataclasses
import os
import signal

import pytest

import jfed
from jfed.benchmark.contenders import Contender
from jfed.benchmark.results import ratio, table
from jfed.benchmark.tasks import RoundWork, Task
from jfed.benchmark.timing import interleaved
from jfed.benchmark.turns import Measured, _Entry, race
from jfed.benchmark.workers import Seconds, Worker, WorkerError

TASK = Task(users=2, images=4, cohort=2, size=6, batch_size=4, conv="im2col")
PRODUCTS = Contender("products", "matmul-xla", matrix=16)


def test_turns_are_interleaved():
    order = []
    failing = iter([1.0, None])
    runs = {
        "a": lambda: order.append("a") or 1.0,
        "slow": lambda: order.append("slow") or 2.0,
        "fails": lambda: order.append("fails") or next(failing),
        "b": lambda: order.append("b") or 3.0,
    }
    seconds = interleaved(runs, 3, once=["slow"])
    assert "".join(name[0] for name in order) == "asfbafbab"
    assert seconds == {"a": [1.0] * 3, "slow": [2.0], "fails": [1.0], "b": [3.0] * 3}


class _Told(Worker):
    """Rounds that last as long as their numbers say, and no process."""

    def __init__(self, contender):
        self.contender, self.asked = contender, []

    def ask(self, command, *arguments):
        (number,) = arguments
        self.asked.append(number)
        return Seconds(wall=10.0 + number, cpu=20.0 + number), None


@pytest.mark.parametrize(("once", "rounds"), [(False, [0, 1, 2, 3]), (True, [0, 1, 2])])
def test_a_turn_times_the_second_of_two_rounds(once, rounds):
    """Of a slow contender only the first turn has two."""
    worker = _Told(dataclasses.replace(PRODUCTS, once=once))
    entry = _Entry(worker, lambda text: None)
    assert [entry.turn(), entry.turn()] == [11.0, 10.0 + rounds[-1]]
    assert worker.asked == rounds
    assert entry.measured.cpu_seconds == [21.0, 20.0 + rounds[-1]]


def test_ratios_are_those_of_the_same_turn():
    fast = Measured(PRODUCTS, seconds=[1.0, 2.0, 4.0])
    slow = Measured(PRODUCTS, seconds=[2.0, 6.0, 8.0])
    assert ratio(slow, fast) == 2
    assert ratio(Measured(PRODUCTS, seconds=[3.0]), fast) == 3
    assert ratio(Measured(PRODUCTS), fast) is None


@pytest.mark.slow
def test_contenders_that_do_other_work_or_fail_are_out_and_the_rest_go_on():
    other = dataclasses.replace(TASK, seed=1)
    contenders = [
        Contender("first", "loop", TASK),
        Contender("other", "loop", other),
        Contender("too few", "jfed", TASK, jfed.EngineConfig(devices=2), cpu_devices=1),
        PRODUCTS,
    ]
    found = race(contenders, platform="cpu", repeats=2, pause=0.0)
    first, other, few, products = found
    assert len(first.seconds) == len(products.seconds) == 2
    assert first.disagreement == 0
    assert len(first.cpu_seconds) == 2
    assert len(first.losses) == 1 + 2 * 2  # one to compare, and two for each turn
    assert first.memory.host > 1e8
    assert first.memory.device is None
    assert "its first round is another" in other.error
    assert "ConfigError: devices must be at most the 1 there are, got 2" in few.error
    assert not other.seconds
    assert not few.seconds
    text = table("cnn", found)
    assert "too few: failed, ConfigError: devices" in text
    assert products.work.flops == 4 * 2 * 16**3


def test_a_process_that_dies_is_reported():
    worker = Worker(PRODUCTS, "cpu")
    worker.ready()
    os.kill(worker._process.pid, signal.SIGKILL)
    worker._process.join()
    with pytest.raises(WorkerError, match="ended with exit status -9"):
        worker.ask("round", 0)
    worker.close()


def test_want_of_memory_is_told_from_other_failures():
    killed = Measured(PRODUCTS, error="the process ended with exit status -9")
    assert killed.out_of_memory
    assert Measured(PRODUCTS, error="RESOURCE_EXHAUSTED: Out of memory allocating").out_of_memory
    assert not Measured(PRODUCTS, error="ConfigError: lanes").out_of_memory
    done = Measured(Contender("fine", "loop", TASK), [0.5], RoundWork(2, 8, 10**9))
    text = table("accelerator", [done, killed])
    assert "products: out of memory" in text
    assert text.splitlines()[2].split() == ["fine", "0.500", "0.500", "0.500", "4.0", "2"]
