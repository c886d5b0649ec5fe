"""Programs for several devices: small equals dense with zeros, on the same mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import sdp_jax
from tests import promise
from tests.zoo import ZOO

X = np.random.default_rng(0).normal(size=(8, 5))
ROWS = P("data")
SHAPES = {"up": (5, 8), "down": (8, 3)}
TENSOR = {"up": P(None, "model"), "down": P("model", None)}
WHOLE = {"up": P(), "down": P()}


def make_mesh(*sizes, kind=AxisType.Auto):
    return jax.make_mesh(sizes, ("data", "model"), axis_types=(kind,) * 2)


def over(body, params, *, outs=ROWS, x=ROWS, mesh=None, **kwargs):
    """The body on every device of a mesh."""
    mesh = make_mesh(2, 2) if mesh is None else mesh
    return jax.shard_map(
        body, mesh=mesh, in_specs=(params, x), out_specs=outs, **kwargs
    )


def mlp(p, x):
    return jax.nn.silu(x @ p["up"]) @ p["down"]


def tensor(p, x):
    return lax.psum(mlp(p, x), "model")


def check(fn, sizes, shapes=SHAPES, **kwargs):
    leaves = {k: jax.ShapeDtypeStruct(s, jnp.float64) for k, s in shapes.items()}
    groups = promise.check(fn, promise.randomise(leaves), (jnp.asarray(X),), **kwargs)
    assert sorted(groups.sizes.values()) == sizes
    return groups


def test_whole_parameters(x64):
    check(over(mlp, WHOLE), [8])
    one = over(
        lambda p, x: mlp(p, x) * jnp.arange(1.0, 4.0), WHOLE, axis_names={"data"}
    )
    check(jax.jit(one), [8])


def test_split_parameters_are_cut_in_equal_shares(x64):
    groups = check(over(tensor, TENSOR), [4])
    member = groups["up"].members[1]
    assert member.positions(4).tolist() == [[[0], [1], [2], [3]], [[4], [5], [6], [7]]]
    check(over(tensor, TENSOR, mesh=make_mesh(4, 1)), [8])
    check(over(tensor, TENSOR, check_vma=False), [4])


def test_as_many_devices_as_channels(x64):
    groups = check(over(tensor, TENSOR, mesh=make_mesh(1, 8)), [])
    (why,) = {w for f in groups.frozen if f.positions == 8 for w in f.reasons}
    assert "must hold equal shares" in why


@pytest.mark.parametrize("around", ["vmap", "scan", "grad", "shard_map"])
def test_inside_of_transformations(around, x64):
    fn = over(tensor, TENSOR)
    if around == "vmap":
        check(lambda p, x: jax.vmap(fn, (None, 0))(p, jnp.stack([x, 2 * x])), [4])
    elif around == "scan":
        check(lambda p, x: lax.scan(lambda c, y: (c, fn(p, y)), 0.0, x[None])[1], [4])
    elif around == "grad":
        slope = jax.grad(lambda x, p: (fn(p, x) ** 2).sum())
        check(lambda p, x: slope(x, p), [3, 4], grads=False)
    else:
        inner = functools.partial(
            jax.shard_map, in_specs=(TENSOR, P()), out_specs=P(), axis_names={"model"}
        )
        # JAX itself cannot differentiate this.
        outer = over(inner(tensor), P(), axis_names={"data"})
        check(jax.jit(outer), [4], grads=False)


def test_scan_over_layers_inside(x64):
    def body(p, x):
        @jax.checkpoint
        def layer(h, weights):
            return h + tensor(weights, h), None

        layers = {"up": p["up"], "down": p["down"]}
        return lax.scan(layer, x @ p["in"], layers)[0] @ p["out"]

    specs = {"in": P(), "up": P(None, None, "model"), "down": P(None, "model")}
    shapes = {"in": (5, 6), "up": (2, 6, 8), "down": (2, 8, 6), "out": (6, 3)}
    check(over(body, specs | {"out": P()}), [4, 6], shapes)


def test_a_norm_in_two_passes_and_own_derivatives(x64):
    """What absent channels hold, and rules of derivatives, know of the mesh, too."""
    gate = jax.custom_vjp(jnp.tanh)
    gate.defvjp(lambda h: (jnp.tanh(h), h), lambda h, c: (2 * c * jnp.cos(h),))

    def body(p, x):
        h = x @ p["in"]
        h = h - h.mean(-1, keepdims=True)
        h = h * lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-3)
        h = jax.nn.relu(h @ p["up"]) + gate(h @ p["up"])
        return lax.psum(h @ p["down"], "model")

    shapes = {"in": (5, 6), "up": (6, 8), "down": (8, 3)}
    check(over(body, TENSOR | {"in": P()}), [4, 6], shapes)


def everything(p, x):
    h = jnp.tanh(x @ p["up"]) * (1 + lax.axis_index("model"))
    y = lax.psum(h @ p["down"], "model")
    y += lax.ppermute(y, "data", [(0, 1)]) + lax.all_to_all(y, "data", 0, 0, tiled=True)
    y += lax.stop_gradient(lax.pmean(y, "data")) + lax.all_gather(y, "data").sum(0)
    return y, lax.psum_scatter(y, "model", tiled=True)


def gathered(p, x):
    up = lax.all_gather(p["up"], "data", axis=1, tiled=True)
    down = lax.all_gather(p["down"], "data", tiled=True)
    return mlp({"up": up, "down": down}, x)


def scattered(p, x):
    h = lax.psum_scatter(x @ p["up"], "model", scatter_dimension=1, tiled=True)
    return lax.psum(jnp.tanh(h) @ p["down"], "model")


def turned(p, x):
    """Rows over the devices, then channels, then rows again."""
    h = lax.all_to_all(jnp.tanh(x @ p["up"]), "data", 1, 0, tiled=True)
    return lax.all_to_all(h - h.mean(0), "data", 0, 1, tiled=True) @ p["down"]


@pytest.mark.parametrize(
    ("body", "params", "outs", "sizes"),
    [
        (everything, TENSOR, (P("data"), P(("data", "model"))), [4]),
        (gathered, {"up": P(None, "data"), "down": P("data")}, ROWS, [4]),
        (scattered, {"up": P(), "down": P("model")}, ROWS, [4]),
        (turned, WHOLE, ROWS, [4]),
    ],
)
def test_what_talks_across_devices(body, params, outs, sizes, x64):
    check(over(body, params, outs=outs), sizes)


def test_a_sum_over_devices_is_no_number_that_is_known(x64):
    """The largest of a known number is that number; their sum is not."""

    def body(p, x):
        shift = lax.psum(jnp.float64(0.25), "data") - 0.5
        return jax.nn.relu(x @ p["up"] + shift) @ p["down"]

    check(over(body, WHOLE), [8])


def test_of_a_part_nothing_is_left(x64):
    def body(p, x):
        h = jnp.tanh(x @ p["up"])
        y = lax.psum(h[:, :4] * x[:, :1], "model") @ p["down"][:4]
        return y + jax.nn.relu(h[:, 4:]) @ p["down"][4:]

    fn = over(body, WHOLE, x=P(("data", "model")), outs=P(("data", "model")))
    leaves = {k: jax.ShapeDtypeStruct(s, jnp.float64) for k, s in SHAPES.items()}
    params = promise.randomise(leaves)
    cut = sdp_jax.Cut(sdp_jax.find_groups(fn, params, X), ((5, 6),))
    found = jax.jit(sdp_jax.narrow(fn, cut))(cut.take(params), X)
    np.testing.assert_allclose(found, fn(cut.zero(params), X), atol=1e-12)


def test_a_decoder_is_cut_alike_on_one_device_and_on_eight(x64):
    model = ZOO["sharded"]()
    groups = sdp_jax.find_groups(model.fn, model.shapes, *model.inputs)
    make = jax.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            jax, "make_mesh", lambda sizes, *args, **kw: make((1, 1), *args, **kw)
        )
        assert sdp_jax.find_groups(model.fn, model.shapes, *model.inputs) == groups


def explicit(p, x):
    """Types say where everything lies, constants and what loops carry as well."""

    @jax.checkpoint
    def step(h, w):
        y = jnp.tanh(h @ w["up"]).reshape(8, 2, 4).reshape(8, 8)
        y = jax.nn.relu(y * jnp.arange(8.0)) - y.mean(-1, keepdims=True)
        return h + jnp.einsum("bh,ho->bo", y, w["down"], out_sharding=ROWS), None

    h = jnp.einsum("bi,ij->bj", x, p["in"], out_sharding=ROWS)
    h, _ = lax.scan(step, h, {"up": p["up"], "down": p["down"]})
    return jax.sharding.reshard(h, P()) @ p["out"]


def explicit_params():
    shapes = {"in": (5, 6), "up": (2, 6, 8), "down": (2, 8, 6), "out": (6, 3)}
    leaves = {k: jax.ShapeDtypeStruct(s, jnp.float64) for k, s in shapes.items()}
    specs = {"up": P(None, None, "model"), "down": P(None, "model")}
    return {
        name: jax.device_put(leaf, specs.get(name, P()))
        for name, leaf in promise.randomise(leaves).items()
    }


@pytest.mark.parametrize(("mesh", "sizes"), [((4, 2), [4, 6]), ((8, 1), [2, 4, 6])])
def test_explicit_meshes(mesh, sizes, x64):
    with jax.set_mesh(make_mesh(*mesh, kind=AxisType.Explicit)):
        params, x = explicit_params(), jax.device_put(jnp.asarray(X), ROWS)
        if mesh == (4, 2):
            groups = promise.check(explicit, params, (x,))
        else:
            groups = sdp_jax.find_groups(explicit, params, x)
        assert sorted(groups.sizes.values()) == sizes


def test_small_arrays_lie_where_the_dense_ones_do():
    leaf = jnp.arange(24.0).reshape(8, 3)
    groups = sdp_jax.groups_from_axes({"w": leaf}, {"d": [sdp_jax.Member("w", 0)]})
    cut = sdp_jax.Cut(groups, ((1, 2, 5, 6),))
    with jax.set_mesh(make_mesh(4, 2, kind=AxisType.Explicit)):
        small = cut.take({"w": jax.device_put(leaf, P("model"))})
        back = cut.fill(small)
        for tree in (small, back):
            assert jax.typeof(tree["w"]).sharding.spec == P("model", None)
    np.testing.assert_array_equal(small["w"], leaf[np.array([1, 2, 5, 6])])
    np.testing.assert_array_equal(back["w"], cut.fill(cut.take({"w": leaf}))["w"])


def test_shard_map_on_an_explicit_mesh(x64):
    leaves = {k: jax.ShapeDtypeStruct(s, jnp.float64) for k, s in SHAPES.items()}
    mesh = make_mesh(2, 4, kind=AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = {
            name: jax.device_put(leaf, TENSOR[name])
            for name, leaf in promise.randomise(leaves).items()
        }
        x = jax.device_put(jnp.asarray(X), P("data", None))
        groups = promise.check(over(tensor, TENSOR, mesh=mesh), params, (x,))
        assert groups.sizes == {"up": 2}


def test_shares_that_differ_are_refused_until_they_are_whole():
    """Groups that know of no mesh: five channels cannot be shared by two devices."""
    params = {k: jnp.ones(s) for k, s in SHAPES.items()}
    groups = sdp_jax.find_groups(mlp, params, X)
    cut = sdp_jax.Cut(groups, ((0, 1, 2, 4, 7),))

    def split(p, x):
        h = jnp.einsum("bi,ih->bh", x, p["up"], out_sharding=P("data", "model"))
        return jnp.einsum("bh,ho->bo", jnp.tanh(h), p["down"], out_sharding=ROWS)

    with jax.set_mesh(make_mesh(4, 2, kind=AxisType.Explicit)):
        params = {name: jax.device_put(params[name], TENSOR[name]) for name in params}
        x = jax.device_put(jnp.asarray(X, jnp.float32), ROWS)
        with pytest.raises(ValueError, match="4 or 6 would do"):
            cut.take(params)
        small = cut.take(whole(params))
        found = sdp_jax.narrow(mlp, cut)(small, x)
        np.testing.assert_allclose(found, mlp(cut.zero(whole(params)), x), rtol=1e-5)
        with pytest.raises(ValueError, match="Find the groups on this function"):
            sdp_jax.narrow(split, cut)(small, x)


@pytest.mark.parametrize("mesh", [(4, 2), (2, 4)])
def test_how_parameters_are_kept_does_not_tie_channels(mesh, x64):
    """Gathered when they are needed, as in FSDP, also behind a cast."""

    def fn(p, x):
        up = jax.sharding.reshard(jnp.float64(p["up"]), P())
        return jnp.tanh(x @ up) @ jax.sharding.reshard(jnp.tanh(p["down"]), P())

    with jax.set_mesh(make_mesh(*mesh, kind=AxisType.Explicit)):
        rng = np.random.default_rng(1)
        params = {k: jnp.float32(rng.normal(size=s)) for k, s in SHAPES.items()}
        params = {k: jax.device_put(p, TENSOR[k]) for k, p in params.items()}
        groups = sdp_jax.find_groups(fn, params, X)
        scores = np.array([3, 0, 1, 2, 9, 8, 7, 6])
        cut = sdp_jax.plan_cut(
            groups, params, scores=scores, sparsity=0.5, round_to="mesh"
        )
        assert cut.kept == ((4, 5, 6, 7),)  # Nothing of the first share.
        found = sdp_jax.narrow(fn, cut)(cut.take(params), X)
        np.testing.assert_allclose(found, fn(cut.zero(params), X), rtol=1e-12)


def whole(params):
    return {name: jax.sharding.reshard(x, P()) for name, x in params.items()}


def test_constraints_inside_of_a_map_over_other_axes(x64):
    def body(p, x):
        h = lax.with_sharding_constraint(x @ p["up"], P(P.UNCONSTRAINED, "model"))
        return jnp.tanh(h) @ p["down"]

    mesh = make_mesh(2, 4)
    with jax.set_mesh(mesh):
        fn = jax.jit(over(body, P(), mesh=mesh, axis_names={"data"}))
        # Also where four devices cannot hold equal shares of what is left: 5 of 8.
        check(fn, [8], shares=(0.5, 0.4))


def test_flops_are_those_of_all_devices():
    params = {k: jnp.ones(s) for k, s in SHAPES.items()}
    plain = sdp_jax.cost(mlp, params, X).flops
    assert (
        sdp_jax.cost(
            over(mlp, WHOLE, x=P(("data", "model")), outs=P(("data", "model"))),
            params,
            X,
        ).flops
        == plain
    )
    fn = over(tensor, TENSOR)
    groups = sdp_jax.find_groups(fn, params, X)
    cut = promise.random_cut(groups, 0.5, 0)
    small = sdp_jax.cost(sdp_jax.narrow(fn, cut), cut.take(params), X).flops
    # The sum over two devices adds one operation for each of their results.
    assert sdp_jax.cost(fn, params, X).flops == plain + 2 * 24
    assert groups.flops.at([2]) == small == (plain // 2 + 2 * 24)
