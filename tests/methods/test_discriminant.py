"""Discriminant information against its definition, and against brute-force removal."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdp_jax
from sdp_jax import methods

LABELS = np.array([0, 2, 7, 2, 0, 7, 7, 0, 2, 2, 0, 7, 7, 2])


def draw(seed=0, size=4, labels=LABELS):
    """Features, some of which know the class."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(10, size)) * np.linspace(0, 2, size)
    return centres[labels] + rng.normal(size=(len(labels), size))


def scatters(x, labels):
    """The total and the between-class scatter, sample by sample."""
    mean = x.mean(0)
    total = sum(np.outer(v - mean, v - mean) for v in x)
    between = np.zeros_like(total)
    for k in set(labels.tolist()):
        mine = x[labels == k]
        d = mine.mean(0) - mean
        between += len(mine) * np.outer(d, d)
    return total, between


def information(total, between, rho):
    return np.trace(np.linalg.solve(total + rho * np.eye(len(total)), between))


def falls(x, labels, ridge, relative=True):
    """The information that is lost with each feature, by leaving it out."""
    total, between = scatters(x, labels)
    rho = ridge * np.trace(total) / len(total) if relative else ridge
    whole = information(total, between, rho)
    out = []
    for c in range(len(total)):
        rest = np.delete(np.arange(len(total)), c)
        block = np.ix_(rest, rest)
        out.append(whole - information(total[block], between[block], rho))
    return np.array(out)


def groups_of(**sizes):
    params = {name: jnp.ones((2, size)) for name, size in sizes.items()}
    axes = {name: [sdp_jax.Member(name, 1)] for name in sizes}
    return params, sdp_jax.groups_from_axes(params, axes)


@pytest.mark.parametrize("relative", [True, False])
def test_definition(x64, relative):
    x = draw()
    total, between = scatters(x, LABELS)
    rho = 0.3 * np.trace(total) / 4 if relative else 0.3
    found = methods.discriminant_information(x, LABELS, 0.3, relative=relative)
    np.testing.assert_allclose(found, information(total, between, rho), rtol=1e-12)
    jitted = jax.jit(
        lambda x, y: methods.discriminant_information(x, y, 0.3, relative=relative)
    )
    np.testing.assert_allclose(jitted(x, jnp.asarray(LABELS)), found, rtol=1e-12)


@pytest.mark.parametrize("ridge, relative", [(1e-3, True), (0.5, True), (0.7, False)])
def test_score_is_the_fall_when_a_channel_is_left_out(x64, ridge, relative):
    wide = draw(seed=1, size=20)  # More channels than samples.
    x = {"narrow": draw(size=4), "wide": wide}
    params, groups = groups_of(narrow=4, wide=20)
    score = methods.discriminant_score(LABELS, ridge=ridge, relative=relative)
    found = groups.split(score(groups, params, activations=x))
    assert list(found) == ["narrow", "wide"]
    for name, maps in x.items():
        want = falls(maps, LABELS, ridge, relative)
        np.testing.assert_allclose(found[name], want, rtol=1e-7, atol=1e-12)


@hypothesis.settings(max_examples=10)
@hypothesis.given(st.integers(0, 10**6), st.sampled_from([1e-3, 0.1, 10.0]))
def test_bounds_and_invariances(seed, ridge):
    x = draw(seed)
    params, groups = groups_of(d=4)

    def scores(maps, labels=LABELS):
        score = methods.discriminant_score(labels, ridge=ridge)
        return np.asarray(score(groups, params, activations={"d": maps}))

    def fits(value):
        np.testing.assert_allclose(value, base, rtol=2e-3, atol=2e-5)

    base = scores(x)
    whole = float(methods.discriminant_information(x, LABELS, ridge))
    assert np.all(base >= 0) and 0 <= whole <= 2 + 1e-4  # three classes
    assert np.all(base <= whole + 1e-4)
    fits(scores(100 * x))  # units
    fits(scores(x + 1))  # origin
    fits(scores(x, 9 - LABELS))  # names of the classes
    order = np.random.default_rng(seed).permutation(len(x))
    fits(scores(x[order], LABELS[order]))
    channels = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(
        scores(x[:, channels]), base[channels], rtol=2e-3, atol=2e-5
    )


def test_information_never_falls_with_more_features(x64):
    x = draw()
    values = [
        float(methods.discriminant_information(x[:, :n], LABELS, 0.1, relative=False))
        for n in (2, 4)
    ]
    assert np.all(np.diff(values) >= 0)


def test_feature_maps_are_pooled_or_taken_position_by_position(x64):
    rng = np.random.default_rng(5)
    maps = rng.normal(size=(14, 2, 3, 4)) + draw()[:, None, None, :]
    params, groups = groups_of(d=4)

    def score(**kwargs):
        return methods.discriminant_score(LABELS, ridge=0.1, **kwargs)(
            groups, params, activations={"d": maps}
        )

    pooled = maps.mean((1, 2))
    np.testing.assert_allclose(score(), falls(pooled, LABELS, 0.1), rtol=1e-9)
    each = maps.reshape(-1, 4)
    want = falls(each, np.repeat(LABELS, 6), 0.1)
    np.testing.assert_allclose(score(pool=False), want, rtol=1e-9)


def test_dead_channels_one_class_and_nothing_that_varies():
    params, groups = groups_of(d=4)
    x = draw()
    x[:, 1] = 0
    score = methods.discriminant_score(LABELS)
    found = np.asarray(score(groups, params, activations={"d": x}))
    assert found[1] == 0 and np.all(found[[0, 2, 3]] > 0)
    still = score(groups, params, activations={"d": np.ones((14, 4))})
    np.testing.assert_array_equal(still, np.zeros(4))
    alone = methods.discriminant_score(np.zeros(14, int))
    found = alone(groups, params, activations={"d": draw()})
    np.testing.assert_allclose(found, np.zeros(4), atol=1e-6)


def test_bfloat16_and_jit():
    params, groups = groups_of(d=4)
    x = jnp.asarray(draw(), jnp.bfloat16)
    score = methods.discriminant_score(jnp.asarray(LABELS), ridge=0.1)
    found = jax.jit(lambda x: score(groups, params, activations={"d": x}))(x)
    assert found.dtype == jnp.float32
    want = falls(np.asarray(x, np.float64), LABELS, 0.1)
    np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-5)


def test_scores_go_to_remove_lowest_by_set_scores():
    params, groups = groups_of(d=4)
    score = methods.discriminant_score(LABELS)
    scores = score(groups, params, activations={"d": draw()})
    tx = methods.remove_lowest(groups, sdp_jax.target_sparsity(0.5, 0, 1))
    state = methods.set_scores(tx.init(params), groups, scores)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    dead = np.flatnonzero((params["d"] + updates["d"])[0] == 0)
    assert set(dead) == set(np.argsort(np.asarray(scores))[:2])


def test_refuses_missing_or_wrong_activations():
    params, groups = groups_of(d=4, e=2)
    score = methods.discriminant_score(LABELS)
    with pytest.raises(ValueError, match="needs activations.*set_scores"):
        score(groups, params)
    with pytest.raises(ValueError, match=r"lack \['e'\] and have \['d'\]"):
        score(groups, params, activations={"d": draw()})
    good = {"d": draw(), "e": draw(size=2)}
    for bad in (draw(size=3), draw()[:5], draw()[:, 0]):
        with pytest.raises(ValueError, match=r"'d' must have the shape \(14, …, 4\)"):
            score(groups, params, activations=good | {"d": bad})


def test_refuses_bad_labels_ridges_and_features():
    for function in (
        lambda y: methods.discriminant_information(draw(), y),
        methods.discriminant_score,
    ):
        with pytest.raises(TypeError, match="integers.*argmax"):
            function(np.eye(3)[LABELS % 3])
        with pytest.raises(ValueError, match="vector.*argmax"):
            function(LABELS[:, None])
    with pytest.raises(ValueError, match="ridge must be a positive number; got 0"):
        methods.discriminant_score(LABELS, ridge=0)
    with pytest.raises(TypeError, match="ridge must be a positive number"):
        methods.discriminant_information(draw(), LABELS, "0.1")
    with pytest.raises(ValueError, match=r"features must have the shape \(14, fea"):
        methods.discriminant_information(draw()[:, 0], LABELS)


def test_activations_of_a_function_stand_for_maps(x64):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(len(LABELS), 5, 4))
    params = {k: jnp.asarray(rng.normal(size=n)) for k, n in (("a", (4, 6)), ("b", 6))}

    def fn(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    groups = sdp_jax.find_groups(fn, params, jnp.asarray(x))
    batches = [jnp.asarray(x[:8]), jnp.asarray(x[8:])]
    found = sdp_jax.channel_activations(groups, fn, params, batches, per_example=True)
    score = methods.discriminant_score(LABELS)
    maps = {"a": np.tanh(x @ np.asarray(params["a"]))}
    np.testing.assert_allclose(
        score(groups, params, activations=found),
        score(groups, params, activations=maps),
        rtol=1e-10,
    )
    found = sdp_jax.channel_activations(groups, fn, params, batches)
    with pytest.raises(
        ValueError, match="means of single examples: .*per_example=True"
    ):
        score(groups, params, activations=found)
