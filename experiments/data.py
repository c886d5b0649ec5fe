"""Data sets in memory, and an order of batches that depends on seed and epoch alone."""

import pathlib
import zipfile
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

Name: TypeAlias = Literal["digits", "mnist"]


class Split(NamedTuple):
    """Images and labels.

    Attributes:
      images: float32 ``(n, height, width, channels)``.
      labels: int32 ``(n,)``.
    """

    images: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """A data set in memory.

    Attributes:
      train: what is trained on.
      test: what is looked at once, at the end.
      classes: number of classes.
    """

    train: Split
    test: Split
    classes: int


def load(name: Name, data_dir: pathlib.Path | None = None) -> Dataset:
    """Loads a data set.

    Args:
      name: ``"digits"`` (1,797 images of 8×8 that come with scikit-learn) or
        ``"mnist"`` (70,000 of 28×28).
      data_dir: directory with ``mnist.npz`` (arrays ``x_train``, ``y_train``,
        ``x_test``, ``y_test``); without it tensorflow-datasets downloads MNIST.

    Returns:
      The data set.

    Raises:
      ValueError: if the name is unknown, or the file is not what it should be.
      FileNotFoundError: if ``data_dir`` has no such file.
      ImportError: if tensorflow-datasets is needed and not installed.
    """
    if name == "digits":
        return _digits()
    if name == "mnist":
        return _mnist_file(data_dir) if data_dir is not None else _mnist_tfds()
    raise ValueError(f"data set must be 'digits' or 'mnist'; got {name!r}")


def hold_out(split: Split, count: int) -> tuple[Split, Split]:
    """Splits off ``count`` examples for validation, always the same ones.

    Args:
      split: the training set.
      count: how many examples to hold out.

    Returns:
      What remains, and what is held out.

    Raises:
      ValueError: if ``count`` is negative or leaves nothing to train on.
    """
    size = len(split.labels)
    if not 0 <= count < size:
        raise ValueError(
            f"validation must be between 0 and {size - 1} of the {size} training "
            f"examples; got {count}"
        )
    # Drawn at random, because files may be sorted by class.
    order = np.random.default_rng(0).permutation(size)
    out, keep = np.sort(order[:count]), np.sort(order[count:])
    return Split(*(x[keep] for x in split)), Split(*(x[out] for x in split))


def batches(split: Split, size: int, *, seed: int, epoch: int) -> Iterator[Split]:
    """The batches of one epoch; the last incomplete one is left out.

    The order is a function of ``seed`` and ``epoch``, so that a run that resumes at an
    epoch sees what it would have seen.

    Args:
      split: the training set.
      size: examples in a batch.
      seed: seed of the run.
      epoch: number of the epoch.

    Yields:
      Batches of ``size`` examples.

    Raises:
      ValueError: if ``size`` is below 1 or above the number of examples.
    """
    count = steps_per_epoch(split, size)
    order = np.random.default_rng([seed, epoch]).permutation(len(split.labels))
    for index in order[: count * size].reshape(count, size):
        yield Split(split.images[index], split.labels[index])


def steps_per_epoch(split: Split, size: int) -> int:
    """Number of batches that :func:`batches` yields."""
    if not 1 <= size <= len(split.labels):
        raise ValueError(
            f"batch_size must be between 1 and the {len(split.labels)} training "
            f"examples; got {size}"
        )
    return len(split.labels) // size


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = (bunch.images / 16).astype(np.float32)[..., None]
    labels = bunch.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:1437], order[1437:]
    return Dataset(
        Split(images[train], labels[train]), Split(images[test], labels[test]), 10
    )


def _mnist_file(data_dir: pathlib.Path) -> Dataset:
    path = pathlib.Path(data_dir) / "mnist.npz"
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no mnist.npz in {data_dir}; give the directory that holds it, "
            "or leave --data-dir out to download MNIST with tensorflow-datasets"
        )
    try:
        with path.open("rb") as handle, np.load(handle) as file:
            arrays = {k: file[k] for k in ("x_train", "y_train", "x_test", "y_test")}
    except (KeyError, ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"{path} is not a complete MNIST archive ({error}); it must hold x_train, "
            "y_train, x_test and y_test. Delete it and fetch it again"
        ) from error
    for part, count in (("train", 60_000), ("test", 10_000)):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.shape != (count, 28, 28) or y.shape != (count,) or x.dtype != np.uint8:
            raise ValueError(
                f"{path}: x_{part} is {x.dtype} {x.shape} and y_{part} {y.shape}; "
                f"expected uint8 {(count, 28, 28)} and {(count,)}"
            )
        if y.min() < 0 or y.max() > 9:
            raise ValueError(f"{path}: y_{part} has labels outside 0 to 9")
    return Dataset(
        _scaled(arrays["x_train"], arrays["y_train"]),
        _scaled(arrays["x_test"], arrays["y_test"]),
        10,
    )


def _mnist_tfds() -> Dataset:
    try:
        import tensorflow_datasets as tfds  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "MNIST comes from tensorflow-datasets, which is not installed: "
            "pip install 'sdp-jax[tfds]', or give --data-dir with an mnist.npz"
        ) from error
    parts = {}
    for part in ("train", "test"):
        data: Any = tfds.as_numpy(tfds.load("mnist", split=part, batch_size=-1))
        parts[part] = _scaled(data["image"][..., 0], data["label"])
    return Dataset(parts["train"], parts["test"], 10)


def _scaled(images: np.ndarray, labels: np.ndarray) -> Split:
    """Images of bytes, with the mean and deviation of MNIST taken out."""
    scaled = (images.astype(np.float32)[..., None] / 255 - 0.1307) / 0.3081
    return Split(scaled.astype(np.float32), labels.astype(np.int32))
