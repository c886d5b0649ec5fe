"""The PQ Index, a measure of sparsity, and how much it says can be pruned."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sdp_jax.base import check_kind
from sdp_jax.channels import channel_norms, channels_alive, producer_leaves
from sdp_jax.checks import check_number
from sdp_jax.dimension import Dimension
from sdp_jax.groups import Groups
from sdp_jax.mesh import replicated
from sdp_jax.tree import PyTree, leaf_table

Scope = Literal["global", "tensor", "row", "dimension", "channel"]
# Values, and which of them count (None for all).
Part = tuple[jax.Array, jax.Array | None]


def pq_index(
    tree: PyTree,
    p: float = 0.5,
    q: float = 1.0,
    *,
    scope: Scope = "global",
    groups: Groups | None = None,
    of: Literal["weights", "norms"] = "weights",
    mask: PyTree | None = None,
    axis: int = -1,
) -> Any:
    """How sparse numbers are, from 0 (all of one magnitude) towards 1.

    For ``d`` numbers ``w`` and ``0 < p < q`` it is ::

        I(w) = 1 − d^(1/q − 1/p) ‖w‖_p / ‖w‖_q        0 ≤ I ≤ 1 − d^(1/q − 1/p)

    and the upper bound is that of one number among zeros. It changes neither with the
    scale nor when all numbers are repeated, so that layers of different sizes compare.
    Where there is no number, or all are zero, the index is not defined; it is 0 here.

    Args:
      tree: the parameters, or any pytree of arrays.
      p: the smaller exponent.
      q: the larger one; the paper's settings are (0.5, 1) and (1, 2).
      scope: what one index is taken over. ``"global"``: all leaves, or all producers of
        ``groups`` if they are given; ``"tensor"``: each leaf; ``"row"``: each output of
        a leaf (the paper's neuron); with groups ``"dimension"``: the producers of each
        dimension, or ``"channel"``: those of each channel.
      groups: the channel dimensions.
      of: with groups, ``"weights"`` for the entries, ``"norms"`` for the Euclidean
        norms of the channels.
      mask: a tree of the same structure, Boolean arrays: only entries that are True
        count, and ``d`` is their number; of norms, only channels with such an entry.
        ``None``: all entries count, also those that are zero.
      axis: for ``"row"``, the output axis; the last in kernels of Flax. Leaves without
        axes are one row.

    Returns:
      ``"global"``: a scalar; ``"tensor"``: a tree of scalars; ``"row"``: a tree of
      vectors ``(outputs,)``; ``"dimension"``: a scalar for each name; ``"channel"``: a
      vector ``(num_channels,)``. At least float32.

    Raises:
      ValueError: if not ``0 < p < q``, the scope does not go with ``groups`` or ``of``,
        or mask and tree differ.
      TypeError: if an argument is of another kind.

    References:
      Diao, Wang, Zhang, Yang, Ding, Tarokh, "Pruning Deep Neural Networks from a
      Sparsity Perspective", ICLR 2023, arXiv 2302.05601, Theorem 1; the axioms that it
      fulfils are those of Hurley and Rickard, arXiv 0811.4706. Channel norms are our
      own extension.

    Example:
      >>> import jax.numpy as jnp
      >>> from sdp_jax import methods
      >>> methods.pq_index({"w": jnp.array([2., 2., -2., 2.])}).item()
      0.0
      >>> methods.pq_index({"w": jnp.array([0., 0., 3., 0.])}).item()  # 1 − 4^(1 − 2)
      0.75
    """
    check_exponents(p, q)
    table = leaf_table(tree)
    masks = {} if mask is None else _check_mask(tree, mask)
    check_scope(scope, groups, ("global", "dimension", "channel"))
    _check_of(of, groups, scope)
    arrays = {path: jnp.asarray(leaf) for path, leaf in table.items()}

    if groups is None:
        pairs = [(leaf, masks.get(path)) for path, leaf in arrays.items()]
        if scope == "global":
            return index_of(pairs, p, q)
        over = None if scope == "tensor" else 1
        if over:
            pairs = [(_rows(x, axis), _rows(alive, axis)) for x, alive in pairs]
        values = [index_of([pair], p, q, over) for pair in pairs]
        return jax.tree.unflatten(jax.tree.structure(tree), values)

    check_kind(groups)
    producer_leaves(groups, tree)
    if of == "norms":
        parts = {k: [v] for k, v in _norms(groups, arrays, masks).items()}
    else:
        parts = {d.name: _entries(groups, d, arrays, masks) for d in groups}
    if scope == "global":
        return index_of([x for part in parts.values() for x in part], p, q)
    over = 1 if scope == "channel" else None
    found = {name: index_of(part, p, q, over) for name, part in parts.items()}
    return groups.join(found) if scope == "channel" else found


def pq_bound(index: Any, d: Any, p: float = 0.5, q: float = 1.0, eta: Any = 0.0) -> Any:
    """How many of ``d`` numbers a given PQ Index forces to be large, at least.

    ``r = d (1 + η)^(−q / (q − p)) (1 − I)^(q p / (q − p))``: if the ``r`` largest
    magnitudes hold all but the share ``η`` of what they sum up to,
    ``Σ_rest |w|^p ≤ η Σ_r |w|^p``, then there are at least so many of them.

    Args:
      index: the PQ Index ``I``; a number or an array.
      d: how many numbers there are.
      p: the smaller exponent.
      q: the larger one.
      eta: the share ``η``, at least 0.

    Returns:
      ``r``, not rounded. It is computed by JAX if ``index`` or ``d`` is a JAX array,
      otherwise by NumPy in float64.

    Raises:
      ValueError: if not ``0 < p < q``, or ``eta`` is negative.
      TypeError: if an argument is of another kind.

    References:
      Diao et al., arXiv 2302.05601, Theorem 2.

    Example:
      >>> from sdp_jax import methods
      >>> methods.pq_bound(0.75, 4).item()  # One large number among zeros.
      1.0
    """
    check_exponents(p, q)
    check_number("eta", eta, low=0, rule="a non-negative number")
    xp = _namespace(index, d)
    power, outer = q * p / (q - p), q / (q - p)
    return d * (1 + eta) ** -outer * (1 - xp.asarray(index)) ** power


def prune_count(
    index: Any,
    d: Any,
    p: float = 0.5,
    q: float = 1.0,
    eta: Any = 0.0,
    gamma: Any = 1.0,
    beta: Any = 0.9,
) -> Any:
    """How many of ``d`` numbers sparsity-informed adaptive pruning removes.

    ``c = ⌊d · clip(γ (1 − r / d), 0, β)⌋`` with ``r`` the next integer above
    :func:`pq_bound`.

    Args:
      index: the PQ Index; a number or an array.
      d: how many numbers there are.
      p: the smaller exponent.
      q: the larger one.
      eta: see :func:`pq_bound`; larger prunes more.
      gamma: scale; above 1 prunes more than the bound tells.
      beta: the largest share that one round removes, in [0, 1).

    Returns:
      An integer, or an integer array, at most ``β d``; by JAX or NumPy as
      :func:`pq_bound`. ``d`` above 2²⁴ is rounded where JAX computes in float32.

    Raises:
      ValueError: if a number is out of range.
      TypeError: if an argument is of another kind.

    References:
      Diao et al., arXiv 2302.05601, Algorithm 1; the rounding is that of its code.

    Example:
      >>> from sdp_jax import methods
      >>> methods.prune_count(0.153, 1000).item()  # Gaussian weights
      153
    """
    check_number("gamma", gamma, low=0, rule="a non-negative number")
    high = math.nextafter(1, 0)
    check_number("beta", beta, low=0, high=high, rule="a number in [0, 1)")
    xp = _namespace(index, d)
    r = xp.ceil(pq_bound(index, d, p, q, eta))
    # The same as in the docstring, but exact where r and d are whole numbers.
    count = xp.floor(xp.clip(gamma * (d - r), 0, beta * xp.asarray(d)))
    return count.astype(xp.int32 if xp is jnp else np.int64)


def index_of(
    parts: Sequence[Part], p: float, q: float, axis: int | None = None
) -> jax.Array:
    """The index over all parts together, along an axis of each.

    By logarithms of ``|w| / max |w|``, which may be too small to be written down.
    """
    zero = jnp.zeros((), jnp.float32)
    values = [(_magnitude(x, alive), alive) for x, alive in parts]
    values = [(x, alive) for x, alive in values if x.size]
    if not values:
        shape = () if axis is None or not parts else parts[0][0].shape[:1]
        return jnp.zeros(shape, jnp.float32)
    peak = zero
    for x, _ in values:
        peak = jnp.maximum(peak, jnp.max(x, axis=axis))
    safe = jnp.where(peak == 0, 1, peak)
    number, small, large = zero, zero, zero
    for x, alive in values:
        counted = jnp.ones_like(x, bool) if alive is None else alive
        number = number + jnp.sum(counted, axis=axis).astype(x.dtype)
        level = safe if axis is None else safe[:, None]
        share = jnp.log(jnp.where(x == 0, 1, x)) - jnp.log(level)
        small = small + jnp.sum(jnp.where(x == 0, 0, jnp.exp(p * share)), axis=axis)
        large = large + jnp.sum(jnp.where(x == 0, 0, jnp.exp(q * share)), axis=axis)
    number = jnp.maximum(number, 1)
    large = jnp.where(peak == 0, 1, large)
    ratio = (small / number) ** (1 / p) / (large / number) ** (1 / q)
    # Rounding may take it a hair below zero; what is not a number stays so.
    return jnp.where(peak == 0, 0, jnp.maximum(1 - ratio, 0))


def _magnitude(x: jax.Array, alive: jax.Array | None) -> jax.Array:
    # Before the magnitude is taken: int8 has no 128.
    x = jnp.abs(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    return x if alive is None else jnp.where(alive, x, 0)


def _rows(x: jax.Array | None, axis: int) -> Any:
    """A leaf as a matrix with one row for each output."""
    if x is None:
        return None
    if x.ndim == 0:
        return x.reshape(1, 1)
    length = x.shape[axis]
    rows = jnp.moveaxis(replicated(x), axis, 0)
    return rows.reshape(length, x.size // max(length, 1))


def _entries(
    groups: Groups,
    d: Dimension,
    arrays: Mapping[str, jax.Array],
    masks: Mapping[str, jax.Array],
) -> list[Part]:
    """The entries of each producer, one row for each channel."""

    def matrix(x: jax.Array | None, axis: int, index: np.ndarray) -> Any:
        if x is None:
            return None
        lines = jnp.moveaxis(replicated(x), axis, 0)[index]
        return lines.reshape(d.size, -1)

    parts = []
    for m in d.producers:
        index = np.moveaxis(m.positions(d.size), 1, 0).reshape(d.size, -1)
        pair = arrays[m.path], masks.get(m.path)
        parts.append(tuple(matrix(x, m.axis, index) for x in pair))
    return parts


def _norms(
    groups: Groups, arrays: Mapping[str, jax.Array], masks: Mapping[str, jax.Array]
) -> dict[str, Part]:
    """Norms of the channels, in units in which no square is too large or too small."""
    ours = {m.path for _, m, _ in groups.producers}
    wide = {k: _magnitude(x, masks.get(k)) for k, x in arrays.items() if k in ours}
    peak = jnp.zeros((), jnp.float32)
    for x in wide.values():
        peak = jnp.maximum(peak, jnp.max(x, initial=0))
    peak = jnp.where(peak == 0, 1, peak)
    norms = channel_norms(groups, {k: x / peak for k, x in wide.items()})
    if not masks:
        return {name: (v, None) for name, v in groups.split(norms).items()}
    alive = groups.split(channels_alive(groups, masks))
    return {name: (v, alive[name]) for name, v in groups.split(norms).items()}


def _namespace(*values: Any) -> Any:
    return jnp if any(isinstance(v, jax.Array) for v in values) else np


def check_alike(rule: str, tree: PyTree, other: PyTree) -> None:
    """Refuses a tree that has another structure or other shapes than the first."""
    ours, theirs = (jax.tree.map(np.shape, t) for t in (tree, other))
    if jax.tree.structure(tree) != jax.tree.structure(other) or ours != theirs:
        raise ValueError(f"{rule}, {ours}; got {theirs}")


def _check_mask(tree: PyTree, mask: PyTree) -> dict[str, jax.Array]:
    """The leaves of a mask by path, after checking that it fits the tree."""
    rule = "mask must be a tree of Boolean arrays with the structure and the shapes of"
    check_alike(f"{rule} the tree", tree, mask)
    table = {}
    for path, leaf in leaf_table(mask).items():
        leaf = jnp.asarray(leaf)
        if leaf.dtype != bool:
            raise TypeError(
                f"mask must hold Boolean arrays; leaf {path!r} has dtype {leaf.dtype}"
            )
        table[path] = leaf
    return table


def check_exponents(p: Any, q: Any) -> None:
    """Refuses exponents that do not fulfil ``0 < p < q``."""
    for name, value in (("p", p), ("q", q)):
        check_number(name, value, low=0, rule="a positive number, 0 < p < q")
    if not any(isinstance(x, jax.Array) for x in (p, q)) and not 0 < p < q:
        raise ValueError(f"exponents must fulfil 0 < p < q; got p={p!r}, q={q!r}")


def check_scope(scope: Any, groups: Any, grouped: tuple[str, ...]) -> None:
    """Refuses a scope that does not go with groups, or goes only with them."""
    allowed = ("global", "tensor", "row") if groups is None else grouped
    if scope not in allowed:
        raise ValueError(
            f"scope must be one of {allowed} {'without' if groups is None else 'with'} "
            f"groups; got {scope!r}"
        )


def _check_of(of: Any, groups: Any, scope: Any) -> None:
    if of not in ("weights", "norms"):
        raise ValueError(f"of must be 'weights' or 'norms'; got {of!r}")
    if of == "norms" and (groups is None or scope == "channel"):
        raise ValueError(
            "of='norms' needs groups, and scope 'global' or 'dimension': one channel "
            "has one norm"
        )
