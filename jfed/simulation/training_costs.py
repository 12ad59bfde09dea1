"""What training costs a client of each tier: operations and memory, counted without compiling."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jfed.engine.devices import useful_lanes
from jfed.engine.packing import client_examples
from jfed.models.flops import training_flops
from jfed.models.losses import batch_shapes
from jfed.models.model import Params
from jfed.models.residuals import residual_bytes
from jfed.simulation.exchanges import Exchange
from jfed.simulation.population import Population
from jfed.tiers.communication import tree_bytes
from jfed.tiers.tier import Tier


class TrainingCost(NamedTuple):
    """Of a client of a tier.

    Attributes:
      flops: in a round, the mean over the tier's clients, each doing all of its steps.
      peak_bytes: see `TrainingCosts.peak_bytes`.
    """

    flops: float
    peak_bytes: int


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingCosts:
    """Of the clients of all tiers, which are told by their numbers.

    Attributes:
      tiers: that clients train.
      like: global variables; only shapes and dtypes matter.
      exchanges: of the algorithm, by tier.
      image_shape: `(H, W, C)`.
      batch_size: of a full batch.
    """

    tiers: Sequence[Tier]
    like: Params
    exchanges: Mapping[int, Exchange]
    image_shape: tuple[int, ...]
    batch_size: int

    @functools.cached_property
    def flops(self) -> list[int]:
        """Of training on one example, by tier: a gradient for each call of the loss in a step."""
        return [
            self.exchanges[i].gradients
            * training_flops(tier.bound(), tier.shapes(self.like), self.image_shape)
            for i, tier in enumerate(self.tiers)
        ]

    def peak_bytes(self, tier: int) -> int:
        """The most memory that a client's training needs at a time, in bytes.

        It is that of what the server sent, of the client's local state (parameters, optimizer, and
        what the algorithm keeps), a gradient, a batch as float32, and what backpropagation keeps of
        it, see `residual_bytes`. Not counted: the program, buffers of single operations (of a
        convolution's form, of a step that is computed again), the client's data set, the runtime,
        and the tier's numbers, which on a client's device need not be data. XLA's programs for CPUs
        take 0.7 to 2 times as much: they keep less, and their convolutions need room.
        """
        own, exchange = self.tiers[tier], self.exchanges[tier]
        shapes, size = own.shapes(self.like), self.batch_size
        batch = batch_shapes(size, self.image_shape)
        held = tree_bytes((exchange.sent, exchange.local, shapes, batch))
        return held + residual_bytes(own.bound(), shapes, self.image_shape, size)

    def useful_lanes(self, device: jax.Device) -> int:
        """How many lanes of the most expensive tier keep an accelerator busy."""
        most = int(np.argmax(self.flops))
        step = self.flops[most] * self.batch_size
        return useful_lanes(device, step, lambda: self.peak_bytes(most))

    def of_clients(self, population: Population) -> dict[str, TrainingCost]:
        """What training costs a client, by the name of its tier; takes a moment for each."""
        found = {}
        for i, tier in enumerate(self.tiers):
            own = np.flatnonzero(population.tier == i).tolist()
            sizes = [len(population.partition[client]) for client in own]
            examples = float(np.mean([client_examples(n, population.client) for n in sizes]))
            found[tier.name] = TrainingCost(self.flops[i] * examples, self.peak_bytes(i))
        return found
