"""plan_cut: which channels go."""

import bisect
import fnmatch
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.core
import numpy as np
from jax.experimental import multihost_utils

from sdp_jax._narrow import narrow
from sdp_jax.checks import check_number, check_share
from sdp_jax.cut import Cut
from sdp_jax.fast import check_round_to, steps_of
from sdp_jax.groups import Groups, Ranking, check_ranking, need_groups
from sdp_jax.measure import latency
from sdp_jax.mesh import fetch, placed, shares
from sdp_jax.remains import zeros_that_stay
from sdp_jax.tree import PyTree, leaf_dtype, leaf_table, missing_path_message
from sdp_jax.widths import round_up
from sdp_jax.zeros import zero_channels

Target = Literal["channels", "params", "bytes", "flops", "latency"]
Scores = jax.Array | np.ndarray | Mapping[str, Any]
RoundTo = int | Literal["fast", "mesh"]


def plan_cut(
    groups: Groups,
    params: PyTree,
    *,
    scores: Scores | None = None,
    sparsity: float | None = None,
    target: Target = "channels",
    fn: Callable[..., Any] | None = None,
    inputs: Sequence[Any] = (),
    ranking: Ranking = "global",
    min_channels: int = 1,
    round_to: RoundTo = 1,
    limits: Mapping[str, float] | None = None,
) -> Cut:
    """Decides which channels go.

    Without ``scores`` those whose producers are all exactly zero, as training with
    :func:`sdp_jax.altsdp` leaves them. With ``scores`` and ``sparsity`` the channels of
    lowest score, as many as the target asks for. :func:`sdp_jax.prune` does this and
    the cut in one call.

    Args:
      groups: the channel dimensions.
      params: the parameters: concrete arrays, or with ``scores`` also shapes.
      scores: a number for each channel, ``(num_channels,)``, or for each dimension name
        an array ``(size,)``; the lowest goes first.
      sparsity: share of the target that goes, in [0, 1).
      target: what the share is of: ``"channels"``, ``"params"``, ``"bytes"`` (the
        parameters in their dtypes), ``"flops"`` or ``"latency"`` (measured: it compiles
        and times both functions in turns, and is as noisy as that).
      fn: the function, for ``"latency"``.
      inputs: its arguments after the parameters, likewise.
      ranking: compare scores over all channels (``"global"``), within each dimension,
        or within dimensions that are built alike (``"isomorphic"``); in the latter two
        each of these loses the same share of its channels.
      min_channels: channels that stay in each dimension. A dimension with fewer
        non-zero channels keeps its first zero channels up to this number; they do not
        change the function. One that may vanish (``Dimension.removable``) and is zero
        throughout goes whole, and its layer with it; with scores it may do so only if
        this number is 0.
      round_to: keep the next-best channels up to a multiple of this number, or up to
        the size of the dimension; ``"fast"`` up to a width that is fast on the default
        device (:func:`sdp_jax.fast_multiple`; below it powers of two); ``"mesh"`` up to
        a width that the devices over which ``params`` are sharded share equally.
      limits: largest share that may go, by pattern (as in :mod:`fnmatch`) of the name
        of a dimension, or of the path of a leaf that makes its channels.

    Returns:
      A :class:`Cut`. A target is met to within one channel (or within ``round_to`` of
      each dimension), from below: at least as much goes as was asked for, except of
      channels, which are counted exactly. Without scores its ``notes`` say which zeros
      stay, and why: where only some of the leaves that make a channel are zero (the
      scale and bias of a normalisation, not the filter), or what is zero cannot be cut.

    Raises:
      ValueError: if ``params`` does not match the groups or has no values (under
        ``jit``), a producer is not a number, an argument is out of range or missing, or
        ``min_channels``, limits and rounding make the target impossible.

    References:
      Isomorphic ranking: Fang, Ma, Wang et al., "Isomorphic Pruning for Vision
      Models", ECCV 2024, arXiv 2407.04616.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"w": jnp.array([[3., 0., 1.], [4., 0., 1.]])}
      >>> groups = sdp_jax.groups_from_axes(params, {"unit": [sdp_jax.Member("w", 1)]})
      >>> sdp_jax.plan_cut(groups, params).widths
      {'unit': 2}
      >>> scores = sdp_jax.channel_norms(groups, params)
      >>> sdp_jax.plan_cut(groups, params, scores=scores, sparsity=0.6).widths
      {'unit': 1}
    """
    need_groups(groups)
    _check_counts(min_channels, round_to)
    if target not in get_args(Target):
        raise ValueError(f"target is {target!r}; use one of {get_args(Target)}")
    check_ranking(ranking)
    if not isinstance(inputs, tuple | list):
        raise TypeError(
            "inputs must be a tuple of the arguments after the parameters, as in "
            f"inputs=(x,); got {type(inputs).__name__}"
        )
    _check_tree(groups, params)
    widths = widths_for(groups, params, round_to)
    if (scores is None) != (sparsity is None):
        raise ValueError(
            "scores and sparsity belong together: give both, for example "
            "scores=sdp_jax.channel_norms(groups, params), or neither to cut what is "
            "exactly zero"
        )
    if scores is None:
        if target != "channels" or ranking != "global" or limits or fn is not None:
            raise ValueError(
                "target, ranking, limits and fn say which channels of low score go; "
                "without scores what is exactly zero goes. Give scores and sparsity, "
                "or leave them out"
            )
        return _cut_zeros(groups, params, min_channels, widths)
    assert sparsity is not None
    check_share("sparsity", sparsity)
    if (target == "latency") != (fn is not None):
        raise ValueError(
            f"target={target!r} {'needs' if fn is None else 'has no use for'} fn= and "
            "inputs=, the function to time"
        )
    if sparsity > 0 and not len(groups):
        why = "; ".join(
            f"{f.path}[{f.axis}]: {f.reasons[0]}" for f in groups.frozen[:3]
        )
        raise ValueError(
            f"sparsity {sparsity} cannot be met: these groups have no channel that can "
            f"be cut{f' ({why})' if why else ''}; see groups.summary()"
        )
    values = _check_scores(groups, scores)
    protected = _protected(groups, values, min_channels, limits or {})
    numbers = groups.blocks(ranking)
    blocks = [np.flatnonzero(numbers == k) for k in np.unique(numbers)]
    # Channels that may go, the lowest score first.
    frees = [block[~protected[block]] for block in blocks]
    orders = [free[np.argsort(values[free], kind="stable")] for free in frees]

    def cut_after(counts: Sequence[int]) -> Cut:
        """What stays when each block loses this many channels."""
        stay = np.ones(groups.num_channels, bool)
        for order, count in zip(orders, counts, strict=True):
            stay[order[:count]] = False
        stays, ranked = groups.split(stay), groups.split(values)
        kept = (_rounded(stays[n], ranked[n], widths[n]) for n in groups.sizes)
        return Cut(groups, tuple(kept))

    if target == "channels" and round_to == 1:
        counts = [round(sparsity * len(block)) for block in blocks]
        for order, count in zip(orders, counts, strict=True):
            if count > len(order):
                raise ValueError(
                    f"sparsity {sparsity} wants {count} channels to go, but "
                    f"min_channels and limits let only {len(order)} go (ranking "
                    f"{ranking!r}); lower one of them"
                )
        return cut_after(counts)
    share_left = _measure(groups, params, target, fn, inputs)
    # One sequence of steps: all blocks lose the same share, the largest step first.
    shares = sorted(
        ((k + 1) / len(order), j)
        for j, order in enumerate(orders)
        for k in range(len(order))
    )
    steps = np.asarray([j for _, j in shares], int)

    def after(step: int) -> Cut:
        return cut_after(np.bincount(steps[:step], minlength=len(blocks)).tolist())

    known = {0: 1.0}  # Share of the target that is left after so many steps.

    def enough(step: int) -> bool:
        if step not in known:
            known[step] = share_left(after(step))
        return known[step] <= (1 - sparsity) * (1 + 1e-12)

    bisect.bisect_left(range(len(steps) + 1), True, key=enough)
    # A measured time need not fall at every step: the first that was enough counts.
    step = min((s for s in known if enough(s)), default=None)
    if step is None:
        raise ValueError(
            f"sparsity {sparsity} of {target} cannot be met: with min_channels, limits "
            f"and rounding {min(known.values()):.1%} are left when all other "
            "channels are gone, and what is frozen stays; see groups.summary()"
        )
    return after(step)


def _check_counts(min_channels: Any, round_to: Any) -> None:
    check_round_to(round_to, ("fast", "mesh"))
    whole = isinstance(min_channels, int | np.integer)
    if not whole or isinstance(min_channels, bool) or min_channels < 0:
        raise ValueError(
            "min_channels must be an integer: the number of channels that each "
            "dimension keeps, or 0 to let those vanish that can (Dimension.removable); "
            f"got {min_channels!r}"
        )


def _check_tree(groups: Groups, params: PyTree) -> None:
    table = leaf_table(params)
    for d in groups:
        for m in d.members:
            if m.path not in table:
                raise ValueError(
                    f"dimension {d.name!r}: "
                    f"{missing_path_message(m.path, list(table))}; plan_cut needs all "
                    "members, also consumers and running statistics"
                )
            shape = tuple(np.shape(table[m.path]))
            if shape != groups.shapes[m.path]:
                raise ValueError(
                    f"dimension {d.name!r}: leaf {m.path!r} has shape {shape}, but "
                    f"{groups.shapes[m.path]} in the groups; find the groups of this "
                    "model"
                )


def _check_scores(groups: Groups, scores: Scores) -> np.ndarray:
    if isinstance(scores, Mapping):
        try:
            groups.join(scores)
        except ValueError as error:
            raise ValueError(f"scores: {error}") from error
        # Joined anew, so that scores of 64 bits are not rounded.
        lines = [np.float64(fetch(scores[name])) for name in groups.sizes]
        scores = np.concatenate([np.zeros(0), *lines])
    values = np.asarray(fetch(scores), np.float64)
    if values.shape != (groups.num_channels,):
        raise ValueError(
            f"scores have shape {values.shape}; expected one number for each of the "
            f"{groups.num_channels} channels, or an array for each dimension name"
        )
    for name, value in groups.split(values).items():
        if np.isnan(value).any():
            raise ValueError(f"scores of dimension {name!r} contain NaN")
    return values


def _protected(
    groups: Groups, values: np.ndarray, min_channels: int, limits: Mapping[str, float]
) -> np.ndarray:
    """Channels that must stay: the best of each dimension."""
    names = {d.name: [d.name, *(m.path for m in d.producers)] for d in groups}
    for pattern, limit in limits.items():
        rule = "a share between 0 and 1"
        check_number(f"limit of {pattern!r}", limit, low=0, high=1, rule=rule)
        if not any(fnmatch.filter(line, pattern) for line in names.values()):
            raise ValueError(
                f"limit {pattern!r} matches none of the dimensions "
                f"{list(groups.sizes)} and no path of a leaf that makes their channels"
            )
    protected = []
    for name, line in groups.split(values).items():
        size = groups.sizes[name]
        shares = [v for p, v in limits.items() if fnmatch.filter(names[name], p)]
        most = math.floor(min(shares, default=1.0) * size + 1e-9)
        least = min_channels or (0 if groups[name].removable else 1)
        count = max(min(least, size), size - most)
        mask = np.zeros(size, bool)
        mask[np.argsort(-line, kind="stable")[:count]] = True
        protected.append(mask)
    return np.concatenate([np.zeros(0, bool), *protected])


def widths_for(
    groups: Groups, params: PyTree, round_to: RoundTo
) -> dict[str, Callable[[int], int]]:
    """For each dimension a function from channels to keep to the width.

    Args:
      groups: the channel dimensions.
      params: the parameters, which say how a mesh shares them.
      round_to: as for :func:`plan_cut`.

    Returns:
      Functions by dimension name.
    """
    if round_to != "mesh":
        steps = steps_of(round_to, shared=spread(params))
        return {
            name: functools.partial(round_up, sizes=size, steps=steps)
            for name, size in groups.sizes.items()
        }
    table = leaf_table(params)
    found = {}
    for d in groups:
        step = 1
        for m in d.members:
            leaf = table[m.path]
            count = shares(placed(leaf), np.ndim(leaf))[m.axis]
            step = math.lcm(step, count // math.gcd(count, m.outer * m.inner))
        # As many must go as the devices share, wherever else the axis is made of.
        found[d.name] = functools.partial(_shared_width, step=step, size=d.size)
    return found


def _shared_width(kept: int, step: int, size: int) -> int:
    return size - max(size - kept, 0) // step * step


def _rounded(
    stay: np.ndarray, values: np.ndarray, width: Callable[[int], int]
) -> tuple[int, ...]:
    """Indices that stay, with the best of the others up to the next width."""
    best = np.argsort(np.where(stay, -np.inf, -values), kind="stable")
    return tuple(sorted(best[: width(int(stay.sum()))].tolist()))


def spread(params: PyTree) -> bool:
    """Whether processes share the parameters, and must decide alike.

    Args:
      params: the parameters.

    Returns:
      Whether they do.
    """
    leaves = jax.tree.leaves(params)
    known = [x for x in leaves if not isinstance(x, jax.core.Tracer)]
    return not all(getattr(x, "is_fully_addressable", True) for x in known)


def _measure(
    groups: Groups,
    params: PyTree,
    target: Target,
    fn: Callable[..., Any] | None,
    inputs: Sequence[Any],
) -> Callable[[Cut], float]:
    """A function that says which share of the target a cut leaves."""
    if target == "latency":
        assert fn is not None
        dense = Cut(groups, tuple(tuple(range(d.size)) for d in groups))
        shared = spread(params)

        def time_left(cut: Cut) -> float:
            # In turns with the uncut one, which also goes through narrow.
            _, small = latency(
                narrow(fn, dense),
                narrow(fn, cut),
                args=[
                    (params, *inputs),
                    (cut.take(params), *cut.take_inputs(*inputs)),
                ],
            )
            return of_the_first(small.ratio) if shared else small.ratio

        return time_left
    if target == "channels":
        return lambda cut: sum(cut.widths.values()) / max(groups.num_channels, 1)
    if target in ("params", "bytes"):
        table = leaf_table(params)
        each = {
            path: leaf_dtype(table[path]).itemsize if target == "bytes" else 1
            for path in groups.shapes
        }

        def weigh(shapes: Mapping[str, tuple[int, ...]]) -> int:
            return sum(each[path] * math.prod(shape) for path, shape in shapes.items())

        whole = max(weigh(groups.shapes), 1)
        return lambda cut: weigh(cut.small_shapes) / whole
    counts = groups.need_flops()
    total = max(counts.at(list(groups.sizes.values())), 1.0)
    return lambda cut: counts.at(list(cut.widths.values())) / total


def of_the_first(number: float) -> float:
    """The number of the first process.

    Args:
      number: of this process.

    Returns:
      That of the first one.
    """
    return float(multihost_utils.broadcast_one_to_all(np.float64(number)))


def kept_without(
    groups: Groups,
    gone: np.ndarray,
    min_channels: int,
    widths: Mapping[str, Callable[[int], int]],
) -> tuple[tuple[int, ...], ...]:
    """What stays of each dimension when channels go that are zero.

    Args:
      groups: the channel dimensions.
      gone: which channels go, ``(num_channels,)``.
      min_channels: channels of each dimension that stay in any case, at least one
        unless it is removable and all of its channels go.
      widths: from channels to keep to the width, see :func:`widths_for`.

    Returns:
      For each dimension the numbers of its channels, as :class:`Cut` takes them.
    """
    kept = []
    for d, line in zip(groups, groups.split(~gone).values(), strict=True):
        stay = line.copy()
        missing = min(max(min_channels, 1), d.size) - int(stay.sum())
        vanishes = d.removable and not stay.any()
        if missing > 0 and not vanishes:
            stay[np.flatnonzero(~stay)[:missing]] = True
        kept.append(_rounded(stay, np.zeros(len(stay)), widths[d.name]))
    return tuple(kept)


def _cut_zeros(
    groups: Groups,
    params: PyTree,
    min_channels: int,
    widths: Mapping[str, Callable[[int], int]],
) -> Cut:
    table = leaf_table(params)
    for path, leaf in table.items():
        if isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
            raise ValueError(
                f"plan_cut looks for zeros, but leaf {path!r} has no values: it is "
                f"{leaf}. Call it outside jit, on concrete parameters"
            )
    for f in groups.frozen:
        if f.path not in table:
            raise ValueError(
                f"{missing_path_message(f.path, list(table))}; plan_cut looks for "
                "zeros in the whole tree that the groups were found on"
            )
    kept = kept_without(groups, zero_channels(groups, table), min_channels, widths)
    return Cut(groups, kept, zeros_that_stay(groups, table, kept))
