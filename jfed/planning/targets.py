"""GPUs and TPUs to compile for, named by the user; the machine itself need not have any."""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies

from jfed.errors import ConfigError, check_type, one_of
from jfed.planning.hardware import CHIPS, Chip, gpu_target_config

MOST_DEVICES = 8960  # chips of the largest TPU pod of all, v5p's
# Shapes of the cloud's TPU types, smallest first, by how many axes a slice has
# (https://cloud.google.com/tpu/docs/v4, v5e, v5p, v6e).
_SLICES: dict[int, list[tuple[int, ...]]] = {
    2: [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)],
    3: [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8)],
}
# What libtpu would look for on a TPU's host, and complain of elsewhere. It asks no metadata server
# of the network, writes no log files, and does not keep other processes from loading it.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """What a run is planned for.

    Attributes:
      name: as it was asked for.
      chip: what its devices are; None of the machine's own CPU.
      shape: of its devices: slices, hosts of a slice, GPUs of a host; or a TPU slice's axes.
      devices: to put into meshes and shardings of what is compiled for them. Nothing runs on them.
      hosts: how many its devices are spread over.
    """

    name: str
    chip: Chip | None
    shape: tuple[int, ...]
    devices: tuple[jax.Device, ...]
    hosts: int


def open_target(text: str) -> Target:
    """Finds the devices of a target, for `jax.jit(...).lower(...).compile()`.

    Everything that this process computes stays on its CPU from then on, unless JAX has opened
    other devices already: call it before the first computation. Then a machine's own GPU or TPU is
    left alone, and what is planned is the same on every machine.

    Args:
      text: a chip of `jfed.planning.hardware.CHIPS`, alone for the least that can be had of it,
        or with a shape: "h100:8" and "h100:1x2x8" (slices x hosts of a slice x GPUs of a host;
        leading ones may be left out), "v5e:4x4" and "v4:2x2x1" (chips), or a TPU type of Google's
        cloud, "v5e-16" or "v5litepod-16" (chips) and "v4-8" (TensorCores, two a chip). "cpu": this
        machine's.

    Raises:
      ConfigError: there is no such target, or its compiler is not installed.
    """
    chip, shape = parse(text)
    jax.config.update("jax_platforms", "cpu")
    if chip is None:
        devices = jax.devices("cpu")
        shape = (len(devices),)
    else:
        devices = _gpus(text, chip, shape) if chip.platform == "gpu" else _tpus(text, chip, shape)
    hosts = len({device.process_index for device in devices})
    return Target(text, chip, shape, tuple(devices), hosts)


def parse(text: str) -> tuple[Chip | None, tuple[int, ...]]:
    """The chip and shape of a target's name (see `open_target`); loads no compiler.

    Raises:
      ConfigError: no target is called so.
    """
    check_type("target", text, str)
    text = re.sub("^v5litepod-", "v5e-", text)  # as Google's cloud calls them
    name = text.partition(":")[0]
    if name not in CHIPS:
        name = name.partition("-")[0]
    separator, rest = text[len(name) : len(name) + 1], text[len(name) + 1 :]
    one_of("target", name, ("cpu", *CHIPS))
    if name == "cpu":
        if separator:
            raise ConfigError(f"target {text!r}: 'cpu' is this machine's and has no shape.")
        return None, ()
    chip = CHIPS[name]
    if not separator:
        return chip, chip.smallest
    return chip, _shape(text, chip, rest) if separator == ":" else _slice_of_type(text, chip)


def _shape(text: str, chip: Chip, written: str) -> tuple[int, ...]:
    axes = len(chip.smallest)
    least = 1 if chip.platform == "gpu" else axes
    if not re.fullmatch("[1-9][0-9]{0,8}(x[1-9][0-9]{0,8})*", written, re.ASCII):
        raise ConfigError(
            f"target {text!r}: the shape must be whole numbers joined by 'x', such as "
            f"'{chip.name}:{_example(chip)}', got {written!r}."
        )
    shape = tuple(int(number) for number in written.split("x"))
    if not least <= len(shape) <= axes:
        bound = f"{axes}" if least == axes else f"{least} to {axes}"
        raise ConfigError(
            f"target {text!r}: the shape of {chip.name} must have {bound} numbers, such as "
            f"'{chip.name}:{_example(chip)}', got {written!r}."
        )
    if math.prod(shape) > MOST_DEVICES:
        raise ConfigError(f"target {text!r} must have {MOST_DEVICES} devices or fewer.")
    return (1,) * (axes - len(shape)) + shape


def _slice_of_type(text: str, chip: Chip) -> tuple[int, ...]:
    if chip.platform == "gpu":
        smaller = "; one with 40 GB is an 'a100-40gb'" if chip.name == "a100" else ""
        raise ConfigError(
            f"target {text!r}: write '{chip.name}:8' for a host of eight GPUs{smaller}."
        )
    slices = _SLICES[len(chip.smallest)]
    types = {f"{chip.name}-{chip.cores * math.prod(shape)}": shape for shape in slices}
    return types[one_of("target", text, tuple(types))]


def _example(chip: Chip) -> str:
    return "1x2x8" if chip.platform == "gpu" else "x".join(map(str, _SLICES[len(chip.smallest)][3]))


def _gpus(text: str, chip: Chip, shape: tuple[int, ...]) -> list[Any]:
    written = "x".join(map(str, shape))
    try:
        # JAX finds the plugin by itself here, once; finding it by hand would register it twice.
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name=written,
            topology=written,
            target_config=gpu_target_config(chip),
        ).devices
    except NotImplementedError as error:
        raise ConfigError(
            f"target {text!r} needs XLA's compiler for NVIDIA GPUs, which itself needs none: pip "
            "install 'jfed[plan-gpu]'. (In Python, where it is installed: open the target before "
            f"JAX has opened other devices, or set JAX_PLATFORMS=cpu; {error}.)"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"target {text!r}: XLA refuses it: {error}") from error


def _tpus(text: str, chip: Chip, shape: tuple[int, ...]) -> list[Any]:
    options: dict[str, Any] = {}
    if chip.cores == 2:  # one device a chip, as on the cloud's machines
        options["chip_config_name"] = "megacore"
    # Machines with one chip, or with eight; else libtpu counts four a host.
    if shape in ((1, 1), (2, 4)):
        options["chips_per_host_bounds"] = (*shape, 1)
    name = f"{chip.name}:{'x'.join(map(str, shape))}"
    try:
        with _defaults(_LIBTPU):
            return topologies.get_topology_desc(
                platform="tpu", topology_name=name, **options
            ).devices
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"target {text!r}: libtpu refuses it: {error}") from error
    except RuntimeError as error:
        raise ConfigError(
            f"target {text!r} needs XLA's compiler for TPUs, which itself needs none: pip install "
            f"'jfed[plan-tpu]' ({error})."
        ) from error


@contextlib.contextmanager
def _defaults(variables: dict[str, str]) -> Iterator[None]:
    """Sets those variables of the environment that are not set, and unsets them again."""
    added = variables.keys() - os.environ.keys()
    os.environ.update({name: variables[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
