"""Using a trained model: predictions, and tests on further data."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jfed.data import Split
from jfed.data.preprocessing import ModelInputs
from jfed.errors import ConfigError, DataError, check_integer, one_of
from jfed.models.losses import tested_logits
from jfed.models.model import Model, Params, Statistics
from jfed.tiers import Iterations, Tier, Tiers

_BINS = 15  # of the calibration error, as in Guo et al.


class Test(NamedTuple):
    """How a model does on a data set.

    Attributes:
      accuracy: from 0 to 1.
      loss: cross-entropy, in nats an example.
      confusion: `[classes, classes]` how many examples of each class (rows) are taken for each.
      calibration_error: from 0 to 1: over 15 bins of the largest probability, the mean distance of
        that from the accuracy, by examples (Guo et al. 2017, arXiv 1706.04599, equation 3).
    """

    accuracy: float
    loss: float
    confusion: Int[np.ndarray, "classes classes"]
    calibration_error: float

    @property
    def balanced_accuracy(self) -> float:
        """The mean over the classes that have examples of the share that is right, from 0 to 1."""
        counts = self.confusion.sum(1)
        return float((np.diag(self.confusion)[counts > 0] / counts[counts > 0]).mean())


class Predictor(NamedTuple):
    """Everything that a prediction needs.

    Attributes:
      tiers: of the run.
      tested: its evaluated tiers.
      variables: the global ones.
      norms: statistics of norms by the name of a tested tier; None for models without.
      inputs: what the models take.
    """

    tiers: Tiers
    tested: tuple[Tier, ...]
    variables: Params
    norms: Mapping[str, Statistics | None]
    inputs: ModelInputs

    def choose(self, tier: str | None, iterations: Iterations | None, solver: str | None) -> Tier:
        """A tested tier by its name, or by iterations and solver; by default the last trained one.

        Raises:
          ConfigError: there is no such tier, or it was not tested, so that no norms are measured.
        """
        if tier is not None and (iterations is not None or solver is not None):
            raise ConfigError(f"give a tier or iterations, got tier {tier!r} and both.")
        if iterations is not None or solver is not None:
            if self.tiers.at is None:
                raise ConfigError(
                    f"tiers of {self.tiers.kind} have no iterations, got {iterations!r}."
                )
            deepest = self.tiers.members[-1].iterations
            counts = (deepest if iterations is None else iterations,)
            tier = self.tiers.at(counts, solver)[0].name
        names = tuple(found.name for found in self.tested)
        name = one_of("tested tier", tier or self.tiers.members[-1].name, names)
        return self.tested[names.index(name)]

    def probabilities(
        self, tier: Tier, images: Shaped[np.ndarray, "N ..."], batch_size: int
    ) -> Float[np.ndarray, "N classes"]:
        """Of each class, float32."""
        images = np.asarray(images)
        if images.shape[1:] != tuple(self.inputs.shape) or images.dtype.kind not in "uif":
            raise DataError(
                f"images have shape {images.shape} and type {images.dtype}; the model takes "
                f"[N, {', '.join(map(str, self.inputs.shape))}] numbers."
            )
        check_integer("batch_size", batch_size, least=1)
        size = min(batch_size, max(len(images), 1))
        params, norms = tier.extract(self.variables, 0), self.norms.get(tier.name)
        classify, found = _classifier(tier.bound()), []
        for start in range(0, len(images), size):
            batch = self.inputs.standardise(images[start : start + size])
            padded = np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), 0)])
            found.append(np.asarray(classify(params, norms, padded))[: len(batch)])
        return np.concatenate(found) if found else np.zeros((0, len(self.inputs.class_names)))


@functools.lru_cache(maxsize=16)
def _classifier(model: Model) -> Callable[..., Array]:
    """The jitted `(params, statistics, images) -> probabilities` of a model."""

    def classify(params: Params, norms: Statistics | None, images: Array) -> Array:
        return jax.nn.softmax(tested_logits(model, params, images, norms), -1)

    return jax.jit(classify)


def score(probabilities: Float[np.ndarray, "N classes"], split: Split) -> Test:
    """How predictions of the images of a split agree with its labels."""
    labels, classes = split.labels, probabilities.shape[1]
    if labels.min() < 0 or labels.max() >= classes:
        raise DataError(
            f"labels go from {labels.min()} to {labels.max()}; expected [0, {classes})."
        )
    guesses = probabilities.argmax(1)
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (labels, guesses), 1)
    right = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    loss = -np.log(np.maximum(right, np.finfo(np.float32).tiny)).mean()
    sure, hits = probabilities.max(1).astype(np.float64), guesses == labels
    bins = np.minimum((sure * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(bins, weights=hits - sure, minlength=_BINS)
    return Test(float(hits.mean()), float(loss), confusion, float(np.abs(gaps).sum() / len(labels)))
