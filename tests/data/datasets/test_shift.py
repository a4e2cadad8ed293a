# SPDX-License-Identifier: Apache-2.0
"""Test distributions: the reference's counts, published lists, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from balpoe_jax.data.datasets.test_distributions import make_targets, shifted_counts
from balpoe_jax.data.long_tail import exponential_counts, select_indices
from balpoe_jax.errors import UserError
from tests.helpers.golden import cases, golden

LABELS = np.repeat(np.arange(4), 10)
TRAIN = np.array([300, 120, 50, 8])
NAMES = np.array([f"val_{i:03d}.JPEG" for i in range(40)])


@pytest.mark.parametrize("name", [case for case in cases("counts") if "_test_" in case])
def test_counts_are_the_references(name: str) -> None:
    classes, _, target = name.split("_")
    num_classes = int(classes[1:])
    per_class = 10_000 // num_classes
    train = exponential_counts(num_classes, 5 * per_class, 100)
    backward = target.startswith("backward")
    ratio = float(target.removeprefix("forward").removeprefix("backward"))
    counts = shifted_counts([per_class] * num_classes, train, ratio, backward)
    np.testing.assert_array_equal(counts, golden("counts")[name])


def test_what_is_forward_follows_the_training_counts() -> None:
    train = np.array([8, 300, 50, 120])
    forward = shifted_counts([10] * 4, train, 8, backward=False)
    np.testing.assert_array_equal(forward, [1, 10, 2, 5])
    np.testing.assert_array_equal(shifted_counts([10] * 4, train, 8, backward=True), [10, 1, 5, 2])


def test_an_empty_class_stays_empty() -> None:
    counts = shifted_counts([4, 0, 4], [9, 8, 7], 2, backward=False)
    np.testing.assert_array_equal(counts, [4, 0, 2])


def test_targets_go_from_forward_to_backward() -> None:
    targets = make_targets(LABELS, TRAIN, (5, 2, 50))
    assert [target.name for target in targets] == [
        "forward50", "forward5", "forward2", "uniform", "backward2", "backward5", "backward50",
    ]  # fmt: skip
    # By hand: 10, 10 / 5 ** (1 / 3), 10 / 5 ** (2 / 3), 10 / 5, and the like, rounded down.
    by_hand = {
        "forward50": [10, 2, 0, 0], "forward5": [10, 5, 3, 2], "forward2": [10, 7, 6, 5],
        "uniform": [10, 10, 10, 10],
        "backward2": [5, 6, 7, 10], "backward5": [2, 3, 5, 10], "backward50": [0, 0, 2, 10],
    }  # fmt: skip
    for target in targets:
        expected = by_hand[target.name]
        assert target.counts.tolist() == expected
        assert [(LABELS[target.indices] == c).sum() for c in range(4)] == expected
        assert len(set(target.indices.tolist())) == sum(expected)
        np.testing.assert_allclose(target.prior, np.array(expected) / sum(expected))
    uniform = targets[3]
    np.testing.assert_array_equal(uniform.indices, np.arange(40))
    assert {target.origin for target in targets} == {"rule", "whole test set"}


def test_a_target_without_examples_is_left_out() -> None:
    """The first class of a backward set gets nothing when every test class has one example."""
    labels, train = np.array([0, 1]), np.array([5, 4, 3])
    names = [target.name for target in make_targets(labels, train, (50, 50.0))]
    assert names == ["forward50", "uniform"]


def test_the_images_of_a_target_are_the_references_choice() -> None:
    forward = make_targets(LABELS, TRAIN, (5,))[0]
    counts = exponential_counts(4, 10, 5)
    np.testing.assert_array_equal(forward.indices, select_indices(LABELS, counts, seed=0))


def write_list(folder: Path, lines: list[str], name: str = "Images_LT_forward5.txt") -> str:
    (folder / name).write_text("\n".join(lines) + "\n")
    return str(folder / name)


def test_a_published_list_replaces_the_rule(tmp_path: Path) -> None:
    path = write_list(tmp_path, ["val/n01/val_001.JPEG 0", "val/n02/val_035.JPEG 3"])
    targets = {t.name: t for t in make_targets(LABELS, TRAIN, (5,), NAMES, path)}
    np.testing.assert_array_equal(targets["forward5"].indices, [1, 35])
    np.testing.assert_array_equal(targets["forward5"].counts, [1, 0, 0, 1])
    assert targets["forward5"].origin == "Images_LT_forward5.txt"
    assert targets["backward5"].origin == "rule"


def test_lists_may_be_a_pattern_and_ids_without_suffix(tmp_path: Path) -> None:
    write_list(tmp_path, ["a/b/id7.jpg 0"], "x_forward3.txt")
    write_list(tmp_path, ["a/b/id39.jpg 3", ""], "x_backward3.txt")
    names = np.array([f"id{i}" for i in range(40)])
    targets = make_targets(LABELS, TRAIN, (3,), names, f"{tmp_path}/x_*.txt")
    assert [target.origin for target in targets] == [
        "x_forward3.txt", "whole test set", "x_backward3.txt",
    ]  # fmt: skip
    np.testing.assert_array_equal(targets[2].indices, [39])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["val_001.JPEG 0", "elsewhere/val_999.JPEG 1"], r"Line 2 .*val_999.*matches no example"),
        (["val_001.JPEG 2"], r"Line 1 .*another label than the test set's 0"),
        (["val_001.JPEG"], r"Line 1 .*is not `path label`"),
        (["val_001.JPEG 0", "x/val_001.JPEG 0"], r"Line 2 .*repeats line 1"),
        ([""], "is empty"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tmp_path: Path, lines, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_targets(LABELS, TRAIN, (5,), NAMES, write_list(tmp_path, lines))


def test_lists_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    good = write_list(tmp_path, ["val_001.JPEG 0"])
    with pytest.raises(UserError, match="no list file"):
        make_targets(LABELS, TRAIN, (5,), NAMES, str(tmp_path / "none_forward5.txt"))
    with pytest.raises(UserError, match="should end in forward or backward"):
        make_targets(LABELS, TRAIN, (5,), NAMES, write_list(tmp_path, ["a 0"], "test.txt"))
    with pytest.raises(UserError, match=r"list for forward5, but the ratios .* are 2"):
        make_targets(LABELS, TRAIN, (2,), NAMES, good)
    with pytest.raises(UserError, match="have no names"):
        make_targets(LABELS, TRAIN, (5,), None, good)
    (tmp_path / "other").mkdir()
    other = write_list(tmp_path / "other", ["val_001.JPEG 0"])
    with pytest.raises(UserError, match="Two list files are for forward5"):
        make_targets(LABELS, TRAIN, (5,), NAMES, f"{good},{other}")
    (tmp_path / "binary_forward5.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        make_targets(LABELS, TRAIN, (5,), NAMES, str(tmp_path / "binary_forward5.txt"))


def test_a_ratio_may_have_any_name() -> None:
    targets = {target.name: target for target in make_targets(LABELS, TRAIN, (1.5, 1e9))}
    assert list(targets) == [
        "forward1e+09",
        "forward1.5",
        "uniform",
        "backward1.5",
        "backward1e+09",
    ]
    assert targets["forward1e+09"].counts.tolist() == [10, 0, 0, 0]


def test_ratios_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match=r"Two of the ratios 2, 2\.0000001 have one name"):
        make_targets(LABELS, TRAIN, (2.0000001, 2))
