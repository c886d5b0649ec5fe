"""Methods of which a run that shrinks is the run that does not."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import sdp_jax
from sdp_jax import methods
from tests import shrunk

TARGET = sdp_jax.target_sparsity(0.5, 1, 9)


def valley(c):
    strength = sdp_jax.valley_strength(c, 0.75)

    def altsdp(groups):
        return sdp_jax.altsdp(0.05, groups, strength=strength, momentum=0.9)

    return altsdp


def prox_sgd(strength):
    def lasso(groups):
        return sdp_jax.prox_sgd(0.05, groups, strength=strength, weights="size")

    return lasso


def dhspg(groups):
    once = sdp_jax.target_sparsity(0.5, 1, 2)
    host = methods.dhspg(
        groups, once, learning_rate=0.05, penalty=2.0, epsilon=0.9, begin_step=1
    )
    return methods.hosted(optax.sgd(0.05), host)


def decay_pruning(groups):
    host = methods.remove_lowest(groups, TARGET, methods.l2_norm())
    return methods.decay_pruning(
        optax.adamw(1e-2), host, groups, steps=2, rate=0.5, length=1.2
    )


def depgraph(groups):
    score = methods.group_importance()
    host = methods.remove_lowest(groups, TARGET, score)
    return optax.chain(
        methods.group_norm_regularizer(groups, 1e-2),
        methods.hosted(optax.sgd(0.05, 0.9), host),
    )


def within_dimensions(groups):
    ramp = sdp_jax.target_sparsity(0.5, 1, 9, ranking="dimension")
    host = methods.remove_lowest(groups, ramp, methods.l2_norm())
    return methods.hosted(optax.sgd(0.05, 0.9), host)


def hesso(groups):
    once = sdp_jax.target_sparsity(0.5, 0, 1)
    host = methods.hesso(groups, once, begin_step=0, end_step=12, periods=4)
    return methods.hosted(optax.sgd(0.05, 0.9), host)


def increg(groups):
    return methods.increg(0.05, groups, 0.5, every=1, amplitude=2.0, limit=10.0)


def until_compressed(groups):
    strength = methods.until_compressed(TARGET, rise=0.5)
    return sdp_jax.altsdp(optax.sgd(0.05, 0.9), groups, strength=strength)


METHODS = [dhspg, decay_pruning, depgraph, within_dimensions]
METHODS += [hesso, increg, until_compressed]


@pytest.mark.parametrize("network", shrunk.NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_shrinks_is_the_run_that_does_not(x64, network, method):
    shrunk.assert_shrinks_exactly(shrunk.NETWORKS[network](), method)


def test_heads_and_their_entries_on_one_axis(x64):
    def apply(params, x):
        inner = jnp.tanh(x @ params["v"]).reshape(-1, 3, 4)
        return jnp.einsum("bhe,heo->bo", inner, params["o"])

    v = jnp.full((2, 12), 2.0).at[:, :4].set(0.3)
    params = {"v": v, "o": jnp.ones((3, 4, 2))}
    groups = sdp_jax.find_groups(apply, params, jnp.ones((1, 2)))

    def step(groups, params, state):
        tx = sdp_jax.altsdp(0.1, groups, strength=1.0)
        state = tx.init(params) if state is None else state
        slopes = jax.tree.map(jnp.zeros_like, params)
        updates, state = tx.update(slopes, state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(groups, params, None)
    cut = sdp_jax.plan_cut(groups, params)
    assert sorted(cut.widths.values()) == [2, 4]
    small, _ = step(cut.groups, *cut.take((params, state)))
    params, _ = step(groups, params, state)
    # The dual variable of the head that is gone does not lengthen the entries.
    chex.assert_trees_all_close(small, cut.take(params), rtol=1e-12)


@pytest.mark.parametrize(
    ("network", "seed", "method", "patience"),
    [
        ("convolutional", 0, valley(0.5), 2),
        ("convolutional", 0, prox_sgd(1.0), 2),
        ("transformer", 0, valley(0.5), 2),
        ("transformer", 1, prox_sgd(0.4), 3),
        ("scanned", 0, valley(0.8), 4),
        ("scanned", 0, prox_sgd(0.7), 4),
    ],
)
def test_so_it_is_by_shrinkage_with_patience(x64, network, seed, method, patience):
    # Channels return, but none that was zero for so long.
    shrunk.assert_shrinks_exactly(
        shrunk.NETWORKS[network](seed), method, range(1, shrunk.STEPS), patience
    )
