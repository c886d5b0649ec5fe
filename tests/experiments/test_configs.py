import dataclasses
import functools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdp_jax
from experiments import data, steps
from experiments.config import Config
from experiments.configs import CONFIGS, ROWS, VARIANTS
from experiments.outcome import make_watch
from experiments.train import make_setup, parse


def chosen(default, names=tuple(CONFIGS)):
    """All of these names; those that are not of the default ones as a study."""
    assert set(default) < set(names)
    study = pytest.mark.study
    return [n if n in default else pytest.param(n, marks=study) for n in names]


def row_of(name):
    return name.rpartition("-")[0]


@functools.cache
def images_of(row):
    config = CONFIGS[f"{row}-sgd"]
    return data.synthetic(config.dataset, count=16, downscale=config.downscale)


@functools.cache
def abstract(name):
    """The setup of a whole run, and the shapes of its first state."""
    config, kept = CONFIGS[name], []
    count = data.INFO[config.dataset].train // config.batch_size * config.epochs

    def make():
        kept.append(make_setup(config, images_of(row_of(name)), count))
        return kept[0].state

    return jax.eval_shape(make), kept[0]


def test_a_row_and_a_method_make_a_name():
    assert set(CONFIGS) == {f"{row}-{v}" for row in ROWS for v in VARIANTS}
    assert len(CONFIGS) == 66


@pytest.mark.parametrize("row", ROWS)
def test_the_methods_of_a_row_have_the_same_twin(row):
    """They differ in nothing but their pruning, and sgd is what remains without it."""
    twins = {json.dumps(CONFIGS[f"{row}-{v}"].twin_of().key()) for v in VARIANTS}
    assert twins == {json.dumps(CONFIGS[f"{row}-sgd"].key())}
    pruned = [CONFIGS[f"{row}-{v}"] for v in VARIANTS if v != "sgd"]
    assert len({(c.sparsity, c.target, c.end) for c in pruned}) == 1
    assert pruned[0].sparsity is not None and pruned[0].end == 0.5
    # Half of the steps follow the pruning; the last epoch is evaluated.
    assert {c.evaluate_every <= c.epochs and c.timed for c in pruned} == {True}


def test_a_name_and_options_on_the_command_line():
    config = parse(["vgg16-cifar10-altsdp", "--seed", "3"])
    out = pathlib.Path("runs/vgg16-cifar10-altsdp-seed3")
    assert config.directory() == out
    named = CONFIGS["vgg16-cifar10-altsdp"]
    assert config == dataclasses.replace(named, seed=3, out=out)
    assert config.key() == named.key() | {"seed": 3}
    options = ["--epochs", "2", "--no-timed", "--compute", "float32", "--out", "x"]
    config = parse(["vgg16-cifar10-altsdp", *options])
    changed = {"epochs": 2, "timed": False, "compute": "float32"}
    assert config == dataclasses.replace(named, **changed, out=pathlib.Path("x"))


def test_every_name_has_a_directory_of_its_own():
    directories = {parse([name]).directory() for name in CONFIGS}
    directories |= {parse(["dnn-mnist-sgd", "--seed", "1"]).directory()}
    assert len(directories) == len(CONFIGS) + 1


def test_without_a_name_the_options_say_everything():
    assert parse([]) == Config()
    assert parse(["--model", "conv", "--widths", "4", "8"]) == Config(
        model="conv", widths=(4, 8)
    )


def test_an_unknown_name_is_refused_with_the_list():
    with pytest.raises(ValueError, match="no configuration is named 'vgg16'") as error:
        parse(["vgg16", "--seed", "3"])
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == list(CONFIGS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sparcity", "0.3"], ["Unrecognized options: --sparcity", "--sparsity"]),
        (["--model", "vgg17"], ["invalid choice 'vgg17'", "'vgg19'", "--model"]),
        (["--epochs", "many"], ["--epochs", "many"]),
        (["again"], ["Unrecognized options: again"]),
    ],
)
def test_an_unknown_option_is_refused_and_the_nearest_named(arguments, said, capsys):
    with pytest.raises(SystemExit) as error:
        parse(["dnn-mnist-altsdp", *arguments])
    assert error.value.code == 2
    printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
    for text in said:
        assert text in printed


# Plain, residual and in bfloat16 with AltSDP, and all methods on the smallest network;
# the rest as a study.
LOWERED = [f"dnn-mnist-{v}" for v in VARIANTS]
LOWERED += ["lenet-mnist-altsdp", "vgg16-cifar10-altsdp"]
LOWERED += ["resnet20_narrow-cifar10-altsdp"]


@pytest.mark.parametrize("name", chosen(LOWERED))
def test_an_epoch_is_lowered_for_all_platforms(name):
    """The program of an accelerator, an epoch as one scan, at full size."""
    config, (state, made) = CONFIGS[name], abstract(name)
    jitted = steps.make_jitted(
        made.model, made.tx, augment=config.augment, seed=config.seed, scan=True
    )
    info = data.INFO[config.dataset]
    side, count = info.shape[0] // config.downscale, info.train // config.batch_size

    def shape(*sizes, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    images = shape(info.train, side, side, info.shape[2], dtype=jnp.float32)
    order = shape(count, config.batch_size)
    exported = jax.export.export(jitted, platforms=("cuda", "tpu", "cpu"))(
        state, data.Split(images, shape(info.train)), order, shape(count), shape()
    )
    assert exported.platforms == ("cuda", "tpu", "cpu")
    after, losses = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    # So that the next epoch can begin where this one ends.
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert losses.shape == (count,) and losses.dtype == jnp.float32
    # Convolutions, or products, in the type that the configuration says.
    text, kind = exported.mlir_module(), {"float32": "f32", "bfloat16": "bf16"}
    operation = "dot_general" if config.model == "dnn" else "convolution"
    lines = [x for x in text.splitlines() if f"stablehlo.{operation}" in x]
    types = {x.rsplit("->", 1)[1].split(">")[0].rsplit("x", 1)[1] for x in lines}
    assert types == {kind[config.compute]}


COUNTED = tuple(row for row in ROWS if CONFIGS[f"{row}-altsdp"].target == "flops")


@pytest.mark.parametrize("row", chosen(["vgg19-cifar100"], COUNTED))
def test_the_target_can_be_met(row):
    """Random channels, as many of each dimension, so that the FLOPs asked for stay."""
    config = CONFIGS[f"{row}-altsdp"]
    state, made = abstract(f"{row}-altsdp")
    example = jax.ShapeDtypeStruct((1, *images_of(row).train.images.shape[1:]), "f4")
    apply, rng = made.model.apply, np.random.default_rng(0)
    cut = sdp_jax.plan_cut(
        made.groups,
        state.variables,
        scores={name: rng.random(size) for name, size in made.groups.sizes.items()},
        sparsity=config.sparsity,
        target="flops",
        ranking="dimension",
    )
    shapes = jax.eval_shape(cut.take, state.variables)
    dense = sdp_jax.cost(apply, state.variables, example).flops
    small = sdp_jax.cost(sdp_jax.narrow(apply, cut), shapes, example).flops
    asked = 1 - config.sparsity
    assert 0.9 * asked < small / dense <= asked


@functools.cache
def watch_of(row):
    return make_watch(abstract(f"{row}-sgd")[1].groups)


# All methods on the smallest network, and a convolutional one; the rest as a study.
TRAINED = [f"dnn-mnist-{v}" for v in VARIANTS] + ["lenet-mnist-altsdp"]


@pytest.mark.parametrize("name", chosen(TRAINED))
def test_a_run_of_two_steps_is_pruned_to_its_target(name):
    """Two real steps of noise, 8 images each, between which everything must go."""
    config, dataset = CONFIGS[name], images_of(row_of(name))
    made = make_setup(config, dataset, 2)
    advance = steps.make_advance(
        made.model, made.tx, augment=config.augment, seed=config.seed
    )
    order = jnp.asarray(data.order_of(dataset.train, 8, seed=0, epoch=1))
    training = steps.on_devices(dataset.train, None)
    state, losses = advance(made.state, training, order, 0, 0, 2)
    assert np.isfinite(losses).all()
    chex.assert_tree_all_finite((state.params, state.batch_stats))
    counts = watch_of(row_of(name))(state.variables)["channels"]
    cut = sdp_jax.plan_cut(made.groups, state.variables)
    assert counts == cut.widths and counts.keys() == made.groups.sizes.keys()
    if config.method == "sgd":
        assert counts == dict(made.groups.sizes)
        return
    example = dataset.test.images[:1]
    dense = sdp_jax.cost(made.model.apply, state.variables, example).flops
    small = sdp_jax.narrow(made.model.apply, cut)
    share = sdp_jax.cost(small, cut.take(state.variables), example).flops / dense
    if config.method == "dhspg":
        # It shortens channels, as far as it comes.
        assert 0 < share < 1
    elif config.target == "flops":
        assert 0.8 * (1 - config.sparsity) < share <= 1 - config.sparsity
    else:
        size = sum(made.groups.sizes.values())
        assert sum(counts.values()) == size - round(config.sparsity * size)
