"""Random programs: graphs of operations on arrays of one shape."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

BATCH, TOKENS, WIDTH = 3, 4, 12
X = np.random.default_rng(0).normal(size=(BATCH, TOKENS, 5))
WORDS = np.random.default_rng(1).integers(0, 7, (BATCH, TOKENS))
ODD = np.array([7, 2, 3, 10, 0, 1, 11, 4, 9, 5, 8, 6])


def gated(x, kernel):
    y = x.reshape(12, WIDTH, 1)
    dims = ("NHC", "HIO", "NHC")
    gate = lax.conv_general_dilated(y, kernel, (1,), "SAME", dimension_numbers=dims)
    return x * jax.nn.sigmoid(gate.reshape(x.shape))


def convolved(x, kernel):
    groups = WIDTH // kernel.shape[1]
    dims = ("NHC", "HIO", "NHC")
    return lax.conv_general_dilated(
        x, kernel, (1,), "SAME", dimension_numbers=dims, feature_group_count=groups
    )


def attended(x, y):
    q, k = (z.reshape(BATCH, TOKENS, 2, 6) for z in (x, y))
    a = jax.nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", q, k))
    return jnp.einsum("bhnm,bmhd->bnhd", a, k).reshape(x.shape)


def fused(x, w):
    """Self-attention whose three maps are one."""
    q, k, v = jnp.moveaxis((x @ w).reshape(BATCH, TOKENS, 3, 3, 4), 2, 0)
    a = jax.nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", q, k))
    return x + jnp.einsum("bhnm,bmhd->bnhd", a, v).reshape(x.shape)


def group_norm(x):
    y = x.reshape(BATCH, TOKENS, 2, 6)
    y = y - y.mean((1, 3), keepdims=True)
    y = y / jnp.sqrt(1e-3 + jnp.var(y, (1, 3), keepdims=True))
    return y.reshape(x.shape)


def standardised(x, w):
    w = w - w.mean(0)
    return x + jnp.tanh(x @ (w / jnp.sqrt(1e-3 + jnp.var(w, 0))))


@jax.custom_vjp
def tilted(x):
    return x * jnp.cos(jnp.arange(12.0))


tilted.defvjp(
    lambda x: (tilted(x), x), lambda x, g: (g * jnp.arange(12.0) * jnp.cos(x),)
)


@jax.custom_jvp
def bent(x):
    return jnp.tanh(x) * jnp.arange(12.0)


bent.defjvp(lambda x, t: (bent(*x), t[0] * (1 + jnp.sin(x[0]) * jnp.arange(12.0))))


@jax.custom_vjp
def straight(x):
    return jnp.round(x)


straight.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


def quantised(x, w):
    """A matrix of eight bits with a step for each output."""
    step = 1e-2 + jnp.abs(w).max(0) / 128
    return x + jnp.tanh(x @ (straight(jnp.clip(w / step, -128, 127)) * step))


def recurrent(x, w):
    def step(h, y):
        h = jnp.tanh(y + h @ w)
        return h, h

    return lax.scan(step, x[0], x)[1]


def carried(x, y, w):
    """A scan with two states, over the tokens, backwards."""

    def step(states, lines):
        h, c = states
        c = jax.nn.sigmoid(h * w) * c + jnp.tanh(lines[0])
        return (jnp.tanh(c + lines[1]), c), h

    lines = x.swapaxes(0, 1), y.swapaxes(0, 1)
    (h, _), hs = lax.scan(step, (x[:, 0], y[:, 1]), lines, reverse=True)
    return hs.swapaxes(0, 1) + h[:, None]


def repeated(x, w):
    def step(c):
        return c[0] + 1, jnp.tanh(c[1] @ w)

    return lax.fori_loop(0, 2, lambda _, y: step((0, y))[1], x)


def counted(x, y):
    def step(c):
        i, x, y = c
        return i + 1, y, jnp.tanh(x) - y.mean(1, keepdims=True)

    return lax.scan(lambda c, _: (step(c), None), (0, x, y), length=2)[0][1]


def sharded(x, w):
    """The columns of one matrix and the rows of the next one lie on four devices."""

    def block(x, w):
        return lax.psum(jnp.tanh(x @ w[0].T) @ w[1], "model")

    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    here = (PartitionSpec(), PartitionSpec(None, "model"))
    both = jax.shard_map(block, mesh=mesh, in_specs=here, out_specs=here[0])
    return x + jax.jit(both)(x, w)


def placed(x):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    where = NamedSharding(mesh, PartitionSpec(None, "model", "data"))
    return lax.with_sharding_constraint(x, where)


def experts(x, w):
    rows = x.reshape(12, WIDTH)
    sizes = jnp.array([5, 3, 4], jnp.int32)
    return x + jnp.tanh(lax.ragged_dot(rows, w, sizes)).reshape(x.shape)


def routed(x, w):
    """Each token weighs its two best experts."""
    weight, chosen = lax.top_k(jax.nn.softmax(x @ w[:, :, 0].T), 2)
    y = jnp.einsum("btd,edk->btek", x, w)
    y = jnp.take_along_axis(y, chosen[..., None], axis=2)
    return x + jnp.tanh((y * weight[..., None]).sum(2))


def looked_up(x, w):
    return x * (1 + jnp.tanh(w[WORDS]))


def written(x, y):
    x = x.at[:, 1].set(y[:, 2]).at[..., 3:7].add(y[..., 4:8])
    return lax.dynamic_update_slice(x, y[:, :2, :], (0, 2, 0))


def layer_norm(x, w):
    return (x - x.mean(-1, keepdims=True)) * w / (1 + x.var(-1)[..., None])


def split(x, y):
    a, b, c = jnp.split(x, 3, -1)
    return jnp.concatenate([c, a * jax.nn.silu(b), y[..., :4]], -1)


def window(x):
    y = lax.dynamic_slice_in_dim(x, jnp.int32(3) + 1, 4, -1)
    return jnp.concatenate([y, x[..., 4:]], -1)


def solved(x):
    return jnp.linalg.solve(3 * jnp.eye(TOKENS) + x @ x.swapaxes(1, 2), x)


def padded(x, w):
    return lax.pad(x[..., 1:], w, ((0, 0, 0), (1, -1, 0), (0, 1, 0)))


def chosen(x, y, w):
    return lax.cond(x[0, 0].sum() > 0, lambda x, y: x * w, lambda x, y: y - x, x, y)


def switched(x, y):
    """A condition for each example, so both are computed."""
    one = jax.vmap(lambda x, y: lax.cond(y[0, 0] > 0, jnp.sin, lambda x: 2 * x, x))
    return one(x, y)


def mapped(x, y, w):
    return jax.vmap(lambda a, b: jnp.tanh(a @ w) * b, in_axes=1, out_axes=1)(x, y)


def while_moving(x, w):
    def step(c):
        return c[0] + 1, jnp.tanh(c[1] * w)

    return jax.jit(lambda x: lax.fori_loop(0, 3, lambda _, x: step((0, x))[1], x))(x)


def checkpointed(x, w):
    return x + jax.checkpoint(lambda x: jnp.tanh(jnp.sin(x) @ w))(x)


# Of two arrays and a parameter to an array of the same shape.
OPERATIONS = {
    "tanh": lambda x, y, w: jnp.tanh(x),
    "relu": lambda x, y, w: jax.nn.relu(x),
    "sigmoid": lambda x, y, w: jax.nn.sigmoid(x),
    "gelu": lambda x, y, w: jax.nn.gelu(x),
    "scale": lambda x, y, w: x * w,
    "shift": lambda x, y, w: x + w,
    "add": lambda x, y, w: x + y,
    "multiply": lambda x, y, w: jnp.tanh(x) * y,
    "blend": lambda x, y, w: x * jax.nn.sigmoid(w) + y * (1 - jax.nn.sigmoid(w)),
    "larger": lambda x, y, w: jnp.maximum(x, y),
    "divide": lambda x, y, w: x / (1 + y**2),
    "matmul": lambda x, y, w: x + jnp.tanh(x @ w),
    "project": lambda x, y, w: jnp.tanh(y @ w),
    "tied": lambda x, y, w: x + jnp.tanh(y @ w) @ w.T,
    "bilinear": lambda x, y, w: x + jnp.einsum("bti,btj,ijk->btk", x[..., :4], y, w),
    "glu": lambda x, y, w: x + (x @ w[:, :12]) * jax.nn.sigmoid(y @ w[:, 12:]),
    "standardised": lambda x, y, w: standardised(x, w),
    "normed": lambda x, y, w: x + y @ (w / (1e-3 + jnp.linalg.norm(w))),
    "divided": lambda x, y, w: x / w,
    "table": lambda x, y, w: x + jnp.sin(jnp.arange(12.0)),
    "loop": lambda x, y, w: lax.fori_loop(
        0, 2, lambda i, c: c - c.mean(-1)[..., None], x
    ),
    "pooled": lambda x, y, w: x + jax.nn.softmax(y.mean(1)[:, None] - x[:, :1]),
    "concat": lambda x, y, w: jnp.concatenate([x[..., 6:], y[..., :6]], -1),
    "tokens": lambda x, y, w: jnp.concatenate([x[:, 2:], y[:, :2]], 1),
    "joined": lambda x, y, w: x + jnp.tanh(jnp.concatenate([x, y], -1) @ w),
    "slice": lambda x, y, w: x[..., ::2].repeat(2, axis=-1),
    "reshape": lambda x, y, w: x.reshape(3, 4, 3, 4).swapaxes(2, 3).reshape(3, 4, 12),
    "transpose": lambda x, y, w: x.swapaxes(0, 1)[:, ::-1].swapaxes(0, 1),
    "pad": lambda x, y, w: jnp.pad(x[..., 2:], ((0, 0), (0, 0), (1, 1))),
    "padded": lambda x, y, w: padded(x, w),
    "mean": lambda x, y, w: x - y.mean(1, keepdims=True),
    "where": lambda x, y, w: jnp.where(x > 0, x, 0.1 * y),
    "clip": lambda x, y, w: jnp.clip(x, -0.5, 1.0),
    "floor": lambda x, y, w: jnp.clip(x, 0.25, 2.0) + jnp.round(y),
    "straight": lambda x, y, w: straight(8 * x) / 8,
    "quantised": lambda x, y, w: quantised(x, w),
    "flip": lambda x, y, w: x + x[..., ::-1],
    "attend": lambda x, y, w: attended(x, y),
    "fused": lambda x, y, w: fused(x, w),
    "broadcast": lambda x, y, w: x * jnp.arange(12.0) + jnp.ones((3, 4, 1)),
    "conv": lambda x, y, w: convolved(x, w),
    "depthwise": lambda x, y, w: convolved(x, w),
    "grouped": lambda x, y, w: convolved(x, w),
    "gather": lambda x, y, w: x[..., np.r_[4:8, 0:4, 8:12]],
    "window": lambda x, y, w: window(x),
    "layernorm": lambda x, y, w: layer_norm(x, w),
    "rmsnorm": lambda x, y, w: x * lax.rsqrt((x**2).mean(-1)[..., None] + 1e-3) * w,
    "groupnorm": lambda x, y, w: group_norm(x),
    "norms": lambda x, y, w: x / (1e-3 + jnp.linalg.norm(x, axis=-1, keepdims=True)),
    "sums": lambda x, y, w: x / (1 + jnp.abs(y).sum(-1, keepdims=True)),
    "peak": lambda x, y, w: x / (1 + jnp.abs(y).max(-1, keepdims=True)),
    "softmax": lambda x, y, w: jax.nn.softmax(x),
    "logsumexp": lambda x, y, w: x - jax.nn.logsumexp(y, axis=-1, keepdims=True),
    "logaddexp": lambda x, y, w: jnp.logaddexp(x, y),
    "largest": lambda x, y, w: x - x.max(-1, keepdims=True) - jnp.sort(x, 1),
    "cumsum": lambda x, y, w: jnp.tanh(x) * jnp.cumsum(y, 1),
    "cumulate": lambda x, y, w: lax.cummax(x, 1) - jnp.cumprod(jnp.sin(y), 1),
    "cumlogsumexp": lambda x, y, w: x + lax.cumlogsumexp(y, 1),
    "along_channels": lambda x, y, w: x + jnp.tanh(jnp.cumsum(y, -1)),
    "split": lambda x, y, w: split(x, y),
    "scan": lambda x, y, w: recurrent(x, w),
    "carried": lambda x, y, w: carried(x, y, w),
    "repeated": lambda x, y, w: repeated(x, w),
    "counted": lambda x, y, w: counted(x, y),
    "moving": lambda x, y, w: while_moving(x, w),
    "checkpointed": lambda x, y, w: checkpointed(x, w),
    "cond": lambda x, y, w: chosen(x, y, w),
    "switched": lambda x, y, w: switched(x, y),
    "mapped": lambda x, y, w: mapped(x, y, w),
    "jit": lambda x, y, w: jax.jit(lambda x: x - x.var(-1, keepdims=True))(x + 1),
    "shuffle": lambda x, y, w: x[..., ODD],
    "shuffled": lambda x, y, w: x + y.at[..., ODD].set(x),
    "block": lambda x, y, w: x.at[..., 3:7].set(jnp.tanh(y @ w)),
    "slots": lambda x, y, w: x.at[..., ODD[:4]].set(y @ w),
    "number": lambda x, y, w: x.at[..., 5:].set(0.5).at[..., 2].multiply(3.0),
    "more": lambda x, y, w: x.at[..., ODD[4:8]].add(y @ w).at[:, 1, :6].add(1.0),
    "twice": lambda x, y, w: jnp.zeros_like(x).at[..., ODD].set(x[..., np.r_[:6, :6]]),
    "written": lambda x, y, w: written(x, y),
    "lookup": lambda x, y, w: looked_up(x, w),
    "along": lambda x, y, w: gated(x, w),
    "solve": lambda x, y, w: solved(x),
    "tilted": lambda x, y, w: tilted(x),
    "bent": lambda x, y, w: bent(x),
    "sharded": lambda x, y, w: sharded(x, w),
    "placed": lambda x, y, w: placed(x),
    "experts": lambda x, y, w: experts(x, w),
    "routed": lambda x, y, w: routed(x, w),
}
_LINE = "scale shift blend divided layernorm rmsnorm carried moving cond".split()
_SQUARE = (
    "matmul project tied standardised normed quantised scan repeated checkpointed "
    "mapped"
).split()
SHAPES = {
    **dict.fromkeys(_LINE, (12,)),
    **dict.fromkeys(_SQUARE, (12, 12)),
    **dict.fromkeys(("block", "slots", "more"), (12, 4)),
    "bilinear": (4, 12, 12),
    "glu": (12, 24),
    "joined": (24, 12),
    "fused": (12, 36),
    "padded": (),
    "conv": (3, 12, 12),
    "depthwise": (3, 1, 12),
    "grouped": (3, 4, 12),
    "lookup": (7, 12),
    "along": (3, 1, 1),
    "sharded": (2, 8, 12),
    "experts": (3, 12, 12),
    "routed": (3, 12, 12),
}
# Behind them channels lie unevenly, and few dimensions are left: not as often.
_UNEVEN = (
    "flip gather number pad padded reshape shuffle shuffled slice twice window written"
).split()
NAMES = sorted(OPERATIONS) + 2 * sorted(OPERATIONS.keys() - _UNEVEN)


@dataclasses.dataclass(frozen=True)
class Step:
    """An operation, how far back the arrays are that it reads, and its parameter."""

    name: str
    x: int = 0
    y: int = 1
    tied: bool = False  # It takes the last parameter of its shape.


def draw(seed):
    """A random program."""
    rng = random.Random(seed)
    return [
        Step(rng.choice(NAMES), rng.randrange(4), rng.randrange(4), rng.random() < 0.5)
        for _ in range(rng.randint(1, 8))
    ]


def shapes(steps):
    """Shapes of the parameters."""
    found = {"first": (5, 12), "second": (5, 12), "last": (36, 3), "other": (12, 2)}
    own = {f"w{i}": SHAPES[s.name] for i, s in enumerate(steps) if s.name in SHAPES}
    names = {_parameter(steps, i) for i in range(len(steps))}
    return found | {k: s for k, s in own.items() if k in names}


def _parameter(steps, i):
    shape = SHAPES.get(steps[i].name)
    for k in range(i - 1, -1, -1):
        if steps[i].tied and shape == SHAPES.get(steps[k].name, ...):
            return _parameter(steps, k)
    return f"w{i}"


def program(steps):
    """The function: two arrays to begin with, then one for each step."""

    def fn(p, x):
        nodes = [x @ p["first"], jnp.tanh(x @ p["second"])]
        for i, step in enumerate(steps):
            x, y = (nodes[-1 - k % len(nodes)] for k in (step.x, step.y))
            nodes.append(OPERATIONS[step.name](x, y, p.get(_parameter(steps, i))))
        ends = jnp.concatenate([nodes[-1], nodes[-2], nodes[0]], -1)
        other = nodes[-1 - 3 % len(nodes)].mean(1)
        return {"result": jnp.tanh(ends) @ p["last"], "other": other @ p["other"]}

    return fn
