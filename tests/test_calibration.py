"""Activations where any function reads them, against what is taken down by hand."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sdp_jax
from tests import promise, toy, zoo
from tests.seen import check, inputs_of, statistics
from tests.zoo_linen import ResNeXt, Vgg, ViT

IMAGES = np.random.default_rng(5).normal(1, 2, (5, 8, 8, 3))
SIZES = [IMAGES[:3], IMAGES[3:]]  # Two batches of different sizes.


def run(fn, params, batches, **options):
    first = batches[0] if isinstance(batches[0], tuple) else (batches[0],)
    groups = sdp_jax.find_groups(fn, params, *first)
    return groups, sdp_jax.channel_activations(groups, fn, params, batches, **options)


def linen(module, dtype=jnp.float64):
    x = jnp.asarray(IMAGES[:1], dtype)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x))
    variables = promise.randomise(shapes, dtype=dtype)
    batches = [jnp.asarray(part, dtype) for part in SIZES]
    groups, found = run(module.apply, variables, batches)
    whole = jnp.asarray(IMAGES, dtype)
    return variables, groups, found, inputs_of(module, variables, whole)


def by_kernel(found):
    return {r.kernel.path: r for r in found.readings if r.kernel}


def test_convolutions_with_batch_normalisation(x64):
    variables, groups, found, taken = linen(Vgg())
    readings = by_kernel(found)
    assert len(readings) == len(found.readings) == 3
    for name in ("Conv_1", "Dense_0", "Dense_1"):
        reading = readings[f"params/{name}/kernel"]
        check(reading.moments, taken[name][0])
        kernel = np.asarray(variables["params"][name]["kernel"])
        kernel = abs(kernel.reshape(-1, *kernel.shape[-2:])).sum((0, 2))
        np.testing.assert_allclose(reading.weights.magnitude, kernel)
        assert reading.kernel.bias == f"params/{name}/bias"
    # The image behind a channel is flattened; all of it is the channel's.
    flat = taken["Dense_0"][0].reshape(-1, groups["Conv_1"].size)
    own = groups.owner == list(groups.sizes).index("Conv_1")
    check(found.moments, flat, where=own)


@pytest.mark.parametrize("fused", [False, True])
def test_transformer_with_heads(x64, fused):
    variables, groups, found, taken = linen(ViT(fused))
    readings = by_kernel(found)
    for path, reading in readings.items():
        name = path.split("/", 1)[1].removesuffix("/kernel")
        values = taken[name][0]
        if name.endswith("/out"):
            assert reading.moments.mean.shape == (3, 4)
            values = values.reshape(*values.shape[:-2], -1)
            check(Flat(reading.moments), values)
        else:
            check(reading.moments, values)
    if fused:
        return
    attention = "MultiHeadDotProductAttention_0"
    # Queries and keys meet each other: the scale is part of the query.
    met = [r for r in found.readings if r.kernel is None]
    assert len(met) == 4 and all(r.weights is None for r in met)
    query, key = (taken[f"{attention}/{k}"][1] for k in ("query", "key"))
    check(met[0].moments, query / 2)
    check(met[1].moments, key)
    heads = taken[f"{attention}/out"][0]
    (name,) = [d.name for d in groups if d.size == 3 and f"{attention}" in d.name][:1]
    own = groups.owner == list(groups.sizes).index(name)
    check(found.moments, heads, axis=-2, where=own)


class Flat:
    """Statistics along one axis."""

    def __init__(self, moments):
        for name in moments._fields:
            setattr(self, name, getattr(moments, name).reshape(-1))


def test_layers_stacked_in_a_loop_have_statistics_of_their_own(x64):
    model = zoo.ZOO["stacked"]()
    params = promise.randomise(model.shapes)
    rng = np.random.default_rng(0)
    batches = [jnp.asarray(rng.normal(size=(n, 6, 5))) for n in (2, 3)]
    _, found = run(model.fn, params, batches)
    p = jax.tree.map(np.asarray, params)
    x = np.concatenate(batches) @ p["in"]
    readings = by_kernel(found)
    for layer in range(3):
        check(readings["up"].moments, x, where=layer)
        h = np.tanh(x @ p["up"][layer])
        check(readings["down"].moments, h, where=layer)
        x = x + h @ p["down"][layer]
    check(readings["out"].moments, x)
    np.testing.assert_allclose(readings["down"].weights.square, (p["down"] ** 2).sum(2))


def test_layers_may_be_gone_through_backwards(x64):
    rng = np.random.default_rng(7)
    params = {"in": jnp.asarray(rng.normal(size=(4, 3)))}
    params["w"] = jnp.asarray(rng.normal(size=(2, 3, 3)))
    x = rng.normal(size=(5, 4))

    def fn(params, x):
        layers, start = params["w"], x @ params["in"]
        step = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        return jax.lax.scan(step, start, layers, reverse=True)[0].sum()

    _, found = run(fn, params, [jnp.asarray(x)])
    x = x @ np.asarray(params["in"])
    moments = by_kernel(found)["w"].moments
    for layer in (1, 0):
        check(moments, x, where=layer)
        x = np.tanh(x @ np.asarray(params["w"][layer]))


def test_loops_over_time_are_averaged_over(x64):
    rng = np.random.default_rng(3)
    params = {"in": rng.normal(size=(4, 6)), "hidden": rng.normal(size=(6, 6)) / 3}
    params = jax.tree.map(jnp.asarray, params | {"out": rng.normal(size=(6, 2))})
    x = rng.normal(size=(3, 7, 4))

    def rnn(params, x):
        def step(h, x):
            h = jnp.tanh(x @ params["in"] + h @ params["hidden"])
            return h, None

        start = jnp.zeros((x.shape[0], 6))
        return jax.lax.scan(step, start, x.swapaxes(0, 1))[0] @ params["out"]

    _, found = run(rnn, params, [jnp.asarray(x)])
    h, states = np.zeros((3, 6)), []
    for t in range(7):
        states.append(h)
        h = np.tanh(
            x[:, t] @ np.asarray(params["in"]) + h @ np.asarray(params["hidden"])
        )
    readings = by_kernel(found)
    check(readings["hidden"].moments, np.stack(states))
    check(readings["out"].moments, h)
    want = abs(np.asarray(params["hidden"])).sum(1)
    np.testing.assert_allclose(readings["hidden"].weights.magnitude, want)


def mlp(params, x, wrap=lambda f: f):
    inner = wrap(lambda h: jnp.tanh(h) @ params["out"])
    return inner(x @ params["in"])


@jax.custom_vjp
def read(h, w):
    return jnp.tanh(h) @ w


read.defvjp(lambda h, w: (read(h, w), (h, w)), lambda r, c: (c @ r[1].T, r[0].T @ c))


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: mlp(p, x, jax.jit),
        lambda p, x: mlp(p, x, jax.checkpoint),
        lambda p, x: mlp(p, x, lambda f: jax.jit(jax.checkpoint(f))),
        lambda p, x: read(x @ p["in"], p["out"]),
        lambda p, x: jax.vmap(lambda x: mlp(p, x))(x),
        lambda p, x: jax.lax.map(lambda x: mlp(p, x), x),
        lambda p, x: jax.lax.cond(
            x.sum() > -1e9, mlp, lambda p, x: 0 * mlp(p, x), p, x
        ),
        lambda p, x: jax.lax.while_loop(
            lambda s: s[0] < 1,
            lambda s: (s[0] + 1, mlp(p, x)),
            (0, jnp.zeros((x.shape[0], 3))),
        )[1],
        lambda p, x: jnp.einsum("hk,bh->bk", p["out"], jnp.tanh(x @ p["in"])),
    ],
    ids="jit remat both custom_vjp vmap map cond while einsum".split(),
)
def test_wherever_it_is_read(x64, fn):
    rng = np.random.default_rng(4)
    params = {"in": rng.normal(size=(5, 4)), "out": rng.normal(size=(4, 3))}
    params, x = jax.tree.map(jnp.asarray, params), rng.normal(size=(6, 5))
    _, found = run(fn, params, [jnp.asarray(x[:4]), jnp.asarray(x[4:])])
    check(found.moments, np.tanh(x @ np.asarray(params["in"])))


def test_a_branch_counts_when_it_is_taken(x64):
    params = jax.tree.map(jnp.asarray, {"in": np.eye(2) * 2, "out": np.ones((2, 3))})

    def fn(params, x):
        h = x @ params["in"]
        return jax.lax.cond(
            x.sum() > 0, lambda h: h @ params["out"], lambda h: jnp.zeros((1, 3)), h
        )

    up, down = jnp.array([[1.0, 2.0]]), jnp.array([[-1.0, -5.0]])
    groups, found = run(fn, params, [down, up, up])
    np.testing.assert_array_equal(found.moments.count, [2, 2])
    np.testing.assert_array_equal(found.moments.mean, [2, 4])
    np.testing.assert_array_equal(found.readings[0].weights.magnitude, [3, 3])
    both = jnp.concatenate([down, up])
    found = sdp_jax.channel_activations(groups, fn, params, [both], per_example=True)
    np.testing.assert_array_equal(found.examples.count, [[0, 0], [1, 1]])
    np.testing.assert_array_equal(found.moments.mean, [2, 4])
    np.testing.assert_array_equal(found.readings[0].weights.square, [3, 3])
    with pytest.raises(ValueError, match="no batch has reached what reads .*'in'"):
        sdp_jax.channel_activations(groups, fn, params, [down])


def test_half_precision_is_summed_in_float32():
    params = {"in": jnp.ones((1, 2), jnp.bfloat16), "out": jnp.ones((2, 1))}
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    x = jnp.asarray(np.random.default_rng(0).normal(100, 1, (4096, 1)), jnp.bfloat16)
    fn = lambda p, x: x @ p["in"] @ p["out"]  # noqa: E731
    _, found = run(fn, params, [x])
    check(found.moments, np.repeat(np.asarray(x, np.float64), 2, 1), rtol=1e-4)


def test_a_large_mean_does_not_drown_the_variance():
    params = {"in": jnp.ones((1, 2)), "out": jnp.ones((2, 1))}
    x = np.random.default_rng(0).normal(1000, 0.1, (300, 1)).astype(np.float32)
    fn = lambda p, x: x @ p["in"] @ p["out"]  # noqa: E731
    _, found = run(fn, params, [jnp.asarray(x[:100]), jnp.asarray(x[100:])])
    np.testing.assert_allclose(found.moments.variance, x.astype(float).var(), rtol=1e-3)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_inputs(kind):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType[kind],) * 2)

    def place(x, *axes):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    params = toy.mlp_params(widths=(4, 8, 8, 3))
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    groups, plain = run(toy.mlp_apply, params, [jnp.asarray(x)])
    spread = jax.tree.map(
        lambda leaf: (
            place(leaf, None, "model")
            if leaf.ndim == 2 and leaf.shape[1] == 8
            else place(leaf)
        ),
        params,
    )
    with jax.set_mesh(mesh):
        fn = toy.mlp_apply
        if kind == "Explicit":
            # The contracted axis may not be split: the function gathers it.
            def fn(p, x):
                whole = jax.tree.map(
                    lambda w: jax.sharding.reshard(w, PartitionSpec()), p
                )
                return toy.mlp_apply(whole, x)

        found = sdp_jax.channel_activations(groups, fn, spread, [place(x, "data")])
    for a, b in zip(found.moments, plain.moments, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_modules_that_hold_their_arrays(x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)))

    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.a = nnx.Linear(5, 4, rngs=rngs, param_dtype=jnp.float64)
            self.b = nnx.Linear(4, 3, rngs=rngs, param_dtype=jnp.float64)

        def __call__(self, x):
            return self.b(nnx.relu(self.a(x)))

    net = Net()
    groups = sdp_jax.find_groups(net, x)
    found = sdp_jax.channel_activations(groups, net, [x])
    check(found.moments, jax.nn.relu(net.a(x)))

    net = eqx.nn.MLP(5, 3, 4, 1, key=jax.random.key(0))
    batched = eqx.filter_vmap(net)
    groups = sdp_jax.find_groups(net, x[0])
    found = sdp_jax.channel_activations(groups, net, list(x))
    check(found.moments, jax.nn.relu(jax.vmap(net.layers[0])(x)))
    assert batched(x).shape == (6, 3)


def test_groups_of_convolutions_have_the_weights_of_their_group(x64):
    variables, _, found, taken = linen(ResNeXt())
    (reading, *_) = [r for r in found.readings if r.kernel is None]
    check(reading.moments, taken["Conv_2"][0])
    kernel = np.asarray(variables["params"]["Conv_2"]["kernel"])
    inputs, outputs = kernel.shape[2:]
    count = reading.moments.mean.size // inputs
    want = [
        abs(kernel[:, :, i, g * outputs // count : (g + 1) * outputs // count]).sum()
        for g in range(count)
        for i in range(inputs)
    ]
    np.testing.assert_allclose(reading.weights.magnitude, want)


def test_channels_that_nothing_reads_are_taken_where_they_end(x64):
    rng = np.random.default_rng(0)
    params = {"in": jnp.asarray(rng.normal(size=(3, 4)))}
    x = jnp.asarray(rng.normal(size=(5, 3)))
    total = lambda p, x: jnp.tanh(x @ p["in"]).sum(-1)  # noqa: E731
    _, found = run(total, params, [x])
    check(found.moments, np.tanh(x @ params["in"]))
    assert found.readings[0].place.startswith("reduce_sum")
    out = lambda p, x: jnp.tanh(x @ p["in"])  # noqa: E731
    groups = sdp_jax.find_groups(out, params, x, prune_outputs=True)
    found = sdp_jax.channel_activations(groups, out, params, [x])
    check(found.moments, np.tanh(x @ params["in"]))
    assert found.readings[0].place == "an output"


@pytest.mark.parametrize(
    "name", ["decoder", "experts", "state_space", "cached_decoder"]
)
@pytest.mark.parametrize("options", [{}, {"per_example": False, "gradients": True}])
def test_any_model(x64, name, options):
    model = zoo.ZOO[name]()
    params = promise.randomise(model.shapes)
    fn = model.fn
    if options:
        fn = lambda *args: jnp.sum(jax.tree.leaves(model.fn(*args))[0] ** 2)  # noqa: E731
        model.where.clear()
    groups = sdp_jax.find_groups(fn, params, *model.inputs, **model.where)
    found = sdp_jax.channel_activations(groups, fn, params, [model.inputs], **options)
    assert (found.moments.count > 0).all() and (found.moments.mean_abs > 0).all()
    if options:
        assert found.gradients.shape == (groups.num_channels,)
        assert np.isfinite(found.gradients).all()


def test_single_examples(x64):
    params = jax.tree.map(jnp.asarray, toy.mlp_params(dtype=jnp.float64))
    rng = np.random.default_rng(0)
    x = [jnp.asarray(rng.normal(size=(n, 7, 4))) for n in (2, 3)]
    groups, found = run(toy.mlp_apply, params, x, per_example=True)
    _, plain = run(toy.mlp_apply, params, x)
    for a, b in zip(found.moments, plain.moments, strict=True):
        np.testing.assert_allclose(a, b)
    assert found.examples.mean.shape == (5, groups.num_channels)
    for i, one in enumerate(np.concatenate(x)):
        _, single = run(toy.mlp_apply, params, [jnp.asarray(one)[None]])
        np.testing.assert_allclose(found.examples.mean[i], single.moments.mean)
        np.testing.assert_allclose(found.examples.variance[i], single.moments.variance)


@pytest.mark.parametrize("per_example", [False, True])
def test_gradients_are_those_of_factors_of_the_activations(x64, per_example):
    rng = np.random.default_rng(0)
    params = {"in": rng.normal(size=(4, 5)), "a": rng.normal(size=(5, 3))}
    params = jax.tree.map(jnp.asarray, params | {"b": rng.normal(size=(5, 3))})
    x = rng.normal(size=(6, 2, 4))

    def loss(params, x, gate=1.0):
        h = jnp.tanh(x @ params["in"]) * gate
        return jnp.mean(jnp.sin(h @ params["a"]) * (h @ params["b"]))

    batches = [jnp.asarray(x[:4]), jnp.asarray(x[4:])]
    fn = lambda p, x: loss(p, x)  # noqa: E731
    options = {"per_example": per_example, "gradients": True}
    groups, found = run(fn, params, batches, **options)
    parts = [x[i : i + 1] for i in range(6)] if per_example else batches
    ones = jnp.ones(5)
    slopes = [jax.grad(lambda g, x=x: loss(params, x, g))(ones) for x in parts]
    got = groups.split(found.gradients)["in"]
    np.testing.assert_allclose(got, np.abs(slopes).mean(0))


def test_batches_may_come_one_by_one_and_are_counted():
    params = toy.mlp_params()
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    groups = sdp_jax.find_groups(toy.mlp_apply, params, x)
    done = []
    lines = (x[i : i + 2] for i in range(0, 8, 2))
    found = sdp_jax.channel_activations(
        groups, toy.mlp_apply, params, lines, progress=done.append
    )
    assert done == [1, 2, 3, 4] and found.batches == 4
    assert set(found.moments.count) == {8.0}


def test_batches_of_one_shape_are_traced_once():
    calls = []

    def fn(params, x):
        calls.append(x.shape)
        return toy.mlp_apply(params, x)

    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    x = np.ones((2, 4), np.float32)
    sdp_jax.channel_activations(groups, fn, params, [x, x, x[:1], x])
    assert calls == [(2, 4), (1, 4)]


class TestBadInput:
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    x = np.ones((2, 4), np.float32)

    def call(self, *args, groups=groups, fn=toy.mlp_apply, **options):
        return sdp_jax.channel_activations(groups, fn, *args, **options)

    def test_no_batch(self):
        with pytest.raises(ValueError, match="there is no batch"):
            self.call(self.params, [])

    @pytest.mark.parametrize("args", [(), (x,), (3,), ([x], [x])])
    def test_no_iterable(self, args):
        with pytest.raises(
            ValueError, match=r"one iterable of batches.*for example \[x"
        ):
            self.call(self.params, *args)

    def test_another_shape(self):
        with pytest.raises(ValueError, match=r"batch 2, whose .* shapes \[\(2, 5\)\]"):
            self.call(self.params, [self.x, np.ones((2, 5), np.float32)])
        with pytest.raises(ValueError, match="cannot be evaluated on batch 1"):
            self.call(self.params, [(self.x, self.x)])

    def test_not_finite(self):
        bad = self.x.copy()
        bad[1, 2] = np.nan
        with pytest.raises(
            ValueError, match="batch 2: .* dimension 'hidden0' are not f"
        ):
            self.call(self.params, [self.x, bad, self.x])
        broken = jax.tree.map(lambda x: x, self.params)
        broken["layer1"]["bias"] = broken["layer1"]["bias"].at[3].set(np.inf)
        with pytest.raises(ValueError, match="dimension 'hidden1' .* at 1 of 5 pos"):
            self.call(broken, [self.x])

    def test_groups_of_another_model(self):
        other = toy.mlp_params(widths=(4, 7, 5, 3))
        with pytest.raises(ValueError, match="has shape .* in the parameters, but"):
            self.call(other, [self.x])
        with pytest.raises(TypeError, match="groups must be"):
            self.call(self.params, [self.x], groups=None)

    def test_groups_of_another_function(self):
        def half(params, x):
            return x @ params["layer0"]["kernel"] @ params["layer1"]["kernel"]

        with pytest.raises(
            ValueError, match=r"'hidden1' .*groups.without\('hidden1'\)"
        ):
            self.call(self.params, [self.x], fn=half)
        groups = self.groups.without("hidden1")
        assert (
            len(self.call(self.params, [self.x], groups=groups, fn=half).readings) == 1
        )

    def test_channels_that_parameters_alone_read(self):
        params = {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 3))}
        fn = lambda p, x: x @ (p["a"] @ p["b"])  # noqa: E731
        groups = sdp_jax.find_groups(fn, params, self.x)
        with pytest.raises(ValueError, match="no activation of dimension 'a' is read"):
            self.call(params, [self.x], groups=groups, fn=fn)

    def test_a_loop_that_ends_for_each_example_on_its_own(self):
        params = {"in": jnp.ones((4, 3)), "w": 0.1 * jnp.ones((3, 3))}

        def one(params, x):
            def step(h):
                return jnp.tanh(h @ params["w"]) * 0.5

            return jax.lax.while_loop(
                lambda h: (h**2).sum() > 1e-3, step, x @ params["in"]
            ).sum()

        fn = jax.vmap(one, (None, 0))
        groups = sdp_jax.find_groups(fn, params, self.x)
        with pytest.raises(
            ValueError, match="cannot be had: .*for each example on its"
        ):
            self.call(params, [self.x], groups=groups, fn=fn)

    def test_inside_shard_map(self):
        mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
        spec = PartitionSpec("data")
        fn = jax.shard_map(
            lambda p, x: toy.mlp_apply(p, x),
            mesh=mesh,
            in_specs=(PartitionSpec(), spec),
            out_specs=spec,
        )
        with pytest.raises(ValueError, match="'hidden0' cannot be had: .* shard_map"):
            self.call(self.params, [self.x], fn=fn)

    def test_gradients_of_what_is_no_loss(self):
        with pytest.raises(ValueError, match=r"returns a loss.*shapes \[\(2, 3\)\]"):
            self.call(self.params, [self.x], gradients=True)

    def test_examples_that_do_not_line_up(self):
        fn = lambda p, x, y: toy.mlp_apply(p, x) * y.sum()  # noqa: E731
        with pytest.raises(ValueError, match="examples along their first axes"):
            self.call(self.params, [(self.x, np.ones(3))], fn=fn, per_example=True)


def test_the_oracle_sees_what_a_module_is_called_with():
    module = nn.Dense(2)
    x = jnp.ones((3, 4))
    taken = inputs_of(module, module.init(jax.random.key(0), x), x)
    np.testing.assert_array_equal(taken[""][0], x)
    assert statistics(x)["count"].tolist() == [3.0] * 4
