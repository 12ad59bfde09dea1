"""Hostile clients against the mean and robust aggregators, on digits.

    python experiments/robustness.py --scale cpu

trains a small ODENet under each attack, share of hostile clients, aggregator and seed, and writes
`experiments/results/robustness_cpu.csv`. The table in experiments/README.md is what it gave: about
97 % without hostile clients, but 65 % with Krum; the mean falls to 10 % at updates scaled by -10,
and with 30 % of hostile clients multi-Krum keeps 86 to 95 %.
"""

import concurrent.futures
import dataclasses
import itertools
import pathlib
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import tyro
from script import table_of
from tabulate import tabulate

from jfed import files, provenance
from jfed.errors import DivergedError
from jfed.reports import tables as report
from jfed.runs.assembly import set_up
from jfed.runs.compiled import keep_compiled
from jfed.runs.config import RunConfig
from jfed.simulation import loop as simulation
from jfed.simulation.federation import Federation

HONEST = "none"


@dataclasses.dataclass(frozen=True)
class Scale:
    """What is run: a federation, and the attacks on it by shares of hostile clients."""

    base: RunConfig
    byzantine: int
    attacks: tuple[str, ...]
    shares: tuple[float, ...]
    aggregators: tuple[str, ...]


_SCALES = {
    # The strengths of all attacks and the number of steps are fixed, so that few programs compile.
    "cpu": Scale(
        RunConfig(
            clients=20,
            alpha=1.0,
            widths=(8, 16),
            iterations=(2,),
            rounds=10,
            steps=10,
            momentum=0.9,
            attack_noise=1.0,
            attack_scale=-10.0,
            eval_every=0,
            eval_batch_size=180,
            calibration_examples=500,
        ),
        byzantine=6,
        attacks=("sign-flip", "scaled", "noise"),
        shares=(0.0, 0.1, 0.2, 0.3),
        aggregators=("mean", "median", "trimmed mean", "Krum", "multi-Krum", "clipping"),
    ),
    "smoke": Scale(
        RunConfig(
            train_examples=200,
            clients=5,
            widths=(4, 4),
            iterations=(1,),
            rounds=1,
            steps=1,
            conv="im2col",
            eval_every=0,
            eval_examples=50,
        ),
        byzantine=1,
        attacks=("sign-flip",),
        shares=(0.2,),
        aggregators=("mean", "multi-Krum"),
    ),
}


def aggregators(scale: Scale) -> dict[str, dict[str, Any]]:
    """Settings of each aggregator: those that have to know expect the most hostile clients."""
    krum = {"krum_byzantine": scale.byzantine}
    trim = scale.byzantine / scale.base.clients
    settings: dict[str, dict[str, Any]] = {
        "mean": {},
        "median": {"aggregator": "median"},
        "trimmed mean": {"aggregator": "trimmed-mean", "trim": trim},
        "Krum": {"aggregator": "krum", **krum},
        "multi-Krum": {"aggregator": "multi-krum", **krum},
        "clipping": {"aggregator": "norm-clipping"},
    }
    return {name: settings[name] for name in scale.aggregators}


def arms(scale: Scale, seeds: int) -> Iterator[tuple[str, RunConfig]]:
    """Every run, with the name of its aggregator; without hostile clients there is one attack."""
    attacked = list(itertools.product(scale.attacks, [s for s in scale.shares if s]))
    conditions = [(scale.attacks[0], 0.0)] if 0.0 in scale.shares else []
    for name, settings in aggregators(scale).items():
        for attack, share in (*conditions, *attacked):
            for seed in range(seeds):
                changes: dict[str, Any] = {"hostile": share, "attack": attack, "seed": seed}
                yield name, dataclasses.replace(scale.base, **settings, **changes)


def prepare(config: RunConfig) -> Federation:
    """A federation, compiled."""
    federation = set_up(config)[0]
    federation.compile()
    return federation


def prepared(
    runs_: Iterable[tuple[str, RunConfig]],
) -> Iterator[tuple[str, RunConfig, Federation]]:
    """Prepares each run while the one before it trains: tracing takes about as long as training."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ahead: list[tuple[str, RunConfig, concurrent.futures.Future[Federation]]] = []
        for name, config in runs_:
            ahead.append((name, config, pool.submit(prepare, config)))
            if len(ahead) > 1:
                name, config, future = ahead.pop(0)
                yield name, config, future.result()
        for name, config, future in ahead:
            yield name, config, future.result()


def measure(name: str, config: RunConfig, federation: Federation) -> dict[str, Any]:
    """Runs one arm and returns its line of the table; without an accuracy if it diverged."""
    began, diverged_in, accuracy = time.perf_counter(), None, None
    try:
        (accuracy,) = simulation.run(federation).accuracies.values()
    except DivergedError as error:
        diverged_in = len(error.history) + 1
    return {
        "aggregator": name,
        "attack": config.attack if config.hostile else HONEST,
        "hostile": config.hostile,
        "seed": config.seed,
        "accuracy": accuracy,
        "diverged_in_round": diverged_in,
        "seconds": round(time.perf_counter() - began, 1),
    }


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Mean and standard deviation of the accuracy over seeds, a column for each aggregator."""
    cells: dict[tuple[str, float], dict[str, list[Any]]] = {}
    for line in lines:
        row = cells.setdefault((line["attack"], line["hostile"]), {})
        row.setdefault(line["aggregator"], []).append(line["accuracy"])
    rows = [
        {"attack": attack, "hostile": f"{hostile:.0%}", **{a: cell(v) for a, v in row.items()}}
        for (attack, hostile), row in cells.items()
    ]
    return tabulate(rows, headers="keys", disable_numparse=True, stralign="right")


def cell(accuracies: Sequence[float | None]) -> str:
    """Mean and standard deviation in %, or how many runs diverged."""
    found = [a for a in accuracies if a is not None]
    if len(found) < len(accuracies):
        return f"{len(accuracies) - len(found)} of {len(accuracies)} diverged"
    return report.spread(found)


def main(
    scale: Literal["cpu", "smoke"] = "cpu",
    seeds: int = 3,
    output: pathlib.Path | None = None,
    cache: pathlib.Path = pathlib.Path("runs/robustness-cache"),
) -> None:
    """Runs the experiment.

    Args:
      scale: cpu (two cores, a quarter of an hour) or smoke (a minute).
      seeds: how many.
      output: of the CSV; experiments/results/robustness_cpu.csv where not given, but nowhere for
        smoke.
      cache: where compiled programs are kept, which all seeds, shares and attacks have in common.
    """
    keep_compiled(cache.resolve())
    output = table_of(__file__, scale, output)
    hardware, lines = provenance.hardware(), []
    about = {
        "hardware": f"{hardware['cpus']} x {hardware['machine']}",
        "jax": hardware["jax"],
        "python": platform.python_version(),
        "commit": hardware["commit"],
        "command": f"python experiments/robustness.py --scale {scale} --seeds {seeds}",
    }
    for arm in prepared(arms(_SCALES[scale], seeds)):
        lines.append(measure(*arm) | about)
        print({k: v for k, v in lines[-1].items() if k not in about}, file=sys.stderr)
        if output:
            files.write_csv(lines, output)
    print(table(lines))


if __name__ == "__main__":
    # A device for each of two cores, as `jfed run` does.
    jax.config.update("jax_num_cpu_devices", 2)
    tyro.cli(main)
