"""The target: exact counts, floors, rankings, and what parameters and FLOPs say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import optimize

import sdp_jax
from sdp_jax.channels import PerChannel
from tests import toy

ATTENTION = {n: (6, 32) for n in "qkv"} | {"o": (32, 20), "p": (20, 3)}


def attention(p, x):
    q, k, v = ((x @ p[n]).reshape(5, 4, 8).swapaxes(0, 1) for n in "qkv")
    out = jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v
    return jnp.tanh(out.swapaxes(0, 1).reshape(5, 32) @ p["o"]) @ p["p"]


@given(
    a=hnp.arrays(np.float32, (7,), elements=st.integers(0, 6).map(float)),
    b=hnp.arrays(np.float32, (4,), elements=st.integers(0, 6).map(float)),
    wanted=st.integers(0, 9),
    floor=st.integers(0, 2),
)
@settings(max_examples=25)
def test_target_is_hit_exactly_also_under_ties(a, b, wanted, floor):
    norms = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    groups, floors = toy.line_groups(a=7, b=4), [floor, floor]
    strength = sdp_jax.target_sparsity(wanted / 11, 0, 3)
    if 11 - wanted < 2 * floor:
        with pytest.raises(ValueError, match="lower the sparsity or min_channels"):
            strength.init(groups, floors)
        return
    with jax.disable_jit():
        state, vector = strength.init(groups, floors), groups.join(norms)
        for _ in range(3):
            thresholds, state = strength.update(state, vector, groups, floors)
    thresholds = groups.split(thresholds)
    zero = {k: np.isinf(np.asarray(v)) for k, v in thresholds.items()}
    assert sum(z.sum() for z in zero.values()) == wanted
    for k in norms:
        assert (~zero[k]).sum() >= max(
            floor, np.floor(len(zero[k]) * (1 - wanted / 11) / 2)
        )
        assert (np.asarray(thresholds[k])[~zero[k]] == 0).all()


def test_target_rises_by_its_ramp_and_then_stays_fixed():
    rng = np.random.default_rng(0)
    norms = {
        "a": jnp.asarray(rng.uniform(1, 2, 60)),
        "b": jnp.asarray(rng.uniform(1, 2, 40)),
    }
    strength = sdp_jax.target_sparsity(0.5, 10, 40)
    out, state = toy.run_strength(strength, 45, norms, {"a": 1, "b": 1})
    zeros = [sum(np.isinf(v).sum() for v in t.values()) for t in out]
    done = np.clip((np.arange(1, 46) - 10) / 30, 0, 1)
    ramp = 50 * (1 - (1 - done) ** 3)
    np.testing.assert_array_equal(zeros, np.ceil(ramp - 1e-3))
    # The threshold of what stays is zero.
    assert {float(x) for t in out for v in t.values() for x in v} == {0, np.inf}
    # After the end other norms do not change the set.
    groups = toy.line_groups(a=60, b=40)
    turned = {k: 3 - v for k, v in norms.items()}
    after, _ = strength.update(state, groups.join(turned), groups, [1, 1])
    after = groups.split(after)
    for k in norms:
        np.testing.assert_array_equal(after[k], out[44][k])


def test_what_is_gone_stays_gone_unless_it_is_taken_back():
    groups = toy.line_groups(a=8)
    strength = sdp_jax.target_sparsity(0.5, 0, 8)
    state = strength.init(groups, [1])
    scores = jnp.arange(1.0, 9.0)
    for _ in range(2):
        thresholds, state = strength.update(state, scores, groups, [1])
    gone = np.isinf(thresholds)
    assert 0 < gone.sum() < 4 and gone[: gone.sum()].all()
    # Zero as it is, it comes first, whatever the others are.
    lower = jnp.where(gone, 0, scores[::-1])
    for _ in range(6):
        thresholds, state = strength.update(state, lower, groups, [1])
    assert np.isinf(thresholds)[gone].all() and np.isinf(thresholds).sum() == 4
    # Before the end a host may take channels back: then they have a score again.
    state = strength.init(groups, [1])
    for _ in range(2):
        thresholds, state = strength.update(state, scores, groups, [1])
    for _ in range(6):
        thresholds, state = strength.update(state, scores[::-1], groups, [1])
    assert np.isinf(thresholds).tolist() == [False] * 4 + [True] * 4


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("target", ["channels", "params", "flops"])
def test_no_dimension_falls_below_half_of_the_uniform_width(sparsity, target):
    params = {k: jnp.ones(s) for k, s in ATTENTION.items()}
    groups = sdp_jax.find_groups(attention, params, jnp.ones((5, 6)))
    counts = {"params": groups.parameters, "flops": groups.flops}.get(target)

    def left(share):
        if counts is None:
            return share
        widths = [share * n for n in groups.sizes.values()]
        return counts.at(widths) / counts.at(list(groups.sizes.values()))

    uniform = optimize.brentq(lambda u: left(u) - (1 - sparsity), 0, 1)
    strength = sdp_jax.target_sparsity(sparsity, 0, 4, target=target)
    for lowest in groups.sizes:
        scores = {
            k: jnp.arange(1.0, n + 1) * (1e-3 if k == lowest else 1)
            for k, n in groups.sizes.items()
        }
        out, _ = toy.run_strength(strength, 4, scores, dict.fromkeys(scores, 1), groups)
        size = groups.sizes[lowest]
        kept = size - int(np.isinf(out[-1][lowest]).sum())
        least = max(1, round(0.5 * uniform * size))
        assert kept >= least
        if sparsity > 0.3:  # It goes as far as it may.
            assert kept == least


def test_target_within_each_dimension():
    norms = {"a": jnp.arange(1.0, 9.0), "b": jnp.arange(101.0, 105.0)}
    strength = sdp_jax.target_sparsity(0.5, 0, 2, ranking="dimension")
    out, _ = toy.run_strength(strength, 2, norms, {"a": 1, "b": 1})
    assert [int(np.isinf(out[-1][k]).sum()) for k in "ab"] == [4, 2]
    everywhere = sdp_jax.target_sparsity(0.5, 0, 2)
    out, _ = toy.run_strength(everywhere, 2, norms, {"a": 1, "b": 1})
    # At least a quarter of a dimension stays where a half of all does.
    assert [int(np.isinf(out[-1][k]).sum()) for k in "ab"] == [6, 0]


def test_floor_protects_a_whole_layer_from_a_global_target():
    norms = {"a": jnp.arange(1.0, 9.0), "b": jnp.arange(101.0, 109.0)}
    out, _ = toy.run_strength(
        sdp_jax.target_sparsity(0.5, 0, 2), 2, norms, {"a": 3, "b": 1}
    )
    assert [int(np.isinf(out[-1][k]).sum()) for k in "ab"] == [5, 3]


def test_target_state_survives_the_checkpoint_types():
    strength = sdp_jax.target_sparsity(0.5, 0, 2)
    _, state = toy.run_strength(strength, 3, {"a": jnp.arange(1.0, 5.0)}, {"a": 1})
    leaves, treedef = jax.tree.flatten(state)
    again = treedef.unflatten([jnp.asarray(np.asarray(x)) for x in leaves])
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert isinstance(again.removed, PerChannel)


@pytest.mark.parametrize("floor", [3, 5])
def test_floors_that_are_arrays_win_over_the_target(floor):
    strength = sdp_jax.target_sparsity(0.75, 0, 2)
    norms = {"a": jnp.arange(1.0, 9.0)}
    out, _ = toy.run_strength(strength, 4, norms, {"a": jnp.asarray(floor)})
    left = np.flatnonzero(~np.isinf(out[-1]["a"]))
    assert left.tolist() == list(range(8 - floor, 8))


@pytest.mark.parametrize("target", ["params", "flops"])
@pytest.mark.parametrize("ranking", ["global", "dimension"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75])
def test_target_counts_parameters_or_flops(target, ranking, sparsity):
    rng = np.random.default_rng(0)
    params = {
        k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in ATTENTION.items()
    }
    x = jnp.ones((5, 6))
    groups = sdp_jax.find_groups(attention, params, x)
    assert sorted(groups.sizes.values()) == [4, 8, 8, 20]
    strength = sdp_jax.target_sparsity(sparsity, 1, 5, target=target, ranking=ranking)
    norms = {
        k: jnp.asarray(rng.uniform(1, 2, n), jnp.float32)
        for k, n in groups.sizes.items()
    }
    floors = dict.fromkeys(groups.sizes, 1)
    thresholds, _ = toy.run_strength(strength, 8, norms, floors, groups)

    def left(kept):
        cut = sdp_jax.Cut(groups, tuple(kept[d.name] for d in groups))
        small = cut.take(params)
        count = sdp_jax.cost(sdp_jax.narrow(attention, cut), small, x)
        return count.parameters if target == "params" else count.flops

    # The oracle removes one channel after the other and counts the small function.
    order = []
    for name, v in norms.items():
        ranked = np.argsort(v)[:-1].tolist()
        for place, i in enumerate(ranked):
            key = (place + 1) / len(ranked) if ranking == "dimension" else float(v[i])
            order.append((key, name, i))
    kept = {k: tuple(range(n)) for k, n in groups.sizes.items()}
    goal = (1 - sparsity) * left(kept) * (1 + 1e-6)
    for _, name, i in sorted(order, key=lambda item: item[0]):
        if left(kept) <= goal:
            break
        kept[name] = tuple(j for j in kept[name] if j != i)
    assert left(kept) <= goal
    found = {
        k: tuple(np.flatnonzero(np.asarray(norms[k]) > t).tolist())
        for k, t in thresholds[4].items()
    }
    assert found == kept
    assert all(
        np.array_equal(thresholds[-1][k] > norms[k], thresholds[4][k] > norms[k])
        for k in norms
    )
    # It rises: no more is gone earlier.
    for earlier, later in zip(thresholds[:4], thresholds[1:5], strict=True):
        for k in norms:
            assert (earlier[k] <= later[k] * (1 + 1e-6)).all()


def test_training_ends_at_the_share_of_flops():
    params = toy.mlp_params(widths=(4, 32, 24, 3))
    x, y = toy.batch(size=32)
    groups = sdp_jax.find_groups(toy.mlp_apply, params, x)
    strength = sdp_jax.target_sparsity(0.6, 5, 40, target="flops")
    tx = sdp_jax.altsdp(0.05, groups, strength=strength)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(toy.loss)(params, (x, y))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    dense = sdp_jax.cost(toy.mlp_apply, params, x).flops
    for _ in range(50):
        params, state = step(params, state)
    cut = sdp_jax.plan_cut(groups, params)
    small = sdp_jax.cost(sdp_jax.narrow(toy.mlp_apply, cut), cut.take(params), x).flops
    one_channel = 2 * 32 * (32 + 24 + 4 + 3 + 2)
    assert 0.4 * dense - one_channel < small <= 0.4 * dense


def test_targets_say_what_they_need():
    with pytest.raises(ValueError, match="target is 'bytes'; use one of .*'flops'"):
        sdp_jax.target_sparsity(0.5, 0, 10, target="bytes")
    with pytest.raises(ValueError, match="'layer'; use 'global', 'dimension' or"):
        sdp_jax.target_sparsity(0.5, 0, 10, ranking="layer")
    strength = sdp_jax.target_sparsity(0.5, 0, 10, target="flops")
    with pytest.raises(ValueError, match="know no FLOPs, because they were made by"):
        sdp_jax.altsdp(0.1, toy.mlp_groups(), strength=strength)


@pytest.mark.parametrize("target", ["params", "flops"])
def test_targets_that_cannot_be_met_say_so(target):
    groups = toy.mlp_groups()
    if target == "flops":
        x, _ = toy.batch()
        groups = sdp_jax.find_groups(toy.mlp_apply, toy.mlp_params(), x)
    strength = sdp_jax.target_sparsity(0.9, 0, 9, target=target)
    with pytest.raises(ValueError, match=r"min_channels are left, so are \d\d\.\d%"):
        strength.init(groups, [4, 4])


def mixed_groups():
    """Two vectors, which are built alike, and between them a matrix."""
    params = {"a": jnp.ones(8), "c": jnp.ones((2, 4)), "b": jnp.ones(6)}
    axes = {n: [sdp_jax.Member(n, params[n].ndim - 1)] for n in params}
    return sdp_jax.groups_from_axes(params, axes)


def test_isomorphic_ranking_compares_what_is_built_alike():
    norms = {
        "a": jnp.arange(1.0, 9.0),
        "b": jnp.arange(101.0, 107.0),
        "c": jnp.arange(0.1, 0.5, 0.1),
    }
    strength = sdp_jax.target_sparsity(0.5, 0, 2, ranking="isomorphic")
    ones = dict.fromkeys("abc", 1)
    out, _ = toy.run_strength(strength, 3, norms, ones, mixed_groups())
    gone = {k: np.flatnonzero(np.isinf(v)).tolist() for k, v in out[-1].items()}
    # Half of the 14 channels of a and b, and half of the 4 of c.
    assert gone == {"a": [0, 1, 2, 3, 4, 5, 6], "b": [], "c": [0, 1]}
    groups = mixed_groups()
    for ranking, sizes in (("global", [18]), ("isomorphic", [14, 4])):
        assert np.bincount(groups.blocks(ranking)).tolist() == sizes
    with pytest.raises(ValueError, match=r"so are 66.7% of the channels, and at most"):
        strength.init(groups, [6, 3, 3])


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_isomorphic_ranking_counts_parameters(sparsity, seed):
    groups, rng = mixed_groups(), np.random.default_rng(seed)
    norms = {k: jnp.asarray(rng.permutation(n) + 1.0) for k, n in groups.sizes.items()}
    norms["b"] = norms["b"] + 0.5
    strength = sdp_jax.target_sparsity(
        sparsity, 0, 3, target="params", ranking="isomorphic"
    )
    ones = dict.fromkeys("abc", 1)
    out, _ = toy.run_strength(strength, 5, norms, ones, groups)
    # The largest of each stays; the others go in the order of their places in blocks.
    order = []
    for block in ("ab", "c"):
        free = [(float(norms[k][i]), k, int(i)) for k in block
                for i in np.argsort(norms[k])[:-1]]  # fmt: skip
        for place, (_, name, i) in enumerate(sorted(free)):
            order.append(((place + 1) / len(free), "acb".index(name), i, name))
    left, gone = 22, {k: [] for k in norms}
    for *_, i, name in sorted(order):
        if left <= 22 * (1 - sparsity) * (1 + 1e-6):
            break
        left -= 2 if name == "c" else 1
        gone[name].append(i)
    for later in out[2:]:
        found = {k: np.flatnonzero(np.isinf(v)).tolist() for k, v in later.items()}
        assert found == {k: sorted(v) for k, v in gone.items()}


def test_a_long_ramp_looks_at_a_hundred_of_its_steps():
    groups = toy.line_groups(a=8)
    strength = sdp_jax.target_sparsity(0.5, 10, 1015)
    state = strength.init(groups, [1])
    due = [
        bool(strength.is_due(state._replace(count=jnp.asarray(count))))
        for count in range(1030)
    ]
    # The state counts the updates before the one that is due.
    assert np.flatnonzero(due).tolist() == [*range(19, 1010, 10), 1014]


def test_without_numbers_nothing_is_decided():
    groups = toy.line_groups(a=8)
    strength = sdp_jax.target_sparsity(0.5, 0, 8)
    state = strength.init(groups, [1])
    thresholds, state = strength.update(state, jnp.arange(1.0, 9.0), groups, [1])
    again, after = strength.update(state, jnp.full(8, jnp.nan), groups, [1])
    np.testing.assert_array_equal(again, thresholds)
    np.testing.assert_array_equal(after.removed.per_channel, state.removed.per_channel)
    np.testing.assert_array_equal(after.level.per_channel, state.level.per_channel)
    assert int(after.count) == 2


@pytest.mark.parametrize("sparsity", [0.3, 0.6])
@pytest.mark.parametrize("target", ["channels", "flops"])
@pytest.mark.parametrize("multiple", [3, 4])
def test_a_target_ends_at_rounded_widths_and_counts_them(sparsity, target, multiple):
    params = {k: jnp.ones(s) for k, s in ATTENTION.items()}
    groups = sdp_jax.find_groups(attention, params, jnp.ones((5, 6)))
    sizes = np.asarray(list(groups.sizes.values()))
    counts = {"params": groups.parameters, "flops": groups.flops}.get(target)

    def left(widths):
        return counts.at(widths) / counts.at(sizes) if counts else sum(widths) / 40

    rng = np.random.default_rng(0)
    strength = sdp_jax.target_sparsity(sparsity, 0, 6, target=target, round_to=multiple)
    for _ in range(2):
        scores = {
            k: jnp.asarray(rng.uniform(0.1, 10) * rng.uniform(1, 2, n), jnp.float32)
            for k, n in groups.sizes.items()
        }
        out, _ = toy.run_strength(strength, 6, scores, dict.fromkeys(scores, 1), groups)
        for thresholds in out:
            widths = [int((~np.isinf(t)).sum()) for t in thresholds.values()]
            assert all(
                w % multiple == 0 or w == n for w, n in zip(widths, sizes, strict=True)
            )
        assert left(widths) <= (1 - sparsity) * (1 + 1e-6)
        for name, t in out[-1].items():
            gone, values = np.isinf(t), np.asarray(scores[name])
            assert values[gone].max(initial=0) <= values[~gone].min()
