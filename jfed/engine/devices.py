"""The devices of a run, on one host or several, and how arrays get to them."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jfed.errors import ConfigError, check_integer, one_of
from jfed.provenance import cores
from jfed.seeds import is_key

MAPPINGS = ("auto", "vmap", "map", "unroll", "debug")
IMAGES = ("device", "host")
AXIS = "clients"  # the mesh axis that lanes and evaluation batches are spread over
EVERYWHERE = PartitionSpec()
SPREAD = PartitionSpec(AXIS)
_PATIENCE, _MONTH = "xla_cpu_collective_call_terminate_timeout_seconds", 30 * 86400
_MOST_CPU_DEVICES = 8  # each holds a copy of the images


def use_cores(count: int | None = None) -> None:
    """Makes a device of each core of a CPU, up to 8; to be called before JAX starts.

    Where JAX was told how many devices a CPU has, or has started, that stays. XLA would end a
    process in which one device waits for another for a minute; in a round of few, long clients
    they do, and wait as long as it takes from then on.

    Args:
      count: of devices, by default of the cores that this process may use.
    """
    given = os.environ.get("XLA_FLAGS", "")
    if _PATIENCE not in given:
        os.environ["XLA_FLAGS"] = f"{given} --{_PATIENCE}={_MONTH}".strip()
    if jax.config.values["jax_num_cpu_devices"] < 0:
        with contextlib.suppress(RuntimeError):
            count = len(cores()) if count is None else count
            jax.config.update("jax_num_cpu_devices", min(count, _MOST_CPU_DEVICES))


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How clients are spread over hardware. Changes the order of floating-point sums, no more.

    What is picked for None and "auto" was measured on a CPU by `jfed benchmark`
    (experiments/results/benchmark_scaling_cpu.json); for accelerators it is a guess.

    Attributes:
      devices: how many; None takes all that JAX sees. On a CPU one for each core is as fast or
        faster: `jfed.use_cores()` before anything else, as
        `jfed run` does.
      lanes: on each device. More lanes are more clients at the same time, and more memory. None:
        one on a CPU; on an accelerator as many as `useful_lanes` tells, and the cohort has.
      mapping: how a device runs its lanes: "vmap" all at once, "map" or "unroll" one after another;
        "auto": "map" on a CPU, "vmap" on an accelerator. "debug" is another engine, a plain Python
        loop over clients and batches on one device, to compare with and to step through.
      images: where the training images lie: all of them on each "device"; or on the "host", which
        sends each device the rows of its clients before every round, for data that a device has no
        room for. The test images are on the devices in any case.
    """

    devices: int | None = None
    lanes: int | None = None
    mapping: str = "auto"
    images: str = "device"

    def __post_init__(self) -> None:
        for name in ("devices", "lanes"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), least=1)
        one_of("mapping", self.mapping, MAPPINGS)
        one_of("images", self.images, IMAGES)

    def resolve(
        self,
        clients: int,
        there: Sequence[Any] | None,
        useful: Callable[[Any], int],
    ) -> "EngineConfig":
        """The same with numbers in place of None and a mapping in place of "auto".

        Args:
          clients: about how many train in a round; lanes beyond them would idle.
          there: see `make_mesh`.
          useful: how many lanes an accelerator should have if there are so many clients.

        Raises:
          ConfigError: there are fewer devices.
        """
        if self.mapping == "debug":
            return dataclasses.replace(self, devices=1, lanes=1)
        found = _first(self.devices, there)
        devices, cpu = len(found), found[0].platform == "cpu"
        lanes = self.lanes or 1
        if self.lanes is None and not cpu:
            lanes = max(1, min(useful(found[0]), clients // devices))
        mapping = "map" if cpu else "vmap"
        return dataclasses.replace(
            self,
            devices=devices,
            lanes=lanes,
            mapping=mapping if self.mapping == "auto" else self.mapping,
        )


def make_mesh(devices: int | None, there: Sequence[Any] | None = None) -> Mesh:
    """That many devices along one axis, or all that there are, those of other hosts included.

    Args:
      devices: how many.
      there: those there are: by default what JAX sees. They may be devices of a
        `jax.experimental.topologies` description, which programs are compiled for on another
        machine.

    Raises:
      ConfigError: there are fewer, or several hosts would not all take part.
    """
    return Mesh(np.asarray(_first(devices, there)), (AXIS,))


def _first(devices: int | None, there: Sequence[Any] | None) -> Sequence[Any]:
    found = jax.devices() if there is None else there
    count, hosts = len(found) if devices is None else devices, {d.process_index for d in found}
    if count > len(found):
        raise ConfigError(f"devices must be at most the {len(found)} there are, got {count}.")
    if count < len(found) and len(hosts) > 1:
        raise ConfigError(
            f"{len(hosts)} hosts have to take part with all of their {len(found)} "
            f"devices, got devices {count}; leave it out."
        )
    return found[:count]


# FLOPs of a step that keep an accelerator busy. `jfed plan` counts some 750 kernels in a step of an
# ODENet on a GPU, a millisecond or two of launching alone, in which one does a few 10^11.
_BUSY = 1e12


def useful_lanes(device: Any, flops: int | float, memory: Callable[[], int]) -> int:
    """How many lanes it takes to keep an accelerator busy, if half of its memory has room for them.

    Args:
      device: one of several alike.
      flops: of a step of one lane.
      memory: tells the bytes that a lane takes; asked only where the device tells what it has.
    """
    lanes = math.ceil(_BUSY / max(flops, 1.0))
    try:
        limit = (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # it is only described
        limit = None
    return lanes if limit is None else max(1, min(lanes, limit // 2 // memory()))


def platform_of(mesh: Mesh) -> str:
    """Of the devices: "cpu", "gpu" or "tpu"."""
    return mesh.devices.flat[0].platform


def _is_described(mesh: Mesh) -> bool:
    """Whether the devices are those of a description, which hold no arrays."""
    return type(mesh.devices.flat[0].client).__name__ == "CompileOnlyPyClient"  # jaxlib's own


def put(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """Puts arrays on a mesh, copied everywhere or spread along their first axis.

    On devices that are only described (see `make_mesh`) these are shapes that tell where they lie.

    Args:
      tree: arrays of the host, the same on every host, or keys.
      mesh: see `make_mesh`.
      spec: `EVERYWHERE` or `SPREAD`.
    """
    sharding = NamedSharding(mesh, spec)
    if _is_described(mesh):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=sharding), tree
        )
    if jax.process_count() == 1:
        # A key may be the user's own; without a copy, a round that takes it over would delete it.
        return jax.device_put(
            jax.tree.map(lambda x: jnp.copy(x) if is_key(x) else x, tree), sharding
        )

    def place(x: Any) -> jax.Array:
        if is_key(x):
            data = place(jax.random.key_data(x))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree)


def to_host(tree: Any) -> Any:
    """Arrays of the devices as NumPy arrays; typed keys, which NumPy lacks, as they are."""
    return jax.tree.map(lambda x: x if is_key(x) else np.asarray(x), tree)


def rows_here(array: jax.Array) -> dict[int, np.ndarray]:
    """The rows of an array that lie on this host's devices, by number."""
    found: dict[int, np.ndarray] = {}
    for shard in array.addressable_shards:
        first = shard.index[0].start or 0
        found |= {first + i: np.asarray(row) for i, row in enumerate(np.asarray(shard.data))}
    return found
