"""What a run came to: the table that ends it, `summary.json`, and its figures."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from tabulate import tabulate

from jfed.data import Dataset
from jfed.models.flops import forward_flops
from jfed.models.ode_nets import ODENetConfig
from jfed.models.presets import ModelConfig, build, twin
from jfed.reports import plots
from jfed.simulation.federation import Federation
from jfed.simulation.loop import Result
from jfed.simulation.records import LocalEvaluation
from jfed.simulation.scores import METRICS, column
from jfed.tiers import Tiers
from jfed.tiers.communication import owned_size, traffic, tree_bytes


@dataclasses.dataclass(frozen=True)
class TierSummary:
    """One line of the table that ends a run.

    Attributes:
      kind: what its name tells, such as "iterations".
      tier: its name, such as the iteration count.
      iterations: solver steps of each stage; None where the tier is no iteration count.
      solver: that takes them; likewise.
      trained: whether clients ran it, or it was only evaluated.
      accuracy: on the test set, from 0 to 1.
      loss: on the test set, in nats.
      metrics: further ones on the test set, by name, see `jfed.simulation.records.Evaluation`.
      parameters: of the tier's submodel.
      flops: of classifying one image, see `jfed.models.flops.forward_flops`.
      training_flops: of a client in a round, the mean over those of the tier, see
        `jfed.models.flops.training_flops`; None where clients did not run it.
      peak_bytes: of a client's memory while it trains, see
        `jfed.simulation.training_costs.TrainingCosts.peak_bytes`; likewise.
      bytes_down: to one client in one round.
      bytes_up: from one client in one round.
      twin: the ResNet it is compared with; None where the model is itself one, or not of jfed.
      twin_bytes: one upload of the twin.
      reduction: 1 - bytes_up / twin_bytes.
    """

    kind: str
    tier: str
    iterations: tuple[int, ...] | None
    solver: str | None
    trained: bool
    accuracy: float
    loss: float
    metrics: dict[str, float]
    parameters: int
    flops: int
    training_flops: float | None
    peak_bytes: int | None
    bytes_down: int
    bytes_up: int
    twin: str | None
    twin_bytes: int | None
    reduction: float | None


class Twin(NamedTuple):
    """The ResNet that an ODENet is compared with: its name, and the bytes of one upload."""

    name: str
    bytes: int


def find_twin(name: str, network: ModelConfig, tiers: Tiers) -> Twin | None:
    """The twin of a network made from the preset `name`; None where that is itself a ResNet."""
    if not isinstance(network, ODENetConfig):
        return None
    run = [tier.iterations for tier in tiers.members if tier.iterations is not None]
    title, config = twin(name, network, max(run, key=sum, default=None))
    return Twin(title, tree_bytes(jax.eval_shape(build(config).init, jax.random.key(0))))


def summarise(
    federation: Federation,
    result: Result,
    image_shape: tuple[int, ...],
    compared: Twin | None = None,
) -> list[TierSummary]:
    """What the table at the end of a run says, one entry for each evaluated tier."""
    last, lines = result.history[-1].evaluations, []
    costs = federation.training_costs()
    for tier in federation.evaluated:
        shapes = tier.shapes(result.variables)
        # Of a tier that no client trains, what an update of it would take.
        bytes_ = result.traffic.get(tier.name) or traffic(tier, result.variables)
        cost = costs.get(tier.name)
        lines.append(
            TierSummary(
                kind=federation.tiers.kind,
                tier=tier.name,
                iterations=tier.iterations,
                solver=tier.solver,
                trained=tier.name in federation.traffic,
                accuracy=last[tier.name].accuracy,
                loss=last[tier.name].loss,
                metrics=last[tier.name].metrics,
                parameters=owned_size(tier, result.variables),
                flops=forward_flops(tier.bound(), shapes, image_shape),
                training_flops=cost and cost.flops,
                peak_bytes=cost and cost.peak_bytes,
                bytes_down=bytes_.down,
                bytes_up=bytes_.up,
                twin=compared.name if compared else None,
                twin_bytes=compared.bytes if compared else None,
                reduction=1 - bytes_.up / compared.bytes if compared else None,
            )
        )
    return lines


def format_table(lines: list[TierSummary]) -> str:
    """The table that ends a run, as text."""
    rows = [
        {
            line.kind: line.tier if line.trained else f"{line.tier} (not trained)",
            "accuracy": f"{line.accuracy:.2%}",
            **{
                metric.title: f"{line.metrics[column(name)]:.2%}"
                for name, metric in METRICS.items()
                if column(name) in line.metrics
            },
            "parameters": f"{line.parameters:,}",
            "MFLOPs": f"{line.flops / 1e6:,.1f}",
            "training GFLOPs": in_units(line.training_flops, 1e9),
            "memory [MB]": in_units(line.peak_bytes, 1e6),
            "bytes down": f"{line.bytes_down:,}",
            "bytes up": f"{line.bytes_up:,}",
            **(
                {
                    f"{line.twin}: bytes": f"{line.twin_bytes:,}",
                    "reduction": f"{line.reduction:.1%}",
                }
                if line.twin is not None
                else {}
            ),
        }
        for line in lines
    ]
    return tabulate(rows, headers="keys", disable_numparse=True, stralign="right")


def in_units(value: int | float | None, unit: float) -> str:
    """Three digits of a size in some unit; nothing of what is not known."""
    return "" if value is None else f"{value / unit:,.3g}"


def to_json(
    data: Dataset,
    result: Result,
    table: list[TierSummary],
    *,
    seed: int,
    hardware: dict[str, Any],
) -> dict[str, Any]:
    """What `summary.json` holds."""
    last = result.history[-1]
    return {
        "rounds": last.round,
        "train_loss": last.train_loss if last.examples else None,
        "train_examples": len(data.train),
        "test_examples": len(data.test),
        "tiers": [_line(line) for line in table],
        "local": _local(last.local, result.client_names),
        "epsilon": "inf" if last.epsilon == math.inf else last.epsilon,  # JSON has no such number
        "noise": result.noise,
        "bytes_down_total": last.bytes_down_total,
        "bytes_up_total": last.bytes_up_total,
        "simulated_seconds": last.simulated_seconds,
        "seconds": last.seconds,
        "compile_seconds": result.compile_seconds,
        "lane_utilisation": _mean(result, "lane_utilisation"),
        "padded_utilisation": _mean(result, "padded_utilisation"),
        "engine": dataclasses.asdict(result.engine),
        "seed": seed,
        "hardware": hardware,
    }


def _line(line: TierSummary) -> dict[str, Any]:
    """A line as JSON can hold it, which knows no nan."""

    def known(value: float) -> float | None:
        return value if math.isfinite(value) else None

    metrics = {name: known(value) for name, value in line.metrics.items()}
    return dataclasses.asdict(line) | {"loss": known(line.loss), "metrics": metrics}


def _local(found: LocalEvaluation | None, names: Sequence[str]) -> dict[str, Any] | None:
    """What clients came to on examples of their own; None where that is not tested."""
    if found is None:
        return None
    clients = {names[c]: a for c, a in zip(found.clients, found.accuracies, strict=True)}
    return found.summary | {"by_tier": found.by_tier, "clients": clients}


def format_local(found: LocalEvaluation, names: Sequence[str]) -> str:
    """What clients came to on examples of their own, as a line of text; `names` by number."""
    told = {"mean": "mean", "worst": "worst", "p10": "10th percentile", "std": "deviation"}
    parts = [f"{title} {found.summary[name]:.2%}" for name, title in told.items()]
    worst = found.clients[int(np.argmin(found.accuracies))]
    parts[1] += f" (client {names[worst]})"
    tiers = [f"{name}: {value:.2%}" for name, value in found.by_tier.items()]
    return f"Accuracy of clients on examples of their own: {', '.join(parts)}; {', '.join(tiers)}."


def _mean(result: Result, column: str) -> float:
    return float(np.mean([getattr(record, column) for record in result.history]))


def save_figures(path: epath.Path, result: Result, table: Sequence[TierSummary]) -> None:
    """Accuracy over rounds, bytes and simulated time, against FLOPs and iteration counts."""
    kind = table[0].kind
    plots.save(plots.accuracy(result.history, kind), path / "accuracy.png")
    plots.save(plots.accuracy_by_bytes(result.history, kind), path / "accuracy_by_bytes.png")
    if result.history[-1].simulated_seconds is not None:
        figure = plots.accuracy_by_time(result.history, kind)
        plots.save(figure, path / "accuracy_by_time.png")
    if (local := result.history[-1].local) is not None:
        plots.save(
            plots.local_accuracy(local, kind, result.client_names), path / "local_accuracy.png"
        )
    by_flops: dict[str, list[plots.Reached]] = {}
    by_iterations: dict[str, list[plots.Reached]] = {}
    for line in table:
        flops = plots.Reached(line.flops / 1e6, [line.accuracy], line.trained)
        by_flops.setdefault(line.solver or "", []).append(flops)
        if line.iterations is not None:
            count = plots.Reached(float(np.mean(line.iterations)), *flops[1:])
            by_iterations.setdefault(line.solver or "", []).append(count)
    figure = plots.accuracy_curves("MFLOPs an image", by_flops, "solver")
    plots.save(figure, path / "accuracy_by_flops.png")
    if by_iterations:
        figure = plots.accuracy_curves("iterations of an ODE block", by_iterations, "solver")
        plots.save(figure, path / "accuracy_by_iterations.png")
