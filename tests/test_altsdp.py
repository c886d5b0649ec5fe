"""AltSDP against independent oracles."""

import functools
import os
import pathlib
import platform
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sdp_jax
from tests import toy

DIM = 100


def quadratic(rank, seed):
    """A quadratic with ``rank`` sharp directions; the rest is its null space."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0][:, :rank]
    hessian = (basis * rng.uniform(1, 5, size=rank)) @ basis.T
    centre, start = rng.normal(size=DIM), rng.normal(size=DIM)
    # Gradient descent from `start` ends here: the valley component never moves.
    minimizer = start - basis @ (basis.T @ (start - centre))
    return hessian, basis, centre, start, minimizer


@functools.cache
def exact_points(rank, strength, size):
    """The exact points of the problems of four seeds."""
    problems = (quadratic(rank, seed) for seed in range(4))
    return [exact_sdp(p[-1], p[1], strength, size) for p in problems]


def exact_sdp(minimizer, basis, strength, size, steps=1500):
    """argmin ½‖w − w*‖² + λ Σ ‖w_g‖ over w* + null space, by ADMM."""
    z, u = minimizer.copy(), np.zeros_like(minimizer)
    for _ in range(steps):
        v = (z - u).reshape(-1, size)
        norms = np.linalg.norm(v, axis=1, keepdims=True)
        x = (np.maximum(0, 1 - strength / np.maximum(norms, 1e-300)) * v).reshape(-1)
        middle = (minimizer + x + u) / 2 - minimizer
        z = minimizer + middle - basis @ (basis.T @ middle)
        u += x - z
    assert np.linalg.norm(x - z) < 1e-10
    return x


def train_on_quadratics(problems, c, mu, time, size, explicit, gamma=0.01):
    """Trains on all problems at once, each from its own start in its own valley."""
    params = {"w": jnp.stack([start.reshape(-1, size) for *_, start, _ in problems])}
    one = jax.tree.map(lambda x: x[0], params)
    groups = sdp_jax.groups_from_axes(one, {"all": [sdp_jax.Member("w", 0)]})
    tx = sdp_jax.altsdp(gamma, groups, strength=sdp_jax.valley_strength(c, mu))
    if explicit:
        strength = sdp_jax.valley_strength(c, mu, gamma)
        rank = problems[0][1].shape[1]
        tx = optax.chain(
            optax.sgd(gamma),
            sdp_jax.dual_averaging(),
            sdp_jax.valley.project_onto_valley(
                groups, strength, rank=rank, estimator=None
            ),
            sdp_jax.group_soft_threshold(groups, strength),
        )

    def run(params, state, hessian, centre):
        def step(carry, _):
            params, state = carry
            flat = params["w"].reshape(-1)
            grads = {"w": (hessian @ (flat - centre)).reshape(-1, size)}
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        steps = round(time / gamma)
        return jax.lax.scan(step, (params, state), None, length=steps)[0][0]

    states = []
    for i, (_, basis, *_) in enumerate(problems):
        state = tx.init(jax.tree.map(lambda x, i=i: x[i], params))
        if explicit:
            directions = {"w": jnp.asarray(basis.T.reshape(-1, DIM // size, size))}
            state = sdp_jax.valley.set_basis(state, directions)
        states.append(state)
    state = jax.tree.map(lambda *x: jnp.stack(x), *states)
    hessians, centres = (jnp.stack([p[i] for p in problems]) for i in (0, 2))
    # Up to 200,000 steps: here optimisation pays.
    fast = jax.jit(
        jax.vmap(run), compiler_options={"xla_backend_optimization_level": 3}
    )
    params = fast(params, state, hessians, centres)
    return np.asarray(params["w"]).reshape(len(problems), -1)


# c, μ, sharp directions, training time, group size; distance to the exact point and
# end loss, for plain AltSDP and for the explicit projection.
QUADRATICS = [
    (0.1, 0.51, 40, 200, 5, (1.3e-3, 8.0e-7), (1e-9, 1e-14)),
    (0.5, 0.75, 40, 200, 5, (4.2e-2, 7.7e-4), (1e-6, 1e-12)),
    (0.3, 0.51, 10, 2000, 5, (2.0e-3, 1.2e-6), (1e-8, 1e-14)),
    (0.3, 0.51, 40, 2000, 1, (2.9e-3, 3.3e-6), (5e-8, 1e-14)),
    (2.0, 0.60, 10, 50, 5, (1.6e-1, 6.0e-3), (2e-5, 1e-10)),
]


@pytest.mark.parametrize("explicit", [False, True], ids=["plain", "explicit"])
@pytest.mark.parametrize("case", QUADRATICS, ids=lambda case: str(case[:5]))
def test_reaches_the_exact_sdp_point(case, explicit, x64):
    c, mu, rank, time, size, plain_bounds, explicit_bounds = case
    strength = c * 0.01**0.5 * time**mu
    distances, losses = [], []
    problems = [quadratic(rank, seed) for seed in range(4)]
    found = train_on_quadratics(problems, c, mu, time, size, explicit)
    for problem, w, exact in zip(
        problems, found, exact_points(rank, strength, size), strict=True
    ):
        hessian, _, centre, _, minimizer = problem
        zero = np.abs(w.reshape(-1, size)).max(axis=1) == 0
        np.testing.assert_array_equal(
            zero, np.abs(exact.reshape(-1, size)).max(axis=1) == 0
        )
        distances.append(np.linalg.norm(w - exact))
        losses.append(0.5 * (w - centre) @ hessian @ (w - centre))
        # Soft-thresholding the minimizer itself leaves the valley.
        groups = minimizer.reshape(-1, size)
        norms = np.linalg.norm(groups, axis=1, keepdims=True)
        straw = (np.maximum(0, 1 - strength / norms) * groups).reshape(-1)
        assert losses[-1] < 0.01 * 0.5 * (straw - centre) @ hessian @ (straw - centre)
    bounds = explicit_bounds if explicit else plain_bounds
    assert np.mean(distances) <= bounds[0]
    assert np.mean(losses) <= bounds[1]


RATES = {"constant": 0.1, "schedule": optax.cosine_decay_schedule(0.3, 30)}


def train_toy(tx, jit):
    def step(params, state, batch):
        grads = jax.grad(toy.loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    if jit:
        # As users compile it: without optimisation nothing is contracted.
        step = jax.jit(step, compiler_options={"xla_backend_optimization_level": 3})
    params = toy.mlp_params()
    state = tx.init(params)
    for i in range(30 if jit else 12):
        params, state = step(params, state, toy.batch(seed=i))
    return params


def train_pair(momentum, rate, jit, nesterov=False):
    """SGD, and AltSDP of strength 0, on the same batches."""
    alt = sdp_jax.altsdp(
        rate,
        toy.mlp_groups(),
        strength=sdp_jax.valley_strength(c=0.0, mu=0.6),
        momentum=momentum,
        nesterov=nesterov,
    )
    sgd = optax.sgd(rate, momentum, nesterov)
    return train_toy(sgd, jit), train_toy(alt, jit)


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("rate", RATES)
def test_zero_strength_is_sgd_bit_for_bit(momentum, rate):
    pair = train_pair(momentum, RATES[rate], jit=False)
    chex.assert_trees_all_equal(*pair)


def test_zero_strength_is_nesterov_bit_for_bit():
    pair = train_pair(0.9, 0.1, jit=False, nesterov=True)
    chex.assert_trees_all_equal(*pair)
    plain, _ = train_pair(0.9, 0.1, jit=False)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(plain, pair[0], rtol=1e-3)


@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("rate", RATES)
def test_zero_strength_is_sgd_to_rounding_when_contracted(momentum, rate):
    # The compiler may contract SGD's p - rate * g to one rounding. The dual variable
    # has the same bits; the step from p to it cannot always be written as a float.
    sgd, alt = train_pair(momentum, RATES[rate], jit=True)
    chex.assert_trees_all_close(alt, sgd, rtol=0, atol=1e-6)


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"),
    reason="only on x86 can the compiler be kept from contracting to FMA",
)
def test_zero_strength_is_sgd_bit_for_bit_when_compiled():
    code = (
        "import chex\n"
        "from tests.test_altsdp import RATES, train_pair\n"
        "for rate in RATES.values():\n"
        "    for momentum in (None, 0.9):\n"
        "        chex.assert_trees_all_equal(*train_pair(momentum, rate, jit=True))\n"
    )
    env = os.environ | {"XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2", "JAX_PLATFORMS": "cpu"}
    root = pathlib.Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], env=env, cwd=root, check=True)


def test_zero_strength_is_any_base_bit_for_bit():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    for base in (optax.adamw(0.01), optax.lion(0.01), optax.rmsprop(0.01)):
        results = []
        for tx in (base, sdp_jax.altsdp(base, groups, strength=0.0)):
            p, s = params, tx.init(params)
            for i in range(20):
                grads = jax.grad(toy.loss)(p, toy.batch(seed=i))
                updates, s = tx.update(grads, s, p)
                p = optax.apply_updates(p, updates)
            results.append(p)
        chex.assert_trees_all_equal(*results)


def numpy_grda(start, gradient, c, mu, rate, steps):
    """The released code's loop, in NumPy float64."""
    w, v, total = start.copy(), start.copy(), 0.0
    for n in range(1, steps + 1):
        gamma = rate(n - 1) if callable(rate) else rate
        v = v - gamma * gradient(w)
        total += c * gamma ** (mu + 0.5) * (n**mu - (n - 1) ** mu)
        w = np.sign(v) * np.maximum(0, np.abs(v) - total)
    return w


@pytest.mark.parametrize("rate", [0.05, optax.linear_schedule(0.1, 0.01, 40)])
@pytest.mark.parametrize("form", ["grda", "altsdp"])
def test_groups_of_one_entry_are_grda(rate, form, x64):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(30, 20))
    start = rng.normal(size=20)
    target = a @ (start * (rng.uniform(size=20) < 0.4))

    def gradient(w):
        return a.T @ (a @ w - target) / 30

    expected = numpy_grda(start, gradient, 0.4, 0.6, rate, 80)
    params = {"w": jnp.asarray(start)}
    if form == "grda":
        tx = sdp_jax.grda(rate, c=0.4, mu=0.6)
    else:
        groups = sdp_jax.groups_from_axes(params, {"w": [sdp_jax.Member("w", 0)]})
        tx = sdp_jax.altsdp(
            rate,
            groups,
            strength=sdp_jax.valley_strength(0.4, 0.6),
            min_channels=0,
        )
    state = tx.init(params)
    for _ in range(80):
        grads = {"w": jnp.asarray(gradient(np.asarray(params["w"])))}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    found = np.asarray(params["w"])
    # Optax evaluates schedules in float32.
    rtol = 1e-6 if callable(rate) else 1e-9
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-12)
    np.testing.assert_array_equal(found == 0, expected == 0)
    assert 3 < (expected == 0).sum() < 20


def numpy_altsdp(start, gradients, c, mu, rate, momentum, weight):
    """The two lines of the algorithm on the columns of a matrix, NumPy float64."""
    w, v, m = start.copy(), start.copy(), np.zeros_like(start)
    effective = rate / (1 - momentum)
    for n, gradient in enumerate(gradients, start=1):
        m = momentum * m + gradient
        v = v - rate * m
        g = c * effective**0.5 * (n * effective) ** mu
        norms = np.linalg.norm(v, axis=0)
        w = np.maximum(0, 1 - g * weight / norms) * v
    return w


@pytest.mark.parametrize(("weights", "weight"), [("plain", 1.0), ("size", 3**0.5)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_every_step_of_the_algorithm(weights, weight, momentum, x64):
    rng = np.random.default_rng(1)
    start = rng.normal(size=(3, 6))
    gradients = rng.normal(size=(25, 3, 6))
    params = {"w": jnp.asarray(start)}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 1)]})
    tx = sdp_jax.altsdp(
        0.02,
        groups,
        strength=sdp_jax.valley_strength(1.0, 0.7),
        momentum=momentum,
        weights=weights,
        min_channels=0,
    )
    state = tx.init(params)
    for n in range(25):
        updates, state = tx.update({"w": jnp.asarray(gradients[n])}, state, params)
        params = optax.apply_updates(params, updates)
        expected = numpy_altsdp(
            start, gradients[: n + 1], 1.0, 0.7, 0.02, momentum, weight
        )
        np.testing.assert_allclose(params["w"], expected, rtol=1e-9, atol=1e-12)


def test_prox_sgd_solves_the_group_lasso(x64):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(40, 12))
    y = rng.normal(size=40)
    strength = 0.2
    w = np.zeros(12)
    for _ in range(20000):  # an independent proximal gradient loop
        v = (w - 0.05 * a.T @ (a @ w - y) / 40).reshape(4, 3)
        norms = np.linalg.norm(v, axis=1, keepdims=True)
        w = (np.maximum(0, 1 - 0.05 * strength / norms) * v).reshape(-1)
    params = {"w": jnp.asarray(rng.normal(size=(4, 3)))}
    groups = sdp_jax.groups_from_axes(params, {"d": [sdp_jax.Member("w", 0)]})
    rate = optax.constant_schedule(0.1)
    tx = sdp_jax.prox_sgd(rate, groups, strength=strength, min_channels=0)

    def step(carry, _):
        params, state = carry
        grads = {"w": (a.T @ (a @ params["w"].reshape(-1) - y) / 40).reshape(4, 3)}
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), None, length=5000)
    np.testing.assert_allclose(params["w"].reshape(-1), w, atol=1e-8)
    assert 0 < (np.abs(w.reshape(4, 3)).max(axis=1) == 0).sum() < 4
    # First-order conditions of ½‖aw − y‖²/40 + λ Σ ‖w_g‖.
    for g, x in zip(
        (a.T @ (a @ w - y) / 40).reshape(4, 3), w.reshape(4, 3), strict=True
    ):
        if np.any(x):
            np.testing.assert_allclose(g, -strength * x / np.linalg.norm(x), atol=1e-8)
        else:
            assert np.linalg.norm(g) <= strength


def test_target_is_exact_while_training_and_stays_fixed():
    params = toy.mlp_params(widths=(4, 40, 24, 3))
    groups = toy.mlp_groups(params)
    tx = sdp_jax.altsdp(
        0.05, groups, strength=sdp_jax.target_sparsity(0.625, 5, 25), momentum=0.9
    )

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(toy.loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    sets = []
    for i in range(60):
        params, state = step(params, state, toy.batch(seed=i))
        alive = sdp_jax.channels_alive(groups, params)
        sets.append(np.asarray(alive))
    assert sets[4].all()
    assert (~sets[24]).sum() == 40
    for later in sets[24:]:
        np.testing.assert_array_equal(later, sets[24])
    sdp_jax.check_zeros(state)


def test_layer_collapse_is_stopped_by_the_floor():
    params = toy.mlp_params(widths=(4, 40, 24, 3))
    groups = toy.mlp_groups(params)
    tx = sdp_jax.altsdp(
        0.1,
        groups,
        strength=optax.linear_schedule(0, 100, 20),
        min_channels={"hidden1": 3},
    )
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(30):
        grads = jax.grad(toy.loss)(params, toy.batch(seed=i))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    alive = groups.split(sdp_jax.channels_alive(groups, params))
    left = {k: int(v.sum()) for k, v in alive.items()}
    assert left == {"hidden0": 1, "hidden1": 3}
    chex.assert_tree_all_finite(params)
