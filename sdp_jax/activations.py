"""What the channels of a model put out on calibration data, where they are read."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from sdp_jax.groups import Groups


class Moments(NamedTuple):
    """Statistics of activations, arrays of one shape.

    Attributes:
      count: the number of values behind the others.
      mean: the mean.
      mean_abs: the mean of the magnitudes.
      mean_square: the mean of the squared magnitudes.
      variance: the mean squared distance from the mean.
    """

    count: Any
    mean: Any
    mean_abs: Any
    mean_square: Any
    variance: Any


class WeightSums(NamedTuple):
    """Sums over the weights that the positions of an axis are multiplied by.

    Attributes:
      magnitude: the sum of magnitudes.
      square: the sum of squared magnitudes.
    """

    magnitude: Any
    square: Any


def merge_moments(first: Moments, second: Moments) -> Moments:
    """The statistics of two sets of values together (Chan, Golub, LeVeque 1979)."""
    total = first.count + second.count
    # Of nothing and nothing it is nothing.
    share = second.count / (total + (total == 0))
    apart = second.mean - first.mean
    mean = first.mean + apart * share
    mean_abs = first.mean_abs + (second.mean_abs - first.mean_abs) * share
    variance = first.variance + (second.variance - first.variance) * share
    variance = variance + abs(apart) ** 2 * share * (1 - share)
    return Moments(total, mean, mean_abs, variance + abs(mean) ** 2, variance)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The leaf that reads channels, and the one that is added behind it.

    Attributes:
      path: path of the leaf.
      axes: for each axis of the statistics the axis of the leaf.
      bias: path of a leaf that is added to what comes out, or "".
      bias_axes: for each axis of that leaf the axis of the first one.
      sign: -1 if it is subtracted (the mean of a normalisation).
    """

    path: str
    axes: tuple[int, ...]
    bias: str = ""
    bias_axes: tuple[int, ...] = ()
    sign: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """One place where channels are read, and what was seen there.

    Attributes:
      place: the operation, and the user's file and line.
      channels: the numbers of the channels to which a position belongs, -1 for none:
        the shape of the statistics and one more axis.
      moments: statistics at each position, over all other axes and all batches. The
        axes are those of loops over stacked layers, those of batches of matrices, and
        those that are summed over.
      weights: sums over the weights that each position is multiplied by; ``None``
        where no weights read it.
      kernel: the matrix, if it is a leaf of the parameters, at most moved or converted.
      examples: the statistics of each example, on a first axis, if they were asked for.
    """

    place: str
    channels: np.ndarray
    moments: Moments
    weights: WeightSums | None = None
    kernel: Kernel | None = None
    examples: Moments | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelActivations:
    """What :func:`sdp_jax.channel_activations` has seen, on the host, in float64.

    Attributes:
      groups: the channel dimensions.
      readings: the places where channels are read.
      batches: the number of batches.
      gradients: for each channel the mean over batches, or examples, of the magnitude
        of the sum of gradient times activation, ``(num_channels,)``; ``None`` if they
        were not asked for.

    Example:
      >>> import jax.numpy as jnp, sdp_jax
      >>> params = {"in": jnp.array([[1., 2.]]), "out": jnp.ones((2, 3))}
      >>> fn = lambda params, x: x @ params["in"] @ params["out"]
      >>> groups = sdp_jax.find_groups(fn, params, jnp.ones((4, 1)))
      >>> found = sdp_jax.channel_activations(groups, fn, params, [jnp.ones((4, 1))])
      >>> found.readings[0].kernel.path, groups.split(found.moments.mean)
      ('out', {'in': array([1., 2.])})
    """

    groups: Groups
    readings: tuple[Reading, ...]
    batches: int
    gradients: np.ndarray | None = None

    @functools.cached_property
    def moments(self) -> Moments:
        """The statistics of each channel over all its readings, ``(num_channels,)``.

        Each value counts once; of several positions of a channel, of several layers
        that read it, all count alike.
        """
        return pool(self.groups, [(r.channels, r.moments) for r in self.readings])

    @functools.cached_property
    def examples(self) -> Moments | None:
        """The same of each example, ``(examples, num_channels)``, if they are there."""
        parts = [
            (r.channels, r.examples) for r in self.readings if r.examples is not None
        ]
        return pool(self.groups, parts) if parts else None


def scatter(size: int, channels: np.ndarray, values: Any) -> np.ndarray:
    """Sums what positions hold to their channels, behind axes in front of them."""
    table = channels.reshape(-1, channels.shape[-1])
    front = np.shape(values)[: np.ndim(values) - channels.ndim + 1]
    lines = np.reshape(values, (-1, len(table)))
    out = np.zeros((size, len(lines)), lines.dtype)
    for column in table.T:
        there = np.flatnonzero(column >= 0)
        np.add.at(out, column[there], lines.T[there])
    return out.T.reshape(*front, size)


def pool(groups: Groups, parts: list[tuple[np.ndarray, Moments]]) -> Moments:
    """Statistics of channels from those of their positions."""
    size = groups.num_channels

    def total(values: Callable[[np.ndarray, Moments], Any]) -> np.ndarray:
        return sum(
            (scatter(size, channels, values(channels, m)) for channels, m in parts),
            np.zeros(size),
        )

    count = total(lambda _, m: m.count)
    many = np.maximum(count, 1)
    mean = total(lambda _, m: m.count * m.mean) / many
    mean_abs = total(lambda _, m: m.count * m.mean_abs) / many
    variance = np.zeros(np.shape(mean))
    for channels, m in parts:
        # Position by position, as one may belong to several channels.
        for column in np.moveaxis(channels, -1, 0):
            apart = np.abs(m.mean - mean[..., column]) ** 2
            spread = m.count * (m.variance + apart)
            variance += scatter(size, column[..., None], spread)
    variance /= many
    return Moments(count, mean, mean_abs, variance + np.abs(mean) ** 2, variance)
