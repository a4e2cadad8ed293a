# SPDX-License-Identifier: Apache-2.0
"""Files of logits and of class counts: what is read, and each mistake in one sentence."""

import json
from pathlib import Path

import numpy as np
import pytest

from balpoe_jax.errors import UserError
from balpoe_jax.evaluation.logit_files import hold_out, read_counts, read_logits
from balpoe_jax.evaluation.predictions import Predictions

RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(size=(30, 4))
LABELS = np.arange(30) % 4


def write(folder: Path, **arrays: np.ndarray) -> str:
    path = folder / "logits.npz"
    np.savez(path, **arrays)
    return str(path)


def test_logits_of_one_model_and_of_several(tmp_path: Path) -> None:
    one = read_logits(write(tmp_path, logits=LOGITS, labels=LABELS.astype(np.uint8)))
    assert one.held_out is None and one.test.expert_logits.shape == (1, 30, 4)
    np.testing.assert_allclose(one.test.expert_logits[0], LOGITS, rtol=1e-6)
    np.testing.assert_array_equal(one.test.labels, LABELS)
    three = np.stack([LOGITS, 2 * LOGITS, LOGITS + 1]).astype(np.float16)
    stored = read_logits(
        write(
            tmp_path,
            logits=three,
            labels=LABELS,
            held_out_logits=three[:, :9],
            held_out_labels=LABELS[:9],
        )
    )
    assert stored.held_out is not None and stored.held_out.expert_logits.shape == (3, 9, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"logits": None},
            r"should have the array logits and has labels; write it with numpy\.sav",
        ),
        (
            {"labels": LABELS[:-1]},
            r"with N >= 1, got float64 \(30, 4\) and int64 \(29,\)",
        ),
        ({"logits": LOGITS[:, :1]}, r"with C >= 2 and labels"),
        ({"logits": LOGITS.astype(int)}, r"should be float \[N, C\] or \[E, N, C\]"),
        ({"labels": LABELS + 1}, r"whole numbers from 0 to 3, the positions of the classes"),
        ({"labels": LABELS / 1.0}, r"whole numbers from 0 to 3"),
        ({"logits": np.where(LOGITS > 2, np.nan, LOGITS)}, r"not finite"),
        ({"held_out_logits": LOGITS}, r"should have the array held_out_labels"),
        (
            {"held_out_logits": LOGITS[:, :3], "held_out_labels": LABELS % 3},
            r"as many models and classes as the others, and are of 1 and 3 in place of 1 and 4",
        ),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, changes: dict, message: str) -> None:
    arrays = {"logits": LOGITS, "labels": LABELS, **changes}
    path = write(tmp_path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(UserError, match=message):
        read_logits(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"no archive", b"\x93NUMPY"])
def test_files_that_are_no_archive(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"it is no \.npz file of arrays"):
        read_logits(str(tmp_path / "a.npz"))
    with pytest.raises(UserError, match="No such file or directory"):
        read_logits(str(tmp_path / "none.npz"))


def test_one_array_alone_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", LOGITS)
    with pytest.raises(UserError, match="should have the array logits and has nothing"):
        read_logits(str(tmp_path / "a.npy"))


def test_rows_are_held_out_by_class(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(3), (20, 10, 2)).astype(np.int32)
    logits = RANDOM.normal(size=(2, 32, 3)).astype(np.float32)
    test, held_out = hold_out(Predictions(logits, labels), 0.3, seed=1)
    assert np.bincount(held_out.labels, minlength=3).tolist() == [6, 3, 0]
    assert np.bincount(test.labels).tolist() == [14, 7, 2]
    rows = {tuple(row) for part in (test, held_out) for row in part.expert_logits[0].tolist()}
    assert rows == {tuple(row) for row in logits[0].tolist()}
    again = hold_out(Predictions(logits, labels), 0.3, seed=1)
    np.testing.assert_array_equal(again.test.expert_logits, test.expert_logits)
    other = hold_out(Predictions(logits, labels), 0.3, seed=2)
    assert (other.test.expert_logits != test.expert_logits).any()
    with pytest.raises(UserError, match="No class has enough rows to hold 10% of them out"):
        hold_out(Predictions(logits[:, -4:], labels[-4:]), 0.1, seed=1)


def test_counts_are_numbers_or_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "counts.npy", np.array([5, 3, 1]))
    (tmp_path / "counts.json").write_text(json.dumps([5, 3, 1]))
    (tmp_path / "counts.txt").write_text("5\n3\n1\n")
    (tmp_path / "counts.csv").write_text('class,count\nant,5\n"a, b",3\nyak,1\n')
    given = ["5,3,1", *(str(tmp_path / f"counts.{kind}") for kind in ("npy", "json", "txt", "csv"))]
    for counts in given:
        assert read_counts(counts, 3).tolist() == [5, 3, 1]
    many = list(range(1000, 0, -1))
    assert read_counts(",".join(map(str, many)), 1000).tolist() == many


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("5,3", r"for each of the 3 classes, got 2 with a minimum of 3"),
        ("5,3,0", r"at least 1 for each of the 3 classes, got 3 with a minimum of 0"),
        ("5,3,1.5", r"a whole number of at least 1"),
        ("5,3,many", r"cannot be read so \(could not convert string to float: 'many'\)"),
        ("none.txt", r"training examples by class, separated by commas, or a file"),
        ("", r"cannot be read so"),
        ("5,nan,1", r"a whole number of at least 1"),
    ],
)
def test_counts_that_cannot_be(given: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_counts(given, 3)


@pytest.mark.parametrize("content", ["{", '{"a": 1}', '["a"]', "[[1, 2, 3]]", "null"])
def test_json_that_is_no_list_of_counts(tmp_path: Path, content: str) -> None:
    (tmp_path / "counts.json").write_text(content)
    with pytest.raises(UserError, match="--counts="):
        read_counts(str(tmp_path / "counts.json"), 3)
