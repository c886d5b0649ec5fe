import builtins
import io
import pathlib
import tarfile

import numpy as np
import PIL.Image
import pytest

from experiments import data


def write_mnist(path, count=60_000, **changed):
    arrays = {
        "x_train": np.zeros((count, 28, 28), np.uint8),
        "y_train": np.zeros(count, np.uint8),
        "x_test": np.full((10_000, 28, 28), 255, np.uint8),
        "y_test": np.full(10_000, 9, np.uint8),
    }
    arrays |= changed
    np.savez(path / "mnist.npz", **{k: v for k, v in arrays.items() if v is not None})


def test_digits():
    dataset = data.load("digits")
    assert dataset.train.images.shape == (1437, 8, 8, 1)
    assert dataset.test.images.shape == (360, 8, 8, 1)
    assert dataset.train.images.dtype == np.float32
    assert set(dataset.test.labels) == set(range(10))
    rows = np.concatenate([dataset.train.images, dataset.test.images]).reshape(1797, -1)
    again = data.load("digits")
    np.testing.assert_array_equal(again.train.images, dataset.train.images)
    assert len(np.unique(rows, axis=0)) == 1797  # nothing is in both parts


def test_mnist_file(tmp_path):
    write_mnist(tmp_path)
    dataset = data.load("mnist", tmp_path)
    assert dataset.train.images.shape == (60_000, 28, 28, 1)
    # (0 - mean) / deviation and (1 - mean) / deviation of MNIST.
    np.testing.assert_allclose(dataset.train.images.max(), -0.1307 / 0.3081, rtol=1e-5)
    np.testing.assert_allclose(dataset.test.images.min(), 0.8693 / 0.3081, rtol=1e-5)
    assert dataset.test.labels.dtype == np.int32


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no mnist.npz in .*--data-dir"):
        data.load("mnist", tmp_path)


def test_truncated_file(tmp_path):
    write_mnist(tmp_path)
    whole = (tmp_path / "mnist.npz").read_bytes()
    (tmp_path / "mnist.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a complete MNIST archive"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"y_test": None}, "not a complete MNIST archive"),
        ({"x_test": np.zeros((10_000, 28, 28), np.float32)}, "expected uint8"),
        ({"y_train": np.zeros(59_999, np.uint8)}, "expected uint8 .60000, 28, 28"),
        ({"y_test": np.full(10_000, 10, np.uint8)}, "labels outside 0 to 9"),
    ],
)
def test_wrong_file(tmp_path, changed, message):
    write_mnist(tmp_path, **changed)
    with pytest.raises(ValueError, match=message):
        data.load("mnist", tmp_path)


def test_without_tensorflow_datasets(monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **keywords):
        if name == "tensorflow_datasets":
            raise ImportError(name)
        return original(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"sdp-jax\[tfds\].*--data-dir"):
        data.load("mnist")


def test_unknown_data_set():
    with pytest.raises(ValueError, match="'mnist' or 'cifar10'; got 'imagenet'"):
        data.load("imagenet")  # pyright: ignore[reportArgumentType]


def numbered(size):
    return data.Split(np.arange(size, dtype=np.float32)[:, None], np.arange(size))


def test_order_of_batches_depends_on_seed_and_epoch_alone():
    split = numbered(50)

    def labels(seed, epoch):
        found = list(data.batches(split, 8, seed=seed, epoch=epoch))
        assert len(found) == data.steps_per_epoch(split, 8) == 6
        for batch in found:
            np.testing.assert_array_equal(batch.images[:, 0], batch.labels)
        return np.concatenate([b.labels for b in found])

    np.testing.assert_array_equal(labels(0, 3), labels(0, 3))
    assert len(set(labels(0, 3))) == 48
    assert (labels(0, 3) != labels(0, 4)).any()
    assert (labels(0, 3) != labels(1, 3)).any()


@pytest.mark.parametrize("size", [0, 51])
def test_batch_size_is_checked(size):
    with pytest.raises(ValueError, match="between 1 and the 50"):
        list(data.batches(numbered(50), size, seed=0, epoch=0))


def test_hold_out_takes_from_every_class():
    split = data.Split(np.zeros((100, 1)), np.repeat(np.arange(2), 50))
    rest, held = data.hold_out(split, 40)
    assert len(rest.labels) == 60 and len(held.labels) == 40
    assert set(held.labels) == {0, 1}
    everything, nothing = data.hold_out(split, 0)
    np.testing.assert_array_equal(everything.labels, split.labels)
    assert len(nothing.labels) == 0
    with pytest.raises(ValueError, match="between 0 and 99"):
        data.hold_out(split, 100)


def test_data_dir_may_be_a_path():
    with pytest.raises(FileNotFoundError):
        data.load("mnist", pathlib.Path("no/such/directory"))


def cifar10_archive(path, sizes=None, shape=(32, 32, 3)):
    """Three images of each part, in the layout of the real archive."""
    rng = np.random.default_rng(0)
    images = {}
    with tarfile.open(path / data.CIFAR10_FILE, "w:xz") as archive:
        for part, count in (sizes or {"train": 3, "test": 2}).items():
            for n in range(count):
                colour = rng.integers(256, size=(1, 1, 3))
                pixels = np.broadcast_to(colour, shape).astype(np.uint8)
                file = io.BytesIO()
                PIL.Image.fromarray(pixels).save(file, "JPEG", quality=100)
                label = data.CIFAR10_CLASSES[(3 * n) % 10]
                member = tarfile.TarInfo(f"{part}/{label}/{n:04}.jpg")
                member.size = file.tell()
                file.seek(0)
                archive.addfile(member, file)
                images[part, n] = pixels
    return images


def test_cifar10_from_jpeg_files(tmp_path, monkeypatch):
    images = cifar10_archive(tmp_path)
    monkeypatch.setattr(data, "CIFAR10_COUNTS", {"train": 3, "test": 2})
    dataset = data.load("cifar10", tmp_path)
    assert dataset.train.images.shape == (3, 32, 32, 3)
    assert dataset.train.images.dtype == np.float32
    assert dataset.train.labels.tolist() == [0, 3, 6]
    assert dataset.test.labels.tolist() == [0, 3]
    back = dataset.train.images * data.CIFAR10_DEVIATION + data.CIFAR10_MEAN
    for n in range(3):
        np.testing.assert_allclose(255 * back[n], images["train", n], atol=3)
    small = data.load("cifar10", tmp_path, downscale=4)
    assert small.train.images.shape == (3, 8, 8, 3)
    np.testing.assert_allclose(
        small.train.images[0, 0, 0],
        dataset.train.images[0, :4, :4].mean((0, 1)),
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    "spoil,message",
    [
        (lambda path: None, "3 images of shapes .* in train; expected 50000"),
        (lambda path: path.write_bytes(path.read_bytes()[:300]), "cannot be read"),
        (lambda path: path.write_bytes(b"<html>"), "cannot be read"),
    ],
    ids=["too few", "half", "no archive"],
)
def test_a_wrong_cifar10_file_says_so(tmp_path, spoil, message):
    cifar10_archive(tmp_path)
    spoil(tmp_path / data.CIFAR10_FILE)
    with pytest.raises(ValueError, match=message):
        data.load("cifar10", tmp_path)


def test_cifar10_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no cifar10-jpeg.tar.xz"):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize("downscale", [0, 3])
def test_downscale_must_divide(downscale):
    with pytest.raises(ValueError, match=f"the side of the images, 8; got {downscale}"):
        data.load("digits", downscale=downscale)
