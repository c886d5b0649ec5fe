"""plan_cut: which channels go."""

import bisect
import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from sdp_jax._narrow import narrow
from sdp_jax.channels import channels_alive
from sdp_jax.checks import check_number, check_share
from sdp_jax.cut import Cut
from sdp_jax.groups import Groups, Ranking, check_ranking, need_groups
from sdp_jax.measure import latency
from sdp_jax.mesh import fetch, placed, shares
from sdp_jax.remains import zeros_that_stay
from sdp_jax.tree import PyTree, leaf_table, missing_path_message

Target = Literal["channels", "params", "flops", "latency"]
Scores = jax.Array | np.ndarray | Mapping[str, Any]


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
    round_to: int | Literal["mesh"] = 1,
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
      target: what the share is of: ``"channels"``, ``"params"``, ``"flops"`` or
        ``"latency"`` (measured: it compiles and times both functions in turns, and is
        as noisy as that).
      fn: the function, for ``"latency"``.
      inputs: its arguments after the parameters, likewise.
      ranking: compare scores over all channels (``"global"``), within each dimension,
        or within dimensions that are built alike (``"isomorphic"``); in the latter two
        each of these loses the same share of its channels.
      min_channels: channels that stay in each dimension. A dimension with fewer
        non-zero channels keeps its first zero channels up to this number, because a
        layer of width 0 cannot be built; zero channels that are kept do not change the
        function.
      round_to: keep the next-best channels up to a multiple of this number, or up to
        the size of the dimension; ``"mesh"`` up to a width that the devices over which
        ``params`` are sharded share equally.
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
    steps_of = _steps(groups, params, round_to)
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
        return _cut_zeros(groups, params, min_channels, steps_of)
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
        kept = (_rounded(stays[n], ranked[n], steps_of[n]) for n in groups.sizes)
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
    if isinstance(round_to, str) and round_to != "mesh":
        raise ValueError(f"round_to is a number or 'mesh'; got {round_to!r}")
    known = 1 if round_to == "mesh" else round_to
    for name, value in (("min_channels", min_channels), ("round_to", known)):
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


def _check_scores(groups: Groups, scores: Scores) -> np.ndarray:
    if isinstance(scores, Mapping):
        try:
            groups.join(scores)
        except ValueError as error:
            raise ValueError(f"scores: {error}") from error
        # Joined anew, so that scores of 64 bits are not rounded.
        lines = [np.asarray(scores[name], np.float64) for name in groups.sizes]
        scores = np.concatenate([np.zeros(0), *lines])
    values = np.asarray(scores, np.float64)
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
        count = max(min(min_channels, size), size - most)
        mask = np.zeros(size, bool)
        mask[np.argsort(-line, kind="stable")[:count]] = True
        protected.append(mask)
    return np.concatenate([np.zeros(0, bool), *protected])


def _steps(
    groups: Groups, params: PyTree, round_to: int | Literal["mesh"]
) -> dict[str, tuple[int, int]]:
    """For each dimension a step and a rest: widths are ``rest + k · step``."""
    if round_to != "mesh":
        return dict.fromkeys(groups.sizes, (round_to, 0))
    table = leaf_table(params)
    found = {}
    for d in groups:
        step = 1
        for m in d.members:
            leaf = table[m.path]
            count = shares(placed(leaf), np.ndim(leaf))[m.axis]
            step = math.lcm(step, count // math.gcd(count, m.outer * m.inner))
        # As many must go as the devices share, wherever else the axis is made of.
        found[d.name] = (step, d.size % step)
    return found


def _rounded(
    stay: np.ndarray, values: np.ndarray, widths: tuple[int, int]
) -> tuple[int, ...]:
    """Indices that stay, with the best of the others up to the next width."""
    step, rest = widths
    wanted = max(-(-(int(stay.sum()) - rest) // step) * step, 0) + rest
    wanted = min(wanted, len(stay))
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
    if target == "latency":
        assert fn is not None
        dense = Cut(groups, tuple(tuple(range(d.size)) for d in groups))

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
            return small.ratio

        return time_left
    if target == "channels":
        return lambda cut: sum(cut.widths.values()) / max(groups.num_channels, 1)
    if target == "params":
        whole = sum(map(math.prod, groups.shapes.values()))
        return lambda cut: (
            sum(map(math.prod, cut.small_shapes.values())) / max(whole, 1)
        )
    counts = groups.need_flops()
    total = max(counts.at(list(groups.sizes.values())), 1.0)
    return lambda cut: counts.at(list(cut.widths.values())) / total


def _cut_zeros(
    groups: Groups,
    params: PyTree,
    min_channels: int,
    steps: Mapping[str, tuple[int, int]],
) -> Cut:
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
    every = groups.split(fetch(channels_alive(groups, params)))
    for name, alive in every.items():
        stay = alive.copy()
        missing = min(min_channels, groups.sizes[name]) - int(stay.sum())
        if missing > 0:
            stay[np.flatnonzero(~stay)[:missing]] = True
        kept.append(_rounded(stay, np.zeros(len(stay)), steps[name]))
    return Cut(groups, tuple(kept), zeros_that_stay(groups, table, kept))
