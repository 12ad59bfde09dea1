"""Lossy codecs of what travels, and how an algorithm is given them.

A codec is a function in JAX: what the receiver makes of what was sent, which is what training sees.
The bytes that travel are those of `jfed.algorithms.messages.to_bytes`, measured on messages of the
run.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jfed.algorithms.algorithm import Algorithm, Client, Merged, Server
from jfed.errors import (
    ConfigError,
    calling,
    check_integer,
    check_sequence,
    check_share,
    check_type,
    did_you_mean,
    name_of,
)
from jfed.models.model import Params

# Folded into a client's last key, and into the server's: of their codecs.
_UP, _DOWN = (np.uint32(2**32 - i) for i in (7, 10))


class Codec(NamedTuple):
    """What becomes of a message on its way.

    Attributes:
      apply: `(tree, key) -> tree`, float32 arrays of the same shapes: what the receiver gets.
      feedback: add what was lost to the client's next message (error feedback: Seide et al. 2014;
        Karimireddy et al. 2019, arXiv 1901.09847), which it remembers from round to round.
      name: how reports call it.
    """

    apply: Callable[[Params, Array], Params]
    feedback: bool = False
    name: str = "own"


def cast(dtype: str) -> Codec:
    """Rounds to "float16" (what is finite and too large becomes its largest) or "bfloat16"."""
    most = float(jnp.finfo(dtype).max)

    def one(x: Array, key: Array) -> Array:
        del key
        bounded = jnp.where(jnp.isfinite(x), jnp.clip(x, -most, most), x)
        return bounded.astype(dtype).astype(jnp.float32)

    return Codec(_by_leaf(one))


def quantise(bits: int, *, by_channel: bool = False) -> Codec:
    """Stochastic uniform quantisation (QSGD, Alistarh et al. 2017, arXiv 1610.02132, section 3.1).

    With two bits or more the values are multiples from -L to L, L = 2^(bits - 1) - 1, of a step of
    a tensor (or of each channel, its last axis), its largest magnitude divided by L (section 5's
    scaling; section 3.1's is by the 2-norm) and rounded up to 8 bits of mantissa, so that all
    multiples are float32 numbers. With one bit they are plus or minus that magnitude. Zero stays
    zero, so it may follow a codec that leaves entries out. What is sent is right on average, to
    2^-17 of a step: 16 random bits an entry decide.

    Args:
      bits: of an entry, from 1 to 8.
      by_channel: a step for each index of the last axis.
    """
    check_integer("bits of a codec", bits, least=1, most=8)
    levels = max(2 ** (bits - 1) - 1, 1)

    def one(x: Array, key: Array) -> Array:
        axes = tuple(range(x.ndim - 1)) if by_channel and x.ndim > 1 else None
        step = _rounded_up(jnp.abs(x).max(axes, keepdims=True, initial=0) / levels)
        unit = x / jnp.where(step > 0, step, 1)
        chance = _uniform(key, x.shape)
        if bits == 1:
            sent = jnp.where(chance < (1 + unit) / 2, step, -step)
            return jnp.where(x == 0, 0, sent)
        return jnp.clip(jnp.floor(unit + chance), -levels, levels) * step + 0.0

    return Codec(_by_leaf(one))


def top_k(share: float) -> Codec:
    """The share of a tensor's entries that are largest in magnitude, with error feedback.

    The share is of what is not zero, as what a tier does not own is, or a codec before it leaves
    out; at least one entry. Magnitudes are told apart by 16 bits, and of those that are as large as
    the last one that is kept, all are.
    """
    check_share("share of a codec", share)

    def one(x: Array, key: Array) -> Array:
        del key
        count = jnp.ceil(share * jnp.count_nonzero(x).astype(jnp.float32))
        return jnp.where(_largest(x, count.astype(jnp.int32)), x, 0)

    return Codec(_by_leaf(one), feedback=True)


def random_k(share: float) -> Codec:
    """Each entry with this probability, with error feedback."""
    check_share("share of a codec", share)

    def one(x: Array, key: Array) -> Array:
        return jnp.where(_uniform(key, x.shape) < share, x, 0)

    return Codec(_by_leaf(one), feedback=True)


def sign() -> Codec:
    """Signs times the mean magnitude of a tensor, with error feedback (arXiv 1901.09847).

    The mean is over what is not zero, and zero stays zero: what a tier does not own, or a codec
    before it leaves out.
    """

    def one(x: Array, key: Array) -> Array:
        del key
        size = jnp.abs(x).sum() / jnp.maximum(jnp.count_nonzero(x), 1).astype(x.dtype)
        return jnp.where(x == 0, 0, jnp.where(x < 0, -size, size))

    return Codec(_by_leaf(one), feedback=True)


def chain(codecs: Sequence[Codec]) -> Codec:
    """One codec after another; feedback, where any has it, is of what all together lose."""

    def apply(tree: Params, key: Array) -> Params:
        for i, codec in enumerate(codecs):
            tree = codec.apply(tree, jax.random.fold_in(key, i))
        return tree

    return Codec(
        apply,
        feedback=any(codec.feedback for codec in codecs),
        name="+".join(codec.name for codec in codecs),
    )


@functools.lru_cache(maxsize=64)
def named(names: tuple[str, ...]) -> Codec:
    """The codecs of such names, one after another; ConfigError for a name that is none."""
    return chain([_named(name)._replace(name=name) for name in names])


_INTEGERS = tuple(f"int{bits}" for bits in range(1, 9))
_CHANNELS = tuple(f"{name}:channel" for name in _INTEGERS)
_NAMES = (
    "lossless", "float16", "bfloat16", "sign", "topk:S", "randk:S", *_INTEGERS, *_CHANNELS
)  # fmt: skip


def _named(name: str) -> Codec:
    if name == "lossless":
        return Codec(lambda tree, key: tree)
    if name in ("float16", "bfloat16"):
        return cast(name)
    if name == "sign":
        return sign()
    if found := re.fullmatch(r"int(0|[1-9][0-9]*)(:channel)?", name):
        return quantise(int(found[1]), by_channel=found[2] is not None)
    if found := re.fullmatch(r"(topk|randk):(.*)", name):
        return (top_k if found[1] == "topk" else random_k)(_share(name, found[2]))
    raise ConfigError(
        f"unknown codec {name!r}.{did_you_mean(name, _NAMES)} Allowed: 'lossless', 'float16', "
        "'bfloat16', 'int1' to 'int8', 'int1:channel' to 'int8:channel', 'sign', and 'topk:S' and "
        "'randk:S' with a share S above 0 and at most 1."
    )


def _share(name: str, text: str) -> float:
    share = math.nan
    with contextlib.suppress(ValueError):
        share = float(text)
    if not 0 < share <= 1:
        raise ConfigError(
            f"the share of codec {name!r} must be a number above 0 and at most 1, got {text!r}."
        )
    return share


@dataclasses.dataclass(frozen=True)
class CodecConfig:
    """How messages travel.

    Attributes:
      up: codecs of what clients send, one after another: "lossless" (which only measures),
        "float16", "bfloat16", "int1" to "int8" (stochastic quantisation of so many bits, with a
        scale a tensor; "int8:channel": a channel), "topk:0.05" and "randk:0.05" (that share of a
        tensor's entries), "sign"; the last three with error feedback.
      down: likewise of what the server sends, but for those that leave out entries.
    """

    up: tuple[str, ...] = ()
    down: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("up", "down"):
            names = check_sequence(f"codec_{name}", getattr(self, name))
            if not all(isinstance(one, str) for one in names):
                raise ConfigError(f"codec_{name} must be names such as 'int8', got {names!r}.")
            object.__setattr__(self, name, names)
            codec = named(names)
            if name == "down":
                _check_down(codec, names)


def _check_down(codec: Codec, given: Any) -> None:
    if codec.feedback:
        raise ConfigError(
            f"codec_down {given!r} cannot be: what the server sends are weights, of which "
            "nothing can be made up for later; use lossless, float16, bfloat16 or int1 to int8."
        )


def compressed(
    algorithm: Algorithm,
    up: Any = None,
    down: Any = None,
) -> Algorithm:
    """An algorithm whose messages go through codecs.

    Where an algorithm keeps of a message what it meant to send, as SCAFFOLD's clients keep c_i, the
    server has what arrived: its c is the mean of the c_i up to what codecs without feedback lost.

    Args:
      algorithm: any that is not private yet.
      up: of the parts of clients' messages that are like the variables, each by itself: a `Codec`,
        its function alone, a name as of `CodecConfig`, or several of these. Clients that have error
        feedback remember a tree for each such part. Other parts, a few numbers, go as they are.
      down: likewise, of all float32 arrays that the server sends.

    Returns:
      Another algorithm; equal arguments give the same object.

    Raises:
      ConfigError: a name that is none, a codec that cannot go down, a private algorithm.
    """
    check_type("algorithm", algorithm, Algorithm)
    codecs = [_as_codec(given) for given in (up, down)]
    if codecs[1] is not None:
        _check_down(codecs[1], down)
    if codecs == [None, None]:
        return algorithm
    if algorithm.is_private:
        raise ConfigError("a codec after the clip could exceed it: compress first, then `private`.")
    return _compressed(algorithm, *codecs)


def _as_codec(given: Any) -> Codec | None:
    if given is None:
        return None
    if isinstance(given, str | bytes | Codec) or not isinstance(given, Sequence):
        return _one_codec(given)
    if all(isinstance(one, str) for one in given):
        return named(tuple(given)) if given else None
    return chain([_one_codec(one) for one in given])


def _one_codec(given: Any) -> Codec:
    if isinstance(given, str):
        return named((given,))
    if callable(given):
        return Codec(given, name=name_of(given))
    if isinstance(given, Codec) and callable(given.apply):
        return given
    raise ConfigError(
        f"a codec must be a name such as 'int8', a function of a tree and a key, a Codec, or a "
        f"sequence of these, got {given!r}."
    )


@functools.lru_cache(maxsize=64)
def _compressed(algorithm: Algorithm, up: Codec | None, down: Codec | None) -> Algorithm:
    found = algorithm if down is None else _sent_through(algorithm, down)
    found = found if up is None else _answered_through(found, up)
    told = "".join(f", {codec.name} {way}" for way, codec in (("up", up), ("down", down)) if codec)
    return dataclasses.replace(found, measured=True, name=algorithm.name + told)


def _sent_through(algorithm: Algorithm, codec: Codec) -> Algorithm:
    """With a codec of what the server sends; its keys are those of the rounds before."""

    def inner(server: Server) -> Server:
        return server._replace(state=server.state[0])

    def send(server: Server) -> Any:
        key = jax.random.wrap_key_data(server.state[1])
        return _applied(codec, algorithm.send(inner(server)), key)

    def server_step(server: Server, merged: Merged) -> Server:
        after = algorithm.server_step(inner(server), merged)
        key = jax.random.fold_in(merged.key, _DOWN)
        return Server(after.variables, (after.state, jax.random.key_data(key)))

    def server_init(variables: Params) -> Any:
        return algorithm.server_init(variables), jax.random.key_data(jax.random.key(0))

    return dataclasses.replace(
        algorithm, send=send, server_step=server_step, server_init=server_init
    )


def _applied(codec: Codec, tree: Params, key: Array) -> Params:
    """What a codec makes of a tree; ConfigError if that has other shapes."""
    title = f"codec {name_of(codec.apply)}"
    with calling(f"{title}, a function of a tree and a key,"):
        sent = codec.apply(tree, key)
    told = [jax.tree.map(lambda x: (x.shape, str(x.dtype)), t) for t in (sent, tree)]
    if told[0] != told[1]:
        raise ConfigError(
            f"{title} makes {told[0]} of {told[1]}; the tree, the shapes and the dtypes must stay."
        )
    return sent


class _Kept(NamedTuple):
    """What a client remembers: of its algorithm, and what its messages lost, by part."""

    own: Any
    lost: Any


def _answered_through(algorithm: Algorithm, codec: Codec) -> Algorithm:
    """With a codec of what clients send."""
    parts = algorithm.parts if codec.feedback else ()

    def client_init(client: Client, memory: _Kept, key: Array) -> _Kept:
        return _Kept(algorithm.client_init(client, memory.own, key), memory.lost)

    def client_step(client: Client, local: _Kept, batch: Any, key: Array) -> tuple[_Kept, Any]:
        after, metrics = algorithm.client_step(client, local.own, batch, key)
        return _Kept(after, local.lost), metrics

    def client_final(client: Client, local: _Kept, key: Array) -> tuple[dict[str, Any], _Kept]:
        message, memory = algorithm.client_final(client, local.own, key)
        if missing := sorted(set(algorithm.parts) - set(message)):
            raise ConfigError(f"a codec needs the parts {missing}, got {sorted(message)}.")
        message, lost = client.own(message), dict(local.lost)
        for i, name in enumerate(algorithm.parts):
            own_key = jax.random.fold_in(jax.random.fold_in(key, _UP), i)
            given = message[name]
            if name in lost:
                given = client.own({name: jax.tree.map(jnp.add, given, lost[name])})[name]
            sent = client.own({name: _applied(codec, given, own_key)})[name]
            if name in lost:
                lost[name] = jax.tree.map(jnp.subtract, given, sent)
            message[name] = sent
        return message, _Kept(memory, lost)

    def memory_init(variables: Params) -> _Kept:
        zeros = {name: jax.tree.map(jnp.zeros_like, variables) for name in parts}
        return _Kept(algorithm.memory_init(variables), zeros)

    own = algorithm.personalise
    return dataclasses.replace(
        algorithm,
        client_init=client_init,
        client_step=client_step,
        client_final=client_final,
        memory_init=memory_init,
        personalise=own and (lambda sent, memory: own(sent, memory.own)),
    )


def _by_leaf(one: Callable[[Array, Array], Array]) -> Callable[[Params, Array], Params]:
    """A function of an array and a key, over all float32 arrays of a tree."""

    def apply(tree: Params, key: Array) -> Params:
        leaves, structure = jax.tree.flatten(tree)
        found = [
            one(jnp.asarray(leaf), jax.random.fold_in(key, i))
            if leaf.dtype == jnp.float32
            else leaf
            for i, leaf in enumerate(leaves)
        ]
        return jax.tree.unflatten(structure, found)

    return apply


def _uniform(key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Uniform numbers of 16 bits, above 0 and below 1: half as expensive as those of 32."""
    count = math.prod(shape)
    bits = jax.random.bits(key, (-(-count // 2),), jnp.uint32)
    halves = (bits[None] >> jnp.asarray([[0], [16]], jnp.uint32)) & jnp.uint32(0xFFFF)
    return (halves.reshape(-1)[:count].reshape(shape).astype(jnp.float32) + 0.5) / 2**16


def _rounded_up(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Positive numbers rounded up to 8 bits of mantissa."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type((bits + 0xFFFF) & jnp.uint32(0xFFFF0000), jnp.float32)


@jax.jit
def _largest(x: Float[Array, "..."], count: Int[Array, ""]) -> Bool[Array, "..."]:
    """Where the magnitude is among the `count` largest, bisected over the upper 16 bits of it.

    A sort of 1.6 M entries takes XLA's CPU compiler 0.4 s, this 0.01.
    """
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)

    def narrow(i: Int[Array, ""], least: Int[Array, ""]) -> Int[Array, ""]:
        higher = least | (jnp.int32(1) << (30 - i))
        return jnp.where((bits >= higher).sum() >= count, higher, least)

    return bits >= jax.lax.fori_loop(0, 16, narrow, jnp.int32(0))
