"""How probabilities of classes agree with labels, exactly, in NumPy.

Means over classes are over those that have examples: a class that the test set lacks has neither a
recall nor a rank among others, and an example that is taken for it counts against its own class.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jfed.data import Split
from jfed.errors import DataError

Probabilities = Float[np.ndarray, "N classes"]
Labels = Int[np.ndarray, " N"]
_BINS = 15  # of the calibration error, as in Guo et al.


def confusion_matrix(
    probabilities: Probabilities, labels: Labels
) -> Int[np.ndarray, "classes classes"]:
    """How many examples of each class (rows) are taken for each."""
    confusion = np.zeros((probabilities.shape[1],) * 2, np.int64)
    np.add.at(confusion, (labels, probabilities.argmax(1)), 1)
    return confusion


def balanced_accuracy(probabilities: Probabilities, labels: Labels) -> float:
    """The mean over classes of the share of their examples that is right."""
    confusion = confusion_matrix(probabilities, labels)
    counts = confusion.sum(1)
    return float((np.diag(confusion)[counts > 0] / counts[counts > 0]).mean())


def macro_f1(probabilities: Probabilities, labels: Labels) -> float:
    """The mean over classes of F1, 2 hits / (examples + guesses) of a class."""
    confusion = confusion_matrix(probabilities, labels)
    counts, guesses = confusion.sum(1), confusion.sum(0)
    there = counts > 0
    return float((2 * np.diag(confusion)[there] / (counts + guesses)[there]).mean())


def macro_auc(probabilities: Probabilities, labels: Labels) -> float:
    """The mean over classes of the area under the curve of each against the rest.

    That is how often an example of the class has a larger probability of it than one of another
    class, ties counting half (Mann and Whitney). nan where all examples are of one class, or a
    probability is none.
    """
    there = np.unique(labels)
    if len(there) < 2 or not np.isfinite(probabilities).all():
        return float("nan")
    areas = []
    for k in there:
        _, place, ties = np.unique(probabilities[:, k], return_inverse=True, return_counts=True)
        ranks = (np.cumsum(ties) - (ties - 1) / 2)[place]  # from 1; of ties their mean
        mine = labels == k
        count = int(mine.sum())
        above = ranks[mine].sum() - count * (count + 1) / 2
        areas.append(above / (count * (len(labels) - count)))
    return float(np.mean(areas))


def calibration_error(probabilities: Probabilities, labels: Labels) -> float:
    """Over 15 bins of the largest probability the mean distance of that from the accuracy.

    By examples (Guo et al. 2017, arXiv 1706.04599, equation 3). nan where a probability is none.
    """
    if not np.isfinite(probabilities).all():
        return float("nan")
    sure, hits = probabilities.max(1).astype(np.float64), probabilities.argmax(1) == labels
    bins = np.minimum((sure * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(bins, weights=hits - sure, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(labels))


class Metric(NamedTuple):
    """A number from 0 to 1: how tables call it, and how it is computed."""

    title: str
    of: Callable[[Probabilities, Labels], float]


METRICS = {
    "balanced-accuracy": Metric("balanced accuracy", balanced_accuracy),
    "f1": Metric("F1", macro_f1),
    "auc": Metric("AUC", macro_auc),
    "ece": Metric("ECE", calibration_error),
}


def column(metric: str) -> str:
    """A metric's name in columns and summaries."""
    return metric.replace("-", "_")


class Test(NamedTuple):
    """How a model does on a data set; shares are from 0 to 1.

    Attributes:
      accuracy: share that is right.
      loss: cross-entropy, in nats an example.
      confusion: `[classes, classes]` how many examples of each class (rows) are taken for each.
      balanced_accuracy: see the function of this name.
      f1: see `macro_f1`.
      auc: see `macro_auc`.
      calibration_error: see the function of this name.
    """

    accuracy: float
    loss: float
    confusion: Int[np.ndarray, "classes classes"]
    balanced_accuracy: float
    f1: float
    auc: float
    calibration_error: float


def score(probabilities: Probabilities, split: Split) -> Test:
    """How predictions of the images of a split agree with its labels."""
    labels, classes = split.labels, probabilities.shape[1]
    if labels.min() < 0 or labels.max() >= classes:
        raise DataError(
            f"labels go from {labels.min()} to {labels.max()}; expected [0, {classes})."
        )
    right = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return Test(
        accuracy=float((probabilities.argmax(1) == labels).mean()),
        loss=float(-np.log(np.maximum(right, np.finfo(np.float32).tiny)).mean()),
        confusion=confusion_matrix(probabilities, labels),
        balanced_accuracy=balanced_accuracy(probabilities, labels),
        f1=macro_f1(probabilities, labels),
        auc=macro_auc(probabilities, labels),
        calibration_error=calibration_error(probabilities, labels),
    )
