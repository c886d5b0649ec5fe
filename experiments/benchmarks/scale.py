"""What the optimizer costs at scale: compile time, and traffic on a large mesh.

``python -m experiments.benchmarks.scale`` compiles ``update`` + ``apply_updates`` for
transformers of tiny width and many layers, and prints the seconds of processor time of
each optimizer relative to ``optax.adamw`` on the same tree (tracing included). Last
comes one step of AltSDP for a decoder of 70 billion parameters, lowered for an abstract
mesh of 16 × 16 devices that nobody needs to have: its collectives and bytes per device.
"""

import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from jax import export
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sdp_jax
from experiments.benchmarks.tracing import decoder, decoder_shapes
from experiments.benchmarks.update_cost import make_step

# Axes over which a leaf of the decoder is split, on a mesh of data and model.
SPECS = {
    "embed": P("model", "data"),
    "out": P("data", "model"),
    "q": P("data", "model"),
    "k": P("data", None, "model"),
    "v": P("data", None, "model"),
    "o": P("model", None, "data"),
    "gate": P("data", "model"),
    "up": P("data", "model"),
    "down": P("model", "data"),
}
COLLECTIVES = "all_reduce all_gather all_to_all collective_permute reduce_scatter"


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compile.

    Attributes:
      layers: layers of the transformers whose steps are compiled.
      names: optimizers to compile; all of them if empty.
      decoder: layers of the decoder on the abstract mesh; 0 leaves it out.
      mesh: its devices for data and model.
    """

    layers: tuple[int, ...] = (12, 48, 150)
    names: tuple[str, ...] = ()
    decoder: int = 80
    mesh: tuple[int, int] = (16, 16)


def transformer(layers: int) -> tuple[Any, sdp_jax.Groups]:
    """Shapes of a transformer with biases, four dimensions and 16 leaves a layer."""
    shapes: dict[str, tuple[int, ...]] = {"embed": (64, 16)}
    axes: dict[str, list[sdp_jax.Member]] = {}
    member = sdp_jax.Member
    for i in range(layers):
        sizes = {"q": (16, 16), "k": (16, 16), "v": (16, 16), "o": (16, 16)}
        sizes |= {"up": (16, 32), "down": (32, 16)}
        sizes |= {f"{name}_bias": size[1:] for name, size in sizes.items()}
        sizes |= dict.fromkeys(("scale1", "bias1", "scale2", "bias2"), (16,))
        shapes |= {f"{i}_{name}": size for name, size in sizes.items()}
        axes |= {
            f"{i}_scores": [member(f"{i}_q", 1), member(f"{i}_q_bias", 0)]
            + [member(f"{i}_k", 1, "consumer"), member(f"{i}_k_bias", 0, "consumer")],
            f"{i}_values": [member(f"{i}_v", 1), member(f"{i}_v_bias", 0)]
            + [member(f"{i}_o", 0, "consumer")],
            f"{i}_hidden": [member(f"{i}_up", 1), member(f"{i}_up_bias", 0)]
            + [member(f"{i}_down", 0, "consumer")],
            f"{i}_branch": [member(f"{i}_down", 1), member(f"{i}_down_bias", 0)],
        }
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    return params, sdp_jax.groups_from_axes(params, axes)


def optimizers(groups: sdp_jax.Groups) -> dict[str, Any]:
    """The optimizers to compare, the reference first."""
    valley = sdp_jax.valley_strength(c=0.1, mu=0.6)
    made: dict[str, Any] = {
        "adamw": optax.adamw(1e-3),
        "sgd, momentum": optax.sgd(0.1, momentum=0.9),
    }
    strengths = {
        "valley": valley,
        "target": sdp_jax.target_sparsity(0.5, 0, 100),
        "target of params": sdp_jax.target_sparsity(0.5, 0, 100, target="params"),
        "target, isomorphic": sdp_jax.target_sparsity(
            0.5, 0, 100, ranking="isomorphic"
        ),
    }
    for name, strength in strengths.items():
        made[name] = sdp_jax.altsdp(0.1, groups, strength=strength, momentum=0.9)
    return made


def compile_seconds(tx: optax.GradientTransformation, params: Any) -> float:
    """Processor seconds of tracing and compiling a step that donates its buffers."""
    state = jax.eval_shape(tx.init, params)
    start = time.process_time()
    jax.jit(make_step(tx), donate_argnums=(0, 1)).lower(params, state, params).compile()
    return time.process_time() - start


def bytes_per_device(tree: Any) -> float:
    """Bytes of a tree of shapes on each of the devices that share it."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def lower_decoder(layers: int, sizes: tuple[int, int]) -> dict[str, Any]:
    """One step for the decoder on an abstract mesh: seconds, bytes and collectives."""
    axes = (AxisType.Explicit, AxisType.Explicit)
    mesh = AbstractMesh(sizes, ("data", "model"), axis_types=axes)
    shapes = decoder_shapes(layers)
    words = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    start = time.perf_counter()
    groups = sdp_jax.find_groups(decoder, shapes, words)
    middle = time.perf_counter()

    def place(path: Any, leaf: Any) -> Any:
        where = NamedSharding(mesh, SPECS.get(path[-1].key, P()))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    params = jax.tree_util.tree_map_with_path(place, shapes)
    strength = sdp_jax.target_sparsity(0.5, 0, 1000, target="params")
    tx = sdp_jax.altsdp(optax.adamw(1e-4), groups, strength=strength)
    with jax.sharding.use_abstract_mesh(mesh):
        state = jax.eval_shape(tx.init, params)
        exported = export.export(jax.jit(make_step(tx)), platforms=["tpu"])(
            params, state, params
        )
    text = exported.mlir_module()
    kinds = "|".join(COLLECTIVES.split())
    pattern = rf"stablehlo\.({kinds})\b.*?\}}\) : \(\S+\) -> tensor<(\d+)x[fi]32>"
    sent = re.findall(pattern, text, flags=re.DOTALL)
    # AdamW keeps two moments like the parameters, in their dtype; a target no dual.
    size = bytes_per_device(params)
    return {
        "find_groups": middle - start,
        "lower": time.perf_counter() - middle,
        "channels": groups.num_channels,
        "collectives": [(name, 4 * int(count)) for name, count in sent],
        "parameters": size,
        "moments": 2 * size,
        "devices": exported.nr_devices,
    }


def main(config: Config) -> dict[str, Any]:
    """Prints the decoder's plan and the ratios.

    Args:
      config: what to compile.

    Returns:
      For each number of layers the ratios to AdamW by optimizer, and the plan under
      ``"decoder"`` where it is asked for.
    """
    found: dict[str, Any] = {}
    if config.decoder:
        plan = found["decoder"] = lower_decoder(config.decoder, config.mesh)
        sent = ", ".join(
            f"{name} of {size:,} bytes" for name, size in plan["collectives"]
        )
        print(
            f"decoder of {config.decoder} layers on {plan['devices']} devices: groups "
            f"{plan['find_groups']:.1f} s, {plan['channels']:,} channels, lowered in "
            f"{plan['lower']:.1f} s; collectives of a step: {sent}; GB on each device: "
            + ", ".join(
                f"{name} {plan[name] / 1e9:.2f}" for name in ("parameters", "moments")
            )
        )
    for layers in config.layers:
        params, groups = transformer(layers)
        chosen = {
            name: tx
            for name, tx in optimizers(groups).items()
            if name == "adamw" or not config.names or name in config.names
        }
        seconds = {}
        for name, tx in chosen.items():
            seconds[name] = compile_seconds(tx, params)
            ratio = seconds[name] / seconds["adamw"]
            print(
                f"{layers} layers, {len(groups)} dimensions, {len(params)} leaves: "
                f"{name} {seconds[name]:.1f} s, ratio to adamw {ratio:.2f}"
            )
        found[str(layers)] = {k: s / seconds["adamw"] for k, s in seconds.items()}
    return found


if __name__ == "__main__":
    main(tyro.cli(Config))
