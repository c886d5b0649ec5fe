import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import sdp_jax
from sdp_jax import methods
from sdp_jax.channels import PerChannel
from tests import toy


def test_is_the_chain_for_a_host_that_wants_no_gradients():
    params = toy.mlp_params()
    host = sdp_jax.group_soft_threshold(toy.mlp_groups(params), 0.05)
    ours, chain = (
        methods.hosted(optax.adam(0.1), host),
        optax.chain(optax.adam(0.1), host),
    )
    state, other = ours.init(params), chain.init(params)
    for i in range(3):
        grads = toy.mlp_grads(params, seed=i)
        updates, state = ours.update(grads, state, params)
        expected, other = chain.update(grads, other, params)
        chex.assert_trees_all_equal(updates, expected)
    chex.assert_trees_all_equal(tuple(state), other)


def test_the_host_gets_the_raw_gradients_and_other_arguments_pass():
    seen = {}

    def update(updates, state, params=None, *, gradients, value, **extra_args):
        seen.update(gradients=gradients, updates=updates, value=value)
        return updates, state

    spy = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    tx = methods.hosted(optax.sgd(0.5), spy)
    params = jnp.array([1.0, 2.0])
    tx.update(jnp.array([2.0, 4.0]), tx.init(params), params, value=3.0)
    chex.assert_trees_all_equal(seen["gradients"], jnp.array([2.0, 4.0]))
    chex.assert_trees_all_equal(seen["updates"], jnp.array([-1.0, -2.0]))
    assert seen["value"] == 3.0


def test_a_cut_takes_the_state_along():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    host = methods.remove_lowest(
        groups, sdp_jax.target_sparsity(0.5, 0, 1), methods.taylor()
    )
    tx = methods.hosted(optax.sgd(0.1, 0.9), host)
    state = tx.init(params)
    for i in range(2):
        updates, state = tx.update(toy.mlp_grads(params, seed=i), state, params)
        params = optax.apply_updates(params, updates)
    cut = sdp_jax.plan_cut(groups, params)
    small, small_state = cut.take(params), cut.take(state)
    assert small_state.host.inner.gone.per_channel.shape == (sum(cut.widths.values()),)
    assert not small_state.host.inner.gone.per_channel.any()
    again = methods.hosted(
        optax.sgd(0.1, 0.9),
        methods.remove_lowest(
            cut.groups, sdp_jax.target_sparsity(0.0, 0, 1), methods.taylor()
        ),
    )
    updates, _ = again.update(toy.mlp_grads(small), small_state, small)
    chex.assert_trees_all_equal_shapes(updates, small)


@pytest.mark.parametrize("seed", [0, 1])
def test_under_vmap_each_member_prunes_its_own(seed):
    many = [toy.mlp_params(seed=s) for s in (seed, seed + 5)]
    groups = toy.mlp_groups(many[0])
    host = methods.remove_lowest(
        groups, sdp_jax.target_sparsity(0.5, 0, 1), methods.l2_norm()
    )
    tx = methods.hosted(optax.sgd(0.1), host)

    def once(params):
        updates, _ = tx.update(toy.mlp_grads(params), tx.init(params), params)
        return optax.apply_updates(params, updates)

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *many)
    together = jax.vmap(lambda p: once(p))(stacked)
    for i, params in enumerate(many):
        one = jax.tree.map(lambda x, i=i: x[i], together)
        chex.assert_trees_all_close(one, once(params), rtol=1e-6)


def test_a_rate_or_a_schedule_stands_for_sgd():
    params = toy.mlp_params()
    host = sdp_jax.group_soft_threshold(toy.mlp_groups(params), 0.05)
    schedule = optax.linear_schedule(0.1, 0.0, 4)
    for base, sgd in ((0.1, optax.sgd(0.1)), (schedule, optax.sgd(schedule))):
        ours, plain = methods.hosted(base, host), methods.hosted(sgd, host)
        a, _ = ours.update(toy.mlp_grads(params), ours.init(params), params)
        b, _ = plain.update(toy.mlp_grads(params), plain.init(params), params)
        chex.assert_trees_all_equal(a, b)
    with pytest.raises(ValueError, match="base must be a non-negative learning rate"):
        methods.hosted(-0.1, host)


def test_a_host_of_ones_own():
    params = toy.mlp_params()
    groups = toy.mlp_groups(params)
    seen = []

    def decide(step):
        seen.append(step)
        share = jnp.where(step.released, 1.0, step.inner.per_channel)
        return share, PerChannel(share / 2)

    host = methods.channel_host(
        groups, lambda g: PerChannel(jnp.ones(g.num_channels)), decide, name="mine"
    )
    state, steps = host.init(params), toy.mlp_grads(params)
    released = jnp.arange(11) == 2
    for n, given in enumerate([None, None, released]):
        updates, state = host.update(
            steps, state, params, gradients=params, released=given, other=1
        )
        factor = jnp.where(released, 1.0, 0.25) if n == 2 else jnp.full(11, 0.5**n)
        candidate = optax.apply_updates(params, steps)
        expected = sdp_jax.scale_channels(groups, candidate, factor)
        found = optax.apply_updates(params, updates)
        chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-7)
    assert [int(step.count) for step in seen] == [1, 2, 3] and state.count == 3
    assert seen[0].gradients is params and not seen[0].released.any()
    with pytest.raises(ValueError, match="mine needs the current parameters"):
        host.update(steps, state)
    with pytest.raises(TypeError, match=r"groups must be sdp_jax\.Groups"):
        methods.channel_host(None, tuple, decide)
