"""Cost of finding groups, and speed of the narrowed function.

``python -m experiments.benchmarks.tracing`` prints, for full-size networks, the seconds
that ``jax.make_jaxpr`` takes, what ``find_groups`` adds to it, what tracing the
narrowed function adds to it, and the time of one compiled call; then, with half of the
channels of each dimension cut, FLOPs and time of the dense function relative to the
small one, and the time of the small one relative to the same architecture written at
the small widths, compiled, run in turns. Last comes a decoder of 70 billion parameters,
from shapes alone.
"""

import dataclasses
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import tyro

import sdp_jax


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time.

    Attributes:
      repeats: timed rounds.
      image: height and width of the images.
      layers: layers of the decoder; 0 leaves it out.
      full: whether to take the networks at full size, or tiny ones.
    """

    repeats: int = 15
    image: int = 224
    layers: int = 80
    full: bool = True


class Bottleneck(nn.Module):
    """A bottleneck block."""

    width: int
    stride: int
    project: bool
    out: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Adds the block to ``x``."""

        def norm() -> nn.Module:
            return nn.BatchNorm(use_running_average=True)

        strides = (self.stride, self.stride)
        y = nn.relu(norm()(nn.Conv(self.width, (1, 1), use_bias=False)(x)))
        y = nn.Conv(self.width, (3, 3), strides, use_bias=False)(y)
        y = nn.relu(norm()(y))
        y = norm()(nn.Conv(self.out, (1, 1), use_bias=False)(y))
        if self.project:
            x = norm()(nn.Conv(self.out, (1, 1), strides, use_bias=False)(x))
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """ResNet-50, its widths divided by ``narrower``."""

    narrower: int = 1
    depths: tuple[int, ...] = (3, 4, 6, 3)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images to logits."""
        x = nn.Conv(64 // self.narrower, (7, 7), (2, 2), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, depth in enumerate(self.depths):
            width = 64 * 2**stage // self.narrower
            for i in range(depth):
                stride = 2 if stage and not i else 1
                x = Bottleneck(width, stride, not i, 4 * width)(x)
        return nn.Dense(1000)(x.mean((1, 2)))


class DenseNet121(nn.Module):
    """DenseNet-121."""

    depths: tuple[int, ...] = (6, 12, 24, 16)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images to logits."""

        def act(x: jax.Array) -> jax.Array:
            return nn.relu(nn.BatchNorm(use_running_average=True)(x))

        x = act(nn.Conv(64, (7, 7), (2, 2), use_bias=False)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, depth in enumerate(self.depths):
            for _ in range(depth):
                y = nn.Conv(128, (1, 1), use_bias=False)(act(x))
                y = nn.Conv(32, (3, 3), use_bias=False)(act(y))
                x = jnp.concatenate([x, y], -1)
            if stage + 1 < len(self.depths):
                x = nn.Conv(x.shape[-1] // 2, (1, 1), use_bias=False)(act(x))
                x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(1000)(act(x).mean((1, 2)))


class ViT(nn.Module):
    """A vision transformer with patches of 16×16."""

    width: int = 384
    heads: int = 6
    head: int = 64
    depth: int = 12

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images to logits."""
        x = nn.Conv(self.width, (16, 16), (16, 16))(x)
        x = x.reshape(x.shape[0], -1, self.width)
        x = x + self.param("position", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for _ in range(self.depth):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(
                self.heads, qkv_features=self.heads * self.head, out_features=self.width
            )(y, y)
            y = nn.Dense(4 * self.width)(nn.LayerNorm()(x))
            x = x + nn.Dense(self.width)(nn.gelu(y))
        return nn.Dense(1000)(nn.LayerNorm()(x).mean(1))


def decoder(params: Any, words: jax.Array) -> jax.Array:
    """A decoder with grouped-query attention, rotary embeddings and gated MLPs."""

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale

    def rotate(z: jax.Array) -> jax.Array:
        length, size = z.shape[1], z.shape[-1] // 2
        angle = jnp.arange(length)[:, None] * 1e4 ** (-jnp.arange(size) / size)
        cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
        a, b = jnp.split(z, 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = params["embed"][words]
    for p in params["layers"]:
        y = norm(x, p["norm1"])
        q, k, v = (jnp.einsum("bnc,chd->bnhd", y, p[key]) for key in "qkv")
        q, k = rotate(q), rotate(k)
        times = q.shape[2] // k.shape[2]
        k, v = jnp.repeat(k, times, axis=2), jnp.repeat(v, times, axis=2)
        a = jnp.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
        a = jnp.where(jnp.tril(jnp.ones(a.shape[-2:], bool)), a, -1e9)
        y = jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(a), v)
        x = x + jnp.einsum("bnhd,hdc->bnc", y, p["o"])
        y = norm(x, p["norm2"])
        x = x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]
    return norm(x, params["norm"]) @ params["out"]


def decoder_shapes(layers: int, narrower: int = 1) -> Any:
    """Shapes of a decoder of 70 billion parameters (80 layers)."""
    width, hidden, heads, groups = 8192 // narrower, 28672 // narrower, 64, 8
    heads, groups = max(heads // narrower, 2), max(groups // narrower, 1)
    shapes = {
        "q": (width, heads, 128),
        "k": (width, groups, 128),
        "v": (width, groups, 128),
        "o": (heads, 128, width),
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
        "norm1": (width,),
        "norm2": (width,),
    }
    tree = {
        "embed": (128256, width),
        "layers": [dict(shapes) for _ in range(layers)],
        "norm": (width,),
        "out": (width, 128256),
    }
    return jax.tree.map(
        lambda size: jax.ShapeDtypeStruct(size, jnp.bfloat16),
        tree,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def time_groups(
    fn: Callable[..., Any], params: Any, x: Any, repeats: int
) -> tuple[float, float, sdp_jax.Groups]:
    """Median seconds of a trace, and of ``find_groups`` without its trace."""
    traces, finds = [], []
    groups = None
    for _ in range(repeats):
        # A new function each time: JAX must not find the trace in its cache.
        start = time.perf_counter()
        jax.make_jaxpr(lambda p, x: fn(p, x))(params, x)
        middle = time.perf_counter()
        groups = sdp_jax.find_groups(lambda p, x: fn(p, x), params, x)
        end = time.perf_counter()
        traces.append(middle - start)
        finds.append(end - middle)
    assert groups is not None
    trace = statistics.median(traces)
    return trace, statistics.median(finds) - trace, groups


def main(config: Config) -> dict[str, dict[str, float]]:
    """Times all networks and prints a table.

    Args:
      config: what to time.

    Returns:
      Figures by network.
    """
    # First, so that its memory is not that of the others.
    decoder_figures, decoder_line = _decode(config) if config.layers else ({}, "")
    depths = None if config.full else (1, 1)
    short: Any = {} if depths is None else {"depths": depths}
    flat: Any = {} if depths is None else {"depth": 1}
    networks: dict[str, tuple[nn.Module, nn.Module | None]] = {
        "ResNet-50": (ResNet50(**short), ResNet50(narrower=2, **short)),
        "DenseNet-121": (DenseNet121(**short), None),
        "ViT-S/16": (ViT(**flat), ViT(192, 3, 32, **flat)),
        "ViT-B/16": (ViT(768, 12, **flat), None),
    }
    x = jnp.ones((2, config.image, config.image, 3))
    rounds = min(config.repeats, 5)
    print(
        f"{'network':<14} trace  groups  narrow  channels  forward ms  "
        "dense/small: FLOPs  "
        "time (95 %)            twin/small (95 %)"
    )
    figures: dict[str, dict[str, float]] = {}
    for name, (network, twin) in networks.items():
        shapes = jax.eval_shape(network.init, jax.random.key(0), x)
        trace, extra, groups = time_groups(network.apply, shapes, x, rounds)
        more = _time_narrow(network.apply, groups, shapes, x, rounds) - trace
        found = {"trace": trace, "groups": extra, "narrow": more}
        found["channels"] = groups.num_channels
        line = f"{name:<14} {trace:5.2f}  {extra:6.2f}  {more:6.2f}  "
        line += f"{groups.num_channels:8d}"
        variables = jax.jit(network.init)(jax.random.key(0), x)
        if twin is None:
            args = [(variables, x)]
            (dense,) = sdp_jax.latency(network.apply, args=args, repeats=config.repeats)
            found["dense"] = dense.seconds
            line += f"  {dense.seconds * 1e3:10.1f}"
        else:
            found |= _speed(network, twin, groups, variables, x, config.repeats)
            line += f"  {found['dense'] * 1e3:10.1f}  {found['flops']:18.2f}"
            for key in ("dense", "twin"):
                ends = (found[f"{key}_{part}"] for part in ("ratio", "low", "high"))
                line += "  {:5.2f} ({:5.2f} to {:5.2f})".format(*ends)
        figures[name] = found
        print(line)
    if config.layers:
        figures["decoder"] = decoder_figures
        print(decoder_line)
    return figures


def _decode(config: Config) -> tuple[dict[str, float], str]:
    """Figures of the decoder, and the line to print."""
    shapes = decoder_shapes(config.layers, 1 if config.full else 32)
    words = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    jax.make_jaxpr(decoder)(shapes, words)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    trace, extra, groups = time_groups(decoder, shapes, words, 1)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6 - before
    size = sum(x.size for x in jax.tree.leaves(shapes)) / 1e9
    line = (
        f"decoder, {config.layers} layers, {size:.1f} billion parameters: trace "
        f"{trace:.2f}, groups {extra:.2f}, {groups.num_channels} channels, "
        f"{memory:.2f} GB of memory more than its trace"
    )
    return {"trace": trace, "groups": extra, "memory": memory}, line


def _time_narrow(
    fn: Callable[..., Any], groups: sdp_jax.Groups, shapes: Any, x: Any, repeats: int
) -> float:
    """Median seconds of tracing the narrowed function, half of the channels cut."""
    cut = _half(groups)
    small = cut.take(shapes)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.make_jaxpr(sdp_jax.narrow(lambda p, x: fn(p, x), cut))(small, x)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _half(groups: sdp_jax.Groups) -> sdp_jax.Cut:
    return sdp_jax.Cut(groups, tuple(tuple(range(d.size // 2)) for d in groups))


def _speed(
    network: nn.Module,
    twin: nn.Module,
    groups: sdp_jax.Groups,
    variables: Any,
    x: jax.Array,
    repeats: int,
) -> dict[str, float]:
    """Seconds of small and dense function and twin, compared; ratio of the FLOPs."""
    cut = _half(groups)
    small = cut.take(variables)
    written = jax.jit(twin.init)(jax.random.key(0), x)
    have, want = (jax.tree.map(jnp.shape, tree) for tree in (small, written))
    assert have == want, "the twin has other shapes than the small network"
    narrowed = sdp_jax.narrow(network.apply, cut)
    times = sdp_jax.latency(
        narrowed,
        network.apply,
        twin.apply,
        args=[(small, x), (variables, x), (written, x)],
        repeats=repeats,
    )
    before = sdp_jax.cost(network.apply, variables, x).flops
    flops = before / sdp_jax.cost(narrowed, small, x).flops
    found = {"flops": flops}
    for key, timing in zip(("small", "dense", "twin"), times, strict=True):
        found[key] = timing.seconds
        found |= {f"{key}_{k}": getattr(timing, k) for k in ("ratio", "low", "high")}
    return found


if __name__ == "__main__":
    main(tyro.cli(Config))
