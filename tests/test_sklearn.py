# SPDX-License-Identifier: Apache-2.0
"""The estimator: scikit-learn's own checks, its loss, its bias, and its calibration."""

import numpy as np
import pytest
from scipy import optimize
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from balpoe_jax import sklearn as ours
from balpoe_jax.data import datasets
from balpoe_jax.sklearn import BalancedProductClassifier


@parametrize_with_checks([BalancedProductClassifier()])
def test_scikit_learns_checks(estimator, check) -> None:
    check(estimator)


@pytest.mark.slow
@parametrize_with_checks(
    [
        BalancedProductClassifier(hidden_layers=(4,), max_features=0.8, random_state=0),
        BalancedProductClassifier(n_experts=2, calibration=0),
    ]
)
def test_scikit_learns_checks_of_other_parameters(estimator, check) -> None:
    check(estimator)


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features and labels of long-tailed training and balanced test images."""
    data = datasets.load("digits", 26.0)
    parts = []
    for source in (data.train, data.test):
        parts += [source.images.reshape(len(source), -1) / 255, source.labels]
    return tuple(parts)


def draw(number: int, features: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.choice(
        classes, number, p=2.0 ** -np.arange(classes) / (2 - 2.0 ** (1 - classes))
    )
    return random.normal(size=(number, features)) + labels[:, None] / 2, labels


@pytest.mark.parametrize("hidden", [[], [5], [6, 4]])
def test_the_gradient_is_that_of_finite_differences(hidden: list[int]) -> None:
    random = np.random.RandomState(0)
    sizes = [3, *hidden, 4]
    rows = ours.Rows(
        random.standard_normal((20, 3)),
        random.dirichlet(np.ones(4), 20),
        random.dirichlet(np.ones(20)),
    )
    shift = random.standard_normal(4)
    flat = random.standard_normal(ours._flat(ours._initial(sizes, random)).shape)

    def loss(values: np.ndarray) -> float:
        return ours._loss(ours._layers(values, sizes), rows, shift, 0.3)[0]

    _, gradient = ours._loss(ours._layers(flat, sizes), rows, shift, 0.3)
    np.testing.assert_allclose(gradient, optimize.approx_fprime(flat, loss, 1e-6), atol=2e-5)


def test_the_loss_is_its_formula() -> None:
    features, labels = draw(30, 2, 3)
    weights, biases = np.array([[1.0, 0, -1], [0.5, 2, 0]]), np.array([0.1, 0.2, 0.3])
    log_prior = np.log(np.bincount(labels) / 30)
    expected = 0.0
    for row, label in zip(features, labels, strict=True):
        adjusted = [
            sum(row[i] * weights[i, c] for i in range(2)) + biases[c] + 1.5 * log_prior[c]
            for c in range(3)
        ]
        expected += np.log(sum(np.exp(adjusted))) - adjusted[label]
    rows = ours.Rows(features, np.eye(3)[labels], np.full(30, 1 / 30))
    found, _ = ours._loss([(weights, biases)], rows, 1.5 * log_prior, 0.2)
    assert found == pytest.approx(expected / 30 + 0.1 * (weights**2).sum())


def test_one_expert_of_tau_zero_is_logistic_regression() -> None:
    features, labels = draw(300, 4, 3)
    expert = BalancedProductClassifier(1, taus=[0.0], calibration=0, alpha=2.0, tol=1e-9)
    theirs = LogisticRegression(C=1 / 2.0, tol=1e-9, max_iter=1000).fit(features, labels)
    np.testing.assert_allclose(
        expert.fit(features, labels).predict_proba(features),
        theirs.predict_proba(features),
        atol=1e-4,
    )


def test_linear_experts_differ_by_their_taus_alone() -> None:
    """A bias takes up the shift, so that without a penalty the mean is the expert of mean tau."""
    features, labels = draw(400, 3, 3)
    options = {"alpha": 0.0, "calibration": 0, "tol": 1e-9, "max_iter": 2000}
    three = BalancedProductClassifier(3, **options).fit(features, labels)
    one = BalancedProductClassifier(1, taus=[1.0], **options).fit(features, labels)
    np.testing.assert_allclose(
        three.predict_proba(features), one.predict_proba(features), atol=1e-4
    )


def test_rare_classes_gain(digits) -> None:
    features, labels, tested, truth = digits
    plain = LogisticRegression(max_iter=1000).fit(features, labels)
    found = BalancedProductClassifier().fit(features, labels)
    before, after = plain.score(tested, truth), found.score(tested, truth)
    assert after > before + 0.03
    assert found.taus_.mean() == 1 and len(found.experts_) == 3


def test_the_temperature_is_of_rows_that_were_not_fitted() -> None:
    """Experts that learn their rows by heart are sure of them, and wrong about others."""
    features, labels = draw(400, 5, 3)
    tested, truth = draw(3000, 5, 3, seed=1)
    options = {"hidden_layers": (64,), "alpha": 1e-3, "random_state": 0}
    with_it = BalancedProductClassifier(**options).fit(features, labels)
    without = BalancedProductClassifier(calibration=0, **options).fit(features, labels)
    assert without.score(features, labels) == 1.0
    assert with_it.temperature_ > 2 and without.temperature_ == 1.0
    rows = np.arange(len(truth))
    losses = [
        -np.log(model.predict_proba(tested)[rows, truth].clip(1e-12)).mean()
        for model in (with_it, without)
    ]
    assert losses[0] < losses[1] / 2
    np.testing.assert_array_equal(with_it.predict(tested), without.predict(tested))


def test_folds_leave_a_row_of_each_class_and_follow_the_features() -> None:
    features, labels = draw(200, 3, 4)
    folds = ours._folds(features, labels, 3)
    assert np.bincount(folds + 1)[0] == 4 and set(labels[folds == -1]) == set(labels)
    assert np.bincount(folds[folds >= 0]).min() > 45
    order = np.random.default_rng(0).permutation(200)
    np.testing.assert_array_equal(ours._folds(features[order], labels[order], 3), folds[order])
    twice = ours._folds(np.repeat(features, 2, axis=0), np.repeat(labels, 2), 3)
    np.testing.assert_array_equal(twice, np.repeat(folds, 2))


@pytest.mark.slow_cases("options0", "options1")
@pytest.mark.parametrize(
    "options", [{"mixup": 0.4}, {"bootstrap": True}, {"max_features": 0.5}, {"hidden_layers": (8,)}]
)
def test_experts_can_be_made_to_differ(digits, options: dict) -> None:
    features, labels, tested, truth = digits
    model = BalancedProductClassifier(taus=[1, 1, 1], random_state=0, **options)
    logits = [expert.logits(tested) for expert in model.fit(features, labels).experts_]
    assert np.abs(logits[0] - logits[1]).max() > 0.1
    again = clone(model).fit(features, labels)
    np.testing.assert_array_equal(again.predict_proba(tested), model.predict_proba(tested))
    assert model.score(tested, truth) > 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_experts": 0}, "n_experts must be a whole number from 1, got 0"),
        ({"taus": [0, 1]}, r"taus must be a number for each of the 3 experts, got \[0, 1\]"),
        ({"mixup": -1.0}, "mixup must be from 0 to inf, got -1.0"),
        ({"calibration": 1}, "calibration must be 0, or a number of folds from 2, got 1"),
        ({"max_features": 0.0}, "max_features must be from 1e-09 to 1, got 0.0"),
    ],
)
def test_parameters_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BalancedProductClassifier(**options).fit(*draw(30, 2, 3))


def test_pipelines_grid_search_and_calibration() -> None:
    features, labels = draw(200, 3, 3)
    pipeline = make_pipeline(StandardScaler(), BalancedProductClassifier())
    search = GridSearchCV(
        pipeline,
        {"balancedproductclassifier__alpha": [0.1, 10.0]},
        scoring="balanced_accuracy",
        cv=3,
    ).fit(features, labels)
    assert search.best_score_ > 0.4
    calibrated = CalibratedClassifierCV(BalancedProductClassifier(), cv=3).fit(features, labels)
    np.testing.assert_allclose(calibrated.predict_proba(features).sum(axis=1), 1)


def test_names_of_classes_and_weights() -> None:
    features, labels = draw(120, 3, 3)
    names = np.array(["ant", "owl", "yak"])[labels]
    weights = np.random.default_rng(0).integers(0, 3, 120)
    weighted = BalancedProductClassifier(tol=1e-9).fit(features, names, sample_weight=weights)
    repeated = BalancedProductClassifier(tol=1e-9).fit(
        np.repeat(features, weights, axis=0), np.repeat(names, weights)
    )
    np.testing.assert_allclose(
        weighted.predict_proba(features), repeated.predict_proba(features), atol=1e-5
    )
    assert set(weighted.predict(features)) <= set(names)
    for bad in (np.ones(3), -np.ones(120), np.zeros(120)):
        with pytest.raises(ValueError, match=r"sample_weight must (have 120 numbers|not be neg)"):
            BalancedProductClassifier().fit(features, names, sample_weight=bad)
