"""HESSO against its equations in NumPy, channel by channel."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sdp_jax
from sdp_jax import methods
from sdp_jax.channels import channels_alive
from tests import toy

WIDTHS = (3, 5, 4, 2)


def make(dtype=jnp.float32, seed=0):
    params = toy.mlp_params(seed, dtype, WIDTHS)
    return params, toy.mlp_groups(params)


def grads_at(params, step):
    return jax.tree.map(lambda g: 0.4 * g, toy.mlp_grads(params, seed=10 + step))


def make_step(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def flat(params):
    """One float64 vector per channel, dimension after dimension, and the rest."""
    channels = []
    for i in range(2):
        kernel = np.asarray(params[f"layer{i}"]["kernel"], np.float64)
        bias = np.asarray(params[f"layer{i}"]["bias"], np.float64)
        channels += [np.append(kernel[:, c], bias[c]) for c in range(len(bias))]
    rest = [np.asarray(v, np.float64) for v in jax.tree.leaves(params["layer2"])]
    return channels, rest


def criteria(channels, slopes):
    """The five criteria, each normalised over all channels."""
    columns = []
    for x, g in zip(channels, slopes, strict=True):
        size, steep, product = np.sqrt(x @ x), np.sqrt(g @ g), x @ g
        if size == 0:
            columns.append([0.0] * 5)
            continue
        cosine = product / (size * steep)
        columns.append(
            [size, size / len(x), cosine + 1, abs(product), 0.5 * product**2]
        )
    table = np.array(columns)
    return table / np.sqrt(np.sum(table**2, axis=0))


def test_score(x64):
    params, groups = make(jnp.float64)
    grads = grads_at(params, 0)
    expected = criteria(flat(params)[0], flat(grads)[0])
    score = join_channels(methods.hesso_score()(groups, params, grads))
    np.testing.assert_allclose(score, 0.2 * expected.sum(axis=1), rtol=1e-6)
    names = ["magnitude", "average", "cosine", "first", "second"]
    for i, name in enumerate(names):
        alone = methods.hesso_score(**{n: float(n == name) for n in names})
        score = join_channels(alone(groups, params, grads))
        np.testing.assert_allclose(score, expected[:, i], rtol=1e-6)


def test_score_of_extremes():
    params, groups = make()
    none = jax.tree.map(jnp.zeros_like, params)
    score = join_channels(methods.hesso_score()(groups, params, none))
    assert bool(jnp.all(jnp.isfinite(score) & (score > 0)))
    # Squares of small products must not vanish.
    tiny = jax.tree.map(lambda g: 1e-20 * g, grads_at(params, 0))
    last = methods.hesso_score(magnitude=0, average=0, cosine=0, first=0)
    found = join_channels(last(groups, params, tiny))
    usual = join_channels(last(groups, params, grads_at(params, 0)))
    np.testing.assert_allclose(found, usual, rtol=1e-4)
    score = join_channels(methods.hesso_score()(groups, none, none))
    assert not score.any()
    with pytest.raises(ValueError, match="hesso_score needs gradients"):
        methods.hesso_score()(groups, params)
    with pytest.raises(ValueError, match="cosine must be a non-negative weight"):
        methods.hesso_score(cosine=-0.1)


@pytest.mark.parametrize("wanted", [4, 5])
def test_it_follows_its_equations(x64, wanted):
    begin, period, periods, rate, steps = 2, 3, 2, 0.1, 10
    params, groups = make(jnp.float64, seed=4)
    tx = methods.hesso(
        rate,
        groups,
        sdp_jax.target_sparsity(wanted / 9, begin, begin + 1),
        begin=begin,
        steps=period * periods + 1,  # The remainder is left over.
        periods=periods,
    )
    state = tx.init(params)
    step = jax.jit(make_step(tx))
    channels, rest = flat(params)
    fading, gone = [], []
    for n in range(steps):
        grads = grads_at(params, n)
        params, state = step(params, state, grads)
        slopes, others = flat(grads)
        t = (n - begin) % period
        if n >= begin and t == 0 and (n - begin) // period < periods:
            gone += fading
            score = 0.2 * criteria(channels, slopes).sum(axis=1)
            order = [int(i) for i in np.argsort(score) if i not in gone]
            last = (n - begin) // period == periods - 1
            fading = order[: wanted - len(gone) if last else wanted // periods]
        new = []
        for i, (x, g) in enumerate(zip(channels, slopes, strict=True)):
            y = x - rate * g
            if i in gone or (i in fading and n - begin >= period * periods):
                y = 0 * y
            elif i in fading:
                y = y * (period - t - 1) / (period - t)
            new.append(y)
        channels = new
        rest = [x - rate * g for x, g in zip(rest, others, strict=True)]
        got, got_rest = flat(params)
        for a, b in zip(got + got_rest, channels + rest, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)
        zeros = sum(not x.any() for x in got)
        closed = (n + 1 - begin) // period
        expected = 0 if n < begin else [0, wanted // 2, wanted][min(closed, 2)]
        assert zeros == expected
    assert int(state.host.gone.per_channel.sum()) == wanted
    assert not state.host.fading.per_channel.any()


def test_without_gradient_the_decay_is_linear():
    params, groups = make()
    target = sdp_jax.target_sparsity(3 / 9, 0, 1)
    tx = methods.hesso(
        0.1, groups, target, begin=0, steps=5, periods=1, score=methods.l2_norm()
    )
    step = jax.jit(make_step(tx))
    state, start = tx.init(params), flat(params)[0]
    lowest = np.argsort([x @ x for x in start])[:3]
    still = jax.tree.map(jnp.zeros_like, params)
    for n in range(1, 7):
        params, state = step(params, state, still)
        now = flat(params)[0]
        for c in range(9):
            share = max(1 - n / 5, 0) if c in lowest else 1
            np.testing.assert_allclose(now[c], share * start[c], rtol=1e-6, atol=1e-8)
    assert sum(not x.any() for x in now) == 3


def test_targets_of_parameters_and_floors():
    params, groups = make()
    target = sdp_jax.target_sparsity(0.6, 1, 2, target="params", groups=groups)
    tx = methods.hesso(0.1, groups, target, begin=1, steps=6, periods=3, floor=2)
    step = jax.jit(make_step(tx))
    state = tx.init(params)
    for n in range(8):
        params, state = step(params, state, grads_at(params, n))
    alive = {k: int(v.sum()) for k, v in channels_alive(groups, params).items()}
    assert min(alive.values()) >= 2

    def left(a, b):
        return 3 * a + a + a * b + b + b * 2 + 2

    a, b = alive["hidden0"], alive["hidden1"]
    assert left(a, b) <= 0.4 * left(5, 4) + 1e-6
    # One channel more, wherever the floor allowed it, and it were not met.
    assert max(left(a + 1, b), left(a, b + 1)) > 0.4 * left(5, 4)


def test_strength_zero_is_the_base():
    params, groups = make()
    here, there = params, params
    tx = methods.hesso(0.3, groups, 0.0, begin=1, steps=4, periods=2, momentum=0.9)
    base = optax.sgd(0.3, 0.9)
    state, other = tx.init(params), base.init(params)
    step, plain = jax.jit(make_step(tx)), jax.jit(make_step(base))
    for n in range(4):
        grads = grads_at(params, n)
        here, state = step(here, state, grads)
        there, other = plain(there, other, grads)
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_released_channels_are_free_again():
    params, groups = make()
    host = methods.hesso_host(
        groups,
        sdp_jax.target_sparsity(4 / 9, 0, 1),
        begin=0,
        steps=4,
        periods=2,
        score=methods.l2_norm(),
    )
    still = jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(host.update)
    never = jnp.zeros(9, bool)
    _, state = update(still, host.init(params), params, released=never)
    fading = np.flatnonzero(state.fading.per_channel)
    assert len(fading) == 2
    released = jnp.arange(9) == fading[0]
    updates, state = update(still, state, params, released=released)
    before, after = flat(params)[0], flat(optax.apply_updates(params, updates))[0]
    np.testing.assert_array_equal(after[fading[0]], before[fading[0]])
    assert not after[fading[1]].any()
    assert np.flatnonzero(state.gone.per_channel).tolist() == [fading[1]]
    # The last period fills up the target: three more.
    _, state = update(still, state, params, released=never)
    assert int(state.fading.per_channel.sum()) == 3
    # What is released after its beginning goes all the same: no other choice follows.
    _, state = update(still, state, params, released=state.fading.per_channel)
    _, state = update(still, state, params, released=never)
    assert not state.fading.per_channel.any()
    assert int(state.gone.per_channel.sum()) == 4


def test_contract():
    params, groups = make(jnp.bfloat16)
    target = sdp_jax.target_sparsity(4 / 9, 1, 2)
    tx = methods.hesso(0.1, groups, target, begin=1, steps=2, periods=2)
    traces = []

    def counted(*args):
        traces.append(1)
        return make_step(tx)(*args)

    step = jax.jit(counted)
    state = tx.init(params)
    start = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)
    abstract = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    tx.init({})
    fast, slow, slow_state = params, params, state
    for n in range(5):
        grads = grads_at(params, n)
        fast, state = step(fast, state, grads)
        if n == 1:
            early = fast
    for n in range(2):
        slow, slow_state = make_step(tx)(slow, slow_state, grads_at(params, n))
    assert len(traces) == 1
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state) == start
    assert {x.dtype for x in jax.tree.leaves(fast)} == {jnp.dtype("bfloat16")}
    assert int(join_channels(channels_alive(groups, fast)).sum()) == 5
    for a, b in zip(jax.tree.leaves(slow), jax.tree.leaves(early), strict=True):
        np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), rtol=0.02, atol=0.02
        )


def test_bad_input():
    params, groups = make()
    half = sdp_jax.target_sparsity(0.5, 0, 1)
    with pytest.raises(ValueError, match="steps=5 .* cannot be divided into periods=9"):
        methods.hesso(0.1, groups, half, begin=0, steps=5, periods=9)
    with pytest.raises(TypeError, match="steps must be an integer"):
        methods.hesso(0.1, groups, half, begin=0, steps=5.0)
    with pytest.raises(ValueError, match="begin must be .* at least 0"):
        methods.hesso(0.1, groups, half, begin=-1, steps=20)
    with pytest.raises(ValueError, match="periods must be .* at least 1"):
        methods.hesso(0.1, groups, half, begin=0, steps=20, periods=0)
    with pytest.raises(TypeError, match="score must be a function"):
        methods.hesso(0.1, groups, half, begin=0, steps=20, score="l2")
    tx = methods.hesso_host(groups, half, begin=0, steps=20)
    with pytest.raises(ValueError, match="hesso_score needs gradients"):
        tx.update(params, tx.init(params), params)
