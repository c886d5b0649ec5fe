"""Whole layers: which of them the outputs need least, and a cut without them."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from sdp_jax.cut import Cut
from sdp_jax.factors import scale_channels
from sdp_jax.groups import Groups, need_groups
from sdp_jax.modules import take_apart
from sdp_jax.tree import PyTree


def layer_influence(fn: Callable[..., Any], groups: Groups, *args: Any) -> dict:
    """How much the outputs change when a removable dimension is left out.

    One minus the cosine of the outputs with and without it, over the entries of all
    floating-point outputs. The least go first (:func:`cut_layers`). It takes one call
    of the function for each removable dimension, and one more.

    Args:
      fn: the function that the groups were found on, or another one of the same
        parameters, that returns hidden states for example; or a module.
      groups: the channel dimensions.
      *args: the parameters (not behind a module), then the inputs.

    Returns:
      By name of each removable dimension a number from 0 (it changes nothing) to 2.

    Raises:
      ValueError: if no dimension is removable, the parameters do not fit the groups,
        or an output is not finite or zero throughout.
      TypeError: if ``groups`` is of another kind.

    References:
      Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You
      Expect", arXiv 2403.03853, eq. 1, measure block influence between the input and
      the output of a block; here it is taken at the outputs of the function, so that
      no block has to be named.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"up": jnp.ones((2, 3)), "down": jnp.zeros((3, 2))}
      >>> fn = lambda p, x: x + jnp.tanh(x @ p["up"]) @ p["down"]
      >>> groups = sdp_jax.find_groups(fn, params, jnp.ones((1, 2)))
      >>> sdp_jax.layer_influence(fn, groups, params, jnp.ones((1, 2)))
      {'up': 0.0}
    """
    need_groups(groups)
    fn, params, inputs = take_apart(fn, args)
    names = [d.name for d in groups if d.removable]
    if not names:
        raise ValueError(
            "no dimension of these groups is removable: none lies in a branch that the "
            "function could do without (groups that were made by hand do not know)"
        )
    run = jax.jit(
        lambda alive: _flat(fn(scale_channels(groups, params, alive), *inputs))
    )

    def without(name: str | None) -> jax.Array:
        parts = {
            d.name: jnp.full(d.size, 0.0 if d.name == name else 1.0) for d in groups
        }
        return run(groups.join(parts))

    whole, found = without(None), {}
    for name in names:
        other = without(name)
        size = jnp.linalg.norm(whole) * jnp.linalg.norm(other)
        cosine = float(jnp.vdot(whole, other).real / size)
        if not math.isfinite(cosine):
            raise ValueError(
                f"the outputs without {name!r}, or those of the whole function, are "
                "zero or not finite, and have no angle to one another"
            )
        found[name] = max(0.0, 1 - cosine)
    return found


def cut_layers(groups: Groups, names: Iterable[str]) -> Cut:
    """A cut of whole layers.

    Args:
      groups: the channel dimensions.
      names: removable dimensions that go whole. What has no entries left without them
        goes along: the dimensions of a head where the heads go.

    Returns:
      A cut of these alone; ``cut.zero(params)`` shows what the function becomes.

    Raises:
      ValueError: if a dimension is not removable.
      KeyError: if there is no dimension of that name.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"up": jnp.ones((2, 3)), "down": jnp.zeros((3, 2))}
      >>> fn = lambda p, x: x + jnp.tanh(x @ p["up"]) @ p["down"]
      >>> groups = sdp_jax.find_groups(fn, params, jnp.ones((1, 2)))
      >>> sdp_jax.cut_layers(groups, ["up"]).widths["up"]
      0
    """
    need_groups(groups)
    gone = {groups[name].name for name in names}
    firm = sorted(name for name in gone if not groups[name].removable)
    if firm:
        some = [d.name for d in groups if d.removable]
        raise ValueError(
            f"the dimensions {firm} cannot vanish: the outputs would no longer depend "
            f"on the inputs. Those that can are {some}"
        )
    while True:
        cut = Cut(
            groups,
            tuple(() if d.name in gone else tuple(range(d.size)) for d in groups),
        )
        empty = {path for path, shape in cut.small_shapes.items() if 0 in shape}
        more = {
            d.name
            for d in groups
            if d.removable and all(m.path in empty for m in d.producers)
        }
        if more <= gone:
            return cut
        gone |= more


def _flat(outputs: PyTree) -> jax.Array:
    """All floating-point entries as one vector, at least float32."""
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(outputs)]
    lines = [x.reshape(-1) for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
    dtype = jnp.result_type(jnp.float32, *lines)
    return jnp.concatenate([jnp.zeros(0, dtype), *(x.astype(dtype) for x in lines)])
