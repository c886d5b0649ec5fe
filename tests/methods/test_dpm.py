"""Decay pruning against its equations in NumPy, and its limits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sdp_jax
from sdp_jax import methods
from tests import toy

SIZE = 5


def params_of(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(3, SIZE)) * np.linspace(0.5, 2, SIZE)
    return {
        "w": jnp.asarray(w, dtype),
        "b": jnp.asarray(rng.normal(size=SIZE), dtype),
        "rest": jnp.asarray(rng.normal(size=2), dtype),
    }


def groups_of(params):
    members = [sdp_jax.Member("w", 1), sdp_jax.Member("b", 0)]
    return sdp_jax.groups_from_axes(params, {"hidden": members})


def gradients(steps, seed=1, dtype=np.float64):
    rng = np.random.default_rng(seed)
    shapes = {"w": (3, SIZE), "b": (SIZE,), "rest": (2,)}
    return [
        {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}
        for _ in range(steps)
    ]


def make(params, *, share=0.4, every=1, begin=0, **options):
    groups = groups_of(params)
    host = methods.remove_lowest(
        groups,
        sdp_jax.target_sparsity(share, begin, begin + 1),
        methods.l2_norm(),
        every=every,
    )
    return methods.decay_pruning(optax.sgd(0.1), host, groups, **options), host


def columns(params):
    """Each channel as one vector."""
    return np.vstack([np.asarray(params["w"], np.float64), np.asarray(params["b"])]).T


def reference(params, grads, *, marks, steps, rate, length, until):
    """The equations, channel by channel; ``marks[k]`` are marked in step k."""
    x = columns(params)
    n, start = np.zeros(SIZE, int), np.zeros(SIZE)
    path, releases = [], 0
    for k, gradient in enumerate(grads):
        g = columns(gradient)
        alive = (x != 0).any(1)
        size = np.linalg.norm(g, axis=1)
        mean = size[alive].sum() / max(alive.sum(), 1)
        new = x.copy()
        for c in range(SIZE):
            if not alive[c]:
                continue
            free = x[c] - 0.1 * g[c]
            if n[c] > 0:
                escape = np.linalg.norm(free) - np.linalg.norm(x[c])
                loose = rate is not None and escape / (start[c] / steps) > rate
                if loose and size[c] / mean > length and k + 1 <= until:
                    n[c], new[c] = 0, free
                    releases += 1
                    continue
            elif c in marks[k]:
                start[c] = np.linalg.norm(x[c])
            else:
                new[c] = free
                continue
            n[c] += 1
            goal = (steps - n[c]) * start[c] / steps
            new[c] = free * goal / np.linalg.norm(free)
            if n[c] == steps:
                n[c], new[c] = 0, 0.0
        x = new
        path.append(x.copy())
    return path, releases


@pytest.mark.parametrize("rate", [None, 0.0, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_equations(x64, steps, rate):
    params = params_of(dtype=jnp.float64)
    grads = gradients(8)
    until = 6
    # A host that marks given channels in given steps, and nothing else.
    marks = [{1}, set(), {0, 3}, set(), set(), {0, 1}, set(), set()]
    groups = groups_of(params)
    table = jnp.asarray([[c in m for c in range(SIZE)] for m in marks])

    def update(updates, state, params=None, **extra_args):
        factor = jnp.where(table[state], 0.0, 1.0)
        point = sdp_jax.scale_channels(
            groups, optax.apply_updates(params, updates), factor
        )
        # What is zero stays so.
        alive = sdp_jax.channels_alive(groups, params).astype(float)
        point = sdp_jax.scale_channels(groups, point, alive)
        return jax.tree.map(jnp.subtract, point, params), state + 1

    host = optax.GradientTransformationExtraArgs(lambda p: jnp.zeros((), int), update)
    tx = methods.decay_pruning(
        optax.sgd(0.1),
        host,
        groups,
        steps=steps,
        rate=rate,
        length=0.9,
        release_end_step=until,
    )
    expected, releases = reference(
        params, grads, marks=marks, steps=steps, rate=rate, length=0.9, until=until
    )
    state, step, rest = tx.init(params), jax.jit(tx.update), params["rest"]
    for gradient, x in zip(grads, expected, strict=True):
        updates, state = step(gradient, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(columns(params), x, rtol=1e-10, atol=1e-14)
        np.testing.assert_array_equal(columns(params) == 0, x == 0)
        rest = rest - 0.1 * gradient["rest"]
        np.testing.assert_allclose(params["rest"], rest, rtol=1e-12)
    assert int(state.releases) == releases
    if steps == 6 and rate == 0.0:
        assert releases > 0


def test_one_step_is_the_host_itself():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    base = optax.sgd(0.1, 0.9)
    hosts = {
        "removal": methods.remove_lowest(
            groups, sdp_jax.target_sparsity(0.5, 1, 5), methods.taylor()
        ),
        "threshold": sdp_jax.group_soft_threshold(groups, 0.8),
    }
    for name, host in hosts.items():
        ours = methods.decay_pruning(base, host, groups, steps=1)
        plain = methods.hosted(base, host)
        a, b = (params, ours.init(params)), (params, plain.init(params))
        for i in range(6):
            grads = toy.mlp_grads(params, seed=i)
            u, state = jax.jit(ours.update)(grads, a[1], a[0])
            v, other = jax.jit(plain.update)(grads, b[1], b[0])
            a = (optax.apply_updates(a[0], u), state)
            b = (optax.apply_updates(b[0], v), other)
            chex.assert_trees_all_equal(a[0], b[0]), name
        assert not sdp_jax.channels_alive(groups, a[0]).all(), name


def test_without_gradient_the_norm_falls_linearly_and_the_direction_stays():
    params = params_of()
    tx, _ = make(params, steps=4)
    zero = jax.tree.map(jnp.zeros_like, params)
    state, first = tx.init(params), columns(params)
    lowest = np.argsort(np.linalg.norm(first, axis=1))[:2]
    for n in range(1, 5):
        updates, state = tx.update(zero, state, params)
        params = optax.apply_updates(params, updates)
        expected = first.copy()
        expected[lowest] *= 1 - n / 4
        np.testing.assert_allclose(columns(params), expected, rtol=1e-5, atol=1e-7)
    assert (columns(params)[lowest] == 0).all()


def test_a_channel_that_the_gradient_wants_back_is_released_and_marked_again():
    params = params_of()
    tx, _ = make(params, steps=8, every=4, rate=0.0, length=1.5)
    lowest = int(np.argmin(np.linalg.norm(columns(params), axis=1)))
    push = {
        "w": jnp.zeros((3, SIZE)).at[:, lowest].set(-3 * params["w"][:, lowest]),
        "b": jnp.zeros(SIZE).at[lowest].set(-3 * params["b"][lowest]),
        "rest": jnp.zeros(2),
    }
    zero = jax.tree.map(jnp.zeros_like, params)
    state, counts = tx.init(params), []
    for i in range(9):
        updates, state = tx.update(push if i == 4 else zero, state, params)
        params = optax.apply_updates(params, updates)
        counts.append(int(state.steps.per_channel[lowest]))
    # Marked in the fourth step, released in the fifth, marked again in the eighth.
    assert counts == [0, 0, 0, 1, 0, 0, 0, 1, 2]
    assert int(state.releases) == 1
    assert not state.host.inner.gone.per_channel.all()


def test_after_the_last_release_the_target_is_met():
    params = toy.mlp_params(widths=(4, 20, 12, 3))
    groups = toy.mlp_groups(params)
    host = methods.remove_lowest(
        groups, sdp_jax.target_sparsity(0.5, 0, 6), methods.l2_norm()
    )
    tx = methods.decay_pruning(
        optax.sgd(0.1),
        host,
        groups,
        steps=3,
        rate=-5.0,
        length=0.0,
        release_end_step=10,
    )
    state, step = tx.init(params), jax.jit(tx.update)
    for i in range(15):
        updates, state = step(toy.mlp_grads(params, seed=i), state, params)
        params = optax.apply_updates(params, updates)
    assert int(sdp_jax.channels_alive(groups, params).sum()) == 16
    assert int(state.releases) > 10


@pytest.mark.parametrize("name", ["gate_decorator", "hesso"])
def test_hosts_that_stop_choosing_do_not_lose_what_was_released(name):
    params = {"w": jax.random.normal(jax.random.key(0), (3, 8))}
    groups = sdp_jax.groups_from_axes(params, {"h": [sdp_jax.Member("w", 1)]})
    if name == "gate_decorator":
        rule = sdp_jax.target_sparsity(0.5, 0, 10)
        host = methods.gate_decorator(
            groups, rule, tick_steps=1, tock_steps=4, ticks=1, end_step=12
        )
    else:
        rule = sdp_jax.target_sparsity(0.5, 0, 1)
        host = methods.hesso(groups, rule, begin_step=0, end_step=10, periods=1)
    tx = methods.decay_pruning(
        optax.sgd(0.1), host, groups, rate=0.0, length=0.0, release_end_step=12
    )
    state, step = tx.init(params), jax.jit(tx.update)
    for _ in range(30):
        grads = jax.tree.map(lambda w: -0.01 * w, params)
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert int((params["w"] == 0).all(0).sum()) == 4
    assert name == "hesso" or int(state.releases) > 0


def test_where_dimensions_share_entries_the_zeros_of_the_host_win():
    params = {"w": jnp.ones((4, 3)) + jnp.arange(12.0).reshape(4, 3) / 10}
    rows, cols = (
        sdp_jax.groups_from_axes(params, {name: [sdp_jax.Member("w", axis)]})
        for axis, name in enumerate(("rows", "cols"))
    )
    groups = sdp_jax.Groups((*rows, *cols), rows.leaves)
    kept = jnp.array([0.0, 1, 1, 1, 1, 1, 1])
    params = sdp_jax.scale_channels(groups, params, kept)
    host = methods.remove_lowest(groups, 1.0)
    tx = methods.decay_pruning(optax.sgd(0.1), host, groups, steps=4)
    scores = {"rows": jnp.array([0.0, 2, 2, 2]), "cols": jnp.array([0.5, 2, 2])}
    state = methods.set_scores(tx.init(params), groups, scores)
    grads = {"w": jnp.ones((4, 3))}
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert (params["w"][0] == 0).all()
    assert (params["w"][1:] != 0).all()


def test_bad_input():
    params = params_of()
    groups, base = groups_of(params), optax.sgd(0.1)
    host = sdp_jax.group_soft_threshold(groups, 0.1)
    with pytest.raises(
        ValueError, match=r"steps must be a number of updates, at least 1"
    ):
        methods.decay_pruning(base, host, groups, steps=0)
    with pytest.raises(TypeError, match=r"rate must be a number or None; got 'fast'"):
        methods.decay_pruning(base, host, groups, rate="fast")
    with pytest.raises(ValueError, match=r"length must be a non-negative number"):
        methods.decay_pruning(base, host, groups, length=-1.0)
    with pytest.raises(TypeError, match=r"groups must be sdp_jax.Groups"):
        methods.decay_pruning(base, host, None)
    tx = methods.decay_pruning(base, host, groups)
    with pytest.raises(ValueError, match=r"decay_pruning needs the current parameters"):
        tx.update(params, tx.init(params))
