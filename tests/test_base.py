"""What every transformation needs: checks, the base, steps and where they lead."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sdp_jax
from sdp_jax import base
from tests import toy

NAMES = st.sampled_from(["float16", "bfloat16", "float32"])


@given(name=NAMES, value=st.floats(-60000, 60000, width=16))
def test_a_step_to_zero_gives_exactly_zero(name, value):
    params = {"w": jnp.full(3, value, name)}
    point = {"w": jnp.zeros(3, jnp.float32)}
    updates = base.step_to(point, params)
    assert updates["w"].dtype == params["w"].dtype
    found = optax.apply_updates(params, updates)["w"]
    assert not found.any() and not np.signbit(np.asarray(found, np.float32)).any()


def test_points_are_at_least_float32(x64):
    for p, u, wide in (
        (jnp.bfloat16, jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float32, jnp.float32),
        (jnp.float32, jnp.float64, jnp.float64),
    ):
        point = base.add_step({"w": jnp.ones(2, p)}, {"w": jnp.full(2, 2**-10, u)})
        assert point["w"].dtype == wide
        # In half precision alone 1 + 2⁻¹⁰ may round to 1.
        np.testing.assert_array_equal(point["w"], 1 + 2**-10)
        assert base.wide_copy(jnp.ones(2, p)).dtype == jnp.promote_types(p, "float32")


def test_a_wide_copy_shares_no_buffer():
    leaf = jnp.ones(3)
    assert base.wide_copy(leaf).unsafe_buffer_pointer() != leaf.unsafe_buffer_pointer()


@pytest.mark.parametrize("rate", [0.1, optax.linear_schedule(0.1, 0.0, 5)])
def test_a_learning_rate_stands_for_sgd(rate):
    params = toy.mlp_params()
    grads = toy.mlp_grads(params)
    found, expected = base.as_base(rate, 0.9, True), optax.sgd(rate, 0.9, True)
    a, _ = found.update(grads, found.init(params), params)
    b, _ = expected.update(grads, expected.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    adam = optax.adam(0.1)
    assert base.as_base(adam) is adam


def test_a_rule_is_a_strength_and_floors_in_order():
    groups = toy.mlp_groups()
    rule, floors = base.check_rule(groups, 0.5, {"hidden1": 3}, "size")
    assert isinstance(rule, sdp_jax.Strength) and floors == (1, 3)
    thresholds, _ = rule.update(
        rule.init(groups, floors), jnp.full(11, 9.0), groups, floors
    )
    np.testing.assert_array_equal(thresholds, np.full(11, 0.5))
    target = sdp_jax.target_sparsity(0.5, 0, 2)
    assert base.check_rule(groups, target) == (target, (1, 1))
    with pytest.raises(
        ValueError, match="so are 54.5% of the channels, and at most 9.1%"
    ):
        base.check_rule(groups, sdp_jax.target_sparsity(0.9, 0, 2), 3)


def test_parameters_that_do_not_fit_are_refused():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    base.check_params(groups, params)
    base.check_params(groups, {"layer0": None})  # optax.tree.map_params does this
    with pytest.raises(ValueError, match="no leaf 'layer0/kernel'"):
        base.check_params(groups, {"other": jnp.ones(3)})
    base.check_inexact(params | {"phase": jnp.ones(2, complex)})
    with pytest.raises(TypeError, match="'count' has dtype int32"):
        base.check_inexact({"count": jnp.int32(1)})
    with pytest.raises(TypeError, match="'rate' is 0.1; parameters must be arrays"):
        base.check_inexact({"rate": 0.1})


def test_updates_that_do_not_fit_are_refused():
    params = {"w": jnp.ones(3)}
    assert base.need_params(params, {"w": jnp.zeros(3)}, "mine") is params
    with pytest.raises(ValueError, match="mine needs the current parameters"):
        base.need_params(None, {"w": jnp.zeros(3)}, "mine")
    with pytest.raises(ValueError, match="mine: .* trees of different structure"):
        base.need_params(params, {"v": jnp.zeros(3)}, "mine")
    with pytest.raises(ValueError, match=r"gradient of 'w' has shape \(2,\), but .*3"):
        base.need_params(params, {"w": jnp.zeros(2)}, "mine")


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ({"a": 3}, TypeError, "groups must be sdp_jax.Groups, as find_groups makes"),
        (sdp_jax.Groups((), ()), ValueError, "nothing to prune"),
    ],
)
def test_what_is_no_groups_is_refused(groups, error, message):
    with pytest.raises(error, match=message):
        base.check_kind(groups)
    with pytest.raises(error, match=message):
        base.check_rule(groups, 0.1)
