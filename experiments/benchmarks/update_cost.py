"""Cost of one optimizer step relative to SGD with momentum.

``python -m experiments.benchmarks.update_cost`` times jitted ``update`` +
``apply_updates`` with donated buffers, all optimizers in turn, on the parameters of
VGG16-BN, or of ViT-B/16 with ``--network vit_b``. The ratios of AltSDP to
``optax.sgd(momentum=0.9)`` come last: with a target on its ramp, where channels are
ranked at every step, and after it; and in the paper's form, whose dual variable stands
beside the momentum. Memory is the compiler's own account of arguments, outputs and
temporaries (donated buffers counted once).
"""

import dataclasses
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import sdp_jax
from experiments.models.vit import Vit

WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to time.

    Attributes:
      repeats: timed rounds; every optimizer takes one step a round.
      dtype: dtype of the parameters.
      network: whose parameters.
      names: which optimizers beside the reference; all of them if empty.
      narrower: by what to divide the widths of the network.
      sparsity: share of the parameters for the runs with a target.
    """

    network: Literal["vgg16", "vit_b"] = "vgg16"
    names: tuple[str, ...] = ()
    repeats: int = 60
    dtype: str = "float32"
    narrower: int = 1
    sparsity: float = 0.5


def vgg16_shapes(narrower: int = 1) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of VGG16 with batch normalisation for 32×32 images, 10 classes."""
    widths = [width // narrower for width in WIDTHS]
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    below = 3
    for i, width in enumerate(widths):
        shapes[f"conv{i}"] = {"kernel": (3, 3, below, width), "bias": (width,)}
        shapes[f"norm{i}"] = {"scale": (width,), "bias": (width,)}
        below = width
    shapes["dense0"] = {"kernel": (below, below), "bias": (below,)}
    shapes["dense1"] = {"kernel": (below, 10), "bias": (10,)}
    return shapes


def vgg16_groups(params: Any) -> sdp_jax.Groups:
    """All convolutional channels and hidden neurons of :func:`vgg16_shapes`."""
    axes: dict[str, list[sdp_jax.Member]] = {}
    for i in range(len(WIDTHS)):
        above = f"conv{i + 1}/kernel" if i + 1 < len(WIDTHS) else "dense0/kernel"
        axes[f"conv{i}"] = [
            sdp_jax.Member(f"conv{i}/kernel", -1),
            sdp_jax.Member(f"conv{i}/bias", 0),
            sdp_jax.Member(f"norm{i}/scale", 0),
            sdp_jax.Member(f"norm{i}/bias", 0),
            sdp_jax.Member(above, -2, "consumer"),
        ]
    axes["dense0"] = [
        sdp_jax.Member("dense0/kernel", -1),
        sdp_jax.Member("dense0/bias", 0),
        sdp_jax.Member("dense1/kernel", -2, "consumer"),
    ]
    return sdp_jax.groups_from_axes(params, axes)


def random_params(seed: int, dtype: str, shapes: Any) -> Any:
    """Parameters of these shapes with normally distributed entries."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(0.05 * rng.standard_normal(shape, np.float32), dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def shapes_and_groups(network: str, narrower: int = 1) -> tuple[Any, sdp_jax.Groups]:
    """Shapes of the parameters of a network, and its groups."""
    if network == "vgg16":
        shapes = vgg16_shapes(narrower)
        return shapes, vgg16_groups(
            jax.tree.map(
                lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
                shapes,
                is_leaf=lambda x: isinstance(x, tuple),
            )
        )
    widths = (768 // narrower, 3072 // narrower)
    model = Vit(widths=widths, heads=12 // narrower, patch=16, classes=1000)
    images = jnp.zeros((1, 224, 224, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    groups = sdp_jax.find_groups(
        lambda p, x: model.apply({"params": p}, x), params, images
    )
    return jax.tree.map(lambda leaf: leaf.shape, params), groups


def optimizers(groups: sdp_jax.Groups, sparsity: float) -> dict[str, Any]:
    """The optimizers to compare, the reference first."""
    valley = sdp_jax.valley_strength(c=0.01, mu=0.6)
    # So short a ramp ranks at every step, a longer one at a hundred of its steps.
    target = sdp_jax.target_sparsity(sparsity, 0, 100, target="params")
    early = sdp_jax.target_sparsity(sparsity, 0, 1, target="params")
    return {
        "sgd, momentum 0.9": optax.sgd(0.1, momentum=0.9),
        "sgd": optax.sgd(0.1),
        "adamw": optax.adamw(1e-3),
        "altsdp": sdp_jax.altsdp(0.1, groups, strength=valley),
        "prox_sgd, momentum 0.9": sdp_jax.prox_sgd(
            0.1, groups, strength=1e-3, momentum=0.9
        ),
        "altsdp, momentum 0.9": sdp_jax.altsdp(
            0.1, groups, strength=valley, momentum=0.9
        ),
        "altsdp, on the ramp": sdp_jax.altsdp(
            0.1, groups, strength=target, momentum=0.9
        ),
        "altsdp, after the ramp": sdp_jax.altsdp(
            0.1, groups, strength=early, momentum=0.9
        ),
    }


def make_step(tx: optax.GradientTransformation) -> Any:
    """``step(params, state, grads)``, which gives parameters and state."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def main(config: Config) -> dict[str, float]:
    """Times all optimizers and prints their ratios.

    Args:
      config: what to time.

    Returns:
      Median ratio of time to SGD with momentum, by optimizer.
    """
    shapes, groups = shapes_and_groups(config.network, config.narrower)
    gradients = random_params(1, config.dtype, shapes)
    size = sum(x.nbytes for x in jax.tree.leaves(gradients))
    steps, states, memory = {}, {}, {}
    for name, tx in optimizers(groups, config.sparsity).items():
        if steps and config.names and name not in config.names:
            continue
        params = random_params(0, config.dtype, shapes)
        state = tx.init(params)
        compiled = (
            jax.jit(make_step(tx), donate_argnums=(0, 1))
            .lower(params, state, gradients)
            .compile()
        )
        cost: Any = compiled.memory_analysis()
        memory[name] = (
            cost.argument_size_in_bytes
            + cost.output_size_in_bytes
            + cost.temp_size_in_bytes
            - cost.alias_size_in_bytes
        ) / size
        steps[name] = compiled
        states[name] = compiled(params, state, gradients)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(config.repeats):
        for name, compiled in steps.items():
            start = time.perf_counter()
            states[name] = compiled(*states[name], gradients)
            jax.block_until_ready(states[name])
            times[name].append(time.perf_counter() - start)
    reference = np.array(next(iter(times.values())))
    base_memory = next(iter(memory.values()))
    ratios = {
        name: float(np.median(np.array(t) / reference)) for name, t in times.items()
    }
    device = jax.devices()[0]
    print(
        f"{device.platform} ({device.device_kind}), jax {jax.__version__}, "
        f"{config.network}, {size / 1e6:.0f} MB of parameters, median of "
        f"{config.repeats} rounds"
    )
    print(f"{'optimizer':<24} {'ms':>8} {'ratio':>6}  copies of the parameters more")
    for name, t in times.items():
        extra = memory[name] - base_memory
        print(f"{name:<24} {np.median(t) * 1e3:8.2f} {ratios[name]:6.2f}  {extra:+.2f}")
    ours = [f"{k} {ratio:.2f}" for k, ratio in ratios.items() if "altsdp" in k]
    print(f"ratio to sgd with momentum: {'; '.join(ours)}")
    return ratios


if __name__ == "__main__":
    main(tyro.cli(Config))
