"""Gate Decorator against its equations in NumPy, and gates against jax.grad."""

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import sdp_jax
from sdp_jax import methods
from sdp_jax.methods import (
    apply_gates,
    decay_pruning,
    decorate,
    gate_decorator,
    gate_taylor,
    hosted,
    scale_penalty,
)

STREAM, BARE = 5, 4


def make_params(dtype=jnp.float32, seed=0):
    """Two normalised branches on one stream, a layer without a scale, an output."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    params = {
        k: {
            "kernel": normal(2, 3, STREAM),
            "scale": normal(STREAM),
            "bias": normal(STREAM),
        }
        for k in "ab"
    }
    params["c"] = {"kernel": normal(STREAM, BARE), "bias": normal(BARE)}
    params["out"] = {"kernel": normal(BARE, 2)}
    return params


def make_groups(params):
    stream = [sdp_jax.Member(f"{k}/kernel", 2) for k in "ab"]
    stream += [sdp_jax.Member(f"{k}/{n}", 0) for k in "ab" for n in ("scale", "bias")]
    stream += [sdp_jax.Member("c/kernel", 0, "consumer")]
    bare = [sdp_jax.Member("c/kernel", 1), sdp_jax.Member("c/bias", 0)]
    bare += [sdp_jax.Member("out/kernel", 0, "consumer")]
    return sdp_jax.groups_from_axes(params, {"stream": stream, "bare": bare})


def apply(params, x):
    total = jnp.zeros(())
    for k in "ab":
        p = params[k]
        y = jnp.einsum("nij,ijc->nc", x, p["kernel"])
        y = (y - y.mean(0)) / jnp.sqrt(y.var(0) + 1e-5)
        total = total + p["scale"] * y + p["bias"]
    y = jax.nn.relu(jax.nn.relu(total) @ params["c"]["kernel"] + params["c"]["bias"])
    return y @ params["out"]["kernel"]


def inputs(dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(9).normal(size=(8, 2, 3)), dtype)


def loss(params):
    return jnp.mean((apply(params, inputs(jnp.result_type(float))) - 1) ** 2)


# --- gates --------------------------------------------------------------------


def test_decorated_network_is_the_same(x64):
    params = make_params(jnp.float64)
    groups = make_groups(params)
    decorated, gates = decorate(groups, params, limit=1e6)
    assert [len(gates[name]) for name in ("stream", "bare")] == [2, 1]
    for k, gate in zip("ab", gates["stream"], strict=True):
        np.testing.assert_array_equal(gate, params[k]["scale"])
        np.testing.assert_array_equal(decorated[k]["scale"], 1)
        ratio = np.asarray(params[k]["bias"]) / np.asarray(params[k]["scale"])
        np.testing.assert_allclose(decorated[k]["bias"], ratio, rtol=1e-14)
        np.testing.assert_array_equal(decorated[k]["kernel"], params[k]["kernel"])
    np.testing.assert_array_equal(gates["bare"][0], 1)
    back = apply_gates(groups, decorated, gates)
    chex.assert_trees_all_close(back, params, rtol=1e-14)
    np.testing.assert_allclose(
        apply(back, inputs(jnp.float64)), apply(params, inputs(jnp.float64)), rtol=1e-12
    )


number = st.floats(-20, 20).map(lambda x: 0.0 if abs(x) < 1e-3 else x)


@hypothesis.settings(max_examples=20)
@hypothesis.given(st.lists(st.tuples(number, number), min_size=3, max_size=3))
def test_round_trip_up_to_the_limit(pairs):
    gamma, beta = np.asarray(pairs, np.float32).T
    params = {"scale": jnp.asarray(gamma), "bias": jnp.asarray(beta)}
    members = [sdp_jax.Member("scale", 0), sdp_jax.Member("bias", 0)]
    groups = sdp_jax.groups_from_axes(params, {"d": members})
    decorated, gates = decorate(groups, params)
    back = apply_gates(groups, decorated, gates)
    np.testing.assert_array_equal(back["scale"], gamma)
    for i in range(3):
        bound = 10 * abs(gamma[i])
        expected = max(-bound, min(bound, beta[i]))
        np.testing.assert_allclose(back["bias"][i], expected, rtol=1e-6)
        assert abs(float(decorated["bias"][i])) <= 10


def test_zero_scale_has_no_direction():
    params = {"scale": jnp.zeros(3), "bias": jnp.array([0.0, 2.0, -2.0])}
    members = [sdp_jax.Member("scale", 0), sdp_jax.Member("bias", 0)]
    groups = sdp_jax.groups_from_axes(params, {"d": members})
    decorated, gates = decorate(groups, params, limit=4.0)
    np.testing.assert_array_equal(decorated["bias"], [0, 4, -4])
    np.testing.assert_array_equal(apply_gates(groups, decorated, gates)["bias"], 0)


def test_gates_of_a_concatenation_and_of_half_precision():
    params = {"scale": jnp.arange(1.0, 8.0), "bias": jnp.arange(7.0)}
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    axes = {
        name: [
            sdp_jax.Member(n, 0, offset=offset, period=size) for n in ("scale", "bias")
        ]
        for name, offset, size in (("first", 0, 2), ("second", 3, 4))
    }
    groups = sdp_jax.groups_from_axes(params, axes, sizes={"first": 2, "second": 4})
    decorated, gates = decorate(groups, params)
    # Position 2 belongs to no dimension and stays as it is.
    np.testing.assert_array_equal(decorated["scale"], [1, 1, 3, 1, 1, 1, 1])
    np.testing.assert_array_equal(gates["second"][0], [4, 5, 6, 7])
    back = apply_gates(groups, decorated, gates)
    chex.assert_trees_all_close(back, params, rtol=1e-2)
    chex.assert_trees_all_equal_dtypes(back, params, decorated)
    assert gates["first"][0].dtype == jnp.bfloat16


def test_score_is_the_gradient_through_the_gates(x64):
    params = make_params(jnp.float64)
    groups = make_groups(params)
    decorated, gates = decorate(groups, params, limit=1e6)
    through = jax.jit(jax.grad(lambda g: loss(apply_gates(groups, decorated, g))))
    slopes = through(gates)
    scores = gate_taylor()(groups, params, jax.jit(jax.grad(loss))(params))
    for name, part in groups.split(scores).items():
        pairs = zip(gates[name], slopes[name], strict=True)
        expected = sum(np.abs(np.asarray(g) * np.asarray(s)) for g, s in pairs)
        assert np.sum(expected > 1e-3) >= 2
        np.testing.assert_allclose(part, expected, rtol=1e-9, atol=1e-12)


def test_no_gradient_to_the_frozen_scale():
    params = make_params()
    groups = make_groups(params)
    decorated, gates = decorate(groups, params)
    through = jax.jit(jax.grad(lambda p: loss(apply_gates(groups, p, gates))))
    slopes = through(decorated)
    for k in "ab":
        assert not np.any(slopes[k]["scale"]) and np.any(slopes[k]["bias"])


def test_several_entries_of_a_scale_are_gates_of_their_own():
    # Two channels of two neighbouring entries: |γ g_γ + β g_β| for each entry.
    params = {"scale": jnp.array([1.0, 2, 3, 4]), "bias": jnp.array([1.0, 1, 1, 1])}
    grads = {"scale": jnp.array([1.0, -1, 1, 1]), "bias": jnp.array([0.0, 0, -3, 1])}
    members = [sdp_jax.Member(n, 0, inner=2) for n in ("scale", "bias")]
    groups = sdp_jax.groups_from_axes(params, {"d": members})
    np.testing.assert_array_equal(gate_taylor()(groups, params, grads), [3, 5])
    decorated, gates = decorate(groups, params)
    assert gates["d"][0].shape == (4,)
    chex.assert_trees_all_close(apply_gates(groups, decorated, gates), params)


# --- ticks and tocks ----------------------------------------------------------

RATE, LEVEL, PENALTY = 0.05, 0.9, 0.02
PHASES = {"tick_steps": 2, "tock_steps": 3, "ticks": 2}


def whole(groups, strength, *, base=None, penalty=1e-3, end_step=None, **options):
    """The method of the paper: a penalty on gates in tocks, and the host."""
    options = PHASES | options
    tock = options["tock_steps"]
    period = tock + options.get("ticks", 10) * options["tick_steps"]

    def in_tocks(n):
        on = n % period < tock
        return jnp.where(on if end_step is None else on & (n < end_step), penalty, 0)

    base = optax.sgd(RATE) if base is None else base
    return hosted(
        optax.chain(scale_penalty(groups, in_tocks), base),
        gate_decorator(groups, strength, end_step=end_step, **options),
    )


def gradients(params, n):
    rng = np.random.default_rng(100 + n)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params
    )


def train(tx, params, steps, jit=True, size=1.0):
    def step(params, state, grads):
        grads = jax.tree.map(lambda g: size * g, grads)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if jit else step
    state, trace = tx.init(params), []
    for n in range(steps):
        params, state = step(params, state, gradients(params, n))
        trace.append(params)
    return trace, state


def oracle(params, steps, level, penalty=PENALTY):
    """Channels go one by one through the equations; returns each step's parameters."""
    x = jax.tree.map(np.array, params)
    gone = {"stream": [False] * STREAM, "bare": [False] * BARE}
    total = {name: [0.0] * len(value) for name, value in gone.items()}
    trace = []
    for n in range(steps):
        # tock tock tock | tick tick | tick tick
        phase = ["tock"] * 3 + ["first", "last"] * 2
        phase = phase[n % 7]
        tick = phase != "tock"
        g = jax.tree.map(np.array, gradients(params, n))
        if phase == "first":
            total = {name: [0.0] * len(value) for name, value in gone.items()}
        for c in range(STREAM):
            for k in "ab":
                gate = x[k]["scale"][c] * g[k]["scale"][c]
                gate += x[k]["bias"][c] * g[k]["bias"][c]
                total["stream"][c] += abs(gate)
        for c in range(BARE):
            # What reads a channel that is zero does not count.
            lives = [not dead for dead in gone["stream"]]
            inner = np.dot(x["c"]["kernel"][lives, c], g["c"]["kernel"][lives, c])
            total["bare"][c] += abs(inner + x["c"]["bias"][c] * g["c"]["bias"][c])
        for k in "ab":
            for c in range(STREAM):
                slope = g[k]["scale"][c]
                if not tick:
                    slope += penalty * np.sign(x[k]["scale"][c])
                x[k]["scale"][c] -= RATE * slope
                x[k]["bias"][c] -= RATE * g[k]["bias"][c]
        x["c"]["bias"] -= RATE * g["c"]["bias"]
        x["out"]["kernel"] -= RATE * g["out"]["kernel"]
        if not tick:
            for k in "abc":
                x[k]["kernel"] -= RATE * g[k]["kernel"]
        if phase == "last":
            for name, scores in total.items():
                means = [-1 if gone[name][c] else s / 2 for c, s in enumerate(scores)]
                for c, mean in enumerate(means):
                    if mean < level and mean != max(means):
                        gone[name][c] = True
        for c in range(STREAM):
            if gone["stream"][c]:
                for k in "ab":
                    x[k]["kernel"][:, :, c] = x[k]["scale"][c] = x[k]["bias"][c] = 0
        for c in range(BARE):
            if gone["bare"][c]:
                x["c"]["kernel"][:, c] = x["c"]["bias"][c] = 0
        trace.append(jax.tree.map(np.array, x))
    return trace, gone


@pytest.mark.parametrize("jit", [False, True])
def test_whole_method_follows_the_equations(jit, x64):
    params = make_params(jnp.float64)
    groups = make_groups(params)
    tx = whole(groups, LEVEL, penalty=PENALTY)
    steps = 15 if jit else 5
    trace, state = train(tx, params, steps, jit)
    expected, gone = oracle(params, steps, LEVEL)
    for n, (got, want) in enumerate(zip(trace, expected, strict=True)):
        chex.assert_trees_all_close(got, want, rtol=1e-9, atol=1e-12, custom_message=n)
    flat = gone["stream"] + gone["bare"]
    assert 1 <= sum(flat) < len(flat)
    np.testing.assert_array_equal(state.host.inner.gone.per_channel, flat)


def test_frozen_filters_and_phases():
    params = make_params()
    groups = make_groups(params)
    tx = hosted(RATE, gate_decorator(groups, 0.0, **PHASES))
    trace, state = train(tx, params, 11)
    before = params
    for n, after in enumerate(trace):
        tick = n % 7 >= 3
        for k in "abc":
            moved = not np.array_equal(before[k]["kernel"], after[k]["kernel"])
            assert moved != tick
            assert not np.array_equal(before[k]["bias"], after[k]["bias"])
        assert not np.array_equal(before["out"]["kernel"], after["out"]["kernel"])
        before = after
    assert int(state.host.count) == 11 and int(state.host.inner.steps) == 1


def test_no_ticks_after_the_end():
    params = make_params()
    groups = make_groups(params)
    tx = whole(groups, LEVEL, penalty=0.5, end_step=5)
    trace, state = train(tx, params, 8)
    assert np.any(state.host.inner.gone.per_channel)  # At update 5.
    _, early = train(tx, params, 5)
    np.testing.assert_array_equal(
        state.host.inner.gone.per_channel, early.host.inner.gone.per_channel
    )
    alive = np.asarray(trace[4]["a"]["scale"]) != 0
    grads = gradients(params, 5)
    for k in "ab":
        for n in ("scale", "kernel"):
            step = trace[5][k][n] - trace[4][k][n]
            np.testing.assert_allclose(
                step[..., alive], -RATE * grads[k][n][..., alive], atol=1e-6
            )


def test_strength_zero_and_no_phases_is_the_base():
    params = make_params()
    groups = make_groups(params)
    base, phases = optax.sgd(RATE, 0.9), {"tick_steps": 1, "tock_steps": 9, "ticks": 10}
    tx = whole(groups, 0.0, base=base, penalty=0.0, **phases)
    got, _ = train(tx, params, 4)
    want, _ = train(base, params, 4)
    chex.assert_trees_all_close(got[-1], want[-1], rtol=1e-5, atol=1e-6)


def test_target_is_met_at_the_end_of_a_tick():
    params = make_params()
    groups = make_groups(params)
    strength = sdp_jax.target_sparsity(6 / 9, 4, 7)
    tx = whole(groups, strength, min_channels={"stream": 2})
    trace, state = train(tx, params, 12, size=0.1)  # Scores below 1.
    numbers = []
    for point in trace:
        alive = groups.split(sdp_jax.channels_alive(groups, point))
        numbers.append(9 - sum(int(a.sum()) for a in alive.values()))
        assert alive["stream"].sum() >= 2 and alive["bare"].sum() >= 1
    # ⌈6 (1 − (2/3)³)⌉ at the end of the first tick, all at that of the second.
    assert numbers == [0] * 4 + [5] * 2 + [6] * 6
    assert int(jnp.sum(state.host.inner.gone.per_channel)) == 6


def test_target_that_ends_in_a_tock_uses_the_last_scores():
    params = make_params()
    groups = make_groups(params)

    def removed(end, steps):
        strength = sdp_jax.target_sparsity(3 / 9, 0, end)
        tx = whole(groups, strength, penalty=0.0)
        _, state = train(tx, params, steps)
        return np.asarray(state.host.inner.gone.per_channel), state.host.inner

    at_tick, host = removed(7, 7)
    means = np.asarray(host.total.per_channel) / int(host.steps)
    in_tock, _ = removed(9, 12)
    assert at_tick.sum() == in_tock.sum() == 3
    # What went before counts; the rest are the lowest of the last tick.
    assert means[in_tock & ~at_tick].size == 0
    early, _ = removed(2, 5)
    assert early.sum() == 3  # In the first tock it ranks by the scores of the tock.
    first = [
        gate_taylor()(groups, p, gradients(p, n))
        for n, p in enumerate([params, *train(optax.sgd(RATE), params, 1)[0]])
    ]
    lowest = np.argsort(np.mean(first, axis=0))[:3]
    assert set(np.flatnonzero(early)) == set(lowest)


def test_released_channels_are_forgotten_and_chosen_again():
    params = make_params()
    groups = make_groups(params)
    host = gate_decorator(groups, LEVEL, tick_steps=1, tock_steps=0)
    update = jax.jit(host.update)
    nothing = jnp.zeros(STREAM + BARE, bool)
    grads = gradients(params, 0)
    steps = jax.tree.map(lambda g: -RATE * g, grads)
    _, state = update(
        steps, host.init(params), params, gradients=grads, released=nothing
    )
    gone = np.asarray(state.inner.gone.per_channel)
    assert gone.any() and not gone.all()
    # With a large gradient what is released stays, the others remain removed.
    released = jnp.asarray(gone & (np.cumsum(gone) == 1))
    large = jax.tree.map(lambda p: 100 * p, params)
    updates, after = update(steps, state, params, gradients=large, released=released)
    np.testing.assert_array_equal(after.inner.gone.per_channel, gone & ~released)
    alive = sdp_jax.channels_alive(groups, optax.apply_updates(params, updates))
    np.testing.assert_array_equal(alive, ~(gone & ~np.asarray(released)))
    _, again = update(steps, state, params, gradients=grads, released=released)
    np.testing.assert_array_equal(again.inner.gone.per_channel, gone)


def test_under_decay_pruning():
    params = make_params()
    groups = make_groups(params)
    strength = sdp_jax.target_sparsity(3 / 9, 0, 1)
    host = gate_decorator(groups, strength, tick_steps=1, tock_steps=1)
    tx = decay_pruning(optax.sgd(RATE), host, groups, steps=2)
    trace, _ = train(tx, params, 4)
    numbers = [9 - int(sdp_jax.channels_alive(groups, p).sum()) for p in trace]
    assert numbers == [0, 0, 3, 3]


def test_groups_without_scales():
    params = make_params()
    groups = make_groups(params)
    tx = hosted(RATE, gate_decorator(groups, 0.0, scales=("gamma",), **PHASES))
    trace, _ = train(tx, params, 4)
    # All vectors are gates then.
    assert not np.array_equal(trace[2]["a"]["scale"], trace[3]["a"]["scale"])
    np.testing.assert_array_equal(trace[2]["a"]["kernel"], trace[3]["a"]["kernel"])


def test_filter_of_one_input_is_frozen():
    params = {"w": jnp.ones((1, 3)), "bias": jnp.ones(3)}
    members = [sdp_jax.Member("w", 1), sdp_jax.Member("bias", 0)]
    groups = sdp_jax.groups_from_axes(params, {"d": members})
    host = gate_decorator(groups, 0.0, tick_steps=1, tock_steps=0)
    updates, _ = host.update(params, host.init(params), params, gradients=params)
    assert not np.any(updates["w"]) and np.all(updates["bias"] == 1)


def test_bias_of_a_filter_is_frozen_with_it():
    params = {k: jnp.ones(3) for k in ("scale", "bias")}
    params = {"norm": params, "conv": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    members = [sdp_jax.Member(f"norm/{n}", 0) for n in ("scale", "bias")]
    members += [sdp_jax.Member("conv/kernel", 1), sdp_jax.Member("conv/bias", 0)]
    groups = sdp_jax.groups_from_axes(params, {"d": members})
    host = gate_decorator(groups, 0.0, tick_steps=1, tock_steps=0)
    steps = jax.tree.map(jnp.ones_like, params)
    updates, _ = host.update(steps, host.init(params), params, gradients=steps)
    assert not any(np.any(x) for x in updates["conv"].values())
    assert all(np.all(x == 1) for x in updates["norm"].values())


def test_bad_input():
    params = make_params()
    groups = make_groups(params)
    decorated, gates = decorate(groups, params)
    with pytest.raises(ValueError, match="limit must be a positive number"):
        decorate(groups, params, limit=0)
    with pytest.raises(ValueError, match="gates must have, for each dimension"):
        apply_gates(groups, decorated, {"stream": gates["stream"]})
    with pytest.raises(TypeError, match="groups must be"):
        decorate({}, params)  # type: ignore
    with pytest.raises(ValueError, match="gate_taylor needs gradients"):
        gate_taylor()(groups, params)
    with pytest.raises(TypeError, match="scales must be a tuple"):
        gate_taylor(scales="scale")
    good = {"tick_steps": 1, "tock_steps": 1}
    bad = {"tick_steps": 0, "tock_steps": -1, "ticks": 0, "end_step": -1}
    for name, value in bad.items():
        with pytest.raises(ValueError, match=f"{name} must be a number of .* at least"):
            gate_decorator(groups, 0.5, **{**good, name: value})
    with pytest.raises(TypeError, match="tick_steps must be an integer"):
        gate_decorator(groups, 0.5, tick_steps=1.5, tock_steps=1)  # type: ignore
    with pytest.raises(ValueError, match="fewer than"):
        gate_decorator(groups, 0.5, tick_steps=2**30, tock_steps=1)
    host = gate_decorator(groups, 0.5, **good)
    with pytest.raises(ValueError, match="gate_decorator needs the current parameters"):
        host.update(params, host.init(params))
    with pytest.raises(ValueError, match="gate_taylor needs gradients"):
        host.update(params, host.init(params), params)


def test_dimensions_that_share_a_scale_have_its_gate_once():
    params = {"scale": jnp.array([2.0, -3.0, 4.0, 5.0]), "bias": jnp.arange(4.0)}
    found = []
    for name, inner in (("pairs", 2), ("halves", 1)):
        size = {"pairs": 2, "halves": 2}[name]
        outer = 1 if name == "pairs" else 2
        members = [
            sdp_jax.Member(path, 0, inner=inner, outer=outer)
            for path in ("scale", "bias")
        ]
        part = sdp_jax.groups_from_axes(params, {name: members}, sizes={name: size})
        found.extend(part)
    groups = sdp_jax.Groups(tuple(found), part.leaves)
    decorated, gates = methods.decorate(groups, params)
    again = methods.apply_gates(groups, decorated, gates)
    chex.assert_trees_all_close(again, params, rtol=1e-6)
    tx = methods.scale_penalty(groups, 0.5)
    zero = jax.tree.map(jnp.zeros_like, params)
    grads, _ = tx.update(zero, tx.init(params), params)
    assert grads["scale"].tolist() == [0.5, -0.5, 0.5, 0.5]
