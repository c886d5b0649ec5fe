import builtins
import pathlib

import numpy as np
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
    with pytest.raises(ValueError, match="'digits' or 'mnist'; got 'cifar'"):
        data.load("cifar")  # pyright: ignore[reportArgumentType]


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
