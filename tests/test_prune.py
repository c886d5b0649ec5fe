"""From a model to a smaller one in one call: the user's lines, for every library."""

import functools
import os
import pickle

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import sdp_jax
from sdp_jax import methods
from tests import toy

X = jnp.asarray(np.random.default_rng(0).normal(size=(12, 4)), jnp.float32)
Y = jnp.sin(X[:, :3])
STEPS = 30


def target():
    return sdp_jax.target_sparsity(0.5, 5, 20, target="flops")


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(16)(x)))
        return nn.Dense(3)(nn.relu(nn.Dense(16)(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = (
            nnx.Linear(4, 16, rngs=rngs),
            nnx.BatchNorm(16, use_running_average=True, rngs=rngs),
        )
        self.third = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.third(nnx.relu(self.second(self.first(x))))


def mse(out):
    return jnp.mean((out - Y) ** 2)


def train(loss, params, tx):
    """A loop of Optax alone."""

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    return params, state


def linen():
    model = Linen()
    variables = jax.jit(model.init)(jax.random.key(0), X)
    stats = {"batch_stats": variables["batch_stats"]}
    groups = sdp_jax.find_groups(model.apply, variables, X)
    tx = sdp_jax.altsdp(optax.adamw(1e-2), groups.at("params"), strength=target())
    state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=tx)

    @jax.jit
    def step(state):
        def loss(params):
            return mse(state.apply_fn({"params": params, **stats}, X))

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(STEPS):
        state = step(state)
    trained = {"params": state.params, **stats}
    pruned = sdp_jax.prune(model.apply, trained, groups=groups)
    assert sdp_jax.prune(model.apply, trained, X, groups=groups).cut == pruned.cut
    return pruned, jax.jit(model.apply)(trained, X), model.apply, variables


def nnx_module():
    model = Nnx(nnx.Rngs(0))
    groups = sdp_jax.find_groups(model, X)
    tx = sdp_jax.altsdp(optax.adamw(1e-2), groups, strength=target())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: mse(model(X)))(model))

    for _ in range(STEPS):
        step(model, optimizer)
    pruned = sdp_jax.prune(model, X, groups=groups)
    return pruned, model(X), Nnx(nnx.Rngs(1)), None


def equinox():
    model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
    batched = jax.vmap
    groups = sdp_jax.find_groups(model, X[0])
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    tx = sdp_jax.altsdp(optax.adamw(1e-2), groups, strength=target())
    params, _ = train(
        lambda params: mse(batched(eqx.combine(params, rest))(X)), params, tx
    )
    model = eqx.combine(params, rest)
    pruned = sdp_jax.prune(model, X[0], groups=groups)
    other = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(1))
    expected = eqx.filter_jit(lambda model: batched(model)(X))(model)
    return jax.vmap(pruned), expected, other, pruned


def haiku():
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([16, 16, 3])(x)))
    params = jax.jit(net.init)(jax.random.key(0), X)
    groups = sdp_jax.find_groups(net.apply, params, X)
    tx = sdp_jax.altsdp(optax.adamw(1e-2), groups, strength=target())
    params, _ = train(lambda params: mse(net.apply(params, X)), params, tx)
    pruned = sdp_jax.prune(net.apply, params, X, groups=groups)
    return pruned, jax.jit(net.apply)(params, X), net.apply, params


def plain():
    params = toy.mlp_params(widths=(4, 16, 16, 3))
    groups = sdp_jax.find_groups(toy.mlp_apply, params, X)
    tx = sdp_jax.altsdp(optax.adamw(1e-2), groups, strength=target())
    params, _ = train(lambda params: mse(toy.mlp_apply(params, X)), params, tx)
    pruned = sdp_jax.prune(toy.mlp_apply, params, X, groups=groups)
    return pruned, toy.mlp_apply(params, X), toy.mlp_apply, params


@pytest.mark.parametrize("library", [linen, nnx_module, equinox, haiku, plain])
def test_the_users_lines(library, tmp_path):
    call, expected, fn, extra = library()
    pruned = extra if library is equinox else call
    x = X[0] if library is equinox else X
    flops = pruned.cut.dense.flops.at
    left = flops(list(pruned.cut.widths.values()))
    assert left <= 0.5 * flops(list(pruned.cut.dense.sizes.values()))
    np.testing.assert_allclose(call(X), expected, rtol=1e-5, atol=1e-6)

    report = pruned.report(x, repeats=2)
    assert report.small.flops < 0.55 * report.dense.flops
    assert report.small.parameters < report.dense.parameters
    assert report.difference < 1e-5 and report.small_time.seconds > 0
    assert "FLOPs" in str(report) and "largest difference" in str(report)

    once = jax.jit(lambda pruned, x: pruned(x))(pruned, x)
    np.testing.assert_allclose(once, pruned(x), rtol=1e-5, atol=1e-6)
    slopes = jax.grad(lambda pruned: jnp.sum(pruned(x)))(pruned)
    for a, b in zip(*map(jax.tree.leaves, (slopes.params, pruned.params)), strict=True):
        assert a.shape == b.shape
    pruned.save(tmp_path / "pruned")
    again = sdp_jax.load(tmp_path / "pruned", fn)
    np.testing.assert_array_equal(again(x), pruned(x))
    # The Equinox model takes one example, without a batch axis.
    axes, other = (None, x) if library is equinox else (0, x[:5])
    exported = pruned.export(tmp_path / "model.bin", x, in_axes=axes)
    np.testing.assert_allclose(
        exported.call(other), pruned(other), rtol=1e-5, atol=1e-6
    )
    assert (tmp_path / "model.bin").stat().st_size > 0


def test_a_training_state_goes_on_small():
    model = Linen()
    variables = jax.jit(model.init)(jax.random.key(0), X)
    groups = sdp_jax.find_groups(model.apply, variables, X)
    tx = sdp_jax.altsdp(0.1, groups.at("params"), strength=target(), momentum=0.9)
    state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=tx)
    cut = sdp_jax.plan_cut(
        groups, variables, scores=sdp_jax.channel_norms(groups, variables), sparsity=0.5
    )
    pruned = sdp_jax.prune(model.apply, variables, X, cut=cut)
    tx = sdp_jax.altsdp(
        0.1,
        pruned.groups.at("params"),
        strength=sdp_jax.target_sparsity(0.0, 0, 1),
        momentum=0.9,
    )
    small = pruned.take(state, tx=tx)
    out = small.apply_fn(pruned.params, X)
    np.testing.assert_array_equal(out, pruned.apply(pruned.params, X))

    def loss(params):
        return mse(small.apply_fn(pruned.params | {"params": params}, X))

    small = small.apply_gradients(grads=jax.jit(jax.grad(loss))(small.params))
    assert int(small.step) == 1
    shapes = jax.tree.map(jnp.shape, pruned.params["params"])
    assert jax.tree.map(jnp.shape, small.params) == shapes
    other = sdp_jax.altsdp(0.1, pruned.groups.at("params"), strength=0.1)
    with pytest.raises(ValueError, match="another structure than"):
        pruned.take(state, tx=other)
    with pytest.raises(TypeError, match="TrainState"):
        pruned.take(variables, tx=tx)


def test_no_training_at_all():
    model = Linen()
    variables = jax.jit(model.init)(jax.random.key(0), X)
    stats = {"batch_stats": variables["batch_stats"]}
    loss = jax.jit(lambda p: mse(model.apply({"params": p, **stats}, X)))
    grads = jax.grad(loss)(variables["params"])
    common = {"sparsity": 0.5, "target": "flops", "scores": methods.taylor()}
    pruned = sdp_jax.prune(model.apply, variables, X, grads=grads, **common)
    whole = {"params": grads, "batch_stats": jax.tree.map(jnp.zeros_like, stats)}
    whole["batch_stats"] = whole["batch_stats"]["batch_stats"]
    again = sdp_jax.prune(model.apply, variables, X, grads=whole, **common)
    assert pruned.cut == again.cut
    flops = pruned.cut.dense.flops.at
    assert flops(list(pruned.cut.widths.values())) <= 0.5 * flops([16, 16])
    scores = methods.taylor()(pruned.cut.dense, variables, whole)
    by_name = pruned.cut.dense.split(scores)
    common["scores"] = by_name
    assert sdp_jax.prune(model.apply, variables, X, **common).cut == pruned.cut
    np.testing.assert_allclose(
        pruned(X), model.apply(pruned.cut.zero(variables), X), rtol=1e-5, atol=1e-6
    )


def test_it_is_a_pytree_of_its_small_arrays():
    params = toy.mlp_params()
    pruned = sdp_jax.prune(
        toy.mlp_apply, params, X, scores=methods.l2_norm(), sparsity=0.5
    )
    leaves, treedef = jax.tree.flatten(pruned)
    assert len(leaves) == len(jax.tree.leaves(params))
    assert jax.tree.unflatten(treedef, leaves).cut == pruned.cut
    twice = jax.tree.map(lambda leaf: 2 * leaf, pruned)
    np.testing.assert_array_equal(
        twice.params["layer0"]["bias"], 2 * pruned.params["layer0"]["bias"]
    )
    assert jax.tree.map(jnp.shape, pruned.fill()) == jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(
        toy.mlp_apply(pruned.fill(), X), pruned(X), rtol=1e-5, atol=1e-6
    )
    assert pruned.groups == pruned.cut.groups
    assert str(pruned) == pruned.cut.summary()
    assert str(pruned.report()) == pruned.cut.summary()


def test_keywords_and_values_that_are_no_arrays():
    calls = []

    def fn(params, x, scale=1, mode="sum", key=None):
        calls.append(mode)
        y = jnp.tanh(x @ params["a"]) @ params["b"] * scale
        return y.sum() if mode == "sum" else y

    params = {"a": jnp.ones((4, 8)).at[:, 3].set(0), "b": jnp.ones((8, 2))}
    pruned = sdp_jax.prune(fn, params, X)
    assert pruned.cut.widths["a"] == 7
    assert pruned(X).shape == () and pruned(X, mode="all").shape == (12, 2)
    np.testing.assert_allclose(pruned(X, 2.0), 2 * pruned(X), rtol=1e-6)
    before = len(calls)
    pruned(X), pruned(X, 2.0)
    assert len(calls) == before  # compiled once for each of them
    # 1 and True are equal, but not the same argument.
    assert pruned(X, scale=True).dtype == pruned(X, scale=1).dtype
    # What cannot be hashed is not compiled, and works.
    assert pruned(X, key=np.random.default_rng(0).bit_generator.state) is not None


def test_what_differs_is_said():
    params = {"a": jnp.ones((4, 8)).at[:, 3].set(0), "b": jnp.ones((8, 2))}
    draws = iter(range(1, 10))

    def fn(params, x):
        return {"y": jnp.tanh(x @ params["a"]) @ params["b"] * next(draws)}

    with pytest.raises(ValueError, match=r"differ by .* in output 'y' at \(\d+, \d\)"):
        sdp_jax.prune(fn, params, X)
    assert sdp_jax.prune(fn, params, X, check=False).cut.widths == {"a": 7}


def test_half_precision_passes_the_check():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), toy.mlp_params())
    pruned = sdp_jax.prune(
        toy.mlp_apply,
        params,
        X.astype(jnp.bfloat16),
        scores=methods.l2_norm(),
        sparsity=0.5,
    )
    assert pruned(X.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_nan_outputs_of_both_are_the_same():
    params = {"a": jnp.ones((4, 8)).at[:, 3].set(0), "b": jnp.full((8, 2), jnp.nan)}
    # The dead channel meets a NaN: 0 · NaN is none of the small function's business.
    pruned = sdp_jax.prune(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, X)
    assert bool(jnp.isnan(pruned(X)).all())


def test_shared_state_of_a_module_is_one_leaf():
    class Tied(nnx.Module):
        def __init__(self):
            self.a = nnx.Linear(4, 16, rngs=nnx.Rngs(0))
            self.b = self.a
            self.c = nnx.Linear(16, 2, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.c(jnp.tanh(self.a(x)) * self.b(x))

    model = Tied()
    pruned = sdp_jax.prune(model, X, scores=methods.l2_norm(), sparsity=0.5)
    assert list(pruned.cut.widths.values()) == [8]
    assert len(jax.tree.leaves(pruned)) == 4


def small_mlp():
    params = toy.mlp_params()
    pruned = sdp_jax.prune(
        toy.mlp_apply, params, X, scores=methods.l2_norm(), sparsity=0.5
    )
    return params, pruned


def test_what_does_not_match_is_refused(tmp_path):
    params, pruned = small_mlp()
    with pytest.raises(ValueError, match="not the parameters of the cut"):
        sdp_jax.Pruned(pruned.fn, params, pruned.cut)(X)
    with pytest.raises(ValueError, match="not the parameters of the cut"):
        sdp_jax.Pruned(pruned.fn, params, pruned.cut).save(tmp_path / "dense")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="no second cut"):
        sdp_jax.prune(pruned.fn, pruned.params, X, cut=pruned.cut)
    other = toy.mlp_params(widths=(4, 7, 5, 3))
    with pytest.raises(ValueError, match="cannot be cut"):
        sdp_jax.prune(pruned.fn, other, X, cut=pruned.cut)
    with pytest.raises(ValueError, match="in the groups; find the groups of this"):
        sdp_jax.prune(pruned.fn, other, X, groups=pruned.cut.dense)
    with pytest.raises(ValueError, match="no leaf"):
        sdp_jax.prune(pruned.fn, {"w": X}, X, groups=pruned.cut.dense)


def test_another_function_is_refused(tmp_path):
    params, pruned = small_mlp()

    def leaks(params, x):
        return toy.mlp_apply(params, x) + jnp.sum(params["layer2"]["kernel"])

    with pytest.raises(ValueError, match="find the groups on this function"):
        sdp_jax.prune(leaks, params, X, cut=pruned.cut)
    pruned.save(tmp_path / "pruned")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="another one than was pruned"):
        sdp_jax.load(tmp_path / "pruned", lambda p, x: x @ p["kernel"], X)
    with pytest.raises(ValueError, match="another one than was pruned"):
        sdp_jax.load(tmp_path / "pruned", leaks, X)
    with pytest.raises(ValueError, match="neither the dense nor the small"):
        sdp_jax.load(tmp_path / "pruned", Nnx(nnx.Rngs(0)), X)
    with pytest.raises(FileExistsError, match="choose another directory"):
        pruned.save(tmp_path / "pruned")
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_arguments_that_say_two_things():
    params, pruned = small_mlp()
    with pytest.raises(ValueError, match="give one or the other"):
        sdp_jax.prune(pruned.fn, params, X, cut=pruned.cut, sparsity=0.5)
    with pytest.raises(ValueError, match="round_to.* decide it anew"):
        sdp_jax.prune(pruned.fn, params, X, cut=pruned.cut, round_to="fast")
    with pytest.raises(ValueError, match="scores that are functions"):
        scores = sdp_jax.channel_norms(pruned.cut.dense, params)
        sdp_jax.prune(pruned.fn, params, X, scores=scores, sparsity=0.5, grads=params)
    with pytest.raises(ValueError, match="belong together"):
        sdp_jax.prune(pruned.fn, params, X, sparsity=0.5)
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda p: sdp_jax.prune(pruned.fn, p, X).params)(params)
    with pytest.raises(ValueError, match="needs gradients"):
        sdp_jax.prune(pruned.fn, params, X, scores=methods.taylor(), sparsity=0.5)
    with pytest.raises(ValueError, match="without \\['layer0/bias'"):
        sdp_jax.prune(
            pruned.fn, params, X, scores=methods.taylor(), sparsity=0.5, grads={"w": X}
        )


def test_an_nnx_model_with_statistics():
    """Gradients and optimizer know parameters only; the groups know statistics, too."""
    model = Nnx(nnx.Rngs(0))
    grads = nnx.grad(lambda model: mse(model(X)))(model)
    pruned = sdp_jax.prune(model, X, scores=methods.taylor(), sparsity=0.5, grads=grads)
    assert list(pruned.cut.widths.values()) == [8]
    optimizer = nnx.Optimizer(
        model,
        sdp_jax.altsdp(optax.adamw(0.1), pruned.cut.dense, strength=0.1),
        wrt=nnx.Param,
    )
    state = nnx.state(optimizer, nnx.optimizer.OptState)
    small = pruned.take(state)
    tx = sdp_jax.altsdp(optax.adamw(0.1), pruned.groups, strength=0.1)
    params = nnx.state(nnx.merge(pruned.fn.graph, pruned.params), nnx.Param)
    wanted = jax.eval_shape(tx.init, params)
    shapes = [sorted(x.shape for x in jax.tree.leaves(t)) for t in (small, wanted)]
    assert shapes[0] == [(), *shapes[1]]  # nnx counts steps as well


def test_scores_for_modules_of_every_kind():
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([16, 16, 3])(x)))
    params = net.init(jax.random.key(0), X)
    grads = jax.grad(lambda p: mse(net.apply(p, X)))(params)
    common = {"scores": methods.taylor(), "sparsity": 0.5, "ranking": "dimension"}
    pruned = sdp_jax.prune(net.apply, params, X, grads=grads, **common)
    assert list(pruned.cut.widths.values()) == [8, 8]
    model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
    grads = eqx.filter_grad(lambda model: mse(jax.vmap(model)(X)))(model)
    pruned = sdp_jax.prune(model, X[0], grads=grads, **common)
    assert list(pruned.cut.widths.values()) == [8, 8]


def test_kinds_are_told():
    params, pruned = small_mlp()
    with pytest.raises(TypeError, match="cut must be a Cut"):
        sdp_jax.prune(pruned.fn, params, X, cut=3)
    for door in (sdp_jax.prune, lambda *a, groups: sdp_jax.plan_cut(groups, params)):
        with pytest.raises(TypeError, match="groups must be sdp_jax.Groups"):
            door(pruned.fn, params, X, groups=3)
    with pytest.raises(TypeError, match="as methods.taylor"):
        sdp_jax.prune(pruned.fn, params, X, scores=methods.l2_norm, sparsity=0.5)
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    with pytest.raises(ValueError, match="give arrays"):
        sdp_jax.prune(pruned.fn, params, shape, cut=pruned.cut)
    with pytest.raises(ValueError, match="give arrays"):
        pruned.report(shape)
    assert sdp_jax.prune(pruned.fn, params, shape, cut=pruned.cut, check=False)


class Trained(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x)))
        return nn.Dense(3)(x)


@pytest.mark.parametrize("sparsity", [0.5, 0.875])
def test_a_training_mode_returns_its_small_statistics(sparsity):
    model = Trained()
    variables = model.init(jax.random.key(0), X)

    def fn(variables, x):
        return model.apply(variables, x, mutable=["batch_stats"])

    pruned = sdp_jax.prune(
        fn, variables, X, scores=methods.l2_norm(), sparsity=sparsity
    )
    _, new = pruned(X)
    width = round(8 * (1 - sparsity))
    assert new["batch_stats"]["BatchNorm_0"]["mean"].shape == (width,)
    assert pruned.report(X, repeats=1).difference < 1e-5


def test_methods_and_parts_of_modules():
    class Coder(nnx.Module):
        def __init__(self):
            self.a = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
            self.b = nnx.Linear(8, 2, rngs=nnx.Rngs(1))

        def encode(self, x, *, scale=1.0):
            return self.b(jnp.tanh(self.a(x))) * scale

    model, common = Coder(), {"scores": methods.l2_norm(), "sparsity": 0.5}
    pruned = sdp_jax.prune(model.encode, X, **common)
    assert list(pruned.cut.widths.values()) == [4]
    twice = sdp_jax.prune(functools.partial(model.encode, scale=2.0), X, **common)
    np.testing.assert_allclose(twice(X), 2 * pruned(X), rtol=1e-6)
    mlp = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
    part = sdp_jax.prune(functools.partial(mlp, key=None), X[0], **common)
    np.testing.assert_allclose(part(X[0]), sdp_jax.prune(mlp, X[0], **common)(X[0]))
    for hidden in (jax.vmap(mlp), jax.jit(mlp)):
        with pytest.raises(TypeError, match="wraps a module, whose arrays it hides"):
            sdp_jax.prune(hidden, X)
    with pytest.raises(TypeError, match=r"equinox.is_array"):
        sdp_jax.prune(lambda m, x: jax.vmap(m)(x), mlp, X, **common)


def test_values_that_only_look_alike():
    def fn(params, x, scale):
        return jnp.tanh(x @ params["a"]) @ params["b"] * jnp.copysign(1.0, scale)

    params = {"a": jnp.ones((4, 8)).at[:, 3].set(0), "b": jnp.ones((8, 2))}
    pruned = sdp_jax.prune(fn, params, X, 1.0)
    np.testing.assert_array_equal(pruned(X, 0.0), -pruned(X, -0.0))

    class Setting:
        scale = 1.0

    setting = Setting()
    by_object = sdp_jax.prune(lambda p, x, s: fn(p, x, s.scale), params, X, setting)
    first = by_object(X, setting)
    setting.scale = -1.0
    np.testing.assert_array_equal(by_object(X, setting), -first)


def test_nothing_to_prune_is_said():
    params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))}
    for ranking in ("global", "dimension", "isomorphic"):
        with pytest.raises(ValueError, match="no channel that can be cut .*sort"):
            sdp_jax.prune(
                lambda p, x: jnp.sort(x @ p["a"]) @ p["b"],
                params,
                X,
                scores=methods.l2_norm(),
                sparsity=0.5,
                ranking=ranking,
            )


def test_factored_state_of_parameters_is_refused():
    model = Linen()
    variables = model.init(jax.random.key(0), X)
    scores = methods.l2_norm()
    pruned = sdp_jax.prune(
        model.apply,
        variables,
        scores=scores,
        sparsity=0.5,
        groups=sdp_jax.find_groups(model.apply, variables, X),
    )
    for tx in (optax.adafactor(1e-3, min_dim_size_to_factor=2), optax.sm3(1e-3)):
        with pytest.raises(ValueError, match="cannot be cut"):
            pruned.take(tx.init(variables["params"]))


def test_gradients_of_other_shapes_are_refused():
    params, pruned = small_mlp()
    bad = jax.tree.map(lambda p: p[:1], params)
    with pytest.raises(ValueError, match="has shape|has another"):
        methods.taylor()(pruned.cut.dense, params, bad)
    with pytest.raises(ValueError, match="grads must be shaped like the parameters"):
        sdp_jax.prune(
            pruned.fn, params, X, scores=methods.taylor(), sparsity=0.5, grads=bad
        )


def test_what_is_saved_comes_back_as_it_was(tmp_path):
    model = nnx.Sequential(
        nnx.Linear(4, 8, rngs=nnx.Rngs(0)), jnp.tanh, nnx.Linear(8, 2, rngs=nnx.Rngs(1))
    )
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), nnx.state(model))
    nnx.update(model, half)
    pruned = sdp_jax.prune(model, X, scores=methods.l2_norm(), sparsity=0.5)
    before = os.umask(0o022)
    try:
        pruned.save(tmp_path / "pruned")
    finally:
        os.umask(before)
    assert (tmp_path / "pruned").stat().st_mode & 0o777 == 0o755
    fresh = nnx.Sequential(
        nnx.Linear(4, 8, rngs=nnx.Rngs(2)), jnp.tanh, nnx.Linear(8, 2, rngs=nnx.Rngs(3))
    )
    again = sdp_jax.load(tmp_path / "pruned", fresh, X)
    assert {x.dtype for x in jax.tree.leaves(again)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(again(X), pruned(X))


def test_what_is_cached_is_not_pickled():
    _, pruned = small_mlp()
    hash(pruned.cut)
    again = pickle.loads(pickle.dumps(pruned.cut))
    assert again == pruned.cut and "_hash" not in vars(again)
    assert "_hash" not in vars(again.dense)
