"""What models, optimizers and algorithms must be: checked on shapes, before anything compiles."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jfed.algorithms.aggregators import Aggregator, Stack
from jfed.algorithms.algorithm import Algorithm, Client, Merged, Server
from jfed.algorithms.clients import ClientConfig, make_optimizer
from jfed.algorithms.optimizers import MakeOptimizer
from jfed.algorithms.servers import ServerConfig
from jfed.data import Dataset
from jfed.errors import ConfigError, calling, name_of
from jfed.models.losses import Metrics, batch_shapes, training_loss
from jfed.models.model import Params, by_name
from jfed.seeds import is_key
from jfed.simulation.evaluation import EvaluationConfig
from jfed.simulation.scores import METRICS, column
from jfed.tiers.parts import is_like, map_parts
from jfed.tiers.tier import Tier, Tiers, check_extract


def check_init(tiers: Tiers, key: Array) -> Params:
    """Shapes and dtypes of the global variables; ConfigError if `init` cannot make them."""
    with calling(f"init of the model ({name_of(tiers.init)})", key=key):
        return jax.eval_shape(tiers.init, key)


def check_model(tier: Tier, like: Params, data: Dataset, batch_size: int) -> None:
    """Raises ConfigError unless the tier's model maps the data's images to logits.

    Args:
      tier: with the model.
      like: global variables; only shapes and dtypes matter.
      data: whose images are given to the model.
      batch_size: of tests.
    """
    with calling(f"extract of tier {tier.name!r}", round=0):
        params = tier.shapes(like)
    if not sum(leaf.size for leaf in jax.tree.leaves(params)):
        raise ConfigError(f"tier {tier.name!r} owns nothing of the global variables: {params!r}.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.dtype != jnp.float32:  # sums over clients need no less; compute in what you like
            raise ConfigError(
                f"parameters must be float32 arrays; that at {jax.tree_util.keystr(path)} "
                f"of tier {tier.name!r} is {leaf.dtype}."
            )
    with calling(f"extract of tier {tier.name!r}", round=0):
        check_extract(tier, like)
    if tier.mask is not None:
        with calling(f"mask of tier {tier.name!r}", setting=tier.setting):
            mask = jax.eval_shape(lambda v: tier.mask(v, tier.setting), params)  # type: ignore[misc]
        if not is_like(mask, params):
            raise ConfigError(
                f"mask of tier {tier.name!r} must be like the tier's variables, {_shapes(params)}, "
                f"got {_shapes(mask)}."
            )
    title = f"the model of tier {tier.name!r}"
    with calling(title, setting=tier.setting):
        model = tier.bound()
    batch = _batch(data, batch_size)
    given: tuple[Any, ...] = ()
    if model.measure is not None:
        with calling(f"measure of {title}", images=batch.images):
            statistics = jax.eval_shape(model.measure, params, batch.images, batch.mask)
        given = (None, statistics)
    with calling(title, images=batch.images):
        logits = jax.eval_shape(model.apply, params, batch.images, *given)
    expected = (batch_size, data.num_classes)
    if getattr(logits, "shape", None) != expected or logits.dtype != jnp.float32:
        raise ConfigError(
            f"{title} maps images {batch.images.shape} to {_shapes(logits)}; expected logits "
            f"{expected} float32 and nothing else, for the {data.num_classes} classes of "
            f"{data.name!r}."
        )


def check_training(tier: Tier, like: Params, config: ClientConfig, data: Dataset) -> None:
    """Raises ConfigError if the loss is none, or the optimizer changes the tree.

    Args:
      tier: with the model.
      like: global variables; only shapes and dtypes matter.
      config: of local training.
      data: that is trained on.
    """
    params, batch = tier.shapes(like), _training_batch(data, config.batch_size)
    title = f"the loss of tier {tier.name!r}"
    loss = training_loss(tier.bound())
    with calling(title, images=batch.images):
        value, metrics = _pair(title, jax.eval_shape(loss, params, batch, _key()))
    _check_scalars(title, value)
    _check_metrics(title, metrics)
    with calling(
        f"optimizer {name_of(config.optimizer)} of tier {tier.name!r}", gradient=_shapes(params)
    ):
        trained = jax.eval_shape(_optimizer_step(make_optimizer(config)), params, params)
    _check_tree("a step of training", trained, params, tier)


def check_measure(evaluation: EvaluationConfig, data: Dataset) -> tuple[str, ...]:
    """The names of what an evaluation measures; ConfigError unless they are float32 scalars."""
    measure, size = evaluation.measure, evaluation.batch_size
    if measure is None:
        return ()
    logits, title = jax.ShapeDtypeStruct((size, data.num_classes), jnp.float32), name_of(measure)
    with calling(f"evaluation measure {title}", logits=logits):
        found = jax.eval_shape(measure, logits, _batch(data, size))
    if not isinstance(found, dict):
        raise ConfigError(f"evaluation measure {title} must give a dict, got {_shapes(found)}.")
    _check_scalars(f"evaluation measure {title}", found)
    names = tuple(by_name(found))
    for name in sorted(set(names) & set(map(column, METRICS))):
        raise ConfigError(f"evaluation measure {title} gives {name!r}, a name of jfed's own.")
    return names


def _check_metrics(title: str, metrics: Any) -> None:
    if not isinstance(metrics, Metrics):
        raise ConfigError(f"{title} must return jfed.models.Metrics, got {_shapes(metrics)}.")
    _check_scalars(title, metrics)


def _check_scalars(title: str, metrics: Any) -> None:
    if any((x.shape, x.dtype) != ((), jnp.float32) for x in jax.tree.leaves(metrics)):
        raise ConfigError(
            f"{title} must give float32 scalars, sums over examples, got {_shapes(metrics)}."
        )


def _optimizer_step(make: MakeOptimizer) -> Any:
    def step(params: Params, gradient: Params) -> Params:
        optimizer = make(0.1)
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        return jax.tree.map(lambda p, u: p + u, params, updates)

    return step


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

    def call(name: str, *args: Any) -> Any:
        with calling(_title(algorithm, name), tier=tier.name):
            return jax.eval_shape(getattr(algorithm, name), *args)

    def cut(tree: Any) -> Any:
        return map_parts(tier.shapes, like, tree)

    server = Server(like, call("server_init", like))
    memory = cut(call("memory_init", like))
    if any(map(is_key, jax.tree.leaves(memory))):
        raise ConfigError(
            f"{_title(algorithm, 'memory_init')} must give arrays of numbers, as "
            f"jax.random.key_data(key) is, got {_shapes(memory)}."
        )
    number, real = (jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.int32, jnp.float32))
    sent = cut(call("send", server))
    known = (sent, number, number, number, real, number, real)
    own, key = training_loss(tier.bound()), _key()
    batch = _training_batch(data, config.batch_size)
    calls = 0  # of the loss

    def loss(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return own(*args)

    def of_client(name: str, *args: Any) -> Any:
        def run(known: Any, *args: Any) -> Any:
            return getattr(algorithm, name)(Client(known[0], loss, *known[1:]), *args)

        with calling(_title(algorithm, name), tier=tier.name):
            return jax.eval_shape(run, known, *args)

    params = tier.shapes(like)
    if algorithm.personal is not None:
        for path in by_name(params):
            with calling(_title(algorithm, "personal"), path=path):
                bool(algorithm.personal(path))
    if algorithm.personalise is not None:
        own_model = call("personalise", sent, memory)
        _check_same(_title(algorithm, "personalise"), "model", own_model, params)
    local = of_client("client_init", memory, key)
    calls = 0
    after, metrics = _pair(
        _title(algorithm, "client_step"), of_client("client_step", local, batch, key)
    )
    gradients = max(calls, 1)  # an algorithm may have a loss of its own
    _check_metrics(_title(algorithm, "client_step"), metrics)
    _check_same(_title(algorithm, "client_step"), "local state", after, local)
    message, kept = _pair(_title(algorithm, "client_final"), of_client("client_final", local, key))
    _check_same(_title(algorithm, "client_final"), "memory", kept, memory)
    merged = _check_message(message, tier, like, algorithm)
    for name, weigh in algorithm.weights.items():
        title = f"weights[{name!r}] ({name_of(weigh)})"
        with calling(title, tier=tier.name):
            weight = jax.eval_shape(
                lambda k, f=weigh: jnp.asarray(f(Client(k[0], loss, *k[1:]))), known
            )
        if weight.shape != ():
            raise ConfigError(f"{title} must give a scalar, got {_shapes(weight)}.")

    def step(server: Server, *parts: Any) -> Any:
        return algorithm.server_step(server, Merged(*parts))

    with calling(_title(algorithm, "server_step"), parts=sorted(merged)):
        stepped = jax.eval_shape(step, server, merged, like, real, like, number, key, real)
    _check_same(_title(algorithm, "server_step"), "server", stepped, server)
    return Exchange(sent, message, metrics, local, gradients)


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
        title = f"weights[{name!r}] ({name_of(f)})"
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


def check_aggregator(aggregator: Aggregator | None, like: Params, clients: int) -> None:
    """Raises ConfigError unless the aggregator makes one update of a stack.

    Args:
      aggregator: None for the mean.
      like: global variables; only shapes and dtypes matter.
      clients: in the stack.
    """
    if aggregator is None:
        return

    def stack(dtype: Any = None) -> Any:
        shape = lambda x: jax.ShapeDtypeStruct((clients, *x.shape), dtype or x.dtype)  # noqa: E731
        return jax.tree.map(shape, like)

    weight = jax.ShapeDtypeStruct((clients,), jnp.float32)
    title = f"aggregator {name_of(aggregator)}"
    with calling(title, clients=clients):
        found = jax.eval_shape(aggregator, Stack(stack(), stack(bool), weight))  # type: ignore[arg-type]
    _check_same(title, "update", found, like)


def _title(algorithm: Algorithm, name: str) -> str:
    return f"the algorithm's {name} ({name_of(getattr(algorithm, name))})"


def _pair(title: str, found: Any) -> Any:
    if not isinstance(found, tuple) or len(found) != 2:
        raise ConfigError(f"{title} must return a pair, got {_shapes(found)}.")
    return found


def _check_message(message: Any, tier: Tier, like: Params, algorithm: Algorithm) -> dict[str, Any]:
    """Shapes of the merged message; ConfigError unless it is a dict of parts that can be merged."""
    title = _title(algorithm, "client_final")
    if not isinstance(message, dict) or not message:
        raise ConfigError(f"{title} must return a dict of parts, got {message!r}.")
    if unknown := sorted(set(algorithm.weights) - set(message)):
        raise ConfigError(f"weights of parts {unknown}, but the message has {sorted(message)}.")
    shapes, merged = tier.shapes(like), {}
    several = len(jax.tree.leaves(shapes)) > 1
    for name, part in message.items():
        for leaf in jax.tree.leaves(part):
            if leaf.dtype != jnp.float32:
                raise ConfigError(f"part {name!r} of {title} must be float32, got {leaf.dtype}.")
        own = is_like(part, shapes)
        if several and not own and _structure(part) == _structure(shapes):
            raise ConfigError(
                f"part {name!r} of {title} does not match what tier {tier.name!r} owns: it has "
                f"{_shapes(part)}, the tier {_shapes(shapes)}."
            )
        merged[name] = like if own else part
    return merged


def _check_same(title: str, what: str, found: Any, expected: Any) -> None:
    if (_structure(found), _shapes(found)) != (_structure(expected), _shapes(expected)):
        raise ConfigError(
            f"{title} must keep the {what} as it is in tree, shapes and dtypes: got "
            f"{_shapes(found)}, expected {_shapes(expected)}."
        )


def _structure(tree: Any) -> Any:
    return jax.tree.flatten(tree)[1]


def _check_tree(what: str, made: Any, params: Params, tier: Tier) -> None:
    if _shapes(made) != _shapes(params):
        raise ConfigError(
            f"{what} in tier {tier.name!r} makes {_shapes(made)} of {_shapes(params)}; the tree, "
            "the shapes and the dtypes must stay."
        )


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)


def _batch(data: Dataset, size: int) -> Any:
    """Shapes of a batch in a test."""
    return _training_batch(data, size)._replace(round=None)


def _training_batch(data: Dataset, size: int) -> Any:
    return batch_shapes(size, data.image_shape)


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))
