"""Data sets, and how their examples are dealt out to the clients."""

from jfed.data.adapters import from_huggingface, from_torchvision
from jfed.data.partitions import (
    SCHEMES,
    PartitionConfig,
    by_client,
    check as check_partition,
    class_counts,
    dirichlet,
    dirichlet_balanced,
    dirichlet_clients,
    iid,
    partition,
    quantity_skew,
    shards,
)
from jfed.data.preparation import prepare
from jfed.data.sources import DataConfig, load
from jfed.data.splits import Dataset, Split

__all__ = [
    "SCHEMES",
    "DataConfig",
    "Dataset",
    "PartitionConfig",
    "Split",
    "by_client",
    "check_partition",
    "class_counts",
    "dirichlet",
    "dirichlet_balanced",
    "dirichlet_clients",
    "from_huggingface",
    "from_torchvision",
    "iid",
    "load",
    "partition",
    "prepare",
    "quantity_skew",
    "shards",
]
