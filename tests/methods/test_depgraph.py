"""DepGraph's importance and regulariser against loops over channels and members."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sdp_jax
from sdp_jax import methods

P = sdp_jax.Member
C = functools.partial(sdp_jax.Member, role="consumer")


def case(dtype=jnp.float32, seed=0):
    """A convolution with bias and norm, flattened into a layer, and heads behind it.

    ``mix/kernel`` reads the channels along axis 0, two positions for each, and makes
    the heads along axis 1, of width 2, in two blocks (as keys and values do).
    """
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    params = {
        "conv": {"kernel": draw(2, 2, 3, 4), "bias": draw(4)},
        "norm": {"scale": draw(4), "bias": draw(4)},
        "mix": {"kernel": draw(8, 12), "bias": draw(12)},
        "out": {"kernel": draw(6, 2), "bias": draw(2)},
        "stats": {"mean": draw(4)},
    }
    axes = {
        "conv": [
            P("conv/kernel", 3),
            P("conv/bias", 0),
            P("norm/scale", 0),
            P("norm/bias", 0),
            sdp_jax.Member("stats/mean", 0, "state"),
            C("mix/kernel", 0, outer=2),
        ],
        "heads": [
            P("mix/kernel", 1, inner=2, period=6),
            P("mix/kernel", 1, inner=2, offset=6, period=6),
            P("mix/bias", 0, outer=2, inner=2),
            C("out/kernel", 0, inner=2),
        ],
    }
    groups = sdp_jax.groups_from_axes(params, axes, sizes={"heads": 3})
    return params, groups


def slices(bias):
    """By hand: for each dimension its members as functions of tree and channel.

    Each returns the index of the entries, leaf by leaf.
    """

    def head(k):
        return [2 * k, 2 * k + 1, 6 + 2 * k, 7 + 2 * k]

    conv = [
        ("conv", "kernel", lambda k: np.s_[..., k]),
        ("norm", "scale", lambda k: np.s_[k]),
        ("mix", "kernel", lambda k: np.s_[[k, 4 + k], :]),
    ]
    heads = [
        ("mix", "kernel", lambda k: np.s_[:, head(k)]),
        ("out", "kernel", lambda k: np.s_[[2 * k, 2 * k + 1], :]),
    ]
    if bias:
        conv += [(m, "bias", lambda k: np.s_[k]) for m in ("conv", "norm")]
        heads += [("mix", "bias", lambda k: np.s_[head(k)])]
    return {"conv": (4, conv), "heads": (3, heads)}


def wide(tree):
    return jax.tree.map(lambda x: np.array(x, np.float64), tree)


def oracle(params, p=2, bias=False, normalizer="mean", reduce="mean"):
    params = wide(params)
    over = {"mean": np.mean, "sum": np.sum, "max": np.max, None: lambda x: 1.0}
    out = {}
    for name, (size, members) in slices(bias).items():
        raw = np.array(
            [
                over[reduce](
                    [np.sum(np.abs(params[a][b][at(k)]) ** p) for a, b, at in members]
                )
                for k in range(size)
            ]
        )
        out[name] = raw / over[normalizer](raw)
    return out


def decays(params, strengths, alpha, bias=False):
    """What the regulariser adds to the gradient, and the weakness of each channel."""
    params = wide(params)
    added = jax.tree.map(np.zeros_like, params)
    weakness = {}
    for name, value in oracle(params, bias=bias, normalizer=None).items():
        root = np.sqrt(value)
        gamma = 2 ** (alpha * (root.max() - root) / (root.max() - root.min()))
        weakness[name] = (value.max() - value) / (value.max() - value.min())
        size, members = slices(bias)[name]
        for k in range(size):
            for a, b, at in members:
                added[a][b][at(k)] += (
                    strengths[name][k] * gamma[k] * params[a][b][at(k)]
                )
    return added, weakness


OPTIONS = [
    {},
    {"p": 1, "normalizer": "max"},
    {"p": 2.5, "bias": True, "normalizer": "sum"},
    {"bias": True, "normalizer": None, "reduce": "sum"},
    {"reduce": "max"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_importance_of_all_members(x64, options):
    params, groups = case(jnp.float64)
    found = groups.split(methods.group_importance(**options)(groups, params))
    want = oracle(params, **options)
    assert list(found) == list(want)
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12)


def test_bfloat16_sums_in_float32_under_jit():
    params, groups = case(jnp.bfloat16)
    score = methods.group_importance()
    found = groups.split(jax.jit(lambda p: score(groups, p))(params))
    for name, value in oracle(params).items():
        assert found[name].dtype == jnp.float32
        np.testing.assert_allclose(found[name], value, rtol=1e-5)


def test_running_state_has_no_say():
    params, groups = case()
    score = methods.group_importance()
    other = params | {"stats": {"mean": jnp.full(4, jnp.nan)}}
    first, second = score(groups, params), score(groups, other)
    np.testing.assert_array_equal(first, second)


def test_what_is_zero_counts_as_cut(x64):
    params, groups = case(jnp.float64)
    keep = jnp.array([1.0, 0, 1, 1, 1, 1, 0])
    params = sdp_jax.scale_channels(groups, params, keep)
    # What would read a channel that is gone does not matter.
    params["out"]["kernel"] = params["out"]["kernel"].at[4, 0].set(jnp.nan)
    cut = sdp_jax.plan_cut(groups, params)
    assert cut.widths == {"conv": 3, "heads": 2}
    for options in OPTIONS:
        score = methods.group_importance(**options)
        whole = groups.split(score(groups, params))
        small = cut.groups.split(score(cut.groups, cut.take(params)))
        for name, kept in zip(groups.sizes, cut.kept, strict=True):
            mine = np.asarray(whole[name])[list(kept)]
            np.testing.assert_allclose(mine, small[name], rtol=1e-12)
            assert np.count_nonzero(whole[name]) == len(kept)


def test_consumers_are_no_biases():
    params = {"w": jnp.array([[1.0, 3.0]]), "m": {"bias": jnp.array([[2.0], [4.0]])}}
    members = [P("w", 1), C("m/bias", 0)]
    groups = sdp_jax.groups_from_axes(params, {"d": members})
    scores = methods.group_importance(normalizer=None)(groups, params)
    np.testing.assert_allclose(scores, [2.5, 12.5], rtol=1e-6)


def test_a_dimension_of_biases_alone_counts_them():
    params = {"n": {"bias": jnp.array([1.0, 3.0])}}
    groups = sdp_jax.groups_from_axes(params, {"d": P("n/bias", 0)})
    scores = methods.group_importance()(groups, params)
    np.testing.assert_allclose(scores, [0.2, 1.8], rtol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_regulariser_for_three_steps(x64, bias):
    params, groups = case(jnp.float64)
    tx = optax.chain(
        methods.group_norm_regularizer(groups, 0.02, bias=bias), optax.sgd(0.5)
    )
    update = jax.jit(tx.update)
    state, now, ours = tx.init(params), params, wide(params)
    strengths = {k: np.full(n, 0.02) for k, n in groups.sizes.items()}
    for step in range(3):
        grads = case(jnp.float64, seed=step + 1)[0]
        updates, state = update(grads, state, now)
        now = optax.apply_updates(now, updates)
        added, _ = decays(ours, strengths, 4.0, bias)
        ours = jax.tree.map(lambda w, g, a: w - 0.5 * (g + a), ours, wide(grads), added)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), now, ours
        )
    assert update._cache_size() == 1


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_growing_strengths(x64, alpha):
    params, groups = case(jnp.float64)
    tx = methods.group_norm_regularizer(
        groups, 0.02, alpha=alpha, growing=0.01, every=2
    )
    update = jax.jit(tx.update)
    state, now = tx.init(params), params
    strengths = {k: np.full(n, 0.02) for k, n in groups.sizes.items()}
    for step in range(1, 6):
        updates, state = update(jax.tree.map(jnp.zeros_like, now), state, now)
        added, weakness = decays(now, strengths, alpha or 0.0)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), updates, added
        )
        now = jax.tree.map(lambda w, u: w - u, now, updates)
        if step % 2 == 0:
            strengths = {k: v + 0.01 * weakness[k] for k, v in strengths.items()}
    want = np.concatenate(list(strengths.values()))
    np.testing.assert_allclose(state.reg.per_channel, want, rtol=1e-10)
    assert state.count == 5 and update._cache_size() == 1


def test_two_terms_where_an_entry_is_on_two_axes_a_channel():
    params, groups = case()
    tx = methods.group_norm_regularizer(groups, 0.5, alpha=0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    # reg · γ · (1 + 1) · w with γ = 1; biases and running state are left alone.
    np.testing.assert_allclose(
        updates["mix"]["kernel"], params["mix"]["kernel"], rtol=1e-6
    )
    for a, b in [
        ("mix", "bias"),
        ("conv", "bias"),
        ("norm", "bias"),
        ("stats", "mean"),
    ]:
        assert not np.any(updates[a][b])


@hypothesis.settings(max_examples=12)
@hypothesis.given(
    st.lists(st.floats(0.125, 8), min_size=4, max_size=4), st.floats(0, 6)
)
def test_decay_lies_between_one_and_two_to_the_alpha(weights, alpha):
    params = {"w": jnp.array([weights])}
    groups = sdp_jax.groups_from_axes(params, {"d": P("w", 1)})
    tx = methods.group_norm_regularizer(groups, 1.0, alpha=alpha)
    updates, _ = tx.update({"w": jnp.zeros_like(params["w"])}, tx.init(params), params)
    rates = np.asarray(updates["w"] / params["w"])[0]
    order = np.argsort(weights)
    assert np.all(np.diff(rates[order]) <= 1e-4 * 2**alpha)
    # The largest decays at 1; the smallest at 2^α, unless they are all alike.
    np.testing.assert_allclose(rates[order[-1]], 1, rtol=1e-5)
    spread = np.ptp(np.float32(weights)) > 1e-3
    if spread or len(set(weights)) == 1:
        least = 2**alpha if spread else 1
        np.testing.assert_allclose(rates[order[0]], least, rtol=1e-4)


def test_equal_channels_and_zero_strength():
    params = {"w": jnp.array([[2.0, -2.0]])}
    groups = sdp_jax.groups_from_axes(params, {"d": P("w", 1)})
    grads = {"w": jnp.array([[0.3, 0.4]])}
    tx = methods.group_norm_regularizer(groups, 0.5, growing=0.1, alpha=4)
    updates, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [[1.3, -0.6]], rtol=1e-6)
    np.testing.assert_array_equal(state.reg.per_channel, [0.5, 0.5])
    params, groups = case()
    tx = methods.group_norm_regularizer(groups, 0)
    grads = case(seed=3)[0]
    updates, _ = tx.update(grads, tx.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, updates, grads)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_dimension_that_is_not_finite_is_left_alone(bad):
    params, groups = case()
    params["out"]["kernel"] = params["out"]["kernel"].at[0, 0].set(bad)
    tx = methods.group_norm_regularizer(groups, 0.5, growing=0.1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(zeros, tx.init(params), params)
    assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))
    assert not np.any(updates["out"]["kernel"]) and np.all(updates["conv"]["kernel"])
    reg = state.reg.per_channel
    assert np.all(reg[4:] == 0.5) and np.any(reg[:4] > 0.5)


def test_channels_that_are_gone_are_left_alone(x64):
    params, groups = case(jnp.float64)
    keep = jnp.ones(7).at[1].set(0)
    params = sdp_jax.scale_channels(groups, params, keep)
    tx = methods.group_norm_regularizer(groups, 0.5, growing=0.1, alpha=4)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = jax.jit(tx.update)(zeros, tx.init(params), params)
    assert state.reg.per_channel[1] == 0.5
    # The others decay as in the small model.
    cut = sdp_jax.plan_cut(groups, params)
    small = methods.group_norm_regularizer(cut.groups, 0.5, growing=0.1, alpha=4)
    inputs = cut.take(params)
    want, small_state = jax.jit(small.update)(
        jax.tree.map(jnp.zeros_like, inputs), small.init(inputs), inputs
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10),
        cut.take((updates, state)),
        (want, small_state),
    )


def test_bfloat16_state_and_initialisation():
    params, groups = case(jnp.bfloat16)
    tx = methods.group_norm_regularizer(groups, growing=1e-4)
    shapes = jax.eval_shape(tx.init, params)
    tx.init({})
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(updates))

    def described(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)

    assert described(jax.eval_shape(lambda: state)) == described(shapes)


def test_weak_channels_fade_faster_in_training():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(5, 6)) * np.linspace(0.5, 1.5, 6))}
    groups = sdp_jax.groups_from_axes(params, {"d": P("w", 1)})
    tx = optax.chain(methods.group_norm_regularizer(groups, 0.01), optax.sgd(1.0))
    before = sdp_jax.channel_norms(groups, params)
    updates, _ = tx.update({"w": jnp.zeros((5, 6))}, tx.init(params), params)
    after = sdp_jax.channel_norms(groups, optax.apply_updates(params, updates))
    share = np.asarray(after / before)
    assert np.all(np.diff(share[np.argsort(before)]) > 0)


@pytest.mark.parametrize(
    "make, error, match",
    [
        (lambda g: methods.group_importance(0), ValueError, "p must be a positive"),
        (lambda g: methods.group_importance("2"), TypeError, "p must be a positive"),
        (
            lambda g: methods.group_importance(normalizer="median"),
            ValueError,
            "normalizer is 'median'; use one of",
        ),
        (
            lambda g: methods.group_importance(reduce="prod"),
            ValueError,
            "reduce is 'prod'; use one of",
        ),
        (lambda g: methods.group_norm_regularizer({}), TypeError, "sdp_jax.Groups, as"),
        (lambda g: methods.group_norm_regularizer(g, -1), ValueError, "reg must be"),
        (
            lambda g: methods.group_norm_regularizer(g, alpha=-1),
            ValueError,
            "alpha must be",
        ),
        (
            lambda g: methods.group_norm_regularizer(g, growing=-1),
            ValueError,
            "growing must be",
        ),
        (
            lambda g: methods.group_norm_regularizer(g, growing=1, every=0),
            ValueError,
            "every must be a number of updates",
        ),
        (
            lambda g: methods.group_norm_regularizer(g, every=5),
            ValueError,
            "give growing= too",
        ),
    ],
)
def test_bad_arguments(make, error, match):
    with pytest.raises(error, match=match):
        make(case()[1])


def test_bad_parameters():
    params, groups = case()
    tx = methods.group_norm_regularizer(groups)
    state = tx.init(params)
    with pytest.raises(ValueError, match="needs the current parameters"):
        tx.update(params, state)
    lacking = {k: v for k, v in params.items() if k != "out"}
    with pytest.raises(ValueError, match="no leaf 'out/kernel'.*a consumer"):
        tx.init(lacking)
    with pytest.raises(ValueError, match="no leaf 'out/kernel'"):
        methods.group_importance()(groups, lacking)
