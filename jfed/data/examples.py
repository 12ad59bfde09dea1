"""A user's own examples as they were read, made into a data set."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jfed.data.splits import Dataset, Split
from jfed.errors import ConfigError, DataError, check_number
from jfed.seeds import generator


class Labelled(NamedTuple):
    """Examples as read; `clients` are names or numbers `[N]`, or None where they are not told."""

    images: np.ndarray
    labels: np.ndarray
    clients: np.ndarray | None = None


def check_test_share(share: Any) -> None:
    """ConfigError unless it is a number between 0 and 1."""
    if not 0 < check_number("test_share", share) < 1:
        raise ConfigError(f"test_share must be between 0 and 1, got {share!r}.")


def assemble(
    name: str,
    train: Labelled,
    test: Labelled | None,
    class_names: Sequence[str],
    *,
    test_share: float | None,
    seed: int,
) -> Dataset:
    """The data set of these examples.

    Args:
      name: what messages and reports call it.
      train: dealt out to the clients.
      test: of the global model; None: a share of each class of `train`.
      class_names: by label.
      test_share: given if and only if `test` is not.
      seed: of the share's choice.

    Raises:
      DataError: a class is tested but not trained, or a label has no name.
      ConfigError: a share is missing, or given where there are test examples.
    """
    if (test is None) != (test_share is not None):
        what = "no test examples: set test_share" if test is None else "test examples"
        raise ConfigError(f"{name!r} has {what}, got test_share {test_share!r}.")
    if test is None:
        check_test_share(test_share)
        assert test_share is not None
        train, test = _divide(train, class_names, test_share, seed)
    _check_classes(train.labels, test.labels, class_names)
    clients, client_names = None, tuple[str, ...]()
    if train.clients is not None:
        found, clients = np.unique(train.clients, return_inverse=True)
        client_names = tuple(map(str, found))
    splits = Split(train.images, train.labels), Split(test.images, test.labels)
    return Dataset(name, *splits, tuple(class_names), clients, client_names)


def _rows(split: Split, rows: np.ndarray) -> Split:
    return Split(split.images[rows], split.labels[rows])


def subset(dataset: Dataset, train: np.ndarray, test: np.ndarray) -> Dataset:
    """The data set with some of its examples; clients that are left without one are gone."""
    clients, names = None, tuple[str, ...]()
    if dataset.clients is not None:
        there, clients = np.unique(dataset.clients[train], return_inverse=True)
        names = tuple(dataset.client_names[i] for i in there)
    return Dataset(
        dataset.name,
        _rows(dataset.train, train),
        _rows(dataset.test, test),
        dataset.class_names,
        clients,
        names,
    )


def _divide(
    train: Labelled, names: Sequence[str], share: float, seed: int
) -> tuple[Labelled, Labelled]:
    """Keeps a share of each class for the test, at least one example of each for training."""
    rng, chosen = generator(seed, "test share"), []
    for label in range(len(names)):
        rows = rng.permutation(np.flatnonzero(train.labels == label))
        chosen += rows[: min(round(share * len(rows)), len(rows) - 1)].tolist()
    if not chosen:
        raise ConfigError(f"test_share {share!r} keeps none of {len(train.labels)} examples.")
    is_test = np.zeros(len(train.labels), bool)
    is_test[chosen] = True
    train, test = (
        Labelled(*(None if column is None else column[rows] for column in train))  # type: ignore[arg-type]
        for rows in (~is_test, is_test)
    )
    return train, test


def _check_classes(train: np.ndarray, test: np.ndarray, names: Sequence[str]) -> None:
    """DataError for a class that is tested but not trained."""
    for label in sorted(set(test.tolist()) - set(train.tolist())):
        name = repr(names[label]) if 0 <= label < len(names) else "without a name"
        raise DataError(f"label {label} ({name}) is in the test, but not in training.")
