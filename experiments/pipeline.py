"""Batches made on the device: gathered, cropped and mirrored inside jit.

A batch is a function of seed, epoch and number alone, equal on every backend and on
any number of devices: the order comes from NumPy, crops and mirrors from JAX's
counter-based generator.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from experiments import data


def gather(split: data.Split, index: jax.Array) -> data.Split:
    """The examples at ``index``, an integer array ``(n,)``."""
    found: Any = [jnp.take(x, index, axis=0, mode="clip") for x in split]
    return data.Split(*found)


def crop_flip(images: jax.Array, key: jax.Array, *, pad: int) -> jax.Array:
    """Moves every image by up to ``pad`` pixels and mirrors every second one.

    What comes from beyond the edge is zero, the mean colour where the mean has been
    taken out. With ``pad=4`` at 32×32 the usual augmentation of CIFAR (He et al.,
    arXiv 1512.03385, section 4.2).

    Args:
      images: ``(n, height, width, channels)``.
      key: key of this batch.
      pad: largest shift in pixels.

    Returns:
      Images of the same shape and dtype.
    """
    n, height, width, _ = images.shape
    shifts, mirrors = jax.random.split(key)
    offset = jax.random.randint(shifts, (n, 2), 0, 2 * pad + 1)
    mirrored = jax.random.bernoulli(mirrors, 0.5, (n, 1))
    rows = offset[:, :1] + jnp.arange(height)
    columns = offset[:, 1:] + jnp.arange(width)
    columns = jnp.where(mirrored, columns[:, ::-1], columns)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    pick = jax.vmap(lambda image, r, c: image[r][:, c])
    return pick(padded, rows, columns)


def make_batch(
    augment: Literal["none", "crop_flip"],
    seed: int,
    split: data.Split,
    index: Any,
    number: Any,
) -> data.Split:
    """The batch of one step.

    Args:
      augment: none or crop_flip, by an eighth of the side.
      seed: seed of the run.
      split: the training set on the device.
      index: which examples, int32 ``(n,)``.
      number: number of the step in the run, int32.

    Returns:
      The batch.
    """
    batch: Any = gather(split, index)
    if augment == "none":
        return batch
    key = jax.random.fold_in(jax.random.key(seed), number)
    pad = max(1, batch.images.shape[1] // 8)
    return batch._replace(images=crop_flip(batch.images, key, pad=pad))
