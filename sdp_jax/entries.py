"""What one number per channel does to the entries of the channel's members."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sdp_jax.channels import Gone, without_lines
from sdp_jax.dimension import Dimension, Member, Role
from sdp_jax.factors import split_alike
from sdp_jax.groups import Groups
from sdp_jax.mesh import zero_like
from sdp_jax.tree import PyTree, leaf_table, replace_leaves


def entry_sums(
    groups: Groups, values: jax.Array, counted: Callable[[Dimension, Member], bool]
) -> dict[str, jax.Array]:
    """By path the sum of a value over the channels that an entry belongs to.

    For members of every role; the arrays broadcast to the leaves.
    """
    parts = split_alike(groups, values)
    found: dict[str, jax.Array] = {}
    for d in groups:
        padded = jnp.pad(parts[d.name], (0, 1))
        for m in d.members:
            if not counted(d, m):
                continue
            shape = groups.shapes[m.path]
            line = [1] * len(shape)
            line[m.axis] = shape[m.axis]
            along = padded[_channel_at(groups, d, m)].reshape(line)
            found[m.path] = found[m.path] + along if m.path in found else along
    return found


def _channel_at(groups: Groups, d: Dimension, m: Member) -> np.ndarray:
    """The channel at each position, or one past the last where there is none."""
    channel = np.full(groups.shapes[m.path][m.axis], d.size)
    channel[m.positions(d.size)] = np.arange(d.size)[:, None]
    return channel


def keep_channels(
    groups: Groups, tree: PyTree, keep: jax.Array, role: Role = "producer"
) -> PyTree:
    """Exact zeros in the members of the other channels, also where they are NaN."""
    gone = entry_sums(groups, jnp.where(keep, 0, 1), lambda d, m: m.role == role)
    kept = {
        path: jnp.where(zero_like(gone[path], leaf), leaf, jnp.zeros((), leaf.dtype))
        for path, leaf in leaf_table(tree).items()
        if path in gone
    }
    return replace_leaves(tree, kept)


def gone_lines(groups: Groups, alive: jax.Array) -> Gone:
    """By path, axis and dimension how many channels at a position are not alive.

    In producers and consumers.
    """
    parts = split_alike(groups, jnp.where(alive, 0, 1))
    found: dict[str, dict[int, dict[str, jax.Array]]] = {}
    for d in groups:
        padded = jnp.pad(parts[d.name], (0, 1))
        for m in d.members:
            if m.role == "state":
                continue
            along = padded[_channel_at(groups, d, m)]
            lines = found.setdefault(m.path, {}).setdefault(m.axis, {})
            lines[d.name] = lines[d.name] + along if d.name in lines else along
    return found


def living(groups: Groups, tree: PyTree, alive: jax.Array) -> PyTree:
    """A tree with zeros in all that makes or reads a channel that is not alive.

    Norms and scores of it do not change when a cut takes the zeros away.
    """
    gone = gone_lines(groups, alive)
    kept = {
        path: without_lines(leaf, gone[path])
        for path, leaf in leaf_table(tree).items()
        if path in gone
    }
    return replace_leaves(tree, kept)


def add_decay(
    groups: Groups,
    updates: PyTree,
    params: PyTree,
    rates: jax.Array,
    counted: Callable[[Dimension, Member], bool],
) -> PyTree:
    """Adds ``rate · w`` to the gradients of what counts, nothing where it is 0."""
    sums = entry_sums(groups, rates, counted)

    def add(update: jax.Array, param: jax.Array, rate: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(jnp.result_type(update, param), jnp.float32)
        decay = jnp.where(rate == 0, 0, rate * param.astype(dtype))
        return (update.astype(dtype) + decay).astype(update.dtype)

    slopes, table = leaf_table(updates), leaf_table(params)
    return replace_leaves(
        updates, {k: add(slopes[k], table[k], rate) for k, rate in sums.items()}
    )
