"""The promise: the small function is the dense one with the channels zeroed."""

import jax
import jax.numpy as jnp
import numpy as np

import sdp_jax


def randomise(shapes, seed=0, dtype=jnp.float64):
    """Random parameters; running variances and the like stay positive."""
    rng = np.random.default_rng(seed)

    def make(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.ones(leaf.shape, leaf.dtype)
        fan = int(np.prod(leaf.shape[:-1]))
        if fan > 1:
            x = rng.normal(size=leaf.shape) / fan**0.5
        else:
            x = rng.uniform(0.5, 1.5, size=leaf.shape)
        return jnp.asarray(x, leaf.dtype if dtype is None else dtype)

    return jax.tree.map(make, shapes)


def random_cut(groups, share, seed):
    """Cuts a random share of every dimension; at least one channel stays."""
    rng = np.random.default_rng(seed)
    kept = []
    for d in groups:
        count = max(1, round(d.size * (1 - share)))
        kept.append(tuple(sorted(rng.choice(d.size, count, replace=False).tolist())))
    return sdp_jax.Cut(groups, tuple(kept))


def zeroed(cut, params):
    """The dense parameters with the producers of the cut channels at zero."""
    factors = {}
    for d, kept in zip(cut.dense, cut.kept, strict=True):
        line = np.zeros(d.size)
        line[list(kept)] = 1
        factors[d.name] = jnp.asarray(line)
    return sdp_jax.scale_channels(cut.dense, params, factors)


def prunable_share(groups):
    """Share of the entries that are gone when every dimension is cut to a channel."""
    cut = sdp_jax.Cut(groups, tuple((0,) for _ in groups))
    before = sum(np.prod(s) for s in groups.shapes.values())
    after = sum(np.prod(s) for s in cut.groups.shapes.values())
    return 1 - after / before


def close(a, b, rtol):
    a, b = np.asarray(a), np.asarray(b)
    scale = max(np.abs(b).max(initial=0), 1e-3)
    np.testing.assert_allclose(a, b, rtol=0, atol=rtol * scale)


def check(
    fn, params, inputs, *, shares=(0.5,), seeds=(0,), rtol=1e-9, grads=True, join=None
):
    """Checks the promise; returns the groups.

    Args:
      fn: the function.
      params: its parameters, in float64.
      inputs: its other arguments.
      shares: shares of the channels to cut.
      seeds: seeds of the choice.
      rtol: tolerance relative to the largest entry.
      grads: whether to compare gradients as well, at the first share.
      join: if the function returns ``(result, state)``: what puts the state into the
        parameters, so that it can be cut like them.
    """
    groups = sdp_jax.find_groups(fn, params, *inputs)
    assert sdp_jax.Groups.from_json(groups.to_json()) == groups

    def scalar(fn):
        def loss(params):
            outs = jax.tree.leaves(fn(params, *inputs))
            return sum(
                jnp.sum(jnp.sin(1 + o)) for o in outs if jnp.issubdtype(o.dtype, float)
            )

        return loss

    for share in shares:
        for seed in seeds:
            cut = random_cut(groups, share, seed)
            dense = zeroed(cut, params)
            small = cut.take(dense)
            narrowed = sdp_jax.narrow(fn, cut)
            expected = jax.jit(fn)(dense, *inputs)
            found = jax.jit(narrowed)(small, *inputs)
            if join is not None:
                expected = expected[0], cut.take(join(dense, expected[1]))
                found = found[0], join(small, found[1])
            assert jax.tree.structure(found) == jax.tree.structure(expected)
            for a, b in zip(
                jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
            ):
                assert a.dtype == b.dtype
                close(a, b, rtol)
            if grads and share == shares[0]:
                slope = jax.jit(jax.grad(scalar(fn), allow_int=True))(dense)
                expected = cut.take(slope)
                slope = jax.jit(jax.grad(scalar(narrowed), allow_int=True))
                for a, b in zip(
                    jax.tree.leaves(slope(small)),
                    jax.tree.leaves(expected),
                    strict=True,
                ):
                    if jnp.issubdtype(a.dtype, jnp.inexact):
                        close(a, b, 100 * rtol)
    return groups
