"""plan_cut: which channels go."""

import bisect
import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from sdp_jax.counts import flop_counts
from sdp_jax.cut import Cut
from sdp_jax.groups import (
    Dimension,
    Groups,
    PyTree,
    channels_alive,
    leaf_dtype,
    leaf_table,
    missing_path_message,
)
from sdp_jax.measure import cost, latency
from sdp_jax.narrow import narrow

Ranking = Literal["global", "dimension", "isomorphic"]
Target = Literal["channels", "params", "flops", "latency"]


def plan_cut(
    groups: Groups,
    params: PyTree,
    *,
    scores: Mapping[str, Any] | None = None,
    sparsity: float | None = None,
    target: Target = "channels",
    fn: Callable[..., Any] | None = None,
    inputs: Sequence[Any] = (),
    ranking: Ranking = "global",
    floor: int = 1,
    round_to: int = 1,
    limits: Mapping[str, float] | None = None,
) -> Cut:
    """Decides which channels go.

    Without ``scores`` those whose producers are all exactly zero, as training with
    :func:`sdp_jax.altsdp` leaves them. With ``scores`` and ``sparsity`` the channels of
    lowest score, as many as the target asks for.

    Args:
      groups: the channel dimensions.
      params: the parameters: concrete arrays, or with ``scores`` also shapes.
      scores: for each dimension name an array ``(size,)``; the lowest goes first.
      sparsity: share of the target that goes, in [0, 1).
      target: what the share is of: ``"channels"``, ``"params"``, ``"flops"`` or
        ``"latency"`` (measured: it compiles and times both functions in turns, and is
        as noisy as that).
      fn: the function, for ``"flops"`` and ``"latency"``.
      inputs: its arguments after the parameters, likewise.
      ranking: compare scores over all channels (``"global"``), within each dimension,
        or within dimensions that are built alike (``"isomorphic"``); in the latter two
        each of these loses the same share of its channels.
      floor: channels that stay in each dimension. A dimension with fewer non-zero
        channels keeps its first zero channels up to this number, because a layer of
        width 0 cannot be built; zero channels that are kept do not change the function.
      round_to: keep the next-best channels up to a multiple of this number, or up to
        the size of the dimension.
      limits: largest share that may go, by pattern (as in :mod:`fnmatch`) of dimension
        names.

    Returns:
      A :class:`Cut`. A target is met to within one channel (or within ``round_to`` of
      each dimension), from below: at least as much goes as was asked for, except of
      channels, which are counted exactly.

    Raises:
      ValueError: if ``params`` does not match the groups or has no values (under
        ``jit``), a producer is not a number, an argument is out of range or missing, or
        floors, limits and rounding make the target impossible.

    References:
      Isomorphic ranking: Fang, Ma, Wang et al., "Isomorphic Pruning for Vision
      Models", ECCV 2024, arXiv 2407.04616.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"w": jnp.array([[3., 0., 1.], [4., 0., 1.]])}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.producer("w", 1)]})
      >>> sdp_jax.plan_cut(groups, params).widths
      {'hidden': 2}
      >>> scores = sdp_jax.channel_norms(groups, params)
      >>> sdp_jax.plan_cut(groups, params, scores=scores, sparsity=0.6).widths
      {'hidden': 1}
    """
    _check_counts(floor, round_to)
    if target not in ("channels", "params", "flops", "latency"):
        raise ValueError(
            f"target is {target!r}; use 'channels', 'params', 'flops' or 'latency'"
        )
    if ranking not in ("global", "dimension", "isomorphic"):
        raise ValueError(
            f"ranking is {ranking!r}; use 'global', 'dimension' or 'isomorphic'"
        )
    if not isinstance(inputs, tuple | list):
        raise TypeError(
            "inputs must be a tuple of the arguments after the parameters, as in "
            f"inputs=(x,); got {type(inputs).__name__}"
        )
    _check_tree(groups, params)
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
        return _cut_zeros(groups, params, floor, round_to)
    assert sparsity is not None
    if not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be a number in [0, 1); got {sparsity!r}")
    if (target in ("flops", "latency")) != (fn is not None):
        raise ValueError(
            f"target={target!r} {'needs' if fn is None else 'has no use for'} fn= and "
            "inputs=, the function to count"
        )
    values = _check_scores(groups, scores)
    protected = _protected(groups, values, floor, limits or {})
    blocks = _blocks(groups, ranking)
    orders = [_order(block, values, protected) for block in blocks]

    def kept_after(counts: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """What stays when each block loses this many channels."""
        gone = {d.name: np.zeros(d.size, bool) for d in groups}
        for order, count in zip(orders, counts, strict=True):
            for name, i in order[:count]:
                gone[name][i] = True
        return tuple(_rounded(~gone[d.name], values[d.name], round_to) for d in groups)

    if target == "channels" and round_to == 1:
        counts = [round(sparsity * sum(groups.sizes[n] for n in b)) for b in blocks]
        for block, order, count in zip(blocks, orders, counts, strict=True):
            if count > len(order):
                raise ValueError(
                    f"sparsity {sparsity} wants {count} channels of {block} to go, but "
                    f"floors and limits let only {len(order)} go; lower one of them"
                )
        return Cut(groups, kept_after(counts))
    share_left = _measure(groups, params, target, fn, inputs)
    # One sequence of steps: all blocks lose the same share, the largest step first.
    shares = sorted(
        ((k + 1) / len(order), j)
        for j, order in enumerate(orders)
        for k in range(len(order))
    )
    steps = np.asarray([j for _, j in shares], int)

    def cut_after(step: int) -> Cut:
        counts = np.bincount(steps[:step], minlength=len(blocks))
        return Cut(groups, kept_after(counts.tolist()))

    known = {0: 1.0}  # Share of the target that is left after so many steps.

    def enough(step: int) -> bool:
        if step not in known:
            known[step] = share_left(cut_after(step))
        return known[step] <= (1 - sparsity) * (1 + 1e-12)

    candidates = range(len(steps) + 1)
    first = 0
    if target == "flops":
        assert fn is not None
        # Polynomials in the widths spare a trace for each candidate.
        counts = flop_counts(groups, fn, params, *inputs)
        whole = counts.at(list(groups.sizes.values()))

        def estimated(step: int) -> bool:
            left = counts.at(list(cut_after(step).widths.values()))
            return left <= (1 - sparsity) * whole * (1 + 1e-12)

        first = bisect.bisect_left(candidates, True, key=estimated)
    if target != "flops" or first > len(steps) or not enough(first):
        bisect.bisect_left(candidates, True, lo=min(first, len(steps)), key=enough)
    # A measured time need not fall at every step: the first that was enough counts.
    step = min((s for s in known if enough(s)), default=None)
    if step is None:
        raise ValueError(
            f"sparsity {sparsity} of {target} cannot be met: with floors, limits and "
            f"rounding {min(known.values()):.1%} are left when all other "
            "channels are gone, and what is frozen stays; see groups.summary()"
        )
    return cut_after(step)


def _check_counts(floor: Any, round_to: Any) -> None:
    for name, value in (("floor", floor), ("round_to", round_to)):
        good = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not good or value < 1:
            raise ValueError(
                f"{name} must be an integer of at least 1, so that every layer keeps a "
                f"channel; got {value!r}"
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


def _check_scores(groups: Groups, scores: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if set(scores) != set(groups.sizes):
        raise ValueError(
            "scores must have an array for each dimension; it lacks "
            f"{sorted(set(groups.sizes) - set(scores))} and has no use for "
            f"{sorted(set(scores) - set(groups.sizes))}"
        )
    values = {name: np.asarray(scores[name], np.float64) for name in groups.sizes}
    for name, value in values.items():
        if value.shape != (groups.sizes[name],):
            raise ValueError(
                f"scores of dimension {name!r} have shape {value.shape}; expected "
                f"({groups.sizes[name]},)"
            )
        if np.isnan(value).any():
            raise ValueError(f"scores of dimension {name!r} contain NaN")
    return values


def _protected(
    groups: Groups,
    values: Mapping[str, np.ndarray],
    floor: int,
    limits: Mapping[str, float],
) -> dict[str, np.ndarray]:
    """Channels that must stay: the best of each dimension."""
    names = {d.name: [d.name, *(m.path for m in d.members)] for d in groups}
    for pattern, limit in limits.items():
        if not isinstance(limit, int | float) or not 0 <= limit <= 1:
            raise ValueError(
                f"limit of {pattern!r} is {limit!r}; give a share between 0 and 1"
            )
        if not any(fnmatch.filter(line, pattern) for line in names.values()):
            raise ValueError(
                f"limit {pattern!r} matches none of the dimensions "
                f"{list(groups.sizes)} and no path of their members"
            )
    protected = {}
    for name, size in groups.sizes.items():
        shares = [v for p, v in limits.items() if fnmatch.filter(names[name], p)]
        most = math.floor(min(shares, default=1.0) * size + 1e-9)
        count = max(min(floor, size), size - most)
        best = np.argsort(-values[name], kind="stable")[:count]
        protected[name] = np.zeros(size, bool)
        protected[name][best] = True
    return protected


def _blocks(groups: Groups, ranking: Ranking) -> list[list[str]]:
    """Names of the dimensions whose channels are compared with each other."""
    if ranking == "global":
        return [list(groups.sizes)]
    if ranking == "dimension":
        return [[name] for name in groups.sizes]

    def build(d: Dimension) -> tuple[Any, ...]:
        return tuple(
            sorted(
                (m.role, m.axis, len(groups.shapes[m.path]), m.outer > 1, m.inner > 1)
                for m in d.members
            )
        )

    blocks: dict[tuple[Any, ...], list[str]] = {}
    for d in groups:
        blocks.setdefault(build(d), []).append(d.name)
    return list(blocks.values())


def _order(
    block: Sequence[str],
    values: Mapping[str, np.ndarray],
    protected: Mapping[str, np.ndarray],
) -> list[tuple[str, int]]:
    """Channels of a block that may go, the lowest score first."""
    free = [
        (float(values[name][i]), name, int(i))
        for name in block
        for i in np.flatnonzero(~protected[name])
    ]
    return [(name, i) for _, name, i in sorted(free, key=lambda item: item[0])]


def _rounded(stay: np.ndarray, values: np.ndarray, round_to: int) -> tuple[int, ...]:
    """Indices that stay, with the best of the others up to a multiple."""
    wanted = min(-(-int(stay.sum()) // round_to) * round_to, len(stay))
    best = np.argsort(np.where(stay, -np.inf, -values), kind="stable")[:wanted]
    return tuple(sorted(best.tolist()))


def _measure(
    groups: Groups,
    params: PyTree,
    target: Target,
    fn: Callable[..., Any] | None,
    inputs: Sequence[Any],
) -> Callable[[Cut], float]:
    """A function that says which share of the target a cut leaves."""
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), leaf_dtype(x)), params
    )
    dense = Cut(groups, tuple(tuple(range(d.size)) for d in groups))

    def time_left(cut: Cut) -> float:
        assert fn is not None
        # In turns with the uncut one, which also goes through narrow.
        dense_time, small_time = latency(
            narrow(fn, dense),
            narrow(fn, cut),
            args=[(params, *inputs), (cut.take(params), *inputs)],
        )
        return small_time / dense_time

    def count(cut: Cut) -> float:
        if target == "params":
            return float(sum(math.prod(shape) for shape in cut.small_shapes.values()))
        assert fn is not None
        return float(cost(narrow(fn, cut), cut.take(shapes), *inputs).flops)

    if target == "latency":
        return time_left
    if target == "channels":
        return lambda cut: sum(cut.widths.values()) / max(groups.num_channels, 1)
    total = max(count(dense), 1.0)
    return lambda cut: count(cut) / total


def _cut_zeros(groups: Groups, params: PyTree, floor: int, round_to: int) -> Cut:
    table = leaf_table(params)
    for path, leaf in table.items():
        if isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
            raise ValueError(
                f"plan_cut looks for zeros, but leaf {path!r} has no values: it is "
                f"{leaf}. Call it outside jit, on concrete parameters"
            )
    for d in groups:
        for m in d.producers:
            if bool(jnp.any(jnp.isnan(jnp.asarray(table[m.path])))):
                raise ValueError(
                    f"dimension {d.name!r}: {m.path!r} contains NaN; a diverged model "
                    "cannot be cut"
                )
    kept = []
    for name, alive in channels_alive(groups, params).items():
        stay = np.asarray(alive).copy()
        missing = min(floor, groups.sizes[name]) - int(stay.sum())
        if missing > 0:
            stay[np.flatnonzero(~stay)[:missing]] = True
        kept.append(_rounded(stay, np.zeros(len(stay)), round_to))
    return Cut(groups, tuple(kept))
