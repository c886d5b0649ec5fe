"""The strength that stops when the PQ Index rises, against its rule in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sdp_jax
from sdp_jax import methods
from tests import toy
from tests.toy import pq_reference as reference


def stopping(norms, thresholds, p, q, rise, decay, begin_step, scope):
    """The rule, step by step; thresholds that are given for each step and channel."""
    index, minimum, stopped, kept = 0.0, np.inf, False, None
    out = []
    for n, (now, level) in enumerate(zip(norms, thresholds, strict=True), start=1):
        kept = kept if stopped else level
        left = {k: np.maximum(now[k] - kept[k], 0) for k in now}
        if scope == "global":
            joined = np.concatenate(list(left.values()))
            seen = reference(joined[joined > 0], p, q)
        else:
            values = [reference(v[v > 0], p, q) for v in left.values()]
            seen = np.average(values, weights=[(v > 0).sum() for v in left.values()])
        index = seen if n == 1 else decay * index + (1 - decay) * seen
        dead = any((v == 0).any() for v in left.values())
        if n > begin_step and dead:
            minimum = min(minimum, index)
            stopped = stopped or index > minimum + rise
        out.append((kept, index, minimum, stopped))
    return out


@pytest.mark.parametrize(
    ("scope", "begin_step", "rise"),
    [("global", 0, 0.01), ("global", 7, 0.01), ("dimension", 0, 0.005)],
)
def test_the_strength_stops_when_the_index_rises(x64, scope, begin_step, rise):
    rng = np.random.default_rng(0)
    start = {"a": rng.uniform(1, 2, 6), "b": rng.uniform(2, 3, 5)}
    noise = [
        {k: v * rng.uniform(0.97, 1.03, v.shape) for k, v in start.items()}
        for _ in range(12)
    ]
    levels = [
        {k: np.full(v.shape, 0.2 * n) for k, v in start.items()} for n in range(1, 13)
    ]
    options = dict(p=0.5, q=1.0, rise=rise, decay=0.5, scope=scope)
    expected = stopping(noise, levels, begin_step=begin_step, **options)
    assert not expected[3][3] and expected[-1][3] and expected[-2][3]

    strength = methods.until_compressed(
        lambda count: 0.2 * (count + 1), begin_step=begin_step, **options
    )
    params = {k: jnp.ones((1, len(v))) for k, v in start.items()}
    groups = sdp_jax.groups_from_axes(
        params, {k: [sdp_jax.Member(k, 1)] for k in params}
    )
    noise = [groups.join(now) for now in noise]
    floors = (0, 0)
    state = strength.init(groups, floors)
    update = jax.jit(lambda s, n: strength.update(s, n, groups, floors))
    signature = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)
    advanced = 0
    for now, (kept, value, minimum, stopped) in zip(noise, expected, strict=True):
        advanced += not bool(state.stopped)
        before = state
        thresholds, state = update(state, now)
        np.testing.assert_allclose(thresholds, groups.join(kept), rtol=1e-9)
        np.testing.assert_allclose(state.index, value, rtol=1e-9)
        np.testing.assert_allclose(state.minimum, minimum, rtol=1e-9)
        assert bool(state.stopped) == stopped
        assert int(state.inner.count) == advanced
        now_is = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)
        assert now_is == signature
    assert update._cache_size() == 1
    plain, _ = strength.update(before, noise[-1], groups, floors)
    np.testing.assert_allclose(plain, thresholds, rtol=1e-12)


def test_stopped_thresholds_keep_the_floor_and_the_infinite():
    inner = sdp_jax.Strength(
        lambda groups, floors: jnp.zeros(()),
        lambda state, norms, groups, floors: (
            jnp.array([jnp.inf, 1.0, 1.0, 0.5]),
            state + 1,
        ),
    )
    # The second index is above the first by more than 0.
    strength = methods.until_compressed(inner, rise=0.0, decay=0.0)
    groups = sdp_jax.groups_from_axes(
        {"w": jnp.ones((1, 4))}, {"d": [sdp_jax.Member("w", 1)]}
    )
    state = strength.init(groups, (2,))
    for norms in ([9.0, 2.0, 2.0, 2.0], [9.0, 2.0, 4.0, 2.0]):
        thresholds, state = strength.update(state, jnp.array(norms), groups, (2,))
    assert bool(state.stopped)
    # Channel 0 is larger than all, and gone; of the others two must live.
    norms = jnp.array([9.0, 0.5, 0.4, 0.3])
    thresholds, after = strength.update(state, norms, groups, (2,))
    np.testing.assert_allclose(
        thresholds, [np.inf, 0.9 * 0.5, 0.9 * 0.4, 0.5], rtol=1e-6
    )
    assert float(after.inner) == float(state.inner)
    np.testing.assert_array_equal(
        after.thresholds.per_channel, state.thresholds.per_channel
    )
    # A norm that is not a number does not stay in the index.
    _, after = strength.update(state, jnp.full(4, jnp.nan), groups, (2,))
    assert np.isfinite(after.index)


def test_in_altsdp():
    params = toy.mlp_params(widths=(4, 12, 8, 3))
    groups = toy.mlp_groups(params)
    # The learning rate reaches the strength inside.
    strength = methods.until_compressed(
        sdp_jax.valley_strength(2.0, 0.7), rise=0.02, decay=0.5
    )
    tx = sdp_jax.altsdp(0.1, groups, strength=strength, min_channels=2)
    free = sdp_jax.altsdp(
        0.1, groups, strength=sdp_jax.valley_strength(2.0, 0.7), min_channels=2
    )
    data = toy.batch()

    def train(tx):
        @jax.jit
        def step(params, state):
            updates, state = tx.update(jax.grad(toy.loss)(params, data), state, params)
            return optax.apply_updates(params, updates), state

        now, state, trace = params, tx.init(params), []
        for _ in range(80):
            now, state = step(now, state)
            trace.append(state[-1].strength)
        alive = groups.split(sdp_jax.channels_alive(groups, now))
        return {k: int(v.sum()) for k, v in alive.items()}, trace, state, step

    widths, trace, state, step = train(tx)
    assert step._cache_size() == 1
    stops = [bool(s.stopped) for s in trace]
    first = stops.index(True)
    assert 0 < first < 75 and all(stops[first:])
    level = trace[first].thresholds.per_channel
    np.testing.assert_array_equal(trace[-1].thresholds.per_channel, level)
    sdp_jax.check_zeros(state)
    dense = sum(groups.sizes.values())
    assert sum(train(free)[0].values()) < sum(widths.values()) < dense
    # A cut takes its thresholds along.
    scores = sdp_jax.channel_norms(groups, params)
    cut = sdp_jax.plan_cut(groups, params, scores=scores, sparsity=0.5)
    small = cut.take(state)[-1].strength.thresholds.per_channel
    assert small.shape == (sum(cut.widths.values()),)
    # With a rise that never comes it is the strength inside.
    never = methods.until_compressed(sdp_jax.ramp_strength(0.5, 0, 10), rise=10.0)
    ours, theirs = (
        sdp_jax.altsdp(0.1, groups, strength=s)
        for s in (never, sdp_jax.ramp_strength(0.5, 0, 10))
    )
    assert train(ours)[0] == train(theirs)[0]


def test_init_is_abstract():
    strength = methods.until_compressed(sdp_jax.target_sparsity(0.5, 0, 3))
    tx = sdp_jax.altsdp(0.1, toy.mlp_groups(), strength=strength)
    jax.eval_shape(tx.init, toy.mlp_params())
    tx.init({})


def test_bad_input():
    for options in ({"rise": -1.0}, {"decay": 1.0}, {"begin_step": -1}, {"scope": "x"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            methods.until_compressed(0.1, **options)
