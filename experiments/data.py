"""Data sets in memory, and an order of batches that depends on seed and epoch alone."""

import gzip
import io
import lzma
import pathlib
import pickle
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

Name: TypeAlias = Literal["digits", "mnist", "cifar10", "cifar100", "shakespeare"]

_CIFAR10_NAMES = tuple(
    "airplane automobile bird cat deer dog frog horse ship truck".split()
)
_CIFAR100_NAMES = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge
    bus butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud
    cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox
    girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man
    maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree
    pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray
    road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel
    streetcar sunflower sweet_pepper table tank telephone television tiger tractor train
    trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """.split()
)


class Info(NamedTuple):
    """What a data set looks like.

    Attributes:
      shape: height, width and channels of an image, or the length of a text.
      classes: number of classes.
      train: images in the training set.
      test: images in the test set.
      mean: of each channel, for pixels between 0 and 1; taken out of the images.
      deviation: of each channel; the images are divided by it.
      files: what a data directory may hold it in; the first that is there counts.
      names: names of the classes, in the order of the labels; where there are any,
        every class has equally many images.
    """

    shape: tuple[int, ...]
    classes: int
    train: int
    test: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    files: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


INFO: dict[Name, Info] = {
    "digits": Info((8, 8, 1), 10, 1437, 360, (0.0,), (1.0,)),
    "mnist": Info(
        (28, 28, 1), 10, 60_000, 10_000, (0.1307,), (0.3081,), files=("mnist.npz",)
    ),
    "cifar10": Info(
        *((32, 32, 3), 10, 50_000, 10_000),
        mean=(0.4914, 0.4822, 0.4465),
        deviation=(0.2470, 0.2435, 0.2616),
        files=("cifar10-jpeg.tar.xz", "cifar10-jpeg", "cifar-10-python.tar.gz"),
        names=_CIFAR10_NAMES,
    ),
    "cifar100": Info(
        *((32, 32, 3), 100, 50_000, 10_000),
        mean=(0.5071, 0.4865, 0.4409),
        deviation=(0.2673, 0.2564, 0.2762),
        files=("cifar100-jpeg.tar.xz", "cifar100-jpeg", "cifar-100-python.tar.gz"),
        names=_CIFAR100_NAMES,
    ),
    # Windows of text, as integers; the labels are the characters that follow.
    "shakespeare": Info(
        *((64,), 65, 15_685, 1_742),
        mean=(),
        deviation=(),
        files=("tinyshakespeare.txt",),
    ),
}

# The labels, and the files of each part, in the archives that end in -python.tar.gz.
_PICKLES: dict[Name, tuple[bytes, dict[str, tuple[str, ...]]]] = {
    "cifar10": (
        b"labels",
        {
            "train": tuple(f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)),
            "test": ("cifar-10-batches-py/test_batch",),
        },
    ),
    "cifar100": (
        b"fine_labels",
        {"train": ("cifar-100-python/train",), "test": ("cifar-100-python/test",)},
    ),
}

# Images of bytes with their labels, of the training and of the test set.
_Parts: TypeAlias = dict[str, tuple[np.ndarray, np.ndarray]]


class Split(NamedTuple):
    """Images and labels.

    Attributes:
      images: float32 ``(n, height, width, channels)``; of a text, characters as int32
        ``(n, length)``.
      labels: int32 ``(n,)``; of a text, the characters that follow, ``(n, length)``.
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
        (70,000 of 28×28), ``"cifar10"``, ``"cifar100"`` (60,000 of 32×32 in colour) or
        ``"shakespeare"`` (17,427 windows of 64 characters; the last tenth of the text
        is the test set).
      data_dir: directory with ``mnist.npz`` (arrays ``x_train``, ``y_train``,
        ``x_test``, ``y_test``), or with one of the following, of which the first that
        is there is read; ``cifar100`` is named likewise.

        * ``cifar10-jpeg.tar.xz``, JPEG files ``train/<class>/<n>.jpg`` and
          ``test/<class>/<n>.jpg``;
        * ``cifar10-jpeg``, the same files in a folder;
        * ``cifar-10-python.tar.gz``, as its authors publish it.

        JPEG files are ordered by class, then by name as text, however they are kept;
        the authors' archive keeps its own order. Without ``data_dir``
        tensorflow-datasets downloads the original data set. ``"shakespeare"`` is read
        from ``tinyshakespeare.txt``, and from nowhere else.
      downscale: images become the means of squares of this side.

    Returns:
      The data set.

    Raises:
      ValueError: if the name is unknown, a file is not what it should be, or
        ``downscale`` does not divide the side of the images.
      FileNotFoundError: if ``data_dir`` has no such file, or tensorflow-datasets could
        not fetch the data set.
      ImportError: if tensorflow-datasets, or what it needs, is not installed.
    """
    _check(name, downscale)
    if name == "digits":
        dataset = _digits()
    elif name == "shakespeare":
        if data_dir is None:
            raise FileNotFoundError(
                f"{name} is not downloaded: give --data-dir with {_alternatives(name)}"
            )
        dataset = _text(name, _path(name, pathlib.Path(data_dir)))
    elif data_dir is None:
        dataset = _dataset(name, "tensorflow-datasets", _tfds(name))
    else:
        path = _path(name, pathlib.Path(data_dir))
        if path.suffix == ".npz":
            parts = _arrays(path)
        elif path.name.endswith("-python.tar.gz"):
            parts = _pickles(name, path)
        else:
            parts = _jpegs(name, path)
        dataset = _dataset(name, str(path), parts)
    return dataset._replace(
        train=_downscaled(dataset.train, downscale),
        test=_downscaled(dataset.test, downscale),
    )


def synthetic(
    name: Name, *, count: int = 256, downscale: int = 1, seed: int = 0
) -> Dataset:
    """Noise in the shape of a data set, which needs no files.

    Args:
      name: the data set, as for :func:`load`.
      count: images in the training set, and in the test set.
      downscale: the sides of the images are divided by it.
      seed: of the noise and of the labels.

    Returns:
      Images of normal noise (of a text, characters drawn from all) and labels drawn
      from all classes, with the shapes, the types and the number of classes that
      :func:`load` gives.

    Raises:
      ValueError: if the name is unknown, ``count`` is no integer from 1 on, or
        ``downscale`` does not divide the side of the images.
    """
    _check(name, downscale)
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"count must be an integer of at least 1; got {count}")
    info = INFO[name]
    rng = np.random.default_rng(seed)

    def numbers(*shape: int) -> np.ndarray:
        return rng.integers(info.classes, size=shape, dtype=np.int32)

    def images() -> Split:
        height, width, channels = info.shape
        shape = (count, height // downscale, width // downscale, channels)
        return Split(rng.standard_normal(shape, np.float32), numbers(count))

    def text() -> Split:
        return Split(numbers(count, *info.shape), numbers(count, *info.shape))

    make = text if len(info.shape) == 1 else images
    return Dataset(make(), make(), info.classes)


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
    for index in order_of(split, size, seed=seed, epoch=epoch):
        yield Split(split.images[index], split.labels[index])


def order_of(split: Split, size: int, *, seed: int, epoch: int) -> np.ndarray:
    """Which examples make the batches of an epoch, as in :func:`batches`.

    The order is a function of ``seed`` and ``epoch``, so that a run that resumes at an
    epoch sees what it would have seen.

    Args:
      split: the training set.
      size: examples in a batch.
      seed: seed of the run.
      epoch: number of the epoch.

    Returns:
      int32 ``(batches, size)``.

    Raises:
      ValueError: if ``size`` is below 1 or above the number of examples.
    """
    count = steps_per_epoch(split, size)
    order = np.random.default_rng([seed, epoch]).permutation(len(split.labels))
    return order[: count * size].reshape(count, size).astype(np.int32)


def steps_per_epoch(split: Split, size: int) -> int:
    """Number of batches that :func:`batches` yields."""
    if not 1 <= size <= len(split.labels):
        raise ValueError(
            f"batch_size must be between 1 and the {len(split.labels)} training "
            f"examples; got {size}"
        )
    return len(split.labels) // size


def _check(name: Name, downscale: int) -> None:
    if name not in INFO:
        *names, last = map(repr, INFO)
        raise ValueError(f"data set must be {', '.join(names)} or {last}; got {name!r}")
    # A text cannot be scaled.
    side = INFO[name].shape[0] if len(INFO[name].shape) > 1 else 1
    if not isinstance(downscale, int) or downscale < 1 or side % downscale:
        raise ValueError(
            "downscale must be an integer that divides the side of the images, "
            f"{side}; got {downscale}"
        )


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    info = INFO["digits"]
    bunch: Any = load_digits()
    images = (bunch.images / 16).astype(np.float32)[..., None]
    labels = bunch.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[: info.train], order[info.train :]
    return Dataset(
        Split(images[train], labels[train]),
        Split(images[test], labels[test]),
        info.classes,
    )


def _text(name: Name, path: pathlib.Path) -> Dataset:
    """Windows of a text, one behind the other, and the characters that follow."""
    info, text = INFO[name], path.read_text(encoding="utf-8")
    characters = sorted(set(text))
    (length,), size = info.shape, len(text) * 9 // 10
    parts = [
        np.searchsorted(characters, list(part)).astype(np.int32)
        for part in (text[:size], text[size:])
    ]
    counts = [max(len(part) - 1, 0) // length for part in parts]
    if (len(characters), *counts) != (info.classes, info.train, info.test):
        raise ValueError(
            f"{path} has {len(characters)} characters, and windows of {length} for "
            f"training and test {counts}; expected {info.classes} and "
            f"{[info.train, info.test]}. Fetch the original file again"
        )
    train, test = (
        Split(
            part[: count * length].reshape(count, length),
            part[1 : count * length + 1].reshape(count, length),
        )
        for part, count in zip(parts, counts, strict=True)
    )
    return Dataset(train, test, info.classes)


def _path(name: Name, data_dir: pathlib.Path) -> pathlib.Path:
    """The first file of the data set that is there."""
    paths = [data_dir / file for file in INFO[name].files]
    for path in paths:
        if path.exists():
            return path
    raise FileNotFoundError(
        f"there is no {_alternatives(name)} in {data_dir}"
        f"{'' if data_dir.is_dir() else ', which is no directory'}; give the directory "
        f"that holds it, or leave --data-dir out to download {name} with "
        "tensorflow-datasets"
    )


def _alternatives(name: Name) -> str:
    return " or ".join(INFO[name].files)


def _arrays(path: pathlib.Path) -> _Parts:
    """The arrays of ``mnist.npz``."""
    try:
        with path.open("rb") as handle, np.load(handle) as file:
            parts = {p: (file[f"x_{p}"], file[f"y_{p}"]) for p in ("train", "test")}
    # A damaged header makes zipfile and NumPy raise whatever comes up.
    except Exception as error:
        raise ValueError(
            f"{path} is not a complete MNIST archive ({type(error).__name__}: {error});"
            " it must hold x_train, y_train, x_test and y_test. Delete it and fetch it "
            "again"
        ) from error
    return {p: (x[..., None] if x.ndim == 3 else x, y) for p, (x, y) in parts.items()}


def _files(path: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in an archive or a folder."""
    try:
        if path.is_dir():
            for file in path.rglob("*"):
                if not file.is_dir():
                    yield file.relative_to(path).as_posix(), file.read_bytes()
            return
        opened = lzma.open if path.suffix == ".xz" else gzip.open
        with opened(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                content = archive.extractfile(member)
                if content is not None:
                    name = pathlib.PurePosixPath(member.name)
                    yield name.as_posix(), content.read()
            # The checksum comes behind all files.
            while stream.read(2**20):
                pass
    except (
        *(OSError, EOFError, KeyError),
        *(tarfile.TarError, lzma.LZMAError, zlib.error),
    ) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}); it is damaged "
            "or only half there. Delete it and fetch it again"
        ) from error


def _jpegs(name: Name, path: pathlib.Path) -> _Parts:
    """JPEG files ``<part>/<class>/<n>.jpg``, ordered by class and file name."""
    import PIL.Image

    info = INFO[name]
    number = {label: i for i, label in enumerate(info.names)}
    size = info.shape[1], info.shape[0]
    found: dict[str, list[tuple[int, str, np.ndarray]]] = {"train": [], "test": []}
    for file, content in _files(path):
        part, _, rest = file.partition("/")
        label, _, last = rest.partition("/")
        if part not in found or label not in number or not last or "/" in last:
            raise ValueError(
                f"{path} holds {file}; expected nothing but train/<class>/<n>.jpg and "
                f"test/<class>/<n>.jpg, with the {info.classes} classes "
                f"{info.names[0]}, {info.names[1]}, … {info.names[-1]}. Remove or "
                "rename it"
            )
        try:
            image = PIL.Image.open(io.BytesIO(content), formats=["JPEG"])
            seen = image.size, image.mode
            pixels = np.asarray(image) if seen == (size, "RGB") else None
        except (OSError, PIL.Image.DecompressionBombError) as error:
            raise ValueError(
                f"{path}: {file} is not a whole JPEG image ({error}); fetch it again"
            ) from error
        if pixels is None:
            (width, height), mode = seen
            raise ValueError(
                f"{path}: {file} is an image of {width}×{height} pixels in mode {mode};"
                f" expected {size[0]}×{size[1]} in mode RGB. Fetch the original {name}"
            )
        found[part].append((number[label], last, pixels))
    parts: _Parts = {}
    for part, rows in found.items():
        rows.sort(key=lambda row: row[:2])
        images = np.array([pixels for *_, pixels in rows], np.uint8)
        labels = np.array([label for label, *_ in rows], np.int32)
        parts[part] = images.reshape(-1, *info.shape), labels
    return parts


class _Unpickler(pickle.Unpickler):
    """Makes lists, dictionaries, bytes, numbers and arrays, and calls nothing else."""

    allowed = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """What the file may name; anything else is refused."""
        try:
            return self.allowed[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it names {module_name}.{global_name}, which no array needs"
            ) from None


def _pickles(name: Name, path: pathlib.Path) -> _Parts:
    """The archive for Python that the authors of CIFAR publish."""
    key, wanted = _PICKLES[name]
    contents = dict(_files(path))
    height, width, channels = INFO[name].shape
    parts: _Parts = {}
    for part, files in wanted.items():
        images, labels = [], []
        for file in files:
            try:
                raw = _Unpickler(io.BytesIO(contents[file]), encoding="bytes").load()
                rows = np.asarray(raw[b"data"]).reshape(-1, channels, height, width)
                images.append(rows.transpose(0, 2, 3, 1))
                labels.append(np.asarray(raw[key]))
            # Opcodes of a damaged file may do anything that Python objects do.
            except Exception as error:
                raise ValueError(
                    f"{path}: {file} is not what the authors of {name} publish "
                    f"({type(error).__name__}: {error}); expected a pickled dictionary "
                    f"with {b'data'!r} and {key!r}. Fetch the archive again"
                ) from error
        parts[part] = np.concatenate(images), np.concatenate(labels)
    return parts


def _tfds(name: Name) -> _Parts:
    """The data set from tensorflow-datasets, in the order in which it is stored."""
    instead = f"give --data-dir with {_alternatives(name)}"
    try:
        import tensorflow_datasets as tfds  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"{name} comes from tensorflow-datasets, which is not installed: "
            f"pip install 'sdp-jax[tfds]', or {instead}"
        ) from error
    parts: _Parts = {}
    try:
        for part in ("train", "test"):
            # TensorFlow writes the files once; to read them takes none.
            source: Any = tfds.data_source(
                name, split=part, builder_kwargs={"file_format": "array_record"}
            )
            rows = source.__getitems__(range(len(source)))
            parts[part] = (
                np.stack([row["image"] for row in rows]),
                np.stack([row["label"] for row in rows]),
            )
    except ImportError as error:
        raise ImportError(
            f"tensorflow-datasets needs more to make {name} ({error}): "
            f"pip install 'sdp-jax[tfds]', or {instead}"
        ) from error
    # Whatever the network, the disk or the package itself may raise.
    except Exception as error:
        raise FileNotFoundError(
            f"tensorflow-datasets could not fetch {name} "
            f"({type(error).__name__}: {error}). It needs the network the first time, "
            "and a TFDS_DATA_DIR in which no other version has put the data set in "
            f"another format. Try again, or {instead}"
        ) from error
    return parts


def _dataset(name: Name, source: str, parts: _Parts) -> Dataset:
    """Checks the parts, and takes mean and deviation out of the images."""
    info = INFO[name]
    for part, (images, labels) in parts.items():
        _check_part(name, source, part, images, labels)
    train, test = (
        Split(_normalised(images, info), labels.astype(np.int32))
        for images, labels in (parts["train"], parts["test"])
    )
    return Dataset(train, test, info.classes)


def _check_part(
    name: Name, source: str, part: str, images: np.ndarray, labels: np.ndarray
) -> None:
    info = INFO[name]
    count = {"train": info.train, "test": info.test}[part]
    again = f"Fetch {name} again"
    if (
        images.dtype != np.uint8
        or images.shape[1:] != info.shape
        or labels.dtype.kind not in "iu"
        or labels.shape != images.shape[:1]
    ):
        raise ValueError(
            f"{source}: the images of {part} are {images.dtype} {images.shape} and the "
            f"labels {labels.dtype} {labels.shape}; expected uint8 "
            f"{(count, *info.shape)} and integers {(count,)}. {again}"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < info.classes:
        raise ValueError(
            f"{source}: {part} has labels outside 0 to {info.classes - 1}. {again}"
        )
    each = count // info.classes
    for i, label in enumerate(info.names):
        found = int(np.sum(labels == i))
        if found != each:
            raise ValueError(
                f"{source} has {found} images of {label} in {part}; expected {each}. "
                f"{again}"
            )
    if len(labels) != count:
        raise ValueError(
            f"{source} has {len(labels)} images in {part}; expected {count}. {again}"
        )


def _normalised(images: np.ndarray, info: Info) -> np.ndarray:
    scaled = images.astype(np.float32)
    scaled /= 255
    scaled -= np.asarray(info.mean, np.float32)
    scaled /= np.asarray(info.deviation, np.float32)
    return scaled


def _downscaled(split: Split, factor: int) -> Split:
    if factor == 1:
        return split
    n, height, width, channels = split.images.shape
    squares = (n, height // factor, factor, width // factor, factor, channels)
    return split._replace(images=split.images.reshape(squares).mean((2, 4)))
