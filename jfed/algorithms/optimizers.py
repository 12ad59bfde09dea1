"""Optax optimizers by name or as functions, and what federated learning needs of their state."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jfed.errors import (
    ConfigError,
    JfedError,
    check_number,
    check_sequence,
    check_type,
    one_of,
)
from jfed.models.model import Params
from jfed.seeds import is_key

# From the learning rate, which may be a traced scalar.
MakeOptimizer = Callable[[Any], optax.GradientTransformation]


# Of an optimizer, by Optax's name of it: ("b1", 0.95).
Argument = tuple[str, bool | int | float | str]


def check_arguments(name: str, value: Any) -> tuple[Argument, ...]:
    """Arguments of an optimizer, given as a mapping or as pairs, sorted by name."""
    pairs = tuple(value.items()) if isinstance(value, Mapping) else check_sequence(name, value)
    pairs = tuple(
        (pair[0], pair[1].item())
        if isinstance(pair, tuple) and getattr(pair[1], "shape", None) == ()
        else pair
        for pair in pairs
    )
    for pair in pairs:
        is_pair = isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)
        if not (is_pair and isinstance(pair[1], bool | int | float | str)):
            raise ConfigError(f"{name} must be names with numbers, as eps=0.001, got {pair!r}.")
    if len({pair[0] for pair in pairs}) < len(pairs):
        raise ConfigError(f"{name} must name each argument once, got {pairs!r}.")
    return tuple(sorted(pairs))


def optimizer_from(
    optimizer: str | MakeOptimizer,
    momentum: float | None,
    arguments: Sequence[Argument] = (),
    *,
    title: str = "optimizer",
) -> MakeOptimizer:
    """An optimizer, given by Optax's name or as a function, as a function of the learning rate.

    Args:
      optimizer: by name or a function.
      momentum: None for Optax's default.
      arguments: further ones, of an optimizer by name.
      title: how errors call the optimizer.
    """
    if callable(optimizer):
        if momentum is not None or arguments:
            told = f"momentum {momentum!r}" if momentum is not None else f"{dict(arguments)!r}"
            raise ConfigError(f"{told} goes with an optimizer's name; a function sets its own.")
        return optimizer
    if not isinstance(optimizer, str):
        raise ConfigError(
            f"{title} must be an Optax name such as 'sgd', or a function from the learning rate "
            f"to a transformation such as optax.sgd itself, got {optimizer!r}."
        )
    makers = named_optimizers()
    maker = makers[one_of(title, optimizer, tuple(makers))]
    _, *own = inspect.signature(maker).parameters.values()  # the first is the learning rate
    defaults = {parameter.name: parameter.default for parameter in own}
    title, given = f"{title} {optimizer!r}", dict(arguments)
    if momentum is not None:
        if "momentum" not in defaults:
            raise ConfigError(f"{title} has no momentum, got momentum={momentum!r}.")
        if "momentum" in given:
            told = f"{momentum!r} and {given['momentum']!r}"
            raise ConfigError(f"momentum of {title} is given twice: {told}.")
        given["momentum"] = momentum
    for name, value in given.items():
        one_of(f"argument of {title}", name, tuple(defaults))
        _check_argument(f"{name} of {title}", name, value, defaults[name])
    return functools.partial(maker, **given)


# What Optax calls the decays of its moving averages, momentum among them.
_DECAYS = ("b1", "b2", "b3", "beta", "decay", "momentum", "rho")


def _check_argument(title: str, name: str, value: Any, default: Any) -> None:
    """Raises ConfigError for what makes no sense in any optimizer, and Optax does not check.

    All numbers are 0 or more; decays are below 1, unless their own default is 1.
    """
    if isinstance(default, bool):
        check_type(title, value, bool)
    elif name in _DECAYS or isinstance(default, float | int) or type(value) in (int, float):
        number = check_number(title, value, least=0.0)
        if name in _DECAYS and number >= 1 and (default is None or default < 1):
            raise ConfigError(f"{title} must be from 0 to below 1, got {value!r}.")


def named_optimizers() -> dict[str, Callable[..., optax.GradientTransformation]]:
    """The functions of Optax that make an optimizer of a learning rate."""
    return {
        name: maker
        for name, maker in sorted(vars(optax).items())
        if inspect.isfunction(maker)
        and not name.startswith(("_", "scale_by"))
        and next(iter(inspect.signature(maker).parameters), "") == "learning_rate"
    }


def try_optimizer(
    make: MakeOptimizer, given: Any, arguments: Sequence[Argument] = (), *, title: str = "optimizer"
) -> None:
    """Raises ConfigError unless the optimizer steps on gradients alone; computes nothing."""
    params = {"w": jax.ShapeDtypeStruct((3, 2), jnp.float32)}

    def step(params: Params) -> Params:
        optimizer = make(0.1)
        return optimizer.update(params, optimizer.init(params), params)[0]

    try:
        with jax.numpy_dtype_promotion("standard"):
            jax.eval_shape(step, params)
    except JfedError:
        raise
    except Exception as error:
        told = f" with {dict(arguments)}" if arguments else ""
        raise ConfigError(f"{title} {given!r}{told} cannot be used: {error}") from error


def rekeyed(state: Any, key: Array) -> Any:
    """An optimizer's state with random keys derived from `key` in place of its own.

    Optax's `noisy_sgd` and the like make their key from a fixed seed, so that every client of every
    round, and the server of every run, would draw the same noise. Typed keys, and raw ones (uint32
    of JAX's key shape), are found wherever they are in the state.
    """
    leaves, structure = jax.tree.flatten(state)
    raw = jax.random.key_data(key)

    def fresh(i: int, leaf: Array) -> Array:
        own = jax.random.fold_in(key, i)
        if is_key(leaf):
            return own
        is_raw = leaf.dtype == raw.dtype and leaf.shape == raw.shape
        return jax.random.key_data(own) if is_raw else leaf

    return jax.tree.unflatten(structure, [fresh(i, jnp.asarray(x)) for i, x in enumerate(leaves)])


def step_owned(
    optimizer: optax.GradientTransformation,
    update: Params,
    owners: Params,
    state: Any,
    variables: Params,
) -> tuple[Params, Any]:
    """A server's step on the negative update (Reddi et al. 2021, arXiv 2003.00295, algorithm 2).

    An entry that nobody owned in the round keeps its value, and the optimizer's memory of it stays
    too: that is what lies in the optimizer's state at the same path and has the same shape, of
    whatever precision, and for some of the variables only (`optax.masked`). Memory of other shapes
    (`optax.adafactor`), and how many steps were taken, go on.

    Args:
      optimizer: of the server, see `make_server_optimizer`.
      update: mean of the clients', what is to be added to the variables (new less old, not a
        gradient), a tree like them.
      owners: above 0 where an entry was delivered.
      state: of the optimizer.
      variables: of the server.

    Returns:
      The new variables and the new state.
    """
    gradient = jax.tree.map(jnp.negative, update)
    changes, after = optimizer.update(gradient, state, variables)

    changes = jax.tree.map(lambda change, w: jnp.where(w > 0, change, 0), changes, owners)
    by_path = dict(jax.tree_util.tree_leaves_with_path(owners))

    def remember(path: Any, new: Any, old: Any) -> Any:
        """Of the leaf of the variables that its path in the state ends with."""
        new, old = jnp.asarray(new), jnp.asarray(old)
        found = [by_path[path[i:]] for i in range(len(path) + 1) if path[i:] in by_path]
        is_like = found and found[0].shape == new.shape
        if not (is_like and jnp.issubdtype(new.dtype, jnp.floating)):
            return new
        return jnp.where(found[0] > 0, new, old)

    after = jax.tree_util.tree_map_with_path(remember, after, state)
    return optax.apply_updates(variables, changes), after
