"""The devices of a run, on one host or several, and how arrays get to them."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jfed.errors import ConfigError

AXIS = "clients"  # the mesh axis that lanes and evaluation batches are spread over
EVERYWHERE = PartitionSpec()
SPREAD = PartitionSpec(AXIS)


def make_mesh(devices: int | None) -> Mesh:
    """That many devices along one axis, or all that JAX sees, those of other hosts included.

    Raises:
      ConfigError: there are fewer, or several hosts would not all take part.
    """
    found = jax.devices()
    count = len(found) if devices is None else devices
    if count > len(found):
        raise ConfigError(f"devices must be at most the {len(found)} there are, got {count}.")
    if count < len(found) and jax.process_count() > 1:
        raise ConfigError(
            f"{jax.process_count()} hosts have to take part with all of their {len(found)} "
            f"devices, got devices {count}; leave it out."
        )
    return Mesh(np.asarray(found[:count]), (AXIS,))


def put(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """Puts arrays on a mesh, copied everywhere or spread along their first axis.

    Args:
      tree: arrays of the host, the same on every host.
      mesh: see `make_mesh`.
      spec: `EVERYWHERE` or `SPREAD`.
    """
    sharding = NamedSharding(mesh, spec)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def place(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                place(jax.random.key_data(x)), impl=jax.random.key_impl(x)
            )
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree)
