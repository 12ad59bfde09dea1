"""The debug engine: a plain Python loop over clients and batches, nothing packed.

Of the lanes it shares the functions of the algorithm, the tiers and the faults, and what is done to
one batch or one update (`gather`, `clip`, `map_parts`), so that each engine can be compared with
the other; and a debugger or a `print` in an algorithm's functions just works. Only the loss is
compiled, and so traced once, as the loop of an ODE solver takes seconds without; under
`jax.disable_jit()` nothing is.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jfed.algorithms.aggregators import Aggregator, Stack
from jfed.algorithms.algorithm import Algorithm, Client
from jfed.data.preprocessing import gather
from jfed.engine.faults import corrupt
from jfed.engine.lanes import BEGIN, END, FAULT, Inputs, Training, only_own
from jfed.engine.merging import Report, clip
from jfed.engine.packing import Work
from jfed.models.losses import Loss, Metrics, training_loss
from jfed.models.model import Params
from jfed.tiers.parts import is_like, map_parts
from jfed.tiers.tier import Tier


class Sent(NamedTuple):
    """What one client sent.

    Attributes:
      parts: of its message, those like the tier's variables in their place among the global ones.
      owned: 1 for the entries of each part that are the client's, else 0.
      entries: 1 for the global variables that its tier owns, else 0.
      weights: of each part.
      metrics: of its training, summed over batches.
      counts: whether all of it is finite.
    """

    parts: dict[str, Any]
    owned: dict[str, Any]
    entries: Params
    weights: dict[str, float]
    metrics: Metrics
    counts: bool


def train(config: Training, inputs: Inputs, work: Work, memory: Any) -> tuple[Sent, Any]:
    """Trains one client that remembers `memory`; returns what it sends, and its new memory."""
    memory = jax.tree.map(jnp.asarray, memory)
    tier, algorithm, variables = config.tiers[work.tier], config.algorithm, inputs.server.variables
    received, remembered = (
        map_parts(lambda v: tier.extract(v, inputs.round), variables, tree)
        for tree in (algorithm.send(inputs.server), memory)
    )
    client = _client(config, inputs, work, received)
    key = jax.random.fold_in(jax.random.fold_in(inputs.key, inputs.round), work.client)
    begin, end, fault = (jax.random.fold_in(key, number) for number in (BEGIN, END, FAULT))
    local = algorithm.client_init(client, remembered, begin)
    local, metrics = _steps(config, inputs, work, client, local, key)
    message, after = algorithm.client_final(client, local, end)
    message = client.own(message)
    if config.faults is not None and config.faults.corrupts:
        message = corrupt(config.faults, message, jnp.int32(work.fault), fault)
    message = client.own(message)
    if config.clip is not None:
        message["update"] = clip(message["update"], config.clip)
    sent = _sent(config, inputs, client, tier, message, metrics, jax.tree.leaves(after))

    def remember(old: Params, new: Params) -> Params:
        placed = tier.embed(new, variables, inputs.round)
        return jax.tree.map(lambda b, a, o: jnp.where(o > 0, a, b), old, placed, sent.entries)

    kept = map_parts(remember, variables, memory, after, otherwise=lambda old, new: new)
    return sent, kept if sent.counts else memory


def _client(config: Training, inputs: Inputs, work: Work, received: Any) -> Client:
    """What the algorithm is told of a client."""
    tier = config.tiers[work.tier]
    return Client(
        sent=received,
        loss=_loss(tier),
        number=jnp.int32(work.client),
        examples=jnp.int32(work.examples),
        steps=jnp.int32(len(work.batches)),
        weight=jnp.float32(work.weight),
        round=inputs.round,
        learning_rate=inputs.learning_rate,
        own=lambda message: _own(tier, config.algorithm, inputs.server.variables, message),
    )


@functools.lru_cache(maxsize=64)
def _loss(tier: Tier) -> Loss:
    return jax.jit(training_loss(tier.bound()))


def _steps(
    config: Training, inputs: Inputs, work: Work, client: Client, local: Any, key: jax.Array
) -> tuple[Any, Metrics]:
    """A client's local state after all its batches, and their metrics in sum."""
    told = []
    for step, batch in enumerate(work.batches):
        data_key, loss_key = jax.random.split(jax.random.fold_in(key, step))
        examples, mask = jnp.asarray(np.where(batch < 0, batch[0], batch)), jnp.float32(batch >= 0)
        data = gather(inputs.images, examples, mask, config.augmentation, data_key)
        data = data._replace(round=inputs.round)
        if inputs.present is not None:
            data = data._replace(present=inputs.present[work.client])
        local, metrics = config.algorithm.client_step(client, local, data, loss_key)
        told.append(metrics)
    return local, jax.tree.map(lambda *m: sum(m[1:], start=m[0]), *told)


def _sent(
    config: Training,
    inputs: Inputs,
    client: Client,
    tier: Tier,
    message: dict[str, Any],
    metrics: Metrics,
    kept: Sequence[Any],
) -> Sent:
    """A client's message among the global variables; it counts if it and `kept` are finite."""
    variables = inputs.server.variables
    weighed = config.algorithm.weights
    weights = {n: float(weighed.get(n, lambda c: c.weight)(client)) for n in message}
    weighted = [weights[n] * leaf for n in message for leaf in jax.tree.leaves(message[n])]
    owned, shapes = tier.owned(variables, inputs.round), tier.shapes(variables)
    like = {name: is_like(part, shapes) for name, part in message.items()}
    placed = {
        n: tier.embed(part, variables, inputs.round) if like[n] else part
        for n, part in message.items()
    }
    return Sent(
        placed,
        {n: owned if like[n] else jax.tree.map(jnp.ones_like, p) for n, p in message.items()},
        owned,
        weights,
        metrics,
        all(bool(jnp.isfinite(x).all()) for x in (*weighted, metrics.loss, *kept)),
    )


def _own(
    tier: Tier, algorithm: Algorithm, variables: Params, message: dict[str, Any]
) -> dict[str, Any]:
    """A message with zeros in what does not leave the client."""
    shapes = tier.shapes(variables)

    def keep(part: Params) -> Params:
        return only_own(tier, algorithm, part, tier.setting)

    return map_parts(keep, shapes, message)


def report(sent: Sequence[Sent]) -> Report:
    """What the clients of a program tell, in the order of their slots."""
    counts = np.asarray([one.counts for one in sent], bool)
    told = Metrics(*[jnp.zeros(0)] * 3)
    if sent:
        zero = jax.tree.map(jnp.zeros_like, sent[0].metrics)
        shown = [one.metrics if one.counts else zero for one in sent]
        told = jax.tree.map(lambda *m: jnp.stack(m), *shown)
    return Report(told, jnp.asarray(counts), jnp.asarray(~counts))


def merge(
    sent: Sequence[Sent], aggregator: Aggregator | None, variables: Params
) -> tuple[dict[str, Any], Params]:
    """The mean of each entry over the clients that own it, in float64, and how many these are."""
    found, merged = [one for one in sent if one.counts], {}

    def mean(name: str) -> Any:
        def entry(*pairs: Any) -> Any:
            values, owns = np.split(np.asarray(pairs, np.float64), 2)
            weights = np.asarray([one.weights[name] for one in found]).reshape(
                -1, *(1,) * (values.ndim - 1)
            )
            weights = weights * owns
            whole = weights.sum(0)
            total = (weights * np.where(owns > 0, values, 0)).sum(0)
            return jnp.float32(total / np.where(whole > 0, whole, 1))

        parts = (*(one.parts[name] for one in found), *(one.owned[name] for one in found))
        return jax.tree.map(entry, *parts)

    for name, part in found[0].parts.items():
        if aggregator is None or not is_like(part, variables):
            merged[name] = mean(name)
            continue
        updates, owned = (
            jax.tree.map(lambda *u: jnp.stack(u), *(getattr(one, kind)[name] for one in found))
            for kind in ("parts", "owned")
        )
        mask = jax.tree.map(lambda o: o > 0, owned)
        weight = jnp.asarray([one.weights[name] for one in found])
        update = aggregator(Stack(updates, mask, weight))
        merged[name] = jax.tree.map(lambda u, m: jnp.where(m.any(0), u, 0), update, mask)
    owned = [one.entries for one in found]
    return merged, jax.tree.map(lambda *o: sum(o[1:], start=o[0]), *owned)
