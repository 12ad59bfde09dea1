"""What a run is given beside its settings, as plain values: digests of arrays and shapes."""

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jfed.data import Dataset, Split
from jfed.models.model import Params
from jfed.settings import as_json
from jfed.simulation.federation import Federation
from jfed.tiers import Tiers


def digest(arrays: Sequence[Any]) -> str:
    """SHA-256 of the contents, shapes and types of arrays."""
    found = hashlib.sha256()
    for array in map(np.asarray, arrays):
        found.update(f"{array.shape} {array.dtype}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def inputs(data: Dataset, federation: Federation) -> dict[str, Any]:
    """What a run is given beside its settings: data, partition and tiers; and what travels.

    A run that starts from given weights, or whose clients have devices, has their digest too.
    """
    partition, clock = federation.population.partition, federation.clock
    started = federation.tiers.weights_digest
    return {
        "data": {
            "name": data.name,
            "classes": data.num_classes,
            "class_names": list(data.class_names),
            "image_shape": list(data.image_shape),
            "pixels": str(data.train.images.dtype),
            "train": _split(data.train),
            "test": _split(data.test),
        },
        "partition": {"clients": len(partition), "digest": digest(partition)},
        "tiers": of_tiers(federation.tiers),
        "method": {
            "weights": as_json(federation.server.weights),
            "algorithm": federation.algorithm.name,
        },
        "traffic": {name: list(sent) for name, sent in federation.traffic.items()},
        **({} if started is None else {"weights": started}),
        **({} if clock is None else {"devices": digest(clock.devices)}),
    }


def of_tiers(tiers: Tiers) -> dict[str, Any]:
    """The tiers' names and counts, and the shapes of their parameters."""
    variables = jax.eval_shape(tiers.init, jax.random.key(0))
    return {
        "kind": tiers.kind,
        "idle": tiers.idle,
        "variables": _shapes(variables),
        "members": {
            tier.name: {
                "iterations": as_json(tier.iterations),
                "solver": tier.solver,
                "parameters": _shapes(tier.shapes(variables)),
            }
            for tier in (*tiers.members, *tiers.tested)
        },
    }


def _split(split: Split) -> dict[str, Any]:
    return {"examples": len(split), "digest": digest([split.images, split.labels])}


def _shapes(variables: Params) -> str:
    """How many parameters there are, and a digest of their names, shapes and types."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    names = [f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}" for path, leaf in leaves]
    found = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    return f"{sum(leaf.size for _, leaf in leaves)} in {len(leaves)} arrays, {found}"
