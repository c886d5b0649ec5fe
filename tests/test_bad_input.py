"""Bad input: a clear error, or a documented behaviour. One case a test."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sdp_jax
from tests import toy

PARAMS = toy.mlp_params()
GROUPS = toy.mlp_groups(PARAMS)
PRODUCER = sdp_jax.Member("layer0/kernel", 1)


def from_axes(*members, params=PARAMS, **keywords):
    return sdp_jax.groups_from_axes(params, {"d": list(members)}, **keywords)


def altsdp(base=0.1, groups=GROUPS, strength=0.1, **keywords):
    return sdp_jax.altsdp(base, groups, strength=strength, **keywords)


def update(tx, params=PARAMS, grads=None, **keywords):
    grads = jax.tree.map(jnp.zeros_like, params) if grads is None else grads
    return tx.update(grads, tx.init(params), params, **keywords)


def without(path):
    params = {k: dict(v) for k, v in PARAMS.items()}
    layer, leaf = path.split("/")
    del params[layer][leaf]
    return params


# What is done, the error, and what its message must say.
CASES = {
    # Groups.
    "path not in the tree": (
        lambda: from_axes(sdp_jax.Member("layer0/kernl", 1)),
        ValueError,
        "did you mean .*layer0/kernel",
    ),
    "path with a collection too much": (
        lambda: from_axes(sdp_jax.Member("params/layer0/kernel", 1)),
        ValueError,
        r"groups.at\('params'\)",
    ),
    "axis that does not exist": (
        lambda: from_axes(sdp_jax.Member("layer0/kernel", 2)),
        ValueError,
        r"axis 2 of 'layer0/kernel' does not exist; its shape is \(4, 6\)",
    ),
    "no dimension": (
        lambda: sdp_jax.groups_from_axes(PARAMS, {}),
        ValueError,
        "names no dimension",
    ),
    "no producer": (
        lambda: from_axes(sdp_jax.Member("layer1/kernel", 0, "consumer")),
        ValueError,
        "has no producer",
    ),
    "not a member": (
        lambda: from_axes(("layer0/kernel", 1)),
        TypeError,
        r"make it with sdp_jax.Member\(path, axis, role\)",
    ),
    "sizes disagree": (
        lambda: from_axes(PRODUCER, sdp_jax.Member("layer2/kernel", 0, "consumer")),
        ValueError,
        "need 6 positions, but axis 0 has length 5",
    ),
    "producers overlap": (
        lambda: sdp_jax.groups_from_axes(PARAMS, {"a": [PRODUCER], "b": [PRODUCER]}),
        ValueError,
        "producers overlap",
    ),
    "producers on two axes of a leaf": (
        lambda: sdp_jax.groups_from_axes(
            PARAMS, {"a": [PRODUCER], "b": [sdp_jax.Member("layer0/kernel", 0)]}
        ),
        ValueError,
        "producers overlap",
    ),
    "inner does not divide": (
        lambda: from_axes(sdp_jax.Member("layer0/kernel", 1, inner=4)),
        ValueError,
        "does not divide",
    ),
    "half an axis": (
        lambda: from_axes(
            PRODUCER, sdp_jax.Member("layer0/bias", 0, "consumer", offset=3)
        ),
        ValueError,
        "need 9 positions",
    ),
    "axis partly covered": (
        lambda: sdp_jax.groups_from_axes(
            {"a": jnp.ones((2, 3)), "b": jnp.ones((7, 2))},
            {"d": [sdp_jax.Member("a", 1), sdp_jax.Member("b", 0, "consumer")]},
        ),
        ValueError,
        "cover 3 of its 7 positions",
    ),
    "integer producer": (
        lambda: from_axes(
            sdp_jax.Member("w", 1), params={"w": jnp.ones((2, 3), jnp.int32)}
        ),
        TypeError,
        "int32",
    ),
    "empty axis": (
        lambda: from_axes(sdp_jax.Member("w", 1), params={"w": jnp.ones((2, 0))}),
        ValueError,
        "needs at least 1 channel",
    ),
    "size cannot be read off": (
        lambda: from_axes(sdp_jax.Member("layer0/kernel", 1, offset=2)),
        ValueError,
        "pass sizes=",
    ),
    "sizes for nobody": (
        lambda: from_axes(PRODUCER, sizes={"e": 6}),
        ValueError,
        r"axes does not have: \['e'\]",
    ),
    "two leaves of one path": (
        lambda: from_axes(
            PRODUCER, params={"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}
        ),
        ValueError,
        "two leaves have the path 'a/b'",
    ),
    "not groups in JSON": (
        lambda: sdp_jax.Groups.from_json('{"dimensions": 3}'),
        ValueError,
        "not groups in JSON",
    ),
    "unknown dimension": (lambda: GROUPS["hidden7"], KeyError, "there are hidden0"),
    "unknown subtree": (lambda: GROUPS.at("params"), ValueError, "no leaf lies below"),
    "a vector of another length taken apart": (
        lambda: GROUPS.split(jnp.ones(10)),
        ValueError,
        r"one number for each of 11 channels on the last axis; got .* shape \(10,\)",
    ),
    "a number taken apart": (
        lambda: GROUPS.split(1.0),
        ValueError,
        r"for each of 11 channels on the last axis; got an array of shape \(\)",
    ),
    "other names put together": (
        lambda: GROUPS.join({"hidden0": jnp.ones(6), "hidden2": jnp.ones(5)}),
        ValueError,
        r"lacking are \['hidden1'\], and there is no use for \['hidden2'\]",
    ),
    "another size put together": (
        lambda: GROUPS.join({"hidden0": jnp.ones(6), "hidden1": jnp.ones(6)}),
        ValueError,
        r"'hidden1' has 5 channels, but an array of shape \(6,\) was given",
    ),
    "factors of another length": (
        lambda: sdp_jax.scale_channels(GROUPS, PARAMS, jnp.ones(6)),
        ValueError,
        "expected one number for each of 11 channels",
    ),
    "a member of an unknown role": (
        lambda: from_axes(PRODUCER, sdp_jax.Member("layer1/kernel", 0, "reader")),
        ValueError,
        "role 'reader' is not one of .*'consumer'",
    ),
    # Strengths.
    "negative strength": (lambda: altsdp(strength=-0.1), ValueError, "non-negative"),
    "strength that is not a number": (
        lambda: altsdp(strength=float("nan")),
        ValueError,
        "non-negative number, a schedule or a Strength; got nan",
    ),
    "strength of another kind": (lambda: altsdp(strength="0.1"), TypeError, "'0.1'"),
    "negative c": (
        lambda: sdp_jax.valley_strength(c=-1.0, mu=0.6),
        ValueError,
        "c must be a non-negative number",
    ),
    "mu of one half": (
        lambda: sdp_jax.valley_strength(c=1.0, mu=0.5),
        ValueError,
        "strictly between 0.5 and 1; got 0.5",
    ),
    "mu of one": (
        lambda: sdp_jax.valley_strength(c=1.0, mu=1.0),
        ValueError,
        "strictly between 0.5 and 1; got 1.0",
    ),
    "momentum of one": (
        lambda: sdp_jax.valley_strength(c=1.0, mu=0.6, momentum=1.0),
        ValueError,
        r"\[0, 1\)",
    ),
    "a strength without a learning rate": (
        lambda: altsdp(optax.adam(0.1), strength=sdp_jax.valley_strength(1.0, 0.6)),
        ValueError,
        "needs learning_rate= here",
    ),
    "a strength without a learning rate, alone": (
        lambda: sdp_jax.group_soft_threshold(GROUPS, sdp_jax.valley_strength(1.0, 0.6)),
        ValueError,
        "needs learning_rate= here",
    ),
    "a target of everything": (
        lambda: sdp_jax.target_sparsity(1.0, 0, 10),
        ValueError,
        r"\[0, 1\); got 1.0",
    ),
    "a target on single entries": (
        lambda: sdp_jax.soft_threshold(sdp_jax.target_sparsity(0.5, 0, 10)).init(
            {"w": jnp.ones(3)}
        ),
        ValueError,
        "single entries, as soft_threshold has them, cannot be ranked",
    ),
    "a target that min_channels makes impossible": (
        lambda: altsdp(strength=sdp_jax.target_sparsity(0.9, 0, 10), min_channels=3),
        ValueError,
        "so are 54.5% of the channels, and at most 9.1% shall be",
    ),
    "a target per dimension that min_channels makes impossible": (
        lambda: altsdp(
            strength=sdp_jax.target_sparsity(0.5, 0, 9, ranking="dimension"),
            min_channels={"hidden0": 5},
        ),
        ValueError,
        "so are 54.5% of the channels, and at most 45.5% shall be",
    ),
    "a target by an unknown ranking": (
        lambda: sdp_jax.target_sparsity(0.5, 0, 9, ranking="layer"),
        ValueError,
        "ranking is 'layer'; use 'global', 'dimension' or 'isomorphic'",
    ),
    "a target of FLOPs for groups made by hand": (
        lambda: altsdp(strength=sdp_jax.target_sparsity(0.5, 0, 9, target="flops")),
        ValueError,
        "these groups know no FLOPs, because they were made by hand",
    ),
    "a cut by scores of a wrong shape": (
        lambda: sdp_jax.plan_cut(GROUPS, PARAMS, scores=jnp.ones(10), sparsity=0.5),
        ValueError,
        r"scores have shape \(10,\); expected one number for each of the 11 channels",
    ),
    "steps in the wrong order": (
        lambda: sdp_jax.target_sparsity(0.5, 10, 10),
        ValueError,
        "0 <= begin_step < end_step",
    ),
    "steps beyond the counter": (
        lambda: sdp_jax.target_sparsity(0.5, 0, 10**10),
        ValueError,
        r"2\*\*31",
    ),
    "steps that are not integers": (
        lambda: sdp_jax.target_sparsity(0.5, 0, 10.0),
        TypeError,
        "end_step must be an integer number of updates; got 10.0",
    ),
    # The chain.
    "groups of another kind": (
        lambda: altsdp(groups={"hidden0": 6}),
        TypeError,
        "must be sdp_jax.Groups",
    ),
    "groups without a dimension": (
        lambda: altsdp(groups=sdp_jax.Groups((), GROUPS.leaves)),
        ValueError,
        "nothing to prune",
    ),
    "negative learning rate": (lambda: altsdp(-0.1), ValueError, "-0.1"),
    "base of another kind": (lambda: altsdp("sgd"), TypeError, "'sgd'"),
    "momentum beside a transformation": (
        lambda: altsdp(optax.sgd(0.1), momentum=0.9),
        ValueError,
        "brings its own",
    ),
    "momentum above one": (lambda: altsdp(momentum=1.5), ValueError, "1.5"),
    "momentum of exactly one": (lambda: altsdp(momentum=1.0), ValueError, r"\[0, 1\)"),
    "more min_channels than channels": (
        lambda: altsdp(min_channels=6),
        ValueError,
        "min_channels of dimension 'hidden1' is 6, but it has 5 channels",
    ),
    "negative min_channels": (
        lambda: altsdp(min_channels=-1),
        ValueError,
        "between 0 and its size",
    ),
    "min_channels that are not an integer": (
        lambda: altsdp(min_channels=0.5),
        TypeError,
        "integer",
    ),
    "min_channels that are a fractional array": (
        lambda: altsdp(min_channels=jnp.asarray(1.5)),
        TypeError,
        "integer",
    ),
    "min_channels for nobody": (
        lambda: altsdp(min_channels={"hidden9": 1}),
        ValueError,
        "do not exist",
    ),
    "unknown weights": (lambda: altsdp(weights="l1"), ValueError, "weights is 'l1'"),
    "weights without a dimension": (
        lambda: altsdp(weights={"hidden0": 1.0}),
        ValueError,
        "lacks .*hidden1",
    ),
    "weights with a target": (
        lambda: altsdp(strength=sdp_jax.target_sparsity(0.5, 0, 9), weights="size"),
        ValueError,
        "weights='size' is for strengths that shrink",
    ),
    "a target rounded to a fraction": (
        lambda: sdp_jax.target_sparsity(0.5, 0, 9, round_to=0.5),
        ValueError,
        "round_to must be an integer of at least 1",
    ),
    "a target that rounding makes impossible": (
        lambda: altsdp(strength=sdp_jax.target_sparsity(0.8, 0, 9, round_to=8)),
        ValueError,
        "left, rounded by round_to, so are 100.0% of the channels, and at most 18.2%",
    ),
    "a weight of zero": (
        lambda: altsdp(weights={"hidden0": 0.0, "hidden1": 1.0}),
        ValueError,
        "positive",
    ),
    "a transformation for prox_sgd": (
        lambda: sdp_jax.prox_sgd(optax.adam(0.1), GROUPS, strength=0.1),
        TypeError,
        "its first argument is a learning rate",
    ),
    # Using it.
    "another tree in init": (
        lambda: altsdp().init(without("layer1/bias")),
        ValueError,
        "no leaf 'layer1/bias'",
    ),
    "all variables instead of the parameters": (
        lambda: altsdp().init({"params": PARAMS}),
        ValueError,
        "no leaf 'layer0/kernel'",
    ),
    "other shapes in init": (
        lambda: altsdp().init(toy.mlp_params(widths=(4, 7, 5, 3))),
        ValueError,
        r"has shape \(4, 7\), but the groups were built for \(4, 6\)",
    ),
    "missing params in update": (
        lambda: altsdp().update(PARAMS, altsdp().init(PARAMS)),
        ValueError,
        r"call update\(grads, state, params\)",
    ),
    "a leaf that is no array": (
        lambda: altsdp().init(PARAMS | {"scale": 1.0}),
        TypeError,
        "'scale' is 1.0; parameters must be arrays",
    ),
    "integer leaves": (
        lambda: altsdp().init(PARAMS | {"step": jnp.int32(0)}),
        TypeError,
        "'step' has dtype int32",
    ),
    "gradients of another structure": (
        lambda: update(altsdp(), grads=without("layer1/bias")),
        ValueError,
        "trees of different structure",
    ),
    "gradients of another shape": (
        lambda: update(altsdp(), grads=jax.tree.map(lambda p: p[:1], PARAMS)),
        ValueError,
        r"gradient of 'layer0/bias' has shape \(1,\), but the parameter has \(6,\)",
    ),
    "check_zeros without a threshold": (
        lambda: sdp_jax.check_zeros(optax.adam(0.1).init(PARAMS)),
        ValueError,
        "no state of group_soft_threshold",
    ),
    # Cutting.
    "cut to nothing": (
        lambda: sdp_jax.plan_cut(GROUPS, PARAMS, min_channels=-1),
        ValueError,
        "must be an integer",
    ),
    "cut under jit": (
        lambda: jax.jit(lambda p: sdp_jax.plan_cut(GROUPS, p).take(p))(PARAMS),
        ValueError,
        "outside jit",
    ),
    "cut of shapes": (
        lambda: sdp_jax.plan_cut(GROUPS, jax.eval_shape(lambda: PARAMS)),
        ValueError,
        "has no values",
    ),
    "cut of a part of the parameters": (
        lambda: sdp_jax.plan_cut(GROUPS, PARAMS).take(
            {"layer0": {"kernel": PARAMS["layer0"]["kernel"]}}
        ),
        ValueError,
        "the tree around it has other leaves or",
    ),
    "cut with parameters missing": (
        lambda: sdp_jax.plan_cut(GROUPS, without("layer2/kernel")),
        ValueError,
        "plan_cut needs all members",
    ),
    "cut of a diverged model": (
        lambda: sdp_jax.plan_cut(GROUPS, jax.tree.map(lambda p: p * np.nan, PARAMS)),
        ValueError,
        "contains NaN",
    ),
    "cut of a stranger": (
        lambda: sdp_jax.plan_cut(GROUPS, PARAMS).take({"w": jnp.ones((3, 3))}),
        ValueError,
        "nothing in this tree belongs to the cut",
    ),
    "cut of other shapes": (
        lambda: sdp_jax.plan_cut(GROUPS, PARAMS).take(
            toy.mlp_params(widths=(4, 7, 5, 3))
        ),
        ValueError,
        "cannot be cut",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused(case):
    act, error, message = CASES[case]
    with pytest.raises(error, match=message):
        act()


def test_there_are_no_channels_of_an_empty_group_to_lose():
    # A dimension of one channel is legal, and min_channels keeps it.
    params = {"w": jnp.ones((3, 1))}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 1)]})
    tx = altsdp(groups=groups, strength=100.0)
    updates, _ = update(tx, params)
    assert np.all(optax.apply_updates(params, updates)["w"] > 0)


def test_nan_gradients_reach_the_parameters_unless_guarded():
    grads = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), PARAMS)
    updates, _ = update(altsdp(), grads=grads)
    assert all(np.isnan(x).all() for x in jax.tree.leaves(updates))
    updates, _ = update(optax.apply_if_finite(altsdp(), 3), grads=grads)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(updates))


def test_infinite_gradients_are_not_hidden():
    grads = jax.tree.map(lambda p: jnp.full_like(p, jnp.inf), PARAMS)
    updates, _ = update(altsdp(), grads=grads)
    assert not any(np.isfinite(x).any() for x in jax.tree.leaves(updates))


def test_a_negative_schedule_counts_as_zero():
    sgd = optax.sgd(0.1)
    grads = toy.mlp_grads(PARAMS)
    updates, _ = update(altsdp(strength=lambda count: -1.0 - count), grads=grads)
    expected, _ = sgd.update(grads, sgd.init(PARAMS))
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
