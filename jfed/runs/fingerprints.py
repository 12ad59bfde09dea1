"""What a run was made of, as plain values: settings as they were given, digests of arrays."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jfed.data import Dataset
from jfed.data.sources import Split
from jfed.errors import name_of
from jfed.models.model import Params
from jfed.simulation.federation import Federation
from jfed.tiers import Tiers


def plain(value: Any) -> Any:
    """A setting as JSON can hold it.

    Dataclasses become dictionaries, sequences lists, functions their qualified names, arrays their
    shapes and digests; of other objects only the type is told.
    """
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else repr(float(value))
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, np.generic):
        return plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [plain(part) for part in value]
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        return f"{value.dtype}{list(value.shape)} {digest([jax.random.key_data(value)])}"
    if isinstance(value, np.ndarray | jax.Array):
        return f"{value.dtype}{list(value.shape)} {digest([value])}"
    return name_of(value)


def digest(arrays: Sequence[Any]) -> str:
    """SHA-256 of the contents, shapes and types of arrays."""
    found = hashlib.sha256()
    for array in map(np.asarray, arrays):
        found.update(f"{array.shape} {array.dtype}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def inputs(data: Dataset, federation: Federation) -> dict[str, Any]:
    """What a run is given beside its settings: data, partition and tiers."""
    partition = federation.population.partition
    return {
        "data": {
            "name": data.name,
            "classes": data.num_classes,
            "image_shape": list(data.image_shape),
            "train": _split(data.train),
            "test": _split(data.test),
        },
        "partition": {"clients": len(partition), "digest": digest(partition)},
        "tiers": of_tiers(federation.tiers),
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
                "iterations": plain(tier.iterations),
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
