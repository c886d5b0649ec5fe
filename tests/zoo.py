"""Small models of many architectures, for the promise."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax.experimental.ode import odeint
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.zoo_linen import (
    ActorCritic,
    BiT,
    ConvNeXt,
    Decoder,
    DenseNet,
    Eca,
    EncoderDecoder,
    Experts,
    Mixer,
    MobileNet,
    Recurrent,
    Remat,
    ResNet,
    ResNeXt,
    ShuffleNet,
    StateSpace,
    Swin,
    UNet,
    Vae,
    Vgg,
    ViT,
    WideResNet,
)

IMAGE = np.random.default_rng(0).normal(size=(2, 8, 8, 3))
TOKENS = np.random.default_rng(1).normal(size=(2, 6, 5))
WORDS = np.random.default_rng(2).integers(0, 11, (2, 6))


@dataclasses.dataclass(frozen=True)
class Model:
    """A function, shapes of its parameters, its inputs, and how much can be cut.

    Attributes:
      fn: ``fn(params, *inputs)``.
      shapes: shapes of the parameters.
      inputs: the other arguments.
      share: share of the parameters that is gone when every dimension is down to one
        channel.
      train: in training mode, ``(result, new running statistics)``, if that differs.
      join: puts new running statistics into the parameters.
      where: which inputs and outputs have channels, as `find_groups` takes it.
    """

    fn: Callable[..., Any]
    shapes: Any
    inputs: tuple[Any, ...]
    share: float
    train: Callable[..., Any] | None = None
    join: Callable[[Any, Any], Any] | None = None
    where: dict[str, Any] = dataclasses.field(default_factory=dict)


def linen(module, *inputs, share, **kwargs):
    inputs = tuple(jnp.asarray(x) for x in inputs)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **kwargs))
    model = Model(lambda v, *x: module.apply(v, *x, **kwargs), shapes, inputs, share)
    if "batch_stats" not in shapes:
        return model
    return dataclasses.replace(
        model,
        train=lambda v, *x: module.apply(v, *x, **kwargs, mutable=["batch_stats"]),
        join=lambda v, stats: v | stats,
    )


class NnxVgg(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs, use_running_average=True)
        self.dense = nnx.Linear(8 * 16, 12, rngs=rngs)
        self.out = nnx.Linear(12, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), (2, 2))
        return self.out(nnx.relu(self.dense(x.reshape(x.shape[0], -1))))


class NnxTransformer(nnx.Module):
    def __init__(self, rngs):
        self.inside = nnx.Linear(5, 12, rngs=rngs)
        self.norm = nnx.LayerNorm(12, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            3, 12, decode=False, deterministic=True, rngs=rngs
        )
        self.up = nnx.Linear(12, 20, rngs=rngs)
        self.down = nnx.Linear(20, 12, rngs=rngs)
        self.out = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x):
        x = self.inside(x)
        x = x + self.attention(self.norm(x))
        x = x + self.down(nnx.gelu(self.up(x)))
        return self.out(x.mean(1))


def from_nnx(kind, x, share):
    graph, state = nnx.split(nnx.eval_shape(lambda: kind(nnx.Rngs(0))))
    params, rest = nnx.split_state(state, (nnx.Param, nnx.BatchStat), ...)
    rest = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), rest)
    assert not jax.tree.leaves(rest)
    model = Model(lambda p, x: nnx.merge(graph, p)(x), params, (jnp.asarray(x),), share)
    if not jax.tree.leaves(nnx.split_state(state, nnx.BatchStat, ...)[0]):
        return model

    def train(p, x):
        module = nnx.merge(graph, p)
        module.train()
        out = module(x)
        return out, nnx.state(module, nnx.BatchStat)

    return dataclasses.replace(model, train=train, join=nnx.merge_state)


def from_equinox():
    model = eqx.nn.MLP(5, 3, 12, 2, key=jax.random.key(0))
    arrays, static = eqx.partition(model, eqx.is_array)
    shapes = jax.eval_shape(lambda: arrays)
    x = jnp.asarray(TOKENS[0])
    return Model(lambda p, x: jax.vmap(eqx.combine(p, static))(x), shapes, (x,), 0.95)


def from_haiku():
    def net(x, train=False):
        x = jax.nn.relu(hk.Conv2D(8, 3)(x))
        x = hk.BatchNorm(True, True, 0.9)(x, is_training=train)
        return hk.nets.MLP([12, 10])(hk.Flatten()(x))

    pure = hk.without_apply_rng(hk.transform_with_state(net))
    x = jnp.asarray(IMAGE)
    params, state = jax.eval_shape(lambda: pure.init(jax.random.key(0), x, train=True))
    variables = {"params": params, "state": state}
    return Model(
        lambda v, x: pure.apply(v["params"], v["state"], x)[0],
        variables,
        (x,),
        0.98,
        lambda v, x: pure.apply(v["params"], v["state"], x, train=True),
        lambda v, state: v | {"state": state},
    )


def plain(fn, shapes, *inputs, share):
    leaves = {k: jax.ShapeDtypeStruct(s, jnp.float64) for k, s in shapes.items()}
    return Model(fn, leaves, tuple(map(jnp.asarray, inputs)), share)


def stacked(p, x):
    def block(x, layer):
        return x + jnp.tanh(x @ layer["up"]) @ layer["down"], None

    layers = {k: p[k] for k in ("up", "down")}
    return jax.lax.scan(block, x @ p["in"], layers)[0] @ p["out"]


@jax.custom_vjp
def scaled(x, s):
    return jnp.tanh(x) * s


scaled.defvjp(
    lambda x, s: (scaled(x, s), (s, jnp.tanh(x))),
    lambda r, c: (2.0 * c * r[0], c * r[1]),
)


@jax.custom_jvp
def gate(x):
    return x * jnp.cos(x)


gate.defjvp(lambda p, t: (gate(p[0]), 3.0 * t[0]))


def sharded(p, words):
    """A decoder for many devices: every result of a layer says where it lies."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def on(x, *axes):
        where = NamedSharding(mesh, PartitionSpec("data", *axes))
        return jax.lax.with_sharding_constraint(x, where)

    def norm(x, scale):
        return on(x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale)

    def attend(x, w):
        q, k, v = (
            on(jnp.einsum("btd,dhk->bthk", x, w[n]), None, "model") for n in "qkv"
        )
        scores = on(jnp.einsum("bthk,bshk->bhts", q, k), "model")
        past = jnp.tril(jnp.ones(scores.shape[2:], bool))
        weights = on(jax.nn.softmax(jnp.where(past, scores, -1e30)), "model")
        x = on(jnp.einsum("bhts,bshk->bthk", weights, v), None, "model")
        return on(jnp.einsum("bthk,hkd->btd", x, w["o"]))

    def layer(x, w):
        x = x + attend(norm(x, w["first"]), w)
        y = norm(x, w["second"])
        y = on(
            jax.nn.silu(on(y @ w["gate"], None, "model"))
            * on(y @ w["up"], None, "model")
        )
        return x + on(y @ w["down"]), None

    x, _ = jax.lax.scan(jax.checkpoint(layer), on(p["embed"][words]), p["layers"])
    return on(norm(x, p["last"]) @ p["head"], None, "model")


def from_sharded():
    layers = {n: (2, 6, 4, 2) for n in "qkv"} | {"o": (2, 4, 2, 6), "down": (2, 8, 6)}
    layers |= {"first": (2, 6), "second": (2, 6), "gate": (2, 6, 8), "up": (2, 6, 8)}
    shapes = {"embed": (11, 6), "layers": layers, "last": (6,), "head": (6, 8)}
    leaves = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float64),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )
    return Model(sharded, leaves, (jnp.asarray(WORDS),), 0.95)


def decode(p, cache, word, at):
    """One step of a decoder that is handed its keys and values, and hands them on."""
    x = p["embed"][word]
    for name in cache:
        w, old = p[name], cache[name]
        y = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * w["norm"]
        q = jnp.einsum("bd,dhk->bhk", y, w["q"]) / 2
        new = {k: jnp.einsum("bd,dhk->bhk", y, w[k])[:, None] for k in ("k", "v")}
        old = {
            k: jax.lax.dynamic_update_slice_in_dim(old[k], new[k], at, 1) for k in old
        }
        cache = cache | {name: old}
        a = jnp.einsum("bhk,bnhk->bhn", q, old["k"])
        a = jnp.where(jnp.arange(a.shape[-1]) <= at, a, -1e9)
        y = jnp.einsum("bhn,bnhk->bhk", jax.nn.softmax(a), old["v"])
        x = x + jnp.einsum("bhk,hkd->bd", y, w["o"])
        x = x + jax.nn.silu(x @ w["up"]) @ w["down"]
    return x @ p["embed"].T, cache


def cached_decoder(share):
    sizes = {k: (8, 3, 4) for k in "qkv"} | {"o": (3, 4, 8), "norm": (8,)}
    sizes |= {"up": (8, 12), "down": (12, 8)}
    names = ("block0", "block1")
    tree = {"embed": (11, 8)} | dict.fromkeys(names, sizes)
    shapes = jax.tree.map(
        lambda n: jax.ShapeDtypeStruct(n, jnp.float64), tree, is_leaf=_is_shape
    )
    rng = np.random.default_rng(3)
    cache = {
        n: {k: jnp.asarray(rng.normal(size=(2, 6, 3, 4))) for k in "kv"} for n in names
    }
    inputs = cache, jnp.asarray(WORDS[:, 0]), jnp.asarray(3)
    where = {"prune_inputs": ("0/*",), "prune_outputs": ("1/*",)}
    return Model(decode, shapes, inputs, share, where=where)


def _is_shape(x):
    return isinstance(x, tuple)


def factorised(p, x):
    x = jnp.tanh(x @ p["a"]) @ p["b"]
    x = jnp.linalg.qr(x)[1] @ p["c"]
    return jnp.tanh(x) @ p["d"]


def grouped_experts(p, x):
    """Each token goes to two of four experts; products of rows sorted by expert."""
    x = (x @ p["in"]).reshape(-1, 8)
    weight, chosen = jax.lax.top_k(nn.softmax(x @ p["router"]), 2)
    order = jnp.argsort(chosen.reshape(-1))
    sizes = jnp.bincount(chosen.reshape(-1), length=4).astype(jnp.int32)
    y = x[order // 2]
    gate, up = (jax.lax.ragged_dot(y, p[k], sizes) for k in ("gate", "up"))
    y = jax.lax.ragged_dot(nn.silu(gate) * up, p["down"], sizes)
    y = jnp.zeros_like(y).at[order].set(y).reshape(*chosen.shape, -1)
    return (x + (y * weight[..., None]).sum(1)) @ p["out"]


@jax.custom_vjp
def rounded(x):
    return jnp.round(x)


rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


def quantised(p, x):
    """Weights of 8 bits with learned steps, activations of 4, straight through."""

    def weight(name):
        step = p[f"{name}_step"]
        return rounded(jnp.clip(p[name] / step, -128, 127)) * step

    def conv(x, name):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, weight(name), (1, 1), "SAME", dimension_numbers=numbers
        )

    for name in "ab":
        x = nn.relu(conv(x, name) + p[f"{name}_bias"])
        x = rounded(jnp.clip(x * 8, 0, 15)) / 8
    return x.mean((1, 2)) @ weight("c")


def neural_ode(p, x):
    """Four steps of Runge and Kutta along a learned vector field."""

    def field(h, t):
        return jnp.tanh(h @ p["up"] + t * p["time"]) @ p["down"]

    def step(h, t):
        a = field(h, t)
        b = field(h + a / 8, t + 1 / 8)
        c = field(h + b / 8, t + 1 / 8)
        d = field(h + c / 4, t + 1 / 4)
        return h + (a + 2 * b + 2 * c + d) / 24, None

    return jax.lax.scan(step, x @ p["in"], jnp.arange(4) / 4)[0] @ p["out"]


def adjoint_ode(p, x):
    """The steps of the adjoint depend on all slopes, so the state stays whole."""
    x = jnp.tanh(x @ p["up"]) @ p["in"]
    times = jnp.array([0.0, 1.0])
    x = odeint(lambda h, t, w: jnp.tanh(h @ w), x, times, p["field"])[-1]
    return jnp.tanh(x @ p["out"]) @ p["last"]


ZOO: dict[str, Callable[[], Model]] = {
    "vgg": lambda: linen(Vgg(), IMAGE, share=0.97),
    "resnet18": lambda: linen(ResNet(), IMAGE, share=0.97),
    "resnet50": lambda: linen(ResNet(True), IMAGE, share=0.93),
    "groupnorm": lambda: linen(ResNet(norm=lambda: nn.GroupNorm(2)), IMAGE, share=0.97),
    "wideresnet": lambda: linen(WideResNet(), IMAGE, share=0.97),
    "bit": lambda: linen(BiT(), IMAGE, share=0.98),
    "resnext": lambda: linen(ResNeXt(), IMAGE, share=0.94),
    "mobilenet": lambda: linen(MobileNet(), IMAGE, share=0.90),
    "efficientnet": lambda: linen(MobileNet(squeeze=True), IMAGE, share=0.91),
    "eca": lambda: linen(Eca(), IMAGE, share=0.95),
    "densenet": lambda: linen(DenseNet(), IMAGE, share=0.92),
    "shufflenet": lambda: linen(ShuffleNet(), IMAGE, share=0.89),
    "unet": lambda: linen(UNet(), IMAGE, share=0.96),
    "convnext": lambda: linen(ConvNeXt(), IMAGE, share=0.93),
    "vit": lambda: linen(ViT(), IMAGE, share=0.97),
    "vit_fused": lambda: linen(ViT(True), IMAGE, share=0.97),
    "swin": lambda: linen(Swin(), IMAGE, share=0.93),
    "mixer": lambda: linen(Mixer(), TOKENS, share=0.72),
    "encoder_decoder": lambda: linen(EncoderDecoder(), WORDS, WORDS, share=0.98),
    "decoder": lambda: linen(Decoder(), WORDS, share=0.99),
    "lstm": lambda: linen(Recurrent(nn.OptimizedLSTMCell), TOKENS, share=0.95),
    "gru": lambda: linen(Recurrent(nn.GRUCell), TOKENS, share=0.95),
    "state_space": lambda: linen(StateSpace(), TOKENS, share=0.95),
    "vae": lambda: linen(Vae(), TOKENS, jax.random.key(1), share=0.93),
    "actor_critic": lambda: linen(ActorCritic(), TOKENS, TOKENS, share=0.94),
    "experts": lambda: linen(Experts(), TOKENS, share=0.98),
    "remat": lambda: linen(Remat(), TOKENS, share=0.96),
    "nnx_vgg": lambda: from_nnx(NnxVgg, IMAGE, 0.96),
    "nnx_transformer": lambda: from_nnx(NnxTransformer, TOKENS, 0.98),
    "equinox": from_equinox,
    "haiku": from_haiku,
    "stacked": lambda: plain(
        stacked,
        {"in": (5, 8), "up": (3, 8, 12), "down": (3, 12, 8), "out": (8, 2)},
        TOKENS,
        share=0.98,
    ),
    "grouped_experts": lambda: plain(
        grouped_experts,
        {"in": (5, 8), "router": (8, 4), "gate": (4, 8, 12), "up": (4, 8, 12)}
        | {"down": (4, 12, 8), "out": (8, 2)},
        TOKENS,
        share=0.98,
    ),
    "quantised": lambda: plain(
        quantised,
        {"a": (3, 3, 3, 8), "a_bias": (8,), "a_step": (), "b": (3, 3, 8, 6)}
        | {"b_bias": (6,), "b_step": (), "c": (6, 4), "c_step": ()},
        IMAGE,
        share=0.93,
    ),
    "custom_vjp": lambda: plain(
        lambda p, x: scaled(x @ p["a"], p["s"]) @ p["b"],
        {"a": (5, 8), "s": (2, 6, 8), "b": (8, 3)},
        TOKENS,
        share=0.88,
    ),
    "custom_jvp": lambda: plain(
        lambda p, x: gate(x @ p["a"]) @ p["b"],
        {"a": (5, 8), "b": (8, 3)},
        TOKENS,
        share=0.88,
    ),
    "neural_ode": lambda: plain(
        neural_ode,
        {"in": (5, 6), "up": (6, 8), "time": (8,), "down": (8, 6), "out": (6, 2)},
        TOKENS,
        share=0.93,
    ),
    "adjoint_ode": lambda: plain(
        adjoint_ode,
        {"up": (5, 12), "in": (12, 2), "field": (2, 2), "out": (2, 8), "last": (8, 2)},
        TOKENS[:, 0],
        share=0.88,
    ),
    "sharded": from_sharded,
    "cached_decoder": lambda: cached_decoder(0.98),
    "factorised": lambda: plain(
        factorised,
        {"a": (5, 8), "b": (8, 4), "c": (4, 6), "d": (6, 2)},
        TOKENS,
        share=0.86,
    ),
}
