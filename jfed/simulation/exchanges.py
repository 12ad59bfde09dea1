"""What server and clients of an algorithm exchange: checked on shapes, before anything compiles."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jfed.algorithms.algorithm import Algorithm, Client, Merged, Server
from jfed.algorithms.clients import ClientConfig
from jfed.algorithms.servers import ServerConfig
from jfed.data import Dataset
from jfed.errors import ConfigError, calling, name_of, shown
from jfed.models.losses import Metrics, training_loss
from jfed.models.model import Params, by_name
from jfed.seeds import is_key
from jfed.simulation.checks import (
    check_metrics,
    check_pair,
    check_same,
    difference,
    key_shape,
    shapes_of,
    structure_of,
    training_batch,
)
from jfed.tiers.parts import is_like, map_parts
from jfed.tiers.tier import Tier

_INTEGER, _REAL = (jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.int32, jnp.float32))


class Exchange(NamedTuple):
    """Shapes of what goes between the server and a client of a tier.

    Attributes:
      sent: to the client.
      message: from it.
      metrics: of its training.
      local: what the client holds while it trains.
      gradients: how often a step of its training calls the loss; calls in a loop count once.
    """

    sent: Any
    message: dict[str, Any]
    metrics: Metrics
    local: Any
    gradients: int


class _Functions:
    """An algorithm's functions, called with shapes, as for clients of one tier; errors name them.

    Attributes:
      gradients: how often the loss was called so far.
    """

    def __init__(self, algorithm: Algorithm, tier: Tier, like: Params) -> None:
        self.algorithm, self.tier, self.like = algorithm, tier, like
        self._loss = training_loss(tier.bound())
        self.gradients = 0

    def title(self, name: str) -> str:
        return f"the algorithm's {name} ({name_of(getattr(self.algorithm, name))})"

    def call(self, name: str, *args: Any) -> Any:
        with calling(self.title(name), tier=self.tier.name):
            return jax.eval_shape(getattr(self.algorithm, name), *args)

    def of_client(self, title: str, function: Any, sent: Any, *args: Any) -> Any:
        """What a function of a client gives, and of further arguments."""

        def run(known: Any, *args: Any) -> Any:
            return function(Client(known[0], self._count, *known[1:]), *args)

        known = (sent, _INTEGER, _INTEGER, _INTEGER, _REAL, _INTEGER, _REAL)
        with calling(title, tier=self.tier.name):
            return jax.eval_shape(run, known, *args)

    def trained(self, name: str, sent: Any, *args: Any) -> Any:
        """What one of the algorithm's own functions of a client gives."""
        return self.of_client(self.title(name), getattr(self.algorithm, name), sent, *args)

    def cut(self, tree: Any) -> Any:
        """What clients of the tier have of what the server has."""
        return map_parts(self.tier.shapes, self.like, tree)

    def keeps(self, name: str, what: str, found: Any, expected: Any) -> None:
        """Raises ConfigError unless what a function gives is like what it got."""
        check_same(self.title(name), what, found, expected)

    def _count(self, *args: Any) -> Any:
        self.gradients += 1
        return self._loss(*args)


def check_algorithm(
    tier: Tier,
    like: Params,
    algorithm: Algorithm,
    config: ClientConfig,
    data: Dataset,
) -> Exchange:
    """Raises ConfigError where an algorithm's functions do not fit each other, naming the function.

    Args:
      tier: of clients.
      like: global variables; only shapes and dtypes matter.
      algorithm: of the server and its clients.
      config: of the clients.
      data: that they train on.
    """
    functions = _Functions(algorithm, tier, like)
    server = Server(like, functions.call("server_init", like))
    memory = _check_memory(functions)
    sent = functions.cut(functions.call("send", server))
    _check_personal(functions, sent, memory)
    exchange = _check_training(functions, sent, memory, training_batch(data, config.batch_size))
    merged = _check_message(functions, exchange.message)
    _check_weights(functions, sent, exchange.message)

    def step(server: Server, *parts: Any) -> Any:
        return algorithm.server_step(server, Merged(*parts))

    given = server, merged, like, _REAL, like, _INTEGER, key_shape(), _REAL
    with calling(functions.title("server_step"), parts=sorted(merged)):
        stepped = jax.eval_shape(step, *given)
    functions.keeps("server_step", "server", stepped, server)
    return exchange


def _check_memory(functions: _Functions) -> Any:
    memory = functions.cut(functions.call("memory_init", functions.like))
    if any(map(is_key, jax.tree.leaves(memory))):
        raise ConfigError(
            f"{functions.title('memory_init')} must give arrays of numbers, as "
            f"jax.random.key_data(key) is, got {shapes_of(memory)}."
        )
    return memory


def _check_personal(functions: _Functions, sent: Any, memory: Any) -> None:
    algorithm, params = functions.algorithm, functions.tier.shapes(functions.like)
    if algorithm.personal is not None:
        for path in by_name(params):
            with calling(functions.title("personal"), path=path):
                bool(algorithm.personal(path))
    if algorithm.personalise is not None:
        functions.keeps("personalise", "model", functions.call("personalise", sent, memory), params)


def _check_training(functions: _Functions, sent: Any, memory: Any, batch: Any) -> Exchange:
    key, step, final = key_shape(), "client_step", "client_final"
    local = functions.trained("client_init", sent, memory, key)
    before = functions.gradients
    found = functions.trained(step, sent, local, batch, key)
    gradients = max(functions.gradients - before, 1)  # an algorithm may have a loss of its own
    after, metrics = check_pair(functions.title(step), found)
    check_metrics(functions.title(step), metrics)
    functions.keeps(step, "local state", after, local)
    found = functions.trained(final, sent, local, key)
    message, kept = check_pair(functions.title(final), found)
    functions.keeps(final, "memory", kept, memory)
    return Exchange(sent, message, metrics, local, gradients)


def _check_message(functions: _Functions, message: Any) -> dict[str, Any]:
    """Shapes of the merged message; ConfigError unless it is a dict of parts that can be merged."""
    title, tier = functions.title("client_final"), functions.tier
    if not isinstance(message, dict) or not message:
        raise ConfigError(f"{title} must return a dict of parts, got {shown(message)}.")
    shapes, merged = tier.shapes(functions.like), {}
    several = len(jax.tree.leaves(shapes)) > 1
    for name, part in message.items():
        for leaf in jax.tree.leaves(part):
            if leaf.dtype != jnp.float32:
                raise ConfigError(f"part {name!r} of {title} must be float32, got {leaf.dtype}.")
        own = is_like(part, shapes)
        if several and not own and structure_of(part) == structure_of(shapes):
            raise ConfigError(
                f"part {name!r} of {title} does not match what tier {tier.name!r} owns: "
                f"{difference(part, shapes)}."
            )
        merged[name] = functions.like if own else part
    return merged


def _check_weights(functions: _Functions, sent: Any, message: Mapping[str, Any]) -> None:
    weights = functions.algorithm.weights
    if unknown := sorted(set(weights) - set(message)):
        raise ConfigError(f"weights of parts {unknown}, but the message has {sorted(message)}.")
    parts = functions.algorithm.parts
    if parts != Algorithm.parts and (unknown := sorted(set(parts) - set(message))):
        raise ConfigError(
            f"parts {unknown} of the algorithm, but the message has {sorted(message)}."
        )
    for name, weigh in weights.items():
        title = _weight_title(name, weigh)
        weight = functions.of_client(title, lambda c, f=weigh: jnp.asarray(f(c)), sent)
        if weight.shape != ():
            raise ConfigError(f"{title} must give a scalar, got {shapes_of(weight)}.")


def _weight_title(name: str, weigh: Any) -> str:
    return f"weights[{name!r}] ({name_of(weigh)})"


def check_weights(algorithm: Algorithm, tier: Tier, sent: Any, told: Sequence[Any]) -> None:
    """Raises ConfigError if an algorithm weighs a client below 0, or all of them as 0.

    A weight that depends on what the server sends is not known before.

    Args:
      algorithm: with weights of parts.
      tier: of clients, any.
      sent: shapes of what they get.
      told: `[clients]` numbers, examples, steps and weights of all who have a tier.
    """
    loss, rest = training_loss(tier.bound()), (jnp.int32(0), jnp.float32(1))  # round and rate

    def weigh(f: Any, of: tuple[Any, ...]) -> Array:
        known = (*of, *rest)
        return jnp.asarray(f(Client(sent, loss, *known)), jnp.float32)

    for name, f in algorithm.weights.items():
        title = _weight_title(name, f)
        try:
            found = jax.vmap(functools.partial(weigh, f))(tuple(told))
        except Exception:  # shapes cannot be computed with
            continue
        wrong = ~(np.asarray(found) >= 0)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise ConfigError(
                f"{title} of client {int(told[0][at])} must be 0 or more, got {found[at]:g}."
            )
        if not np.asarray(found).any():
            raise ConfigError(f"{title} are 0 for all {len(found)} clients.")


def check_parts(message: Mapping[str, Any], server: ServerConfig) -> None:
    """Raises ConfigError if a message lacks the part that clipping is of."""
    if server.clip_updates is not None and "update" not in message:
        raise ConfigError(
            f"clip_updates needs a part 'update' of the message, got {sorted(message)}."
        )
