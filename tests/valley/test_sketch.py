"""Sketches against NumPy in float64, and the guarantees of their papers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdp_jax.valley.sketch import ESTIMATORS, track
from sdp_jax.valley.vectors import inner

DIM = 24


def sketch(stream, rank, estimator, decay, dtype=jnp.float64):
    """Feeds rows of a matrix; returns basis ``(rank, DIM)`` and energies."""
    basis = {"a": jnp.zeros((rank, 4, 3), dtype), "b": jnp.zeros((rank, 12), dtype)}
    energy = jnp.zeros(rank)
    take = jax.jit(functools.partial(track, ESTIMATORS[estimator], decay=decay))
    for row in stream:
        step = {"a": jnp.asarray(row[:12].reshape(4, 3)), "b": jnp.asarray(row[12:])}
        basis, energy = take(basis, inner(basis, basis), energy, step)
    flat = [np.asarray(x, np.float64).reshape(rank, -1) for x in basis.values()]
    return np.concatenate(flat, axis=1), np.asarray(energy)


def unit(stream):
    return stream / np.linalg.norm(stream, axis=1, keepdims=True)


@pytest.mark.parametrize("decay", [0.8, 1.0])
def test_svd_is_exact_for_a_stream_of_low_rank(decay, x64):
    rng = np.random.default_rng(0)
    stream = rng.normal(size=(40, 3)) @ rng.normal(size=(3, DIM))
    basis, energy = sketch(stream, 4, "svd", decay)
    rows = unit(stream) * decay ** (np.arange(40)[::-1] / 2)[:, None]
    values, vectors = np.linalg.eigh(rows.T @ rows)
    np.testing.assert_allclose(energy, [*values[::-1][:3], 0], rtol=1e-8, atol=1e-9)
    found = (basis.T * energy) @ basis
    np.testing.assert_allclose(found, rows.T @ rows, atol=1e-8)
    np.testing.assert_allclose(
        np.abs(basis[:3] @ vectors[:, ::-1][:, :3]), np.eye(3), atol=1e-6
    )


@pytest.mark.parametrize("rank", [2, 5, 8])
def test_frequent_directions_keep_their_guarantee(rank, x64):
    # 0 ≤ A'A − B'B ≤ ‖A‖² / (rank + 1), Ghashami et al. 2016 with a buffer of one row.
    rng = np.random.default_rng(1)
    stream = rng.normal(size=(100, DIM)) * np.geomspace(1, 0.05, DIM)
    basis, energy = sketch(stream, rank, "frequent_directions", 1.0)
    rows = unit(stream)
    error = np.linalg.eigvalsh(rows.T @ rows - (basis.T * energy) @ basis)
    assert error.min() > -1e-9
    assert error.max() <= len(rows) / (rank + 1)


def test_oja_is_the_rule_of_its_paper(x64):
    rng = np.random.default_rng(2)
    stream = rng.normal(size=(5, DIM))
    basis, energy = sketch(stream, 2, "oja", 0.9)
    # The first two rows fill the empty places; then U ← orth(U + η (U x) x').
    rows = unit(stream)
    U, e = np.zeros((2, DIM)), np.zeros(2)
    for n, x in enumerate(rows):
        c = U @ x
        rest = x - U.T @ c
        U = U + 0.1 * np.outer(c, x)
        if n < 2:
            U[n] = rest / np.linalg.norm(rest)
        left, _, right = np.linalg.svd(U[: n + 1], full_matrices=False)
        U[: n + 1] = left @ right
        e = 0.9 * e + (U @ x) ** 2
    np.testing.assert_allclose(basis, U, atol=1e-10)
    np.testing.assert_allclose(energy, e, atol=1e-10)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_finds_the_strong_directions_of_a_noisy_stream(estimator, x64):
    rng = np.random.default_rng(3)
    strong = np.linalg.qr(rng.normal(size=(DIM, 3)))[0]
    stream = rng.normal(size=(1500, 3)) @ strong.T * 3
    stream = stream + 0.3 * rng.normal(size=(1500, DIM))
    basis, _ = sketch(stream, 4, estimator, 0.99)
    np.testing.assert_allclose(basis @ basis.T, np.eye(4), atol=1e-9)
    cosines = np.linalg.svd(basis @ strong)[1]
    assert cosines.min() > 0.98


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype,error", [(jnp.float32, 1e-5), (jnp.bfloat16, 0.03)])
def test_directions_stay_orthonormal(estimator, dtype, error):
    rng = np.random.default_rng(4)
    mixing = rng.normal(size=(6, DIM)) * np.geomspace(1, 1e-4, 6)[:, None]
    stream = (rng.normal(size=(1500, 6)) @ mixing).astype(np.float32)
    basis, energy = sketch(stream, 4, estimator, 0.99, dtype)
    assert np.isfinite(energy).all()
    gram = basis @ basis.T
    used = np.diag(gram) > 0.5
    assert used.sum() >= 3
    np.testing.assert_allclose(gram[np.ix_(used, used)], np.eye(used.sum()), atol=error)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_bad_steps_leave_the_sketch_unchanged(estimator, bad):
    rng = np.random.default_rng(5)
    basis = {"w": jnp.zeros((2, 6))}
    energy = jnp.zeros(2)
    take = functools.partial(track, ESTIMATORS[estimator], decay=0.9)
    for _ in range(4):
        step = {"w": jnp.asarray(rng.normal(size=6), jnp.float32)}
        basis, energy = take(basis, inner(basis, basis), energy, step)
    after = take(basis, inner(basis, basis), energy, {"w": jnp.full(6, bad)})
    chex.assert_trees_all_equal(after, (basis, energy))
    chex.assert_tree_all_finite(after)


def test_a_tiny_step_counts_like_any_other():
    take = functools.partial(track, ESTIMATORS["svd"], decay=0.9)
    basis, energy = {"w": jnp.zeros((1, 3))}, jnp.zeros(1)
    step = {"w": jnp.asarray([1e-15, 0, 0], jnp.float32)}
    basis, energy = take(basis, inner(basis, basis), energy, step)
    np.testing.assert_allclose(jnp.abs(basis["w"]), [[1, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(energy, [1], rtol=1e-6)


def test_small_news_is_seen_in_float32():
    # Steps that nearly repeat: what is new in each is a thousandth of it.
    rng = np.random.default_rng(6)
    main, side = np.linalg.qr(rng.normal(size=(DIM, 2)))[0].T
    stream = main + 1e-3 * np.where(np.arange(400) % 2, 1, -1)[:, None] * side
    low, _ = sketch(stream.astype(np.float32), 2, "svd", 1.0, jnp.float32)
    np.testing.assert_allclose(np.abs(low @ main), [1, 0], atol=1e-3)
    np.testing.assert_allclose(np.abs(low @ side), [0, 1], atol=1e-3)
    np.testing.assert_allclose(low @ low.T, np.eye(2), atol=1e-6)
