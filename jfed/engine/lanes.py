"""The engine: one compiled program per tier trains all of its clients of a round.

Clients are packed on lanes, and lanes are spread over devices. A lane is one loop over batches that
trains client after client without pause: where a client starts, weights and optimizer are reset to
the server's; where it finishes, its weighted update is added to the lane's sum. So clients of
different sizes cost no padding, and memory does not grow with the number of clients. An aggregator
that needs every update has them stacked instead, and memory does grow.

An update that is not finite is left out, and so is what its client measured.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jfed.data.preprocessing import Preprocess, gather
from jfed.engine.client import ClientConfig, make_optimizer, make_step
from jfed.engine.devices import AXIS, EVERYWHERE, SPREAD, make_mesh, put
from jfed.engine.faults import FaultConfig, corrupt
from jfed.engine.merging import Updates, add, clip_update, nothing
from jfed.engine.packing import Schedule, Steps
from jfed.errors import check_integer, one_of
from jfed.models.losses import Metrics
from jfed.models.model import Params
from jfed.tiers import Tier

MAPPINGS = ("auto", "vmap", "map", "unroll")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How clients are spread over hardware. Changes the order of floating-point sums, no more.

    What is picked for None and "auto" was measured on a CPU by `jfed benchmark`
    (experiments/results/benchmark_scaling_cpu.json); for accelerators it is a guess.

    Attributes:
      devices: how many; None takes all that JAX sees. On a CPU one for each core is as fast or
        faster: `jax.config.update("jax_num_cpu_devices", cores)` before anything else, as
        `jfed run` does.
      lanes: on each device. More lanes are more clients at the same time, and more memory. None:
        one on a CPU, up to 8 on an accelerator.
      mapping: how a device runs its lanes: "vmap" all at once, "map" or "unroll" one after another;
        "auto": "map" on a CPU, "vmap" on an accelerator.
    """

    devices: int | None = None
    lanes: int | None = None
    mapping: str = "auto"

    def __post_init__(self) -> None:
        for name in ("devices", "lanes"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), least=1)
        one_of("mapping", self.mapping, MAPPINGS)

    def resolve(self, clients: int, backend: str | None = None) -> "EngineConfig":
        """The same with numbers in place of None and a mapping in place of "auto".

        Args:
          clients: about how many train in a round in one tier; lanes beyond them would idle.
          backend: "cpu", "gpu" or "tpu"; JAX's default one if not given.

        Raises:
          ConfigError: there are fewer devices.
        """
        cpu = (backend or jax.default_backend()) == "cpu"
        devices = make_mesh(self.devices).size
        lanes = 1 if cpu else max(1, min(8, clients // devices))
        mapping = "map" if cpu else "vmap"
        return EngineConfig(
            devices=devices,
            lanes=self.lanes or lanes,
            mapping=mapping if self.mapping == "auto" else self.mapping,
        )


class Report(NamedTuple):
    """What a tier's clients tell of a round, summed over them: float32 scalars.

    Attributes:
      loss: over the examples of clients whose update counts, in nats.
      correct: how many of these examples were classified right.
      examples: how many they are, epochs counted.
      delivered: clients whose update counts.
      rejected: clients whose update or loss is not finite; neither counts.
      lost: how many of the rejected ones were honest.
    """

    loss: Float[Array, ""]
    correct: Float[Array, ""]
    examples: Float[Array, ""]
    delivered: Float[Array, ""]
    rejected: Float[Array, ""]
    lost: Float[Array, ""]


class Delivered(NamedTuple):
    """What the clients that a lane has finished delivered."""

    updates: Updates
    report: Report


class Carry(NamedTuple):
    """What a lane carries from step to step; `metrics` are those of the client in training."""

    params: Params
    optimizer: Any
    metrics: Metrics
    delivered: Delivered


def make_trainer(
    tier: Tier,
    config: ClientConfig,
    preprocess: Preprocess,
    mesh: Mesh,
    *,
    mapping: str,
    present: Bool[np.ndarray, "clients classes"] | None = None,
    slots: int | None = None,
    clip: float | None = None,
    faults: FaultConfig | None = None,
) -> jax.stages.Wrapped:
    """The program that trains one tier's clients of a round.

    Args:
      tier: which submodel.
      config: of local training.
      preprocess: uint8 images and a key -> the model's input.
      mesh: see `jfed.engine.devices.make_mesh`.
      mapping: see `EngineConfig`; not "auto".
      present: which classes each client has examples of; the logits of the others are masked.
      slots: the most clients in a round, to stack their updates: memory for so many on each lane.
        None sums the updates.
      clip: the largest L2 norm of an update that counts as it is, longer ones are scaled down.
      faults: of clients whose `Work` has some; None compiles none in.

    Returns:
      A jitted `train(variables, images, labels, schedule, key, round_, learning_rate)` that returns
      the tier's `TierUpdate`, or `StackedUpdates` with `slots`, and the clients' `Report`. `images`
      `[N, H, W, C]` uint8 and `labels` `[N]` int32 are the whole training set; `key` belongs to the
      run.
    """
    make, step = make_optimizer(config), make_step(tier.model)

    def train(
        variables: Params,
        images: Array,
        labels: Array,
        schedule: Schedule,
        key: Array,
        round_: Int[Array, ""],
        learning_rate: Float[Array, ""],
    ) -> Delivered:
        server = tier.extract(variables, round_)
        optimizer = make(learning_rate)
        fresh = optimizer.init(server)
        round_key = jax.random.fold_in(key, round_)

        def one_step(i: Array, carry: Carry, lane: Steps) -> Carry:
            row = jax.tree.map(lambda a: a[i], lane)
            client_key = jax.random.fold_in(round_key, row.client)
            params, state = jax.lax.cond(
                row.start, lambda: (server, fresh), lambda: (carry.params, carry.optimizer)
            )
            step_key = jax.random.fold_in(client_key, row.step)
            batch = gather(images, labels, row.examples, preprocess, step_key)
            if present is not None:
                batch = batch._replace(present=jnp.asarray(present)[row.client])
            params, state, metrics = step(optimizer, params, state, batch)
            metrics = jax.tree.map(
                lambda old, new: jnp.where(row.start, 0, old) + new, carry.metrics, metrics
            )

            def finish() -> Delivered:
                update = jax.tree.map(jnp.subtract, params, server)
                if config.transform is not None:
                    update = config.transform(update, jax.random.fold_in(client_key, _TRANSFORM))
                if faults is not None and faults.corrupts:
                    fault_key = jax.random.fold_in(client_key, _FAULT)
                    update = corrupt(faults, update, jnp.asarray(row.fault), fault_key)
                if clip is not None:
                    update = clip_update(update, clip)
                return deliver(carry.delivered, update, metrics, row)

            delivered = jax.lax.cond(row.weight > 0, finish, lambda: carry.delivered)
            return Carry(params, state, metrics, delivered)

        def run_lane(lane: Steps) -> Delivered:
            zero = jnp.zeros(())
            before = Delivered(nothing(server, slots), Report(*(zero,) * len(Report._fields)))
            start = Carry(server, fresh, Metrics(zero, zero, zero), before)
            end = jax.lax.fori_loop(0, schedule.length, lambda i, c: one_step(i, c, lane), start)
            return end.delivered

        return jax.lax.psum(_sum_of_lanes(run_lane, schedule.steps, mapping), AXIS)

    # Unchecked: the check would want every loop inside a user's model, and inside diffrax, to start
    # from values that are marked as varying over devices. Nothing is differentiated through `psum`.
    sharded = jax.shard_map(
        train,
        mesh=mesh,
        in_specs=(*(EVERYWHERE,) * 3, _SCHEDULE, *(EVERYWHERE,) * 3),
        out_specs=EVERYWHERE,
        check_vma=False,
    )
    return jax.jit(sharded)


# In place of a step's number in the keys of a client's transform and of what it sends instead.
_TRANSFORM, _FAULT = np.uint32(2**32 - 1), np.uint32(2**32 - 2)
_SCHEDULE = Schedule(Steps(*(SPREAD,) * len(Steps._fields)), EVERYWHERE)  # type: ignore[arg-type]


def put_schedule(schedule: Schedule, mesh: Mesh) -> Schedule:
    """Sends each device its lanes."""
    return Schedule(put(schedule.steps, mesh, SPREAD), put(schedule.length, mesh, EVERYWHERE))


def deliver(before: Delivered, update: Params, metrics: Metrics, row: Steps) -> Delivered:
    """Adds what one client delivers, or one rejection if anything of it is not finite.

    Args:
      before: by the clients before it.
      update: of the client.
      metrics: of the client, over all of its steps.
      row: the client's last step, scalars.
    """
    # Weighted, as the sum takes it: what is too large for that counts as infinite.
    finite = [jnp.isfinite(row.weight.astype(u.dtype) * u).all() for u in jax.tree.leaves(update)]
    counts = jnp.stack([*finite, jnp.isfinite(metrics.loss)]).all()
    lost = ~counts & (row.fault == 0)
    told = jax.tree.map(lambda m: jnp.where(counts, m, 0), metrics)
    told = Report(*told, *(flag.astype(jnp.float32) for flag in (counts, ~counts, lost)))
    update = jax.tree.map(lambda u: jnp.where(counts, u, 0), update)
    updates = add(before.updates, update, jnp.where(counts, row.weight, 0), jnp.asarray(row.slot))
    return Delivered(updates, jax.tree.map(jnp.add, before.report, told))


def _sum_of_lanes(run_lane: Callable[[Steps], Delivered], steps: Steps, mapping: str) -> Delivered:
    """Runs every lane and adds up what they deliver; of stacked updates each has its own slots."""
    lanes = steps.start.shape[0]
    if lanes == 1 or mapping == "unroll":
        # One lane is not vmapped: batching its kernels would make other programs of them.
        ends = [run_lane(jax.tree.map(lambda a, i=i: a[i], steps)) for i in range(lanes)]
        return jax.tree.map(lambda *x: sum(x[1:], start=x[0]), *ends)
    mapped = jax.vmap(run_lane)(steps) if mapping == "vmap" else jax.lax.map(run_lane, steps)
    return jax.tree.map(lambda x: x.sum(0), mapped)
