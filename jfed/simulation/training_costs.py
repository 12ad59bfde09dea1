"""What training costs a client of each tier: operations and memory, counted without compiling."""

from typing import NamedTuple

from jfed.models.losses import batch_shapes
from jfed.models.model import Params
from jfed.models.residuals import residual_bytes
from jfed.simulation.checks import Exchange
from jfed.tiers.communication import tree_bytes
from jfed.tiers.tier import Tier


class TrainingCost(NamedTuple):
    """Of a client of a tier.

    Attributes:
      flops: in a round, the mean over the tier's clients, each doing all of its steps.
      peak_bytes: see `peak_bytes`.
    """

    flops: float
    peak_bytes: int


def peak_bytes(
    tier: Tier, shapes: Params, exchange: Exchange, image_shape: tuple[int, ...], batch_size: int
) -> int:
    """The most memory that a client's training needs at a time, in bytes.

    It is that of what the server sent, of the client's local state (parameters, optimizer, and what
    the algorithm keeps), a gradient, a batch as float32, and what backpropagation keeps of it, see
    `residual_bytes`. Not counted: the program, buffers of single operations (of a convolution's
    form, of a step that is computed again), the client's data set, the runtime. XLA's programs for
    CPUs take 0.7 to 2 times as much: they keep less, and their convolutions need room.

    Args:
      tier: of the client, with its own numbers; on a client's device they need not be data.
      shapes: of the tier's variables.
      exchange: of the algorithm.
      image_shape: `(H, W, C)`.
      batch_size: of a full batch.
    """
    held = (exchange.sent, exchange.local, shapes, batch_shapes(batch_size, image_shape))
    return tree_bytes(held) + residual_bytes(tier.bound(), shapes, image_shape, batch_size)
