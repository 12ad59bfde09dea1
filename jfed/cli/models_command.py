"""`jfed models`: the model presets, their parameters, bytes and FLOPs."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from tabulate import tabulate

from jfed import tiers as tiers_lib
from jfed.cli import flags
from jfed.errors import check_integer
from jfed.models.flops import forward_flops
from jfed.models.presets import PRESETS, ModelConfig, ODENetConfig, build, twin
from jfed.tiers.communication import tree_bytes, tree_size


def execute(args: list[str]) -> None:
    """The command."""

    def command(size: int = 32, iterations: tuple[int, ...] = (1, 2, 4, 8)) -> tuple[int, Any]:
        """Lists the model presets for 10 classes.

        Args:
          size: height and width of the images; FLOPs depend on it.
          iterations: counts, the same in every stage, to give the FLOPs of ODENets at.
        """
        return size, iterations

    size, iterations = flags.cli(command, prog="jfed models", args=args)
    check_integer("size", size, least=1)
    print(model_table(size, iterations))


def model_table(size: int, iterations: Sequence[int]) -> str:
    """Parameters, bytes of one upload, forward FLOPs an image, reduction, of every preset."""
    rows = []
    for name, config in PRESETS.items():
        shapes = _shapes(config)
        row: dict[str, str] = {
            "model": name,
            "parameters": f"{tree_size(shapes):,}",
            "upload bytes": f"{tree_bytes(shapes):,}",
            "MFLOPs": f"{_flops(config, size) / 1e6:,.1f}",
        }
        if isinstance(config, ODENetConfig):
            row["iterations"] = tiers_lib.tier_name(config.iterations)
            for count in iterations:
                at = dataclasses.replace(config, iterations=count)
                row[f"MFLOPs at {count}"] = f"{_flops(at, size) / 1e6:,.1f}"
            row["twin"], twin_config = twin(name, config)
            row["reduction"] = f"{1 - tree_bytes(shapes) / tree_bytes(_shapes(twin_config)):.1%}"
        rows.append(row)
    order = ["model", "iterations", "parameters", "upload bytes", "MFLOPs"]
    order += [f"MFLOPs at {count}" for count in iterations] + ["twin", "reduction"]
    table = [[row.get(key, "") for key in order] for row in rows]
    return tabulate(table, headers=order, disable_numparse=True, stralign="right")


_model = functools.cache(build)  # building traces the whole network


def _shapes(config: ModelConfig) -> Any:
    if isinstance(config, ODENetConfig):
        config = dataclasses.replace(config, iterations=0)  # many presets differ in no more
    return _shapes_of(config)


@functools.cache
def _shapes_of(config: ModelConfig) -> Any:
    return jax.eval_shape(_model(config).init, jax.random.key(0))


@functools.cache
def _flops(config: ModelConfig, size: int) -> int:
    if isinstance(config, ODENetConfig):
        config = dataclasses.replace(config, unroll=False)
    return forward_flops(_model(config), _shapes(config), (size, size, config.channels))
