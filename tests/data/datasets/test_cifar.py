# SPDX-License-Identifier: Apache-2.0
"""CIFAR from the binary archive, a NumPy file and TFDS: one set of images, labels and keys."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from balpoe_jax.config import resolve
from balpoe_jax.data import datasets, extras
from balpoe_jax.data.datasets import cifar, cifar_archive, cifar_tfds
from balpoe_jax.data.records.sources import ArraySource
from balpoe_jax.errors import UserError
from balpoe_jax.experiment.build import build
from balpoe_jax.run import record
from tests.helpers.cifar_files import CLASSES, PER_CLASS, make_images, members, write_archive
from tests.helpers.config_files import get_config


def write_npz(path: Path, name: str, **changed: np.ndarray) -> Path:
    arrays = {}
    for split in PER_CLASS:
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = make_images(name, split)
    np.savez(path, **{**arrays, **changed})
    return path


class Builder:
    """The same images as TFDS gives them: PNG files in another order, with an id."""

    info = SimpleNamespace(file_format=SimpleNamespace(value="tfrecord"))

    def __init__(self, name: str) -> None:
        self.name = name

    def as_dataset(self, split: str, **_: object) -> tf.data.Dataset:
        images, labels = make_images(self.name, split)
        order = np.random.default_rng(4).permutation(len(labels))
        columns = {
            "id": [f"{split}_{position:05d}" for position in order],
            "label": labels[order],
            "image": [tf.io.encode_png(image).numpy() for image in images[order]],
        }
        return tf.data.Dataset.from_tensor_slices(columns)


@pytest.fixture
def archives(tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: write_archive(tmp_path / cifar_archive.ARCHIVES[name].file, members(name))


@pytest.fixture
def without_tfds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "has_tfds", lambda: False)


def publish(monkeypatch: pytest.MonkeyPatch, name: str, path: Path) -> None:
    """Makes the checksum of a file the published one."""
    changed = cifar_archive.ARCHIVES[name]._replace(md5=hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setitem(cifar_archive.ARCHIVES, name, changed)


def assert_same(source: ArraySource, name: str, split: str) -> None:
    images, labels = make_images(name, split)
    np.testing.assert_array_equal(source.images, images)
    np.testing.assert_array_equal(source.labels, labels)
    np.testing.assert_array_equal(source.keys, np.arange(len(labels)))
    assert (source.images.dtype, source.labels.dtype, source.keys.dtype) == (
        np.uint8,
        np.int64,
        np.int64,
    )


@pytest.mark.integration
@pytest.mark.parametrize("name", CLASSES)
def test_every_reader_gives_the_same_examples(
    name: str, archives, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(cifar_tfds, "prepared_builder", lambda *_: Builder(name))
    archive, npz = archives(name), write_npz(tmp_path / "mine.npz", name)
    for splits in (
        cifar_archive.read(name, str(archive), check=False),
        cifar.load(name, str(npz)),
        cifar_tfds.read(name, ""),
    ):
        for split, source in zip(PER_CLASS, splits, strict=True):
            assert_same(source, name, split)


def test_another_archive_than_the_published_one_is_refused(archives, monkeypatch, caplog) -> None:
    path = archives("cifar100")
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    expected = rf"MD5 checksum 03b5dce01913d631647c71ecec9e9cb8 .* but has {md5}; .*check_archive"
    with pytest.raises(UserError, match=expected):
        datasets.load("cifar100", 5.0, str(path.parent), verify_counts=False)
    with caplog.at_level("INFO", logger="balpoe_jax"):
        options = {"verify_counts": False, "check_archive": False}
        data = datasets.load("cifar100", 5.0, str(path.parent), **options)
    assert caplog.messages == [f"cifar100 is read from {path}, whose checksum is not checked"]
    assert data.train.labels.max() == 99 and data.train.image_shape == (32, 32, 3)
    assert not data.counts_as_published
    publish(monkeypatch, "cifar100", path)
    again = datasets.load("cifar100", 5.0, str(path.parent), verify_counts=False)
    np.testing.assert_array_equal(data.train.images, again.train.images)
    with pytest.raises(UserError, match="should have 500 training and 100 test images in each of"):
        datasets.load("cifar100", 5.0, str(path.parent))


def test_a_config_lets_another_archive_pass(archives) -> None:
    config = get_config("cifar10_lt", "ir=10")
    config.data.data_dir = str(archives("cifar10"))
    config.data.verify_counts = False
    config.data.imbalance_ratio = 1.0
    with pytest.raises(UserError, match="check_archive=False"):
        build(resolve(config))
    config.data.check_archive = False
    assert len(build(resolve(config)).data.train) == len(make_images("cifar10", "train")[0])


def test_the_published_archives_are_those_of_the_authors_page() -> None:
    """https://www.cs.toronto.edu/~kriz/cifar.html, as its table and its text have them."""
    batches = [f"data_batch_{number}.bin" for number in (1, 2, 3, 4, 5)]
    ten, hundred = cifar_archive.ARCHIVES["cifar10"], cifar_archive.ARCHIVES["cifar100"]
    assert (ten.file, ten.md5) == ("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530")
    assert (list(ten.train), list(ten.test)) == (batches, ["test_batch.bin"])
    md5 = "03b5dce01913d631647c71ecec9e9cb8"
    assert (hundred.file, hundred.md5) == ("cifar-100-binary.tar.gz", md5)
    assert (hundred.train, hundred.test) == (("train.bin",), ("test.bin",))


def test_where_the_images_come_from_is_no_other_experiment() -> None:
    fields = record.experiment_fields({})
    assert "data.verify_counts" in fields
    assert not {"data.data_dir", "data.check_archive"} & fields.keys()


def test_of_a_folder_the_archive_comes_first_and_then_the_numpy_file(
    archives, tmp_path: Path, monkeypatch
) -> None:
    npz = write_npz(
        tmp_path / "cifar10.npz", "cifar10", train_images=np.zeros((50, 32, 32, 3), "u1")
    )
    assert not cifar.load("cifar10", str(tmp_path))[0].images.any()
    path = archives("cifar10")
    for place in (tmp_path, path):
        assert cifar.load("cifar10", str(place), check_archive=False)[0].images.any()
    assert not cifar.load("cifar10", str(npz))[0].images.any()
    # CIFAR-100 is not there: TFDS is asked, with the folder.
    asked = []
    monkeypatch.setattr(
        cifar_tfds, "prepared_builder", lambda *where: asked.append(where) or Builder("cifar100")
    )
    assert_same(cifar.load("cifar100", str(tmp_path))[1], "cifar100", "test")
    ((name, folder, alternative),) = asked
    assert (name, folder) == ("cifar100", str(tmp_path))
    assert "cifar-100-binary.tar.gz" in alternative


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda files: files | {"x/train.bin": files["some-folder/train.bin"][:-1]}, "multiple of"),
        (lambda files: files | {"x/test.bin": b""}, "multiple of 3074 bytes, but are 0"),
        (lambda files: dict(list(files.items())[:1]), "but test.bin is missing; download it again"),
    ],
)
def test_an_archive_with_other_members_is_refused(tmp_path: Path, change, expected) -> None:
    path = write_archive(tmp_path / "mine.tar.gz", change(members("cifar100")))
    with pytest.raises(UserError, match=expected):
        cifar.load("cifar100", str(path), check_archive=False)


def test_a_file_that_is_no_archive_is_refused(archives, tmp_path: Path) -> None:
    path = archives("cifar100")
    whole = path.read_bytes()
    for content in (b"", b"<html>", whole[: len(whole) // 2], whole[:-9] + bytes(9)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"should be a compressed tar file.*|is missing"):
            cifar.load("cifar100", str(path), check_archive=False)
    with pytest.raises(UserError, match=r"There is no file .*none\.tar\.gz; name a cifar-100-bin"):
        cifar.load("cifar100", str(tmp_path / "none.tar.gz"))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"train_images": np.zeros((50, 3, 32, 32), "u1")}, r"uint8 \[50, 3, 32, 32\], not uint8"),
        ({"train_images": np.zeros((50, 32, 32, 3))}, "images of float64"),
        ({"test_labels": np.zeros(20)}, "labels of float64"),
        ({"test_labels": np.zeros(19, int)}, r"labels of int64 \[19\]"),
        ({"test_labels": np.array([object()] * 20)}, "allow_pickle"),
    ],
)
def test_another_numpy_file_is_refused(tmp_path: Path, changed, expected) -> None:
    path = write_npz(tmp_path / "mine.npz", "cifar10", **changed)
    with pytest.raises(UserError, match=rf"should hold the arrays .*{expected}"):
        cifar.load("cifar10", str(path))


class Answer(io.BytesIO):
    """What the authors' server sends."""


@pytest.mark.usefixtures("without_tfds")
def test_without_tfds_the_archive_is_downloaded_once(archives, tmp_path, monkeypatch) -> None:
    path = archives("cifar100")
    content, asked = path.read_bytes(), []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def answer(url: str, timeout: float) -> Answer:
        asked.append(url)
        return Answer(content)

    monkeypatch.setattr(cifar_archive.urllib.request, "urlopen", answer)
    folder = tmp_path / "cache" / "balpoe_jax"
    with pytest.raises(UserError, match=r"kriz/cifar-100-binary.tar.gz should have the published"):
        cifar.load("cifar100")
    assert not list(folder.iterdir())
    publish(monkeypatch, "cifar100", path)
    for _ in range(2):
        assert_same(cifar.load("cifar100")[0], "cifar100", "train")
    assert asked == ["https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"] * 2
    assert [file.name for file in folder.iterdir()] == ["cifar-100-binary.tar.gz"]


@pytest.mark.usefixtures("without_tfds")
def test_without_tfds_what_cannot_be_had_is_one_sentence(tmp_path: Path, monkeypatch) -> None:
    def fail(url: str, timeout: float) -> Answer:
        raise OSError("no route\nto host")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cifar_archive.urllib.request, "urlopen", fail)
    with pytest.raises(UserError, match=r"could not be downloaded from .* \(no route to host\);"):
        cifar.load("cifar10")
    assert not list((tmp_path / "balpoe_jax").iterdir())
    with pytest.raises(UserError, match=r"no cifar10.npz in .* TFDS, .*pip install \"balpoe"):
        cifar.load("cifar10", str(tmp_path))
