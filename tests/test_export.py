"""Functions as StableHLO, for any batch size."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

import sdp_jax
from experiments import models
from tests import promise, toy
from tests.zoo import ZOO

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)


def half(fn, params, *inputs, **kwargs):
    groups = sdp_jax.find_groups(fn, params, *inputs, **kwargs)
    cut = promise.random_cut(groups, 0.5, 0)
    return cut, sdp_jax.narrow(fn, cut), jax.jit(cut.zero)(params)


@pytest.fixture
def params():
    return toy.mlp_params()


def more(x):
    """Inputs with another number of examples."""
    return jnp.concatenate([x, x, x[:1]]) if np.ndim(x) else x


@pytest.mark.parametrize(
    "name", ["resnext", "swin", "densenet", "decoder", "nnx_transformer", "custom_jvp"]
)
def test_any_batch_size(name, x64):
    model = ZOO[name]()
    params = promise.randomise(model.shapes)
    cut, small, zeroed = half(model.fn, params, *model.inputs)
    given = jax.jit(cut.take)(zeroed)
    exported = sdp_jax.export_stablehlo(small, given, *model.inputs)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    inputs = jax.tree.map(more, model.inputs)
    found = exported.call(given, *inputs)
    expected = jax.jit(model.fn)(zeroed, *inputs)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        promise.close(a, b, 1e-9)


def test_a_symbolic_sequence_length_too(x64):
    """Batch and positions are flattened together, and halves of them split off."""

    def fn(params, x):
        y = jnp.tanh(x @ params["a"])
        flat = y.reshape(-1, 8) @ params["b"]
        y = flat.reshape(x.shape[0], -1, 2, 6)
        y = jnp.concatenate([y[:, :, 0], jnp.flip(y[:, :, 1], 1)], axis=-1)
        y = jnp.pad(y, ((0, 0), (1, 0), (2, 0)))[:, : x.shape[1] // 2, 1:]
        where = jnp.arange(y.shape[1])[:, None] + jnp.zeros((y.shape[-1],))
        return (y + where * params["d"]).mean(1) @ params["c"]

    shapes = {"a": (3, 8), "b": (8, 6), "c": (13, 2), "d": (13,)}
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}
    cut, small, zeroed = half(fn, params, jnp.ones((2, 4, 3)))
    assert min(cut.widths.values()) < 6 and len(cut.widths) > 1
    shape = jax.ShapeDtypeStruct(
        (*export.symbolic_shape("batch, 4*half"), 3), jnp.float64
    )
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), cut.take(zeroed)
    )
    exported = export.export(jax.jit(small))(shapes, shape)
    for batch, length in ((1, 4), (3, 12)):
        x = jnp.asarray(rng.normal(size=(batch, length, 3)))
        found = exported.call(cut.take(zeroed), x)
        np.testing.assert_allclose(found, jax.jit(fn)(zeroed, x), rtol=1e-12)


SYMBOLIC = {
    "channels and examples in one axis": (
        lambda p, x: jnp.exp((x @ p["a"]).reshape(-1)).sum() + p["b"].sum(),
        "batch, length, 3",
        (2, 5, 3),
    ),
    "all axes flattened": (
        lambda p, x: (jax.nn.relu(x.reshape(-1, 3) @ p["a"]) @ p["b"]).reshape(
            *x.shape[:3], -1
        ),
        "batch, height, 3, 3",
        (2, 5, 3, 3),
    ),
    "halved until it is as long as there are channels": (
        lambda p, x: (
            jax.lax.reduce_window(
                x @ p["a"], 0.0, jax.lax.add, (1, 126, 1), (1, 126, 1), "VALID"
            ).sum(1)
            @ p["b"]
        ),
        "batch, length, 3",
        (2, 378, 3),
    ),
}


@pytest.mark.parametrize("name", SYMBOLIC)
def test_symbolic_sizes_beside_channels(name, x64):
    fn, spec, shape = SYMBOLIC[name]
    rng = np.random.default_rng(0)
    params = {
        k: jnp.asarray(rng.normal(size=s)) for k, s in (("a", (3, 8)), ("b", (8, 2)))
    }
    x = jnp.asarray(rng.normal(size=shape))
    cut, small, zeroed = half(fn, params, x)
    assert cut.widths["a"] == 4
    shapes = jax.eval_shape(lambda: cut.take(params))
    symbolic = jax.ShapeDtypeStruct(export.symbolic_shape(spec), x.dtype)
    exported = export.export(jax.jit(small))(shapes, symbolic)
    promise.close(exported.call(cut.take(zeroed), x), fn(zeroed, x), 1e-12)


def test_stand_ins_that_are_too_short_say_so():
    def fn(params, x):
        window = (1, 5000, 1)
        x = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, window, "VALID")
        return x @ params["a"]

    params = {"a": jnp.ones((3, 4))}
    cut, small, _ = half(fn, params, jnp.ones((1, 5000, 3)), prune_outputs=True)
    shape = jax.ShapeDtypeStruct(export.symbolic_shape("batch, length, 3"), jnp.float32)
    with pytest.raises(ValueError, match="needs longer inputs"):
        export.export(jax.jit(small))(cut.take(params), shape)


def test_gradients_of_the_artefact(tmp_path, params):
    cut, small, zeroed = half(toy.mlp_apply, params, X)
    given = cut.take(zeroed)
    path = tmp_path / "deep" / "model.bin"
    sdp_jax.export_stablehlo(small, given, X, path=path, vjp_order=1)
    again = export.deserialize(bytearray(path.read_bytes()))

    def slope(fn):
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(fn(p, X)))))(given)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        slope(again.call),
        slope(small),
    )


def fresh_process(folder, x):
    """The output of the artefact ``model``, without this package and without Flax."""
    np.save(folder / "x.npy", x)
    code = (
        "import sys, jax, jax.export, numpy as np\n"
        "sys.modules['sdp_jax'] = sys.modules['flax'] = None\n"
        "model = jax.export.deserialize(bytearray(open('model', 'rb').read()))\n"
        "np.save('y.npy', model.call(np.load('x.npy')))\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    return np.load(folder / "y.npy")


def test_it_runs_without_the_package(tmp_path, params):
    cut, small, zeroed = half(toy.mlp_apply, params, X)
    sdp_jax.export_stablehlo(
        small, cut.take(zeroed), X, path=tmp_path / "model", embed_params=True
    )
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    found = fresh_process(tmp_path, X[:3])
    np.testing.assert_allclose(found, toy.mlp_apply(zeroed, X[:3]), rtol=1e-5)


def test_a_small_vgg16_runs_without_the_package(tmp_path):
    model = models.make_model("vgg16", 10, (8, 8, 8, 16, 16))
    x = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    # Statistics and scales as after training: all different.
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda v: v * (1 + rng.uniform(-0.3, 0.3, v.shape)).astype(v.dtype), variables
    )
    cut, small, zeroed = half(model.apply, variables, x)
    assert cut.widths["conv4_2"] == 8
    given = jax.jit(cut.take)(zeroed)
    sdp_jax.export_stablehlo(
        small, given, x, path=tmp_path / "model", embed_params=True
    )
    found = fresh_process(tmp_path, x[:3])
    expected = jax.jit(model.apply)(zeroed, x[:3])
    np.testing.assert_allclose(
        found, expected, rtol=1e-4, atol=1e-4 * np.abs(found).max()
    )


def test_static_arguments_and_inputs_without_a_batch(params):
    def fn(params, x, scale, train):
        return toy.mlp_apply(params, x) * (scale if train else 1.0)

    cut, small, zeroed = half(fn, params, X, jnp.float32(3), True)
    exported = sdp_jax.export_stablehlo(
        small, cut.take(zeroed), X, jnp.float32(3.0), True, in_axes=(0, None, None)
    )
    found = exported.call(cut.take(zeroed), X[:2], jnp.float32(5.0), None)
    np.testing.assert_allclose(found, 5 * toy.mlp_apply(zeroed, X[:2]), rtol=1e-5)
    last = sdp_jax.export_stablehlo(
        lambda p, x: toy.mlp_apply(p, x.T), params, X.T, in_axes=-1
    )
    found = last.call(params, X[:2].T)
    np.testing.assert_allclose(found, toy.mlp_apply(params, X[:2]), rtol=1e-5)


def test_what_cannot_be_exported_says_so(tmp_path, params):
    apply = toy.mlp_apply
    with pytest.raises(ValueError, match="an entry for each of the 1 inputs"):
        sdp_jax.export_stablehlo(apply, params, X, in_axes=(0, 1))
    with pytest.raises(ValueError, match="no batch axis 2"):
        sdp_jax.export_stablehlo(apply, params, X, in_axes=2)
    for platforms in ("cpu", ("cpu", "gpu")):
        with pytest.raises(ValueError, match="tuple of names out of"):
            sdp_jax.export_stablehlo(apply, params, X, platforms=platforms)
    with pytest.raises(ValueError, match=r"different lengths \[4, 5\]"):
        sdp_jax.export_stablehlo(lambda p, x, y: x, params, X, X[:4])
    shapes = jax.eval_shape(lambda: params)
    with pytest.raises(ValueError, match="needs parameters with values"):
        sdp_jax.export_stablehlo(apply, shapes, X, embed_params=True)
    assert sdp_jax.export_stablehlo(apply, shapes, X).in_avals[-1].shape[1] == 4

    graph, state = nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    path = tmp_path / "model"
    with pytest.raises(ValueError, match="embed_params=True"):
        sdp_jax.export_stablehlo(
            lambda s, x: nnx.merge(graph, s)(x), state, X, path=path
        )
    assert not list(tmp_path.iterdir())


def test_files_need_flatbuffers(tmp_path, params, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ImportError, match=r"sdp-jax\[export\]"):
        sdp_jax.export_stablehlo(toy.mlp_apply, params, X, path=tmp_path / "model")


def test_sizes_that_do_not_fit_say_so(params):
    def halves(params, x):
        return toy.mlp_apply(params, x.reshape(x.shape[0] // 2, 2, 4).sum(1))

    cut, small, zeroed = half(halves, params, X[:4])
    (size,) = export.symbolic_shape("b", constraints=["mod(b, 2) == 0"])
    shape = jax.ShapeDtypeStruct((size, 4), jnp.float32)
    with pytest.raises(ValueError, match="a multiple of a number"):
        export.export(jax.jit(small))(cut.take(zeroed), shape)


def test_a_cut_along_a_symbolic_axis_is_refused():
    def fn(params, x):
        return (x * params["w"]).sum()

    params = {"w": jnp.ones(6)}
    groups = sdp_jax.find_groups(fn, params, jnp.ones(6), prune_inputs=True)
    cut = promise.random_cut(groups, 0.5, 0)
    small = sdp_jax.narrow(fn, cut)
    x = jnp.arange(6.0)
    expected = fn(cut.zero(params), x)
    np.testing.assert_allclose(small(cut.take(params), x), expected)
    shape = jax.ShapeDtypeStruct(export.symbolic_shape("b"), jnp.float32)
    with pytest.raises((ValueError, TypeError)):
        export.export(jax.jit(small))(cut.take(params), shape)
