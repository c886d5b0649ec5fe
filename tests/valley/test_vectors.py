import chex
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdp_jax.valley import vectors
from tests import toy


def tree_basis(rank, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=(rank, *p.shape)), dtype),
        toy.mlp_params(),
    )


def as_matrix(basis):
    """One row for each direction, in float64."""
    rank = jax.tree.leaves(basis)[0].shape[0]
    rows = [np.asarray(x, np.float64).reshape(rank, -1) for x in jax.tree.leaves(basis)]
    return np.concatenate(rows, axis=1)


def test_products_are_those_of_matrices(x64):
    a, b = tree_basis(3, 0, jnp.float64), tree_basis(4, 1, jnp.float64)
    A, B = as_matrix(a), as_matrix(b)
    np.testing.assert_allclose(vectors.inner(a, b), A @ B.T, rtol=1e-12)
    x = jax.tree.map(lambda u: u[2], b)
    np.testing.assert_allclose(vectors.coefficients(a, x), A @ B[2], rtol=1e-12)
    weights = jnp.asarray([1.0, -2.0, 0.5])
    combined = vectors.ravel(vectors.combine(weights, a))
    np.testing.assert_allclose(combined, weights @ A, rtol=1e-12)
    several = vectors.combine(jnp.eye(3)[:2], a)
    np.testing.assert_allclose(as_matrix(several), A[:2], rtol=1e-12)


def test_complex_parts_are_coordinates_of_their_own(x64):
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(2, 5)) + 1j * rng.normal(size=(2, 5)) for _ in range(2))
    found = vectors.inner({"w": jnp.asarray(a)}, {"w": jnp.asarray(b)})
    want = a.real @ b.real.T + a.imag @ b.imag.T
    np.testing.assert_allclose(found, want, rtol=1e-12)


@pytest.mark.parametrize("power", [-1.0, -0.5, 0.5, 2.0])
def test_powers_of_matrices_stay_on_their_range(power, x64):
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(5, 5)))[0][:, :3]
    values = np.asarray([4.0, 1.0, 1e-3])
    found = vectors.symmetric_power(jnp.asarray((q * values) @ q.T), power)
    np.testing.assert_allclose(found, (q * values**power) @ q.T, rtol=1e-9, atol=1e-9)
    zero = vectors.symmetric_power(jnp.zeros((3, 3)), power)
    np.testing.assert_array_equal(zero, np.zeros((3, 3)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_orthonormal_basis_of_the_same_space(dtype):
    basis = tree_basis(4, dtype=dtype)
    found = vectors.orthonormal(basis)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    Q, A = as_matrix(found), as_matrix(basis)
    np.testing.assert_allclose(Q @ Q.T, np.eye(4), atol=1e-5)
    np.testing.assert_allclose(A @ Q.T @ Q, A, atol=1e-4)


def test_projection_does_not_need_orthogonality(x64):
    basis = tree_basis(4, dtype=jnp.float64)
    # A direction twice, another one zero, all of different lengths.
    mixed = vectors.combine(
        jnp.asarray([[3.0, 1, 0, 0], [0, 0, 0, 0], [0, 1e-3, 1, 0], [3.0, 1, 0, 0]]),
        basis,
    )
    x = jax.tree.map(lambda u: u[0], tree_basis(1, 5, jnp.float64))
    found = vectors.sharp_part(mixed, vectors.inner(mixed, mixed), x)
    Q = np.linalg.qr(as_matrix(mixed)[[0, 2]].T)[0]
    np.testing.assert_allclose(
        vectors.ravel(found), Q @ (Q.T @ vectors.ravel(x)), rtol=1e-8, atol=1e-10
    )


def test_ravel_and_back(x64):
    params = toy.mlp_params(dtype=jnp.float64)
    vector = vectors.ravel(params)
    chex.assert_trees_all_equal(vectors.unravel(vector, params), params)
    rows = np.stack([vector, 2 * vector])
    back = vectors.unravel(rows, params)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[1] / 2, back), params)
    assert vectors.fit_basis(back, params)[1] == 2


def test_scalars_have_a_place_in_a_vector():
    params = {"scale": jnp.asarray(2.0), "w": jnp.ones((2, 3))}
    rows = np.arange(14.0).reshape(2, 7)
    basis = vectors.unravel(rows, params)
    assert basis["scale"].shape == (2,) and basis["w"].shape == (2, 2, 3)
    assert vectors.unravel(rows[0], params)["scale"].shape == ()
    np.testing.assert_allclose(vectors.inner(basis, basis), rows @ rows.T)


def test_a_short_direction_is_a_direction(x64):
    basis = tree_basis(4, dtype=jnp.float32)
    lengths = jnp.asarray([1.0, 1e-4, 1e-23, 1e12], jnp.float32)
    stretched = jax.tree.map(
        lambda u: u * lengths.reshape(-1, *(1,) * (u.ndim - 1)), basis
    )
    Q = as_matrix(vectors.orthonormal(stretched))
    np.testing.assert_allclose(Q @ Q.T, np.eye(4), atol=1e-5)
    A = as_matrix(basis)
    np.testing.assert_allclose(A @ Q.T @ Q, A, atol=1e-4)


def test_other_containers_will_do():
    params = toy.mlp_params()
    basis = [{"w": u} for u in jax.tree.leaves(tree_basis(2))]
    with pytest.raises(ValueError, match="leaves of the parameters"):
        vectors.fit_basis(basis, params)
    frozen = flax.core.freeze(tree_basis(2))
    fitted, rank = vectors.fit_basis(frozen, params)
    assert rank == 2
    assert jax.tree.structure(fitted) == jax.tree.structure(params)
