"""Structured directional pruning of a trained model, within the valley of its loss."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from sdp_jax import prox
from sdp_jax.base import check_inexact, check_kind, check_params
from sdp_jax.channels import (
    Weighting,
    channel_norms,
    channel_products,
    channel_weights,
    channels_alive,
)
from sdp_jax.checks import check_number
from sdp_jax.factors import scale_channels
from sdp_jax.groups import Groups, overlaps
from sdp_jax.tree import PyTree
from sdp_jax.valley.vectors import (
    HIGHEST,
    coefficients,
    combine,
    fit_basis,
    gram_inverse,
    inner,
    orthonormal,
    sharp_part,
    wide,
)

Method = Literal["exact", "first_order"]
# Newton steps of the exact solver; it needs about ten.
MAX_STEPS = 300


@dataclasses.dataclass(frozen=True)
class SdpResult:
    """What :func:`sdp` found.

    Attributes:
      params: the pruned parameters, shaped like the given ones; zeros are exact.
      strength: the strength ``λ``, given or found.
      sparsity: share of all channels that are zero.
      scores: the directional scores ``s_g`` of the given parameters,
        ``(num_channels,)``.
      residual: how far ``params`` is from the valley, ``‖Uᵀ(w − w*)‖ / ‖w − w*‖``;
        about the rounding error of ``params`` for the exact method, and if restored,
        unless the zeros leave no such point.
      iterations: Newton steps of the exact method, for the last ``λ``.
    """

    params: PyTree
    strength: float
    sparsity: float
    scores: jax.Array
    residual: float
    iterations: int


def directional_scores(
    params: PyTree,
    groups: Groups,
    basis: PyTree,
    *,
    weights: Weighting | Mapping[str, float] = "plain",
) -> jax.Array:
    """How free it is to shrink each channel: ``s_g = ⟨ŵ_g, (P₀ k ŵ)_g⟩``.

    ``ŵ`` holds the unit vectors ``w_g / ‖w_g‖`` of all channels, ``k`` their weights
    and ``P₀`` projects onto the valley, the complement of the sharp directions. A score
    of ``k`` means that shrinking all channels together moves this one within the
    valley; at 0 or below, the valley wants it to stay or grow. Where groups share
    entries (heads and head dimensions) each has its own unit vector, and they add up.

    Args:
      params: trained parameters.
      groups: their channel dimensions.
      basis: sharp directions: a tree shaped like the parameters with one more leading
        axis, for example ``top_eigenpairs(...).vectors``; made orthonormal here.
      weights: the weighting, see :func:`sdp_jax.channel_weights`.

    Returns:
      A vector ``(num_channels,)``, float32 or wider; 0 for a channel that is zero
      already. For :func:`sdp_jax.plan_cut` take :func:`directional_importance`.

    Raises:
      ValueError: if parameters, groups and basis do not fit each other.
      TypeError: if a parameter is not floating-point or complex.

    References:
      Our reading of Li, Liu, Shao, Wang, Geng, "Structured Directional Pruning", arXiv
      2107.05328; groups of one entry are the scores of Chao, Wang, Xing, Cheng, arXiv
      2006.09358.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"w": jnp.array([[3., 2.], [4., 0.]])}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.Member("w", 1)]})
      >>> sharp = {"w": jnp.array([[[0., 1.], [0., 0.]]])}  # All of channel 1.
      >>> print(sdp_jax.valley.directional_scores(params, groups, sharp))
      [1. 0.]
    """
    params, basis = _prepare(params, groups, basis)
    return _scores(params, groups, basis, weights)


def directional_importance(
    params: PyTree,
    groups: Groups,
    basis: PyTree,
    *,
    weights: Weighting | Mapping[str, float] = "plain",
) -> jax.Array:
    """The strength at which first-order SDP prunes each channel: ``‖w_g‖ / s_g``.

    The channel of least importance goes first, as :func:`sdp_jax.plan_cut` expects of
    ``scores``.

    Args:
      params: as for :func:`directional_scores`.
      groups: as for :func:`directional_scores`.
      basis: as for :func:`directional_scores`.
      weights: as for :func:`directional_scores`.

    Returns:
      A vector ``(num_channels,)``: 0 for a channel that is zero already, infinite where
      the score is 0 or below.

    Raises:
      ValueError: as :func:`directional_scores`.
      TypeError: as :func:`directional_scores`.

    References:
      As for :func:`directional_scores`.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"w": jnp.array([[3., 2.], [4., 0.]])}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.Member("w", 1)]})
      >>> sharp = {"w": jnp.array([[[0., 1.], [0., 0.]]])}
      >>> scores = sdp_jax.valley.directional_importance(params, groups, sharp)
      >>> print(scores)  # The smaller one is the sharp one.
      [ 5. inf]
      >>> sdp_jax.plan_cut(groups, params, scores=scores, sparsity=0.5).kept
      ((1,),)
    """
    params, basis = _prepare(params, groups, basis)
    scores = _scores(params, groups, basis, weights)
    return _vanishing(channel_norms(groups, params), scores)


def sdp(
    params: PyTree,
    groups: Groups,
    strength: float | None,
    basis: PyTree,
    *,
    sparsity: float | None = None,
    method: Method = "exact",
    restore: bool = False,
    min_channels: int | Mapping[str, int] = 1,
    weights: Weighting | Mapping[str, float] = "plain",
    tol: float | None = None,
) -> SdpResult:
    """Prunes a trained model in one shot, along the valley of its loss.

    With the trained parameters ``w*`` and sharp directions ``U``, the exact method
    solves ::

        argmin ½‖w − w*‖² + λ Σ_g k_g ‖w_g‖   subject to   Uᵀ (w − w*) = 0

    the proximal point of the group lasso *restricted to the valley*: what the channels
    that go had along the sharp directions, the others and the parameters outside the
    groups take over. The first-order method shrinks each channel by its score instead
    (:func:`directional_scores`), ``w_g = max(0, 1 − λ s_g / ‖w*_g‖) w*_g``; its norms
    agree with the exact ones to first order in ``λ``, but at large ``λ`` it leaves the
    valley. Channels that are zero already stay so.

    Both shrink the channels that stay as well, by about ``λ`` each, which is free only
    as far as ``basis`` holds all directions in which the loss curves. For a network,
    whose curvature falls off slowly, take ``restore=True``: the method then only says
    which channels go, and the point of the valley nearest to ``w*`` with these zeros is
    returned. No training data are needed beyond those behind the directions; take as
    many directions as memory allows.

    Args:
      params: trained parameters ``w*``.
      groups: their channel dimensions.
      strength: ``λ`` in units of the parameters; ``None`` with ``sparsity``.
      basis: the sharp directions ``U``: a tree shaped like the parameters with one more
        leading axis, for example ``top_eigenpairs(...).vectors``; made orthonormal
        here.
      sparsity: share of all channels that shall be zero, in [0, 1): a ``λ`` is sought,
        by bisection to a relative 1e-3, that reaches it and just so.
      method: ``"exact"`` or ``"first_order"``.
      restore: give the channels that stay back what was taken off them.
      min_channels: channels that stay in each dimension, a number or one for each
        name: if fewer would, the largest ones are not shrunk at all.
      weights: the weighting ``k``, see :func:`sdp_jax.channel_weights`.
      tol: the exact method ends when ``‖Uᵀ(w − w*)‖`` is below ``tol ‖p − w*‖``, where
        ``p`` is the proximal point without the restriction, or at the rounding error of
        ``w*``; default: 1e-5 in float32, 1e-11 in float64.

    Returns:
      The pruned parameters, with what became of them.

    Raises:
      ValueError: if parameters, groups and basis do not fit each other, a parameter is
        not finite, an argument is out of range, both or neither of strength and
        sparsity are given, the sparsity cannot be reached, or groups share entries and
        the method is exact.
      TypeError: if a parameter is not floating-point or complex.
      RuntimeError: if the exact method does not converge: in float32 it may not at a
        strength far above all norms.

    References:
      The problem is ours, the first-order form our reading of Li, Liu, Shao, Wang,
      Geng, arXiv 2107.05328. The exact method solves the dual problem, of as many
      variables as there are directions, by a semismooth Newton method: Qi and Sun, "A
      nonsmooth version of Newton's method", 1993.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"w": jnp.array([[3., 1.], [0., 0.]])}
      >>> groups = sdp_jax.groups_from_axes(
      ...     params, {"hidden": [sdp_jax.Member("w", 1)]})
      >>> sharp = {"w": jnp.array([[[2., 1.], [0., 0.]]])}  # 2 w₀ + w₁ = 7 stays.
      >>> pruned = sdp_jax.valley.sdp(params, groups, 3.0, sharp).params
      >>> print((2 * pruned["w"]).round())
      [[7. 0.]
       [0. 0.]]
    """
    if (strength is None) == (sparsity is None):
        raise ValueError(
            "give either strength, or None and sparsity=; got "
            f"strength={strength!r} and sparsity={sparsity!r}"
        )
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}; got {method!r}")
    if strength is not None:
        strength = float(strength)
        check_number("strength", strength, low=0, rule="a non-negative number")
    if tol is not None:
        check_number("tol", tol, low=0, rule="a non-negative number")
    original = params
    params, basis = _prepare(params, groups, basis)
    floors = tuple(int(n) for n in prox.resolve_floors(groups, min_channels))
    for path, first, second in overlaps(groups) if method == "exact" else ():
        raise ValueError(
            f"dimensions {first.name!r} and {second.name!r} share entries of {path!r}, "
            "as heads and head dimensions do; the exact method needs groups that share "
            "none. Use method='first_order', or leave one of the two out: "
            f"groups.without({second.name!r})"
        )
    scores = _scores(params, groups, basis, weights)
    solver = _Solver(params, groups, basis, weights, scores, method, floors, tol)
    if sparsity is None:
        assert strength is not None
        found, steps = solver.at(float(strength))
    else:
        check_number("sparsity", sparsity, low=0, rule="a number in [0, 1)")
        strength, found, steps = _reach(solver, groups, float(sparsity))
    if restore:
        found = _restored(params, groups, basis, found)
    result = jax.tree.map(lambda w, p: w.astype(jnp.asarray(p).dtype), found, original)
    moved = jax.tree.map(lambda w, p: wide(w) - p, result, params)
    length = float(optax.tree.norm(moved))
    sharp = float(jnp.linalg.norm(coefficients(basis, moved)))
    return SdpResult(
        result,
        float(strength),
        solver.zeros(result) / groups.num_channels,
        scores,
        sharp / length if length else 0.0,
        steps,
    )


class _Solver:
    """Both methods, for one model and changing strengths."""

    def __init__(
        self,
        params: PyTree,
        groups: Groups,
        basis: PyTree,
        weights: Weighting | Mapping[str, float],
        scores: jax.Array,
        method: Method,
        floors: tuple[int, ...],
        tol: float | None,
    ):
        self.params, self.groups, self.method = params, groups, method
        self.norms = channel_norms(groups, params)
        dtype = self.norms.dtype
        # Channels that are zero already cannot be held.
        there = [int(n.sum()) for n in groups.split(self.norms > 0).values()]
        self.floors = [min(pair) for pair in zip(floors, there, strict=True)]
        self.weights = jnp.asarray(channel_weights(groups, weights), dtype)
        self.scores = scores.astype(dtype)
        # The order in which channels go: the last of each dimension are held.
        if method == "exact":
            self.order = self.norms / self.weights
        else:
            self.order = _vanishing(self.norms, self.scores)
        tiny = float(jnp.finfo(dtype).eps)
        self.tol = (1e-5 if tiny > 1e-10 else 1e-11) if tol is None else tol
        self.basis = basis

    def zeros(self, point: PyTree) -> int:
        """How many channels are zero."""
        return int((channel_norms(self.groups, point) == 0).sum())

    def at(self, strength: float) -> tuple[PyTree, int]:
        """The pruned parameters for one strength, and the number of Newton steps."""
        held = jnp.zeros(self.groups.num_channels, bool)
        for _ in range(len(self.groups) + 1):
            point, steps = self._solve(strength, held)
            more = held | self._held(point)
            if bool((more == held).all()):
                return point, steps
            held = more
        raise AssertionError("floors did not settle")

    def _held(self, point: PyTree) -> jax.Array:
        """The largest channels of each dimension that has too few left."""
        left = self.groups.split(channel_norms(self.groups, point) > 0)
        counts = [
            floor if int(alive.sum()) < floor else 0
            for alive, floor in zip(left.values(), self.floors, strict=True)
        ]
        return prox.largest_each(self.groups, self.order, counts)

    def _solve(self, strength: float, held: jax.Array) -> tuple[PyTree, int]:
        thresholds = strength * jnp.where(held, 0, self.weights)
        # What is zero stays so.
        thresholds = jnp.where(self.norms == 0, jnp.inf, thresholds)
        if self.method == "first_order":
            norms = self.norms
            shrink = strength * jnp.where(held, 0, self.scores)
            safe = jnp.where(norms > 0, norms, 1)
            factors = jnp.where(norms > 0, jnp.maximum(0, 1 - shrink / safe), 0)
            return scale_channels(self.groups, self.params, factors), 0
        point, excess, steps = exact_point(
            self.params, self.groups, self.basis, thresholds, self.tol
        )
        if not float(excess) <= 1:
            raise RuntimeError(
                f"after {int(steps)} steps the exact method is {float(excess):.1e} "
                f"times as far from the valley as tol={self.tol:.1e} allows; give a "
                "larger tol, a smaller strength, or method='first_order'"
            )
        return point, int(steps)


@functools.partial(jax.jit, static_argnames="groups")
def exact_point(
    params: PyTree,
    groups: Groups,
    basis: PyTree,
    thresholds: jax.Array,
    tol: float | jax.Array,
) -> tuple[PyTree, jax.Array, jax.Array]:
    """The proximal point of the group norms within the valley.

    With multipliers ``y`` of ``U (w − w*) = 0`` the minimiser is ``w(y) = prox(w* + Uᵀ
    y)``, and ``y`` maximises the concave dual function ``d(y) = M(w* + Uᵀ y) − ½‖y‖²``,
    where ``M`` is the Moreau envelope of the group norms. Its gradient is ``F(y) = U
    (w* − w(y))``, its generalised Hessian ``−U D Uᵀ`` with the derivative ``D`` of the
    proximal map. A Newton step is taken as far as it raises ``d`` or halves ``F``, or
    else the step ``F``, which raises ``d`` always. ``tol`` is that of ``‖F‖``, relative
    to the move without the restriction.

    Returns the point, ``‖F‖`` over what it may be (at most 1 if all went well) and the
    number of steps.
    """

    def factors(point: PyTree) -> tuple[jax.Array, jax.Array]:
        norms = channel_norms(groups, point)
        return prox.soft_threshold_factor(norms, thresholds), norms

    def dual_point(y: jax.Array) -> PyTree:
        return jax.tree.map(jnp.add, params, combine(y, basis))

    def scaled(tree: PyTree, factor: jax.Array) -> PyTree:
        return scale_channels(groups, tree, factor)

    def move(y: jax.Array) -> PyTree:
        """``w* − w(y)``."""
        point = dual_point(y)
        return jax.tree.map(jnp.subtract, params, scaled(point, factors(point)[0]))

    def value_and_gradient(y: jax.Array) -> tuple[jax.Array, jax.Array]:
        norms = factors(dual_point(y))[1]
        small = jnp.minimum(norms, thresholds)
        envelope = jnp.sum(small * norms - small**2 / 2)
        return envelope - jnp.sum(y**2) / 2, coefficients(basis, move(y))

    def newton(y: jax.Array, f: jax.Array) -> jax.Array:
        point = dual_point(y)
        factor, norms = factors(point)
        roots = jnp.sqrt(factor)
        shrunk = jax.vmap(lambda u: scaled(u, roots))(basis)
        matrix = inner(shrunk, shrunk)
        # Along itself a living channel follows its dual variable in full.
        along = jax.vmap(lambda u: channel_products(groups, u, point))(basis)
        alive = factor > 0
        share = jnp.where(alive, 1 - factor, 0) / jnp.where(alive, norms, 1) ** 2
        matrix = matrix + jnp.matmul(along * share, along.T, precision=HIGHEST)
        size = jnp.linalg.norm(f)
        damping = 1e-3 * jnp.minimum(size, 1) + 10 * jnp.finfo(f.dtype).eps
        return jnp.linalg.solve(matrix + damping * jnp.eye(len(y), dtype=f.dtype), f)

    start = jnp.zeros_like(coefficients(basis, params))
    eps = jnp.finfo(start.dtype).eps
    first = value_and_gradient(start)
    allowed = jnp.maximum(
        tol * optax.tree.norm(move(start)), 4 * eps * optax.tree.norm(params)
    )

    def step(carry: Any) -> Any:
        y, (d, f), count = carry
        direction = newton(y, f)
        slope = f @ direction

        def at(rate: jax.Array) -> Any:
            return rate, value_and_gradient(y + rate * direction)

        def too_long(trial: Any) -> Any:
            rate, (d_new, f_new) = trial
            risen = d_new > d + 1e-4 * rate * slope
            halved = jnp.linalg.norm(f_new) < jnp.linalg.norm(f) / 2
            return ~(risen | halved) & (rate > 1e-6)

        rate, found = jax.lax.while_loop(
            too_long, lambda trial: at(trial[0] / 4), at(jnp.ones((), f.dtype))
        )
        taken = rate > 1e-6
        plain = value_and_gradient(y + f)
        best = jax.tree.map(lambda a, b: jnp.where(taken, a, b), found, plain)
        return jnp.where(taken, y + rate * direction, y + f), best, count + 1

    def unfinished(carry: Any) -> Any:
        _, (_, f), count = carry
        return (jnp.linalg.norm(f) > allowed) & (count < MAX_STEPS)

    y, (_, f), count = jax.lax.while_loop(
        unfinished, step, (start, first, jnp.zeros((), jnp.int32))
    )
    point = dual_point(y)
    excess = jnp.linalg.norm(f) / jnp.where(allowed > 0, allowed, 1)
    return scaled(point, factors(point)[0]), excess, count


def _restored(params: PyTree, groups: Groups, basis: PyTree, found: PyTree) -> PyTree:
    """The point of the valley nearest to ``params`` that has the zeros of ``found``."""
    mask = channels_alive(groups, found).astype(jnp.float32)
    kept = scale_channels(groups, params, mask)
    left = jax.vmap(lambda u: scale_channels(groups, u, mask))(basis)
    lost = coefficients(basis, jax.tree.map(jnp.subtract, params, kept))
    weights = gram_inverse(inner(left, left)) @ lost
    return jax.tree.map(jnp.add, kept, combine(weights, left))


def _prepare(params: PyTree, groups: Groups, basis: PyTree) -> tuple[PyTree, PyTree]:
    """Checked parameters, at least float32, and orthonormal directions."""
    check_kind(groups)
    check_inexact(params)
    check_params(groups, params)
    basis, _ = fit_basis(basis, params)
    if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(params)):
        raise ValueError("params has entries that are not finite")
    return jax.tree.map(wide, params), orthonormal(basis)


def _scores(params: PyTree, groups: Groups, basis: PyTree, weights: Any) -> jax.Array:
    factors = groups.split(channel_weights(groups, weights))
    units, pushed = [], None
    for part in _disjoint(groups):
        norms = channel_norms(part, params)
        inverse = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)
        unit = _only_producers(part, scale_channels(part, params, inverse))
        push = part.join({name: factors[name] for name in part.sizes})
        push = scale_channels(part, unit, push.astype(norms.dtype))
        pushed = push if pushed is None else jax.tree.map(jnp.add, pushed, push)
        units.append((part, unit))
    sharp = sharp_part(basis, inner(basis, basis), pushed)
    flat = jax.tree.map(jnp.subtract, pushed, sharp)
    found: dict[str, jax.Array] = {}
    for part, unit in units:
        found |= part.split(channel_products(part, unit, flat))
    return groups.join(found)


def _disjoint(groups: Groups) -> list[Groups]:
    """The dimensions in as few parts as it takes for none to share entries."""
    shared = {frozenset((a.name, b.name)) for _, a, b in overlaps(groups)}
    parts: list[list[str]] = []
    for name in groups.sizes:
        for part in parts:
            if not any(frozenset((name, other)) in shared for other in part):
                part.append(name)
                break
        else:
            parts.append([name])
    return [groups.without(*(groups.sizes.keys() - set(names))) for names in parts]


def _only_producers(groups: Groups, tree: PyTree) -> PyTree:
    """The entries that belong to a channel; all others are zero."""
    rest = scale_channels(groups, tree, jnp.zeros(groups.num_channels))
    return jax.tree.map(jnp.subtract, tree, rest)


def _vanishing(norms: jax.Array, scores: jax.Array) -> jax.Array:
    """The strength at which channels vanish."""
    free = scores > 0
    strength = jnp.where(free, norms / jnp.where(free, scores, 1), jnp.inf)
    return jnp.where(norms > 0, strength, 0)


def _reach(
    solver: _Solver, groups: Groups, sparsity: float
) -> tuple[float, PyTree, int]:
    """The least strength that makes the asked-for share of channels zero."""
    if not sparsity < 1:
        raise ValueError(f"sparsity must be a number in [0, 1); got {sparsity!r}")
    wanted = round(sparsity * groups.num_channels)
    point, steps = solver.at(0.0)
    if solver.zeros(point) >= wanted:
        return 0.0, point, steps
    high = float(jnp.max(solver.norms))
    low, best = 0.0, None
    for _ in range(20):
        try:
            point, steps = solver.at(high)
        except RuntimeError:
            break
        if solver.zeros(point) >= wanted:
            best = point, steps
            break
        low, high = high, 2 * high
    if best is None:
        raise ValueError(
            f"no strength makes {wanted} of {groups.num_channels} channels zero: at "
            f"{low:.1e} it is {solver.zeros(solver.at(low)[0])}; floors and sharp "
            "directions hold the others. Ask for less, or give fewer directions"
        )
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        point, steps = solver.at(middle)
        if solver.zeros(point) >= wanted:
            high, best = middle, (point, steps)
        else:
            low = middle
    return high, *best
