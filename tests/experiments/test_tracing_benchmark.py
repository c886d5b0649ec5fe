import math

import jax
import jax.numpy as jnp
import pytest

import sdp_jax
from experiments.benchmarks import tracing

IMAGE = jnp.ones((2, 32, 32, 3))
TWINS = {
    "ResNet-50": [tracing.ResNet50(n, depths=(1, 1)) for n in (1, 2)],
    "ViT-S/16": [tracing.ViT(*size, depth=1) for size in ((), (192, 3, 32))],
}


@pytest.mark.parametrize("name", TWINS)
def test_half_of_a_network_is_the_one_written_at_half_its_widths(name):
    network, twin = TWINS[name]
    shapes, written = (
        jax.eval_shape(n.init, jax.random.key(0), IMAGE) for n in (network, twin)
    )
    groups = sdp_jax.find_groups(network.apply, shapes, IMAGE)
    cut = sdp_jax.Cut(groups, tuple(tuple(range(d.size // 2)) for d in groups))
    half = jax.eval_shape(cut.take, shapes)
    assert jax.tree.map(jnp.shape, half) == jax.tree.map(jnp.shape, written)
    # And costs what that one costs.
    narrowed = sdp_jax.narrow(network.apply, cut)
    costs = [
        sdp_jax.cost(fn, params, IMAGE).flops
        for fn, params in ((narrowed, half), (twin.apply, written))
    ]
    assert costs[0] == pytest.approx(costs[1], rel=1e-3)


def test_the_decoder_is_traced_from_shapes_alone():
    shapes = tracing.decoder_shapes(80)
    assert 69e9 < sum(x.size for x in jax.tree.leaves(shapes)) < 71e9
    small = tracing.decoder_shapes(2, narrower=32)
    words = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    trace, extra, groups = tracing.time_groups(tracing.decoder, small, words, 1)
    assert trace > 0 and math.isfinite(extra)
    width, hidden = 8192 // 32, 28672 // 32
    # Both layers have groups of heads and a gated hidden layer.
    assert sorted(groups.sizes.values(), reverse=True)[:3] == [hidden, hidden, width]


@pytest.mark.study
def test_all_columns_are_filled(capsys):
    figures = tracing.main(tracing.Config(repeats=1, image=32, layers=2, full=False))
    assert set(figures) == {
        "ResNet-50",
        "DenseNet-121",
        "ViT-S/16",
        "ViT-B/16",
        "decoder",
    }
    # Differences of two times may come out negative on a busy machine.
    values = [value for key in figures for value in figures[key].values()]
    assert len(values) > 15 and all(map(math.isfinite, values))
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 6 and lines[-1].startswith("decoder, 2 layers")
