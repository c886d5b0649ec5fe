"""Groups found in functions, and functions narrowed by them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import sdp_jax
from tests import promise, toy

X = np.random.default_rng(0).normal(size=(3, 4, 5))


def shapes(**sizes):
    return {k: jax.ShapeDtypeStruct(s, jnp.float64) for k, s in sizes.items()}


def check(fn, sizes, *inputs, **kwargs):
    params = promise.randomise(shapes(**sizes))
    inputs = tuple(map(jnp.asarray, inputs or (X,)))
    return promise.check(fn, params, inputs, **kwargs)


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(
    lambda x: (x, None),
    lambda _, g: (g / (1 + jnp.linalg.norm(g, axis=-1, keepdims=True)),),
)


@jax.custom_jvp
def centred(x):
    return x


centred.defjvp(lambda p, t: (p[0], t[0] - t[0].mean(-1, keepdims=True)))


def depthwise(x, kernel):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1,),
        "SAME",
        dimension_numbers=("NHC", "HIO", "NHC"),
        feature_group_count=x.shape[-1],
    )


def looked_at(p, x):
    x = jnp.tanh(x @ p["a"])
    jax.debug.callback(lambda x: None, x)
    return x @ p["b"]


# name: function, parameters, sizes of the dimensions that must be found
MLP = {"a": (5, 8), "b": (8, 3)}
PROGRAMS = {
    "tanh": (lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], MLP, {"a": 8}),
    # The consumer of a channel that does not become zero is zeroed instead.
    "sigmoid": (lambda p, x: jax.nn.sigmoid(x @ p["a"]) @ p["b"], MLP, {"a": 8}),
    "softmax over channels": (
        lambda p, x: jax.nn.softmax(x @ p["a"]) @ p["b"],
        MLP,
        {"a": 8},
    ),
    "smallest of the channels": (
        lambda p, x: (1 + jnp.exp(x @ p["a"])).min((-1, 0))[:, None] * p["b"].sum(),
        MLP,
        {"a": 8, "b": 8, "b[1]": 3},
    ),
    "mean over channels": (
        lambda p, x: (x @ p["a"]).mean(-1) * p["b"].sum(),
        MLP,
        {"a": 8, "b": 8, "b[1]": 3},
    ),
    "variance in two passes": (
        lambda p, x: jnp.var(x @ p["a"], axis=-1) + p["b"].sum(),
        MLP,
        {"a": 8, "b": 8, "b[1]": 3},
    ),
    "normalised in two passes": (
        lambda p, x: (
            jax.nn.tanh(
                (lambda y: (y - y.mean(-1, keepdims=True)) / y.std(-1)[..., None])(
                    x @ p["a"]
                )
            )
            @ p["b"]
        ),
        MLP,
        {"a": 8},
    ),
    "groups normalised in two passes": (
        lambda p, x: (
            (lambda y: (y - y.mean((0, 3), keepdims=True)) * y.var((0, 3))[:, :, None])(
                (x @ p["a"]).reshape(3, 4, 2, 4)
            ).reshape(3, 4, 8)
            @ p["b"]
        ),
        MLP,
        {"a": 4, "a[1]": 2},
    ),
    "groups flattened with positions": (
        lambda p, x: (
            (lambda y: (y - y.mean(-1, keepdims=True)) / y.std(-1, keepdims=True))(
                (x @ p["a"]).swapaxes(1, 2).reshape(3, 2, 16)
            )
            .reshape(3, 8, 4)
            .swapaxes(1, 2)
            @ p["b"]
        ),
        MLP,
        # A whole group without a channel has no deviation to divide by.
        {"a": 4},
    ),
    "largest of normalised groups": (
        lambda p, x: (
            (lambda y: y - y.mean(-1, keepdims=True))((x @ p["a"]).reshape(3, 4, 2, 4))
            .reshape(3, 4, 8)
            .max(-1)
            * p["b"].sum()
        ),
        MLP,
        {"a": 2, "b": 8, "b[1]": 3},
    ),
    "vmapped convolution": (
        lambda p, x: jax.vmap(depthwise, (None, 0))(x, p["k"]).sum(0) @ p["a"] @ p["b"],
        MLP | {"k": (3, 3, 1, 5)},
        {"k": 3, "a": 8},
    ),
    "read column by column": (
        lambda p, x: (
            jnp.reshape(x[0] @ p["a"], (4, 2, 4), order="F").sum(1) @ p["c"] @ p["b"]
        ),
        MLP | {"c": (4, 8)},
        {"a": 2, "a[1]": 4, "c": 8},
    ),
    "a branch that is never taken": (
        lambda p, x: (
            (
                lambda y: jnp.square(
                    jax.lax.select_n(
                        jnp.bool_(False),
                        y - y.mean(-1, keepdims=True),
                        y + jnp.arange(8.0),
                    )
                ).sum(-1)
            )(x @ p["a"])
            * p["b"].sum()
        ),
        MLP,
        {"a": 8, "b": 8, "b[1]": 3},
    ),
    "nothing in a parameter": (
        lambda p, x: x @ p["a"] @ p["b"] + p["e"].sum(),
        MLP | {"e": (0, 8)},
        {"a": 8},
    ),
    "a table that two layers share": (
        lambda p, x: (
            (lambda table: jnp.tanh((x @ p["a"]) * table) @ p["c"] * table)(
                jnp.cos(jnp.arange(8.0)) * jnp.ones((3, 4, 1))
            )
            @ p["b"]
        ),
        MLP | {"c": (8, 8)},
        {"a": 8, "c": 8},
    ),
    "sum of what differs": (
        lambda p, x: (jnp.arange(8.0) + x @ p["a"]).sum(-1) * p["b"].sum(),
        MLP,
        {"a": 8, "b": 8, "b[1]": 3},
    ),
    "sum of what came through a loop": (
        lambda p, x: (
            jax.lax.fori_loop(0, 2, lambda i, h: h + 1.0, x @ p["a"]).sum(-1)
            * p["b"].sum()
        ),
        MLP,
        {"a": 8, "b": 8, "b[1]": 3},
    ),
    "sum of what came through a loop of unknown length": (
        lambda p, x: (
            jax.lax.fori_loop(
                0, jnp.argmax(x[0, 0]), lambda i, h: h + 1.0, x @ p["a"]
            ).sum(-1)
            * p["b"].sum()
        ),
        MLP,
        {"b": 8, "b[1]": 3},
    ),
    "log of a channel": (lambda p, x: jnp.log(jnp.abs(x @ p["a"])) @ p["b"], MLP, {}),
    "division by a channel": (
        lambda p, x: (x @ p["c"] / (x @ p["a"])) @ p["b"],
        MLP | {"c": (5, 8)},
        {},
    ),
    "dropout": (
        lambda p, x: (
            jnp.where(
                jax.random.bernoulli(jax.random.key(0), 0.5, (3, 4, 8)), x @ p["a"], 0
            )
            @ p["b"]
        ),
        MLP,
        {"a": 8},
    ),
    "padded shortcut": (
        lambda p, x: (
            (jnp.pad(x @ p["a"], ((0, 0), (0, 0), (2, 3))) + x @ p["c"]) @ p["d"]
        ),
        {"a": (5, 8), "c": (5, 13), "d": (13, 3)},
        {"c": 8, "c[1]": 2, "c[1]#2": 3},
    ),
    "low-rank update": (
        lambda p, x: jnp.tanh(x @ (p["a"] + p["u"] @ p["v"])) @ p["b"],
        MLP | {"u": (5, 4), "v": (4, 8)},
        {"a": 8, "u": 4},
    ),
    "embedding": (
        lambda p, x: jnp.tanh(p["e"][jnp.array([1, 0, 2])] @ p["a"]) @ p["b"],
        {"e": (6, 5), "a": (5, 8), "b": (8, 3)},
        {"e": 5, "a": 8},
    ),
    "branches": (
        lambda p, x: (
            jax.lax.cond(x[0, 0, 0] > 0, jnp.tanh, jax.checkpoint(jnp.sin), x @ p["a"])
            @ p["b"]
        ),
        MLP,
        {"a": 8},
    ),
    "loop": (
        lambda p, x: (
            jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"]), x @ p["a"])
            @ p["b"]
        ),
        MLP | {"w": (8, 8)},
        {"w": 8},
    ),
    "write in place": (
        lambda p, x: jnp.zeros((6, 4, 8)).at[1:4].set(x @ p["a"]) @ p["b"],
        MLP,
        {"a": 8},
    ),
    "shuffled by index": (
        lambda p, x: (x @ p["a"])[..., np.arange(8).reshape(2, 4).T.ravel()] @ p["b"],
        MLP,
        {"a": 8},
    ),
    "some of them twice": (
        lambda p, x: (
            jnp.take((x @ p["a"]), jnp.array([-2, -1, 0, 1, 0, 1]), -1) @ p["d"]
        ),
        {"a": (5, 8), "d": (6, 3)},
        {"a": 2, "a[1]": 4, "a[1]#2": 2},
    ),
    "a table of channels": (
        lambda p, x: (
            jnp.tanh(x @ p["a"])[..., jnp.arange(8).reshape(2, 4)].sum(-2) @ p["d"]
        ),
        {"a": (5, 8), "d": (4, 3)},
        {"a": 4, "a[1]": 2},
    ),
    "a slice at a known number": (
        lambda p, x: (
            jax.lax.dynamic_slice_in_dim(x @ p["a"], 1 + jnp.int32(1), 4, -1) @ p["d"]
        ),
        {"a": (5, 8), "d": (4, 3)},
        {"a": 2, "a[1]": 4, "a[1]#2": 2},
    ),
    "a window by index": (
        lambda p, x: (
            jax.vmap(lambda i, x: jax.lax.dynamic_slice_in_dim(x, i, 4, -1), (None, 0))(
                jnp.int32(3), x @ p["a"]
            )
            @ p["d"]
        ),
        {"a": (5, 8), "d": (4, 3)},
        {"a": 4, "a[1]": 4},
    ),
    "mirrored padding": (
        lambda p, x: jnp.pad(x @ p["a"], ((0, 0),) * 2 + ((2, 2),), "reflect") @ p["d"],
        {"a": (5, 8), "d": (12, 3)},
        {"a": 4, "a[1]": 2, "a[1]#2": 2},
    ),
    "sort of the rest": (
        lambda p, x: jnp.sort(x @ p["a"], axis=1) @ p["b"],
        MLP,
        {"a": 8},
    ),
    "transform of the rest": (
        lambda p, x: jnp.fft.fft(x.swapaxes(1, 2) @ p["a"], axis=1).real @ p["b"],
        {"a": (4, 8), "b": (8, 3)},
        {"a": 8},
    ),
    "features written in turns": (
        lambda p, x: (
            jnp.zeros((3, 4, 16))
            .at[..., ::2]
            .set(jnp.sin(x @ p["a"]))
            .at[..., 1::2]
            .set(jnp.cos(x @ p["a"]))
            @ p["d"]
        ),
        {"a": (5, 8), "d": (16, 3)},
        None,
    ),
    "rows written by index": (
        lambda p, x: (
            jnp.ones((3, 4, 9)).at[..., jnp.arange(8)].set(jnp.tanh(x @ p["a"]))
            @ p["d"]
        ),
        {"a": (5, 8), "d": (9, 3)},
        None,
    ),
    "rows multiplied by index": (
        lambda p, x: (
            jnp.ones((3, 4, 3))
            .at[..., jnp.arange(8) % 3]
            .multiply(jnp.tanh(x @ p["a"]))
        ),
        {"a": (5, 8)},
        None,
    ),
    "segments of channels": (
        lambda p, x: jax.ops.segment_sum(
            jnp.exp(x @ p["a"]).mean((0, 1)), jnp.arange(8) % 3, 3
        ),
        {"a": (5, 8)},
        None,
    ),
    "angles": (
        lambda p, x: jnp.arctan2(jnp.tanh(x @ p["a"]), -jnp.ones(8)) @ p["b"],
        MLP,
        {"a": 8},
    ),
    "running logsumexp": (
        lambda p, x: jax.lax.cumlogsumexp(x @ p["a"], axis=1) @ p["b"],
        MLP,
        {"a": 8},
    ),
    "lookups outside": (
        lambda p, x: (
            jnp.tanh(p["a"]).at[jnp.array([7, 1])].get(mode="fill", fill_value=1.0)
            @ p["b"]
        ),
        MLP,
        {"b": 8},
    ),
    "parameter carried by a loop": (
        lambda p, x: (lambda c: jnp.exp(x @ p["a"] + c) @ p["b"] + c.sum())(
            jax.lax.scan(lambda c, _: (p["w"], None), jnp.zeros(8), None, length=3)[0]
        ),
        MLP | {"w": (8,)},
        None,
    ),
    "power of two": (lambda p, x: jnp.power(2.0, x @ p["a"]) @ p["b"], MLP, {"a": 8}),
    "tile and stack": (
        lambda p, x: (
            jnp.stack(
                [
                    jnp.tile(jnp.tanh(x @ p["a"]), (1, 1, 2)),
                    jnp.tile(x[:, :, :1], (1, 1, 16)),
                ]
            )
            @ p["d"]
        ),
        {"a": (5, 8), "d": (16, 3)},
        {"a": 8},
    ),
    "clipped gradient": (
        lambda p, x: clipped(jnp.tanh(x @ p["a"])) @ p["b"],
        MLP,
        {},
    ),
    "centred tangent": (
        lambda p, x: centred(jnp.tanh(x @ p["a"])) @ p["b"],
        MLP,
        None,
    ),
    "halves, one of which may go": (
        lambda p, x: (
            jnp.concatenate(
                [
                    depthwise(x @ p["a"][:, :4], p["k"][..., :4]),
                    depthwise(x @ p["a"][:, 4:], p["k"][..., 4:]),
                ],
                -1,
            )
            @ p["b"]
        ),
        MLP | {"k": (3, 1, 8)},
        None,
    ),
    "as many heads as dimensions of a head": (
        lambda p, x: (
            jnp.tanh((x @ p["a"]).reshape(3, 4, 4, 4)).reshape(3, 4, 16) @ p["b"]
        ),
        {"a": (5, 16), "b": (16, 2)},
        {"a": 4, "a[1]": 4},
    ),
    "heads, with gates of their own in one projection": (
        lambda p, x: (
            (
                (x @ p["a"])[..., :6].reshape(3, 4, 2, 3)
                * jax.nn.softplus((x @ p["a"])[..., 6:] + p["s"])[..., None]
            ).reshape(3, 4, 6)
            @ p["b"]
        ),
        {"a": (5, 8), "s": (2,), "b": (6, 2)},
        {"a": 3, "a[1]": 2},
    ),
    "a look inside": (looked_at, MLP, {"a": 8}),
    "running sum": (lambda p, x: jnp.cumsum(x @ p["a"], -1) @ p["b"], MLP, {"a": 8}),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_keep_the_promise(name, x64):
    fn, sizes, expected = PROGRAMS[name]
    groups = check(
        fn,
        sizes,
        shares=(0.5, 0.99),
        grads="loop" not in name and "multiplied" not in name,
    )
    if expected is not None:
        assert groups.sizes == expected


def test_running_statistics_of_one_name_do_not_tie_layers_together(x64):
    def fn(p, x):
        out, new = x @ p["in"], {}
        for name in ("norm1", "norm2"):
            y = jnp.tanh(out @ p[name]["kernel"])
            new[name] = {"mean": y.mean((0, 1))}
            out = (y - new[name]["mean"]) * p[name]["scale"]
        return out @ p["out"], new

    layer = {"kernel": (8, 8), "scale": (8,), "mean": (8,)}
    tree = {"in": (5, 8), "norm1": layer, "norm2": layer, "out": (8, 2)}
    params = promise.randomise(
        jax.tree.map(
            lambda size: jax.ShapeDtypeStruct(size, jnp.float64),
            tree,
            is_leaf=lambda x: isinstance(x, tuple),
        )
    )
    groups = sdp_jax.find_groups(fn, params, X)
    assert sorted(groups.sizes.values()) == [8, 8, 8]


def test_what_is_no_array_is_passed_as_it_is(x64):
    def fn(params, x, times, kind, train):
        assert train is False and kind == "sum"
        return jnp.concatenate([x @ params["a"]] * times) @ params["b"]

    x = jnp.ones((2, 5))
    params = promise.randomise(shapes(**MLP))
    more = (3, "sum", False)
    groups = sdp_jax.find_groups(fn, params, x, *more)
    cut = promise.random_cut(groups, 0.5, 0)
    small = jax.jit(sdp_jax.narrow(fn, cut), static_argnums=(2, 3, 4))
    zeroed = cut.zero(params)
    found = small(cut.take(zeroed), x, *more)
    promise.close(found, fn(zeroed, x, *more), 1e-12)
    again = sdp_jax.plan_cut(
        groups,
        params,
        scores=sdp_jax.channel_norms(groups, params),
        sparsity=0.5,
        target="flops",
    )
    assert again.widths["a"] <= 4


def test_what_is_not_used_is_no_channel(x64):
    """A table of positions that is longer than the inputs of the trace."""

    def fn(params, x):
        return (jnp.tanh(x @ params["a"]) + params["e"][: x.shape[1]]) @ params["b"]

    params = shapes(**MLP, e=(16, 8), never=(4, 4))
    groups = sdp_jax.find_groups(fn, params, X)
    assert groups.sizes == {"e": 8}
    told = {(f.path, f.axis): (f.positions, f.reasons) for f in groups.frozen}
    assert told["never", 0][1] == ("is not used by the function at these input shapes",)
    assert told["e", 0][0] == 16
    cut = promise.random_cut(groups, 0.5, 0)
    dense = cut.zero(promise.randomise(params))
    longer = jnp.asarray(np.random.default_rng(1).normal(size=(2, 9, 5)))
    small = sdp_jax.narrow(fn, cut)(cut.take(dense), longer)
    promise.close(small, fn(dense, longer), 1e-12)


def test_frozen_axes_say_why_and_where(x64):
    def fn(params, x):
        x = jnp.tanh(x @ params["a"])
        return jnp.sort(x) @ params["b"]

    groups = sdp_jax.find_groups(fn, shapes(**MLP), X)
    told = {(f.path, f.axis): f for f in groups.frozen}
    reason = " ".join(told["a", 1].reasons)
    assert "sort: compares all channels" in reason
    assert f"{__file__}:" in reason
    assert told["b", 1].reasons == ("output: is an output of the function",)
    assert reason in groups.summary() or told["a", 1].reasons[0] in groups.summary()


def test_unknown_primitives_freeze_what_they_touch(x64):
    def fn(p, x):
        y = jnp.tanh(x @ p["a"]) @ p["b"]
        square = jnp.zeros((3, 4, 4))
        return jax.lax.linalg.symmetric_product(y, square) @ p["c"]

    groups = check(fn, MLP | {"c": (4, 2)}, grads=False)
    assert groups.sizes == {"a": 8}
    told = {(f.path, f.axis): f.reasons for f in groups.frozen}
    assert any("no rule for this primitive" in r for r in told["b", 1])


def test_channels_stay_by_the_leaf_that_makes_them_or_with_one_that_reads_them():
    fn, sizes, _ = PROGRAMS["tanh"]

    def find(**kw):
        return sdp_jax.find_groups(fn, shapes(**sizes), X, **kw)

    assert find(ignore=["b*"]).sizes == {"a": 8}  # b reads them
    for kw, why in (
        ({"ignore": ["a"]}, "ignore: its channels were asked to stay"),
        ({"whole": ["b*"]}, "whole: was asked to stay whole"),
    ):
        groups = find(**kw)
        assert not len(groups)
        assert why in next(f for f in groups.frozen if f.path == "a" and f.axis).reasons


def test_inputs_and_outputs_can_be_pruned_on_demand(x64):
    fn, sizes, _ = PROGRAMS["tanh"]
    params = promise.randomise(shapes(**sizes))
    groups = sdp_jax.find_groups(fn, params, X, prune_inputs=True, prune_outputs=True)
    assert groups.sizes == {"a": 5, "a[1]": 8, "b": 3}
    cut = sdp_jax.Cut(groups, ((0, 2), (1, 2, 7), (0, 2)))
    dense = cut.zero(params)
    small = sdp_jax.narrow(fn, cut)(cut.take(dense), X)
    promise.close(small, fn(dense, X)[..., [0, 2]], 1e-12)


def test_training_with_found_groups_prunes_heads_and_their_dimensions():
    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8)(x)
            return nn.Dense(2)((x + nn.MultiHeadDotProductAttention(4)(x, x)).mean(1))

    net, x = Attention(), jnp.asarray(X, jnp.float32)
    params = net.init(jax.random.key(0), x)
    groups = sdp_jax.find_groups(net.apply, params, x)
    heads = [d for d in groups if len([m for m in d.members if m.axis == 1]) >= 3]
    assert heads
    tx = sdp_jax.altsdp(0.1, groups, strength=sdp_jax.target_sparsity(0.5, 0, 20))
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean((net.apply(p, x) - 1) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(25):
        params, state = step(params, state)
    cut = sdp_jax.plan_cut(groups, params)
    assert sum(cut.widths.values()) <= round(0.5 * groups.num_channels)
    small = sdp_jax.narrow(net.apply, cut)(cut.take(params), x)
    np.testing.assert_allclose(small, net.apply(params, x), atol=1e-5)


BAD = {
    "functions that do not trace": (
        lambda: sdp_jax.find_groups(
            lambda p, x: p["w"][int(x)], {"w": jnp.ones(3)}, jnp.float32(1.0)
        ),
        jax.errors.ConcretizationTypeError,
        "must not depend on the values of arrays",
    ),
    "inputs of the wrong rank": (
        lambda: sdp_jax.find_groups(
            PROGRAMS["tanh"][0], shapes(**MLP), jnp.ones((4, 6))
        ),
        TypeError,
        r"2 leaves of parameters and arrays of the shapes \(4, 6\)",
    ),
    "parameters of another model": (
        lambda: sdp_jax.find_groups(
            PROGRAMS["tanh"][0], {"c": jnp.ones(3)}, jnp.ones((4, 5))
        ),
        KeyError,
        "must be the parameters as the function takes them",
    ),
    "a pattern that is no sequence": (
        lambda: sdp_jax.find_groups(
            PROGRAMS["tanh"][0], shapes(**MLP), jnp.ones((4, 5)), ignore="a*"
        ),
        TypeError,
        "must be a sequence of patterns",
    ),
    "a pattern of nothing": (
        lambda: sdp_jax.find_groups(
            PROGRAMS["tanh"][0], shapes(**MLP), jnp.ones((4, 5)), ignore=["z*"]
        ),
        ValueError,
        "matches none of the leaves; there are, for example, .*'a'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case, x64):
    act, error, message = BAD[case]
    with pytest.raises(error) as caught:
        act()
    told = " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert re.search(message, told)


def test_toy_groups_found_are_those_written_by_hand():
    params = toy.mlp_params()
    x, _ = toy.batch()
    found = sdp_jax.find_groups(toy.mlp_apply, params, x)

    def members(groups):
        return {
            frozenset(
                (m.path, m.axis, m.role, m.outer, m.inner, m.offset) for m in d.members
            )
            for d in groups
        }

    assert members(found) == members(toy.mlp_groups(params))
