"""Curvature of the training loss without a Hessian matrix.

All it takes are products with a vector, summed over a pass through the data, one batch
at a time: memory for a few vectors, time linear in data and in products.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse.linalg

from sdp_jax.base import check_inexact
from sdp_jax.tree import PyTree
from sdp_jax.valley.vectors import ravel, unravel, wide

# Called with what is going on, how much of it is done, and how much there is, if known.
Progress: TypeAlias = Callable[[str, int, int | None], None]
LossFn: TypeAlias = Callable[[PyTree, Any], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Eigenvalues and eigenvectors of a curvature matrix, the largest first.

    Attributes:
      values: the eigenvalues, ``(rank,)``, in units of loss per squared parameter.
      vectors: the orthonormal eigenvectors: a tree shaped like the parameters, each
        leaf with a leading axis ``rank``.
      errors: for each pair the norm of ``H u − λ u``: some eigenvalue of ``H`` lies
        that near to ``λ``, ``(rank,)``.
      angles: for each vector an estimate of the sine of its angle to the true one: its
        error over the distance of ``λ`` to its neighbours, at most 1, ``(rank,)``.
      products: how many passes over the data it took.
    """

    values: np.ndarray
    vectors: PyTree
    errors: np.ndarray
    angles: np.ndarray
    products: int


@dataclasses.dataclass(frozen=True, eq=False)
class SpectralDensity:
    """Density of the eigenvalues of a curvature matrix, by Lanczos quadrature.

    Attributes:
      nodes: for each probe the places of its quadrature, ``(probes, steps)``.
      weights: how much of the spectrum each stands for; 1 in all for each probe.
      size: number of eigenvalues, that is of parameters.
    """

    nodes: np.ndarray
    weights: np.ndarray
    size: int

    def at(self, grid: Any, width: float) -> np.ndarray:
        """The density at some places, smoothed with a Gaussian.

        Args:
          grid: places, ``(n,)``.
          width: standard deviation of the Gaussian.

        Returns:
          The mean over probes, ``(n,)``; its integral is 1.

        Raises:
          ValueError: if ``width`` is not positive.
        """
        if not width > 0:
            raise ValueError(f"width must be positive; got {width!r}")
        distance = (np.asarray(grid, float) - self.nodes[..., None]) / width
        bumps = np.exp(-0.5 * distance**2) / (width * np.sqrt(2 * np.pi))
        return (self.weights[..., None] * bumps).sum(1).mean(0)

    def moment(self, power: int) -> tuple[float, float]:
        """Mean of a power of the eigenvalues, and its standard error over the probes.

        Args:
          power: the power; 1 gives the trace over the number of parameters.

        Returns:
          The mean, and its error (not a number for a single probe).
        """
        means = (self.weights * self.nodes**power).sum(1)
        count = len(means)
        error = means.std(ddof=1) / count**0.5 if count > 1 else float("nan")
        return float(means.mean()), float(error)


def curvature_product(
    loss_fn: LossFn,
    params: PyTree,
    data: Iterable[Any],
    *,
    output_fn: Callable[[PyTree, Any], Any] | None = None,
) -> Callable[[PyTree], PyTree]:
    """Products of the Hessian of the training loss with vectors.

    The loss is the mean over all examples of all batches; batches may differ in size.
    Each product is a pass over ``data``, at about twice the cost of its gradient.

    Args:
      loss_fn: ``loss_fn(params, batch)``, the mean loss of a batch.
      params: where; real parameters, which are taken in at least float32.
      data: batches that can be gone through again and again: a list, a loader; each a
        tree of arrays; the first axis of the largest counts the examples.
      output_fn: gives products with the Gauss–Newton matrix instead:
        ``output_fn(params, batch)`` is what the model computes, and ``loss_fn(outputs,
        batch)`` the mean loss of that.

    Returns:
      ``product(vector)``: from a tree like the parameters to another one.

    Raises:
      ValueError: if ``data`` is empty, or a vector has another structure.
      TypeError: if ``data`` can be gone through only once, or a parameter is not real.

    References:
      Pearlmutter, "Fast exact multiplication by the Hessian", 1994; Schraudolph, "Fast
      curvature matrix-vector products", 2002.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> loss = lambda w, x: jnp.mean((x @ w) ** 2) / 2
      >>> data = [jnp.array([[3., 0.]]), jnp.array([[0., 1.], [0., 1.], [0., 1.]])]
      >>> product = sdp_jax.valley.curvature_product(loss, jnp.zeros(2), data)
      >>> print(product(jnp.ones(2)))  # (9 / 4, 3 / 4)
      [2.25 0.75]
    """
    check_real(params)
    check_data(data)
    params = jax.tree.map(wide, params)

    on_batch = _product_on_batch(loss_fn, output_fn)
    add = jax.jit(lambda a, b, w: jax.tree.map(lambda x, y: x + w * y, a, b))

    def product(vector: PyTree) -> PyTree:
        want, have = jax.tree.structure(params), jax.tree.structure(vector)
        if want != have:
            raise ValueError(
                f"the vector has structure {have}, but the parameters have {want}"
            )
        vector = jax.tree.map(lambda v, p: jnp.asarray(v, p.dtype), vector, params)
        total, count = jax.tree.map(jnp.zeros_like, params), 0
        for batch in data:
            size = examples(batch)
            total = add(total, on_batch(params, vector, batch), float(size))
            count += size
        if not count:
            raise ValueError("data had batches once, but not the second time")
        return jax.tree.map(lambda x: x / count, total)

    return product


def top_eigenpairs(
    loss_fn: LossFn,
    params: PyTree,
    data: Iterable[Any],
    rank: int = 10,
    *,
    output_fn: Callable[[PyTree, Any], Any] | None = None,
    tol: float = 1e-3,
    seed: int = 0,
    max_products: int | None = None,
    progress: Progress | None = None,
) -> Eigenpairs:
    """The largest eigenvalues of the Hessian of the training loss, with eigenvectors.

    ARPACK's implicitly restarted Lanczos method (through SciPy), in float64 on the
    host, with a pass over ``data`` for each product: about three to six for each pair,
    more where eigenvalues lie close together. It holds ``max(2 rank + 3, 20)`` vectors.

    Args:
      loss_fn: ``loss_fn(params, batch)``, the mean loss of a batch.
      params: where; real parameters.
      data: batches that can be gone through again, see
        :func:`sdp_jax.valley.curvature_product`.
      rank: how many pairs.
      output_fn: for the Gauss–Newton matrix, see
        :func:`sdp_jax.valley.curvature_product`.
      tol: relative accuracy of the eigenvalues that is asked for. In float32 a product
        is accurate to about 1e-6 of the largest.
      seed: of the first vector. Where several eigenvalues are alike, which of their
        vectors come out is up to ARPACK.
      max_products: give up after about so many products; default: SciPy's limit.
      progress: called as ``progress("eigenpairs", products, None)``.

    Returns:
      The pairs, the largest eigenvalue first, with errors that were measured, by a
      product for each pair.

    Raises:
      ValueError: if ``rank`` is not between 1 and the number of parameters, or the
        curvature is not finite; and as :func:`sdp_jax.valley.curvature_product`.
      TypeError: as :func:`sdp_jax.valley.curvature_product`.
      RuntimeError: if the pairs did not converge.

    References:
      Lehoucq, Sorensen, Yang, "ARPACK Users' Guide", 1998; Davis and Kahan, "The
      rotation of eigenvectors by a perturbation", 1970, for the angles.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> loss = lambda w, scales: jnp.sum(scales * w ** 2) / 2
      >>> data = [jnp.array([4., 1., 9., 2.])]
      >>> pairs = sdp_jax.valley.top_eigenpairs(loss, jnp.zeros(4), data, rank=2)
      >>> print(pairs.values.round(3), abs(pairs.vectors).round(3))
      [9. 4.] [[0. 0. 1. 0.]
       [1. 0. 0. 0.]]
    """
    product = curvature_product(loss_fn, params, data, output_fn=output_fn)
    return eigenpairs_of(
        product,
        params,
        rank,
        tol=tol,
        seed=seed,
        max_products=max_products,
        progress=progress,
    )


def eigenpairs_of(
    product: Callable[[PyTree], PyTree],
    params: PyTree,
    rank: int,
    *,
    tol: float,
    seed: int,
    max_products: int | None = None,
    progress: Progress | None = None,
) -> Eigenpairs:
    """:func:`top_eigenpairs` of a matrix that is known by its products."""
    size = sum(np.size(x) for x in jax.tree.leaves(params))
    whole = isinstance(rank, int | np.integer) and not isinstance(rank, bool)
    if not whole or not 1 <= rank <= size:
        raise ValueError(
            f"rank must be an integer between 1 and {size}, the number of parameters; "
            f"got {rank!r}"
        )
    apply = _Counted(product, params, "eigenpairs", progress)
    lanczos = max(2 * rank + 3, 20)
    if lanczos >= size:
        # A small problem: all columns, and LAPACK.
        matrix = np.stack([apply(e) for e in np.eye(size)], axis=1)
        values, columns = scipy.linalg.eigh((matrix + matrix.T) / 2)
    else:
        linear: Any = scipy.sparse.linalg  # Its stubs know no functions as operators.
        operator = linear.LinearOperator(
            shape=(size, size), matvec=apply, dtype=np.float64
        )
        start = np.random.default_rng(seed).normal(size=size)
        limit = None
        if max_products is not None:
            limit = max(1, max_products // max(1, lanczos - rank - 1))
        try:
            values, columns = linear.eigsh(
                operator,
                rank + 1,
                which="LA",
                tol=tol,
                v0=start,
                ncv=lanczos,
                maxiter=limit,
            )
        except linear.ArpackNoConvergence as error:
            raise RuntimeError(
                f"{len(error.eigenvalues)} of {rank + 1} eigenpairs converged in "
                f"{apply.count} products; give a larger tol (now {tol}), a larger "
                "max_products, or a smaller rank"
            ) from error
        except linear.ArpackError as error:
            raise RuntimeError(
                f"ARPACK gave up ({error}); is the curvature zero everywhere?"
            ) from error
    order = np.argsort(-values)[: rank + 1]
    values, columns = values[order], columns[:, order]
    gaps = _gaps(values, rank)
    values, columns = values[:rank], columns[:, :rank]
    errors = np.asarray(
        [
            np.linalg.norm(apply(u) - s * u)
            for u, s in zip(columns.T, values, strict=True)
        ]
    )
    return Eigenpairs(
        values,
        unravel(columns.T, params),
        errors,
        np.minimum(1, errors / np.maximum(gaps, 1e-300)),
        apply.count,
    )


def spectral_density(
    loss_fn: LossFn,
    params: PyTree,
    data: Iterable[Any],
    *,
    output_fn: Callable[[PyTree, Any], Any] | None = None,
    steps: int = 32,
    probes: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> SpectralDensity:
    """Density of the eigenvalues of the Hessian, by stochastic Lanczos quadrature.

    ``steps`` products for each of ``probes`` random vectors; the Lanczos vectors are
    orthogonalised against all earlier ones, in float64 on the host.

    Args:
      loss_fn: ``loss_fn(params, batch)``, the mean loss of a batch.
      params: where; real parameters.
      data: batches that can be gone through again, see
        :func:`sdp_jax.valley.curvature_product`.
      output_fn: for the Gauss–Newton matrix, see
        :func:`sdp_jax.valley.curvature_product`.
      steps: products for each probe; moments up to the power ``2 steps − 1`` are exact
        for that probe.
      probes: number of random vectors.
      seed: of the random vectors.
      progress: called as ``progress("density", products, steps * probes)``.

    Returns:
      Nodes and weights of the quadrature.

    Raises:
      ValueError: if ``steps`` or ``probes`` is below 1, or the curvature is not finite;
        and as :func:`sdp_jax.valley.curvature_product`.
      TypeError: as :func:`sdp_jax.valley.curvature_product`.

    References:
      Ghorbani, Krishnan, Xiao, "An Investigation into Neural Net Optimization via
      Hessian Eigenvalue Density", ICML 2019, arXiv 1901.10159; Golub and Welsch 1969.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> loss = lambda w, scales: jnp.sum(scales * w ** 2) / 2
      >>> density = sdp_jax.valley.spectral_density(
      ...     loss, jnp.zeros(4), [jnp.array([4., 1., 9., 2.])], steps=4)
      >>> print(density.nodes.round(3))
      [[1. 2. 4. 9.]]
    """
    for name, value in (("steps", steps), ("probes", probes)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1; got {value!r}")
    product = curvature_product(loss_fn, params, data, output_fn=output_fn)
    return density_of(
        product, params, steps=steps, probes=probes, seed=seed, progress=progress
    )


def density_of(
    product: Callable[[PyTree], PyTree],
    params: PyTree,
    *,
    steps: int,
    probes: int,
    seed: int,
    progress: Progress | None = None,
) -> SpectralDensity:
    """:func:`spectral_density` of a matrix that is known by its products."""
    size = sum(np.size(x) for x in jax.tree.leaves(params))
    steps = min(steps, size)
    apply = _Counted(product, params, "density", progress, steps * probes)
    rng = np.random.default_rng(seed)
    nodes, weights = np.zeros((probes, steps)), np.zeros((probes, steps))
    for probe in range(probes):
        # Any direction alike: the weights are then right in the mean.
        start = rng.normal(size=size)
        diagonal, beside = _lanczos(apply, start / np.linalg.norm(start), steps)
        found, vectors = scipy.linalg.eigh_tridiagonal(diagonal, beside)
        nodes[probe, : len(found)] = found
        weights[probe, : len(found)] = vectors[0] ** 2
    return SpectralDensity(nodes, weights, size)


def check_real(params: PyTree) -> None:
    """Refuses parameters that have no Hessian."""
    check_inexact(params)
    leaves = jax.tree.leaves(params)
    if not leaves:
        raise ValueError("params has no leaf: there is nothing to differentiate")
    if any(jnp.iscomplexobj(x) for x in leaves):
        raise TypeError(
            "curvature is computed for real parameters only; split complex ones into "
            "real and imaginary parts"
        )


def check_data(data: Any) -> None:
    """Refuses data that cannot be gone through again and again."""
    try:
        first = iter(data)
    except TypeError:
        first = None
    if (
        first is None
        or first is data
        or isinstance(data, dict | jax.Array | np.ndarray)
        or hasattr(data, "_fields")  # One batch that is a named tuple.
    ):
        raise TypeError(
            "data must be batches that can be gone through again and again, such as a "
            f"list of batches or a loader; got {type(data).__name__}"
            + (": make it a list" if first is data else "")
        )
    if next(first, None) is None:
        raise ValueError("data has no batch")


def examples(batch: Any) -> int:
    """Number of examples in a batch: the first axis of its largest array, else 1."""
    arrays = [x for x in jax.tree.leaves(batch) if np.ndim(x)]
    return max(arrays, key=np.size).shape[0] if arrays else 1


def _product_on_batch(
    loss_fn: LossFn, output_fn: Callable[[PyTree, Any], Any] | None
) -> Callable[[PyTree, PyTree, Any], PyTree]:
    """``point, vector, batch -> product``, compiled."""

    def hessian(point: PyTree, vector: PyTree, batch: Any) -> PyTree:
        gradient = jax.grad(lambda p: loss_fn(p, batch))
        return jax.jvp(gradient, (point,), (vector,))[1]

    def gauss_newton(point: PyTree, vector: PyTree, batch: Any) -> PyTree:
        def outputs_of(p: PyTree) -> Any:
            assert output_fn is not None
            return output_fn(p, batch)

        outputs, pushed = jax.jvp(outputs_of, (point,), (vector,))
        _, pull = jax.vjp(outputs_of, point)
        gradient = jax.grad(lambda o: loss_fn(o, batch))
        return pull(jax.jvp(gradient, (outputs,), (pushed,))[1])[0]

    return jax.jit(hessian if output_fn is None else gauss_newton)


class _Counted:
    """A product with trees as one with NumPy vectors, counted."""

    def __init__(
        self,
        product: Callable[[PyTree], PyTree],
        params: PyTree,
        stage: str,
        progress: Progress | None,
        total: int | None = None,
    ):
        self.count = 0
        self._product, self._params = product, params
        self._stage, self._progress, self._total = stage, progress, total

    def __call__(self, vector: np.ndarray) -> np.ndarray:
        out = ravel(self._product(unravel(vector.reshape(-1), self._params)))
        self.count += 1
        if not np.isfinite(out).all():
            raise ValueError(
                "the curvature is not finite: the loss, or a derivative of it, is not "
                "finite at these parameters"
            )
        if self._progress is not None:
            self._progress(self._stage, self.count, self._total)
        return out


def _gaps(values: np.ndarray, rank: int) -> np.ndarray:
    """Distance of each of the first eigenvalues to the nearest other one."""
    gaps = np.full(rank, np.inf)
    for i in range(rank):
        others = np.delete(values, i)
        if len(others):
            gaps[i] = np.abs(others - values[i]).min()
    return gaps


def _lanczos(
    apply: Callable[[np.ndarray], np.ndarray], start: np.ndarray, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Diagonal and second diagonal of the tridiagonal matrix."""
    basis = np.zeros((steps, len(start)))
    basis[0] = start
    diagonal, beside = np.zeros(steps), np.zeros(steps)
    count = 0
    while count < steps:
        image = apply(basis[count])
        diagonal[count] = basis[count] @ image
        count += 1
        for _ in range(2):
            image -= basis[:count].T @ (basis[:count] @ image)
        length = np.linalg.norm(image)
        scale = np.abs(diagonal[:count]).max() + beside[: count - 1].max(initial=0)
        if count == steps or length <= 1e-7 * scale:
            break
        beside[count - 1] = length
        basis[count] = image / length
    return diagonal[:count], beside[: count - 1]
