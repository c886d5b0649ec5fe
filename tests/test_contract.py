"""The contract that every transformation keeps, whatever its equations."""

import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import sdp_jax
from sdp_jax import methods
from sdp_jax.transforms import DualAveragingState
from sdp_jax.tree import leaf_table
from tests import toy

VALLEY = sdp_jax.valley_strength(c=6.0, mu=0.6, learning_rate=0.1)
TARGET = sdp_jax.target_sparsity(0.5, 1, 4)
AT_ONCE = sdp_jax.target_sparsity(0.5, 1, 2)
KEY = jax.random.key(7)
STEPS = 6

# Behind a base, which is SGD here.
HOSTS = {
    "remove_l1": lambda g: methods.remove_lowest(g, AT_ONCE, methods.l1_norm()),
    "remove_taylor": lambda g: methods.remove_lowest(g, TARGET, methods.taylor()),
    "remove_accumulated": lambda g: methods.remove_lowest(
        g, TARGET, methods.taylor(), every=2, accumulate=True, min_channels=2
    ),
    "remove_from_outside": lambda g: methods.remove_lowest(g, TARGET),
    "hspg": lambda g: methods.hspg(
        g,
        learning_rate=optax.linear_schedule(0.1, 0.05, 5),
        penalty=2.0,
        epsilon=0.8,
        begin_step=2,
    ),
    "dhspg": lambda g: methods.dhspg(
        g, AT_ONCE, learning_rate=0.1, penalty=9.0, begin_step=1, warm_up_steps=3
    ),
    "hesso": lambda g: methods.hesso(g, AT_ONCE, begin_step=1, end_step=5, periods=2),
    "gate_decorator": lambda g: methods.gate_decorator(
        g, TARGET, tick_steps=2, tock_steps=1, ticks=2
    ),
    "until_compressed": lambda g: sdp_jax.group_soft_threshold(
        g, methods.until_compressed(VALLEY)
    ),
    "own": lambda g: methods.channel_host(
        g, lambda g: (), lambda step: (jnp.arange(g.num_channels) % 2, ())
    ),
}
# Hosts that score by the gradients.
BY_GRADIENTS = ("remove_taylor", "remove_accumulated", "hesso", "gate_decorator")
FINAL = {
    "group_soft_threshold": lambda g: optax.chain(
        optax.sgd(0.1), sdp_jax.group_soft_threshold(g, VALLEY)
    ),
    "soft_threshold": lambda g: optax.chain(
        optax.sgd(0.1), sdp_jax.soft_threshold(VALLEY)
    ),
    "altsdp": lambda g: sdp_jax.altsdp(0.1, g, strength=VALLEY),
    "altsdp_momentum_cost": lambda g: sdp_jax.altsdp(
        0.1,
        g,
        strength=sdp_jax.valley_strength(c=0.7, mu=0.6),
        momentum=0.9,
        nesterov=True,
        weights="cost",
        min_channels=2,
    ),
    "altsdp_target": lambda g: sdp_jax.altsdp(0.1, g, strength=TARGET),
    "altsdp_adamw": lambda g: sdp_jax.altsdp(
        optax.adamw(0.1, eps=1e-4), g, strength=TARGET
    ),
    "altsdp_lion": lambda g: sdp_jax.altsdp(optax.lion(0.01), g, strength=VALLEY),
    "projected": lambda g: optax.chain(
        optax.sgd(0.1),
        sdp_jax.dual_averaging(),
        sdp_jax.valley.project_onto_valley(g, VALLEY, rank=2, decay=0.9),
        sdp_jax.group_soft_threshold(g, VALLEY),
    ),
    "prox_sgd": lambda g: sdp_jax.prox_sgd(0.1, g, strength=2.0),
    "grda": lambda g: sdp_jax.grda(0.1, c=1.0, mu=0.6),
    "keep_mask": lambda g: optax.chain(
        optax.sgd(0.1),
        methods.keep_mask(
            jax.tree.map(
                lambda p: np.arange(p.size).reshape(p.shape) % 3 > 0, params_of()
            )
        ),
    ),
    "decay_pruning": lambda g: methods.decay_pruning(
        0.1, HOSTS["remove_l1"](g), g, steps=3, rate=9.0
    ),
    "spp": lambda g: methods.spp(0.1, g, 0.5, KEY, every=1, amplitude=0.5),
    "increg": lambda g: methods.increg(0.1, g, 0.5, every=1, amplitude=1.0, limit=3.0),
    "group_norm_regularizer": lambda g: optax.chain(
        methods.group_norm_regularizer(g, 0.01, alpha=4.0, growing=0.1, every=2),
        optax.sgd(0.1),
    ),
    "perspective_regularizer": lambda g: optax.chain(
        methods.perspective_regularizer(g, 0.1, alpha=0.5, bound=2.0), optax.sgd(0.1)
    ),
    "scale_penalty": lambda g: optax.chain(
        methods.scale_penalty(g, optax.linear_schedule(0.1, 0.2, 3)), optax.sgd(0.1)
    ),
} | {
    name: lambda g, make=make: methods.hosted(0.1, make(g))
    for name, make in HOSTS.items()
}
# Those that set whole channels to zero, and within so many updates.
PRUNING = [
    name
    for name in FINAL
    if name not in ("soft_threshold", "grda", "keep_mask", "remove_from_outside")
    and not name.endswith(("_regularizer", "_penalty"))
]
final = pytest.mark.parametrize("name", FINAL)
# One for each way to touch arrays; on a mesh the others are a study.
SHARDED = "altsdp_target altsdp projected keep_mask decay_pruning spp increg \
group_norm_regularizer perspective_regularizer scale_penalty dhspg hesso \
gate_decorator".split()
STUDY = pytest.mark.study


def params_of(seed=0, dtype=jnp.float32):
    params = toy.mlp_params(seed, dtype, widths=(4, 16, 8, 3))
    params["layer0"]["scale"] = 1 + params["layer0"]["bias"]
    return params


def grads_of(step, seed=0, dtype=jnp.float32):
    return toy.mlp_grads(params_of(dtype=dtype), seed=10 * seed + step)


@functools.cache
def groups():
    axes = toy.mlp_axes()
    axes["hidden0"].append(sdp_jax.Member("layer0/scale", 0))
    return sdp_jax.groups_from_axes(params_of(), axes)


@functools.cache
def made(name):
    """One for all tests, so that they share what is compiled."""
    return FINAL[name](groups())


@functools.cache
def compiled_step(name):
    """A step that donates its buffers, inside a chain and with an argument more."""
    tx, traces = optax.chain(made(name)), []

    def step(params, state, grads):
        traces.append(grads)
        updates, state = tx.update(grads, (state,), params, value=1.0)
        chex.assert_trees_all_equal_dtypes(updates, params)
        return optax.apply_updates(params, updates), state[0]

    return jax.jit(step, donate_argnums=(0, 1)), traces


def on_host(x):
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    # A copy: a view would keep the buffer from being donated.
    return np.array(jax.random.key_data(x) if is_key else x)


@functools.cache
def trained(name, seed=0, dtype=jnp.float32):
    """Parameters and state after each step."""
    step, traces = compiled_step(name)
    before = len(traces)
    tx, params = made(name), params_of(seed, dtype)
    state = tx.init(params)
    specs = [jax.typeof(x) for x in jax.tree.leaves(state)]
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(tx.init, params), state
    )
    path = []
    for n in range(STEPS):
        params, state = step(params, state, grads_of(n, seed, dtype))
        assert [jax.typeof(x) for x in jax.tree.leaves(state)] == specs
        path.append(jax.tree.map(on_host, (params, state)))
    assert len(traces) - before <= (seed == 0)
    return path


def close(found, expected, rtol, atol):
    found, expected = jax.tree.map(on_host, (found, expected))
    chex.assert_trees_all_close(found, expected, rtol=rtol, atol=atol)


@final
def test_jit_chain_and_donation_change_nothing(name):
    tx, params, path = made(name), params_of(), trained(name)
    tx.init({})
    state = tx.init(params)
    with jax.disable_jit():
        for n in range(3):
            updates, state = tx.update(grads_of(n), state, params)
            params = optax.apply_updates(params, updates)
    close(path[2], (params, state), rtol=2e-5, atol=1e-6)


@final
def test_no_dtype_is_promoted(name, x64):
    tx = made(name)
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64):
        # Dtypes are known without computing anything.
        params, grads = params_of(dtype=dtype), grads_of(0, dtype=dtype)
        updates, state = jax.eval_shape(
            lambda p, g: tx.update(g, tx.init(p), p), params, grads
        )
        chex.assert_trees_all_equal_dtypes(updates, params)
        wide = jnp.promote_types(dtype, jnp.float32)
        is_dual = lambda x: isinstance(x, DualAveragingState)  # noqa: E731
        for node in filter(is_dual, jax.tree.leaves(state, is_leaf=is_dual)):
            assert {x.dtype for x in jax.tree.leaves(node.dual)} == {wide}


@pytest.mark.parametrize("name", PRUNING)
def test_zero_channels_are_exactly_zero(name):
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        params, state = trained(name, dtype=dtype)[-1]
        alive = np.asarray(sdp_jax.channels_alive(groups(), params))
        assert 0 < alive.sum() < alive.size
        for path, told in leaf_table(state).items():
            if path.endswith(("gone/per_channel", "alive/per_channel")):
                np.testing.assert_array_equal(told, alive == ("alive" in path))
        parts = groups().split(alive)
        for i in range(2):
            for leaf in params[f"layer{i}"].values():
                dead = np.asarray(leaf, np.float32)[..., ~parts[f"hidden{i}"]]
                assert (dead == 0).all() and not np.signbit(dead).any()


@pytest.mark.parametrize(
    "name", ["altsdp_target", "projected", "spp", "gate_decorator"]
)
def test_an_ensemble_on_eight_devices(name):
    assert len(jax.devices()) == 8
    mesh = jax.make_mesh((8,), ("model",), (jax.sharding.AxisType.Auto,))

    def place(x):
        """One axis over the devices, if they divide any."""
        fit = [axis for axis, n in enumerate(x.shape) if n % 8 == 0][-1:]
        axes = ["model" if axis in fit else None for axis in range(x.ndim)]
        spec = jax.sharding.PartitionSpec(*axes)
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    def both(make):
        return jax.tree.map(lambda *x: place(jnp.stack(x)), make(0), make(1))

    tx, params = made(name), both(params_of)
    state = both(lambda seed: tx.init(params_of(seed)))
    step = jax.jit(jax.vmap(toy.make_step(tx)))
    for n in range(4):
        params, state = step(params, state, both(lambda seed, n=n: grads_of(n, seed)))
    assert len(params["layer0"]["kernel"].sharding.device_set) == 8
    for seed in range(2):
        alone, _ = trained(name, seed)[3]
        one = jax.tree.map(lambda x, seed=seed: x[seed], params)
        chex.assert_trees_all_close(one, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", [n if n in SHARDED else pytest.param(n, marks=STUDY) for n in FINAL]
)
def test_explicit_axes_in_two_dimensions(name):
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    specs = {"kernel": P("data", "model"), "bias": P("model"), "scale": P("data")}
    specs = {f"layer{i}": specs for i in range(2)} | {"layer2": {"kernel": P("model")}}

    def place(tree):
        return {
            module: {
                key: jax.device_put(
                    leaf, NamedSharding(mesh, specs[module].get(key, P()))
                )
                for key, leaf in leaves.items()
            }
            for module, leaves in tree.items()
        }

    tx, params = made(name), place(params_of())
    state, step = jax.jit(tx.init)(params), jax.jit(toy.make_step(tx))
    for n in range(4):
        params, state = step(params, state, place(grads_of(n)))
    for path, leaf in leaf_table(params).items():
        module, key = path.split("/")
        want = NamedSharding(mesh, specs[module].get(key, P()))
        assert leaf.sharding.is_equivalent_to(want, leaf.ndim)
    alone, _ = trained(name)[3]
    close(params, alone, rtol=1e-4, atol=1e-5)
    for leaf, other in zip(
        jax.tree.leaves(params), jax.tree.leaves(alone), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(leaf) == 0, other == 0)


@final
def test_params_are_required(name):
    tx, params = made(name), params_of()
    with pytest.raises(ValueError, match=r"needs the current parameters|params"):
        tx.update(grads_of(0), tx.init(params))


@pytest.mark.parametrize("name", HOSTS)
def test_gradients_are_required_where_they_are_used(name):
    tx, params = optax.chain(optax.sgd(0.1), HOSTS[name](groups())), params_of()
    update = functools.partial(jax.eval_shape, tx.update, grads_of(0), tx.init(params))
    if name not in BY_GRADIENTS:
        update(params)
        return
    with pytest.raises(ValueError, match=r"needs gradients.*methods\.hosted"):
        update(params)


@final
def test_map_params_finds_the_parameter_shaped_state(name):
    tx, params = made(name), params_of()
    state = tx.init(params)
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    # Every leaf that is shaped like its parameter is found, and no other.
    shapes = {path: leaf.shape for path, leaf in leaf_table(params).items()}
    old, new = leaf_table(state), leaf_table(doubled)
    for path, leaf in old.items():
        owner = "/".join(path.split("/")[-2:])
        mapped = shapes.get(owner) == leaf.shape
        close(new[path], 2 * leaf if mapped else leaf, rtol=0, atol=0)


def test_every_transformation_is_in_the_table():
    text = pathlib.Path(__file__).read_text()
    for module in (sdp_jax, methods, sdp_jax.valley):
        for name in module.__all__:
            annotations = getattr(getattr(module, name), "__annotations__", {})
            if "GradientTransformation" in str(annotations.get("return")):
                assert f".{name}(" in text, name
