"""FLAP: channels that hardly fluctuate go, and their mean goes into a bias."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sdp_jax.activations import ChannelActivations, Kernel, Reading
from sdp_jax.groups import Groups
from sdp_jax.methods.score import Score, of_activations, weighted_total
from sdp_jax.tree import PyTree, leaf_table, replace_leaves


def flap_score(*, standardize: bool = True) -> Score:
    """The fluctuation of a channel, times the squared norm of the weights that read it.

    A channel that always puts out the same can be replaced by a bias. What is left of
    the error is, with the variance over the calibration data, ::

        S_c = Σ_places Σ_j∈c Var(X_j) · ‖W_:j‖²

    That channels of several positions, and those that several layers read, add up is
    our choice; so is the variance of all values, divided by their number.

    Args:
      standardize: whether scores are compared over dimensions: less their mean in the
        dimension, divided by their standard deviation. All scores are then moved by
        one number, so that the lowest is 0, which changes no ranking.

    Returns:
      A score; it needs activations. It raises ``ValueError`` where no weights read a
      channel, as between queries and keys.

    References:
      An, Zhao, Yu, Tang, Wang, "Fluctuation-based Adaptive Structured Pruning for Large
      Language Models", arXiv 2312.11983 (its metric WIFV, and the standardisation of
      its adaptive structure).

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"in": jnp.array([[3., 2.]]),
      ...           "out": jnp.array([[1., 1.], [2., -2.]])}
      >>> fn = lambda params, x: jnp.abs(x @ params["in"]) @ params["out"]
      >>> batches = [jnp.array([[1.], [0.]])]
      >>> groups = sdp_jax.find_groups(fn, params, batches[0])
      >>> found = sdp_jax.channel_activations(groups, fn, params, batches)
      >>> score = methods.flap_score(standardize=False)
      >>> print(score(groups, params, activations=found))  # 9/4 · 2, 4/4 · 8
      [4.5 8. ]
    """

    def score(found: ChannelActivations) -> np.ndarray:
        scores = weighted_total(
            "flap_score",
            found,
            lambda moments, weights: weights.square * moments.variance,
        )
        if not standardize:
            return scores
        parts = []
        for values in found.groups.split(scores).values():
            spread = values.std()
            parts.append((values - values.mean()) / (spread if spread > 0 else 1))
        joined = np.concatenate(parts)
        return joined - joined.min()

    return of_activations("flap_score", score)


def compensate_bias(
    params: PyTree,
    activations: ChannelActivations,
    kept: Sequence[Sequence[int]],
) -> PyTree:
    """The parameters with the mean of channels that go folded into the next bias.

    Where a leaf is added to what a matrix ``W`` of weights reads, at most converted and
    moved in between, it becomes ``b + Σ_j W_:j · mean(X_j)``, over the positions ``j``
    of the channels that are not kept. A running mean that is subtracted there loses as
    much. Where nothing is added, nothing changes: no bias is made. At the rim of a
    padded convolution fewer taps meet the channel than are folded. A bias behind layers
    that share it gets the mean over all of them.

    Do it before the cut: ``cut.take(compensate_bias(params, activations, cut.kept))``.

    Args:
      params: the dense parameters.
      activations: what :func:`sdp_jax.channel_activations` returned for them.
      kept: for each dimension the numbers of the channels that stay, as
        ``sdp_jax.Cut`` has them.

    Returns:
      New parameters of the same structure, shapes and dtypes.

    Raises:
      ValueError: if parameters or ``kept`` do not fit the activations.

    References:
      An et al., arXiv 2312.11983, the baseline bias compensation.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> from sdp_jax import methods
      >>> params = {"in": jnp.ones((1, 2)), "a": jnp.array([0., 1.]),
      ...           "out": jnp.array([[1., 1.], [2., 3.]]), "b": jnp.zeros(2)}
      >>> def fn(params, x):
      ...     return (x @ params["in"] + params["a"]) @ params["out"] + params["b"]
      >>> batches = [jnp.array([[1.], [-1.]])]
      >>> groups = sdp_jax.find_groups(fn, params, batches[0])
      >>> found = sdp_jax.channel_activations(groups, fn, params, batches)
      >>> print(methods.compensate_bias(params, found, [(0,)])["b"])
      [2. 3.]
    """
    groups = activations.groups
    table = leaf_table(params)
    stays = _stays(groups, kept)
    leaves: dict[str, jax.Array] = {}
    places: dict[Kernel, list[Reading]] = {}
    for reading in activations.readings:
        if reading.kernel is not None and reading.kernel.bias:
            places.setdefault(reading.kernel, []).append(reading)
    for kernel, readings in places.items():
        for path in (kernel.path, kernel.bias):
            if path not in table or np.shape(table[path]) != groups.shapes[path]:
                raise ValueError(
                    f"the parameters have no leaf {path!r} of shape "
                    f"{groups.shapes[path]}: give those that the activations are of, "
                    "before any cut"
                )
        gone = ~stays[readings[0].channels].all(axis=-1)
        if not gone.any():
            continue
        count = sum(r.moments.count for r in readings)
        mean = sum(r.moments.mean * r.moments.count for r in readings)
        mean = mean / np.maximum(count, 1) * gone
        weights = jnp.asarray(table[kernel.path])
        wide = jnp.promote_types(weights.dtype, jnp.float32)
        delta = jnp.einsum(
            weights.astype(wide),
            list(range(weights.ndim)),
            jnp.asarray(mean, wide),
            list(kernel.axes),
            list(kernel.bias_axes),
            precision="highest",
        )
        old = leaves.get(kernel.bias, table[kernel.bias])
        new = jnp.asarray(old, wide) + kernel.sign * delta
        leaves[kernel.bias] = new.astype(table[kernel.bias].dtype)
    return replace_leaves(params, leaves)


def _stays(groups: Groups, kept: Sequence[Sequence[int]]) -> np.ndarray:
    """Which channels stay; the last entry is that of no channel."""
    if len(kept) != len(groups):
        raise ValueError(
            f"kept has {len(kept)} entries, but the groups have {len(groups)} "
            "dimensions: give the numbers of the channels that stay for each, cut.kept"
        )
    parts = []
    for d, line in zip(groups, kept, strict=True):
        numbers = np.asarray(line, int).reshape(-1)
        if ((numbers < 0) | (numbers >= d.size)).any():
            raise ValueError(
                f"dimension {d.name!r} has {d.size} channels, numbered from 0; kept "
                f"has {tuple(line)} for it"
            )
        part = np.zeros(d.size, bool)
        part[numbers] = True
        parts.append(part)
    return np.concatenate([*parts, [True]])
