"""Which channels go, by zeros and by scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sdp_jax
from sdp_jax import fast
from sdp_jax.measure import Timing
from tests import toy

PARAMS = toy.mlp_params(widths=(4, 12, 8, 3))
GROUPS = toy.mlp_groups(PARAMS)
SCORES = {"hidden0": np.arange(12.0), "hidden1": 0.5 + np.arange(8.0)[::-1]}
X, _ = toy.batch()


def plan(**kwargs):
    return sdp_jax.plan_cut(GROUPS, PARAMS, **({"scores": SCORES} | kwargs))


def test_the_lowest_scores_go_first():
    cut = plan(sparsity=0.5)
    every = sorted([*SCORES["hidden0"], *SCORES["hidden1"]])
    left = [SCORES[d.name][i] for d, k in zip(GROUPS, cut.kept, strict=True) for i in k]
    assert sorted(left) == every[10:]


@given(
    sparsity=st.floats(0, 0.85),
    ranking=st.sampled_from(["global", "dimension", "isomorphic"]),
    seed=st.integers(0, 3),
)
def test_shares_of_channels_are_exact(sparsity, ranking, seed):
    rng = np.random.default_rng(seed)
    scores = {name: rng.normal(size=size) for name, size in GROUPS.sizes.items()}
    cut = sdp_jax.plan_cut(
        GROUPS, PARAMS, scores=scores, sparsity=sparsity, ranking=ranking
    )
    left = cut.widths
    if ranking == "dimension":
        assert left == {n: s - round(sparsity * s) for n, s in GROUPS.sizes.items()}
    else:
        assert sum(left.values()) == 20 - round(sparsity * 20)
    assert min(left.values()) >= 1


@given(sparsity=st.floats(0, 0.9), ranking=st.sampled_from(["global", "dimension"]))
def test_shares_of_parameters_are_met_to_a_channel(sparsity, ranking):
    cut = plan(sparsity=sparsity, target="params", ranking=ranking)
    dense = sum(x.size for x in jax.tree.leaves(PARAMS))
    left = sum(x.size for x in jax.tree.leaves(cut.take(PARAMS)))
    assert left <= (1 - sparsity) * dense + 1e-6
    # The dearest channel is one of hidden0's: 4 + 1 + 8 entries, or 12 + 1 + 3.
    assert left > (1 - sparsity) * dense - 16


@pytest.mark.parametrize(
    ("alive", "multiple", "widths"),
    [
        ((7, 3), 4, (8, 4)),
        ((9, 2), 4, (12, 2)),
        ((9, 5), 8, (12, 8)),
        ((7, 3), 1, (7, 3)),
    ],
)
def test_widths_that_are_fast(monkeypatch, alive, multiple, widths):
    monkeypatch.setattr(fast, "fast_multiple", lambda: multiple)
    params = alive_at(*(jnp.arange(n) < k for n, k in zip((12, 8), alive, strict=True)))
    cut = sdp_jax.plan_cut(GROUPS, params, round_to="fast")
    assert tuple(cut.widths.values()) == widths
    pruned = sdp_jax.prune(toy.mlp_apply, params, X, groups=GROUPS, round_to="fast")
    assert cut == pruned.cut
    scored = plan(sparsity=0.3, ranking="dimension", round_to="fast").widths
    assert sum(scored.values()) <= 14
    assert all(w in (1, 2, 4) or w % multiple == 0 or w == 12 for w in scored.values())


def test_bytes_are_counted_in_their_dtypes():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    params["layer2"] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["layer2"])
    scores = sdp_jax.channel_norms(groups, params)

    def size(tree):
        return sum(x.nbytes for x in jax.tree.leaves(tree))

    cuts = [
        sdp_jax.plan_cut(groups, params, scores=scores, sparsity=s, target="bytes")
        for s in np.linspace(0.05, 0.6, 12)
    ]
    for share, cut in zip(np.linspace(0.05, 0.6, 12), cuts, strict=True):
        assert size(cut.take(params)) <= (1 - share) * size(params)
        kept = sum(cut.widths.values())
        more = sdp_jax.plan_cut(
            groups, params, scores=scores, sparsity=(11 - kept - 1) / 11
        )
        assert size(more.take(params)) > (1 - share) * size(params)


def test_processes_that_share_parameters_round_alike(monkeypatch):
    monkeypatch.setattr(fast, "fast_multiple", lambda: 1)
    monkeypatch.setattr("sdp_jax.plan.spread", lambda params: True)
    first = lambda value: np.int32(8)  # noqa: E731
    monkeypatch.setattr(fast.multihost_utils, "broadcast_one_to_all", first)
    params = alive_at(jnp.arange(12) < 6, jnp.arange(8) < 5)
    cut = sdp_jax.plan_cut(GROUPS, params, round_to="fast")
    assert cut.widths == {"hidden0": 8, "hidden1": 8}


def plan_flops(sparsity, params=PARAMS):
    groups = sdp_jax.find_groups(toy.mlp_apply, params, X)
    assert list(groups.sizes.values()) == list(GROUPS.sizes.values())
    scores = GROUPS.join(SCORES)
    return sdp_jax.plan_cut(
        groups, params, scores=scores, sparsity=sparsity, target="flops"
    )


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7])
def test_shares_of_flops_are_met_to_a_channel(sparsity):
    cut = plan_flops(sparsity)
    dense = sdp_jax.cost(toy.mlp_apply, PARAMS, X).flops
    narrowed = sdp_jax.narrow(toy.mlp_apply, cut)
    left = sdp_jax.cost(narrowed, cut.take(PARAMS), X).flops
    assert left <= (1 - sparsity) * dense
    assert left > (1 - sparsity) * dense - 2 * 16 * 17 - 64
    assert plan_flops(sparsity, jax.eval_shape(lambda: PARAMS)) == cut


def test_scores_are_a_vector_or_arrays_by_name():
    vector = GROUPS.join(SCORES)
    for scores in (vector, np.asarray(vector), dict(reversed(SCORES.items()))):
        assert plan(scores=scores, sparsity=0.5) == plan(sparsity=0.5)


def test_scores_keep_their_64_bits():
    near = {name: 1 + 1e-12 * np.arange(n)[::-1] for name, n in GROUPS.sizes.items()}
    cut = plan(scores=near, sparsity=0.5, ranking="dimension")
    assert cut.kept == (tuple(range(6)), tuple(range(4)))


def test_latency_is_a_target_too():
    inputs = dict(target="latency", fn=toy.mlp_apply, inputs=(X,))
    assert plan(sparsity=0.0, **inputs).widths == GROUPS.sizes
    # No network is a million times as fast for the loss of a few channels.
    with pytest.raises(ValueError, match="of latency cannot be met"):
        plan(sparsity=1 - 1e-6, **inputs)


def test_latency_is_searched_in_the_ratio_of_two_timings(monkeypatch):
    sizes = []

    def timed(dense, small, *, args):
        """A machine whose speed drifts and on which a call takes FLOPs."""
        sizes.append(sum(jax.tree.leaves(jax.tree.map(np.size, args[1][0]))))
        first, second = (
            sdp_jax.cost(fn, *given).flops
            for fn, given in zip((dense, small), args, strict=True)
        )
        drift = 1.0 + len(sizes)
        ratio = second / first
        return [Timing(drift * first, 1, 1, 1), Timing(drift * second, *[ratio] * 3)]

    monkeypatch.setattr("sdp_jax.plan.latency", timed)
    inputs = dict(sparsity=0.5, fn=toy.mlp_apply, inputs=(X,))
    assert plan(target="latency", **inputs).kept == plan_flops(0.5).kept
    assert len(sizes) <= 6


def test_a_latency_met_once_is_taken(monkeypatch):
    """Timings that are no function of the width do not make the search fail."""

    def timed(ratio):
        return [Timing(1.0, 1.0, 1.0, 1.0), Timing(ratio, ratio, ratio, ratio)]

    left = iter([0.4, 0.9, 0.9, 0.9, 0.9, 0.9])
    monkeypatch.setattr("sdp_jax.plan.latency", lambda *_, args: timed(next(left)))
    cut = plan(sparsity=0.5, target="latency", fn=toy.mlp_apply, inputs=(X,))
    assert sum(cut.widths.values()) < 20


def test_floors_limits_and_rounding():
    assert min(plan(sparsity=0.7, min_channels=3).widths.values()) == 3
    limited = plan(sparsity=0.5, limits={"hidden1": 0.25})
    assert limited.widths["hidden1"] >= 6
    assert sum(limited.widths.values()) == 10
    # By the layer that makes the channels, too; layer 2 only reads.
    assert plan(sparsity=0.5, limits={"layer1/*": 0.25}) == limited
    with pytest.raises(ValueError, match="a leaf that makes their channels"):
        plan(sparsity=0.5, limits={"layer2/*": 0.25})
    # Rounding keeps more; the target is met nevertheless, or cannot be.
    rounded = plan(sparsity=0.4, ranking="dimension", round_to=4)
    assert rounded.widths == {"hidden0": 8, "hidden1": 4}
    assert sum(plan(sparsity=0.5, round_to=4).widths.values()) <= 10
    # The next-best channels fill up.
    assert rounded.kept[0] == tuple(range(4, 12))
    with pytest.raises(ValueError, match="rounding 100.0% are left"):
        plan(sparsity=0.5, round_to=64)


def alive_at(hidden0, hidden1):
    factors = GROUPS.join({"hidden0": hidden0, "hidden1": hidden1})
    return sdp_jax.scale_channels(GROUPS, PARAMS, factors.astype(jnp.float32))


def test_zeros_round_up_as_well():
    params = alive_at(jnp.arange(12) > 4, jnp.ones(8, bool))
    assert sdp_jax.plan_cut(GROUPS, params).widths == {"hidden0": 7, "hidden1": 8}
    cut = sdp_jax.plan_cut(GROUPS, params, round_to=4)
    assert cut.widths == {"hidden0": 8, "hidden1": 8}
    np.testing.assert_allclose(
        toy.mlp_apply(cut.take(params), X), toy.mlp_apply(params, X), rtol=1e-5
    )


BAD = {
    "parameters of another model": (
        lambda: sdp_jax.plan_cut(
            GROUPS, {"layer0": {"kernel": X}}, scores=SCORES, sparsity=0.5
        ),
        "find the groups of this model",
    ),
    "limits without scores": (
        lambda: sdp_jax.plan_cut(GROUPS, PARAMS, limits={"*": 0.5}),
        "without scores what is exactly zero goes",
    ),
    "a limit out of range": (
        lambda: plan(sparsity=0.5, limits={"*": 1.5}),
        r"limit of '\*' must be a share between 0 and 1; got 1.5",
    ),
    "sparsity alone": (
        lambda: sdp_jax.plan_cut(GROUPS, PARAMS, sparsity=0.5),
        "belong",
    ),
    "scores alone": (lambda: plan(), "belong together"),
    "sparsity of one": (lambda: plan(sparsity=1.0), r"\[0, 1\); got 1.0"),
    "another target": (lambda: plan(sparsity=0.5, target="size"), "'size'"),
    "another ranking": (lambda: plan(sparsity=0.5, ranking="layer"), "'layer'"),
    "flops of groups made by hand": (
        lambda: plan(sparsity=0.5, target="flops"),
        r"know no FLOPs.*find_groups counts them, and so does .*count_flops\(groups",
    ),
    "latency of nothing": (lambda: plan(sparsity=0.5, target="latency"), "needs fn="),
    "a function for FLOPs": (
        lambda: plan(sparsity=0.5, target="flops", fn=toy.mlp_apply, inputs=(X,)),
        "target='flops' has no use for fn=",
    ),
    "a function for nothing": (
        lambda: plan(sparsity=0.5, fn=toy.mlp_apply),
        "has no use for fn=",
    ),
    "scores that lack a dimension": (
        lambda: sdp_jax.plan_cut(GROUPS, PARAMS, scores={"hidden0": [0]}, sparsity=0.5),
        r"scores: .* lacking are \['hidden1'\]",
    ),
    "scores of another size": (
        lambda: plan(scores=SCORES | {"hidden1": np.ones(7)}, sparsity=0.5),
        r"scores: dimension 'hidden1' has 8 channels, but an array of shape \(7,\)",
    ),
    "scores of too many channels": (
        lambda: plan(scores=np.ones(21), sparsity=0.5),
        r"scores have shape \(21,\); expected one number for each of the 20 channels",
    ),
    "scores in a table": (
        lambda: plan(scores=np.ones((2, 20)), sparsity=0.5),
        r"scores have shape \(2, 20\); expected one number",
    ),
    "scores that are not numbers": (
        lambda: plan(scores=SCORES | {"hidden1": np.full(8, np.nan)}, sparsity=0.5),
        "contain NaN",
    ),
    "floors in the way": (
        lambda: plan(sparsity=0.8, min_channels=4),
        "min_channels and limits let only 12 go",
    ),
    "floors in the way of parameters": (
        lambda: plan(sparsity=0.9, target="params", min_channels=6),
        "cannot be met: with min_channels, limits and rounding",
    ),
    "limits of nothing": (
        lambda: plan(sparsity=0.5, limits={"x*": 0.5}),
        "matches none",
    ),
    "limits above one": (
        lambda: plan(sparsity=0.5, limits={"*": 2}),
        "between 0 and 1",
    ),
    "rounding to zero": (lambda: plan(sparsity=0.5, round_to=0), "round_to must be"),
    "rounding to a word": (
        lambda: plan(sparsity=0.5, round_to="quick"),
        "or 'fast' or 'mesh'; got 'quick'",
    ),
    "rounding to half": (
        lambda: plan(sparsity=0.5, round_to=0.5),
        "round_to must be .* got 0.5",
    ),
    "no channels": (
        lambda: plan(sparsity=0.5, min_channels=-1),
        "min_channels must be .* got -1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    act, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        act()


def test_the_whole_tree_is_looked_at():
    def apply(tree, x):
        return jnp.tanh(x @ tree["a"]) @ tree["b"] + tree["rest"]["shift"]

    tree = {
        "a": jnp.ones((4, 6)),
        "b": jnp.ones((6, 3)),
        "rest": {"shift": jnp.ones(3)},
    }
    groups = sdp_jax.find_groups(apply, tree, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="no leaf 'rest/shift' in the tree; .* whole"):
        sdp_jax.plan_cut(groups, tree | {"rest": {}})


def test_limits_are_numbers():
    with pytest.raises(TypeError, match="must be a share between 0 and 1; got 'a'"):
        plan(sparsity=0.5, limits={"*": "a"})


def test_cuts_go_to_json_and_back():
    cut = plan(sparsity=0.5)
    assert sdp_jax.Cut.from_json(cut.to_json()) == cut
    for text in ("{}", "[", cut.to_json().replace("[[", "[[99, ", 1)):
        with pytest.raises(ValueError, match="not a"):
            sdp_jax.Cut.from_json(text)


def test_fill_is_the_inverse_of_take():
    cut = plan(sparsity=0.5)
    small = cut.take(PARAMS)
    full = cut.fill(small)
    assert jax.tree.map(jnp.shape, full) == jax.tree.map(jnp.shape, PARAMS)
    for a, b in zip(
        jax.tree.leaves(cut.take(full)), jax.tree.leaves(small), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    kept = sum(np.count_nonzero(x) for x in jax.tree.leaves(small))
    assert sum(np.count_nonzero(x) for x in jax.tree.leaves(full)) == kept
    with pytest.raises(ValueError, match="not the parameters of the cut"):
        cut.fill(PARAMS)
