"""The contenders written in JAX: jfed itself, and two ways to do without it."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jfed.benchmark.tasks import Task, flat
from jfed.engine.devices import EngineConfig
from jfed.engine.packing import Work
from jfed.models.model import Params
from jfed.tiers import Tier


class JfedRunner:
    """jfed's own engine."""

    def __init__(self, task: Task, engine: EngineConfig) -> None:
        self._federation = task.federation(engine)
        self._federation.compile()
        self._state = self._federation.start

    def round(self, number: int) -> float:
        """Does a round and waits for it; returns its mean training loss."""
        self._state, under_way = self._federation.round(self._state, number)
        jax.block_until_ready(self._state)
        return under_way.fetch(None, time.perf_counter()).train_loss

    def variables(self) -> dict[str, np.ndarray]:
        """The global weights by name."""
        return flat(self._state.server.variables)

    def host_seconds(self, number: int) -> float:
        """Seconds of a round's work on the host: sampling, packing, sending the schedule."""
        return self._federation.host_seconds(number)


class _Rival:
    """What the two others share: data on the device, and the weights of all clients' mean."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.images = jnp.asarray(task.data.train.images)
        self.labels = jnp.asarray(task.data.train.labels)
        self.params = task.start()
        # What no loop of XLA's slows down: its own convolution, iterations traced one by one.
        self.tiers = task.tiers(conv="xla", unroll=True).members

    def variables(self) -> dict[str, np.ndarray]:
        """The global weights by name."""
        return flat(self.params)


class LoopRunner(_Rival):
    """A Python loop over clients and batches around one jitted step."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._steps = [jax.jit(sgd_step(task, tier)) for tier in self.tiers]
        self._add = jax.jit(
            lambda total, params, server, weight: jax.tree.map(
                lambda t, p, s: t + weight * (p - s), total, params, server
            )
        )

    def round(self, number: int) -> float:
        """Does a round and waits for it; returns its mean training loss."""
        total, losses = jax.tree.map(jnp.zeros_like, self.params), []
        work = self.task.plan(number)
        whole = sum(item.weight for tier in work for item in tier)
        for step, items in zip(self._steps, work, strict=True):
            for item in items:
                params = self.params
                for batch in item.batches:
                    params, loss = step(params, self.images, self.labels, batch)
                    losses.append(loss)
                total = self._add(total, params, self.params, np.float32(item.weight / whole))
        self.params = self._add(self.params, total, jax.tree.map(jnp.zeros_like, total), 1.0)
        jax.block_until_ready(self.params)
        return float(np.mean(jax.device_get(losses)))


class VmapRunner(_Rival):
    """All clients of a tier at once: `vmap` over clients of a scan over batches."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._train = [jax.jit(vmapped(sgd_step(task, tier))) for tier in self.tiers]

    def round(self, number: int) -> float:
        """Does a round and waits for it; returns its mean training loss."""
        work = self.task.plan(number)
        whole = sum(item.weight for tier in work for item in tier)
        parts, losses = [], []
        for train, items in zip(self._train, work, strict=True):
            batches, weight = stacked(items)
            part, loss = train(self.params, self.images, self.labels, batches, weight / whole)
            parts.append(part)
            losses.append(loss)
        self.params = jax.tree.map(lambda *part: sum(part[1:], start=part[0]), *parts)
        jax.block_until_ready(self.params)
        return float(np.mean(jax.device_get(losses)))


def sgd_step(task: Task, tier: Tier) -> Callable[..., tuple[Params, Float[Array, ""]]]:
    """A step of SGD, `step(params, images, labels, examples) -> (params, loss)`, no padding."""
    loss_of = batch_loss(task, tier)

    def step(params: Params, images: Array, labels: Array, examples: Array) -> Any:
        loss, gradient = jax.value_and_grad(loss_of)(params, images[examples], labels[examples])
        new = jax.tree.map(lambda p, g: p - task.learning_rate * g, params, gradient)
        return new, loss

    return step


def batch_loss(task: Task, tier: Tier) -> Callable[..., Float[Array, ""]]:
    """Mean cross-entropy of a batch, `loss(params, images, labels)` with uint8 images."""
    mean, std = (moment[None, None, None].astype(np.float32) for moment in task.moments())

    def loss(params: Params, images: Array, labels: Array) -> Float[Array, ""]:
        log = jax.nn.log_softmax(
            tier.bound().apply(params, (images.astype(jnp.float32) - mean) / std)
        )
        return -jnp.take_along_axis(log, labels[:, None], axis=1).mean()

    return loss


def vmapped(step: Callable) -> Callable:
    """Trains clients `[K, steps, B]` at once; returns their weighted sum and the mean loss."""

    def train(params: Params, images: Array, labels: Array, batches: Array, share: Array) -> Any:
        def one(batches: Array) -> Any:
            return jax.lax.scan(lambda p, b: step(p, images, labels, b), params, batches)

        trained, losses = jax.vmap(one)(batches)
        return jax.tree.map(lambda p: jnp.tensordot(share, p, axes=1), trained), losses.mean()

    return train


def stacked(items: list[Work]) -> tuple[np.ndarray, np.ndarray]:
    """Equal clients' batches `[K, steps, B]` and weights `[K]`."""
    weights = np.asarray([item.weight for item in items], np.float32)
    return np.stack([item.batches for item in items]), weights
