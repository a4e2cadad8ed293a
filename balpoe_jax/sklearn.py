# SPDX-License-Identifier: Apache-2.0
"""BalPoE on feature vectors, as an estimator of scikit-learn.

    classifier = BalancedProductClassifier().fit(features, labels)
    probabilities = classifier.predict_proba(features)

Each expert is a softmax classifier, linear or with hidden layers. In training its logits are
shifted by its tau times the log-frequencies of the classes (the logit-adjusted loss). The mean of
the experts is unbiased where classes are equally frequent, if their taus have a mean of 1.

Features are not scaled; put a `StandardScaler` before it in a pipeline. All is computed in double
precision by L-BFGS, without JAX: compiling would take longer than fitting does.
"""

import hashlib
import itertools
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from threadpoolctl import threadpool_limits

from balpoe_jax.metrics import fit_temperature, softmax

Array = npt.NDArray[np.float64]

# Numbers from which on products of matrices are shared by threads.
_LARGE = 10**6


class Rows(NamedTuple):
    """Training rows.

    Attributes:
        features: float64 `[N, F]`.
        targets: Share of each class, float64 `[N, C]`.
        weights: float64 `[N]`, positive.
    """

    features: Array
    targets: Array
    weights: Array


class BalancedProductClassifier(ClassifierMixin, BaseEstimator):
    """A balanced product of experts on feature vectors (BalPoE, CVPR 2023).

    Args:
        n_experts: Number of experts.
        taus: Tau of each expert; None for equal steps from 0 to 2, or 1 for one expert.
        hidden_layers: Numbers of hidden units of each expert; empty for linear experts.
        mixup: Parameter of the Beta distribution of mixup; 0 for none. Mixed rows, as many as there
            are, take the place of the rows.
        max_features: Share of the features that each expert sees, drawn at random.
        bootstrap: Whether each expert draws the rows that it sees, with replacement.
        alpha: Weight of half the sum of squared weights, against the sum of losses.
        calibration: Number of folds for the temperature, which is fitted on the logits of rows by
            experts that did not see them; 0 for no temperature.
        max_iter: Largest number of iterations of L-BFGS.
        tol: Largest part of the gradient at which it ends, against the sum of weights.
        random_state: Seed or generator of what is drawn.

    Attributes:
        classes_: Classes, sorted.
        taus_: Tau of each expert.
        log_prior_: Log-frequencies of the classes in training, `[C]`.
        temperature_: Divisor of the mean logits.
        experts_: Experts.
        n_features_in_: Number of features.
        n_iter_: Largest number of iterations of an expert.
    """

    def __init__(
        self,
        n_experts: int = 3,
        *,
        taus: Sequence[float] | None = None,
        hidden_layers: Sequence[int] = (),
        mixup: float = 0.0,
        max_features: float = 1.0,
        bootstrap: bool = False,
        alpha: float = 1.0,
        calibration: int = 3,
        max_iter: int = 200,
        tol: float = 1e-5,
        random_state: Any = None,
    ) -> None:
        self.n_experts = n_experts
        self.taus = taus
        self.hidden_layers = hidden_layers
        self.mixup = mixup
        self.max_features = max_features
        self.bootstrap = bootstrap
        self.alpha = alpha
        self.calibration = calibration
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "BalancedProductClassifier":  # noqa: N803
        """Fits the experts, and the temperature before.

        Args:
            X: Features, `[N, F]`.
            y: Classes, `[N]`.
            sample_weight: Weight of each row; None for 1. A weight of 2 is a row twice.

        Raises:
            ValueError: parameters, rows or weights that cannot be.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)  # noqa: N806
        check_classification_targets(y)
        weights = _weights(sample_weight, len(X))
        kept = weights > 0
        features, weights = X[kept], weights[kept]
        self.classes_, labels = np.unique(y[kept], return_inverse=True)
        self.taus_ = self._checked_taus()
        if len(self.classes_) < 2:
            raise ValueError(
                "The training rows should be of two classes or more, and are of one class: "
                f"{self.classes_.tolist()}."
            )
        counts = np.bincount(labels, weights)
        self.log_prior_ = np.log(counts / counts.sum())
        # Threads wait for each other longer than small products take.
        with threadpool_limits(1 if features.size < _LARGE else None, user_api="blas"):
            self.temperature_ = self._temperature(features, labels, weights)
            self._fit_experts(features, labels, weights)
        return self

    def _checked_taus(self) -> Array:
        if not (isinstance(self.n_experts, int | np.integer) and self.n_experts >= 1):
            raise ValueError(f"n_experts must be a whole number from 1, got {self.n_experts!r}.")
        folds = self.calibration
        if not (isinstance(folds, int | np.integer) and (folds == 0 or folds >= 2)):
            raise ValueError(f"calibration must be 0, or a number of folds from 2, got {folds!r}.")
        for name, low, high in (
            ("mixup", 0, np.inf),
            ("alpha", 0, np.inf),
            ("max_features", 1e-9, 1),
            ("tol", 0, np.inf),
        ):
            value = getattr(self, name)
            if not (isinstance(value, int | float | np.number) and low <= value <= high):
                raise ValueError(f"{name} must be from {low:g} to {high:g}, got {value!r}.")
        if self.taus is None:
            return np.linspace(0, 2, self.n_experts) if self.n_experts > 1 else np.ones(1)
        taus = np.asarray(self.taus, np.float64)
        if taus.shape != (self.n_experts,) or not np.isfinite(taus).all():
            raise ValueError(
                f"taus must be a number for each of the {self.n_experts} experts, got "
                f"{self.taus!r}."
            )
        return taus

    def _fit_experts(self, features: Array, labels: npt.NDArray[np.intp], weights: Array) -> None:
        random = check_random_state(self.random_state)
        number = len(self.classes_)
        rows = Rows(features, np.eye(number)[labels], weights)
        self.experts_ = [
            _Expert.fitted(
                self._drawn(rows, random),
                tau * self.log_prior_,
                self._columns(features.shape[1], random),
                [*self.hidden_layers],
                (float(self.alpha), int(self.max_iter), float(self.tol)),
                random,
            )
            for tau in self.taus_
        ]
        self.n_iter_ = max(expert.iterations for expert in self.experts_)

    def _columns(self, features: int, random: np.random.RandomState) -> npt.NDArray[np.intp]:
        if self.max_features == 1:
            return np.arange(features)
        chosen = max(1, round(self.max_features * features))
        return np.sort(random.permutation(features)[:chosen])

    def _drawn(self, rows: Rows, random: np.random.RandomState) -> Rows:
        """The rows that an expert sees: drawn, mixed, or all."""
        number = len(rows.weights)
        if self.bootstrap:
            # Of each class as many as there are, so that none is lost.
            labels = rows.targets.argmax(axis=1)
            members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
            chosen = np.concatenate([random.choice(own, len(own)) for own in members])
            rows = Rows(*(part[chosen] for part in rows))
        if self.mixup:
            share = random.beta(self.mixup, self.mixup, (number, 1))
            other = random.permutation(number)
            features, targets = (share * part + (1 - share) * part[other] for part in rows[:2])
            rows = Rows(features, targets, np.full(number, rows.weights.mean()))
        return rows

    def _temperature(self, features: Array, labels: npt.NDArray[np.intp], weights: Array) -> float:
        """The temperature for equally frequent classes: rows of a class share one weight.

        A row is predicted by experts that were fitted on the other folds.
        """
        if not self.calibration:
            return 1.0
        folds = _folds(features, labels, self.calibration)
        logits = np.zeros((len(labels), len(self.classes_)))
        for fold in range(self.calibration):
            held_out = folds == fold
            if held_out.any():
                self._fit_experts(features[~held_out], labels[~held_out], weights[~held_out])
                logits[held_out] = self._logits(features[held_out])
        found = folds >= 0
        if len(np.unique(labels[found])) < 2:
            return 1.0
        shares = weights[found] / np.bincount(labels[found], weights[found])[labels[found]]
        return fit_temperature(logits[found], labels[found], shares)

    def _logits(self, features: Array) -> Array:
        return np.mean([expert.logits(features) for expert in self.experts_], axis=0)

    def _checked(self, X: Any) -> Array:  # noqa: N803
        check_is_fitted(self)
        return np.asarray(validate_data(self, X, dtype=np.float64, reset=False))

    def decision_function(self, X: Any) -> Array:  # noqa: N803
        """Mean logits divided by the temperature, `[N, C]`; their difference `[N]` for two classes.

        Args:
            X: Features, `[N, F]`.
        """
        logits = self._logits(self._checked(X)) / self.temperature_
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: Any) -> Array:  # noqa: N803
        """Calibrated probabilities where classes are equally frequent, `[N, C]`.

        Args:
            X: Features, `[N, F]`.
        """
        return softmax(self._logits(self._checked(X)) / self.temperature_)

    def predict(self, X: Any) -> npt.NDArray[Any]:  # noqa: N803
        """The most probable class of each row, `[N]`.

        Args:
            X: Features, `[N, F]`.
        """
        logits = self._logits(self._checked(X))
        return np.asarray(self.classes_[logits.argmax(axis=1)])


class _Expert(NamedTuple):
    """Layers of weights and biases on some of the features."""

    columns: npt.NDArray[np.intp]
    layers: list[tuple[Array, Array]]
    iterations: int

    @classmethod
    def fitted(
        cls,
        rows: Rows,
        shift: Array,
        columns: npt.NDArray[np.intp],
        hidden: list[int],
        options: tuple[float, int, float],
        random: np.random.RandomState,
    ) -> "_Expert":
        """An expert that minimises the loss of logits which are shifted by `shift`."""
        alpha, iterations, tolerance = options
        sizes = [len(columns), *hidden, rows.targets.shape[1]]
        start = _flat(_initial(sizes, random))
        total = rows.weights.sum()
        given = Rows(rows.features[:, columns], rows.targets, rows.weights / total)

        def loss(flat: Array) -> tuple[float, Array]:
            return _loss(_layers(flat, sizes), given, shift, alpha / total)

        found = optimize.minimize(
            loss,
            start,
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": iterations, "gtol": tolerance, "maxcor": 10},
        )
        return cls(columns, _layers(found.x, sizes), int(found.nit))

    def logits(self, features: Array) -> Array:
        """Logits without the shift, `[N, C]`."""
        values = features[:, self.columns]
        for weights, biases in self.layers[:-1]:
            values = np.maximum(values @ weights + biases, 0)
        weights, biases = self.layers[-1]
        return values @ weights + biases


def _initial(sizes: list[int], random: np.random.RandomState) -> list[tuple[Array, Array]]:
    """Zeros for a linear expert, whose loss is convex; He's values otherwise."""
    layers = []
    for n_in, n_out in itertools.pairwise(sizes):
        scale = np.sqrt(2 / n_in) if len(sizes) > 2 else 0.0
        layers.append((scale * random.standard_normal((n_in, n_out)), np.zeros(n_out)))
    return layers


def _flat(layers: list[tuple[Array, Array]]) -> Array:
    return np.concatenate([part.ravel() for layer in layers for part in layer])


def _layers(flat: Array, sizes: list[int]) -> list[tuple[Array, Array]]:
    layers, first = [], 0
    for n_in, n_out in itertools.pairwise(sizes):
        middle, last = first + n_in * n_out, first + (n_in + 1) * n_out
        layers.append((flat[first:middle].reshape(n_in, n_out), flat[middle:last]))
        first = last
    return layers


def _loss(
    layers: list[tuple[Array, Array]], rows: Rows, shift: Array, penalty: float
) -> tuple[float, Array]:
    """The mean logit-adjusted loss with the penalty, and its gradient by backpropagation."""
    inputs = [rows.features]
    for weights, biases in layers[:-1]:
        inputs.append(np.maximum(inputs[-1] @ weights + biases, 0))
    weights, biases = layers[-1]
    logits = inputs[-1] @ weights + biases + shift
    logits -= logits.max(axis=1, keepdims=True)
    powers = np.exp(logits)
    totals = powers.sum(axis=1, keepdims=True)
    losses = (rows.targets * (np.log(totals) - logits)).sum(axis=1)
    squares = sum(float(np.sum(w**2)) for w, _ in layers)
    value = float(rows.weights @ losses) + penalty / 2 * squares
    back = (powers / totals - rows.targets) * rows.weights[:, None]
    gradients = []
    for (weights, _), given in zip(reversed(layers), reversed(inputs), strict=True):
        gradients.append((given.T @ back + penalty * weights, back.sum(axis=0)))
        if given is not rows.features:
            back = (back @ weights.T) * (given > 0)
    return value, _flat(gradients[::-1])


def _folds(features: Array, labels: npt.NDArray[np.intp], number: int) -> npt.NDArray[np.int64]:
    """The fold of each row by a hash of its features; equal rows stay together in any order.

    Of each class the row with the largest hash is in no fold, -1, so that all experts see it.
    """
    positions = np.array(
        [
            int.from_bytes(hashlib.sha256(row.tobytes()).digest()[:6], "big") / 2**48
            for row in features + 0.0  # no negative zeros
        ]
    )
    largest = np.zeros(labels.max() + 1)
    np.maximum.at(largest, labels, positions)
    folds = (positions * number).astype(np.int64)
    return np.where(positions < largest[labels], folds, -1)


def _weights(given: Any, number: int) -> Array:
    if given is None:
        return np.ones(number)
    if isinstance(given, numbers.Real):
        given = np.full(number, float(given))
    weights = check_array(given, ensure_2d=False, dtype=np.float64, input_name="sample_weight")
    if weights.shape != (number,):
        raise ValueError(
            f"sample_weight must have {number} numbers, got a shape of {weights.shape}."
        )
    if weights.min() < 0 or not weights.any():
        raise ValueError(
            "sample_weight must not be negative, and at least one weight must be other than zero."
        )
    return np.asarray(weights)
