"""What all scores have in common: their signature, checks, and a unit of length."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from sdp_jax.activations import ChannelActivations, Moments, WeightSums, scatter
from sdp_jax.groups import Groups
from sdp_jax.tree import PyTree


class Score(Protocol):
    """The one signature of all scores: the lowest is pruned first.

    ``score(groups, params, grads=None, activations=None)`` returns a vector
    ``(num_channels,)`` of non-negative numbers. A score raises ``ValueError`` if it
    needs gradients or activations and gets none.
    """

    def __call__(
        self,
        groups: Groups,
        params: PyTree,
        grads: PyTree | None = None,
        activations: Any = None,
    ) -> jax.Array:
        """The score of each channel."""
        ...


def of_params(function: Callable[[Groups, PyTree], jax.Array]) -> Score:
    """A score that looks at the parameters alone."""
    return lambda groups, params, grads=None, activations=None: function(groups, params)


def of_gradients(
    name: str, function: Callable[[Groups, PyTree, PyTree], jax.Array]
) -> Score:
    """A score that looks at parameters and gradients."""
    return lambda groups, params, grads=None, activations=None: function(
        groups, params, need_gradients(grads, name)
    )


def need_gradients(grads: PyTree | None, name: str) -> PyTree:
    """Returns the gradients, after checking that they are there."""
    if grads is None:
        raise ValueError(
            f"{name} needs gradients: call score(groups, params, grads), or put the "
            "host behind its base with sdp_jax.methods.hosted(base, host), which hands "
            "them on"
        )
    return grads


def of_activations(name: str, function: Callable[[ChannelActivations], Any]) -> Score:
    """A score that looks at what the channels put out."""

    def score(
        groups: Groups,
        params: PyTree,
        grads: PyTree | None = None,
        activations: Any = None,
    ) -> jax.Array:
        del params, grads
        found = need_activations(groups, activations, name)
        parts = found.groups.split(np.asarray(function(found)))
        return groups.join({name: parts[name] for name in groups.sizes})

    return score


def need_activations(groups: Groups, activations: Any, name: str) -> ChannelActivations:
    """Returns the activations, after checking that they are those of the groups."""
    if not isinstance(activations, ChannelActivations):
        raise ValueError(
            f"{name} needs activations, as sdp_jax.channel_activations(groups, fn, "
            "params, batches) returns them: call score(groups, params, "
            f"activations=found) outside of the step; got {type(activations).__name__}"
        )
    have = activations.groups.sizes
    odd = [n for n, size in groups.sizes.items() if have.get(n) != size]
    if odd:
        raise ValueError(
            f"{name}: the activations are of {have.get(odd[0], 0)} channels of "
            f"dimension {odd[0]!r}, but the groups have {groups.sizes[odd[0]]}; give "
            "those of the same groups"
        )
    return activations


def weighted_total(
    name: str,
    found: ChannelActivations,
    value: Callable[[Moments, WeightSums], np.ndarray],
) -> np.ndarray:
    """The sum of a quantity of what is read and of its weights over each channel."""
    total, lacking = np.zeros(found.groups.num_channels), dict[str, None]()
    for reading in found.readings:
        if reading.weights is None:
            numbers = reading.channels[reading.channels >= 0]
            for k in np.unique(found.groups.owner[numbers]).tolist():
                lacking[found.groups.dimensions[k].name] = None
        else:
            values = value(reading.moments, reading.weights)
            total += scatter(len(total), reading.channels, values)
    if lacking:
        names = ", ".join(map(repr, lacking))
        raise ValueError(
            f"{name} needs the weights that read a channel, but none read those of "
            f"{names} (queries and keys meet each other). Leave them as they are, with "
            f"groups.without({names}), or take another score"
        )
    return total


def check_score(score: Any) -> None:
    """Refuses what cannot be a score."""
    if not callable(score):
        raise TypeError(
            "score must be a function score(groups, params, grads=None, "
            f"activations=None), for example methods.l2_norm(); got {score!r}"
        )


def check_scores(groups: Groups, scores: Any) -> jax.Array:
    """All scores as one float32 vector, from a vector or arrays by dimension name."""
    if isinstance(scores, Mapping):
        try:
            scores = groups.join(scores)
        except ValueError as error:
            shapes = {name: jnp.shape(value) for name, value in scores.items()}
            raise ValueError(f"scores: {error}; got {shapes}") from error
    if jnp.shape(scores) != (groups.num_channels,):
        raise ValueError(
            "scores must be one number for each of the "
            f"{groups.num_channels} channels, or an array for each dimension name; got "
            f"an array of shape {jnp.shape(scores)}"
        )
    return jnp.asarray(scores, jnp.float32)


def unit(values: jax.Array) -> jax.Array:
    """A vector divided by its Euclidean norm, or itself where that is zero."""
    # By the largest magnitude first: squares of small numbers vanish.
    # What is not finite stays so, and does not count.
    finite = jnp.where(jnp.isfinite(values), values, 0)
    largest = jnp.max(jnp.abs(finite))
    scale = jnp.where(largest > 0, largest, 1)
    scaled = values / scale
    norm = jnp.sqrt(jnp.sum(jnp.square(finite / scale)))
    return scaled / jnp.where(norm > 0, norm, 1)


def producer_entries(groups: Groups) -> np.ndarray:
    """The number of producer entries of each channel, float32."""
    dense = groups.dense
    every = groups.dense_dimensions
    entries = [dense.entries(d, roles=("producer",)) for d in every]
    return np.repeat(entries, list(groups.sizes.values())).astype(np.float32)
