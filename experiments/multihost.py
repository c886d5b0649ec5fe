"""Trains on several processes, cuts, saves, and loads on another mesh: to be copied.

One command for each process, alike but for its number::

    python -m experiments.multihost DIRECTORY --coordinator HOST:PORT --processes 2 \
        --process 0
    python -m experiments.multihost DIRECTORY --coordinator HOST:PORT --processes 2 \
        --process 1

``HOST:PORT`` is free on the machine of process 0, and ``DIRECTORY`` one that all of
them see. Where JAX knows the cluster (Slurm, Cloud TPU) ``--coordinator`` is left out.
If a process dies, end the others and start all anew: they go on from the last
checkpoint, and the result is the same to the last bit. With ``--load`` the small
network is evaluated, on whatever number of processes and mesh.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

import sdp_jax
from experiments import data

# Between steps all weights are split over "data" (FSDP), those of the hidden layers
# also over "model".
LAYOUT = {
    **{"in": P("data", "model"), "in_bias": P("model")},
    **{"mid": P("model", "data"), "mid_bias": P("data")},
    **{"out": P("data", None), "out_bias": P()},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What one process does.

    Attributes:
      directory: of the run, for all processes the same.
      coordinator: address of process 0.
      processes: how many there are.
      process: number of this one.
      model: devices that share each hidden layer; the others share the batch.
      width: channels of each hidden layer.
      steps: of training.
      every: steps from one checkpoint to the next.
      batch: examples in each step.
      sparsity: share of the channels that goes.
      learning_rate: of Adam.
      seed: of initialisation and data.
      load: evaluate what an earlier run has saved.
    """

    directory: tyro.conf.Positional[pathlib.Path]
    coordinator: str | None = None
    processes: int = 1
    process: int = 0
    model: int = 2
    width: int = 128
    steps: int = 400
    every: int = 50
    batch: int = 128
    sparsity: float = 0.5
    learning_rate: float = 3e-3
    seed: int = 0
    load: bool = False


def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Logits of a network of two hidden layers, on a mesh of explicit axes."""
    # Weights come from the devices along "data" when they are needed.
    w, b = reshard(params["in"], P(None, "model")), params["in_bias"]
    h = jax.nn.relu(x @ w + b)
    # Each device along "model" adds up its channels; then all of these are joined.
    w, b = reshard(params["mid"], P("model", None)), reshard(params["mid_bias"], P())
    h = jax.nn.relu(jnp.dot(h, w, out_sharding=P("data", None)) + b)
    return h @ reshard(params["out"], P()) + params["out_bias"]


def loss(params: Any, images: jax.Array, targets: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy(apply(params, images), targets).mean()


def shapes(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The dense parameters as they lie on the mesh."""
    n = config.width
    sizes = {"in": (64, n), "in_bias": (n,), "mid": (n, n), "mid_bias": (n,)}
    sizes |= {"out": (n, 10), "out_bias": (10,)}
    return {
        name: jax.ShapeDtypeStruct(
            size, jnp.float32, sharding=NamedSharding(mesh, LAYOUT[name])
        )
        for name, size in sizes.items()
    }


def init(config: Config, mesh: Mesh) -> dict[str, jax.Array]:
    """The first parameters: the same on any mesh."""
    rng = np.random.default_rng(config.seed)
    params = {}
    for name, leaf in shapes(config, mesh).items():
        scale = (2 / leaf.shape[0]) ** 0.5 if len(leaf.shape) > 1 else 0.0
        whole = scale * rng.standard_normal(leaf.shape, np.float32)
        params[name] = jax.device_put(whole, leaf.sharding)
    return params


def together(mesh: Mesh, split: data.Split, index: np.ndarray) -> tuple[Any, Any]:
    """Some examples as arrays of all processes, each of which hands in its part."""
    mine = np.array_split(index, jax.process_count())[jax.process_index()]
    images = split.images[mine].reshape(len(mine), -1)
    targets = np.eye(10, dtype=np.float32)[split.labels[mine]]
    place = NamedSharding(mesh, P("data"))
    images, targets = (
        jax.make_array_from_process_local_data(place, x, (len(index), x.shape[1]))
        for x in (images, targets)
    )
    return images, targets


def accuracy(fn: Any, params: Any, mesh: Mesh, split: data.Split) -> float:
    """On as many examples as the devices share evenly."""
    count = len(split.labels) // mesh.shape["data"] * mesh.shape["data"]

    @jax.jit
    def right(params: Any, images: jax.Array, targets: jax.Array) -> jax.Array:
        return (fn(params, images).argmax(-1) == targets.argmax(-1)).mean()

    return float(right(params, *together(mesh, split, np.arange(count))))


def digest(tree: Any) -> str:
    """A hash of all bits, the same in all processes."""
    whole = multihost_utils.process_allgather(tree, tiled=True)
    leaves = [np.asarray(x).tobytes() for x in jax.tree.leaves(whole)]
    return hashlib.sha256(b"".join(leaves)).hexdigest()


def train(config: Config, mesh: Mesh, split: data.Split) -> tuple[Any, Any, Any]:
    """Trains to the end, from the last checkpoint on if there is one."""
    params = init(config, mesh)
    examples = together(mesh, split, np.arange(config.batch))
    groups = sdp_jax.find_groups(apply, params, examples[0])
    strength = sdp_jax.target_sparsity(
        config.sparsity, config.steps // 4, config.steps * 3 // 4
    )
    base = optax.adam(config.learning_rate)
    tx = sdp_jax.altsdp(base, groups, strength=strength)
    state = {"params": params, "opt": jax.jit(tx.init)(params)}

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, images: jax.Array, targets: jax.Array) -> Any:
        grads = jax.grad(loss)(state["params"], images, targets)
        updates, opt = tx.update(grads, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}

    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, save_interval_steps=config.every, cleanup_tmp_directories=True
    )
    with ocp.CheckpointManager(config.directory / "training", options=options) as kept:
        done = kept.latest_step() or 0
        if done:  # Only whole checkpoints count.
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = kept.restore(done, args=ocp.args.StandardRestore(like))
            print(f"goes on behind step {done}", file=sys.stderr)
        for number in range(done, config.steps):
            # What a step sees depends on its number alone.
            rng = np.random.default_rng((config.seed, number))
            index = rng.choice(len(split.labels), config.batch, replace=False)
            state = step(state, *together(mesh, split, index))
            last = number + 1 == config.steps
            kept.save(number + 1, args=ocp.args.StandardSave(state), force=last)
    sdp_jax.check_zeros(state["opt"])
    return groups, state["params"], state["opt"]


def run(config: Config) -> dict[str, Any]:
    """Trains, cuts and saves; or loads. All processes return the same."""
    count = jax.device_count()
    if jax.local_device_count() % config.model or config.batch % count:
        raise ValueError(
            f"--model {config.model} must divide the {jax.local_device_count()} "
            f"devices of a process, and all {count} devices --batch {config.batch}"
        )
    mesh = jax.make_mesh((count // config.model, config.model), ("data", "model"))
    dataset = data.load("digits")
    small = config.directory / "small"
    with jax.set_mesh(mesh):
        if config.load:
            pruned = sdp_jax.load(small, apply, like=shapes(config, mesh))
            record = {}
        else:
            groups, params, opt = train(config, mesh, dataset.train)
            x, _ = together(mesh, dataset.train, np.arange(config.batch))
            # Widths that the devices share; compares with the dense network on x.
            pruned = sdp_jax.prune(apply, params, x, groups=groups, round_to="mesh")
            small_opt = pruned.take(opt)  # Training could go on with it.
            record = {
                "zeros": groups.num_channels
                - int(np.sum(sdp_jax.channels_alive(groups, params))),
                "hash": digest(params),
                "small_opt_hash": digest(small_opt),
                "accuracy": accuracy(apply, params, mesh, dataset.test),
            }
            if not small.exists():
                pruned.save(small)  # All call it, one writes; whole or not at all.
        record["widths"] = pruned.cut.widths
        record["small_hash"] = digest(pruned.params)
        found = accuracy(pruned.apply, pruned.params, mesh, dataset.test)
        return record | {"small_accuracy": found}


def main(config: Config) -> None:
    if config.processes > 1:
        jax.distributed.initialize(config.coordinator, config.processes, config.process)
    config = dataclasses.replace(config, directory=config.directory.absolute())
    print(json.dumps(run(config)), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config))
