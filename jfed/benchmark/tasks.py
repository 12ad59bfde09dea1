"""The work that contenders are timed on: a federation with its data, weights and order of examples.

Everything follows from the task and its seed, so that each process makes the same for itself.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jfed import tiers as tiers_lib
from jfed.algorithms.clients import ClientConfig
from jfed.data import Dataset, Split
from jfed.engine.devices import EngineConfig
from jfed.engine.packing import Work
from jfed.models.flops import forward_flops
from jfed.models.model import Model, Params, initialise
from jfed.models.ode_nets import ODENetConfig
from jfed.models.small_cnn import cnn
from jfed.seeds import generator
from jfed.simulation.evaluation import EvaluationConfig
from jfed.simulation.federation import Federation
from jfed.simulation.population import Population, make_population
from jfed.tiers import Tiers

CLASSES = 10
ROUNDS = 1_000_000  # more than are ever run: a federation evaluates its last round


class RoundWork(NamedTuple):
    """What one round amounts to, the same in every round.

    Attributes:
      clients: that train.
      images: that they train on, each as often as it is used.
      flops: of the forward passes and both gradients, counted as three forward passes of ordinary
        convolutions, whatever a contender computes instead.
    """

    clients: int
    images: int
    flops: int


@dataclasses.dataclass(frozen=True)
class Task:
    """A federation of equal clients with random images.

    Attributes:
      users: clients of the population.
      images: of each user, a multiple of `batch_size`.
      cohort: users that train in a round, once over their images. All of them where there are
        tiers, so that every round is as much work.
      size: height and width of the images, of 3 channels, uint8.
      batch_size: images in a batch.
      learning_rate: of the clients' SGD.
      network: an ODENet whose clients run `iterations`; None for the small CNN.
      iterations: one entry a tier.
      dtype: what the network computes in, "float32" or "bfloat16".
      conv: the convolutions' form in jfed.
      seed: of everything random.
    """

    users: int
    images: int
    cohort: int
    size: int
    batch_size: int
    learning_rate: float = 0.1
    network: ODENetConfig | None = None
    iterations: tuple[int, ...] = ()
    dtype: str = "float32"
    conv: str = "auto"
    seed: int = 0

    @property
    def client(self) -> ClientConfig:
        """How every client trains."""
        return ClientConfig(batch_size=self.batch_size, learning_rate=self.learning_rate)

    def tiers(self, *, conv: str | None = None, unroll: bool | None = None) -> Tiers:
        """The tiers, with another form of convolutions or of the loop over iterations if given."""
        form = self.conv if conv is None else conv
        if self.network is None:
            return tiers_lib.single(_cast(cnn(size=self.size, form=form), self.dtype))
        network = dataclasses.replace(self.network, conv=form, dtype=self.dtype)
        if unroll is not None:
            network = dataclasses.replace(network, unroll=unroll)
        return tiers_lib.ode(network, self.iterations)

    @functools.cached_property
    def data(self) -> Dataset:
        """Random images and labels; the test split is never used."""
        rng = generator(self.seed, "benchmark data")
        count = self.users * self.images
        images = rng.integers(0, 256, (count, self.size, self.size, 3), dtype=np.uint8)
        labels = rng.integers(0, CLASSES, count, dtype=np.int32)
        test = Split(images[:1], labels[:1])
        return Dataset("random", Split(images, labels), test, tuple(map(str, range(CLASSES))))

    @property
    def partition(self) -> tuple[np.ndarray, ...]:
        """Each user's examples."""
        return tuple(np.arange(self.users * self.images).reshape(self.users, self.images))

    @functools.cached_property
    def population(self) -> Population:
        """Who trains in which round, and in which order of examples."""
        return make_population(
            self.partition,
            tiers=max(1, len(self.iterations)),
            shares=None,
            cohort=self.cohort,
            draw_tiers=0,
            client=self.client,
            seed=self.seed,
        )

    def plan(self, number: int) -> list[list[Work]]:
        """What each client of round `number` does, by tier."""
        return self.population.work(number, self.population.sample(number))

    def start(self) -> Params:
        """The weights before the first round, those of `federation`."""
        init = self.tiers(conv="xla").init
        return initialise(init, jax.random.fold_in(jax.random.key(self.seed), 0))

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each channel, in units of 0 to 255."""
        pixels, values = self.data.train.images, np.arange(256)
        share = np.stack([np.bincount(pixels[..., c].ravel(), minlength=256) for c in range(3)])
        share = share / share[0].sum()
        mean = share @ values
        return mean, np.sqrt(share @ np.square(values) - np.square(mean))

    def federation(self, engine: EngineConfig) -> Federation:
        """The task as jfed runs it."""
        return Federation(
            self.data,
            self.partition,
            self.tiers(),
            rounds=ROUNDS,
            cohort=self.cohort,
            client=self.client,
            evaluation=EvaluationConfig(every=0, batch_size=1, calibration_examples=1),
            engine=engine,
            seed=self.seed,
        )

    def work(self) -> RoundWork:
        """What a round amounts to."""
        params, flops = self.start(), 0
        members = self.tiers(conv="xla", unroll=False).members
        for tier, work in zip(members, self.plan(0), strict=True):
            each = forward_flops(tier.bound(), params, (self.size, self.size, 3))
            flops += 3 * each * self.images * len(work)
        return RoundWork(self.cohort, self.cohort * self.images, flops)


def _cast(model: Model, dtype: str) -> Model:
    """The model computing in `dtype`; parameters and logits stay float32."""
    if dtype == "float32":
        return model

    def apply(params: Params, images: Float[Array, "B H W C"]) -> Float[Array, "B classes"]:
        low = jax.tree.map(lambda x: x.astype(dtype), params)
        return model.apply(low, images.astype(dtype)).astype(jnp.float32)

    return Model(model.init, apply)


def flat(params: Params) -> dict[str, np.ndarray]:
    """Parameters by name, such as `functions.0.conv1.kernel`, as NumPy arrays."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
