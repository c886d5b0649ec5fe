"""Certifying: has pruning stayed in the valley of the reference?"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sdp_jax import prox
from sdp_jax.base import check_kind, check_params
from sdp_jax.channels import (
    channel_norms,
    channels_alive,
)
from sdp_jax.checks import check_number
from sdp_jax.factors import scale_channels
from sdp_jax.groups import Groups
from sdp_jax.tree import PyTree, leaf_table
from sdp_jax.valley.certificate import Certificate, Displacement
from sdp_jax.valley.curvature import (
    Eigenpairs,
    LossFn,
    Progress,
    check_data,
    check_real,
    curvature_product,
    density_of,
    eigenpairs_of,
    examples,
)
from sdp_jax.valley.path import (
    Metrics,
    metrics_along,
    on_curve,
    on_line,
    train_bend,
)
from sdp_jax.valley.statistics import make_reestimate
from sdp_jax.valley.vectors import (
    coefficients,
    fit_basis,
    inner,
    sharp_part,
    wide,
)


def certify(
    loss_fn: LossFn,
    reference: PyTree,
    params: PyTree,
    data: Iterable[Any],
    *,
    evaluate: Callable[..., Mapping[str, jax.Array]] | None = None,
    update_stats: Callable[[PyTree, PyTree, Any], PyTree] | None = None,
    stats: PyTree = None,
    test_data: Iterable[Any] | None = None,
    groups: Groups | None = None,
    rank: int = 10,
    eigenpairs: Eigenpairs | None = None,
    curvature_data: Iterable[Any] | None = None,
    tol: float = 1e-2,
    density_steps: int = 0,
    points: int = 11,
    curve_steps: int = 500,
    curve_optimizer: optax.GradientTransformation | None = None,
    tolerance: float = 0.02,
    scale: float | None = None,
    same_seed: bool = True,
    histories: Mapping[str, Sequence[float]] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Certificate:
    """Says whether a pruned solution lies in the same valley as the reference.

    The reference is the twin of the pruned run: trained by the base optimizer from the
    same initialisation in the same order of data. Measured are both solutions; the loss
    along the straight line between them and along a trained quadratic Bézier curve; and
    how much of the way from one to the other lies in the sharp directions of the
    reference, beside a random way and plain magnitude pruning.

    In the valley is what has a training loss at most ``tolerance`` above the reference
    and no higher barrier on the straight line. (A curve of low loss joins even
    independent solutions, Garipov et al. 2018, so it alone proves little.)

    Args:
      loss_fn: ``loss_fn(params, batch)``, the mean loss of a batch as in training; the
        curve and the curvature are those of this loss.
      reference: parameters of the reference.
      params: parameters of the pruned solution, zeros in place (not cut).
      data: training batches that can be gone through again, see
        :func:`sdp_jax.valley.curvature_product`.
      evaluate: ``evaluate(params, batch)`` gives means over the batch, ``{"loss": …,
        "accuracy": …}``; with ``update_stats`` it is ``evaluate(params, stats,
        batch)``. Default: ``loss_fn`` alone.
      update_stats: for models with batch normalisation: one update of the running
        statistics in training mode, ``update_stats(params, stats, batch)``. They are
        estimated anew at every point, see :func:`sdp_jax.valley.reestimate_statistics`.
      stats: running statistics of the right shapes, for ``update_stats``.
      test_data: test batches.
      groups: channel dimensions of ``params``, for the comparison with magnitude
        pruning.
      rank: number of sharp directions.
      eigenpairs: the pairs of the reference, if they are known; then ``rank`` does not
        count.
      curvature_data: batches for the curvature, if all of ``data`` takes too long.
      tol: relative accuracy of the eigenvalues.
      density_steps: products for the density of all eigenvalues; 0 for none.
      points: how many points of each path are measured, both ends included.
      curve_steps: steps of training the curve.
      curve_optimizer: default: Adam, its rate falling from 1e-3 to 0.
      tolerance: what gap and barrier may be, as a share of ``scale``.
      scale: the loss of knowing nothing; default: the loss with all parameters zero
        (``log(classes)`` for a classifier).
      same_seed: whether the two runs share initialisation and order of data.
      histories: training curves for the picture, by name.
      seed: of random vectors and of the curve.
      progress: called as ``progress(stage, done, total)``; the stages are
        ``"eigenpairs"`` (total unknown: ``None``), ``"density"``, ``"line"``,
        ``"curve"`` and ``"along the curve"``.

    Returns:
      The certificate.

    Raises:
      ValueError: if the two do not fit each other, an argument is out of range, a loss
        is not finite, or all parameters zero are no worse than the reference and no
        ``scale`` is given.
      TypeError: if data can be gone through only once, or parameters are not real.
      RuntimeError: if the eigenpairs do not converge.

    References:
      Chao, Wang, Xing, Cheng, arXiv 2006.09358 (the line of evidence); Garipov et al.,
      arXiv 1802.10026 (the curve); Li, Liu, Shao, Wang, Geng, arXiv 2107.05328 (the
      claim).

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> def loss(params, x):  # Of two parameters only the sum counts.
      ...     return jnp.mean((x * (params["w"].sum() - 2.0)) ** 2)
      >>> data = [jnp.array([1., 2.])]
      >>> reference = {"w": jnp.array([1.5, 0.5])}
      >>> pruned = {"w": jnp.array([2., 0.])}
      >>> certificate = sdp_jax.valley.certify(
      ...     loss, reference, pruned, data, rank=1, curve_steps=10)
      >>> certificate.in_valley
      True
      >>> shrunk = {"w": jnp.array([1.5, 0.])}
      >>> certificate = sdp_jax.valley.certify(
      ...     loss, reference, shrunk, data, rank=1, curve_steps=10)
      >>> print(certificate.verdict)
      Not in the valley: the training loss is 0.6250 higher, more than 0.2000.
    """
    _check(reference, params, groups, points, curve_steps, tolerance, density_steps)
    check_data(data)
    if test_data is not None:
        check_data(test_data)
    if (update_stats is None) != (stats is None):
        raise ValueError("update_stats and stats belong together; give both or neither")
    measure = _measurement(loss_fn, evaluate, update_stats, stats, data, test_data)
    ends = measure(reference), measure(params)
    for name, (train, _) in zip(("reference", "params"), ends, strict=True):
        if not math.isfinite(train["loss"]):
            raise ValueError(f"the training loss of {name} is {train['loss']}")
    if scale is None:
        nothing = measure(jax.tree.map(jnp.zeros_like, reference))[0]["loss"]
        if not math.isfinite(nothing) or nothing <= ends[0][0]["loss"]:
            raise ValueError(
                f"with all parameters zero the loss is {nothing}, which is no measure "
                "for the tolerance; give scale=, a loss that counts as knowing nothing"
            )
        scale = nothing
    else:
        scale = float(scale)
        check_number("scale", scale, low=1e-12, rule="a positive loss")
    curvature_data = data if curvature_data is None else curvature_data
    product = curvature_product(loss_fn, reference, curvature_data)
    if eigenpairs is None:
        eigenpairs = eigenpairs_of(
            product, reference, rank, tol=tol, seed=seed, progress=progress
        )
    basis, _ = fit_basis(eigenpairs.vectors, reference)
    density = None
    if density_steps:
        density = density_of(
            product,
            reference,
            steps=density_steps,
            probes=1,
            seed=seed,
            progress=progress,
        )
    moved = {"pruned": (params, ends[1][0])}
    for name, point in _others(reference, params, groups, seed).items():
        moved[name] = point, measure(point)[0]
    displacements = {
        name: _displacement(reference, point, train, basis, product)
        for name, (point, train) in moved.items()
    }
    places = np.linspace(0, 1, points)
    line = metrics_along(
        lambda t: on_line(reference, params, t),
        measure,
        places,
        ends=ends,
        stage="line",
        progress=progress,
    )
    bend = train_bend(
        loss_fn,
        reference,
        params,
        data,
        steps=curve_steps,
        optimizer=curve_optimizer,
        seed=seed,
        progress=progress,
    )
    curve = metrics_along(
        lambda t: on_curve(reference, bend, params, t),
        measure,
        places,
        ends=ends,
        stage="along the curve",
        progress=progress,
    )
    sparsity = None
    if groups is not None:
        alive = channels_alive(groups, params)
        sparsity = 1 - int(alive.sum()) / groups.num_channels
    reference_metrics, pruned_metrics = (
        {k: m for k, m in zip(("train", "test"), end, strict=True) if m} for end in ends
    )
    return Certificate(
        reference=reference_metrics,
        pruned=pruned_metrics,
        sparsity=sparsity,
        line=line,
        curve=curve,
        displacements=displacements,
        eigenvalues=np.asarray(eigenpairs.values),
        eigenvalue_errors=np.asarray(eigenpairs.errors),
        density=density,
        tolerance=float(tolerance * scale),
        same_seed=bool(same_seed),
        histories={k: [float(x) for x in v] for k, v in (histories or {}).items()},
    )


def _check(
    reference: PyTree,
    params: PyTree,
    groups: Groups | None,
    points: int,
    curve_steps: int,
    tolerance: float,
    density_steps: int,
) -> None:
    for name, tree in (("reference", reference), ("params", params)):
        check_real(tree)
        if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(tree)):
            raise ValueError(f"{name} has entries that are not finite")
    have, want = leaf_table(params), leaf_table(reference)
    if have.keys() != want.keys():
        raise ValueError(
            f"params has the leaves {sorted(have)}, but reference {sorted(want)}"
        )
    if jax.tree.structure(params) != jax.tree.structure(reference):
        raise ValueError(
            "params and reference have the same leaves in different containers: "
            f"{jax.tree.structure(params)} and {jax.tree.structure(reference)}"
        )
    for path, leaf in want.items():
        if np.shape(have[path]) != np.shape(leaf):
            raise ValueError(
                f"leaf {path!r} has shape {np.shape(have[path])} in params, but "
                f"{np.shape(leaf)} in reference; compare the pruned parameters before "
                "they are cut (cut.fill puts cut ones back)"
            )
    if groups is not None:
        check_kind(groups)
        check_params(groups, reference)
    low = {"points": 3, "curve_steps": 0, "density_steps": 0}
    given = {
        "points": points,
        "curve_steps": curve_steps,
        "density_steps": density_steps,
    }
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < low[name]:
            raise ValueError(
                f"{name} must be an integer of at least {low[name]}; got {value!r}"
            )
    check_number("tolerance", tolerance, low=1e-12, rule="a positive number")


def _measurement(
    loss_fn: LossFn,
    evaluate: Callable[..., Mapping[str, jax.Array]] | None,
    update_stats: Callable[[PyTree, PyTree, Any], PyTree] | None,
    stats: PyTree,
    data: Iterable[Any],
    test_data: Iterable[Any] | None,
) -> Callable[[PyTree], tuple[Metrics, Metrics]]:
    """From parameters to metrics on the training and the test data."""
    reestimate = None
    if update_stats is not None:
        reestimate = make_reestimate(update_stats, stats, data)

    def on_batch(params: PyTree, state: PyTree, batch: Any) -> Mapping[str, jax.Array]:
        if evaluate is None:
            return {"loss": loss_fn(params, batch)}
        found = evaluate(params, *([] if reestimate is None else [state]), batch)
        if not isinstance(found, Mapping) or "loss" not in found:
            raise ValueError(
                "evaluate must return a dictionary of means with 'loss' among them, "
                f"such as {{'loss': …, 'accuracy': …}}; got {found!r}"
            )
        return dict(found)

    compiled = jax.jit(on_batch)

    def over(batches: Iterable[Any] | None, params: PyTree, state: PyTree) -> Metrics:
        totals: dict[str, float] = {}
        count = 0
        for batch in batches or ():
            size = examples(batch)
            count += size
            for name, value in compiled(params, state, batch).items():
                totals[name] = totals.get(name, 0.0) + size * float(value)
        if batches is not None and not count:
            raise ValueError("data had batches once, but not the second time")
        return {name: total / count for name, total in totals.items()}

    def measure(params: PyTree) -> tuple[Metrics, Metrics]:
        state = None if reestimate is None else reestimate(params)
        return over(data, params, state), over(test_data, params, state)

    return measure


def _others(
    reference: PyTree, params: PyTree, groups: Groups | None, seed: int
) -> dict[str, PyTree]:
    """Moves to compare with: a random one, and magnitude pruning."""
    rng = np.random.default_rng(seed)

    def shaken(a: jax.Array, b: jax.Array) -> jax.Array:
        noise = jnp.asarray(rng.normal(size=np.shape(a)), wide(a).dtype)
        # Norms of all entries; a matrix has another one, and shards no flat form.
        length, size = (
            jnp.sqrt(jnp.sum(jnp.abs(x) ** 2)) for x in (wide(b) - wide(a), noise)
        )
        return (wide(a) + noise * length / jnp.maximum(size, 1e-30)).astype(a.dtype)

    others = {"random": jax.tree.map(shaken, reference, params)}
    if groups is None:
        return others
    alive = channels_alive(groups, params)
    if not bool(alive.all()):
        norms = channel_norms(groups, reference)
        counts = [int(x.sum()) for x in groups.split(alive).values()]
        keep = prox.largest_each(groups, norms, counts).astype(norms.dtype)
        others["magnitude"] = scale_channels(groups, reference, keep)
    return others


def _displacement(
    reference: PyTree,
    point: PyTree,
    train: Metrics,
    basis: PyTree,
    product: Callable[[PyTree], PyTree],
) -> Displacement:
    move = jax.tree.map(lambda a, b: wide(b) - wide(a), reference, point)
    length = float(optax.tree.norm(move))
    if length == 0:
        return Displacement(0.0, 0.0, 0.0, train)
    unit = jax.tree.map(lambda x: x / length, move)
    sharp = sharp_part(basis, inner(basis, basis), unit)
    # The product of two trees, as that of bases of rank 1.
    curvature = coefficients(jax.tree.map(lambda x: x[None], unit), product(unit))[0]
    return Displacement(length, float(optax.tree.norm(sharp)), float(curvature), train)
