"""A loop whose length is data, with an exact reverse-mode gradient.

JAX differentiates loops of a static length only. Here the length is an argument of the program, so
one compiled program serves every length up to a bound, and no step beyond the length is computed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Array, Int

Count = Int[Array, ""]


_SMALL = 2**14  # bytes up to which arrays of a type are handled as one: each costs a kernel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Kept:
    """What `jax.vjp` of the steps keeps.

    Attributes:
      fixed: the residuals that are the same for all steps; None in place of the others.
      each: the others, `[most, ...]`, as `_together` has them.
      shapes: of the others, of one step.
      structure: of the pullback, whose leaves the residuals are.
    """

    fixed: list[Any]
    each: list[Array]
    shapes: tuple[Any, ...] = dataclasses.field(metadata={"static": True})
    structure: Any = dataclasses.field(metadata={"static": True})

    def pullback(self, k: Count) -> Callable[[Array], Any]:
        """That of step k."""
        others = iter(_apart([_take(b, k) for b in self.each], self.shapes))
        found = [next(others) if f is None else f for f in self.fixed]
        return jax.tree.unflatten(self.structure, found)


def _groups(shapes: Sequence[Any]) -> list[list[int]]:
    """Which of several arrays are handled as one, by their places."""
    groups: dict[Any, list[int]] = {}
    for i, s in enumerate(shapes):
        is_small = s.size * s.dtype.itemsize <= _SMALL
        groups.setdefault(s.dtype if is_small else i, []).append(i)
    return list(groups.values())


def _together(leaves: Sequence[Array]) -> list[Array]:
    """Arrays, with small ones of a type in one, flat."""
    return [
        jnp.concatenate([leaves[i].ravel() for i in group]) if len(group) > 1 else leaves[group[0]]
        for group in _groups(leaves)
    ]


def _apart(arrays: Sequence[Array], shapes: Sequence[Any]) -> list[Array]:
    """What `_together` made of arrays of such shapes, taken apart."""
    found: dict[int, Array] = {}
    for array, group in zip(arrays, _groups(shapes), strict=True):
        if len(group) == 1:
            found[group[0]] = array
            continue
        ends = np.cumsum([shapes[i].size for i in group])[:-1]
        for i, part in zip(group, jnp.split(array, ends), strict=True):
            found[i] = part.reshape(shapes[i].shape)
    return [found[i] for i in range(len(shapes))]


# Under `vmap` with k the same for all, JAX would make a scatter and a gather of the next two.


@jax.custom_batching.custom_vmap
def _put(buffer: Array, value: Array, k: Count) -> Array:
    """The buffer with a value at k."""
    return jax.lax.dynamic_update_index_in_dim(buffer, value, k, 0)


@_put.def_vmap
def _put_lanes(lanes: int, batched: Any, buffer: Array, value: Array, k: Count) -> Any:
    if batched[2]:
        return jax.vmap(lambda b, v, k: b.at[k].set(v), [0 if x else None for x in batched])(
            buffer, value, k
        ), True
    buffer, value = (
        x if is_batched else jnp.broadcast_to(x, (lanes, *x.shape))
        for x, is_batched in zip((buffer, value), batched, strict=False)
    )
    return jax.lax.dynamic_update_index_in_dim(buffer, value, k, 1), True


@jax.custom_batching.custom_vmap
def _take(buffer: Array, k: Count) -> Array:
    """What the buffer has at k."""
    return jax.lax.dynamic_index_in_dim(buffer, k, 0, keepdims=False)


@_take.def_vmap
def _take_lanes(lanes: int, batched: Any, buffer: Array, k: Count) -> Any:
    if batched[1]:
        return jax.vmap(lambda b, k: b[k], [0 if x else None for x in batched])(buffer, k), True
    return jax.lax.dynamic_index_in_dim(buffer, k, 1, keepdims=False), True


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
    like = [jax.ShapeDtypeStruct(c.shape, c.dtype) for c in smooth]
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
            each = _together([leaves[i] for i in changing])
            buffers = [_put(b, leaf, k) for b, leaf in zip(buffers, each, strict=True)]
            return kept(k, end, z, count), buffers

        changing = [i for i, f in enumerate(fixed) if f is None]
        changes = tuple(jax.ShapeDtypeStruct(shapes[i].shape, shapes[i].dtype) for i in changing)
        empty = [
            jax.lax.empty((most, *s.shape), s.dtype) for s in jax.eval_shape(_together, changes)
        ]
        z, buffers = jax.lax.fori_loop(0, bound, body, (z, empty))
        return z, (count, bound, _Kept(fixed, buffers, changes, structure))

    def backward(residuals, gradient):  # type: ignore[no-untyped-def]
        count, bound, steps = residuals

        def body(carry: Any) -> Any:
            k, dz, ds = carry
            through, more = steps.pullback(k)(dz)
            more = kept(k, more, jax.tree.map(jnp.zeros_like, more), count)
            ds = jax.tree.map(jnp.add, ds, _together(more))
            return k - 1, kept(k, through, dz, count), ds

        zeros = [jnp.zeros(s.shape, s.dtype) for s in jax.eval_shape(_together, like)]
        start = bound - 1, gradient, zeros
        _, dz, ds = jax.lax.while_loop(lambda carry: carry[0] >= 0, body, start)
        return None, None, dz, _apart(ds, like), None

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
