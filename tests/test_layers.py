"""Whole layers go: found, cut, trained away, saved."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sdp_jax
from sdp_jax.tree import leaf_table
from tests import promise, shrunk, toy
from tests.zoo import ZOO


def residual(params, x):
    """Two residual blocks between two plain layers."""
    x = jnp.tanh(x @ params["in"])
    for block in ("first", "second"):
        p = params[block]
        x = x + jax.nn.gelu(x @ p["up"] + p["bias"]) @ p["down"] + p["shift"]
    return x @ params["out"]


def residual_params(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5)

    blocks = {
        name: {
            **{"up": normal(5, 8), "bias": normal(8), "down": normal(8, 5)},
            "shift": normal(5),
        }
        for name in ("first", "second")
    }
    return {"in": normal(3, 5), "out": normal(5, 2), **blocks}


X = jnp.asarray(np.random.default_rng(9).normal(size=(7, 3)))


def found(params=None):
    params = residual_params() if params is None else params
    return sdp_jax.find_groups(residual, params, X)


def removable(fn, params, *inputs, **where):
    groups = sdp_jax.find_groups(fn, params, *inputs, **where)
    return [d.name for d in groups if d.removable]


def test_what_lies_in_a_branch_can_vanish():
    assert removable(residual, residual_params(), X) == ["first", "second"]
    text = str(found())
    assert text.count("may vanish") == 2
    chain = toy.mlp_params()
    assert removable(toy.mlp_apply, chain, jnp.ones((2, 4))) == []


def test_all_that_are_marked_vanish_together():
    p = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 3)), "c": jnp.ones((3, 5))}
    p["d"] = jnp.ones((5, 3))

    def branches(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"] + jnp.tanh(x @ p["c"]) @ p["d"]

    # Either could go, but not both.
    assert removable(branches, p, jnp.ones((2, 3))) == ["a"]


def test_a_loss_still_depends_on_its_inputs_not_on_labels_alone():
    def loss(params, x, y):
        return jnp.mean((toy.mlp_apply(params, x) - y) ** 2)

    params = toy.mlp_params()
    assert removable(loss, params, jnp.ones((2, 4)), jnp.ones((2, 3))) == []

    def residual_loss(params, x, y):
        return jnp.mean((residual(params, x) - y) ** 2)

    y = jnp.ones((7, 2))
    assert removable(residual_loss, residual_params(), X, y) == ["first", "second"]


def test_what_multiplies_the_stream_has_to_stay():
    p = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 3))}
    assert removable(lambda p, x: x * (jnp.tanh(x @ p["a"]) @ p["b"]), p, X) == []
    gated = lambda p, x: x * jax.nn.sigmoid(jnp.tanh(x @ p["a"]) @ p["b"])  # noqa: E731
    assert removable(gated, p, X) == []


def test_keys_of_dropout_do_not_count():
    def fn(p, x, key):
        y = jnp.tanh(x @ p["a"])
        y = jnp.where(jax.random.bernoulli(key, 0.5, y.shape), y, 0)
        return x + y @ p["b"]

    p = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 3))}
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        assert removable(fn, p, X, key) == ["a"]


def test_a_class_token_needs_one_layer_that_mixes():
    rng = np.random.default_rng(0)
    names = {"q": (4, 3), "k": (4, 3), "v": (4, 5), "o": (5, 4)}
    p = {
        f"{n}{i}": jnp.asarray(rng.normal(size=s))
        for i in range(2)
        for n, s in names.items()
    }

    def vit(p, patches):
        token = jnp.ones((patches.shape[0], 1, 4))
        x = jnp.concatenate([token, patches], 1)
        for i in range(2):
            y = x - x.mean(-1, keepdims=True)
            a = jax.nn.softmax((y @ p[f"q{i}"]) @ (y @ p[f"k{i}"]).swapaxes(1, 2))
            x = x + a @ (y @ p[f"v{i}"]) @ p[f"o{i}"]
        return x[:, 0], x

    patches = jnp.asarray(rng.normal(size=(2, 3, 4)))
    token = lambda p, x: vit(p, x)[0]  # noqa: E731
    both = lambda p, x: vit(p, x)[1]  # noqa: E731
    assert removable(token, p, patches) == ["k0", "v0"]
    assert removable(both, p, patches) == ["k0", "k1", "v0", "v1"]


def test_loops_and_branches():
    p = {"a": jnp.ones((2, 3, 4)), "b": jnp.ones((2, 4, 3))}

    def scan(p, x, pred):
        def block(x, layer):
            return x + jnp.tanh(x @ layer["a"]) @ layer["b"], None

        x, _ = jax.lax.scan(block, x, p)
        return x

    def recurrent(p, x, pred):
        # What a step hands on goes through the hidden channels alone.
        def block(x, layer):
            return jnp.tanh(x @ layer["a"]) @ layer["b"], None

        return jax.lax.scan(block, x, p)[0]

    def either(p, x, pred):
        whole = lambda x: x + jnp.tanh(x @ p["a"][0]) @ p["b"][0]  # noqa: E731
        less = lambda x: jnp.tanh(x @ p["a"][0]) @ p["b"][0]  # noqa: E731
        return jax.lax.cond(pred, whole, less, x)

    pred = jnp.array(True)
    assert removable(scan, p, X, pred) == ["a"]
    assert removable(recurrent, p, X, pred) == []
    assert removable(either, p, X, pred) == []


# Whatever combination goes, it is exact: the zoo in all tests of the promise.
@pytest.mark.parametrize(
    "name",
    ["resnet18", "vit", "vit_fused", "decoder", "stacked", "experts", "state_space"],
)
def test_all_layers_of_a_model_gone(name, x64):
    model = ZOO[name]()
    params = promise.randomise(model.shapes)
    groups = sdp_jax.find_groups(model.fn, params, *model.inputs)
    names = [d.name for d in groups if d.removable]
    cut = sdp_jax.cut_layers(groups, names)
    assert names and set(cut.groups.sizes) == set(groups.sizes) - set(names)
    want = jax.jit(model.fn)(cut.zero(params), *model.inputs)
    got = jax.jit(sdp_jax.narrow(model.fn, cut))(cut.take(params), *model.inputs)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        promise.close(a, b, 1e-9)
    for one in (cut, cut.groups, groups):
        assert type(one).from_json(one.to_json()) == one
    # The outputs still depend on the inputs.
    inputs = [
        x + 1 if jnp.issubdtype(x.dtype, jnp.inexact) else (x + 1) % 3
        for x in model.inputs
    ]
    other = jax.jit(model.fn)(cut.zero(params), *inputs)
    assert not np.allclose(jax.tree.leaves(other)[0], jax.tree.leaves(want)[0])


def test_a_removed_layer_costs_nothing():
    params, groups = residual_params(), found()
    cut = sdp_jax.cut_layers(groups, ["first"])
    small = cut.take(params)

    def without(params, x):
        """The network built without the block; what it adds is a constant."""
        x = jnp.tanh(x @ params["in"]) + params["first"]["shift"]
        p = params["second"]
        x = x + jax.nn.gelu(x @ p["up"] + p["bias"]) @ p["down"] + p["shift"]
        return x @ params["out"]

    narrowed = sdp_jax.narrow(residual, cut)
    chex.assert_trees_all_close(narrowed(small, X), without(small, X), rtol=1e-6)
    compiled = [jax.jit(f).lower(small, X).compile() for f in (narrowed, without)]
    ours, theirs = (c.cost_analysis()["flops"] for c in compiled)
    assert ours == theirs
    assert len({c.as_text().count(" dot(") for c in compiled}) == 1
    assert small["first"]["up"].size == small["first"]["down"].size == 0
    flops = groups.need_flops().at
    assert cut.groups.need_flops().at([5, 8]) == flops(
        [cut.widths[n] for n in groups.sizes]
    )
    assert "gone whole: first" in str(cut)


def test_zeros_of_a_whole_branch_are_cut_with_their_layer(tmp_path):
    params, groups = residual_params(), found()
    dead = toy.kill(groups, params, {"first": range(8), "second": (1, 2)})
    pruned = sdp_jax.prune(residual, dead, X, groups=groups)
    assert pruned.cut.widths == {"first": 0, "first/down": 5, "second": 6}
    chex.assert_trees_all_close(pruned(X), residual(dead, X), rtol=1e-5, atol=1e-6)
    assert "gone whole: first" in str(pruned.report(X))
    pruned.save(tmp_path / "pruned")
    again = sdp_jax.load(tmp_path / "pruned", residual, X)
    chex.assert_trees_all_equal(again(X), pruned(X))
    chex.assert_trees_all_equal_shapes_and_dtypes(again.params, pruned.params)
    full = pruned.cut.fill(pruned.params)
    chex.assert_trees_all_close(residual(full, X), residual(dead, X), rtol=1e-5)
    # The stream is zero throughout, and cannot go.
    none = toy.kill(groups, params, {"first/down": range(5)})
    assert sdp_jax.plan_cut(groups, none).widths["first/down"] == 1


def test_scores_take_layers_where_they_may():
    params, groups = residual_params(), found()
    values = {"first": jnp.zeros(8), "second": jnp.ones(8)}
    scores = groups.join(values | {"first/down": jnp.arange(1.0, 6)})

    def plan(**options):
        return sdp_jax.plan_cut(
            groups, params, scores=scores, sparsity=0.5, **options
        ).widths

    assert plan()["first"] == 1
    assert plan(min_channels=0) == {"first": 0, "first/down": 4, "second": 7}
    with pytest.raises(ValueError, match="min_channels must be an integer"):
        plan(min_channels=-1)


def test_training_goes_on_without_a_layer(x64):
    params, groups = residual_params(), found()
    y = jnp.sin(X[:, :2])

    def make_tx(groups):
        strength = sdp_jax.target_sparsity(0.6, 2, 10, target="flops")
        return sdp_jax.altsdp(optax.adam(1e-2), groups, strength=strength)

    def make_step(apply, tx):
        @jax.jit
        def step(params, state):
            grads = jax.grad(lambda p: jnp.mean((apply(p, X) - y) ** 2))(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return step

    dead = toy.kill(groups, params, {"second": range(8)})
    tx = make_tx(groups)
    shrinker = sdp_jax.Shrinker(groups, 12)
    cut = shrinker.now(0, dead)
    assert shrinker.groups.sizes == {"first": 8, "first/down": 5}
    small, state = cut.take((dead, tx.init(dead)))
    step = make_step(sdp_jax.narrow(residual, cut), make_tx(shrinker.groups))
    start = step(small, state)[0]
    for n in range(1, 13):
        small, state = step(small, state)
        later = shrinker.now(n, small) if n in (5, 12) else None
        if later is not None:
            small, state = later.take((small, state))
            narrowed = sdp_jax.narrow(residual, shrinker.cut)
            step = make_step(narrowed, make_tx(shrinker.groups))
    # 60 % of the FLOPs of the whole network are gone, the layer among them.
    left = shrinker.cut.widths
    flops = groups.need_flops().at
    more = (
        {**left, "first": left["first"] + 1},
        {
            **left,
            "first/down": left["first/down"] + 1,
        },
    )
    full = flops(list(groups.sizes.values()))
    assert left["second"] == 0 and shrinker.flops <= 0.4
    assert any(flops([w[n] for n in groups.sizes]) > 0.4 * full for w in more)
    assert not np.array_equal(small["in"], start["in"][:, : small["in"].shape[1]])
    assert np.isfinite(sdp_jax.narrow(residual, shrinker.cut)(small, X)).all()


def test_layers_vanish_while_training():
    params, groups = residual_params(), found()
    tx = sdp_jax.altsdp(0.05, groups, strength=0.4, min_channels={"first": 0})
    y = residual({**params, "first": jax.tree.map(jnp.zeros_like, params["first"])}, X)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean((residual(p, X) - y) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    small = jax.tree.map(lambda x: 0.3 * x, params["first"])
    params = {**params, "first": small}
    state = tx.init(params)
    for _ in range(60):
        params, state = step(params, state)
    pruned = sdp_jax.prune(residual, params, X, groups=groups)
    assert pruned.cut.widths["first"] == 0 and pruned.cut.widths["second"] > 0
    with pytest.raises(ValueError, match="'first/down' is 0, but it cannot vanish"):
        sdp_jax.altsdp(0.05, groups, strength=0.4, min_channels={"first/down": 0})


def test_influence_of_layers():
    params, groups = residual_params(), found()
    params["first"]["down"] = jnp.zeros_like(params["first"]["down"])
    influence = sdp_jax.layer_influence(residual, groups, params, X)
    assert influence["first"] == pytest.approx(0, abs=1e-6)
    cut = sdp_jax.cut_layers(groups, ["second"])
    a, b = (np.ravel(residual(p, X)) for p in (params, cut.zero(params)))
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert influence["second"] == pytest.approx(1 - cosine, rel=1e-3) and cosine < 1
    zero = jax.tree.map(jnp.zeros_like, params)
    with pytest.raises(ValueError, match="zero or not finite"):
        sdp_jax.layer_influence(residual, groups, zero, X)
    chain = sdp_jax.find_groups(toy.mlp_apply, toy.mlp_params(), jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="no dimension of these groups is removable"):
        sdp_jax.layer_influence(
            toy.mlp_apply, chain, toy.mlp_params(), jnp.ones((2, 4))
        )


def test_a_cut_of_layers():
    groups = found()
    with pytest.raises(
        ValueError, match=r"\['first/down'\] cannot vanish.*'first', 'second'"
    ):
        sdp_jax.cut_layers(groups, ["first/down", "first"])
    with pytest.raises(KeyError, match="no channel dimension 'third'"):
        sdp_jax.cut_layers(groups, ["third"])
    with pytest.raises(ValueError, match="'first/down': kept must hold .*at least one"):
        sdp_jax.Cut(groups, ((0,), (), (0,)))
    # Where the heads go, nothing is left of their dimensions.
    network = shrunk.transformer()
    variables = {"params": network.params, "batch_stats": {}}
    groups = sdp_jax.find_groups(network.loss, variables, network.batches[0])
    heads = next(d.name for d in groups if d.size == 2)
    cut = sdp_jax.cut_layers(groups, [heads])
    assert sorted(n for n in cut.widths.values()) == [0, 0, 8, 12]
    assert all(0 not in s for p, s in cut.small_shapes.items() if "up" in p)
    assert leaf_table(cut.take(variables))["params/qkv"].size == 0
