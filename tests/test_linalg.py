"""Factorisations and solvers: batches and right-hand sides pass, matrices stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.scipy.sparse.linalg import cg

import sdp_jax
from tests.test_tracing import check

X = np.random.default_rng(0).normal(size=(4, 5))
MLP = {"a": (5, 8), "b": (8, 2)}


def positive(m):
    """A positive matrix of another one, in a batch."""
    return m @ jnp.swapaxes(m, -1, -2) + 3 * jnp.eye(m.shape[-2])


def halves(p, x):
    h = lax.custom_linear_solve(
        lambda y: 2 * y, x @ p["a"], lambda _, b: b / 2, lambda _, b: b / 2
    )
    return h @ p["b"]


def measured(p, x):  # a solver that also says how far it is
    h, seen = lax.custom_linear_solve(
        lambda y: 2 * y,
        x @ p["a"],
        lambda _, b: (b / 2, jnp.sum(b**2)),
        lambda _, b: (b / 2, jnp.sum(b**2)),
        has_aux=True,
    )
    return h @ p["b"] + seen


def solved(p, x):
    return jnp.linalg.solve(positive(x), x @ p["a"]) @ p["b"]


def conjugate(p, x):
    matrix = positive(x)
    return cg(lambda y: matrix @ y, jnp.tanh(x @ p["a"]), tol=1e-13)[0] @ p["b"]


def triangular(p, x):
    lower = jnp.tril(positive(x))
    return jax.scipy.linalg.solve_triangular(lower, x @ p["a"], lower=True) @ p["b"]


def lines(p, x):
    one = jnp.ones(4)
    return lax.linalg.tridiagonal_solve(0 * one, 3 * one, 0 * one, x @ p["a"]) @ p["b"]


def heads(factor):
    """Each of 8 heads has a matrix of its own; it weighs what the head holds."""

    def fn(p, x):
        h = x @ p["a"]
        matrices = positive(h.T[:, :, None] * x)
        return (factor(matrices).T * h).sum(0) @ p["b"]

    return fn


# name: function, parameters
PROGRAMS = {
    "solver of the user": halves,
    "solver with more results": measured,
    "linear system": solved,
    "conjugate gradients": conjugate,
    "triangular": triangular,
    "tridiagonal": lines,
    "cholesky": heads(lambda m: jnp.linalg.cholesky(m)[..., 0]),
    "qr": heads(lambda m: jnp.linalg.qr(m)[1][..., 0]),
    "eigh": heads(jnp.linalg.eigvalsh),
    "svd": heads(lambda m: jnp.linalg.svd(m, compute_uv=False)),
    "determinant": heads(lambda m: jnp.linalg.slogdet(m)[1][:, None] * m[..., 0]),
    "inverse": heads(lambda m: jnp.linalg.inv(m)[..., 0]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_batches_and_right_hand_sides_pass(name, x64):
    grads = name != "svd"  # of equal singular values it is not finite
    groups = check(PROGRAMS[name], MLP, X, grads=grads)
    assert groups.sizes == {"a": 8}
    cost = sdp_jax.cost(PROGRAMS[name], {k: jnp.ones(v) for k, v in MLP.items()}, X)
    assert groups.flops.at([8]) == pytest.approx(cost.flops, rel=1e-9)


FROZEN = {
    "matrix": (lambda p, x: jnp.linalg.qr(x @ p["a"])[0], "matrices whole"),
    "zeros": (
        lambda p, x: jnp.linalg.cholesky(p["a"].T[:, :, None] * p["a"].T[:, None]),
        "not finite for a matrix of zeros",
    ),
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_is_frozen_says_why(name):
    fn, why = FROZEN[name]
    groups = sdp_jax.find_groups(fn, {"a": jnp.ones((5, 8))}, X, prune_outputs=True)
    assert not groups.sizes and why in str(groups)
