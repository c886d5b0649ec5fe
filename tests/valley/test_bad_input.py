"""Bad input to the valley: a clear error. One case a test."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdp_jax
from tests import toy

PARAMS = toy.mlp_params()
GROUPS = toy.mlp_groups(PARAMS)
BASIS = jax.tree.map(lambda p: jnp.ones((1, *p.shape)), PARAMS)


class Once:
    """A loader that gives the same iterator again."""

    def __init__(self):
        self.batches = iter([toy.batch()])

    def __iter__(self):
        return self.batches


def project(**keywords):
    return sdp_jax.valley.project_onto_valley(GROUPS, 0.1, **keywords)


def certify(params=PARAMS, data=None, loss=toy.loss, **keywords):
    data = [toy.batch()] if data is None else data
    return sdp_jax.valley.certify(loss, PARAMS, params, data, **keywords)


# What is done, the error, and what its message must say.
CASES = {
    # The projection.
    "basis of another tree": (
        lambda: project(basis={"w": jnp.ones((2, 4))}).init(PARAMS),
        ValueError,
        "leaves of the parameters, each with one leading axis",
    ),
    "basis without a leading axis": (
        lambda: project(basis=PARAMS).init(PARAMS),
        ValueError,
        "leading axis of the same length",
    ),
    "basis of other shapes": (
        lambda: project(basis=jax.tree.map(lambda p: jnp.ones((2, 3, 3)), PARAMS)).init(
            PARAMS
        ),
        ValueError,
        r"has shape \(2, 3, 3\); expected \(rank, \*\(6,\)\)",
    ),
    "rank of zero": (lambda: project(rank=0), ValueError, "at least 1"),
    "decay of zero": (lambda: project(decay=0.0), ValueError, r"\(0, 1\]"),
    "unknown estimator": (
        lambda: project(estimator="pca"),
        ValueError,
        r"one of \['svd', 'frequent_directions', 'oja'\] or None; got 'pca'",
    ),
    "Oja without a learning rate": (
        lambda: project(estimator="oja", decay=1.0),
        ValueError,
        "decay must be below 1",
    ),
    "sketch every zero steps": (
        lambda: project(every=0),
        ValueError,
        "every must be an integer of at least 1; got 0",
    ),
    "sketch in integers": (
        lambda: project(storage_dtype=jnp.int8),
        ValueError,
        "storage_dtype must be a floating-point dtype",
    ),
    # Curvature, SDP and certificates.
    "data that is an iterator": (
        lambda: sdp_jax.valley.curvature_product(toy.loss, PARAMS, iter([toy.batch()])),
        TypeError,
        "again and again.*make it a list",
    ),
    "data that is a generator": (
        lambda: sdp_jax.valley.top_eigenpairs(
            toy.loss, PARAMS, (toy.batch() for _ in "ab")
        ),
        TypeError,
        "got generator: make it a list",
    ),
    "a batch instead of batches": (
        lambda: sdp_jax.valley.curvature_product(toy.loss, PARAMS, toy.batch()[0]),
        TypeError,
        "a list of batches or a loader",
    ),
    "no batch": (
        lambda: sdp_jax.valley.curvature_product(toy.loss, PARAMS, []),
        ValueError,
        "data has no batch",
    ),
    "complex parameters have no Hessian here": (
        lambda: sdp_jax.valley.curvature_product(
            toy.loss, {"w": jnp.ones(2, complex)}, [toy.batch()]
        ),
        TypeError,
        "real parameters only",
    ),
    "integer parameters": (
        lambda: sdp_jax.valley.top_eigenpairs(
            toy.loss, {"w": jnp.ones(2, int)}, [jnp.ones(1)]
        ),
        TypeError,
        "has dtype int32",
    ),
    "no parameters": (
        lambda: sdp_jax.valley.top_eigenpairs(toy.loss, {}, [toy.batch()]),
        ValueError,
        "params has no leaf",
    ),
    "a vector of another tree": (
        lambda: sdp_jax.valley.curvature_product(toy.loss, PARAMS, [toy.batch()])(
            {"w": 1.0}
        ),
        ValueError,
        "the vector has structure",
    ),
    "more eigenpairs than parameters": (
        lambda: sdp_jax.valley.top_eigenpairs(toy.loss, PARAMS, [toy.batch()], 10_000),
        ValueError,
        "between 1 and 83, the number of parameters; got 10000",
    ),
    "a loss that is not finite": (
        lambda: sdp_jax.valley.top_eigenpairs(
            lambda p, b: toy.loss(p, b) * jnp.nan, PARAMS, [toy.batch()], 2
        ),
        ValueError,
        "curvature is not finite",
    ),
    "a density without steps": (
        lambda: sdp_jax.valley.spectral_density(
            toy.loss, PARAMS, [toy.batch()], steps=0
        ),
        ValueError,
        "steps must be an integer of at least 1",
    ),
    "a width of zero": (
        lambda: sdp_jax.valley.SpectralDensity(np.ones((1, 1)), np.ones((1, 1)), 1).at(
            [0], 0
        ),
        ValueError,
        "width must be positive",
    ),
    "SDP without a strength": (
        lambda: sdp_jax.valley.sdp(PARAMS, GROUPS, None, BASIS),
        ValueError,
        "give either strength, or None and sparsity=",
    ),
    "SDP of two strengths": (
        lambda: sdp_jax.valley.sdp(PARAMS, GROUPS, 0.1, BASIS, sparsity=0.5),
        ValueError,
        "give either strength, or None and sparsity=",
    ),
    "SDP of negative strength": (
        lambda: sdp_jax.valley.sdp(PARAMS, GROUPS, -0.1, BASIS),
        ValueError,
        "strength must be a non-negative number; got -0.1",
    ),
    "SDP of all channels": (
        lambda: sdp_jax.valley.sdp(PARAMS, GROUPS, None, BASIS, sparsity=1.0),
        ValueError,
        r"sparsity must be a number in \[0, 1\); got 1.0",
    ),
    "SDP by an unknown method": (
        lambda: sdp_jax.valley.sdp(PARAMS, GROUPS, 0.1, BASIS, method="second_order"),
        ValueError,
        "one of .'exact', 'first_order'.; got 'second_order'",
    ),
    "SDP with directions of another tree": (
        lambda: sdp_jax.valley.sdp(PARAMS, GROUPS, 0.1, {"w": jnp.ones((2, 3))}),
        ValueError,
        "leaves of the parameters, each with one leading axis",
    ),
    "SDP of parameters that are not finite": (
        lambda: sdp_jax.valley.sdp(
            jax.tree.map(lambda p: p * jnp.nan, PARAMS), GROUPS, 0.1, BASIS
        ),
        ValueError,
        "params has entries that are not finite",
    ),
    "scores with directions that are not finite": (
        lambda: sdp_jax.valley.directional_scores(
            PARAMS, GROUPS, jax.tree.map(lambda p: p * jnp.nan, BASIS)
        ),
        ValueError,
        "basis has entries that are not finite",
    ),
    "certifying another tree": (
        lambda: certify(params={k: PARAMS[k] for k in ("layer0", "layer2")}),
        ValueError,
        "params has the leaves",
    ),
    "certifying parameters after the cut": (
        lambda: certify(params=jax.tree.map(lambda p: p[:1], PARAMS)),
        ValueError,
        "before they are cut",
    ),
    "certifying a NaN": (
        lambda: certify(params=jax.tree.map(lambda p: p * jnp.nan, PARAMS)),
        ValueError,
        "params has entries that are not finite",
    ),
    "certifying on an iterator": (
        lambda: certify(data=iter([toy.batch()])),
        TypeError,
        "make it a list",
    ),
    "statistics without their update": (
        lambda: certify(stats={"mean": jnp.zeros(3)}),
        ValueError,
        "update_stats and stats belong together",
    ),
    "a path without a point between": (
        lambda: certify(points=2),
        ValueError,
        "points must be an integer of at least 3; got 2",
    ),
    "a scale that is no number": (
        lambda: certify(scale=float("nan")),
        ValueError,
        "scale must be a positive loss; got nan",
    ),
    "SDP to a tolerance that is no number": (
        lambda: sdp_jax.valley.sdp(PARAMS, GROUPS, 0.1, BASIS, tol=float("nan")),
        ValueError,
        "tol must be a non-negative number; got nan",
    ),
    "one named tuple instead of batches": (
        lambda: sdp_jax.valley.curvature_product(
            toy.loss, PARAMS, collections.namedtuple("Batch", "x y")(*toy.batch())
        ),
        TypeError,
        "a list of batches or a loader; got Batch",
    ),
    "a basis without directions": (
        lambda: sdp_jax.valley.sdp(
            PARAMS, GROUPS, 0.1, jax.tree.map(lambda p: jnp.ones((0, *p.shape)), PARAMS)
        ),
        ValueError,
        "basis has no direction",
    ),
    "a basis that is not finite": (
        lambda: project(basis=jax.tree.map(lambda p: p * jnp.nan, BASIS)).init(PARAMS),
        ValueError,
        "basis has entries that are not finite",
    ),
    "a linear loss has no sharp direction": (
        lambda: sdp_jax.valley.top_eigenpairs(
            lambda p, b: p["w"].sum(), {"w": jnp.ones(99)}, [toy.batch()], 2
        ),
        RuntimeError,
        "is the curvature zero everywhere",
    ),
    "data that can be gone through once": (
        lambda: sdp_jax.valley.curvature_product(toy.loss, PARAMS, Once())(PARAMS),
        ValueError,
        "not the second time",
    ),
    "a tolerance of zero": (
        lambda: certify(tolerance=0.0),
        ValueError,
        "tolerance must be a positive number",
    ),
    "metrics without the loss": (
        lambda: certify(evaluate=lambda params, batch: {"accuracy": jnp.ones(())}),
        ValueError,
        "a dictionary of means with 'loss' among them",
    ),
    "a loss of zero parameters that measures nothing": (
        certify,  # Untrained parameters are worse than none.
        ValueError,
        "give scale=",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused(case):
    act, error, message = CASES[case]
    with pytest.raises(error, match=message):
        act()
