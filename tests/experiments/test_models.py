import re
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdp_jax
from experiments import models
from tests import promise

MODELS = {
    "dnn": models.Dnn(widths=(7, 5), classes=3),
    "conv": models.ConvNet(widths=(4, 3, 5, 6, 7), classes=3),
    "three convolutions": models.ConvNet(widths=(4, 3, 5, 7), classes=3),
}


def _members(groups):
    return {
        d.name: {
            (m.path, m.axis, m.role, m.outer, m.inner, m.offset) for m in d.members
        }
        for d in groups
    }


def hand_made_groups(model, variables):
    if isinstance(model, models.Dnn):
        layers = [f"dense{i}" for i in range(len(model.widths))]
        above = [*layers[1:], "head"]
        axes = {
            layer: [
                sdp_jax.Member(f"params/{layer}/kernel", 1),
                sdp_jax.Member(f"params/{layer}/bias", 0),
                sdp_jax.Member(f"params/{next_layer}/kernel", 0, "consumer"),
            ]
            for layer, next_layer in zip(layers, above, strict=True)
        }
        return sdp_jax.groups_from_axes(variables, axes)
    convs = len(model.widths) - 1
    axes = {}
    for i, width in enumerate(model.widths[:-1]):
        axes[f"conv{i}"] = [
            sdp_jax.Member(f"params/conv{i}/kernel", 3),
            sdp_jax.Member(f"params/norm{i}/scale", 0),
            sdp_jax.Member(f"params/norm{i}/bias", 0),
            sdp_jax.Member(f"batch_stats/norm{i}/mean", 0, "state"),
            sdp_jax.Member(f"batch_stats/norm{i}/var", 0, "state"),
        ]
        if i + 1 < convs:
            axes[f"conv{i}"].append(
                sdp_jax.Member(f"params/conv{i + 1}/kernel", 2, "consumer")
            )
        else:
            # Flattened in the order height, width, channel.
            pixels = variables["params"]["dense"]["kernel"].shape[0] // width
            flat = sdp_jax.Member("params/dense/kernel", 0, "consumer", outer=pixels)
            axes[f"conv{i}"].append(flat)
    axes["dense"] = [
        sdp_jax.Member("params/dense/kernel", 1),
        sdp_jax.Member("params/dense/bias", 0),
        sdp_jax.Member("params/head/kernel", 0, "consumer"),
    ]
    return sdp_jax.groups_from_axes(variables, axes)


@pytest.mark.parametrize("name", MODELS)
def test_groups_and_widths_belong_together(name):
    model = MODELS[name]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 1)), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    groups = sdp_jax.find_groups(model.apply, variables, x)
    assert _members(groups) == _members(hand_made_groups(model, variables))
    assert tuple(groups.sizes.values()) == model.widths
    # Every parameter but those of the output layer is a producer.
    producers = {m.path for d in groups for m in d.producers}
    names = {leaf.path for leaf in groups.leaves if leaf.path.startswith("params/")}
    assert names - producers == {"params/head/kernel", "params/head/bias"}

    # Random running statistics, then half of the channels zero: the same output.
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda v: v + jnp.asarray(rng.uniform(0, 0.5, v.shape), v.dtype), variables
    )
    keep = {
        k: jnp.asarray(rng.permutation(size) >= size // 2, jnp.float32)
        for k, size in groups.sizes.items()
    }
    variables = sdp_jax.scale_channels(groups, variables, groups.join(keep))
    cut = sdp_jax.plan_cut(groups, variables)
    assert list(cut.widths.values()) == [size - size // 2 for size in model.widths]
    expected = jax.jit(model.apply)(variables, x)
    found = jax.jit(sdp_jax.narrow(model.apply, cut))(cut.take(variables), x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.ptp(expected, axis=0).min() > 1e-3  # the output depends on the input


class Full(NamedTuple):
    """A network at full size.

    Attributes:
      shape: of an image, or of a text.
      classes: outputs.
      parameters: how many it has.
      macs: multiplications and additions, in millions.
      dimensions: how many channel dimensions it has, heads included.
      share: share of the variables that is gone with one channel in each.
      exact: products in float32 in half precision: the head, scores of attention.
      rest: share of biases, normalisation, relu and the like in the operations.
    """

    shape: tuple[int, ...]
    classes: int
    parameters: int
    macs: float
    dimensions: int
    share: float
    exact: int = 1
    rest: float = 0.02


MNIST, CIFAR, IMAGENET = (28, 28, 1), (32, 32, 3), (224, 224, 3)
# The published numbers, where there are any: He et al. give 0.27 and 0.85 million
# parameters for ResNet-20 and ResNet-56 (without convolutions in shortcuts), and
# Zagoruyko and Komodakis 36.5 million for WRN-28-10. 25,557,032 parameters and 4.1
# billion operations is what everybody's ResNet-50 has.
FULL = {
    "dnn": Full(MNIST, 10, 784 * 300 + 300 * 100 + 100 * 10 + 410, 0.2662, 2, 0.996),
    "conv": Full(MNIST, 10, 468_010, 18.69, 5, 0.999),
    "lenet": Full(MNIST, 10, 431_080, 2.293, 3, 0.999),
    "vgg_small": Full(CIFAR, 10, 72_954, 9.880, 6, 0.998),
    "vgg16": Full(CIFAR, 10, 14_724_042, 313.2, 13, 0.999),
    "vgg19": Full(CIFAR, 10, 20_035_018, 398.1, 16, 0.999),
    "resnet20": Full(CIFAR, 10, 272_474, 40.8, 12, 0.998),
    "resnet56": Full(CIFAR, 10, 855_770, 125.8, 30, 0.998),
    "resnet50": Full(CIFAR, 10, 23_520_842, 1_298, 37, 0.999),
    "resnet50_imagenet": Full(IMAGENET, 1000, 25_557_032, 4_090, 37, 0.999),
    "wrn28_10": Full(CIFAR, 10, 36_479_194, 5_244, 16, 0.999),
    "preact": Full(CIFAR, 10, 44_086, 7.115, 6, 0.996),
    "depthwise": Full(CIFAR, 10, 14_186, 0.9014, 4, 0.992, rest=0.09),
    "airbench": Full(CIFAR, 10, 295_106, 19.887, 7, 0.999),
    # A feature that is zero does not stay zero behind dense layers over the patches.
    "mixer": Full(CIFAR, 10, 66_986, 4.1294, 6, 0.912, rest=0.07),
    "decoder": Full((64,), 65, 240_288, 16.128, 9, 0.998, exact=3),
    "vit_s4": Full(CIFAR, 10, 21_341_578, 1_400, 49, 0.999, 13),
}


def test_every_model_has_a_name():
    assert set(models.MODELS) == set(get_args(models.Name)) == set(FULL)


def sizes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.study] if name == "vit_s4" else [])
        for name in FULL
    ],
)
def test_full_size(name):
    full = FULL[name]
    model = models.make_model(name, full.classes)
    kind = jnp.int32 if name == "decoder" else jnp.float32
    x = jax.ShapeDtypeStruct((1, *full.shape), kind)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert count == full.parameters
    cost = sdp_jax.cost(model.apply, variables, x)
    assert 0.999 < cost.flops / 2e6 / full.macs < 1 + full.rest

    groups = sdp_jax.find_groups(model.apply, variables, x)
    assert len(groups) == full.dimensions
    assert full.share < promise.prunable_share(groups) < full.share + 0.002
    assert all("'" not in leaf.path for leaf in groups.leaves)

    # In half precision the layers multiply in half precision, in training mode too,
    # and variables and logits stay what they are.
    half = models.make_model(name, full.classes, dtype=jnp.bfloat16)
    assert sizes(jax.eval_shape(half.init, jax.random.key(0), x)) == sizes(variables)
    x = jax.ShapeDtypeStruct((2, *full.shape), kind)

    def train(variables, x):
        return half.apply(variables, x, train=True, mutable=["batch_stats"])

    jaxpr, (logits, stats) = jax.make_jaxpr(train, return_shape=True)(variables, x)
    assert logits.dtype == np.dtype("float32")
    text = full.shape if name == "decoder" else ()
    assert logits.shape == (2, *text, full.classes)
    assert sizes(variables | stats) == sizes(variables)
    assert ("batch_stats" in stats) == ("batch_stats" in variables)
    products = re.findall(r":(\w+)\[[^]]*\] = (?:dot_|conv_general)", str(jaxpr))
    assert len(products) > 2
    assert set(products) == {"bf16", "f32"}
    assert products.count("f32") == full.exact


# In double precision, where rounding cannot hide a difference.
DOUBLE = {"classes": 3, "dtype": jnp.float64}
TINY = {
    "lenet": (models.LeNet(widths=(4, 6, 8), **DOUBLE), 16),
    "vgg": (models.MODELS["vgg_small"](widths=(4, 6, 8), **DOUBLE), 9),
    "resnet": (models.ResNet(widths=(4, 6), depths=(2, 1), **DOUBLE), 8),
    "bottleneck": (
        models.ResNet(
            widths=(4, 6), depths=(1, 2), bottleneck=True, imagenet=True, **DOUBLE
        ),
        16,
    ),
    "wide": (models.WideResNet(widths=(4, 6, 8), depth=10, stem=4, **DOUBLE), 8),
    "depthwise": (models.Depthwise(widths=(8, 12, 12), **DOUBLE), 8),
    "airbench": (models.Airbench(widths=(4, 6), stem=5, scale=1.0, **DOUBLE), 8),
    "mixer": (models.Mixer(widths=(4, 12, 16), depth=2, **DOUBLE), 8),
    "decoder": (models.Decoder(widths=(12, 20), heads=3, **DOUBLE), 5),
    "vit": (models.Vit(widths=(12, 20), depth=1, heads=3, **DOUBLE), 8),
}


@pytest.mark.parametrize("name", TINY)
def test_the_small_function_is_the_dense_one_with_zeros(name, x64):
    model, side = TINY[name]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, side, side, 2)))
    if name == "decoder":
        x = jnp.asarray(rng.integers(3, size=(4, side)))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    variables = promise.randomise(shapes)
    groups = promise.check(model.apply, variables, (x,), grads=False)
    assert promise.prunable_share(groups) > (0.6 if name == "mixer" else 0.8)
    logits = jax.jit(model.apply)(variables, x)
    assert logits.dtype == np.dtype("float64")
    assert np.ptp(logits, axis=0).min() > 1e-3  # the output depends on the input


@pytest.mark.parametrize("name", ["lenet", "vgg"])
def test_feature_maps_are_what_the_layers_put_out(name, x64):
    model, side = TINY[name]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, side, side, 2)))
    variables = promise.randomise(jax.eval_shape(model.init, jax.random.key(0), x))
    groups = sdp_jax.find_groups(model.apply, variables, x)
    # The first channel of each dimension puts nothing out.
    factors = {k: jnp.ones(size).at[0].set(0) for k, size in groups.sizes.items()}
    variables = sdp_jax.scale_channels(groups, variables, groups.join(factors))
    params = groups.at("params")
    maps = jax.jit(lambda v: models.feature_maps(model, params, v, x))(variables)
    assert {k: v.shape[-1] for k, v in maps.items()} == groups.sizes
    for value in maps.values():
        assert value.shape[0] == 4
        assert not value[..., 0].any()
        assert value.any()
        assert value.min() == 0  # behind the relu
    # The last one is what the head sees, pooled and averaged if there is a map.
    last = maps[list(groups.sizes)[-1]]
    if last.ndim == 4:
        last = last.max((1, 2))
    head = variables["params"]["head"]
    expected = last @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(jax.jit(model.apply)(variables, x), expected)


@pytest.mark.parametrize("name", ["resnet", "wide", "mixer", "vit"])
def test_feature_maps_need_one_layer_after_another(name):
    model, _ = TINY[name]
    with pytest.raises(ValueError, match=f"another: .* got {type(model).__name__}"):
        models.feature_maps(model, None, {}, np.zeros((1, 8, 8, 1)))


def test_a_decoder_does_not_see_what_comes(x64):
    model, length = TINY["decoder"]
    x = np.random.default_rng(0).integers(3, size=(1, length))
    variables = promise.randomise(jax.eval_shape(model.init, jax.random.key(0), x))
    apply = jax.jit(model.apply)
    whole = apply(variables, x)
    for i in range(1, length):
        changed = x.copy()
        changed[0, i:] = (changed[0, i:] + 1) % 3
        other = apply(variables, changed)
        np.testing.assert_allclose(other[:, :i], whole[:, :i])
        assert (np.abs(other[:, i:] - whole[:, i:]).max(-1) > 1e-3).all()


def test_initialisation(x64):
    model = models.LeNet(widths=(20, 50, 100))
    x = np.zeros((1, 16, 16, 1))
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    for layer, fan_in in (("conv1", 5 * 5 * 20), ("dense", 50)):
        deviation = np.std(params[layer]["kernel"])
        np.testing.assert_allclose(deviation, (2 / fan_in) ** 0.5, rtol=0.03)
    # A scale of zero would be a channel that is pruned from the start.
    model, side = TINY["resnet"]
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, side, side, 3)))
    scales = [
        leaf
        for path, leaf in jax.tree.leaves_with_path(variables)
        if "scale" in jax.tree_util.keystr(path)
    ]
    # The stem, three blocks and a shortcut.
    assert len(scales) == 1 + 2 * 3 + 1
    assert all((scale == 1).all() for scale in scales)
    kernel = variables["params"]["block0_1"]["conv1"]["kernel"]
    assert 0.8 < np.std(kernel) / (2 / (9 * 4)) ** 0.5 < 1.2
    init = jax.jit(TINY["vit"][0].init)
    first, second = (
        init(jax.random.key(seed), np.zeros((1, 8, 8, 2)))["params"] for seed in (0, 1)
    )
    assert not np.allclose(first["positions"], second["positions"])


def test_widths():
    assert models.make_model("vgg16", 10).widths == (64, 128, 256, 512, 512)
    assert models.make_model("wrn28_10", 10, (8, 9, 10)).widths == (8, 9, 10)
    assert models.make_model("dnn", 10, (8,)).widths == (8,)
    model = models.make_model("conv", 3, (4, 5, 6), jnp.bfloat16)
    assert model == models.ConvNet((4, 5, 6), 3, jnp.bfloat16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vgg17", 10), "no model 'vgg17'; choose one of"),
        (("vgg16", 0), "classes must be at least 1; got 0"),
        (("vgg16", 10, (), jnp.int32), "floating type, such as float32; got int32"),
        (("vgg16", 10, (8, 8)), r"'vgg16' takes 5 widths .*512\); got \(8, 8\)"),
        (("resnet56", 10, (8, 0, 8)), r"takes 3 widths of at least 1.*\(8, 0, 8\)"),
        (("dnn", 10, (300, -1)), r"any number of widths of at least 1.*\(300, -1\)"),
        (("vit_s4", 10, (10, 20)), "multiple of its 6 heads; got 10"),
        (("decoder", 65, (10, 20)), "multiple of its 4 heads; got 10"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.make_model(*arguments)


def test_bad_depth():
    with pytest.raises(ValueError, match="4 and a multiple of 6.*got 27"):
        models.WideResNet(depth=27)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("vgg16", (32, 31), r"5 stages needs .* at least 32×32 .*; got 32×31"),
        ("vgg_small", (7, 8), r"3 stages needs .* at least 8×8 .*; got 7×8"),
        ("lenet", (8, 8), r"LeNet needs .* at least 16×16 .*; got 8×8"),
        ("airbench", (8, 9), r"3 stages needs .* at least 9×9 .*; got 8×9"),
        ("mixer", (32, 30), r"sides are multiples of 4; got 32×30"),
        ("vit_s4", (32, 30), r"sides are multiples of 4; got 32×30"),
    ],
)
def test_images_of_a_wrong_size(name, shape, message):
    x = jax.ShapeDtypeStruct((1, *shape, 3), jnp.float32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(models.make_model(name, 10).init, jax.random.key(0), x)


def test_images_of_another_size_than_the_positions(x64):
    model, _ = TINY["vit"]
    x = np.zeros((1, 8, 8, 1))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    with pytest.raises(ValueError, match="have 4 positions, and the images 8 patches"):
        jax.eval_shape(model.apply, variables, np.zeros((1, 16, 8, 1)))
