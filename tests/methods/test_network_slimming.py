"""Network slimming against its equations in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sdp_jax
from sdp_jax.methods import hosted, remove_lowest
from sdp_jax.methods.network_slimming import scale_penalty, scale_score

SIZE = 4


def make_params(dtype=jnp.float32, seed=0):
    """Two branches with a normalisation each on one stream, and a layer without."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    params = {
        k: {"kernel": normal(2, 3, SIZE), "scale": normal(SIZE), "bias": normal(SIZE)}
        for k in "ab"
    }
    params["b"]["scale"] = params["b"]["scale"].at[1].set(0)
    params["c"] = {"kernel": normal(SIZE, 3), "bias": normal(3)}
    params["out"] = {"kernel": normal(3, 2)}
    return params


def make_groups(params):
    stream = [sdp_jax.Member(f"{k}/kernel", 2) for k in "ab"]
    stream += [sdp_jax.Member(f"{k}/{n}", 0) for k in "ab" for n in ("scale", "bias")]
    stream += [sdp_jax.Member("c/kernel", 0, "consumer")]
    bare = [sdp_jax.Member("c/kernel", 1), sdp_jax.Member("c/bias", 0)]
    bare += [sdp_jax.Member("out/kernel", 0, "consumer")]
    # A stream's channels are rows of c, the layer's are its columns: no overlap.
    return sdp_jax.groups_from_axes(params, {"stream": stream, "bare": bare})


def test_score_is_the_sum_of_magnitudes():
    params = make_params()
    groups = make_groups(params)
    scores = groups.split(scale_score(missing="rms")(groups, params))
    a, b, c = (params[k] for k in "abc")
    for i in range(SIZE):
        expected = abs(float(a["scale"][i])) + abs(float(b["scale"][i]))
        np.testing.assert_allclose(scores["stream"][i], expected, rtol=1e-6)
    for i in range(3):
        entries = [*np.asarray(c["kernel"])[:, i], float(c["bias"][i])]
        expected = np.sqrt(np.mean(np.square(entries)))
        np.testing.assert_allclose(scores["bare"][i], expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"\['bare'\] have no scale.*missing='rms'"):
        scale_score()(groups, params)
    half = scale_score(missing="rms")(groups, make_params(jnp.bfloat16))
    assert half.dtype == jnp.float32


@pytest.mark.parametrize("group", [False, True])
def test_penalty_is_the_subgradient(group, x64):
    params = make_params(jnp.float64)
    groups = make_groups(params)
    tx = scale_penalty(groups, 0.3, group=group)
    grads = jax.tree.map(jnp.cos, params)
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
    assert int(state.count) == 1
    for k in "ab":
        for i in range(SIZE):
            g = float(params[k]["scale"][i])
            if group:
                length = np.hypot(*(float(params[j]["scale"][i]) for j in "ab"))
                slope = g / length
            else:
                slope = (g > 0) - (g < 0)
            expected = float(grads[k]["scale"][i]) + 0.3 * slope
            np.testing.assert_allclose(updates[k]["scale"][i], expected, rtol=1e-12)
        np.testing.assert_array_equal(updates[k]["kernel"], grads[k]["kernel"])
        np.testing.assert_array_equal(updates[k]["bias"], grads[k]["bias"])
    for k in ("c", "out"):
        assert all(map(np.array_equal, *map(jax.tree.leaves, (updates[k], grads[k]))))


@pytest.mark.parametrize("group", [False, True])
def test_penalty_is_the_gradient_of_its_sum(group, x64):
    params = make_params(jnp.float64, seed=3)
    params["b"]["scale"] = params["b"]["scale"].at[1].set(0.7)
    groups = make_groups(params)

    def total(p):
        both = jnp.stack([p[k]["scale"] for k in "ab"])
        each = jnp.sqrt(jnp.sum(both**2, 0)) if group else jnp.abs(both)
        return 0.2 * jnp.sum(each)

    tx = scale_penalty(groups, 0.2, group=group)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12),
        updates,
        jax.grad(total)(params),
    )


def test_zero_scales_and_zero_penalty():
    params = jax.tree.map(jnp.zeros_like, make_params())
    groups = make_groups(params)
    grads = jax.tree.map(jnp.cos, params)
    for given, group in ((params, True), (params, False), (make_params(), True)):
        rate = 0.0 if given is not params else 1.0
        tx = scale_penalty(groups, rate, group=group)
        updates, _ = tx.update(grads, tx.init(given), given)
        jax.tree.map(np.testing.assert_array_equal, updates, grads)


def test_part_of_a_leaf_is_penalised_alone():
    params = {"w": jnp.ones((2, 2)), "scale": jnp.array([1.0, -1.0, 1.0, -1.0])}
    members = [
        sdp_jax.Member("w", 1),
        sdp_jax.Member("scale", 0, offset=1, period=2),
    ]
    groups = sdp_jax.groups_from_axes(params, {"d": members})
    tx = scale_penalty(groups, 0.5)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_array_equal(updates["scale"], [0, -0.5, 0.5, 0])


def test_schedule_compiles_once_and_keeps_dtypes():
    params = make_params(jnp.bfloat16)
    groups = make_groups(params)
    tx = scale_penalty(groups, lambda count: jnp.where(count < 2, 0.0, 1.0))
    traces = []

    @jax.jit
    def step(grads, state):
        traces.append(0)
        return tx.update(grads, state, params)

    jax.eval_shape(tx.init, params)
    tx.init({})
    state = tx.init(params)
    grads = jax.tree.map(jnp.zeros_like, params)
    for n in range(4):
        updates, state = step(grads, state)
        assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(
            jnp.result_type, params
        )
        sign = np.sign(np.asarray(params["a"]["scale"], np.float32))
        np.testing.assert_array_equal(updates["a"]["scale"], sign * (n >= 2))
        assert jax.typeof(state.count) == jax.typeof(jnp.zeros((), jnp.int32))
    assert len(traces) == 1 and int(state.count) == 4


def test_slimming_drives_useless_scales_out():
    # The loss wants channels 0 and 1 alone; the penalty shrinks the others.
    params = {"w": jnp.ones((2, 4)), "scale": jnp.full(4, 0.5)}
    members = [sdp_jax.Member("w", 1), sdp_jax.Member("scale", 0)]
    groups = sdp_jax.groups_from_axes(params, {"d": members})
    goal = jnp.array([1.0, -1.0, 0.0, 0.0])
    host = remove_lowest(groups, sdp_jax.target_sparsity(0.5, 29, 30), scale_score())
    front = scale_penalty(groups, 0.01)
    tx = optax.chain(front, hosted(optax.sgd(0.2), host))
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        slope = jax.grad(lambda p: jnp.sum((p["scale"] - goal) ** 2))(params)
        updates, state = tx.update(slope, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(30):
        params, state = step(params, state)
    assert not np.any(params["w"][:, 2:]) and not np.any(params["scale"][2:])
    np.testing.assert_allclose(params["scale"][:2], [0.995, -0.995], atol=1e-3)


def test_bad_input():
    params = make_params()
    groups = make_groups(params)
    with pytest.raises(ValueError, match="missing is 'skip'"):
        scale_score(missing="skip")  # type: ignore
    with pytest.raises(TypeError, match="scales must be a tuple"):
        scale_score(scales="scale")
    with pytest.raises(ValueError, match="penalty must be a non-negative number"):
        scale_penalty(groups, -1.0)
    with pytest.raises(ValueError, match="no dimension of the groups has a scale"):
        scale_penalty(groups, scales=("gamma",))
    with pytest.raises(TypeError, match="groups must be"):
        scale_penalty({})  # type: ignore
    with pytest.raises(ValueError, match="needs the current parameters"):
        tx = scale_penalty(groups)
        tx.update(params, tx.init(params))
