"""Modules that hold their arrays are functions of them."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sdp_jax
from sdp_jax.modules import split_module, take_apart
from tests import promise, toy

X = jnp.ones((2, 4))


def nnx_model():
    return nnx.Sequential(
        nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 2, rngs=nnx.Rngs(0))
    )


def test_a_function_passes_as_it_is():
    params = toy.mlp_params()
    assert take_apart(toy.mlp_apply, (params, X)) == (toy.mlp_apply, params, (X,))


def test_nnx_and_equinox_are_functions_of_their_arrays():
    model = nnx_model()
    fn, params, inputs = take_apart(model, (X,))
    assert inputs == (X,) and len(jax.tree.leaves(params)) == 4
    np.testing.assert_array_equal(fn(params, X), model(X))
    model = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
    fn, params, _ = take_apart(model, (X[0],))
    assert len(jax.tree.leaves(params)) == 4
    np.testing.assert_array_equal(fn(params, X[0]), model(X[0]))


def test_groups_of_a_module_are_those_of_its_function():
    for model, x in (
        (nnx_model(), X),
        (eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0)), X[0]),
    ):
        fn, params, _ = take_apart(model, (x,))
        found = sdp_jax.find_groups(model, x)
        assert found == sdp_jax.find_groups(fn, params, x)
        assert list(found.sizes.values()) == [8]


class Normed(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    last: eqx.nn.Linear

    def __call__(self, x, state):
        x, state = self.norm(self.first(x), state)
        return self.last(jnp.tanh(x)), state


def test_state_of_equinox_is_cut_with_the_parameters(x64):
    def make():
        keys = jax.random.split(jax.random.key(0))
        return Normed(
            eqx.nn.Linear(4, 6, key=keys[0]),
            eqx.nn.BatchNorm(6, "batch", mode="batch", dtype=float),
            eqx.nn.Linear(6, 2, key=keys[1]),
        )

    model, state = eqx.nn.make_with_state(make)()
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)

    def fn(p, x):
        model = eqx.combine(p["model"], rest)
        each = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        out, state = each(x, p["state"])
        return out, {"state": state}

    params = promise.randomise({"model": arrays, "state": state})
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4)))
    groups = promise.check(
        fn, params, (x,), join=lambda p, new: p | new, state=("state/*",)
    )
    (found,) = groups
    assert found.size == 6
    assert {m.path for m in found.members if m.role == "state"} == {
        "state/1/0",
        "state/1/1",
    }


def test_vectors_of_spectral_normalisation_are_state_in_haiku(x64):
    def net(x):
        w = hk.get_parameter("w", [4, 6], init=jnp.ones)
        return hk.Linear(2)(jnp.tanh(x @ hk.SpectralNorm()(w)))

    pure = hk.without_apply_rng(hk.transform_with_state(net))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4)))
    params, state = jax.eval_shape(lambda: pure.init(jax.random.key(0), x))

    def fn(v, x):
        out, new = pure.apply(v["params"], v["state"], x)
        return out, {"state": new}

    variables = promise.randomise({"params": params, "state": state})
    groups = promise.check(fn, variables, (x,), join=lambda v, new: v | new)
    assert list(groups.sizes.values()) == [6]


def test_a_wrapped_function_is_a_function():
    fn = eqx.filter_jit(toy.mlp_apply)
    assert split_module(fn) is None
    params = toy.mlp_params()
    assert sdp_jax.find_groups(fn, params, X).sizes == {"layer0": 6, "layer1": 5}


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x)


class Word(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
        self.word = nnx.Variable("word")

    def __call__(self, x):
        return self.linear(x)


@pytest.mark.parametrize(
    "model, error, message",
    [
        (Dense(), TypeError, "holds no arrays: give its method apply"),
        (hk.transform(lambda x: x), TypeError, "give its method apply"),
        ({"w": jnp.ones(3)}, TypeError, "got dict"),
        (Word(), ValueError, "state 'word' of Word is 'word', no array"),
    ],
)
@pytest.mark.parametrize("door", ["find_groups", "prune", "load"])
def test_what_is_no_model_is_told_so(door, model, error, message, tmp_path):
    args = (model, X) if door != "load" else (tmp_path, model)
    with pytest.raises(error, match=message):
        getattr(sdp_jax, door)(*args)


def test_a_function_needs_parameters():
    for door in (sdp_jax.find_groups, sdp_jax.prune):
        with pytest.raises(TypeError, match="expected parameters behind the function"):
            door(toy.mlp_apply)
