# SPDX-License-Identifier: Apache-2.0
"""The tables of classes and of confused pairs, against loops over the test images."""

import math
import warnings

import numpy as np
import pytest

from balpoe_jax.reporting import html, per_class

NAMES = ("ant", "owl", "yak", "emu")
COUNTS = np.array([40, 90, 5, 5])


def draw(number: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels of three of the classes; the last one is neither tested nor predicted."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, number)
    predicted = np.where(random.uniform(size=number) < 0.6, labels, random.integers(0, 3, number))
    return labels, predicted, random.uniform(0.34, 1, number)


def twin(label: int) -> list[float]:
    labels, predicted, confidence = draw()
    own = [i for i in range(len(labels)) if labels[i] == label]
    named = [i for i in range(len(labels)) if predicted[i] == label]
    right = sum(predicted[i] == label for i in own)
    recall, precision = right / len(own), right / len(named)
    error = 0.0
    for b in range(10):
        inside = [i for i in own if b / 10 < confidence[i] <= (b + 1) / 10]
        if inside:
            accuracy = np.mean([predicted[i] == label for i in inside])
            error += len(inside) / len(own) * abs(accuracy - np.mean(confidence[inside]))
    f1 = 2 * recall * precision / (recall + precision)
    return [recall, precision, f1, float(np.mean(confidence[own])), error]


def test_classes_are_the_twins() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = per_class.class_table(NAMES, COUNTS, *draw(), num_bins=10)
    assert [name for name, _ in table.rows] == ["owl", "ant", "yak", "emu"]
    rows = dict(table.rows)
    labels, predicted, _ = draw()
    for label, name in enumerate(NAMES[:3]):
        assert rows[name][:2] == [str(COUNTS[label]), str((labels == label).sum())]
        np.testing.assert_allclose(rows[name][2:7], twin(label), rtol=1e-9)
        others = [i for i in range(3) if i != label]
        times = [((labels == label) & (predicted == i)).sum() for i in others]
        assert rows[name][7] == NAMES[others[int(np.argmax(times))]]
    assert rows["emu"][:2] == ["5", "0"] and rows["emu"][7] is None
    assert all(math.isnan(value) for value in rows["emu"][2:7])
    mean = np.mean([twin(label)[0] for label in range(3)])
    assert f"Balanced accuracy (mean recall) {100 * mean:.1f}" in table.note
    f1 = np.mean([twin(label)[2] for label in range(3)])
    assert f"macro-F1 {100 * f1:.1f}" in table.note


def test_the_most_confused_pairs_come_first() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    predicted = np.array([1, 1, 0, 0, 1, 2, 0, 2])
    table = per_class.confused_pairs(NAMES, labels, predicted)
    assert table.rows[0] == ("ant as owl", ["2", pytest.approx(2 / 3)])
    assert {name for name, _ in table.rows[1:]} == {"owl as ant", "yak as ant"}
    assert per_class.confused_pairs(NAMES, labels, labels).rows == []


def test_names_cannot_break_the_page() -> None:
    names = ("<b>ant</b>", "owl & emu", "yak", "</script>")
    table = per_class.class_table(names, COUNTS, *draw(), num_bins=10)
    text = str(html.sortable(table))
    assert "&lt;b&gt;ant" in text and "owl &amp; emu" in text and "</script>" not in text
    assert "<details open>" in text
    many = per_class.class_table([str(i) for i in range(50)], np.arange(50), *draw(), num_bins=10)
    assert "<details>" in str(html.sortable(many)) and "50 classes" in str(html.sortable(many))


def test_a_class_that_is_predicted_but_not_tested_is_left_out_of_the_mean() -> None:
    labels, predicted = np.array([0, 0, 1, 1]), np.array([0, 3, 1, 1])
    table = per_class.class_table(NAMES, COUNTS, labels, predicted, np.full(4, 0.5), num_bins=10)
    rows = dict(table.rows)
    assert rows["emu"][3] == 0 and math.isnan(rows["emu"][4])
    assert f"macro-F1 {100 * (2 / 3 + 1) / 2:.1f}" in table.note
