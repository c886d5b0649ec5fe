"""HSPG and DHSPG against their equations in NumPy, channel by channel."""

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
from sdp_jax.channels import channels_alive
from sdp_jax.methods._hspg import penalty_lengths
from tests import toy
from tests.toy import channel_vectors as flat

WIDTHS = (3, 5, 4, 2)
TARGET = sdp_jax.target_sparsity(0.5, 1, 2)  # 4 of 9, rounded to even


def make(dtype=jnp.float32, seed=0):
    params = toy.mlp_params(seed, dtype, WIDTHS)
    return params, toy.mlp_groups(params)


def grads_at(params, step):
    return jax.tree.map(lambda g: 0.4 * g, toy.mlp_grads(params, seed=10 + step))


def train(tx, params, steps):
    step = jax.jit(toy.make_step(tx))
    state = tx.init(params)
    for n in range(steps):
        params, state = step(params, state, grads_at(params, n))
    return params, state


def assert_same(params, channels, rest, tol=1e-12):
    got, others = flat(params)
    for a, b in zip(got, channels, strict=True):
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol)
        assert a.any() == b.any()
    for a, b in zip(others, rest, strict=True):
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_hspg_follows_its_equations(x64, momentum):
    penalty, epsilon, begin, steps = 0.4, 0.2, 2, 6
    params, groups = make(jnp.float64)

    def schedule(count):
        return 0.4 - 0.05 * jnp.asarray(count, jnp.float64)

    host = methods.hspg(
        groups,
        learning_rate=schedule,
        penalty=penalty,
        epsilon=epsilon,
        begin_step=begin,
        min_channels=0,
    )
    tx = methods.hosted(optax.sgd(schedule, momentum), host)
    state = tx.init(params)
    step = jax.jit(toy.make_step(tx))
    channels, rest = flat(params)
    buffer = [np.zeros_like(x) for x in channels + rest]
    for n in range(steps):
        grads = grads_at(params, n)
        params, state = step(params, state, grads)
        slopes = sum(flat(grads), [])
        rate = 0.4 - 0.05 * n
        buffer = [(momentum or 0) * b + g for b, g in zip(buffer, slopes, strict=True)]
        new, living = [], toy.living_entries(params, channels)
        for x, m, lives in zip(channels, buffer, living, strict=False):
            z = x * lives
            size = np.sqrt(z @ z)
            y = x - rate * m
            if size > 0:
                y = y - rate * penalty * x / size
            if n >= begin and (size == 0 or y @ z < epsilon * (z @ z)):
                y = np.zeros_like(x)
            new.append(y)
        rest = [x - rate * m for x, m in zip(rest, buffer[len(new) :], strict=True)]
        channels = new
        assert_same(params, channels, rest)
        zeros = sum(not x.any() for x in channels)
        assert n >= begin or zeros == 0
    assert 0 < zeros < len(channels)
    assert int(state.host.count) == steps


def test_hspg_holds_its_minimum():
    params, groups = make()
    host = methods.hspg(
        groups,
        learning_rate=0.5,
        penalty=50.0,
        begin_step=0,
        min_channels={"hidden0": 3},
    )
    params, _ = train(methods.hosted(0.5, host), params, 5)
    alive = groups.split(channels_alive(groups, params))
    assert int(alive["hidden0"].sum()) == 3 and int(alive["hidden1"].sum()) == 1


def saliency(channels, slopes):
    """Eq. of the redundancy, high = redundant, with loops."""
    cosines, inverses = [], []
    for x, g in zip(channels, slopes, strict=True):
        size, steep = np.sqrt(x @ x), np.sqrt(g @ g)
        cosines.append(x @ g / (size * steep) if size * steep > 0 else 0.0)
        inverses.append(1 / (size / len(x) + 1e-6) if size > 0 else 0.0)
    cosines, inverses = np.array(cosines), np.array(inverses)
    out = 0.5 * cosines / np.sqrt(np.sum(cosines**2))
    out += 0.5 * inverses / np.sqrt(np.sum(inverses**2))
    return np.where([x.any() for x in channels], out, 1.0)


@pytest.mark.parametrize("dead", [False, True])
def test_dhspg_score(x64, dead):
    params, groups = make(jnp.float64)
    if dead:
        params["layer0"]["kernel"] = params["layer0"]["kernel"].at[:, 1].set(0)
        params["layer0"]["bias"] = params["layer0"]["bias"].at[1].set(0)
    grads = grads_at(params, 0)
    score = methods.dhspg_score()(groups, params, grads)
    expected = saliency(flat(params)[0], flat(grads)[0])
    np.testing.assert_allclose(score, expected.max() - expected, rtol=1e-6, atol=1e-7)
    assert score.min() == 0 and (not dead or score[1] == 0)
    scaled = jax.tree.map(lambda g: 7 * g, grads)
    again = methods.dhspg_score()(groups, params, scaled)
    np.testing.assert_allclose(score, again, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="dhspg_score needs gradients"):
        methods.dhspg_score()(groups, params)


def lambda_of(x, g, penalty, amplification, ceiling):
    """The penalty of one channel, from its gradient."""
    size, product = np.sqrt(x @ x), x @ g
    if product >= 0:
        return penalty
    low, high = -product / size, -(g @ g) * size / product
    value = min(max(amplification * low, penalty), ceiling * penalty)
    return value if value < high else (low + high) / 2


@pytest.mark.parametrize("enough", [None, 0.2])
def test_dhspg_follows_its_equations(x64, enough):
    # Chosen at the third update; the parameters before it are those of SGD.
    begin, warm_up_steps, project_from, steps, rate = 2, 4, 5, 14, 0.2
    penalty, epsilon, wanted = 0.3, 0.4, 4
    params, groups = make(jnp.float64, seed=3)
    host = methods.dhspg(
        groups,
        sdp_jax.target_sparsity(wanted / 9, begin, begin + 1),
        learning_rate=rate,
        penalty=penalty,
        amplification=1.5,
        ceiling=4.0,
        epsilon=epsilon,
        begin_step=begin,
        project_begin_step=project_from,
        warm_up_steps=warm_up_steps,
        enough=enough,
    )
    tx = methods.hosted(rate, host)
    state = tx.init(params)
    step = jax.jit(toy.make_step(tx))
    channels, rest = flat(params)
    redundant, branches, last = set(), set(), False
    for n in range(steps):
        grads = grads_at(params, n)
        params, state = step(params, state, grads)
        slopes, others = flat(grads)
        if n == begin:
            redundant = set(np.argsort(-saliency(channels, slopes))[:wanted].tolist())
        share = np.mean([not x.any() for x in channels])
        shrinking = enough is None or share < enough
        new, living = [], toy.living_entries(params, channels)
        for i, (w, v) in enumerate(zip(channels, slopes, strict=True)):
            x, g = w * living[i], v * living[i]
            y = w - rate * v
            if i in redundant:
                size = np.sqrt(x @ x)
                if size > 0 and shrinking and n >= begin:
                    value = penalty
                    if n >= warm_up_steps:
                        value = lambda_of(x, g, penalty, 1.5, 4.0)
                        branches.add(
                            "plain"
                            if x @ g >= 0
                            else "mean"
                            if value not in (penalty, 4.0 * penalty)
                            and not np.isclose(value, -1.5 * (x @ g) / size)
                            else "clipped"
                        )
                    y = y - rate * value * w / size
                leaves = y @ x < epsilon * (x @ x)
                last = (n == project_from - 1 and leaves) or last
                if size == 0 or (n >= project_from and leaves):
                    y = np.zeros_like(w)
            new.append(y)
        channels = new
        rest = [x - rate * g for x, g in zip(rest, others, strict=True)]
        # The published code adds 1e-8 to the norm; that is below this tolerance.
        assert_same(params, channels, rest, tol=1e-10)
        chosen = np.flatnonzero(state.host.inner.redundant.per_channel)
        assert set(chosen.tolist()) == redundant
    assert last  # The projection was only just not due yet.
    zeros = sum(not x.any() for x in channels)
    if enough is None:
        assert zeros >= 3 and {"plain", "clipped"} <= branches
    else:
        assert 0.2 <= zeros / 9


@hypothesis.settings(max_examples=20)
@hypothesis.given(
    seed=st.integers(0, 10**6),
    amplification=st.floats(1.01, 30),
    penalty=st.floats(1e-6, 1e-3),
    ceiling=st.floats(1, 1e4),
)
def test_lengths_lie_between_the_bounds(seed, amplification, penalty, ceiling):
    rng = np.random.default_rng(seed)
    x, u = rng.normal(size=(2, 6, 3)).astype(np.float32)
    product = np.sum(x * u, axis=1)
    size, step = np.linalg.norm(x, axis=1), np.linalg.norm(u, axis=1)
    hypothesis.assume(np.all(np.abs(product) > 1e-2 * size * step))
    hypothesis.assume(np.all(np.abs(product) < 0.99 * size * step))
    values = [jnp.asarray(v) for v in (product, size, step)]
    length = np.asarray(penalty_lengths(*values, penalty, amplification, 1e9))
    capped = penalty_lengths(*values, penalty, amplification, ceiling)
    move = u - length[:, None] * x / size[:, None]
    grows = product > 0
    # The norm falls to first order, and the step is one of descent: ∇ = −u.
    assert np.all(np.sum(move * x, axis=1)[grows] < 0)
    assert np.all(np.sum(-u * move, axis=1)[grows] < 0)
    np.testing.assert_allclose(length[~grows], penalty, rtol=1e-6)
    for i in range(6):
        value = lambda_of(x[i], -u[i], penalty, amplification, 1e9)
        np.testing.assert_allclose(length[i], value, rtol=1e-4)
        value = lambda_of(x[i], -u[i], penalty, amplification, ceiling)
        np.testing.assert_allclose(capped[i], value, rtol=1e-4)


@jax.jit
def first_step(params, grads, epsilon):
    target = sdp_jax.target_sparsity(6 / 9, 0, 1)
    groups = toy.mlp_groups(params)
    host = methods.dhspg(
        groups, target, learning_rate=0.3, penalty=1.0, epsilon=epsilon
    )
    tx = methods.hosted(0.3, host)
    updates, state = tx.update(grads, tx.init(params), params)
    return optax.apply_updates(params, updates), state.host.inner.redundant.per_channel


@hypothesis.settings(max_examples=15)
@hypothesis.given(seed=st.integers(0, 10**6), epsilon=st.floats(0, 0.95))
def test_what_is_kept_stays_in_its_half_space(seed, epsilon):
    params, _ = make(seed=seed)
    new, chosen = first_step(params, grads_at(params, seed), jnp.asarray(epsilon))
    assert int(chosen.sum()) == 6
    for x, y, c in zip(flat(params)[0], flat(new)[0], chosen, strict=True):
        if c and y.any():
            assert x @ y >= epsilon * (x @ x) - 1e-6
        assert c or y.any()


def test_without_penalty_they_are_their_base():
    params, groups = make()
    plain, _ = train(optax.sgd(0.3, 0.9), params, 4)
    rate = {"learning_rate": 0.3}
    for host in (
        methods.hspg(groups, penalty=0.0, begin_step=9, **rate),
        methods.dhspg(groups, 0.0, **rate),
        methods.dhspg(groups, TARGET, penalty=0.0, project_begin_step=9, **rate),
    ):
        got, _ = train(methods.hosted(optax.sgd(0.3, 0.9), host), params, 4)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_dhspg_reaches_its_target_and_stays():
    params, groups = make()
    data = toy.batch(inputs=3, outputs=2)
    host = methods.dhspg(groups, TARGET, learning_rate=0.05, penalty=0.5, begin_step=1)
    tx = methods.hosted(optax.sgd(0.05, 0.9), host)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(toy.loss)(params, data)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(80):
        params, state = step(params, state)
    dead = ~channels_alive(groups, params)
    assert int(dead.sum()) == 4
    np.testing.assert_array_equal(dead, state.host.inner.redundant.per_channel)


def test_released_channels_leave_the_set():
    params, groups = make()
    host = methods.dhspg(
        groups, sdp_jax.target_sparsity(4 / 9, 0, 1), learning_rate=0.1, penalty=9.0
    )
    still = jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(host.update)
    never = jnp.zeros(9, bool)
    _, state = update(still, host.init(params), params, released=never)
    first = np.flatnonzero(state.inner.redundant.per_channel)
    assert len(first) == 4
    released = jnp.arange(9) == first[0]
    updates, state = update(still, state, params, released=released)
    assert set(np.flatnonzero(state.inner.redundant.per_channel)) == set(first[1:])
    before, after = flat(params)[0], flat(optax.apply_updates(params, updates))[0]
    np.testing.assert_array_equal(after[first[0]], before[first[0]])
    assert not after[first[1]].any()


def test_zeros_are_exact_in_half_precision():
    params, groups = make(jnp.bfloat16)
    host = methods.dhspg(
        groups, sdp_jax.target_sparsity(4 / 9, 0, 1), learning_rate=0.1, penalty=90.0
    )
    params, _ = train(methods.hosted(0.1, host), params, 3)
    assert int(channels_alive(groups, params).sum()) == 5


def test_bad_input():
    params, groups = make()
    hspg = functools.partial(methods.hspg, groups, learning_rate=0.1, begin_step=0)
    dhspg = functools.partial(methods.dhspg, groups, TARGET, learning_rate=0.1)
    with pytest.raises(ValueError, match="penalty must be a non-negative number"):
        hspg(penalty=-1.0)
    with pytest.raises(ValueError, match=r"epsilon must be a number in \[0, 1\)"):
        hspg(epsilon=1.0)
    with pytest.raises(TypeError, match="begin_step must be an integer"):
        hspg(begin_step=1.5)
    with pytest.raises(ValueError, match="project_begin_step must be .* at least 0"):
        dhspg(project_begin_step=-1)
    with pytest.raises(ValueError, match="amplification must be .* at least 1"):
        dhspg(amplification=0.5)
    with pytest.raises(ValueError, match="enough must be a share"):
        dhspg(enough=2.0)
    with pytest.raises(TypeError, match="learning_rate must be a non-negative number"):
        dhspg(learning_rate="fast")
    with pytest.raises(TypeError, match=r"groups must be sdp_jax\.Groups"):
        methods.hspg({}, learning_rate=0.1, begin_step=0)
    host = hspg()
    with pytest.raises(ValueError, match="hspg needs the current parameters"):
        host.update(params, host.init(params))
    with pytest.raises(ValueError, match="hidden0"):
        host.init({"other": jnp.ones(3)})
