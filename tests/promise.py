"""The promise: the small function is the dense one with the channels zeroed."""

import jax
import jax.numpy as jnp
import numpy as np

import sdp_jax
from sdp_jax.tree import leaf_table


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
    """Cuts a random share of every dimension; a third of those that can vanishes."""
    rng = np.random.default_rng(seed)
    kept = []
    for d in groups:
        if d.removable and rng.random() < 1 / 3:
            kept.append(())
            continue
        count = max(1, round(d.size * (1 - share)))
        kept.append(tuple(sorted(rng.choice(d.size, count, replace=False).tolist())))
    return sdp_jax.Cut(groups, tuple(kept))


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
    fn,
    params,
    inputs,
    *,
    shares=(0.5,),
    seeds=(0,),
    rtol=1e-9,
    grads=True,
    join=None,
    **where,
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
      **where: which inputs and outputs have channels, as `find_groups` takes it.
    """
    groups = sdp_jax.find_groups(fn, params, *inputs, **where)
    assert sdp_jax.Groups.from_json(groups.to_json()) == groups

    def both(fn):
        """The result, and the slope of a number that it makes: compiled as one."""

        def loss(params, inputs):
            result = fn(params, *inputs)
            outs = jax.tree.leaves(result)
            value = sum(
                jnp.sum(jnp.sin(1 + o)) for o in outs if jnp.issubdtype(o.dtype, float)
            )
            return value, result

        return jax.jit(jax.grad(loss, has_aux=True, allow_int=True))

    def alone(fn):
        compiled = jax.jit(fn)
        return lambda params, inputs: (None, compiled(params, *inputs))

    dense_fn = both(fn) if grads else alone(fn)
    for share in shares:
        for seed in seeds:
            cut = random_cut(groups, share, seed)
            dense = jax.jit(cut.zero)(params)
            take = jax.jit(cut.take)
            small = take(dense)
            narrowed = sdp_jax.narrow(fn, cut)
            small_fn = both if grads and share == shares[0] else alone
            expected_slope, expected = dense_fn(dense, cut.zero_inputs(*inputs))
            slope, found = small_fn(narrowed)(small, cut.take_inputs(*inputs))
            if join is not None:
                expected = expected[0], take(join(dense, expected[1]))
                found = found[0], join(small, found[1])
            assert jax.tree.structure(found) == jax.tree.structure(expected)
            for a, (path, b) in zip(
                jax.tree.leaves(found), leaf_table(expected).items(), strict=True
            ):
                b = cut.take_output(path, b) if join is None else b
                assert a.dtype == b.dtype
                close(a, b, rtol)
            if grads and share == shares[0]:
                # The slopes of integers have no values.
                expected_slope = take(
                    jax.tree.map(
                        lambda g, p: g if jnp.issubdtype(g.dtype, jnp.inexact) else p,
                        expected_slope,
                        dense,
                    )
                )
                for a, b in zip(
                    jax.tree.leaves(slope), jax.tree.leaves(expected_slope), strict=True
                ):
                    if jnp.issubdtype(a.dtype, jnp.inexact):
                        close(a, b, 100 * rtol)
    return groups
