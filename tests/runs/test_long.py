"""A long run stays flat: host memory, open files, compiled programs, arrays on the devices."""

import functools
import gc
import os
import pathlib

import jax
import pytest

from jfed.runs import running as runs
from jfed.runs.assembly import set_up
from jfed.runs.checkpoints import CheckpointConfig
from jfed.runs.config import run_preset
from jfed.settings import as_json

ROUNDS, WARM = 2000, 200
compilations = []


class _Gauge:
    """Measures the process once it is warm, and at the end."""

    def __init__(self):
        self.readings = {}

    def write(self, record):
        if record.round in (WARM, ROUNDS):
            gc.collect()
            pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
            self.readings[record.round] = {
                "MB": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
                "files": len(os.listdir("/proc/self/fd")),
                "arrays": len(jax.live_arrays()),
                "compilations": len(compilations),
            }

    def close(self):
        pass


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_two_thousand_rounds_stay_flat(tmp_path):
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compilations.append(event) if "compile" in event else None
    )
    config = run_preset("digits").replace(
        rounds=ROUNDS,
        train_examples=200,
        eval_examples=60,
        clients=20,
        cohort=4,
        widths=(4,),
        iterations=(1,),
        steps=1,
        conv="transposed",
        eval_every=50,
        calibration_examples=60,
        devices=1,
    )
    gauge = _Gauge()
    runs.run(
        tmp_path / "run",
        as_json(config),
        functools.partial(set_up, config),
        writers=lambda done: [gauge],
        checkpoints=CheckpointConfig(every=50),
    )
    warm, end = gauge.readings[WARM], gauge.readings[ROUNDS]
    print(warm, end)
    assert end["MB"] - warm["MB"] < 40  # 18 to 21 of what malloc leaves in pieces were seen
    assert end["files"] <= warm["files"] + 2
    assert end["arrays"] <= warm["arrays"] + 5
    assert end["compilations"] == warm["compilations"]
