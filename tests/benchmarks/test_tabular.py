# SPDX-License-Identifier: Apache-2.0
"""The comparison on feature vectors: what it reads, and what it measures."""

from pathlib import Path

import numpy as np
import pytest

from balpoe_jax.errors import UserError
from benchmarks import tabular


def arrays(**changes) -> dict:
    random = np.random.default_rng(0)
    content = {
        "train_features": random.normal(3, 2, (30, 4)),
        "train_labels": np.arange(30) % 3,
        "test_features": random.normal(3, 2, (6, 4)),
        "test_labels": np.arange(6) % 3,
    }
    return {**content, **changes}


def test_features_of_a_file_are_standardised_by_those_of_training(tmp_path: Path) -> None:
    given = arrays()
    np.savez(tmp_path / "f.npz", **given)
    train, labels, test, truth = tabular.stored(str(tmp_path / "f.npz"))
    np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(train.std(axis=0), 1)
    back = test * given["train_features"].std(axis=0) + given["train_features"].mean(axis=0)
    np.testing.assert_allclose(back, given["test_features"])
    np.testing.assert_array_equal(labels, given["train_labels"])
    np.testing.assert_array_equal(truth, given["test_labels"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_features": np.zeros((6, 3))}, "of the same N"),
        ({"train_labels": np.zeros(29, int)}, "of the same N"),
        ({"train_labels": np.arange(30) % 2 * 2}, "each with a training row"),
        ({"test_labels": np.arange(6)}, "each with a training row"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, changes: dict, message: str) -> None:
    np.savez(tmp_path / "f.npz", **arrays(**changes))
    with pytest.raises(UserError, match=message):
        tabular.stored(str(tmp_path / "f.npz"))


def test_a_file_of_something_else(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", x=np.zeros(3))
    for name in ("f.npz", "none.npz"):
        with pytest.raises(UserError, match="should have the arrays train_features, train_labels"):
            tabular.stored(str(tmp_path / name))


def test_a_classifier_that_is_always_right_is_measured_so() -> None:
    labels = np.arange(40) % 4

    def fit(features, labels):
        return lambda tested: np.eye(4)[tested[:, 0].astype(int)]

    found = tabular.measure(fit, (labels[:, None], labels, labels[:, None], labels))
    assert (found["balanced"], found["f1"], found["ece"]) == (1, 1, 0) and found["seconds"] >= 0
