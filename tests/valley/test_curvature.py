"""Curvature against dense matrices in float64."""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import sdp_jax
from sdp_jax.valley.vectors import ravel
from tests import toy

BATCHES = [toy.batch(seed=i, size=size) for i, size in enumerate((16, 16, 5))]


def smooth_apply(params, x):
    for i in range(len(params)):
        x = x @ params[f"layer{i}"]["kernel"] + params[f"layer{i}"]["bias"]
        x = jnp.tanh(x) if i < len(params) - 1 else x
    return x


def smooth_loss(params, batch):
    return jnp.mean((smooth_apply(params, batch[0]) - batch[1]) ** 2)


def in_double(batches=BATCHES):
    return [jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), b) for b in batches]


def dense_hessian(params, batches, loss=smooth_loss):
    flat, back = ravel_pytree(params)
    whole = jax.tree.map(lambda *x: jnp.concatenate(x), *batches)
    return np.asarray(jax.hessian(lambda v: loss(back(v), whole))(flat))


def rows(basis):
    rank = jax.tree.leaves(basis)[0].shape[0]
    return np.stack(
        [ravel(jax.tree.map(lambda u, i=i: u[i], basis)) for i in range(rank)]
    )


def test_products_are_those_of_the_dense_hessian(x64):
    params = toy.mlp_params(dtype=jnp.float64)
    batches = in_double()
    product = sdp_jax.valley.curvature_product(smooth_loss, params, batches)
    H = dense_hessian(params, batches)
    vector = toy.mlp_grads(params)
    np.testing.assert_allclose(
        ravel(product(vector)), H @ ravel(vector), rtol=1e-10, atol=1e-12
    )


def test_gauss_newton_products_are_those_of_the_dense_matrix(x64):
    params = toy.mlp_params(dtype=jnp.float64)
    (batch,) = in_double(BATCHES[:1])

    def loss_of(outputs, batch):
        return jnp.mean((outputs - batch[1]) ** 2)

    product = sdp_jax.valley.curvature_product(
        loss_of, params, [batch], output_fn=lambda p, b: smooth_apply(p, b[0])
    )
    flat, back = ravel_pytree(params)
    J = np.asarray(
        jax.jacobian(lambda v: smooth_apply(back(v), batch[0]).ravel())(flat)
    )
    vector = toy.mlp_grads(params)
    want = 2 / J.shape[0] * J.T @ (J @ ravel(vector))
    np.testing.assert_allclose(ravel(product(vector)), want, rtol=1e-10, atol=1e-12)


def test_eigenpairs_are_those_of_the_dense_hessian(x64):
    params = toy.mlp_params(dtype=jnp.float64)
    batches = in_double()
    seen = []
    pairs = sdp_jax.valley.top_eigenpairs(
        smooth_loss,
        params,
        batches,
        5,
        tol=1e-12,
        progress=lambda *what: seen.append(what),
    )
    values, vectors = np.linalg.eigh(dense_hessian(params, batches))
    np.testing.assert_allclose(pairs.values, values[::-1][:5], rtol=1e-6)
    found = rows(pairs.vectors)
    np.testing.assert_allclose(found @ found.T, np.eye(5), atol=1e-9)
    cosines = np.abs(np.sum(found * vectors[:, ::-1][:, :5].T, axis=1))
    np.testing.assert_allclose(cosines, 1, atol=1e-6)
    assert (pairs.errors < 1e-6 * pairs.values[0]).all()
    assert seen[-1] == ("eigenpairs", pairs.products, None)
    assert [n for _, n, _ in seen] == list(range(1, pairs.products + 1))


@pytest.mark.parametrize("size", [6, 300])
def test_eigenpairs_of_a_known_spectrum(size, x64):
    # Small problems go through LAPACK, larger ones through ARPACK.
    rng = np.random.default_rng(0)
    spectrum = np.concatenate([[9.0, 4.0, 3.9], np.linspace(-1, 1, size - 3)])
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    H = jnp.asarray((basis * spectrum) @ basis.T)
    data = [jnp.asarray(w) for w in (0.5, 1.5)]  # Batches without an axis count alike.

    def loss(w, scale):
        return scale * w @ H @ w / 2

    pairs = sdp_jax.valley.top_eigenpairs(loss, jnp.zeros(size), data, 3, tol=1e-10)
    np.testing.assert_allclose(pairs.values, [9.0, 4.0, 3.9], rtol=1e-6)
    cosines = np.abs(np.sum(np.asarray(pairs.vectors) * basis[:, :3].T, axis=1))
    np.testing.assert_allclose(cosines, 1, atol=1e-6)


def test_error_estimates_hold_at_coarse_tolerances(x64):
    rng = np.random.default_rng(1)
    spectrum = np.sort(rng.gamma(0.5, size=400))[::-1]
    basis = np.linalg.qr(rng.normal(size=(400, 400)))[0]
    H = jnp.asarray((basis * spectrum) @ basis.T)
    pairs = sdp_jax.valley.top_eigenpairs(
        lambda w, _: w @ H @ w / 2, jnp.zeros(400), [jnp.ones(1)], 8, tol=0.05
    )
    assert pairs.errors.max() > 1e-6  # There is something to estimate.
    U = np.asarray(pairs.vectors)
    errors = np.linalg.norm(U @ H - pairs.values[:, None] * U, axis=1)
    np.testing.assert_allclose(pairs.errors, errors, rtol=1e-6, atol=1e-13)
    assert pairs.angles.min() < 0.1  # They are not all unknown.
    off = np.abs(spectrum[:, None] - pairs.values).min(axis=0)
    assert (off <= pairs.errors + 1e-12).all()
    sines = np.sqrt(
        np.maximum(
            0, 1 - np.sum(np.asarray(pairs.vectors) * basis[:, :8].T, axis=1) ** 2
        )
    )
    assert (sines <= 2 * pairs.angles + 1e-6).all()


def test_half_precision_parameters_are_taken_in_float32():
    params = toy.mlp_params(dtype=jnp.bfloat16)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    found = sdp_jax.valley.top_eigenpairs(smooth_loss, params, BATCHES, 2)
    want = sdp_jax.valley.top_eigenpairs(smooth_loss, wide, BATCHES, 2)
    np.testing.assert_allclose(found.values, want.values, rtol=1e-6)
    assert found.vectors["layer0"]["kernel"].dtype == jnp.float32


def test_a_loader_that_can_be_gone_through_again_will_do(x64):
    class Loader:
        def __iter__(self):
            return iter(in_double())

    params = toy.mlp_params(dtype=jnp.float64)
    found = sdp_jax.valley.top_eigenpairs(smooth_loss, params, Loader(), 1)
    want = sdp_jax.valley.top_eigenpairs(smooth_loss, params, in_double(), 1)
    np.testing.assert_allclose(found.values, want.values, rtol=1e-10)


def test_density_of_all_eigenvalues(x64):
    params = toy.mlp_params(widths=(4, 3, 2), dtype=jnp.float64)
    batches = [
        jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), toy.batch(outputs=2))
    ]
    H = dense_hessian(params, batches)
    values = np.linalg.eigvalsh(H)
    # As many steps as parameters: the nodes are the eigenvalues.
    whole = sdp_jax.valley.spectral_density(smooth_loss, params, batches, steps=len(H))
    spread = np.abs(whole.nodes[0][:, None] - values).min(axis=1)
    np.testing.assert_allclose(spread, 0, atol=1e-7 * values.max())
    few = sdp_jax.valley.spectral_density(
        smooth_loss, params, batches, steps=4, probes=60
    )
    for power in (1, 2, 3):
        mean, error = few.moment(power)
        assert abs(mean - (values**power).mean()) < 4 * error
        each = (few.weights * few.nodes**power).sum(axis=1)
        assert error == pytest.approx(each.std(ddof=1) / 60**0.5)
    np.testing.assert_allclose(few.weights.sum(axis=1), 1, rtol=1e-10)
    grid = np.linspace(-10, 20, 4001)
    assert np.trapezoid(few.at(grid, 0.1), grid) == pytest.approx(1, abs=1e-3)
    assert np.isnan(whole.moment(1)[1])  # One probe has no spread.


def test_density_stops_where_the_krylov_space_ends(x64):
    # Two distinct eigenvalues: two steps see all there is.
    scales = jnp.asarray([2.0] * 5 + [0.0] * 15)
    density = sdp_jax.valley.spectral_density(
        lambda w, s: jnp.sum(s * w**2) / 2, jnp.zeros(20), [scales], steps=10
    )
    used = density.weights[0] > 0
    np.testing.assert_allclose(np.sort(density.nodes[0][used]), [0, 2], atol=1e-9)
    assert density.at([1.0], 0.1).shape == (1,)


def test_what_does_not_converge_says_so(x64):
    spectrum = jnp.linspace(0.999, 1, 500)
    with pytest.raises(RuntimeError, match=r"converged in \d+ products; give a larger"):
        sdp_jax.valley.top_eigenpairs(
            lambda w, _: jnp.sum(spectrum * w**2) / 2,
            jnp.zeros(500),
            [jnp.ones(1)],
            3,
            tol=1e-12,
            max_products=30,
        )


def test_products_grow_linearly_with_data_and_rank():
    # What is counted are calls of the loss: passes times batches.
    calls = []

    def counted(params, batch):
        jax.debug.callback(lambda: calls.append(1))
        return smooth_loss(params, batch)

    params = toy.mlp_params()
    for batches in (1, 3):
        calls.clear()
        product = sdp_jax.valley.curvature_product(
            counted, params, BATCHES[:1] * batches
        )
        for _ in range(2):
            product(params)
        jax.effects_barrier()
        assert len(calls) == 2 * batches
    # For each pair a few products: twice the rank about twice as many.
    spectrum = jnp.geomspace(1.0, 1e-4, 2000)
    counts = [
        sdp_jax.valley.top_eigenpairs(
            lambda w, _: jnp.sum(spectrum * w**2) / 2,
            jnp.zeros(2000),
            [jnp.ones(1)],
            rank,
            tol=0.01,
        ).products
        for rank in (10, 20, 40)
    ]
    assert all(1.2 < b / a < 3 for a, b in zip(counts[:-1], counts[1:], strict=True))


def test_on_digits_within_its_own_error():
    from experiments import data

    split = data.load("digits").train
    _compare_precisions(data.Split(*(x[::3] for x in split)), steps=50)


@pytest.mark.study
def test_on_mnist_within_its_own_error():
    from experiments import data

    folder = os.environ.get("SDP_JAX_DATA_DIR")
    if folder is None:
        pytest.skip("SDP_JAX_DATA_DIR does not name a directory with mnist.npz")
    split = data.load("mnist", pathlib.Path(folder)).train
    _compare_precisions(data.Split(*(x[::6] for x in split)), widths=(300, 100))


def _compare_precisions(split, widths=(20, 10), steps=100):
    """Eigenvalues in float32 against those in float64, at a trained network."""
    from experiments import models

    inputs = split.images.reshape(len(split.labels), -1)

    def batches(dtype):
        parts = np.array_split(np.arange(len(inputs)), 4)
        return [(jnp.asarray(inputs[i], dtype), split.labels[i]) for i in parts]

    model = models.Dnn(widths=widths)

    def loss(params, batch):
        logits = model.apply({"params": params}, batch[0])
        picked = jnp.take_along_axis(
            jax.nn.log_softmax(logits), batch[1][:, None], axis=1
        )
        return -picked.mean()

    params = model.init(jax.random.key(0), inputs[:1])["params"]
    step = jax.jit(
        lambda p, b: jax.tree.map(lambda x, g: x - 0.1 * g, p, jax.grad(loss)(p, b))
    )
    for _ in range(steps):
        for batch in batches(jnp.float32):
            params = step(params, batch)
    found = sdp_jax.valley.top_eigenpairs(
        loss, params, batches(jnp.float32), 5, tol=1e-3
    )
    with jax.enable_x64(True):
        model = models.Dnn(widths=widths)
        wide = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)
        want = sdp_jax.valley.top_eigenpairs(
            loss, wide, batches(jnp.float64), 5, tol=1e-9
        )
    assert (
        np.abs(found.values - want.values) <= found.errors + 1e-5 * want.values
    ).all()
    assert (found.errors <= 0.02 * want.values).all()
