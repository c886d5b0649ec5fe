import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import data, pipeline

SPLIT = data.synthetic("digits", count=50).train
KEY = jax.random.key(3)


def move(image, pad, row, column, mirror):
    """One crop of a padded image, pixel by pixel, perhaps mirrored."""
    height, width, _ = image.shape
    out = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            there, beside = y + row - pad, x + column - pad
            if 0 <= there < height and 0 <= beside < width:
                out[y, width - 1 - x if mirror else x] = image[there, beside]
    return out


def marked(n, height=4, width=3, channels=2):
    """Images whose pixels all differ, and differ from zero."""
    size = n * height * width * channels
    return np.arange(1, size + 1, dtype=np.float32).reshape(n, height, width, channels)


@pytest.mark.parametrize(("seed", "epoch"), [(0, 1), (0, 2), (5, 1)])
def test_the_order_is_that_of_the_batches(seed, epoch):
    order = data.order_of(SPLIT, 8, seed=seed, epoch=epoch)
    assert order.shape == (6, 8) and order.dtype == np.int32
    batches = list(data.batches(SPLIT, 8, seed=seed, epoch=epoch))
    for index, batch in zip(order, batches, strict=True):
        found = pipeline.gather(SPLIT, jnp.asarray(index))
        np.testing.assert_array_equal(found.images, batch.images)
        np.testing.assert_array_equal(found.labels, batch.labels)


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(ValueError, match="between 1 and the 50 training examples"):
        data.order_of(SPLIT, 51, seed=0, epoch=1)


def test_without_augmentation_the_batch_is_what_the_index_says():
    index = np.asarray([7, 7, 0, 49], np.int32)
    batch = pipeline.make_batch("none", 0, SPLIT, index, 3)
    np.testing.assert_array_equal(batch.images, SPLIT.images[index])
    np.testing.assert_array_equal(batch.labels, SPLIT.labels[index])


@pytest.mark.parametrize("pad", [1, 2])
def test_crops_and_mirrors_against_loops(pad):
    images = marked(30)
    out = np.asarray(pipeline.crop_flip(jnp.asarray(images), KEY, pad=pad))
    # The same draws: shifts from the first half of the key, mirrors from the second.
    first, second = jax.random.split(KEY)
    shifts = np.asarray(jax.random.randint(first, (30, 2), 0, 2 * pad + 1))
    mirrors = np.asarray(jax.random.bernoulli(second, 0.5, (30, 1)))[:, 0]
    assert set(shifts.ravel()) == set(range(2 * pad + 1)) and set(mirrors) == {0, 1}
    for i, image in enumerate(images):
        expected = move(image, pad, *shifts[i], mirrors[i])
        np.testing.assert_array_equal(out[i], expected)


def test_every_crop_occurs_as_often_as_every_other():
    n, pad = 3000, 1
    images = marked(n, 3, 3, 1)
    out = np.asarray(
        jax.jit(pipeline.crop_flip, static_argnames="pad")(images, KEY, pad=pad)
    )
    counts = {}
    # Of an image alone one can tell which crop it is, because its pixels differ.
    for image, found in zip(images, out, strict=True):
        for row in range(3):
            for column in range(3):
                for mirror in (False, True):
                    if np.array_equal(found, move(image, pad, row, column, mirror)):
                        key = row, column, mirror
                        counts[key] = counts.get(key, 0) + 1
    assert sum(counts.values()) == n and len(counts) == 18
    # 167 of each expected, with a deviation of 12.6.
    assert max(abs(c - n / 18) for c in counts.values()) < 4.5 * 12.6


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_type_of_the_images_is_kept(dtype):
    images = jnp.asarray(SPLIT.images[:6], dtype)
    out = pipeline.crop_flip(images, KEY, pad=1)
    assert out.dtype == dtype and out.shape == images.shape
    again = pipeline.crop_flip(images.astype(jnp.float32), KEY, pad=1)
    np.testing.assert_array_equal(out.astype(jnp.float32), again)


def test_a_batch_is_the_same_with_and_without_jit_and_on_eight_devices():
    index, number = jnp.arange(16, dtype=jnp.int32), jnp.int32(5)
    plain = pipeline.make_batch("crop_flip", 1, SPLIT, index, number)
    assert not np.array_equal(plain.images, SPLIT.images[:16])
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    shared = NamedSharding(mesh, P("data"))
    whole = NamedSharding(mesh, P())

    def make(split, index, number):
        return pipeline.make_batch("crop_flip", 1, split, index, number)

    alone = jax.jit(make)(SPLIT, index, number)
    split = jax.device_put(SPLIT, whole)
    spread = jax.jit(make, out_shardings=shared)(
        split, jax.device_put(index, shared), number
    )
    assert len(spread.images.sharding.device_set) == 8
    for batch in (alone, spread):
        np.testing.assert_array_equal(batch.images, plain.images)
        np.testing.assert_array_equal(batch.labels, plain.labels)


def test_crops_depend_on_seed_and_number_alone():
    make = jax.jit(pipeline.make_batch, static_argnums=(0, 1))
    # One image again and again, so that only the crops differ.
    same = data.Split(np.repeat(marked(1, 8, 8, 1), 50, 0), SPLIT.labels)
    index = np.arange(12, dtype=np.int32)
    a = make("crop_flip", 1, same, index, np.int32(5))
    # Other examples, the same crops.
    np.testing.assert_array_equal(
        make("crop_flip", 1, same, index + 20, np.int32(5)).images, a.images
    )
    for seed, number in [(2, 5), (1, 6)]:
        other = make("crop_flip", seed, same, index, np.int32(number))
        assert not np.array_equal(other.images, a.images)
    # Each image of a batch has a crop of its own.
    assert len(np.unique(a.images, axis=0)) > 4


def test_images_move_by_an_eighth_of_their_side_at_most():
    side = 16
    images = np.ones((200, side, side, 1), np.float32)
    split = data.Split(images, np.zeros(200, np.int32))
    index = np.arange(200, dtype=np.int32)
    out = pipeline.make_batch("crop_flip", 0, split, index, 0).images
    # Rows and columns that came from beyond the edge.
    beyond = np.sum(np.asarray(out).max(2) == 0, 1)[:, 0]
    assert set(beyond) == {0, 1, 2}
