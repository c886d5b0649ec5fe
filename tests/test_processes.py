"""Two processes prune, save and load as one."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

import sdp_jax
from sdp_jax import plan
from sdp_jax.measure import Timing
from tests import processes

KEPT = (0, 2, 3, 5)
SMALL = np.arange(24, dtype=np.float32).reshape(4, 6)[:, list(KEPT)]
# Gloo prints lines of its own.
WORDS = ("FileExistsError", "RuntimeError", "loaded")


def fn(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


def dense_shapes():
    shapes = {"w": (4, 6), "b": (6,), "v": (6, 3)}
    return {k: jax.ShapeDtypeStruct(s, np.float32) for k, s in shapes.items()}


def model(w):
    """A cut model: a matrix as given, a vector of this process, and of NumPy."""
    x = jax.ShapeDtypeStruct((1, 4), np.float32)
    cut = sdp_jax.Cut(sdp_jax.find_groups(fn, dense_shapes(), x), (KEPT,))
    params = {"w": w, "b": jnp.ones(4), "v": np.ones((4, 3), np.float32)}
    return sdp_jax.Pruned(fn, params, cut)


def run(number, port, folder):
    """What each of the two processes does."""

    def initialize():
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)

    processes.joined(initialize)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("d",))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    w = jax.make_array_from_callback(SMALL.shape, where, lambda i: SMALL[i])
    # Each gives a path of its own; that of the first one counts.
    model(w).save(f"{folder}/{('together', 'other')[number]}")
    try:
        model(w).save(f"{folder}/together")
    except (FileExistsError, RuntimeError) as error:
        print(type(error).__name__)
    for name in ("together", "alone"):
        found = sdp_jax.load(f"{folder}/{name}", fn)
        np.testing.assert_array_equal(found.params["w"], SMALL)
    like = found.params | {"w": w}
    found = sdp_jax.load(f"{folder}/together", fn, like=like).params["w"]
    assert found.sharding == where and not found.is_fully_addressable
    for part in found.addressable_shards:
        np.testing.assert_array_equal(part.data, SMALL[part.index])
    like = jax.ShapeDtypeStruct((4, 6), np.float32, sharding=where)  # the dense one
    w = sdp_jax.load(f"{folder}/together", fn, like=dense_shapes() | {"w": like})
    assert w.params["w"].sharding == where
    prune_together(where)
    print("loaded")


def prune_together(where):
    """What finds, decides, compares and counts sees the whole of arrays."""
    rng = np.random.default_rng(0)
    whole = {k: rng.normal(size=x.shape) for k, x in dense_shapes().items()}
    whole["w"][:, 1:3] = whole["b"][1:3] = 0
    x = np.ones((8, 4), np.float32)

    def put(array):
        array = np.float32(array)
        return jax.make_array_from_callback(array.shape, where, lambda i: array[i])

    params = whole | {"w": put(whole["w"])}
    pruned = sdp_jax.prune(fn, params, put(x))
    assert pruned.cut.kept == ((0, 3, 4, 5),)
    given = {"scores": put(np.arange(8.0))[:6], "sparsity": 0.5}
    assert sdp_jax.plan_cut(pruned.cut.dense, params, **given).kept == ((3, 4, 5),)

    def latency(dense, small, args):
        """The clock of the first process says something, that of the other nothing."""
        ratio = args[1][0]["v"].shape[0] / 6 if jax.process_index() == 0 else 1.0
        return None, Timing(1.0, ratio, ratio, ratio)

    plan.latency = latency
    timed = {"target": "latency", "fn": fn, "inputs": (x,)}
    cut = sdp_jax.plan_cut(pruned.cut.dense, params, **given, **timed)
    assert cut.kept == ((3, 4, 5),)


def test_two_processes_save_once_and_any_number_loads(tmp_path):
    port = str(processes.free_port())
    model(jnp.asarray(SMALL)).save(tmp_path / "alone")
    with processes.two(
        __file__, lambda number: [str(number), port, str(tmp_path)], devices=2
    ) as both:
        told, codes = processes.said(both)
    assert codes == [0, 0], told
    lines = [[s for s in out.split() if s in WORDS] for out, _ in told]
    assert lines == [
        ["FileExistsError", "loaded"],
        ["RuntimeError", "loaded"],
    ]
    # One path, and nothing of the one that was refused.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "together"]
    found = sdp_jax.load(tmp_path / "together", fn, jnp.ones((1, 4)))
    for k, x in model(SMALL).params.items():
        np.testing.assert_array_equal(found.params[k], x)


if __name__ == "__main__":
    run(int(sys.argv[1]), *sys.argv[2:])
