"""Data sets, and how their examples are dealt out to the clients."""

from jfed.data.partitions import (
    SCHEMES,
    PartitionConfig,
    class_counts,
    dirichlet,
    dirichlet_balanced,
    dirichlet_clients,
    iid,
    partition,
    quantity_skew,
    shards,
)
from jfed.data.partitions import check as check_partition
from jfed.data.preparation import prepare
from jfed.data.sources import DataConfig, Dataset, Split, load

__all__ = [
    "SCHEMES",
    "DataConfig",
    "Dataset",
    "PartitionConfig",
    "Split",
    "check_partition",
    "class_counts",
    "dirichlet",
    "dirichlet_balanced",
    "dirichlet_clients",
    "iid",
    "load",
    "partition",
    "prepare",
    "quantity_skew",
    "shards",
]
