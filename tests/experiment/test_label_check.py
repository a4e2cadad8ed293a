# SPDX-License-Identifier: Apache-2.0
"""Labels of another prior are noticed at the first step, and those of the right one are not."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from balpoe_jax.config import resolve
from balpoe_jax.data.long_tail import exponential_counts
from balpoe_jax.experiment import build, label_check
from balpoe_jax.train import train
from tests.helpers.config_files import get_config

TAUS = (0.0, 1.0, 2.0)


def losses(labels: np.ndarray, counts: np.ndarray, noise: float = 0.0) -> np.ndarray:
    """The mean losses of random logits, by the definition."""
    logits = noise * np.random.default_rng(0).normal(size=(len(TAUS), len(labels), len(counts)))
    prior = counts / counts.sum()
    adjusted = logits + np.array(TAUS)[:, None, None] * np.log(prior)
    normalised = adjusted - np.log(np.exp(adjusted).sum(axis=-1, keepdims=True))
    return -normalised[:, np.arange(len(labels)), labels].mean(axis=1)


def draw(counts: np.ndarray, number: int) -> np.ndarray:
    return np.random.default_rng(1).choice(len(counts), number, p=counts / counts.sum())


def test_chance_is_the_loss_of_equal_logits() -> None:
    counts = np.array([70, 20, 10])
    labels = np.repeat(np.arange(3), counts)
    expected = losses(labels, counts)
    np.testing.assert_allclose(label_check.chance_losses(counts, TAUS), expected, rtol=1e-12)
    assert label_check.excess_by_tau(expected, counts, TAUS) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("noise", [0.0, 1.0, 3.0])
@pytest.mark.parametrize(("classes", "ratio"), [(10, 26), (100, 100), (1000, 256)])
def test_classes_in_reverse_are_noticed(classes: int, ratio: float, noise: float) -> None:
    counts = exponential_counts(classes, 1000, ratio)
    right = draw(counts, 128)
    assert label_check.doubt(losses(right, counts, noise), counts, TAUS) == ""
    wrong = classes - 1 - right
    assert "most likely disagree" in label_check.doubt(losses(wrong, counts, noise), counts, TAUS)


def test_the_excess_of_classes_in_reverse_is_that_of_its_losses() -> None:
    counts = np.array([70, 20, 10])
    reverse = losses(np.repeat([2, 1, 0], counts), counts)
    expected = label_check.excess_by_tau(reverse, counts, TAUS)
    assert label_check.reversed_excess(counts[[1, 0, 2]]) == pytest.approx(expected)


def test_classes_that_hardly_differ_in_size_cannot_tell() -> None:
    counts = np.array([181, 91, 49, 25])
    assert label_check.doubt([0.7, 2.0, 3.0], counts, TAUS) == ""
    counts[0] *= 9
    assert label_check.doubt([0.7, 2.0, 6.0], counts, TAUS) != ""


def test_experts_without_tau_or_of_one_tau_cannot_tell() -> None:
    counts = np.array([90, 10])
    for taus in ((1.0,), (1.0, 1.0), (0.0, None)):
        assert label_check.doubt([50.0] * len(taus), counts, taus) == ""


@pytest.mark.integration
@pytest.mark.usefixtures("tiny_experts", "no_page")
@pytest.mark.slow_cases("False")
@pytest.mark.parametrize("disagree", [False, True])
def test_a_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disagree: bool) -> None:
    config = get_config("digits_lt")
    config.total_epochs, config.batch_size = 1, 140
    load = build._load_data

    def reversed_counts(settings):
        data = load(settings)
        return dataclasses.replace(data, class_counts=data.class_counts[::-1])

    if disagree:
        monkeypatch.setattr(build, "_load_data", reversed_counts)
    train(resolve(config), str(tmp_path))
    said = "most likely disagree; check the labels" in (tmp_path / "train.log").read_text()
    assert said == disagree
