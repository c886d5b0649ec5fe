"""FLAP's fluctuation against loops, and its bias compensation against the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import sdp_jax
from sdp_jax import methods
from tests import promise, toy
from tests.seen import inputs_of
from tests.zoo_linen import Vgg, ViT

X = np.random.default_rng(0).normal(size=(9, 4))


def activations(params, fn=toy.mlp_apply, batches=(X[:5], X[5:])):
    dtype = jax.tree.leaves(params)[0].dtype
    batches = [jnp.asarray(x, dtype) for x in batches]
    groups = sdp_jax.find_groups(fn, params, batches[0])
    return groups, sdp_jax.channel_activations(groups, fn, params, batches)


def test_variance_times_squared_weights(x64):
    params = toy.mlp_params(dtype=jnp.float64)
    groups, found = activations(params)
    plain = methods.flap_score(standardize=False)(groups, params, activations=found)
    scores = groups.split(plain)
    moved = methods.flap_score()(groups, params, activations=found)
    h, want = X, []
    for name, i in zip(scores, range(2), strict=True):
        layer, after = (
            params[f"layer{i}"],
            np.asarray(params[f"layer{i + 1}"]["kernel"]),
        )
        h = np.maximum(h @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"]), 0)
        own = [
            sum(w**2 for w in after[c]) * sum((h[:, c] - h[:, c].mean()) ** 2) / len(h)
            for c in range(h.shape[1])
        ]
        np.testing.assert_allclose(scores[name], own, rtol=1e-10)
        want.append((own - np.mean(own)) / np.std(own))
    want = np.concatenate(want)
    np.testing.assert_allclose(moved, want - want.min(), rtol=1e-9, atol=1e-12)


def constant_channels(params, names, number=1):
    """Some channels put out the same, whatever comes in."""
    for name in names:
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        params[name]["kernel"] = kernel.at[..., number].set(0)
        params[name]["bias"] = bias.at[number].set(0.7)
    return params


def test_channels_that_never_change_can_be_replaced(x64):
    params = constant_channels(toy.mlp_params(dtype=jnp.float64), ["layer0", "layer1"])
    groups, found = activations(params)
    score = methods.flap_score(standardize=False)(groups, params, activations=found)
    kept = []
    for name, size in groups.sizes.items():
        assert abs(groups.split(score)[name][1]) < 1e-12
        kept.append(tuple(c for c in range(size) if c != 1))
    cut = sdp_jax.Cut(groups, tuple(kept))
    small = sdp_jax.narrow(toy.mlp_apply, cut)
    folded = methods.compensate_bias(params, found, cut.kept)
    want = toy.mlp_apply(params, jnp.asarray(X))
    got = small(cut.take(folded), jnp.asarray(X))
    np.testing.assert_allclose(got, want, rtol=1e-10)
    # Without it they are missed.
    assert abs(small(cut.take(params), jnp.asarray(X)) - want).max() > 1e-3


def gone_positions(groups, path, axes, kept):
    """Which positions along axes of a kernel belong to channels that go."""
    gone = np.zeros([groups.shapes[path][a] for a in axes], bool)
    for d, line in zip(groups, kept, strict=True):
        lost = [c for c in range(d.size) if c not in line]
        for m in d.members:
            if m.path == path and m.axis in axes:
                where = [slice(None)] * len(axes)
                where[axes.index(m.axis)] = m.positions(d.size)[:, lost].reshape(-1)
                gone[tuple(where)] = True
    return gone


@pytest.mark.parametrize(
    "module", [Vgg(), ViT(), ViT(True)], ids=["vgg", "vit", "fused"]
)
def test_biases_take_the_mean_of_what_goes(x64, module):
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 3))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.asarray(x)))
    params = promise.randomise(shapes)
    groups, found = activations(params, module.apply, [x])
    kept = [tuple(range(1, d.size)) for d in groups]
    folded = methods.compensate_bias(params, found, kept)["params"]
    taken = inputs_of(module, params, jnp.asarray(x))
    count = 0
    for reading in found.readings:
        if reading.kernel is None:
            continue
        path, axes = reading.kernel.path, list(reading.kernel.axes)
        name = path.removeprefix("params/").removesuffix("/kernel")
        old, new = params["params"], folded
        for key in name.split("/"):
            old, new = old[key], new[key]
        inner = taken[name][0]
        mean = inner.mean(tuple(range(inner.ndim - len(axes))))
        mean = mean * gone_positions(groups, path, axes, kept)
        kernel = np.asarray(old["kernel"])
        if kernel.ndim == 4:  # A convolution.
            kernel = kernel.sum((0, 1))
        delta = np.tensordot(mean, kernel, mean.ndim)
        np.testing.assert_allclose(new["bias"], old["bias"] + delta, rtol=1e-9)
        np.testing.assert_array_equal(new["kernel"], old["kernel"])
        count += 1
    assert count == len([n for n in taken if n and has_kernel(params, n)]) - 1


def has_kernel(params, name):
    """Whether a module has a kernel; the first one reads the image alone."""
    tree = params["params"]
    for key in name.split("/"):
        tree = tree.get(key, {})
    return "kernel" in tree


def test_a_running_mean_takes_what_a_bias_would(x64):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(6, (3, 3))(x))
            x = nn.Conv(5, (1, 1), use_bias=False)(x)
            return nn.Conv(4, (1, 1))(nn.BatchNorm(use_running_average=True)(x))

    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 5, 2)))
    params = promise.randomise(jax.eval_shape(lambda: Net().init(jax.random.key(0), x)))
    groups, found = activations(params, Net().apply, [x])
    sizes = [d.size for d in groups]
    kept = [tuple(range(2, n)) if n == 6 else tuple(range(n)) for n in sizes]
    cut = sdp_jax.Cut(groups, tuple(kept))
    folded = methods.compensate_bias(params, found, cut.kept)
    assert (
        folded["batch_stats"]["BatchNorm_0"]["mean"]
        != params["batch_stats"]["BatchNorm_0"]["mean"]
    ).all()
    small = sdp_jax.narrow(Net().apply, cut)
    # All behind it is linear, so that the mean of the output stays.
    want = Net().apply(params, x).mean((0, 1, 2))
    got = small(cut.take(folded), x).mean((0, 1, 2))
    np.testing.assert_allclose(got, want, rtol=1e-10)
    assert abs(small(cut.take(params), x).mean((0, 1, 2)) - want).max() > 1e-3


def test_layers_of_a_loop_have_biases_of_their_own(x64):
    rng = np.random.default_rng(1)
    params = {
        "in": (4, 6),
        "up": (3, 6, 5),
        "a": (3, 5),
        "down": (3, 5, 6),
        "b": (3, 6),
    }
    params = {k: jnp.asarray(rng.normal(size=n)) for k, n in params.items()}
    params["out"] = jnp.asarray(rng.normal(size=(6, 2)))
    # One hidden channel puts out the same for all inputs, another one in each layer.
    params["up"] = params["up"].at[..., 2].set(0)

    def fn(p, x):
        def block(x, w):
            return x + (jnp.tanh(x @ w["up"] + w["a"]) @ w["down"] + w["b"]), None

        layers = {k: p[k] for k in ("up", "a", "down", "b")}
        return jax.lax.scan(block, x @ p["in"], layers)[0] @ p["out"]

    groups, found = activations(params, fn)
    kept = [tuple(c for c in range(d.size) if c != 2 or d.size == 6) for d in groups]
    cut = sdp_jax.Cut(groups, tuple(kept))
    folded = methods.compensate_bias(params, found, cut.kept)
    constant = jnp.tanh(params["a"][:, 2])[:, None]
    want = params["b"] + constant * params["down"][:, 2]
    np.testing.assert_allclose(folded["b"], want, rtol=1e-10)
    x = jnp.asarray(X)
    got = sdp_jax.narrow(fn, cut)(cut.take(folded), x)
    np.testing.assert_allclose(got, fn(params, x), rtol=1e-10)


def test_a_bias_that_other_layers_share_gets_their_mean(x64):
    rng = np.random.default_rng(1)
    params = {"in": (4, 4), "w": (4, 5), "out": (5, 4), "b": (4,)}
    params = {k: jnp.asarray(rng.normal(size=n)) for k, n in params.items()}

    def block(p, x):
        return jnp.tanh(x @ p["w"]) @ p["out"] + p["b"]

    def fn(p, x):
        return block(p, block(p, x @ p["in"]))

    groups, found = activations(params, fn)
    assert [r.kernel.path for r in found.readings].count("out") == 2
    (number,) = [k for k, d in enumerate(groups) if d.size == 5]
    kept = [tuple(range(d.size)) for d in groups]
    kept[number] = (0, 2, 3, 4)
    folded = methods.compensate_bias(params, found, kept)
    x = jnp.asarray(X) @ params["in"]
    both = [jnp.tanh(v @ params["w"])[:, 1].mean() for v in (x, block(params, x))]
    want = params["b"] + sum(both) / 2 * params["out"][1]
    np.testing.assert_allclose(folded["b"], want, rtol=1e-10)


@pytest.mark.parametrize(
    "after",
    [
        lambda y, b: (y + b) * jnp.sum(y),
        lambda y, b: jnp.tanh(y) + b,
        lambda y, b: b - y,
        lambda y, b: y + b[:1],
        lambda y, b: y * b,
        lambda y, b: y + jnp.sum(b, keepdims=True),
    ],
    ids="twice later negative first product sum".split(),
)
def test_what_is_no_bias_of_the_product_stays(after):
    rng = np.random.default_rng(0)
    params = {"a": (4, 5), "w": (5, 3), "b": (3,)}
    params = {k: jnp.asarray(rng.normal(size=n)) for k, n in params.items()}
    groups = sdp_jax.groups_from_axes(
        params,
        {"a": [sdp_jax.Member("a", 1), sdp_jax.Member("w", 0, "consumer")]},
    )
    fn = lambda p, x: after(jnp.tanh(x @ p["a"]) @ p["w"], p["b"])  # noqa: E731
    found = sdp_jax.channel_activations(groups, fn, params, [jnp.asarray(X)])
    folded = methods.compensate_bias(params, found, [(0,)])
    np.testing.assert_array_equal(folded["b"], params["b"])


def test_a_number_that_all_outputs_share_stays():
    rng = np.random.default_rng(0)
    params = {"a": (4, 5), "w": (5, 3), "b": (1,)}
    params = {k: jnp.asarray(rng.normal(size=n)) for k, n in params.items()}
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["w"] + p["b"]  # noqa: E731
    _, found = activations(params, fn)
    folded = methods.compensate_bias(params, found, [(0,)])
    np.testing.assert_array_equal(folded["b"], params["b"])


def test_half_precision_stays():
    params = toy.mlp_params(dtype=jnp.bfloat16)
    groups, found = activations(params, batches=(X.astype(jnp.bfloat16),))
    kept = [(0,)] * len(groups)
    folded = methods.compensate_bias(params, found, kept)
    assert {x.dtype for x in jax.tree.leaves(folded)} == {jnp.dtype(jnp.bfloat16)}


def test_bad_input():
    params = toy.mlp_params()
    _, found = activations(params)
    with pytest.raises(ValueError, match="kept has 1 entries, .* have 2 dim"):
        methods.compensate_bias(params, found, [(0,)])
    with pytest.raises(ValueError, match="'.*0' has 6 channels, .* has .7,. for it"):
        methods.compensate_bias(params, found, [(7,), (0,)])
    other = toy.mlp_params(widths=(4, 7, 5, 3))
    with pytest.raises(
        ValueError, match="the parameters have no leaf .* before any cut"
    ):
        methods.compensate_bias(other, found, [(0,), (0,)])
