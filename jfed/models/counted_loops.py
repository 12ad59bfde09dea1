"""A loop whose length is data, with an exact reverse-mode gradient.

JAX differentiates loops of a static length only. Here the length is an argument of the program, so
one compiled program serves every length up to a bound, and no step beyond the length is computed.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Array, Int

Count = Int[Array, ""]


class _Kept(NamedTuple):
    """A residual of the steps: of each one, `[most, ...]`, or `fixed`, the same for all."""

    each: Any
    fixed: Any


def repeat(
    step: Callable[[Count, Array], Array],
    z: Array,
    count: Count,
    *,
    most: int,
    largest: Count | None = None,
) -> Array:
    """Z after `count` steps: `z = step(k, z)` for k = 0, 1, ...

    The gradient (reverse mode, once) is that of the steps that ran, and reaches all floating-point
    arrays that `step` closes over. What a step's `jax.vjp` keeps is stored in buffers of `most`
    entries and read backwards; what it keeps that depends on neither k nor z, such as kernels, is
    stored once.

    Args:
      step: maps the step's number and z to the next z, of the same shape and dtype.
      z: before the first step.
      count: how many steps, from 0 to `most`.
      most: the largest count that the program serves.
      largest: under `vmap` over different counts, a scalar that is not mapped and that no count of
        the lanes exceeds: all lanes run so many steps and drop those beyond their own count.
        (Without it JAX runs to the largest count by itself, but copies all buffers at each step.)
    """
    closed = jax.make_jaxpr(step)(jnp.zeros((), jnp.int32), z)
    is_smooth = [jnp.issubdtype(jax.typeof(c).dtype, jnp.inexact) for c in closed.consts]
    smooth = [c for c, s in zip(closed.consts, is_smooth, strict=True) if s]
    other = [c for c, s in zip(closed.consts, is_smooth, strict=True) if not s]
    like = [jax.typeof(c) for c in smooth]
    jaxpr = closed.jaxpr

    def one(k: Count, z: Array, smooth: Sequence[Array], other: Sequence[Any]) -> Array:
        left = {True: iter(smooth), False: iter(other)}
        return jaxpr_as_fun(ClosedJaxpr(jaxpr, [next(left[s]) for s in is_smooth]))(k, z)[0]

    def kept(k: Count, new: Any, old: Any, count: Count) -> Any:
        """The new values in a lane whose step k counts, else the old ones."""
        if largest is None:
            return new
        return jax.tree.map(lambda n, o: jnp.where(k < count, n, o), new, old)

    @jax.custom_vjp
    def loop(count, bound, z, smooth, other):  # type: ignore[no-untyped-def]
        return jax.lax.fori_loop(
            0, bound, lambda k, z: kept(k, one(k, z, smooth, other), z, count), z
        )

    def forward(count, bound, z, smooth, other):  # type: ignore[no-untyped-def]
        def linear(k: Count, z: Array, smooth: Any, other: Any) -> Any:
            return jax.vjp(lambda z, smooth: one(k, z, smooth, other), z, smooth)

        arguments = (jnp.zeros((), jnp.int32), z, smooth, other)
        traced, (_, shapes) = jax.make_jaxpr(linear, return_shape=True)(*arguments)
        shapes, structure = jax.tree.flatten(shapes)
        flat = jax.tree.leaves(arguments[2:])
        fixed = _invariants(traced, flat)

        def body(k: Count, carry: Any) -> Any:
            z, buffers = carry
            end, *leaves = jaxpr_as_fun(traced)(k, z, *flat)
            buffers = [
                b if b is None else jax.lax.dynamic_update_index_in_dim(b, leaf, k, 0)
                for b, leaf in zip(buffers, leaves, strict=True)
            ]
            return kept(k, end, z, count), buffers

        empty = [
            jax.lax.empty((most, *s.shape), s.dtype) if f is None else None
            for s, f in zip(shapes, fixed, strict=True)
        ]
        z, buffers = jax.lax.fori_loop(0, bound, body, (z, empty))
        found = [_Kept(b, f) for b, f in zip(buffers, fixed, strict=True)]
        return z, (count, bound, jax.tree.unflatten(structure, found))

    def backward(residuals, gradient):  # type: ignore[no-untyped-def]
        count, bound, pullback = residuals

        def at(k: Count, kept: _Kept) -> Any:
            if kept.each is None:
                return kept.fixed
            return jax.lax.dynamic_index_in_dim(kept.each, k, 0, keepdims=False)

        def body(i: Count, carry: Any) -> Any:
            dz, ds = carry
            k = bound - 1 - i
            through, more = jax.tree.map(
                lambda r: at(k, r), pullback, is_leaf=lambda r: isinstance(r, _Kept)
            )(dz)
            more = kept(k, more, jax.tree.map(jnp.zeros_like, more), count)
            return kept(k, through, dz, count), jax.tree.map(jnp.add, ds, more)

        zeros = [jnp.zeros(s.shape, s.dtype) for s in like]
        dz, ds = jax.lax.fori_loop(0, bound, body, (gradient, zeros))
        return None, None, dz, ds, None

    loop.defvjp(forward, backward)
    return loop(count, count if largest is None else largest, z, smooth, other)


def _invariants(step: ClosedJaxpr, consts: Sequence[Any]) -> list[Any]:
    """The outputs of a step but the first that depend on its arguments after k and z alone.

    Args:
      step: `step(k, z, *consts) -> (z, *others)`.
      consts: the arguments after k and z.
    """
    found: list[Any] = []
    for i in range(1, len(step.jaxpr.outvars)):
        wanted = [i == j for j in range(len(step.jaxpr.outvars))]
        jaxpr, (by_k, by_z, *by_consts) = dce_jaxpr(step.jaxpr, wanted)
        if by_k or by_z:
            found.append(None)
        else:
            used = [c for c, u in zip(consts, by_consts, strict=True) if u]
            found.append(jaxpr_as_fun(ClosedJaxpr(jaxpr, step.consts))(*used)[0])
    return found
