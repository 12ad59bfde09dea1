"""The engine: one compiled program trains all clients of a round whose tiers share it.

Clients are packed on lanes, and lanes are spread over devices. A lane loops over batches and trains
client after client: at a client's first batch it begins anew from what the server sent, at
its last one the client's message is added to the device's sum. So clients of different sizes and
tiers cost no padding, and memory does not grow with their number. Beginnings and ends are rare, so
they stand outside of the loop over steps, even where several lanes step together (`vmap`).

A client whose message, loss or new memory is not finite is left out, with all that it measured.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jfed.algorithms.algorithm import Algorithm, Client, Server
from jfed.data.preprocessing import Augmentation, Images, gather
from jfed.engine.devices import AXIS, EVERYWHERE, SPREAD
from jfed.engine.faults import FaultConfig, corrupt
from jfed.engine.merging import Delivered, Report, clip
from jfed.engine.packing import Cohort, Lanes, Schedule
from jfed.models.losses import Metrics, training_loss
from jfed.models.model import Params, path_name
from jfed.platforms import vmapped
from jfed.tiers.parts import is_like, map_parts
from jfed.tiers.tier import Tier, settings_of

# What else than a step's number is folded into a client's key.
BEGIN, END, FAULT = (np.uint32(2**32 - i) for i in (1, 2, 4))


_PLAIN = jax.tree.structure(Metrics(*[0.0] * 3))  # type: ignore[arg-type]  # of the cross-entropy


@dataclasses.dataclass(frozen=True)
class Training:
    """What decides a training program, beside the shapes of its arguments.

    Attributes:
      tiers: that it serves; they differ in their settings only.
      algorithm: of the clients.
      augmentation: of training images.
      mesh: see `jfed.engine.devices.make_mesh`.
      mapping: "vmap", "map" or "unroll", see `EngineConfig`.
      slots: the most clients in a round.
      stacked: keep every client's message by itself, for an aggregator that needs it.
      clip: the largest L2 norm of an update that counts as it is; longer ones are scaled down.
      streamed: each device has images of its own, in place of the whole training set.
      faults: of clients whose `Work` has some; None compiles none in.
      metrics: the structure of what the algorithm's `client_step` tells, float32 scalars all.
    """

    tiers: tuple[Tier, ...]
    algorithm: Algorithm
    augmentation: Augmentation
    mesh: Mesh
    mapping: str
    slots: int
    stacked: bool = False
    clip: float | None = None
    streamed: bool = False
    faults: FaultConfig | None = None
    metrics: Any = _PLAIN


class Inputs(NamedTuple):
    """What every device has in a round.

    Attributes:
      server: what the server keeps.
      images: the whole training set; or each device's own, `[devices * rows, ...]`.
      present: `[clients, classes]` which classes each client has examples of, where the logits of
        the others are masked; None where they are not.
      key: of the run.
      round: from 0.
      learning_rate: of the clients.
    """

    server: Server
    images: Images
    present: Bool[Array, "clients classes"] | None
    key: Array
    round: Int[Array, ""]
    learning_rate: Float[Array, ""]


class _Steps(NamedTuple):
    """What the loop over steps carries.

    Attributes:
      i: the next step.
      ends: `[l]` whether the step before it was the last one of the lane's client.
      local: of the clients, by lane.
      metrics: that they measured so far, by lane.
    """

    i: Int[Array, ""]
    ends: Bool[Array, " l"]
    local: Any
    metrics: Metrics


class _Carry(NamedTuple):
    """Between two clients' ends: where lanes are, what was delivered, and rows of memory."""

    steps: _Steps
    delivered: Delivered
    memory: Any


class _Trainer:
    """A training program while it is traced, on one device."""

    def __init__(self, config: Training, inputs: Inputs, cohort: Cohort) -> None:
        self.config, self.inputs, self.cohort = config, inputs, cohort
        self.tier, self.algorithm = config.tiers[0], config.algorithm
        variables = inputs.server.variables
        self.shapes = self.tier.shapes(variables)
        self.sent = map_parts(self._cut, variables, config.algorithm.send(inputs.server))
        self.key = jax.random.fold_in(inputs.key, inputs.round)
        self.settings = settings_of(config.tiers)

    def _cut(self, variables: Params) -> Params:
        return self.tier.extract(variables, self.inputs.round)

    def setting(self, slot: Array) -> Any:
        """Of the tiers of clients, one slot or several."""
        tier = self.cohort.tier[slot]
        return jax.tree.map(lambda values: jnp.asarray(values)[tier], self.settings)

    def client(self, slot: Array, largest: Any = None) -> tuple[Client, Array]:
        """What the client of a slot knows, and its key of this round."""
        of = jax.tree.map(lambda column: column[slot], self.cohort)
        model = self.tier.bound(self.setting(slot), largest)
        client = Client(
            sent=self.sent,
            loss=training_loss(model),
            number=of.client,
            examples=of.examples,
            steps=of.steps,
            weight=of.weight,
            round=self.inputs.round,
            learning_rate=self.inputs.learning_rate,
            own=lambda message: self._own(message, slot),
        )
        return client, jax.random.fold_in(self.key, of.client)

    def begin(self, slot: Array, memory: Any) -> Any:
        """A client's local state at its first batch; `memory` are its device's rows."""
        client, key = self.client(slot)
        row = jax.tree.map(lambda rows: rows[self.cohort.row[slot]], memory)
        cut = map_parts(self._cut, self.inputs.server.variables, row)
        return _arrays(self.algorithm.client_init(client, cut, jax.random.fold_in(key, BEGIN)))

    def step(self, slot: Array, now: Lanes, local: Any, largest: Any) -> tuple[Any, Metrics]:
        """One batch of one client."""
        client, key = self.client(slot, largest)
        data_key, loss_key = jax.random.split(jax.random.fold_in(key, now.step))
        mask = (jnp.arange(now.examples.shape[-1]) < now.real).astype(jnp.float32)
        examples = jnp.asarray(now.examples)
        batch = gather(self.inputs.images, examples, mask, self.config.augmentation, data_key)
        batch = batch._replace(round=self.inputs.round)
        if self.inputs.present is not None:
            batch = batch._replace(present=self.inputs.present[client.number])
        return _arrays(self.algorithm.client_step(client, local, batch, loss_key))

    def end(self, slot: Array, local: Any, metrics: Metrics, memory: Any) -> tuple[Any, ...]:
        """What a client sends after its last batch, times its weights, and whether it counts.

        Returns:
          The parts of its message, their weights, whether they are finite, and its new memory.
        """
        client, key = self.client(slot)
        end_key = jax.random.fold_in(key, END)
        message, remembered = _arrays(self.algorithm.client_final(client, local, end_key))
        message = self._as_sent(message, slot, key)
        weights = {
            name: jnp.asarray(self.algorithm.weights.get(name, _own_weight)(client), jnp.float32)
            for name in message
        }
        weighted = {
            name: jax.tree.map(lambda u, w=weights[name]: w.astype(u.dtype) * u, part)
            for name, part in message.items()
        }
        # Weighted, as the sum takes it: what is too large for that counts as infinite.
        told = jax.tree.leaves((weighted, metrics.loss, remembered))
        finite = [jnp.isfinite(u).all() for u in told]
        counts = jnp.stack(finite).all()
        parts = {n: message[n] if self.is_stacked(message[n]) else weighted[n] for n in message}
        return parts, weights, counts, self._remember(slot, remembered, memory, counts)

    def _as_sent(self, message: dict[str, Any], slot: Array, key: Array) -> dict[str, Any]:
        """A message as the server gets it: corrupted, clipped."""
        faults, message = self.config.faults, self._own(message, slot)
        if faults is not None and faults.corrupts:
            fault_key = jax.random.fold_in(key, FAULT)
            message = corrupt(faults, message, self.cohort.fault[slot], fault_key)
        message = self._own(message, slot)  # again, as noise is everywhere
        if self.config.clip is not None:
            message = message | {"update": clip(message["update"], self.config.clip)}
        return message

    def _own(self, message: dict[str, Any], slot: Array) -> dict[str, Any]:
        """A message with zeros in what does not leave the client."""
        setting = self.setting(slot)
        keep = lambda part: only_own(self.tier, self.algorithm, part, setting)  # noqa: E731
        return map_parts(keep, self.shapes, message)

    def _remember(self, slot: Array, new: Any, memory: Any, counts: Array) -> Any:
        """A client's row after a round: its tier's part of it is new, if the client counts."""
        variables, round_ = self.inputs.server.variables, self.inputs.round
        old = jax.tree.map(lambda rows: rows[self.cohort.row[slot]], memory)

        def put_back(before: Params, after: Params) -> Params:
            owned = self.tier.owned(variables, round_, self.setting(slot))
            placed = self.tier.embed(after, variables, round_)
            return jax.tree.map(lambda b, a, o: jnp.where(o > 0, a, b), before, placed, owned)

        row = map_parts(put_back, variables, old, new, otherwise=lambda before, after: after)
        return jax.tree.map(lambda b, a: jnp.where(counts, a, b), old, row)

    def is_stacked(self, part: Any) -> bool:
        """Whether a part of the messages is kept by itself for each client."""
        return self.config.stacked and is_like(part, self.shapes)

    def nothing(self, memory: Any) -> Delivered:
        """What is delivered before any client has ended."""
        slot, structure = jnp.zeros((), jnp.int32), self.config.metrics
        metrics = jax.tree.unflatten(structure, [jnp.zeros(())] * structure.num_leaves)
        local = jax.eval_shape(self.begin, slot, memory)
        parts, weights, *_ = jax.eval_shape(self.end, slot, local, metrics, memory)
        slots = self.config.slots

        def zeros(part: Any) -> Any:
            shape = (slots,) if self.is_stacked(part) else ()
            return jax.tree.map(lambda x: jnp.zeros((*shape, *x.shape), x.dtype), part)

        nobody = jnp.zeros(slots, bool)
        told = jax.tree.map(lambda x: jnp.zeros((slots, *x.shape), x.dtype), metrics)
        return Delivered(
            {name: zeros(part) for name, part in parts.items()},
            {name: jnp.zeros(slots) for name in weights},
            Report(told, nobody, nobody),
        )


def only_own(tier: Tier, algorithm: Algorithm, part: Params, setting: Any) -> Params:
    """A part like the tier's variables with zeros in what does not leave a client.

    That is what its tier does not own, and leaves that the algorithm calls personal.
    """
    if tier.mask is not None:
        own = tier.mask(part, setting)
        part = jax.tree.map(lambda u, o: jnp.where(o > 0, u, 0), part, own)
    return part if algorithm.personal is None else without(algorithm.personal, part)


def without(personal: Callable[[str], bool], tree: Params) -> Params:
    """A tree with zeros in its personal leaves."""
    return jax.tree_util.tree_map_with_path(
        lambda path, u: jnp.zeros_like(u) if personal(path_name(path)) else u, tree
    )


def _arrays(tree: Any) -> Any:
    """A user's pytree, whose numbers may be Python's."""
    return jax.tree.map(jnp.asarray, tree)


def _own_weight(client: Client) -> Array:
    return client.weight


def make_trainer(config: Training) -> jax.stages.Wrapped:
    """The program that trains the clients of a round whose tiers share it.

    Returns:
      A jitted `train(inputs, schedule, memory) -> (delivered, memory)`: `Inputs`, a `Schedule`, and
      rows of client memory, `[devices * rows, ...]`, each device's own; what is delivered is summed
      over devices, the rows stay where they are.
    """

    def train(inputs: Inputs, schedule: Schedule, memory: Any) -> tuple[Delivered, Any]:
        trainer = _Trainer(config, inputs, schedule.cohort)
        delivered = trainer.nothing(memory)
        lanes, length = schedule.lanes, schedule.length
        if config.mapping == "vmap":
            with vmapped(len(length)):
                delivered, memory = _Lockstep(trainer, lanes, length.max()).run(delivered, memory)
        elif config.mapping == "map" and len(length) > 1:

            def one(carry: Any, lane: Any) -> Any:
                return _Lockstep(trainer, _axis(lane[0]), lane[1]).run(*carry), None

            (delivered, memory), _ = jax.lax.scan(one, (delivered, memory), (lanes, length))
        else:
            for i in range(len(length)):
                alone = jax.tree.map(lambda a, i=i: a[i : i + 1], lanes)
                delivered, memory = _Lockstep(trainer, alone, length[i]).run(delivered, memory)
        return _sum_over_devices(delivered), memory

    # Unchecked: the check would want every loop inside a user's model, and inside diffrax, to start
    # from values that are marked as varying over devices. Nothing is differentiated through `psum`.
    sharded = jax.shard_map(
        train,
        mesh=config.mesh,
        in_specs=(spread_inputs(config.streamed), Schedule(*SCHEDULE), SPREAD),  # type: ignore[arg-type]
        out_specs=(EVERYWHERE, SPREAD),
        check_vma=False,
    )
    return jax.jit(sharded, donate_argnums=2)


def spread_inputs(streamed: bool) -> Any:
    """How `Inputs` are spread over devices: everywhere, but for images that are streamed."""
    if not streamed:
        return EVERYWHERE
    images = Images(SPREAD, SPREAD, EVERYWHERE, EVERYWHERE)  # type: ignore[arg-type]
    return Inputs(*(EVERYWHERE,) * len(Inputs._fields))._replace(images=images)  # type: ignore[arg-type]


# How a schedule is spread over devices: lanes, the table of clients, lengths.
SCHEDULE = (SPREAD, EVERYWHERE, SPREAD)


def _sum_over_devices(delivered: Delivered) -> Delivered:
    """The only collective of a round; what was a flag is one again, a client having one device.

    As numbers of one type all is summed at once: XLA takes a sum of its own for each type.
    """
    numbers = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == bool else x, delivered)
    total = jax.lax.psum(numbers, AXIS)
    report = total.report
    flags = {"delivered": report.delivered > 0, "rejected": report.rejected > 0}
    return total._replace(report=report._replace(**flags))


def _axis(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[None], tree)


class _Lockstep:
    """Lanes that take their steps together; of a single lane nothing is batched.

    Two loops: lanes begin clients, step until a client ends, and those that end deliver. So the
    inner loop has nothing but what a step computes.
    """

    def __init__(self, trainer: _Trainer, lanes: Lanes, length: Array) -> None:
        self.trainer, self.lanes, self.length = trainer, lanes, length
        self.slots, self.count = trainer.config.slots, len(lanes.slot)
        self.each = jax.vmap if self.count > 1 else _alone

    def run(self, delivered: Delivered, memory: Any) -> tuple[Delivered, Any]:
        """All that the lanes deliver, added to what there is, and the rows of memory."""
        # Lanes that have not begun yet hold the first client's state; nothing of it is delivered.
        local = self.begin(jnp.zeros(self.count, jnp.int32), memory)
        zero = jax.tree.map(
            lambda x: jnp.zeros((self.count, *x.shape[1:]), x.dtype), delivered.report.metrics
        )
        first = _Steps(jnp.zeros((), jnp.int32), jnp.zeros(self.count, bool), local, zero)
        with jax.named_scope("turns"):
            end = jax.lax.while_loop(
                lambda carry: carry.steps.i < self.length,
                self.until_one_ends,
                _Carry(first, delivered, memory),
            )
        return end.delivered, end.memory

    def at(self, i: Array) -> tuple[Lanes, Int[Array, " l"], Bool[Array, " l"]]:
        """What the lanes do at a step, for the clients of which slots, and which do not idle."""
        now = jax.tree.map(lambda a: a[:, i], self.lanes)
        return now, jnp.minimum(now.slot, self.slots - 1), now.slot < self.slots

    def begin(self, slot: Array, memory: Any) -> Any:
        """The local state of the lanes' clients at their first batch."""
        return self.each(lambda s: self.trainer.begin(s, memory))(slot)

    def step(self, before: _Steps) -> _Steps:
        """One batch of every lane."""
        now, slot, active = self.at(before.i)
        trainer = self.trainer
        largest = None if self.count == 1 else _largest(trainer.setting(slot), active)
        one = self.each(lambda s, n, x: trainer.step(s, n, x, largest))
        local, metrics = one(slot, now, before.local)
        metrics = jax.tree.map(jnp.add, before.metrics, metrics)
        ends = active & (now.step == trainer.cohort.steps[slot] - 1)
        return _Steps(before.i + 1, ends, local, metrics)

    def until_one_ends(self, carry: _Carry) -> _Carry:
        """A pass of the outer loop."""
        (i, _, local, metrics), delivered, memory = carry
        now, slot, active = self.at(i)
        starts = active & (now.step == 0)
        with jax.named_scope("begin"):
            local = _select(starts, self.begin(slot, memory), local)
        metrics = jax.tree.map(lambda m: jnp.where(_along(starts, m), 0, m), metrics)
        with jax.named_scope("steps"):
            steps = jax.lax.while_loop(
                lambda steps: ~steps.ends.any() & (steps.i < self.length),
                self.step,
                _Steps(i, jnp.zeros(self.count, bool), local, metrics),
            )
        with jax.named_scope("deliver"):
            _, slot, _ = self.at(steps.i - 1)
            end = self.each(lambda s, x, m: self.trainer.end(s, x, m, memory))
            told = end(slot, steps.local, steps.metrics)
            delivered, memory = _add(self.trainer, delivered, memory, told, steps, slot)
        return _Carry(steps, delivered, memory)


def _add(
    trainer: _Trainer,
    before: Delivered,
    memory: Any,
    told: tuple[Any, ...],
    steps: _Steps,
    slot: Int[Array, " l"],
) -> tuple[Delivered, Any]:
    """Adds what the lanes deliver whose client ends."""
    ends, slots = steps.ends, trainer.config.slots
    at = jnp.where(ends, slot, slots)  # too large for others
    parts, weights, finite, rows = told
    counts = ends & finite
    stacks = {name: trainer.is_stacked(_first(part)) for name, part in parts.items()}

    def put(column: Array, values: Array) -> Array:
        """Sets what clients that count deliver, in their slots."""
        shown = jnp.where(_along(counts, values), values, 0)
        return column.at[at].set(shown.astype(column.dtype), mode="drop")

    def total(whole: Array, values: Array) -> Array:
        return whole + jnp.where(_along(counts, values), values, 0).sum(0)

    report = before.report
    delivered = Delivered(
        {
            name: jax.tree.map(put if stacks[name] else total, before.parts[name], part)
            for name, part in parts.items()
        },
        {name: put(before.weights[name], weight) for name, weight in weights.items()},
        Report(
            jax.tree.map(put, report.metrics, steps.metrics),
            report.delivered.at[at].set(counts, mode="drop"),
            report.rejected.at[at].set(~counts, mode="drop"),
        ),
    )
    size = max((len(x) for x in jax.tree.leaves(memory)), default=0)
    row = jnp.where(ends, trainer.cohort.row[slot], size)
    memory = jax.tree.map(lambda all_, new: all_.at[row].set(new, mode="drop"), memory, rows)
    return delivered, memory


def _alone(f: Callable) -> Callable:
    """`f` over a leading axis of one, which it never sees: `vmap` would make other kernels."""

    def mapped(*args: Any) -> Any:
        return _axis(f(*jax.tree.map(lambda x: x[0], args)))

    return mapped


def _select(which: Bool[Array, " l"], new: Any, old: Any) -> Any:
    if len(which) == 1:  # a single lane begins a client whenever this is called
        return new
    return jax.tree.map(lambda n, o: jnp.where(_along(which, n), n, o), new, old)


def _largest(settings: Any, active: Bool[Array, " l"]) -> Any:
    """The largest of each number over the lanes that train a client."""
    return jax.tree.map(lambda s: jnp.where(_along(active, s), s, 0).max(0), settings)


def _along(values: Array, like: Array) -> Array:
    """`[l]` -> `[l, 1, ...]`, to go with an array of more axes."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def _first(tree: Any) -> Any:
    """Shapes without the axis of lanes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree)
