"""Dealing the training examples out to the clients.

A partition is a tuple with one array of example indices, `[examples of the client]` int64 and
sorted, per client. Every example belongs to exactly one client. All functions are deterministic
in `seed`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jfed.data.dirichlet_counts import Draw, balanced, draw_counts, mixed, shared
from jfed.errors import (
    ConfigError,
    DataError,
    check_integer,
    check_number,
    check_sequence,
    one_of,
    shown,
)
from jfed.seeds import generator

SCHEMES = (
    "iid",
    "dirichlet",
    "dirichlet-balanced",
    "dirichlet-clients",
    "shards",
    "quantity",
    "natural",
)
"""The names that `partition` knows."""

Partition = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class PartitionConfig:
    """How examples are dealt out to the clients.

    Attributes:
      scheme: `iid`; `dirichlet`: clients differ in mixture of classes and in size;
        `dirichlet-balanced`: less in size, as NeFL and DepthFL have it; `dirichlet-clients`: not in
        size, as FedDyn has it; `shards`; `quantity` (`quantity_skew`): in size alone; `natural`
        (`by_client`): the clients of the data, all.
      alpha: the concentration of the Dirichlet schemes and of `quantity`; smaller is more uneven.
      shards_per_client: of `shards`: about as many classes a client.
      min_examples: the fewest examples of a client, whatever the scheme.
    """

    scheme: str = "dirichlet"
    alpha: float = 0.5
    shards_per_client: int = 2
    min_examples: int = 5

    def __post_init__(self) -> None:
        one_of("partition", self.scheme, SCHEMES)
        check_number("alpha", self.alpha, above=0.0)
        check_integer("shards_per_client", self.shards_per_client, least=1)
        check_integer("min_examples", self.min_examples, least=1)


def partition(
    config: PartitionConfig,
    labels: np.ndarray,
    clients: int,
    *,
    natural: np.ndarray | None = None,
    seed: int,
) -> Partition:
    """Partitions as configured.

    Args:
      config: the scheme, which ignores the settings that are not its own.
      labels: `[N]` integers.
      clients: the number of clients, from 1 to N; of `natural`, not used.
      natural: `[N]` the client of each example, see `Dataset.clients`.
      seed: of every random choice.

    Returns:
      The partition.

    Raises:
      ConfigError: if the scheme cannot do what the settings ask for.
    """
    least, alpha = config.min_examples, config.alpha
    if config.scheme == "natural":
        return by_client(natural, min_examples=least)
    _check_counts(labels, clients, least)
    skewed = {
        "dirichlet": dirichlet,
        "dirichlet-balanced": dirichlet_balanced,
        "quantity": quantity_skew,
    }
    if config.scheme in skewed:
        deal = skewed[config.scheme]
        return deal(labels, clients, alpha=alpha, min_examples=least, seed=seed)
    if config.scheme == "dirichlet-clients":
        return dirichlet_clients(labels, clients, alpha=alpha, seed=seed)
    if config.scheme == "iid":
        return iid(labels, clients, seed=seed)
    parts = shards(labels, clients, shards_per_client=config.shards_per_client, seed=seed)
    smallest = min(map(len, parts))
    if smallest < least:  # shards differ in size by one, so a client's by several
        raise ConfigError(
            f"{config.shards_per_client} shards per client leave one of {clients} clients with "
            f"{smallest} examples, but min_examples is {least}. Lower one of the three."
        )
    return parts


def by_client(clients: np.ndarray | None, *, min_examples: int = 1) -> Partition:
    """Deals examples out to the clients that they belong to: cameras, writers, hospitals.

    Args:
      clients: `[N]` integers from 0, the client of each example.
      min_examples: the fewest examples of a client, at least 1.

    Raises:
      ConfigError: no clients are told, or one has fewer examples.
    """
    if clients is None:
        raise ConfigError("the partition 'natural' needs data with clients, got none.")
    check_integer("min_examples", min_examples, least=1)
    order = np.argsort(clients, kind="stable")
    counts = np.bincount(clients)
    if counts.min() < min_examples:
        raise ConfigError(
            f"client {counts.argmin()} has {counts.min()} examples; min_examples is {min_examples}."
        )
    return _sorted(np.split(order, np.cumsum(counts)[:-1]))


def iid(labels: np.ndarray, clients: int, *, seed: int) -> Partition:
    """Deals shuffled examples out evenly; the sizes differ by one at most.

    Args:
      labels: `[N]` integers.
      clients: the number of clients, from 1 to N.
      seed: of the shuffle.

    Returns:
      The partition.

    Raises:
      ConfigError: if `clients` is out of range.
    """
    _check_counts(labels, clients)
    order = generator(seed, "partition").permutation(len(labels))
    return _sorted(np.array_split(order, clients))


def dirichlet(
    labels: np.ndarray,
    clients: int,
    *,
    alpha: float,
    min_examples: int = 1,
    max_tries: int = 1000,
    seed: int,
) -> Partition:
    """Gives the clients different mixtures of classes, and different numbers of examples.

    For each class, the clients' shares of its examples are drawn from a symmetric Dirichlet
    distribution: the "distribution-based label imbalance" of Li et al., "Federated Learning on
    Non-IID Data Silos" (ICDE 2022, arXiv 2102.02079, section IV-A), as the paper words it, after
    Yurochkin et al. (ICML 2019); the code of both is `dirichlet_balanced`. jfed's experiments use
    this kind. Shares are drawn anew until every client has `min_examples`.

    Args:
      labels: `[N]` integers.
      clients: the number of clients, from 1 to N.
      alpha: the concentration, above 0. Near 0 a class belongs to one client; towards infinity the
        classes are spread evenly.
      min_examples: the fewest examples of a client, at least 1.
      max_tries: how often the shares are drawn before giving up.
      seed: of the shares, and of which examples they consist of.

    Returns:
      The partition.

    Raises:
      ConfigError: if a setting is out of range, or no try gave every client `min_examples`.
    """
    return _by_counts(shared, labels, clients, alpha, min_examples, max_tries, seed)


def dirichlet_balanced(
    labels: np.ndarray,
    clients: int,
    *,
    alpha: float,
    min_examples: int = 1,
    max_tries: int = 1000,
    seed: int,
) -> Partition:
    """Deals out by class as `dirichlet`, but nothing more to clients that have the average.

    The classes come one after the other, and only the clients that have fewer than N / clients
    examples by then have a share. This is the code of Li et al. (NIID-Bench, `partition.py`) and
    of Yurochkin et al. (PFNM), except that they round running shares down. The non-IID experiments
    of NeFL (its code's `cifar_noniiddir`) and of DepthFL (the Flower baseline by its first author)
    use this kind with `alpha` 0.5 and `min_examples` 10.

    Arguments, result and errors are those of `dirichlet`.
    """
    return _by_counts(balanced, labels, clients, alpha, min_examples, max_tries, seed)


def dirichlet_clients(labels: np.ndarray, clients: int, *, alpha: float, seed: int) -> Partition:
    """Gives the clients different mixtures of classes; their sizes differ by one at most.

    Each client's mixture is drawn from Dirichlet(alpha p), where p are the classes' shares of all
    examples, and then its examples by this mixture, without replacement: Hsu et al., "Measuring the
    Effects of Non-Identical Data Distribution for Federated Visual Classification" (arXiv
    1909.06335). A class that has run out leaves the mixture, so that the last clients get what the
    others left.

    FedDyn's code uses this kind, with a concentration per class, and takes turns among clients: its
    0.6 for each of ten classes is an `alpha` of 6.

    Args:
      labels: `[N]` integers.
      clients: the number of clients, from 1 to N.
      alpha: the concentration, above 0, of all classes together. Near 0 a client has one class;
        towards infinity all have the same mixture.
      seed: of the mixtures, and of the examples.

    Returns:
      The partition.

    Raises:
      ConfigError: if a setting is out of range.
    """
    return _by_counts(mixed, labels, clients, alpha, 1, 1, seed)


def shards(labels: np.ndarray, clients: int, *, shards_per_client: int = 2, seed: int) -> Partition:
    """Sorts the examples by class, cuts them into equal shards, and deals these out.

    The "pathological" partition of McMahan et al., "Communication-Efficient Learning of Deep
    Networks from Decentralized Data" (AISTATS 2017, arXiv 1602.05629, section 3). A client sees
    `shards_per_client` classes where shards do not straddle classes, and otherwise a few more. So
    are the non-IID experiments of HeteroFL and FedRolex on CIFAR-10, with 2 classes a client.

    Args:
      labels: `[N]` integers.
      clients: the number of clients, from 1 to N.
      shards_per_client: how many shards each client gets, at least 1.
      seed: of the order within each class, and of who gets which shard.

    Returns:
      The partition.

    Raises:
      ConfigError: if a setting is out of range, or there are more shards than examples.
    """
    _check_counts(labels, clients)
    check_integer("shards_per_client", shards_per_client, least=1)
    total = int(clients) * int(shards_per_client)  # which may be NumPy's, and overflow
    if total > len(labels):
        raise ConfigError(
            f"{clients} clients with {shards_per_client} shards each need {total} examples; "
            f"there are {len(labels)}."
        )
    rng = generator(seed, "partition")
    order = rng.permutation(len(labels))
    pieces = np.array_split(order[np.argsort(labels[order], kind="stable")], total)
    owned = rng.permutation(total).reshape(clients, shards_per_client)
    return _sorted([np.concatenate([pieces[shard] for shard in row]) for row in owned])


def quantity_skew(
    labels: np.ndarray,
    clients: int,
    *,
    alpha: float,
    min_examples: int = 1,
    max_tries: int = 1000,
    seed: int,
) -> Partition:
    """Gives the clients the same mixture of classes, but different numbers of examples.

    The clients' shares of all examples are drawn from a symmetric Dirichlet distribution: the
    "quantity skew" of Li et al. (arXiv 2102.02079, section IV-C). Shares are drawn anew until
    every client has `min_examples`.

    Args:
      labels: `[N]` integers.
      clients: the number of clients, from 1 to N.
      alpha: the concentration, above 0. Near 0 one client has nearly everything; towards infinity
        all have the same.
      min_examples: the fewest examples of a client, at least 1.
      max_tries: how often the shares are drawn before giving up.
      seed: of the shares, and of which examples they consist of.

    Returns:
      The partition.

    Raises:
      ConfigError: if a setting is out of range, or no try gave every client `min_examples`.
    """
    _check_counts(labels, clients, min_examples)
    rng = generator(seed, "partition")
    totals = np.array([len(labels)])
    (counts,) = draw_counts(shared, totals, clients, alpha, min_examples, max_tries, rng)
    return _sorted(np.split(rng.permutation(len(labels)), np.cumsum(counts)[:-1]))


def class_counts(labels: np.ndarray, parts: Sequence[np.ndarray], num_classes: int) -> np.ndarray:
    """Counts the examples of each class that each client has.

    Args:
      labels: `[N]` integers in [0, num_classes).
      parts: the partition.
      num_classes: the number of classes.

    Returns:
      `[clients, num_classes]` int64.

    Raises:
      DataError: if a label is out of range.
    """
    if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
        raise DataError(
            f"labels go from {labels.min()} to {labels.max()}; expected [0, {num_classes})."
        )
    return np.stack([np.bincount(labels[part], minlength=num_classes) for part in parts])


def check(
    parts: Sequence[Any],
    num_examples: int,
    *,
    allow_unused: bool = False,
    allow_overlap: bool = False,
) -> Partition:
    """Checks that a partition gives every example to exactly one client, and each client some.

    Args:
      parts: the partition, indices as anything that NumPy makes an integer array of.
      num_examples: N; the indices are in [0, N).
      allow_unused: examples may be left out.
      allow_overlap: an example may belong to several clients (or several times to one).

    Returns:
      The partition as arrays.

    Raises:
      ConfigError: naming the first client or example for which that does not hold.
    """
    if not isinstance(parts, np.ndarray):
        parts = check_sequence("partition", parts)
    try:
        parts = tuple(np.asarray(part) for part in parts)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"a client's indices must be an array of integers: {error}.") from error
    if not parts:
        raise ConfigError("the partition is empty: it names no clients.")
    for client, part in enumerate(parts):
        if part.size == 0:
            raise ConfigError(f"client {client} has no examples.")
        if part.ndim != 1 or not np.issubdtype(part.dtype, np.integer):
            raise ConfigError(
                f"the indices of client {client} have shape {part.shape} and type {part.dtype}; "
                "expected [n] integers."
            )
        outside = part[(part < 0) | (part >= num_examples)]
        if outside.size:
            raise ConfigError(
                f"client {client} has example {outside[0]}; expected [0, {num_examples})."
            )
    owners = np.zeros(num_examples, np.int64)
    for part in parts:
        np.add.at(owners, part, 1)  # unlike `+=`, counts a repeated index each time
    for title, wrong, allowed in (
        ("allow_unused", owners < 1, allow_unused),
        ("allow_overlap", owners > 1, allow_overlap),
    ):
        if wrong.any() and not allowed:
            first = int(np.flatnonzero(wrong)[0])
            raise ConfigError(
                f"example {first} is dealt out {owners[first]} times; expected once "
                f"({wrong.sum()} such examples; {title} lets them be)."
            )
    return parts


def _check_counts(labels: np.ndarray, clients: int, min_examples: int = 1) -> None:
    if not isinstance(labels, np.ndarray):
        raise DataError(f"labels must be a NumPy array, got {shown(labels)}.")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"labels have shape {labels.shape} and type {labels.dtype}; expected [N] integers."
        )
    check_integer("clients", clients, least=1)
    if not 1 <= clients <= len(labels):
        raise ConfigError(f"clients is {clients}; expected 1 to {len(labels)}, one per example.")
    check_integer("min_examples", min_examples, least=1)
    least = int(min_examples) * int(clients)  # which may be NumPy's, and overflow
    if least > len(labels):
        raise ConfigError(
            f"{clients} clients with min_examples {min_examples} need {least} "
            f"examples; there are {len(labels)}."
        )


def _by_counts(
    draw: Draw,
    labels: np.ndarray,
    clients: int,
    alpha: float,
    min_examples: int,
    max_tries: int,
    seed: int,
) -> Partition:
    """Draws how many examples of each class each client gets; which ones, is random."""
    _check_counts(labels, clients, min_examples)
    rng = generator(seed, "partition")
    classes, totals = np.unique(labels, return_counts=True)
    counts = draw_counts(draw, totals, clients, alpha, min_examples, max_tries, rng)
    # [classes] lists of [clients] arrays
    dealt = [
        np.split(rng.permutation(np.flatnonzero(labels == label)), np.cumsum(row)[:-1])
        for label, row in zip(classes, counts, strict=True)
    ]
    return _sorted([np.concatenate(parts) for parts in zip(*dealt, strict=True)])


def _sorted(parts: Sequence[np.ndarray]) -> Partition:
    return tuple(np.sort(part).astype(np.int64) for part in parts)
