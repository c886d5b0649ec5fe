"""Which producers are scale-invariant, against functions that are called with them.

The oracle is the definition: one channel of one member is multiplied by 0.5 and 2, in
float64, and the results are compared.
"""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import sdp_jax
from sdp_jax.tree import leaf_table
from tests import zoo

IMAGE = (4, 6, 6, 3)
TOKENS = (2, 5, 6)


def conv(x, w, groups=1):
    how = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=how, feature_group_count=groups
    )


def normal(x, axes=(0, 1, 2), eps=1e-12):
    return (x - x.mean(axes, keepdims=True)) * lax.rsqrt(
        x.var(axes, keepdims=True) + eps
    )


def fast_normal(x, axes=(0, 1, 2)):
    """The variance as the mean of squares less the square of the mean."""
    mean = x.mean(axes, keepdims=True)
    var = jnp.maximum(0.0, lax.square(x).mean(axes, keepdims=True) - lax.square(mean))
    return (x - mean) / jnp.sqrt(var + 1e-12)


def rms(x, axis=-1):
    return x * lax.rsqrt(jnp.square(x).mean(axis, keepdims=True) + 1e-12)


def head(p, x):
    return x.mean((1, 2)) @ p["out"]


def batch_norm(how, bias, p, x):
    x = conv(x, p["w"])
    x = x + p["b"] if bias else x
    return head(p, nn.relu(how(x) * p["scale"] + p["shift"]))


def group_norm(size, p, x):
    x = conv(x, p["w"]) + p["b"]
    shape = x.shape
    x = x.reshape(*shape[:3], shape[3] // size, size)
    x = normal(x, (1, 2, 4)).reshape(shape)
    return head(p, nn.relu(x * p["scale"] + p["shift"]))


def residual(p, x):
    """Each convolution has a normalisation of its own, then they are summed."""
    x = nn.relu(normal(conv(x, p["w"])))
    for k in "ab":
        x = x + normal(conv(nn.relu(normal(conv(x, p["in" + k]))), p["out" + k]))
    return head(p, nn.relu(x))


def preactivation(p, x):
    """The sum is normalised, not what is summed."""
    x = conv(x, p["w"])
    for k in "ab":
        x = x + conv(
            nn.relu(normal(conv(nn.relu(normal(x)), p["in" + k]))), p["out" + k]
        )
    return head(p, nn.relu(normal(x)))


def mobile(p, x):
    x = nn.relu(normal(conv(x, p["w"])))
    x = nn.relu(normal(conv(x, p["deep"], groups=8)))
    return head(p, x)


def mobile_once(p, x):
    """Between the two convolutions nothing is normalised."""
    return head(p, nn.relu(normal(conv(conv(x, p["w"]), p["deep"], groups=8))))


def attend(how, p, x):
    x = rms(x @ p["in"]) * p["scale"]
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[n]) for n in ("q", "k", "v"))
    if how == "bias":
        q = q + p["qb"]
    if how != "plain":
        q, k = rms(q), rms(k)
    w = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    y = jnp.einsum("bhqk,bkhd->bqhd", w, v)
    x = x + jnp.einsum("bqhd,hdk->bqk", y, p["o"])
    x = x + jax.nn.gelu(rms(x) @ p["up"]) @ p["down"]
    return rms(x) @ p["out"]


def layer_norm(p, x):
    x = normal(x @ p["a"] + p["b"], -1) * p["scale"] + p["shift"]
    return nn.relu(normal(nn.relu(x) @ p["c"], -1)) @ p["out"]


def weight_norm(p, x):
    v = p["v"] * lax.rsqrt(jnp.sum(jnp.square(p["v"]), 0) + 1e-12)
    return nn.relu(x @ (p.get("g", 1.0) * v) + p["b"]) @ p["out"]


def standardised(p, x):
    w = p["w"] - p["w"].mean((0, 1, 2))
    w = w * lax.rsqrt(jnp.maximum(w.var((0, 1, 2)) * 27, 1e-9)) * p.get("g", 1.0)
    return head(p, nn.relu(conv(x, w) + p["b"]))


def plain(p, x):
    return nn.relu(nn.relu(x @ p["a"] + p["b"]) @ p["c"]) @ p["out"]


def other_functions(p, x):
    """Functions that only look like normalisations."""
    a, b, c, d = (conv(x, p[k]) for k in "abcd")
    a = nn.relu(a + p["ba"]) / jnp.sqrt(jnp.square(a).mean((0, 1, 2)) + 1e-12)
    b = b / (jnp.square(b).mean((0, 1, 2)) + 1e-12)
    c = (c - c.mean((0, 1, 2))) / jnp.sqrt(c.var((0, 1, 2)) + 0.5)
    # The squares of one half, the mean of the other.
    d = d + p["bd"]
    square, mean = jnp.square(d[2:]).mean((0, 1, 2)), d[:2].mean((0, 1, 2))
    d = (d - d.mean((0, 1, 2))) * (square - jnp.square(mean))
    return sum(
        nn.relu(x).reshape(-1, 8) @ p["out" + k]
        for k, x in zip("abcd", (x.mean(0) for x in (a, b, c, d)), strict=True)
    )


def signs(p, x):
    return jnp.sign(x @ p["a"]) @ p["out"] + jnp.argmax(x @ p["b"], 0) @ p["outb"]


def pooled(p, x):
    x = conv(x, p["w"]) + p["b"]
    return head(p, normal(nn.max_pool(nn.leaky_relu(x - p["b"]), (2, 2), (2, 2))))


def joined(p, x):
    """Normalised after they have been put side by side."""
    x = jnp.concatenate([conv(x, p["a"]) + p["ba"], conv(x, p["b"]) + p["bb"]], -1)
    return head(p, nn.relu(fast_normal(x)))


def looped(p, x):
    def block(x, w):
        y = nn.relu(normal(x @ w["w"] + w["b"], (0, 1)) * w["scale"])
        return x + y @ w["o"], None

    x, _ = lax.scan(jax.checkpoint(block), x @ p["in"], p["blocks"])
    return x @ p["out"]


def shared(how, p, x):
    """One use is normalised, the other one is not."""
    y = conv(x, p["w"])
    z = normal(y) * p["scale"] + p["shift"]
    return head(p, nn.relu(z)) + head({"out": p["outb"]}, how(y))


def forgotten(p, x):
    """A loop changes what it carries."""
    y = conv(x, p["w"])
    z, _ = lax.scan(lambda z, _: (normal(z), None), y, length=2)
    return head(p, nn.relu(z) * lax.rsqrt(jnp.square(y).mean((0, 1, 2)) + 1e-12))


def branched(p, x):
    y = conv(x, p["w"])
    y = lax.cond(x.sum() > 0, normal, fast_normal, y)
    z = conv(x, p["v"])
    z = lax.cond(x.sum() > 0, normal, nn.relu, z)
    return head(p, y) + head({"out": p["outb"]}, z)


@dataclasses.dataclass(frozen=True)
class Case:
    """A function, the shapes of its parameters, and what is invariant."""

    fn: Callable[..., Any]
    shapes: dict[str, Any]
    input: tuple[int, ...]
    invariant: str


NORM = {"w": (3, 3, 3, 8), "b": (8,), "scale": (8,), "shift": (8,), "out": (8, 4)}
UNBIASED = {k: v for k, v in NORM.items() if k != "b"}
STREAM = {"w": (3, 3, 3, 8), "out": (8, 4)} | {
    k + j: (3, 3, *io) for j in "ab" for k, io in {"in": (8, 6), "out": (6, 8)}.items()
}
HEADS = {k: (8, 3, 4) for k in "qkv"} | {"o": (3, 4, 8)}
FORMER = HEADS | {"in": (6, 8), "scale": (8,), "up": (8, 12), "down": (12, 8)}
FORMER |= {"out": (8, 3)}
DIRECTION = {"v": (6, 8), "b": (8,), "out": (8, 3)}
FILTER = {"w": (3, 3, 3, 8), "b": (8,), "out": (8, 4)}
DEPTHWISE = {"w": (3, 3, 3, 8), "deep": (3, 3, 1, 8), "out": (8, 4)}
MLP = {"a": (6, 8), "b": (8,), "c": (8, 7), "out": (7, 3)}


def of(fn, *given):
    return lambda p, x: fn(*given, p, x)


CASES = {
    "batch norm": Case(of(batch_norm, normal, False), UNBIASED, IMAGE, "w"),
    "batch norm behind a bias": Case(of(batch_norm, normal, True), NORM, IMAGE, "w b"),
    "fast variance": Case(of(batch_norm, fast_normal, True), NORM, IMAGE, "w b"),
    "no mean, a bias": Case(
        of(batch_norm, lambda x: rms(x, (0, 1, 2)), True), NORM, IMAGE, ""
    ),
    "no mean": Case(
        of(batch_norm, lambda x: rms(x, (0, 1, 2)), False), UNBIASED, IMAGE, "w"
    ),
    "instance norm": Case(
        of(batch_norm, lambda x: normal(x, (1, 2)), True), NORM, IMAGE, "w b"
    ),
    "groups of one": Case(of(group_norm, 1), NORM, IMAGE, "w b"),
    "groups of four": Case(of(group_norm, 4), NORM, IMAGE, ""),
    "residual": Case(residual, STREAM, IMAGE, "w ina inb outa outb"),
    "pre-activation": Case(preactivation, STREAM, IMAGE, "ina inb"),
    "depthwise": Case(
        mobile,
        DEPTHWISE,
        IMAGE,
        "w deep",
    ),
    "depthwise, one norm": Case(
        mobile_once,
        DEPTHWISE,
        IMAGE,
        "w deep",
    ),
    "layer norm": Case(layer_norm, MLP | {"scale": (8,), "shift": (8,)}, (5, 6), ""),
    "attention": Case(of(attend, "plain"), FORMER, TOKENS, ""),
    "query and key norm": Case(of(attend, "norm"), FORMER, TOKENS, "q k"),
    "query norm with a bias": Case(
        of(attend, "bias"), FORMER | {"qb": (3, 4)}, TOKENS, "k"
    ),
    # With a gain the direction does not have to be zero, and is no producer.
    "weight norm": Case(weight_norm, DIRECTION | {"g": (8,)}, (5, 6), ""),
    "direction": Case(weight_norm, DIRECTION, (5, 6), "v"),
    "standardised": Case(standardised, FILTER | {"g": (8,)}, IMAGE, ""),
    "standardised, no gain": Case(standardised, FILTER, IMAGE, "w"),
    "plain": Case(plain, MLP, (5, 6), ""),
    "look like it": Case(
        other_functions,
        {k: (3, 3, 3, 8) for k in "abcd"}
        | {"ba": (8,), "bd": (8,)}
        | {"out" + k: (8, 4) for k in "abcd"},
        IMAGE,
        "",
    ),
    "signs": Case(
        signs, {"a": (6, 8), "b": (6, 8), "out": (8, 3), "outb": (8, 3)}, (5, 6), "a b"
    ),
    "pooled": Case(pooled, FILTER, IMAGE, "w b"),
    "joined": Case(
        joined,
        {"a": (3, 3, 3, 5), "b": (3, 3, 3, 4), "ba": (5,), "bb": (4,), "out": (9, 4)},
        IMAGE,
        "a b ba bb",
    ),
    "looped": Case(
        looped,
        {
            "in": (6, 8),
            "out": (8, 3),
            "blocks": {"w": (3, 8, 7), "b": (3, 7), "scale": (3, 7), "o": (3, 7, 8)},
        },
        TOKENS,
        "blocks/w blocks/b",
    ),
    "shared": Case(of(shared, nn.relu), UNBIASED | {"outb": (8, 4)}, IMAGE, ""),
    "shared, no rule": Case(
        of(shared, jnp.tanh), UNBIASED | {"outb": (8, 4)}, IMAGE, ""
    ),
    "forgotten": Case(forgotten, {"w": (3, 3, 3, 8), "out": (8, 4)}, IMAGE, ""),
    "branched": Case(
        branched,
        {k: (3, 3, 3, 8) for k in "wv"} | {"out": (8, 4), "outb": (8, 4)},
        IMAGE,
        "w",
    ),
}


def draw(shapes, seed=0):
    rng = np.random.default_rng(seed)

    def one(x):
        shape = x if isinstance(x, tuple) else x.shape
        return jnp.asarray(rng.normal(size=shape))

    return jax.tree.map(one, shapes, is_leaf=lambda x: isinstance(x, tuple))


def changes(fn, groups, params, *inputs):
    """By producer how far scaling one of its channels changes the function."""
    call = jax.jit(lambda p: fn(p, *inputs))
    before = call(params)
    table, found = leaf_table(params), {}
    for d in groups:
        for m in d.producers:
            for factor, channel in ((0.5, 0), (2.0, d.size - 1)):
                line = np.ones(groups.shapes[m.path][m.axis])
                line[m.positions(d.size)[:, channel]] = factor
                shape = [-1 if k == m.axis else 1 for k in range(table[m.path].ndim)]
                leaves = table | {m.path: table[m.path] * line.reshape(shape)}
                new = jax.tree.unflatten(jax.tree.structure(params), leaves.values())
                gap = float(jnp.abs(call(new) - before).max())
                found[d, m] = max(found.get((d, m), 0.0), gap)
    return found


@pytest.mark.parametrize("name", CASES)
def test_invariant_members_are_those_that_do_not_change_the_function(name, x64):
    case = CASES[name]
    params, x = draw(case.shapes), draw(case.input, 1)
    groups = sdp_jax.find_groups(case.fn, params, x)
    found = {m.path for _, m, _ in groups.producers if m.scale_invariant}
    assert found == set(case.invariant.split())
    for (d, m), gap in changes(case.fn, groups, params, x).items():
        assert (gap < 1e-6) == m.scale_invariant, (d.name, m.path, gap)


@pytest.mark.parametrize(
    "name", ["resnet18", "wideresnet", "bit", "mobilenet", "densenet", "haiku"]
)
def test_models_of_the_zoo_in_training(name, x64):
    model = zoo.ZOO[name]()
    params = draw(model.shapes)
    inputs = [jnp.asarray(x, jnp.float64) for x in model.inputs]
    groups = sdp_jax.find_groups(model.train or model.fn, model.shapes, *model.inputs)
    fn = model.fn if model.train is None else lambda *args: model.train(*args)[0]
    # Large filters, so that the small constants in the roots do not matter.
    marked = {m.path for _, m, _ in groups.producers if m.scale_invariant}
    leaves = [x * (100 if p in marked else 1) for p, x in leaf_table(params).items()]
    params = jax.tree.unflatten(jax.tree.structure(params), leaves)
    assert marked or name == "haiku"
    for (d, m), gap in changes(fn, groups, params, *inputs).items():
        assert gap < 1e-3 or not m.scale_invariant, (d.name, m.path, gap)


def running(how, p, x):
    y = conv(x, p["w"]) + p["b"]
    z = y - p["mean"]
    if how == "divided":  # What comes behind the mean is not in the statistics.
        z = z * p["scale"] / jnp.sqrt(p["var"] + 1e-5)
    elif how == "product":  # These are not the statistics of a product.
        z = z * y * (p["scale"] * lax.rsqrt(p["var"] + 1e-5))
    else:
        z = z * (p["scale"] * lax.rsqrt(p["var"] + 1e-5))
    return head(p, nn.relu(z))


@pytest.mark.parametrize("how", ["multiplied", "divided", "product"])
def test_running_statistics_follow_the_filter(how):
    shapes = NORM | {"mean": (8,), "var": (8,)}
    del shapes["shift"]
    params = draw(shapes) | {k: jnp.arange(1.0, 9.0) for k in ("var", "scale")}
    x, fn = draw(IMAGE, 1), of(running, how)
    groups = sdp_jax.find_groups(fn, params, x)
    found = {m.path for _, m, _ in groups.producers if m.scale_invariant}
    assert found == (set() if how == "product" else {"w", "b"})
    # As in training: what the statistics would have become.
    factor = jnp.ones(8).at[3].set(2)
    mean = (params["mean"] - params["b"]) * factor + params["b"]
    after = {"w": params["w"] * factor, "mean": mean, "var": params["var"] * factor**2}
    gap = jnp.abs(fn(params | after, x) - fn(params, x)).max()
    assert (gap < 1e-3) == ("w" in found)


def test_linen_with_running_statistics_and_in_training():
    model = zoo.ZOO["vgg"]()
    want = {f"params/Conv_{k}/{leaf}" for k in (0, 1) for leaf in ("kernel", "bias")}
    for fn in (model.fn, model.train):
        groups = sdp_jax.find_groups(fn, model.shapes, *model.inputs)
        assert {m.path for _, m, _ in groups.producers if m.scale_invariant} == want


def test_nnx():
    model = zoo.ZOO["nnx_vgg"]()
    for fn in (model.fn, model.train):
        groups = sdp_jax.find_groups(fn, model.shapes, *model.inputs)
        found = {m.path for _, m, _ in groups.producers if m.scale_invariant}
        assert found == {"conv/kernel", "conv/bias"}


@pytest.mark.parametrize(
    ("groups_of", "bias", "invariant"),
    [(1, True, {"kernel", "bias"}), (4, True, set()), (4, False, {"kernel"})],
)
def test_nnx_group_norm(groups_of, bias, invariant, x64):
    """Of four filters that are normalised together all are one channel."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 8, (3, 3), use_bias=bias, rngs=rngs)
            self.norm = nnx.GroupNorm(
                8, num_groups=8 // groups_of, epsilon=1e-12, rngs=rngs
            )
            self.out = nnx.Linear(8, 4, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))

    graph, shapes = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))
    params, x = draw(shapes), draw(IMAGE, 1)

    def fn(p, x):
        return nnx.merge(graph, p)(x)

    groups = sdp_jax.find_groups(fn, params, x)
    found = {m.path for _, m, _ in groups.producers if m.scale_invariant}
    assert found == {f"conv/{name}" for name in invariant}
    for (_, m), gap in changes(fn, groups, params, x).items():
        assert (gap < 1e-6) == m.scale_invariant, (m.path, gap)


class EqxNet(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    out: eqx.nn.Linear

    def __init__(self, key):
        self.conv = eqx.nn.Conv2d(3, 8, 3, key=key)
        self.norm = eqx.nn.BatchNorm(8, "batch", mode="batch")
        self.out = eqx.nn.Linear(8, 4, key=key)

    def __call__(self, x, state):
        x, state = self.norm(self.conv(x), state)
        return self.out(jax.nn.relu(x).mean((1, 2))), state


@pytest.mark.parametrize("train", [True, False])
def test_equinox(train):
    model, state = eqx.nn.make_with_state(EqxNet)(jax.random.key(0))
    model = model if train else eqx.nn.inference_mode(model)
    arrays, rest = eqx.partition(model, eqx.is_array)

    def fn(p, x):
        model = eqx.combine(p["model"], rest)
        call = jax.vmap(model, (0, None), (0, None), axis_name="batch")
        return call(x, p["state"])

    params = {"model": arrays, "state": state}
    x = jnp.ones((4, 3, 6, 6))
    groups = sdp_jax.find_groups(fn, params, x, state=("state/*",))
    found = {m.path for _, m, _ in groups.producers if m.scale_invariant}
    assert found == {"model/conv/weight", "model/conv/bias"}


def test_dynamic_widths_and_shapes_alone():
    shapes = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in NORM.items()}
    x = jax.ShapeDtypeStruct(IMAGE, jnp.float32)
    groups = sdp_jax.find_groups(CASES["fast variance"].fn, shapes, x)
    assert [m.path for m in groups.dimensions[0].shrinking] == ["scale", "shift"]


def test_where_all_are_invariant_all_are_counted():
    def fn(p, x):
        return normal(x @ p["w"], 0)

    params = {"w": jnp.ones((3, 8))}
    groups = sdp_jax.find_groups(fn, params, jnp.ones((5, 3)), prune_outputs=True)
    assert [m.scale_invariant for _, m, _ in groups.producers] == [True]
    assert groups.shrinking == groups.producers


STEPS = {
    "normal": lambda x, y, w: normal(x, (0, 1)),
    "fast": lambda x, y, w: fast_normal(x, (0, 1)),
    "root": lambda x, y, w: rms(x, (0, 1)),
    "of the other": lambda x, y, w: (x - x.mean((0, 1))) / jnp.sqrt(y.var((0, 1))),
    "mean of the other": lambda x, y, w: normal(x, (0, 1)) - y.mean((0, 1)),
    "heads": lambda x, y, w: rms(x.reshape(3, 4, 4, 3)).reshape(3, 4, 12),
    "layer": lambda x, y, w: rms(x),
    "relu": lambda x, y, w: nn.relu(x),
    "add": lambda x, y, w: x + y,
    "multiply": lambda x, y, w: x * y,
    "larger": lambda x, y, w: jnp.maximum(x, y),
    "share": lambda x, y, w: x / (jnp.abs(y).mean((0, 1)) + 1e-12),
    "half": lambda x, y, w: jnp.concatenate([x[..., :6], y[..., 6:]], -1),
    "scale": lambda x, y, w: x * w[0],
    "shift": lambda x, y, w: x + w[0],
    "project": lambda x, y, w: x @ w,
    "unit": lambda x, y, w: x @ (w * lax.rsqrt((w**2).sum(0) + 1e-12)),
}


@pytest.mark.parametrize("seed", range(12))
def test_random_programs_mark_nothing_else(seed, x64):
    rng = random.Random(seed)
    names = [rng.choice(list(STEPS)) for _ in range(6)]
    places = [(rng.choice([1, 1, 2]), rng.choice([1, 2, 3])) for _ in names]

    def fn(p, x):
        nodes = [x @ p["a"], jnp.tanh(x @ p["b"]), x @ p["c"]]
        for k, (name, (i, j)) in enumerate(zip(names, places, strict=True)):
            nodes.append(STEPS[name](nodes[-i], nodes[-j], p.get(f"w{k}")))
        return sum(rms(n, (0, 1)) @ p["out"] for n in nodes[-2:])

    own = {"scale": (1, 12), "shift": (1, 12), "project": (12, 12), "unit": (12, 12)}
    shapes = {k: (5, 12) for k in "abc"} | {"out": (12, 3)}
    shapes |= {f"w{k}": own[n] for k, n in enumerate(names) if n in own}
    params, x = draw(shapes, seed), draw((3, 4, 5), 99)
    groups = sdp_jax.find_groups(fn, params, x)
    for (_, m), gap in changes(fn, groups, params, x).items():
        assert gap < 1e-6 or not m.scale_invariant, (names, places, m.path, gap)


def test_training_shrinks_scales_and_takes_whole_channels():
    """Filters of living channels take the step of the base optimizer, to rounding."""
    fn, rate = CASES["fast variance"].fn, 0.05
    params = jax.tree.map(lambda x: x.astype(jnp.float32), draw(NORM))
    x, y = draw(IMAGE, 1), draw((4, 4), 2)
    params["scale"] = jnp.linspace(0.02, 1.0, 8)
    params["shift"] = jnp.linspace(0.01, 0.5, 8)
    groups = sdp_jax.find_groups(fn, params, x)
    assert [m.path for _, m, _ in groups.shrinking] == ["scale", "shift"]
    strength = sdp_jax.valley_strength(c=2.0, mu=0.6)
    tx, base = sdp_jax.altsdp(rate, groups, strength=strength), optax.sgd(rate)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean((fn(p, x) - y) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        plain, _ = base.update(grads, base.init(params), params)
        new = optax.apply_updates(params, updates)
        return new, state, optax.apply_updates(params, plain)

    state, alive = tx.init(params), np.ones(8, bool)
    for _ in range(30):
        new, state, plain = step(params, state)
        now = np.asarray(new["scale"]) != 0
        for name in ("w", "b"):
            kept = np.asarray(new[name])[..., now & alive]
            want = np.asarray(plain[name])[..., now & alive]
            np.testing.assert_allclose(kept, want, rtol=1e-6, atol=1e-7)
        for leaf in ("w", "b", "scale", "shift"):
            assert not np.asarray(new[leaf])[..., ~now].any()
        length, before = (
            np.hypot(p["scale"], p["shift"])[now & alive] for p in (new, plain)
        )
        assert (length < before).all()
        params, alive = new, now
    assert 0 < alive.sum() < 8
