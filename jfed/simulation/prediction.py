"""Using a trained model: predictions."""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Shaped

from jfed.data.preprocessing import ModelInputs
from jfed.errors import ConfigError, DataError, check_integer, one_of
from jfed.models.losses import tested_logits
from jfed.models.model import Params, Statistics
from jfed.tiers import Iterations, Tier, Tiers


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
        if images.dtype.kind == "f" and images.max(initial=0) <= 1 < np.min(self.inputs.mean):
            warnings.warn(
                f"images are {images.dtype} of at most 1, but those that the model was trained on "
                f"have the mean {np.min(self.inputs.mean):.3g}; give it the same units",
                stacklevel=4,
            )
        check_integer("batch_size", batch_size, least=1)
        size = min(batch_size, max(len(images), 1))
        params, norms = tier.extract(self.variables, 0), self.norms.get(tier.name)
        classify, found = _classifier(tier), []
        for start in range(0, len(images), size):
            batch = self.inputs.standardise(images[start : start + size])
            padded = np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), 0)])
            found.append(np.asarray(classify(params, norms, padded))[: len(batch)])
        return np.concatenate(found) if found else np.zeros((0, len(self.inputs.class_names)))


@functools.lru_cache(maxsize=16)
def _classifier(tier: Tier) -> Callable[..., Array]:
    """The jitted `(params, statistics, images) -> probabilities` of a tier."""
    model = tier.bound()

    def classify(params: Params, norms: Statistics | None, images: Array) -> Array:
        return jax.nn.softmax(tested_logits(model, params, images, norms), -1)

    return jax.jit(classify)
