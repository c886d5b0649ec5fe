"""Data sets in memory, and an order of batches that depends on seed and epoch alone."""

import io
import lzma
import pathlib
import tarfile
import zipfile
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

Name: TypeAlias = Literal["digits", "mnist", "cifar10"]

CIFAR10_FILE = "cifar10-jpeg.tar.xz"
CIFAR10_COUNTS = {"train": 50_000, "test": 10_000}
CIFAR10_CLASSES: tuple[str, ...] = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
CIFAR10_MEAN, CIFAR10_DEVIATION = (
    np.asarray(x, np.float32)
    for x in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
)


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


def load(
    name: Name, data_dir: pathlib.Path | None = None, *, downscale: int = 1
) -> Dataset:
    """Loads a data set.

    Args:
      name: ``"digits"`` (1,797 images of 8×8 that come with scikit-learn), ``"mnist"``
        (70,000 of 28×28) or ``"cifar10"`` (60,000 of 32×32 in colour).
      data_dir: directory with ``mnist.npz`` (arrays ``x_train``, ``y_train``,
        ``x_test``, ``y_test``) or ``cifar10-jpeg.tar.xz`` (JPEG files
        ``train/<class>/<n>.jpg`` and ``test/<class>/<n>.jpg``); without it
        tensorflow-datasets downloads the original data set.
      downscale: images become the means of squares of this side.

    Returns:
      The data set.

    Raises:
      ValueError: if the name is unknown, the file is not what it should be, or
        ``downscale`` does not divide the side of the images.
      FileNotFoundError: if ``data_dir`` has no such file.
      ImportError: if tensorflow-datasets is needed and not installed.
    """
    if name == "digits":
        dataset = _digits()
    elif name == "mnist":
        dataset = _mnist_file(data_dir) if data_dir is not None else _mnist_tfds()
    elif name == "cifar10":
        dataset = _cifar10_file(data_dir) if data_dir is not None else _cifar10_tfds()
    else:
        raise ValueError(
            f"data set must be 'digits', 'mnist' or 'cifar10'; got {name!r}"
        )
    side = dataset.train.images.shape[1]
    if downscale < 1 or side % downscale:
        raise ValueError(
            f"downscale must divide the side of the images, {side}; got {downscale}"
        )
    return dataset._replace(
        train=_downscaled(dataset.train, downscale),
        test=_downscaled(dataset.test, downscale),
    )


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
    parts = _tfds("mnist", "an mnist.npz")
    train, test = (_scaled(x[..., 0], y) for x, y in parts)
    return Dataset(train, test, 10)


def _cifar10_file(data_dir: pathlib.Path) -> Dataset:
    import PIL.Image

    path = pathlib.Path(data_dir) / CIFAR10_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {CIFAR10_FILE} in {data_dir}; give the directory that holds "
            "it, or leave --data-dir out to download CIFAR-10 with tensorflow-datasets"
        )
    found: dict[str, list[tuple[np.ndarray, int]]] = {"train": [], "test": []}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if not member.isfile():
                    continue
                part, label, _ = member.name.split("/")
                file = archive.extractfile(member)
                assert file is not None
                image = np.asarray(PIL.Image.open(io.BytesIO(file.read())))
                found[part].append((image, CIFAR10_CLASSES.index(label)))
    except (
        *(KeyError, ValueError, OSError, EOFError, tarfile.TarError, lzma.LZMAError),
    ) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); it must hold JPEG files "
            "train/<class>/<n>.jpg and test/<class>/<n>.jpg. Fetch it again"
        ) from error
    parts = []
    for part, count in CIFAR10_COUNTS.items():
        shapes = {image.shape for image, _ in found[part]}
        if len(found[part]) != count or shapes != {(32, 32, 3)}:
            raise ValueError(
                f"{path} has {len(found[part])} images of shapes {sorted(shapes)} in "
                f"{part}; expected {count} of (32, 32, 3)"
            )
        images, labels = zip(*found[part], strict=True)
        parts.append(_coloured(np.stack(images), np.asarray(labels)))
    return Dataset(parts[0], parts[1], 10)


def _cifar10_tfds() -> Dataset:
    parts = _tfds("cifar10", f"a {CIFAR10_FILE}")
    train, test = (_coloured(x, y) for x, y in parts)
    return Dataset(train, test, 10)


def _tfds(name: str, alternative: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images and labels of the training and the test set."""
    try:
        import tensorflow_datasets as tfds  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"{name} comes from tensorflow-datasets, which is not installed: "
            f"pip install 'sdp-jax[tfds]', or give --data-dir with {alternative}"
        ) from error
    parts = []
    for part in ("train", "test"):
        data: Any = tfds.as_numpy(tfds.load(name, split=part, batch_size=-1))
        parts.append((data["image"], data["label"]))
    return parts


def _coloured(images: np.ndarray, labels: np.ndarray) -> Split:
    """Images of bytes, with the mean and deviation of CIFAR-10 taken out."""
    scaled = (images.astype(np.float32) / 255 - CIFAR10_MEAN) / CIFAR10_DEVIATION
    return Split(scaled, labels.astype(np.int32))


def _downscaled(split: Split, factor: int) -> Split:
    if factor == 1:
        return split
    n, height, width, channels = split.images.shape
    squares = (n, height // factor, factor, width // factor, factor, channels)
    return split._replace(images=split.images.reshape(squares).mean((2, 4)))


def _scaled(images: np.ndarray, labels: np.ndarray) -> Split:
    """Images of bytes, with the mean and deviation of MNIST taken out."""
    scaled = (images.astype(np.float32)[..., None] / 255 - 0.1307) / 0.3081
    return Split(scaled.astype(np.float32), labels.astype(np.int32))
