"""What models, optimizers and measures must be: checked on shapes, before anything compiles."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jfed.algorithms.aggregators import Aggregator, Stack
from jfed.algorithms.clients import ClientConfig, make_optimizer
from jfed.algorithms.optimizers import MakeOptimizer
from jfed.data import Dataset
from jfed.errors import ConfigError, calling, name_of, shown
from jfed.models.losses import Metrics, batch_shapes, training_loss
from jfed.models.model import Params, by_name
from jfed.simulation.evaluation import EvaluationConfig
from jfed.simulation.scores import METRICS, column
from jfed.tiers.parts import is_like
from jfed.tiers.tier import Tier, Tiers, check_extract

_TOLD = 5  # leaves that differ


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
                f"mask of tier {tier.name!r} must be like the tier's variables: "
                f"{difference(mask, params)}."
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
            f"{title} maps images {batch.images.shape} to {shapes_of(logits)}; expected logits "
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
    params, batch = tier.shapes(like), training_batch(data, config.batch_size)
    title = f"the loss of tier {tier.name!r}"
    loss = training_loss(tier.bound())
    with calling(title, images=batch.images):
        value, metrics = check_pair(title, jax.eval_shape(loss, params, batch, key_shape()))
    _check_scalars(title, value)
    check_metrics(title, metrics)
    with calling(
        f"optimizer {name_of(config.optimizer)} of tier {tier.name!r}",
        gradient=shapes_of(params),
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
        raise ConfigError(f"evaluation measure {title} must give a dict, got {shapes_of(found)}.")
    _check_scalars(f"evaluation measure {title}", found)
    names = tuple(by_name(found))
    for name in sorted(set(names) & set(map(column, METRICS))):
        raise ConfigError(f"evaluation measure {title} gives {name!r}, a name of jfed's own.")
    return names


def check_metrics(title: str, metrics: Any) -> None:
    """Raises ConfigError unless these are the metrics of a training step, or their shapes."""
    if not isinstance(metrics, Metrics):
        raise ConfigError(f"{title} must return jfed.models.Metrics, got {shapes_of(metrics)}.")
    _check_scalars(title, metrics)


def _check_scalars(title: str, metrics: Any) -> None:
    if any((x.shape, x.dtype) != ((), jnp.float32) for x in jax.tree.leaves(metrics)):
        raise ConfigError(
            f"{title} must give float32 scalars, sums over examples, got {shapes_of(metrics)}."
        )


def _optimizer_step(make: MakeOptimizer) -> Any:
    def step(params: Params, gradient: Params) -> Params:
        optimizer = make(0.1)
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        return jax.tree.map(lambda p, u: p + u, params, updates)

    return step


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
    check_same(title, "update", found, like)


def check_pair(title: str, found: Any) -> Any:
    """Returns the pair; ConfigError if it is none."""
    if not isinstance(found, tuple) or len(found) != 2:
        raise ConfigError(f"{title} must return a pair, got {shapes_of(found)}.")
    return found


def check_same(title: str, what: str, found: Any, expected: Any) -> None:
    """Raises ConfigError unless two pytrees have one structure, and the same shapes and dtypes."""
    if found_other := difference(found, expected):
        raise ConfigError(
            f"{title} must keep the {what} as it is in tree, shapes and dtypes: {found_other}."
        )


def difference(found: Any, expected: Any) -> str:
    """In which leaves two pytrees of arrays, or of shapes, differ; "" if in none."""
    here, there = _leaves(found), _leaves(expected)
    if structure_of(found) == structure_of(expected):
        pairs = [(name, a, b) for (name, a), (_, b) in zip(here, there, strict=True)]
    else:
        own, other = dict(here), dict(there)
        names = dict.fromkeys((*other, *own))
        pairs = [(n, own.get(n, "missing"), other.get(n, "nothing")) for n in names]
    lines = [f"{name} is {a}, expected {b}" for name, a, b in pairs if a != b]
    if not lines and structure_of(found) != structure_of(expected):
        return f"its tree is {shown(structure_of(found))}, not {shown(structure_of(expected))}"
    more = f"; and {len(lines) - _TOLD} more leaves" if len(lines) > _TOLD else ""
    return "; ".join(lines[:_TOLD]) + more


def _leaves(tree: Any) -> list[tuple[str, str]]:
    """Path, and type and shape, of each leaf."""
    return [
        (jax.tree_util.keystr(path) or "it", f"{x.dtype}{list(x.shape)}")
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    ]


def structure_of(tree: Any) -> Any:
    """Of a pytree whose leaves may be no arrays."""
    return jax.tree.flatten(tree)[1]


def _check_tree(what: str, made: Any, params: Params, tier: Tier) -> None:
    if found_other := difference(made, params):
        raise ConfigError(
            f"the tree, the shapes and the dtypes must stay in {what} in tier {tier.name!r}: "
            f"{found_other}."
        )


def shapes_of(tree: Any) -> Any:
    """Shapes and dtypes as errors tell them."""
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)


def _batch(data: Dataset, size: int) -> Any:
    """Shapes of a batch in a test."""
    return training_batch(data, size)._replace(round=None)


def training_batch(data: Dataset, size: int) -> Any:
    """Shapes of a client's batch."""
    return batch_shapes(size, data.image_shape)


def key_shape() -> Any:
    """Of a key of JAX."""
    return jax.eval_shape(lambda: jax.random.key(0))
