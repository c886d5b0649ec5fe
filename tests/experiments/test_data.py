import builtins
import gzip
import io
import os
import pathlib
import pickle
import re
import struct
import sys
import tarfile
import types

import numpy as np
import PIL.Image
import pytest

from experiments import data

RNG = np.random.default_rng(0)


@pytest.fixture
def small(monkeypatch):
    """The same data sets with few images: two and one of each class of CIFAR."""
    for name, info in list(data.INFO.items()):
        changed = info._replace(train=2 * info.classes, test=info.classes)
        monkeypatch.setitem(data.INFO, name, changed)


def write_mnist(path, sizes=(20, 10), **changed):
    train, test = sizes
    arrays = {
        "x_train": np.zeros((train, 28, 28), np.uint8),
        "y_train": np.zeros(train, np.uint8),
        "x_test": np.full((test, 28, 28), 255, np.uint8),
        "y_test": np.full(test, 9, np.uint8),
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
    write_mnist(tmp_path, (60_000, 10_000))
    dataset = data.load("mnist", tmp_path)
    assert dataset.train.images.shape == (60_000, 28, 28, 1)
    # (0 - mean) / deviation and (1 - mean) / deviation of MNIST.
    np.testing.assert_allclose(dataset.train.images.max(), -0.1307 / 0.3081, rtol=1e-5)
    np.testing.assert_allclose(dataset.test.images.min(), 0.8693 / 0.3081, rtol=1e-5)
    assert dataset.test.labels.dtype == np.int32
    assert len(dataset.test.labels) == 10_000


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no mnist.npz in .*--data-dir"):
        data.load("mnist", tmp_path)


def unknown_compression(path):
    whole = path.read_bytes()
    at = whole.index(b"PK\x01\x02") + 10  # the method, in the list of files
    path.write_bytes(whole[:at] + b"\x63\x00" + whole[at + 2 :])


def an_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-20_000]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"<html>"),
        unknown_compression,
        an_array,
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["half", "empty", "web page", "compression", "one array", "directory"],
)
def test_spoilt_mnist_file(tmp_path, spoil):
    write_mnist(tmp_path)
    spoil(tmp_path / "mnist.npz")
    with pytest.raises(ValueError, match="not a complete MNIST archive.*fetch it aga"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"y_test": None}, "not a complete MNIST archive"),
        ({"x_test": np.zeros((10, 28, 28), np.float32)}, r"test are float32 \(10, 28"),
        ({"x_train": np.zeros((20, 784), np.uint8)}, r"expected uint8 \(20, 28, 28, 1"),
        ({"y_train": np.zeros(19, np.uint8)}, r"labels uint8 \(19,\); .* \(20,\)"),
        ({"y_train": np.zeros(20)}, "labels float64 .* and integers"),
        ({"y_test": np.full(10, 10, np.uint8)}, "test has labels outside 0 to 9"),
        ({"y_test": np.full(10, -1)}, "test has labels outside 0 to 9"),
        (
            {"x_test": np.zeros((9, 28, 28), np.uint8), "y_test": np.zeros(9, int)},
            "9 images in test; expected 10",
        ),
    ],
)
def test_wrong_mnist_file(tmp_path, small, changed, message):
    write_mnist(tmp_path)
    data.load("mnist", tmp_path)
    write_mnist(tmp_path, **changed)
    with pytest.raises(ValueError, match=message):
        data.load("mnist", tmp_path)


def test_unknown_data_set():
    for make in (data.load, data.synthetic):
        with pytest.raises(
            ValueError, match="'cifar100' or 'shakespeare'; got 'imagenet'"
        ):
            make("imagenet")


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
    with pytest.raises(FileNotFoundError, match="directory, which is no directory"):
        data.load("mnist", pathlib.Path("no/such/directory"))


def test_names_of_the_classes_are_in_alphabetical_order():
    # As the labels of the original data sets are: a few of them by number.
    for name, some in (
        ("cifar10", {0: "airplane", 3: "cat", 9: "truck"}),
        ("cifar100", {0: "apple", 1: "aquarium_fish", 23: "cloud", 99: "worm"}),
    ):
        info = data.INFO[name]
        assert info.names == tuple(sorted(set(info.names)))
        assert len(info.names) == info.classes
        assert {i: info.names[i] for i in some} == some


def jpeg(pixels, kind="JPEG"):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, kind, quality=100)
    return file.getvalue()


def jpegs(name):
    """Names and contents of the files, and the pixels; without any order."""
    info = data.INFO[name]
    files, pixels = {}, {}
    for part, numbers in (("train", ("10", "9")), ("test", ("0001",))):
        for label in info.names:
            for number in numbers:
                path = f"{part}/{label}/{number}.jpg"
                colour = RNG.integers(256, size=(1, 1, 3), dtype=np.uint8)
                pixels[path] = np.broadcast_to(colour, info.shape)
                files[path] = jpeg(pixels[path])
    return {path: files[path] for path in RNG.permutation(list(files))}, pixels


def write_tar(path, files, mode="w:xz"):
    with tarfile.open(path, mode, **({"preset": 0} if mode == "w:xz" else {})) as tar:
        folder = tarfile.TarInfo("train")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)


STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_cifar_from_jpeg_files(tmp_path, small, name):
    files, pixels = jpegs(name)
    info = data.INFO[name]
    write_folder(tmp_path / f"{name}-jpeg", files)
    folder = data.load(name, tmp_path)
    write_tar(tmp_path / f"{name}-jpeg.tar.xz", files)
    # What is in the folder is not looked at any more.
    (tmp_path / f"{name}-jpeg" / "train" / "readme.txt").write_text("?")
    dataset = data.load(name, tmp_path)
    for one, other in zip(folder[:2], dataset[:2], strict=True):
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.labels, other.labels)

    assert dataset.classes == info.classes
    assert dataset.train.images.dtype == np.float32
    assert dataset.train.labels.dtype == dataset.test.labels.dtype == np.int32
    assert dataset.train.labels.tolist() == sorted(2 * list(range(info.classes)))
    assert dataset.test.labels.tolist() == list(range(info.classes))
    mean, deviation = map(np.asarray, STATISTICS[name])
    orders = {"train": ("10", "9"), "test": ("0001",)}  # by name as text
    for part, numbers in orders.items():
        images = getattr(dataset, part).images
        assert images.shape == (len(numbers) * info.classes, 32, 32, 3)
        expected = np.stack(
            [pixels[f"{part}/{x}/{n}.jpg"] for x in info.names for n in numbers]
        )
        back = 255 * (images.astype(np.float64) * deviation + mean)
        np.testing.assert_allclose(back, expected, atol=3)


@pytest.mark.parametrize(
    "spoil,message",
    [
        (lambda whole: whole[: len(whole) // 2], "cannot be read .EOFError"),
        (lambda whole: whole[:40], "cannot be read"),
        (lambda whole: b"", "cannot be read"),
        (lambda whole: b"<html>", "cannot be read"),
        (lambda whole: whole[:-9], "cannot be read .EOFError"),
        (
            lambda w: w[:900] + bytes([w[900] ^ 255]) + w[901:],
            "cannot be read .LZMAError",
        ),
    ],
    ids=["half", "start", "empty", "no archive", "checksum", "damaged"],
)
def test_a_spoilt_archive_says_so(tmp_path, small, spoil, message):
    path = tmp_path / "cifar10-jpeg.tar.xz"
    write_tar(path, jpegs("cifar10")[0])
    path.write_bytes(spoil(path.read_bytes()))
    whole = f"{re.escape(str(path))} {message}.*Delete it and fetch it again"
    with pytest.raises(ValueError, match=whole):
        data.load("cifar10", tmp_path)


GREY = np.zeros((32, 32), np.uint8)
COLOUR = np.zeros((32, 32, 3), np.uint8)
NOISE = RNG.integers(256, size=(32, 32, 3), dtype=np.uint8)
DOG = "train/dog/9.jpg"


@pytest.mark.parametrize("write", [write_folder, write_tar], ids=["folder", "tar"])
@pytest.mark.parametrize(
    "changed,message",
    [
        ({DOG: None}, "1 images of dog in train; expected 2"),
        ({"train/dog/8.jpg": jpeg(COLOUR)}, "3 images of dog in train; expected 2"),
        ({"test/cat/0001.jpg": None}, "0 images of cat in test; expected 1"),
        ({DOG: jpeg(COLOUR[1:])}, "9.jpg is an image of 32×31 .* expected 32×32"),
        ({DOG: jpeg(GREY)}, "9.jpg is an image of .* mode L; .* mode RGB"),
        ({DOG: jpeg(COLOUR, "PNG")}, "dog/9.jpg is not a whole JPEG image"),
        ({DOG: b""}, "dog/9.jpg is not a whole JPEG image"),
        ({DOG: jpeg(COLOUR)[:90]}, "dog/9.jpg is not a whole JPEG image"),
        ({DOG: jpeg(NOISE)[:-999]}, "dog/9.jpg is not a whole JPEG image .*truncated"),
        ({"train/wolf/9.jpg": jpeg(COLOUR)}, "train/wolf/9.jpg; .*10 .*airplane, auto"),
        ({"valid/dog/9.jpg": jpeg(COLOUR)}, "holds valid/dog/9.jpg; expected nothing"),
        ({"train/9.jpg": jpeg(COLOUR)}, "holds train/9.jpg; expected nothing"),
        ({"train/dog/a/9.jpg": jpeg(COLOUR)}, "holds train/dog/a/9.jpg; expected"),
        ({"readme.txt": b"?"}, "holds readme.txt; .*Remove or rename it"),
    ],
)
def test_a_wrong_image_says_so(tmp_path, small, write, changed, message):
    path = tmp_path / f"cifar10-jpeg{'' if write is write_folder else '.tar.xz'}"
    files = {k: v for k, v in (jpegs("cifar10")[0] | changed).items() if v is not None}
    write(path, files)
    with pytest.raises(ValueError, match=f"(?s){re.escape(str(path))}.*{message}"):
        data.load("cifar10", tmp_path)


def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path, small):
    whole = jpeg(COLOUR)
    at = whole.index(b"\xff\xc0") + 5  # height and width in the header
    huge = whole[:at] + struct.pack(">HH", 60_000, 60_000) + whole[at + 4 :]
    write_folder(tmp_path / "cifar10-jpeg", {DOG: huge})
    with pytest.raises(ValueError, match="dog/9.jpg is not a whole JPEG image"):
        data.load("cifar10", tmp_path)


def test_cifar_that_is_not_there(tmp_path):
    files = "cifar100-jpeg.tar.xz or cifar100-jpeg or cifar-100-python.tar.gz"
    with pytest.raises(FileNotFoundError, match=f"there is no {files} in .*--data-dir"):
        data.load("cifar100", tmp_path)


def python2_pickle(images, **labels):
    """A dictionary with an array, as Python 2 pickles it with protocol 2."""

    def text(x):
        return b"U" + bytes([len(x)]) + x.encode()

    def number(x):
        return b"J" + struct.pack("<i", x)

    array = (
        *(b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy\nndarray\n"),
        *(number(0), b"\x85", text("b"), b"\x87R"),
        *(b"(", number(1), number(images.shape[0]), number(images.shape[1]), b"\x86"),
        *(b"cnumpy\ndtype\n", text("u1"), number(0), number(1), b"\x87R"),
        *(b"(", number(3), text("|"), b"NNN", number(-1), number(-1), number(0), b"tb"),
        *(b"\x89T", struct.pack("<i", images.size), images.tobytes(), b"tb"),
    )
    lists = (
        text(name) + b"](" + b"".join(number(x) for x in values) + b"e"
        for name, values in labels.items()
    )
    return b"".join((b"\x80\x02}(", text("data"), *array, *lists, b"u."))


def pickled(name, **changed):
    """The files of the authors' archive, and its pixels and labels in order."""
    files, parts = {}, {}
    classes, folder = data.INFO[name].classes, "cifar-100-python/"
    names = {"train": ["train"], "test": ["test"]}
    if name == "cifar10":
        folder = "cifar-10-batches-py/"
        names = {"train": [f"data_batch_{i}" for i in range(1, 6)]}
        names["test"] = ["test_batch"]
    for part, count in (("train", 2 * classes), ("test", classes)):
        pixels = RNG.integers(256, size=(count, 3, 32, 32), dtype=np.uint8)
        labels = RNG.permutation(count) % classes
        parts[part] = pixels.transpose(0, 2, 3, 1), labels
        pieces = np.split(np.arange(count), len(names[part]))
        for file, piece in zip(names[part], pieces, strict=True):
            rows = pixels[piece].reshape(len(piece), -1)
            key = "labels" if name == "cifar10" else "fine_labels"
            files[folder + file] = python2_pickle(
                rows, **{"coarse_labels": [0], key: labels[piece].tolist()}
            )
    # The order within the archive is not the order of the images.
    files = dict(sorted(files.items(), reverse=True))
    return {folder + "readme.html": b"<html>"} | files | changed, parts


@pytest.mark.parametrize("name", STATISTICS)
def test_cifar_as_its_authors_publish_it(tmp_path, small, name):
    files, parts = pickled(name)
    write_tar(tmp_path / f"{name.replace('r', 'r-')}-python.tar.gz", files, "w:gz")
    dataset = data.load(name, tmp_path)
    mean, deviation = map(np.asarray, STATISTICS[name])
    for part, (pixels, labels) in parts.items():
        images, found = getattr(dataset, part)
        np.testing.assert_array_equal(found, labels)
        np.testing.assert_allclose(images, (pixels / 255 - mean) / deviation, atol=1e-5)
    assert dataset.classes == len(set(parts["test"][1]))


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmful",)


BATCH = "cifar-10-batches-py/test_batch"
ROWS = np.zeros((10, 3072), np.uint8)


@pytest.mark.parametrize(
    "changed,message",
    [
        (pickle.dumps(Harmful(), 2), "UnpicklingError: it names .*mkdir"),
        (b"", "EOFError"),
        (python2_pickle(ROWS, labels=range(10))[:-99], "Error: "),
        (python2_pickle(ROWS, fine_labels=range(10)), "KeyError: b'labels'"),
        (python2_pickle(ROWS[:, 1:], labels=range(10)), "ValueError: "),
        (python2_pickle(ROWS, labels=range(9)), r"labels int64 \(9,\); expected"),
        (python2_pickle(ROWS, labels=range(1, 11)), "labels outside 0 to 9"),
        (python2_pickle(ROWS, labels=[0] * 10), "10 images of airplane in test"),
    ],
)
def test_a_wrong_pickle_says_so(tmp_path, small, monkeypatch, changed, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "cifar-10-python.tar.gz"
    write_tar(path, pickled("cifar10", **{BATCH: changed})[0], "w:gz")
    with pytest.raises(ValueError, match=message):
        data.load("cifar10", tmp_path)
    assert not (tmp_path / "harmful").exists()


def test_an_archive_without_a_batch_and_half_an_archive(tmp_path, small):
    path = tmp_path / "cifar-10-python.tar.gz"
    files, _ = pickled("cifar10")
    del files[BATCH]
    write_tar(path, files, "w:gz")
    with pytest.raises(ValueError, match=f"{BATCH} is not what .*KeyError"):
        data.load("cifar10", tmp_path)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ValueError, match="cannot be read .EOFError"):
        data.load("cifar10", tmp_path)
    path.write_bytes(gzip.compress(b"no tar"))
    with pytest.raises(ValueError, match="cannot be read .ReadError"):
        data.load("cifar10", tmp_path)


def test_without_tensorflow_datasets(monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **keywords):
        if name == "tensorflow_datasets":
            raise ImportError(name)
        return original(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"sdp-jax\[tfds\].*--data-dir"):
        data.load("mnist")


class Source:
    """What tensorflow-datasets gives: examples by number, several at a time."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitems__(self, keys):
        return [
            {"id": "?", "image": self.images[k], "label": self.labels[k]} for k in keys
        ]


def fake_tfds(monkeypatch, data_source):
    module = types.ModuleType("tensorflow_datasets")
    monkeypatch.setattr(module, "data_source", data_source, raising=False)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_tensorflow_datasets(small, monkeypatch, name):
    info = data.INFO[name]
    parts = {}
    for part, count in (("train", info.train), ("test", info.test)):
        images = RNG.integers(256, size=(count, *info.shape), dtype=np.uint8)
        parts[part] = images, RNG.permutation(count) % info.classes

    def data_source(asked, *, split, builder_kwargs):
        assert asked == name and builder_kwargs == {"file_format": "array_record"}
        return Source(*parts[split])

    fake_tfds(monkeypatch, data_source)
    dataset = data.load(name)
    mean, deviation = STATISTICS.get(name, ((0.1307,), (0.3081,)))
    for part, (pixels, labels) in parts.items():
        images, found = getattr(dataset, part)
        np.testing.assert_array_equal(found, labels)
        expected = (pixels / 255 - np.asarray(mean)) / np.asarray(deviation)
        np.testing.assert_allclose(images, expected, atol=1e-5)
        assert (images.dtype, found.dtype) == (np.float32, np.int32)
    assert dataset.classes == info.classes
    parts["test"] = tuple(x[:-1] for x in parts["test"])
    with pytest.raises(ValueError, match="tensorflow-datasets has .* in test; expect"):
        data.load(name)


@pytest.mark.parametrize(
    "error,kind,message",
    [
        (
            ConnectionError("no route to host"),
            FileNotFoundError,
            "could not fetch cifar10 .ConnectionError: no route to host.*--data-dir "
            "with cifar10-jpeg.tar.xz or",
        ),
        (
            ImportError("No module named 'tensorflow'"),
            ImportError,
            r"needs more .*'tensorflow'.*'sdp-jax\[tfds\]', or give --data-dir with",
        ),
    ],
)
def test_tensorflow_datasets_that_fails(monkeypatch, error, kind, message):
    def data_source(*_, **__):
        raise error

    fake_tfds(monkeypatch, data_source)
    with pytest.raises(kind, match=message) as caught:
        data.load("cifar10")
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("downscale", [0, -1, 3, 2.0])
def test_downscale_must_divide(downscale):
    for make in (data.load, data.synthetic):
        with pytest.raises(ValueError, match=f"of the images, 8; got {downscale}"):
            make("digits", downscale=downscale)


def test_downscaled_images_are_means_of_squares():
    whole = data.load("digits").test.images
    small = data.load("digits", downscale=4).test.images
    assert small.shape == (360, 2, 2, 1)
    for i in range(2):
        for j in range(2):
            square = whole[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            np.testing.assert_allclose(small[:, i, j], square.mean((1, 2)), rtol=1e-6)


def test_synthetic_images_look_like_the_real_ones():
    real = data.load("digits", downscale=2)
    noise = data.synthetic("digits", downscale=2, count=300)
    for one, other in zip(real[:2], noise[:2], strict=True):
        assert other.images.shape == (300, *one.images.shape[1:])
        assert other.labels.shape == (300,)
        assert (other.images.dtype, other.labels.dtype) == (np.float32, np.int32)
        assert set(other.labels) == set(one.labels)
    assert noise.classes == real.classes


@pytest.mark.parametrize(
    "name,shape,classes",
    [
        ("digits", (8, 8, 1), 10),
        ("mnist", (28, 28, 1), 10),
        ("cifar10", (32, 32, 3), 10),
        ("cifar100", (32, 32, 3), 100),
    ],
)
def test_synthetic_data_of_every_name(name, shape, classes):
    noise = data.synthetic(name, count=2000)
    assert noise.train.images.shape == noise.test.images.shape == (2000, *shape)
    assert set(noise.train.labels) == set(range(noise.classes))
    assert noise.classes == classes
    np.testing.assert_allclose(noise.train.images.mean(), 0, atol=0.02)
    np.testing.assert_allclose(noise.train.images.std(), 1, atol=0.02)


def test_windows_of_a_text_and_what_follows(tmp_path, monkeypatch):
    info = data.INFO["shakespeare"]._replace(shape=(4,), classes=3, train=6, test=0)
    monkeypatch.setitem(data.INFO, "shakespeare", info)
    text = "abcacbbca" * 3
    (tmp_path / "tinyshakespeare.txt").write_text(text + "abc")
    dataset = data.load("shakespeare", tmp_path)
    # 27 of the 30 characters are in the training set; no label is beyond its end.
    numbers = ["abc".index(character) for character in text]
    train, test, classes = dataset
    assert classes == 3 and train.images.dtype == train.labels.dtype == np.int32
    assert train.images.ravel().tolist() == numbers[:24]
    assert train.labels.ravel().tolist() == numbers[1:25]
    assert train.images.shape == train.labels.shape == (6, 4)
    assert test.images.shape == (0, 4)


def test_a_text_that_is_not_the_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="shakespeare is not downloaded: give"):
        data.load("shakespeare")
    (tmp_path / "tinyshakespeare.txt").write_text("to be or not to be" * 100)
    expected = r"7 characters.*\[25, 2\]; expected 65 and \[15685, 1742\]. Fetch"
    with pytest.raises(ValueError, match=expected):
        data.load("shakespeare", tmp_path)
    with pytest.raises(ValueError, match="downscale must be an integer that divides"):
        data.load("shakespeare", tmp_path, downscale=2)


def test_a_synthetic_text():
    noise = data.synthetic("shakespeare", count=200)
    for split in noise[:2]:
        assert split.images.shape == split.labels.shape == (200, 64)
        assert split.images.dtype == split.labels.dtype == np.int32
        assert set(split.images.flat) == set(split.labels.flat) == set(range(65))
    assert noise.classes == 65


def test_synthetic_data_depends_on_the_seed_alone():
    one, same = data.synthetic("digits"), data.synthetic("digits")
    other = data.synthetic("digits", seed=1)
    np.testing.assert_array_equal(one.train.images, same.train.images)
    np.testing.assert_array_equal(one.test.labels, same.test.labels)
    assert (one.train.images != other.train.images).all()
    assert (one.train.images != one.test.images).all()
    for count in (0, 2.5):
        with pytest.raises(ValueError, match=f"integer of at least 1; got {count}"):
            data.synthetic("digits", count=count)


@pytest.mark.study
def test_the_order_of_the_cifar10_archive_is_its_own():
    directory = os.environ.get("SDP_JAX_DATA_DIR")
    path = pathlib.Path(directory or "") / "cifar10-jpeg.tar.xz"
    if directory is None or not path.exists():
        pytest.skip("set SDP_JAX_DATA_DIR to a directory with cifar10-jpeg.tar.xz")
    with tarfile.open(path) as archive:
        files = [m.name for m in archive if m.isfile()]
    dataset = data.load("cifar10", path.parent)
    for part, split in (("train", dataset.train), ("test", dataset.test)):
        inside = [file.split("/")[1] for file in files if file.startswith(part)]
        assert [data.INFO["cifar10"].names[i] for i in split.labels] == inside
        kept = [file for file in files if file.startswith(part)]
        assert kept == sorted(kept)
