"""Matrix products and convolutions of a compiled program: how large they are, and how exact."""

import math
import re

from jfed.errors import ConfigError
from jfed.planning.hlo import Instruction, bits

_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "f64": "float64"}
# What `jax.lax.DotAlgorithmPreset` rounds operands to.
_ALGORITHMS = {**_NAMES, "tf32": "tensorfloat32", "f32": "float32/highest"}


def target(instruction: Instruction) -> str:
    """The library function that a custom call calls; "" of others."""
    return instruction.attributes.get("custom_call_target", "").strip('"')


def product_flops(product: Instruction, operands: list[Instruction]) -> float:
    """Of a matrix product or convolution, also by cuBLAS or cuDNN; 0 of anything else.

    Two for each product of an output and a window's position and channel, those in the padding
    counted, those with the zeros of a dilated input (`lhs_dilate`) not.
    """
    called = target(product)
    if product.opcode == "dot" or called.startswith("__cublas$"):
        contracted = product.axes("lhs_contracting_dims")
        if called:
            config = product.attributes.get("backend_config", "")
            listed = re.search(r"lhs_contracting_dimensions\W+([\d\s\",\\]*)\]", config)
            contracted = tuple(map(int, re.findall(r"\d+", listed[1]))) if listed else ()
        sizes = operands[0].shapes[0].dims
        return 2.0 * product.shapes[0].elements * math.prod(sizes[axis] for axis in contracted)
    if product.opcode != "convolution" and not called.startswith("__cudnn$conv"):
        return 0.0
    output, kernel = product.shapes[0], operands[1].shapes[0]
    if called.startswith("__cudnn$convBackwardInput"):
        output = operands[0].shapes[0]
    elif called.startswith("__cudnn$convBackwardFilter"):
        output, kernel = operands[1].shapes[0], product.shapes[0]
    channels = kernel.dims[_output_axis(product)]
    dilated = re.search(r"lhs_dilate=([\dx]+)", product.attributes.get("window", ""))
    skipped = math.prod(map(int, dilated[1].split("x"))) if dilated else 1
    return 2.0 * output.elements * kernel.elements / channels / skipped


def _output_axis(convolution: Instruction) -> int:
    """The kernel's axis of output channels; `dim_labels=b01f_01io->b01f`."""
    labels = convolution.attributes.get("dim_labels", "")
    found = re.search(r"_(\w+)->", labels)
    if not found or "o" not in found[1]:
        raise ConfigError(f"the convolution {convolution.name} has dim_labels={labels!r}.")
    return found[1].index("o")


def product_dtype(product: Instruction, operands: list[Instruction]) -> str:
    """The dtype of a product's operands, of float32 with its precision; see `Counts.flops`."""
    dtypes = [operand.shapes[0].dtype for operand in operands[:2]]
    widest = max(dtypes, key=bits)
    asked = product.tail.lower()
    if algorithm := re.search(r"algorithm\W+(?:alg_)?dot_([a-z0-9]+)_\w*?(x\d)?\b", asked):
        name = _ALGORITHMS.get(algorithm[1], algorithm[1])
        return f"{name}/{algorithm[2].removeprefix('x')}" if algorithm[2] else name
    name = _NAMES.get(widest, widest)
    found = re.search(r"operand_precision\W+([\w,\s\\\"]*)", asked)
    precisions = re.findall(r"\w+", found[1]) if found else []
    precision = next((one for one in ("highest", "high") if one in precisions), None)
    return f"{name}/{precision}" if precision and widest == "f32" else name


def groups(instruction: Instruction) -> int:
    """Of a convolution: how many convolutions of separate channels or images it is."""
    counts = [instruction.number(f"{of}_group_count", 1) for of in ("feature", "batch")]
    return max(counts)
