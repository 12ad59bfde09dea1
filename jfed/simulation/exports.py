"""A trained tier as one file for a device: its program, or its parameters alone.

The program, in StableHLO or ONNX, maps pixels `[N, H, W, C]`, of the type and in the units of the
data's, to logits `[N, classes]` float32. It normalises the pixels itself, with the norms that were
measured for the tier. It holds what the tier computes with and no more, runs the tier's iterations
one after another without a loop, and has XLA's convolutions, as nothing is differentiated.
"""

import contextlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax import export as jax_export
from jaxtyping import Array

from jfed import files
from jfed.data.preprocessing import normalise
from jfed.engine.devices import to_host
from jfed.errors import ConfigError, RunFolderError, calling, check_integer, one_of, optional
from jfed.models.losses import tested_logits
from jfed.models.model import Params, by_name
from jfed.simulation.prediction import Predictor
from jfed.tiers import Tier

PLATFORMS = ("cpu", "cuda", "tpu")
_OPSET = 21  # of ONNX 1.16, 2024


def write(
    predictor: Predictor,
    tier: Tier,
    path: str | os.PathLike[str],
    *,
    format: str,
    batch_size: int | None = None,
) -> int:
    """Writes the file at once, over one that is there; returns its bytes. See `Result.export`."""
    make = _MAKERS[one_of("format", format, FORMATS)]
    if batch_size is not None:
        check_integer("batch_size", batch_size, least=1)
        if format == "safetensors":
            raise ConfigError(f"safetensors hold no program, got batch_size {batch_size!r}.")
    content = make(predictor, tier, batch_size)
    try:
        files.write_bytes(path, content)
    except OSError as error:
        raise RunFolderError(f"cannot write to {os.fspath(path)!r}: {error}.") from error
    return len(content)


def _safetensors(predictor: Predictor, tier: Tier, batch_size: int | None) -> bytes:
    del batch_size  # parameters know none
    inputs = predictor.inputs
    arrays = {"images/mean": inputs.mean, "images/std": inputs.std}
    arrays |= {f"params/{name}": x for name, x in _own(predictor, tier).items()}
    norms = by_name(predictor.norms.get(tier.name))
    arrays |= {f"norms/{name}": np.ascontiguousarray(x) for name, x in norms.items()}
    return safetensors.numpy.save(arrays, _about(predictor, tier))


def _here(tree: Any) -> Any:
    """Arrays on the default device alone, from all devices of a run or from none."""
    return jax.tree.map(jnp.asarray, to_host(tree))


def _parameters(predictor: Predictor, tier: Tier) -> Params:
    """Of the tier's model."""
    return tier.extract(_here(predictor.variables), 0)


def _own(predictor: Predictor, tier: Tier) -> dict[str, np.ndarray]:
    """The tier's parameters by path; of an array with rows of other tiers, its own entries."""
    params = _parameters(predictor, tier)
    found = {name: np.asarray(x) for name, x in by_name(params).items()}
    owned = {} if tier.mask is None else by_name(tier.mask(params, tier.setting))
    for name, mask in owned.items():
        mine = np.asarray(mask) > 0
        places = [np.unique(at) for at in np.nonzero(mine)]
        found[name] = found[name][np.ix_(*places)] if mine.ndim else found[name]
    return {name: np.ascontiguousarray(x) for name, x in found.items() if x.size}


def _stablehlo(predictor: Predictor, tier: Tier, batch_size: int | None) -> bytes:
    program = jax.jit(_program(predictor, tier))

    def make(pixels: jax.ShapeDtypeStruct) -> bytes:
        return bytes(jax_export.export(program, platforms=PLATFORMS)(pixels).serialize())

    with _without_places():
        return _traced(make, predictor, tier, batch_size)


def _onnx(predictor: Predictor, tier: Tier, batch_size: int | None) -> bytes:
    with _quiet("jax2onnx", "onnx_ir"):
        jax2onnx = optional("jax2onnx", "onnx")

        def make(pixels: jax.ShapeDtypeStruct) -> Any:
            return jax2onnx.to_onnx(
                _program(predictor, tier),
                [pixels],
                model_name="jfed",
                opset=_OPSET,
                input_names=["pixels"],
                output_names=["logits"],
            )

        model = _traced(make, predictor, tier, batch_size)
    for key, value in _about(predictor, tier).items():
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString()


_MAKERS: dict[str, Callable[[Predictor, Tier, int | None], bytes]] = {
    "safetensors": _safetensors,
    "stablehlo": _stablehlo,
    "onnx": _onnx,
}
FORMATS = tuple(_MAKERS)


def _program(predictor: Predictor, tier: Tier) -> Callable[[Array], Array]:
    """`pixels -> logits`, to be traced."""
    inputs, model = predictor.inputs, tier.bound()
    params, norms = _parameters(predictor, tier), _here(predictor.norms.get(tier.name))

    def logits(pixels: Array) -> Array:
        # Loops become their steps, and what no pixel decides (rows of norms, times) a constant.
        with jax.disable_jit(), jax.ensure_compile_time_eval():
            images = normalise(pixels, inputs.mean, inputs.std)
            return tested_logits(model, params, images, norms)

    return logits


def _traced(
    make: Callable[[jax.ShapeDtypeStruct], Any],
    predictor: Predictor,
    tier: Tier,
    batch_size: int | None,
) -> Any:
    """What `make` makes of the pixels' shape and type; ConfigError if the model cannot be so."""
    (size,) = jax_export.symbolic_shape("N") if batch_size is None else (batch_size,)
    inputs = predictor.inputs
    pixels = jax.ShapeDtypeStruct((size, *inputs.shape), np.dtype(inputs.pixels))
    try:
        with calling(f"the model of tier {tier.name!r}", pixels=pixels):
            return make(pixels)
    except ConfigError as error:
        if batch_size is not None:
            raise
        raise ConfigError(f"{error} It may do with a number of images: give batch_size.") from error


def _about(predictor: Predictor, tier: Tier) -> dict[str, str]:
    """What a file says of itself; all but texts as JSON."""
    inputs = predictor.inputs
    told = {
        "jfed": importlib.metadata.version("jfed"),
        "tier": tier.name,
        "kind": predictor.tiers.kind,
        "iterations": tier.iterations,
        "solver": tier.solver,
        "class_names": inputs.class_names,
        "image_shape": inputs.shape,
        "pixels": inputs.pixels,
    }
    texts = {key: x if isinstance(x, str) else json.dumps(x) for key, x in told.items()}
    return {key: text for key, text in texts.items() if text != "null"}


@contextlib.contextmanager
def _without_places() -> Iterator[None]:
    """Keeps the paths of source files on this machine out of what is lowered."""
    name = "jax_traceback_in_locations_limit"
    before = jax.config.values[name]
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Keeps loggers from telling of what does not concern the user, such as unused plugins."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
