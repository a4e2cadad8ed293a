# SPDX-License-Identifier: Apache-2.0
"""The index of TFRecord files, against TensorFlow's own parser; damage; the cache."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from balpoe_jax.data.records import tfrecords
from balpoe_jax.errors import UserError
from tests.helpers.records import write


@pytest.fixture
def examples() -> list[dict]:
    random = np.random.default_rng(0)
    lengths = [0, 1, 127, 128, 20_000, 70_000]  # around the lengths of their own lengths
    return [
        {
            "image": random.bytes(length),
            "label": label,
            "id": f"photo-{number}-ü",
            "weights": [0.5, 0.25],
            "group": 7,
        }
        for number, (length, label) in enumerate(
            zip(lengths, [0, 1, 127, 128, 8141, -1], strict=True)
        )
    ]


@pytest.fixture
def paths(tmp_path: Path, examples: list[dict], monkeypatch) -> list[str]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for example in examples:
        example["id"] = example["id"].encode()
    return [write(tmp_path / "a", examples[:4]), write(tmp_path / "b", examples[4:])]


def test_the_index_is_what_tensorflow_reads(paths: list[str], examples: list[dict]) -> None:
    index = tfrecords.scan(paths, "id")
    assert index.files.tolist() == [0, 0, 0, 0, 1, 1]
    assert index.labels.tolist() == [example["label"] for example in examples]
    assert index.names.tolist() == [example["id"].decode() for example in examples]
    for file, offset, size, example in zip(*index[:3], examples, strict=True):
        content = Path(paths[file]).read_bytes()
        assert content[offset : offset + size] == example["image"]


def test_an_index_is_kept_until_a_file_changes(
    paths: list[str], examples: list[dict], monkeypatch
) -> None:
    first = tfrecords.load_index(paths, "id")
    with monkeypatch.context() as patched:
        patched.setattr(tfrecords, "scan", None)  # not called
        for kept, made in zip(tfrecords.load_index(paths, "id"), first, strict=True):
            np.testing.assert_array_equal(kept, made)
    write(Path(paths[1]), examples[:1])
    assert len(tfrecords.load_index(paths, "id").labels) == 5


def test_a_damaged_cache_is_made_anew(paths: list[str], tmp_path: Path) -> None:
    tfrecords.load_index(paths, "id")
    (cached,) = (tmp_path / "cache" / "balpoe_jax").iterdir()
    cached.write_bytes(cached.read_bytes()[:100])
    assert len(tfrecords.load_index(paths, "id").labels) == 6


def test_a_cache_with_wrong_bytes_is_made_anew_or_right(paths: list[str], tmp_path: Path) -> None:
    expected = tfrecords.load_index(paths, "id")
    (cached,) = (tmp_path / "cache" / "balpoe_jax").iterdir()
    intact = cached.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(intact)
        for position in random.integers(0, len(damaged), 3):
            damaged[position] ^= 1 << random.integers(8)
        cached.write_bytes(bytes(damaged))
        for found, column in zip(tfrecords.load_index(paths, "id"), expected, strict=True):
            np.testing.assert_array_equal(found, column)


def test_a_cache_that_cannot_be_written_is_done_without(
    paths: list[str], tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(tfrecords.load_index(paths, "id").labels) == 6


@pytest.mark.parametrize("removed", [1, 3, 20, 100])
def test_a_file_that_is_cut_off_is_refused(paths: list[str], removed: int) -> None:
    content = Path(paths[0]).read_bytes()
    Path(paths[0]).write_bytes(content[:-removed])
    with pytest.raises(UserError, match="cut off or damaged"):
        tfrecords.scan(paths, "id")


@pytest.mark.parametrize("name", ["image", "label", "id"])
def test_examples_of_another_kind_are_refused(tmp_path: Path, name: str) -> None:
    example = {"image": b"1", "label": 2, "id": b"3"}
    del example[name]
    path = write(tmp_path / "other", [example])
    with pytest.raises(UserError, match=r"Record 0 of .*other is not an example with an image"):
        tfrecords.scan([path], "id")


def test_an_absent_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        tfrecords.load_index([str(tmp_path / "absent")], "id")


def test_garbage_is_refused(tmp_path: Path) -> None:
    """Records whose content is random bytes: never anything but one sentence."""
    random = np.random.default_rng(0)
    path = tmp_path / "garbage"
    for length in range(1, 200):
        with tf.io.TFRecordWriter(str(path)) as writer:
            writer.write(random.bytes(length))
        with pytest.raises(UserError):
            tfrecords.scan([str(path)], "id")
