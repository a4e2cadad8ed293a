# SPDX-License-Identifier: Apache-2.0
"""Data sets that TFDS prepared as ArrayRecord: the same examples as from TFRecord files."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from balpoe_jax.data import datasets
from balpoe_jax.data.datasets import cifar_tfds
from balpoe_jax.data.pipeline import eval_batches
from balpoe_jax.data.records import array_records
from balpoe_jax.data.records.readers import make_reader
from balpoe_jax.data.records.sources import RecordSource
from balpoe_jax.data.records.tfrecords import DamagedRecord
from balpoe_jax.errors import UserError
from tests.helpers.small_photos import jpeg, prepare

pytest.importorskip("array_record")

TRAIN = np.array([5, 3, 2] + [1] * 997)
TEST = np.array([1, 2, 3, 4] + [0] * 996)
FORMATS = ("tfrecord", "array_record")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One data set in both formats."""
    found = {}
    for file_format in FORMATS:
        found[file_format] = tmp_path_factory.mktemp(file_format)
        splits = {"train": TRAIN, "validation": np.ones(1000, int), "test": TEST}
        prepare("imagenet_lt", found[file_format], splits, file_format)
    return found


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def load(folder: Path, **changes):
    options = {"verify_counts": False, "image_size": 16, "resize": 18, **changes}
    return datasets.load("imagenet_lt", 256.0, str(folder), **options)


def files(folder: Path, split: str) -> list[str]:
    return sorted(map(str, folder.glob(f"imagenet_lt/*/imagenet_lt-{split}.array_record*")))


def examples(source: RecordSource) -> dict[str, tuple[int, bytes]]:
    """Label and encoded image by name."""
    names = source.ids(np.arange(len(source)))
    assert len(set(names)) == len(names)
    return {name: (int(source.labels[i]), source.read_image(i)) for i, name in enumerate(names)}


def test_photographs_are_those_of_the_tfrecord_files(folders: dict[str, Path]) -> None:
    one, other = (load(folders[name], held_out_per_class=1) for name in FORMATS)
    np.testing.assert_array_equal(one.class_counts, other.class_counts)
    for split in ("train", "test", "held_out"):
        found = examples(getattr(other, split))
        assert found == examples(getattr(one, split))
    assert found["validation_7_0.JPEG"] == (7, jpeg(7))
    assert sorted(one.test_names) == sorted(other.test_names)
    assert files(folders["array_record"], "train") == list(other.train.paths)


@pytest.mark.integration
def test_batches_hold_the_images_of_their_names(folders: dict[str, Path]) -> None:
    images = []
    for name in FORMATS:
        data = load(folders[name])
        batches = list(eval_batches(data.test, 4, (0.5,) * 3, (0.25,) * 3))
        masks = np.concatenate([batch.mask for batch in batches])
        pixels = np.concatenate([batch.images for batch in batches])[masks]
        images.append(dict(zip(data.test_names, pixels, strict=True)))
    for name in images[0]:
        np.testing.assert_array_equal(images[0][name], images[1][name])


def test_any_position_is_read_by_itself(folders: dict[str, Path]) -> None:
    source = load(folders["array_record"]).train
    chosen = np.array([1000, 3, 3, 517, 0])
    encoded, labels = make_reader(source).read(tf.constant(chosen))
    assert encoded.numpy().tolist() == [source.read_image(int(i)) for i in chosen]
    np.testing.assert_array_equal(labels, source.labels[chosen])
    part = source.select(chosen)
    assert [part.read_image(i) for i in range(5)] == encoded.numpy().tolist()
    (path,) = source.paths
    assert part.where(2) == f"record 3 of {path}"


def test_threads_share_a_reader(folders: dict[str, Path]) -> None:
    source = load(folders["array_record"]).train
    one_by_one = [source.read_image(i) for i in range(len(source))]
    order = np.random.default_rng(0).integers(0, len(source), 4000)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(source.read_image, order, chunksize=10))
    assert found == [one_by_one[i] for i in order]


def test_the_index_is_kept_until_a_file_changes(folders: dict[str, Path], monkeypatch) -> None:
    paths = files(folders["array_record"], "test")
    first = array_records.load_index(paths, "file_name", [10])
    with monkeypatch.context() as patched:
        patched.setattr(array_records, "scan", None)  # not called
        for kept, made in zip(
            array_records.load_index(paths, "file_name", [10]), first, strict=True
        ):
            np.testing.assert_array_equal(kept, made)
        os.utime(paths[0], (1, 1))
        with pytest.raises(TypeError):
            array_records.load_index(paths, "file_name", [10])


@pytest.mark.parametrize("name", ["other", "image "])
def test_examples_of_another_kind_are_refused(folders: dict[str, Path], name: str) -> None:
    paths = files(folders["array_record"], "test")
    with pytest.raises(UserError, match=rf"Record 0 of .* is not an example .* '{name}'"):
        array_records.scan(paths, name)


def test_a_number_of_records_that_is_not_the_data_sets_is_refused(
    folders: dict[str, Path],
) -> None:
    paths = files(folders["array_record"], "test")
    with pytest.raises(UserError, match="should hold 11 records, and 10 can be read; prepare"):
        array_records.load_index(paths, "file_name", [11])


def test_every_flipped_bit_is_noticed_or_changes_nothing(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    (original,) = files(folders["array_record"], "test")
    content = Path(original).read_bytes()
    whole = [record for _, record in array_records.records(original)]
    random = np.random.default_rng(0)
    used = int(np.flatnonzero(np.frombuffer(content[: len(content) // 2], np.uint8))[-1])
    noticed = 0
    for trial in range(150):
        damaged = bytearray(content)
        damaged[random.integers(used if trial < 100 else len(damaged))] ^= 1 << random.integers(8)
        path = tmp_path / f"{trial}.array_record"
        path.write_bytes(damaged)
        try:
            found = array_records.load_index([str(path)], "file_name", [10])
            source = RecordSource(found, 16, 18, paths=(str(path),))
            records = [record for _, record in array_records.records(str(path))]
            assert [source.read_image(i) for i in range(10)]
        except (UserError, DamagedRecord):
            noticed += 1
        else:
            assert records == whole
    assert noticed > 90


def test_a_damaged_photograph_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    (original,) = files(folders["array_record"], "test")
    content = bytearray(Path(original).read_bytes())
    path = tmp_path / "damaged.array_record"
    path.write_bytes(content)
    index = array_records.load_index([str(path)], "file_name", [10])
    content[content.index(b"JFIF")] ^= 1
    path.write_bytes(content)
    source = RecordSource(index, 16, 18, paths=(str(path),))
    with pytest.raises(UserError, match=r"image .*\.JPEG .*record \d of .*damaged\.array_record"):
        list(eval_batches(source, 4, (0.5,) * 3, (0.25,) * 3))
    with pytest.raises(UserError, match=r"damaged\.array_record is cut off or damaged \("):
        array_records.scan([str(path)], "file_name")


def test_files_that_are_absent_or_something_else_are_one_sentence(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    with pytest.raises(UserError, match=r"absent cannot be read \(No such file"):
        array_records.scan([absent], "id")
    with pytest.raises(UserError, match=r"absent cannot be read \(No such file"):
        array_records.load_index([absent], "id", [1])
    with pytest.raises(OSError, match="No such file"):
        array_records.open_reader(absent)
    for content in (b"", b"x", bytes(10), bytes(1 << 17)):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(UserError, match=r"cut off or damaged|should hold 1 records, and 0"):
            array_records.load_index([str(tmp_path / "file")], "id", [1])


def test_cifar_is_that_of_the_tfrecord_files(tmp_path: Path, monkeypatch) -> None:
    import tensorflow_datasets as tfds

    sources = []
    for file_format in FORMATS:
        builder = tfds.builder(
            "cifar10", data_dir=str(tmp_path / file_format), file_format=file_format
        )
        random = np.random.default_rng(0)

        def rows(split: str, count: int, random=random):
            for i in range(count):
                image = random.integers(0, 256, (32, 32, 3), np.uint8)
                yield (
                    f"{split}_{i:05d}",
                    {
                        "id": f"{split}_{i:05d}",
                        "image": image,
                        "label": i % 10,
                    },
                )

        generators = {"train": rows("train", 30), "test": rows("test", 20)}
        builder._split_generators = lambda manager, generators=generators: generators
        builder.download_and_prepare()
        assert builder.info.file_format.value == file_format
        sources.append(cifar_tfds.read("cifar10", str(tmp_path / file_format)))
    for one, other in zip(*sources, strict=True):
        np.testing.assert_array_equal(one.keys, other.keys)
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_array_equal(one.images, other.images)
    assert sources[1][0].keys.tolist() == list(range(30))
    (file,) = (tmp_path / "array_record").glob("cifar10/*/cifar10-test.array_record*")
    content = bytearray(file.read_bytes())
    content[200] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"test records in .* cannot be read \(.*prepare the data"):
        cifar_tfds.read("cifar10", str(tmp_path / "array_record"))
