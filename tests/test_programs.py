"""Random programs keep the promise."""

import os

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import promise

X = np.random.default_rng(0).normal(size=(3, 4, 5))
OPS = st.sampled_from(
    "tanh relu sigmoid scale add concat slice reshape transpose pad mean where flip "
    "matmul heads broadcast conv depthwise grouped gather window layernorm groupnorm "
    "softmax largest cumsum split scan jit norms shuffle block slots number more twice "
    "along solve standardised divided table loop pooled".split()
)
KERNELS = {
    "matmul": (12, 12),
    "standardised": (12, 12),
    "divided": (12,),
    "scan": (12, 12),
    "scale": (12,),
    "add": (12,),
    "layernorm": (12,),
    "conv": (3, 12, 12),
    "depthwise": (3, 1, 12),
    "grouped": (3, 4, 12),
    "block": (12, 4),
    "slots": (12, 4),
    "more": (12, 4),
    "along": (3, 1, 1),
}
ODD = np.array([7, 2, 3, 10, 0, 1, 11, 4, 9, 5, 8, 6])


def gated(x, kernel):
    y = x.reshape(12, 12, 1)
    gate = jax.lax.conv_general_dilated(
        y, kernel, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )
    return x * jax.nn.sigmoid(gate.reshape(x.shape))


def recurrent(x, w):
    def step(h, y):
        h = jnp.tanh(y + h @ w)
        return h, h

    return jax.lax.scan(step, x[0], x)[1]


def convolved(x, kernel):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1,),
        "SAME",
        dimension_numbers=("NHC", "HIO", "NHC"),
        feature_group_count=12 // kernel.shape[1],
    )


@settings(max_examples=int(os.environ.get("SDP_JAX_PROGRAMS", "25")), deadline=None)
@given(ops=st.lists(OPS, min_size=1, max_size=6), seed=st.integers(0, 5))
def test_random_programs_keep_the_promise(ops, seed):
    sizes = {"first": (5, 12)}
    for i, op in enumerate(ops):
        if op in KERNELS:
            sizes[f"w{i}"] = KERNELS[op]
    sizes["last"] = (12, 3)

    def fn(p, x):
        x = x @ p["first"]
        for i, op in enumerate(ops):
            w = p.get(f"w{i}")
            if op in ("tanh", "relu", "sigmoid"):
                x = {"tanh": jnp.tanh, "relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid}[
                    op
                ](x)
            elif op in ("scale", "add"):
                x = x * w if op == "scale" else x + w
            elif op == "matmul":
                x = x + jnp.tanh(x @ w)
            elif op == "standardised":
                w = w - w.mean(0)
                x = x + jnp.tanh(x @ (w / jnp.sqrt(1e-3 + jnp.var(w, 0))))
            elif op == "divided":
                x = x / w
            elif op == "table":
                x = x + jnp.sin(jnp.arange(12.0))
            elif op == "loop":
                x = jax.lax.fori_loop(0, 2, lambda i, c: c - c.mean(-1)[..., None], x)
            elif op == "pooled":
                x = x + jax.nn.softmax(x.mean(1)[:, None] - x[:, :1], axis=-1)
            elif op == "concat":
                x = jnp.concatenate([x[..., 6:], x[..., :6]], -1)
            elif op == "slice":
                x = x[..., ::2].repeat(2, axis=-1)
            elif op == "reshape":
                x = x.reshape(3, 4, 3, 4).swapaxes(2, 3).reshape(3, 4, 12)
            elif op == "transpose":
                x = x.swapaxes(0, 1)[:, ::-1].swapaxes(0, 1)
            elif op == "pad":
                x = jnp.pad(x[..., 2:], ((0, 0), (0, 0), (1, 1)))
            elif op == "mean":
                x = x - x.mean(1, keepdims=True)
            elif op == "where":
                x = jnp.where(x > 0, x, 0.1 * x)
            elif op == "flip":
                x = x + x[..., ::-1]
            elif op == "heads":
                h = x.reshape(3, 4, 2, 6)
                a = jax.nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", h, h))
                x = jnp.einsum("bhnm,bmhd->bnhd", a, h).reshape(3, 4, 12)
            elif op == "broadcast":
                x = x * jnp.arange(12.0) + jnp.ones((3, 4, 1))
            elif op in ("conv", "depthwise", "grouped"):
                x = convolved(x, w)
            elif op == "gather":
                x = x[..., np.array([4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10, 11])]
            elif op == "window":
                y = jax.lax.dynamic_slice_in_dim(x, jnp.int32(3) + 1, 4, -1)
                x = jnp.concatenate([y, x[..., 4:]], -1)
            elif op == "layernorm":
                x = (x - x.mean(-1, keepdims=True)) * w / (1 + x.var(-1)[..., None])
            elif op == "groupnorm":
                y = x.reshape(3, 4, 2, 6)
                y = y - y.mean((1, 3), keepdims=True)
                y = y / jnp.sqrt(1e-3 + jnp.var(y, (1, 3), keepdims=True))
                x = y.reshape(3, 4, 12)
            elif op == "softmax":
                x = jax.nn.softmax(x)
            elif op == "largest":
                x = x - x.max(-1, keepdims=True) - jnp.sort(x, 1)
            elif op == "cumsum":
                x = x * jnp.cumsum(x, 1)
            elif op == "split":
                a, b, c = jnp.split(x, 3, -1)
                x = jnp.concatenate([c, a * jax.nn.silu(b), b], -1)
            elif op == "scan":
                x = recurrent(x, w)
            elif op == "jit":
                x = jax.jit(lambda x: x - x.var(-1, keepdims=True))(x + 1)
            elif op == "norms":
                x = x / (1e-3 + jnp.linalg.norm(x, axis=-1, keepdims=True))
            elif op == "shuffle":
                x = x[..., ODD]
            elif op == "block":
                x = x.at[..., 3:7].set(jnp.tanh(x @ w))
            elif op == "slots":
                x = x.at[..., ODD[:4]].set(x @ w)
            elif op == "number":
                x = x.at[..., 5:].set(0.5).at[..., 2].multiply(3.0)
            elif op == "more":
                x = x.at[..., ODD[4:8]].add(x @ w).at[:, 1, :6].add(1.0)
            elif op == "twice":
                x = jnp.zeros_like(x).at[..., ODD].set(x[..., np.r_[:6, :6]])
            elif op == "along":
                x = gated(x, w)
            elif op == "solve":
                x = jnp.linalg.solve(3 * jnp.eye(4) + x @ x.swapaxes(1, 2), x)
        return x @ p["last"]

    with jax.enable_x64(True):
        shapes = {k: jax.ShapeDtypeStruct(s, jnp.float64) for k, s in sizes.items()}
        params, inputs = promise.randomise(shapes), (jnp.asarray(X),)
        promise.check(fn, params, inputs, seeds=(seed,), grads=False)
