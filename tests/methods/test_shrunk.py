"""Methods of which a run that shrinks is the run that does not."""

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


METHODS = [dhspg, decay_pruning, depgraph, within_dimensions]


@pytest.mark.parametrize("network", shrunk.NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_shrinks_is_the_run_that_does_not(x64, network, method):
    shrunk.assert_shrinks_exactly(shrunk.NETWORKS[network](), method)


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
