# SPDX-License-Identifier: Apache-2.0
"""ProCo: its closed form against series of Bessel functions, its steps against the authors'."""

from collections import defaultdict
from fractions import Fraction
from itertools import product
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import gammaln, ive, logsumexp

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.errors import UserError
from balpoe_jax.methods import Context, Network
from balpoe_jax.methods.contrastive import ProjectedOutputs
from balpoe_jax.methods.proco import (
    DEBYE,
    ProCo,
    contrast_logits,
    log_mean_exponential,
    update_means,
)
from tests.helpers import tiny_network
from tests.helpers.config_files import get_config
from tests.helpers.golden import golden, max_relative
from tests.helpers.method_steps import STEPS_PER_EPOCH, fresh, run
from tests.helpers.tiny_network import COUNTS, numeric_gradient

RANDOM = np.random.default_rng(3)
PRIOR = np.log(COUNTS / COUNTS.sum())


def log_bessel(x: float, order: float) -> float:
    """`log(I(x) / x^order)` by the power series, of whose positive terms the largest are summed."""
    if x == 0:
        return float(-order * np.log(2) - gammaln(order + 1))
    largest, width = (np.sqrt(order**2 + x**2) - order) / 2, 50 + 20 * np.sqrt(x)
    k = np.arange(max(0, int(largest - width)), int(largest + width))
    terms = 2 * k * np.log(x / 2) - gammaln(k + 1) - gammaln(k + order + 1)
    return float(logsumexp(terms) - order * np.log(2))


def twin(kappa: float, growth: float, width: int) -> float:
    order = width / 2 - 1
    return log_bessel(np.sqrt(kappa**2 + growth), order) - log_bessel(kappa, order)


def test_the_series_is_scipys_function_where_that_is_not_zero() -> None:
    for x in (10.0, 600.0, 3e4):
        expected = np.log(ive(63, x)) + x - 63 * np.log(x)
        np.testing.assert_allclose(log_bessel(x, 63), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("width", "bits", "bound"),
    [(16, 64, 1e-6), (33, 64, 1e-8), *((w, 64, 2e-10) for w in (128, 1024))]
    + [(w, 32, 5e-6) for w in (16, 128, 1024)],
)
def test_the_mean_exponential_is_its_series(width: int, bits: int, bound: float) -> None:
    """From no concentration to the largest, in which the functions are `exp(1e5)`."""
    dtype = np.dtype(f"f{bits // 8}")
    cases = [
        (kappa, (2 * kappa * cosine + 1 / temperature) / temperature)
        for kappa in (0.0, 0.5, 30.0, 600.0, 4850.0, 1e5)
        for temperature in (0.07, 0.1)
        for cosine in (-1.0, -0.5, 0.0, 0.3, 1.0)
    ]
    with jax.enable_x64(bits == 64):
        kappa, growth = np.array(cases).T.astype(dtype)
        found = jax.jit(log_mean_exponential, static_argnums=2)(kappa, growth, width)
        assert found.dtype == dtype
    expected = [twin(float(k), float(g), width) for k, g in zip(kappa, growth, strict=True)]
    np.testing.assert_allclose(found, expected, atol=bound, rtol=0)


def test_the_polynomials_are_debyes() -> None:
    """By the recurrence of the series, and that of its logarithm, in fractions and powers of t."""
    series: list[dict[int, Fraction]] = [{0: Fraction(1)}]
    for _ in DEBYE:
        new: defaultdict[int, Fraction] = defaultdict(Fraction)
        for n, a in series[-1].items():
            new[n + 1] += a * n / 2 + a / (8 * (n + 1))
            new[n + 3] -= a * n / 2 + 5 * a / (8 * (n + 3))
        series.append(dict(new))
    logarithm: list[dict[int, Fraction]] = [{}]
    for k, (coefficients, divisor) in enumerate(DEBYE, start=1):
        total = defaultdict(Fraction, series[k])
        for j in range(1, k):
            for (n, a), (m, b) in product(logarithm[j].items(), series[k - j].items()):
                total[n + m] -= a * b * j / k
        logarithm.append(total)
        known = [Fraction(c, divisor) for c in coefficients]
        assert [total[k + 2 * i] for i in range(k + 1)] == known
        assert not any(a for n, a in total.items() if n not in range(k, 3 * k + 1, 2))


@pytest.mark.parametrize(("bits", "bound"), [(64, 1e-9), (32, 3e-6)])
@pytest.mark.parametrize("width", [128, 1024])
def test_its_gradient_is_the_ratio_of_bessel_functions(width: int, bits: int, bound: float) -> None:
    """By `x = |k m + a|` the derivative is `I_{n + 1}(x) / I_n(x)`, and by its square as much."""
    order, kappa = width / 2 - 1, np.array([0.0, 30.0, 600.0, 4850.0, 1e5])
    growth = np.full(5, 150.0)
    x = np.sqrt(kappa**2 + growth)
    ratios = [y * np.exp(log_bessel(y, order + 1) - log_bessel(y, order)) for y in np.float64(x)]
    with jax.enable_x64(bits == 64):
        function = lambda k, g: log_mean_exponential(k, g, width).sum()  # noqa: E731
        arguments = (jnp.asarray(a, f"f{bits // 8}") for a in (kappa, growth))
        found = jax.jit(jax.grad(function, 1))(*arguments)
    np.testing.assert_allclose(np.asarray(found) * 2 * x, ratios, rtol=bound)
    differences = (twin(600, 150 + 1e-3, width) - twin(600, 150 - 1e-3, width)) / 2e-3
    np.testing.assert_allclose(found[2], differences, rtol=1e-5)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def logits_twin(projections, means, temperature) -> np.ndarray:
    logits = np.empty((len(projections), len(means)))
    for c, mean in enumerate(means):
        length, width = np.linalg.norm(mean), len(mean)
        kappa = min(width * length / (1 - length**2), 1e5) if length < 1 else 1e5
        for i, projection in enumerate(projections):
            moved = kappa * mean / length + projection / temperature
            logits[i, c] = log_bessel(np.linalg.norm(moved), width / 2 - 1)
            logits[i, c] -= log_bessel(kappa, width / 2 - 1)
    return logits


def loss_twin(projections, means, temperature, labels) -> float:
    adjusted = logits_twin(projections, means, temperature) + PRIOR
    rows = np.arange(len(labels))
    return float((logsumexp(adjusted, axis=1) - adjusted[rows, labels]).mean())


@pytest.mark.integration
def test_logits_and_their_gradient_are_their_twins(x64) -> None:
    raw, labels = RANDOM.normal(size=(3, 16)), np.array([4, 0, 2])
    means = unit(RANDOM.normal(size=(5, 16))) * np.array([0.8, 0.9, 0.5, 0.1, 0.95])[:, None]
    of_one = unit(means[:1])  # a mean of one projection
    for some in (means, of_one):
        found = jax.jit(contrast_logits)(unit(raw), some, 0.2)
        np.testing.assert_allclose(found, logits_twin(unit(raw), some, 0.2), atol=1e-6)

    def loss(raw):
        projections = raw / jnp.linalg.norm(raw, axis=1, keepdims=True)
        adjusted = contrast_logits(projections, means, 0.2) + PRIOR[None]
        return -jax.nn.log_softmax(adjusted)[np.arange(3), labels].mean()

    expected = numeric_gradient(lambda x: loss_twin(unit(x), means, 0.2, labels), raw)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(raw), expected, atol=1e-6)


def test_a_mean_longer_than_one_by_rounding_has_the_largest_concentration() -> None:
    means = np.zeros((2, 16), np.float32)
    means[:, 0] = 1, np.nextafter(np.float32(1), np.float32(2))
    projections = unit(RANDOM.normal(size=(4, 16))).astype("f4")
    logits = jax.jit(contrast_logits)(projections, means, 0.1)
    np.testing.assert_allclose(logits[:, 1], logits[:, 0], rtol=1e-5)


def test_means_are_those_of_all_projections_so_far() -> None:
    first, second = unit(RANDOM.normal(size=(2, 6, 16))).astype("f4")
    labels = np.array([[0, 0, 1, 1, 1, 3], [0, 2, 2, 3, 3, 3]])
    start = unit(RANDOM.normal(size=(5, 16))).astype("f4")
    means, counts = update_means(start, np.zeros(5, "f4"), first, labels[0])
    means, counts = update_means(means, counts, second, labels[1])
    np.testing.assert_array_equal(counts, [3, 3, 2, 4, 0])
    for c in range(4):
        members = np.concatenate([first, second])[labels.ravel() == c]
        np.testing.assert_allclose(means[c], members.mean(axis=0), atol=1e-6)
    np.testing.assert_array_equal(means[4], start[4])


class Given:
    """In the place of a module: images `[B, C + P]` are logits and projections."""

    @staticmethod
    def apply(variables, images, train: bool, mutable: list[str]):
        logits, projections = images[None, :, :5], images[:, 5:] + variables["params"]
        return ProjectedOutputs(logits, logits, projections, projections[:0]), {"batch_stats": 0.0}


def steps_of(width: int) -> tuple[SimpleNamespace, ProCo, list]:
    """The losses, gradients and states of the steps that the authors' code was asked for."""
    known = SimpleNamespace(**golden(f"proco/{width}"))
    method = ProCo(temperature=float(known.temperature), width=width)
    means, zeros = np.float64(known.first_means), np.zeros(5)
    state = {"means": means, "counts": zeros, "new_means": means, "new_counts": zeros}
    context, found = Context(COUNTS, steps_per_epoch=2), []

    def loss(moves, views, labels, state, step):
        now, nothing = context.at(step), jnp.zeros((len(labels), 5))
        images = tuple(jnp.hstack([nothing, view]) for view in (views[0], *views))
        batch = TrainBatch(images, labels, labels, jnp.ones(len(labels)))
        moved = jnp.concatenate([jnp.zeros_like(moves[:1]), moves]).reshape(-1, width)
        network = Network(Given(), moved, 0.0)
        losses = method.loss(network, method.on_step_start(state, None, now), batch, now)
        return losses.terms["contrast"], losses.method_state

    step_of = jax.jit(jax.value_and_grad(loss, has_aux=True))
    for i, (labels, views) in enumerate(zip(known.labels, known.projections, strict=True)):
        views = np.float64(views)
        (value, state), gradient = step_of(np.zeros_like(views), views, labels, state, i)
        found.append((value, np.asarray(gradient), state))
    return known, method, found


def tangential(gradient: np.ndarray, views: np.ndarray) -> np.ndarray:
    """The part of a gradient across projections; what is along them ends at the normalisation."""
    return gradient - (gradient * views).sum(axis=-1, keepdims=True) * views


@pytest.mark.integration
@pytest.mark.parametrize("width", [128, 1024])
def test_steps_are_those_of_the_authors_code(width: int, x64) -> None:
    """Two epochs of two steps of the narrow one; classes come that no step before had."""
    known, method, found = steps_of(width)
    for i, (loss, gradient, state) in enumerate(found):
        views = np.float64(known.projections[i])
        np.testing.assert_allclose(loss, known.losses[i], rtol=1e-6)
        np.testing.assert_allclose(state["means"], known.means[i], atol=1e-6)
        expected = tangential(known.gradients[i], views)
        assert max_relative(tangential(gradient, views), expected) < 1e-6
        logits = jax.jit(contrast_logits)(views[1], state["means"], method.temperature)
        np.testing.assert_allclose(logits, known.logits[2 * i + 1], atol=1e-6)


@pytest.mark.integration
def test_the_classifier_is_balanced_softmax_and_weights_count() -> None:
    logits, projections = RANDOM.normal(size=(6, 5)), unit(RANDOM.normal(size=(3, 6, 16)))
    labels = np.array([0, 0, 1, 2, 3, 4])
    views = tuple(np.hstack([logits * (i == 0), p]).astype("f4") for i, p in enumerate(projections))
    batch = TrainBatch(views, labels, labels, np.ones(6, "f4"))
    method = ProCo(contrast=0.25, width=16)
    context = Context(COUNTS)
    state = method.init_state(Network(Given(), 0.0, 0.0), context, jax.random.key(0))
    np.testing.assert_allclose(np.linalg.norm(state["means"], axis=1), 0.9, rtol=1e-5)
    found = method.loss(Network(Given(), 0.0, 0.0), state, batch, context.at(0))
    adjusted = logits + PRIOR
    classified = (logsumexp(adjusted, axis=1) - adjusted[np.arange(6), labels]).mean()
    np.testing.assert_allclose(found.by_expert, [classified], rtol=1e-5)
    expected = classified + 0.25 * found.terms["contrast"]
    np.testing.assert_allclose(found.total, expected, rtol=1e-6)


@pytest.mark.integration
def test_an_epoch_begins_with_the_means_of_the_one_before() -> None:
    """The state of steps 0 to 3, two an epoch: two views a row are counted."""
    states = [state.method_state for state, _ in run("proco", "pmap", 1)]
    rows = 2 * 16
    assert [state["counts"].sum() for state in states[:4]] == [rows, 2 * rows, 3 * rows, 4 * rows]
    assert states[4]["counts"].sum() == 3 * rows  # of the second epoch and of the third
    assert [state["new_counts"].sum() for state in states[:4]] == [rows, 2 * rows] * 2
    np.testing.assert_array_equal(states[1]["means"], states[1]["new_means"])
    assert not np.array_equal(states[3]["means"], states[3]["new_means"])
    assert not fresh("proco").method_state["counts"].any() and STEPS_PER_EPOCH == 2


def test_its_own_training_is_the_published_scripts() -> None:
    config = get_config("cifar100_lt", "method=proco,ir=50")
    assert (config.optim.learning_rate, config.optim.weight_decay) == (0.3, 2e-4)
    assert (config.total_epochs, config.optim.decay_epochs) == (200, (160, 180))
    assert (config.view2.crop_area, config.view3.blur, config.augment.cutout) == (0.08, 0, 16)
    config = get_config("cifar100_lt", "method=proco,recipe=long")
    assert (config.optim.decay_epochs, config.optim.warmup_epochs) == ((360, 380), 10)
    config = get_config("imagenet_lt", "method=proco,recipe=long")
    assert (config.total_epochs, config.batch_size, config.method.width) == (180, 256, 1024)
    config = get_config("inaturalist2018", "method=proco")
    assert (config.total_epochs, config.optim.learning_rate) == (90, 0.2)


def test_its_classifier_has_tau_one_and_what_it_refuses() -> None:
    assert ProCo().expert_taus((0.5,)) == (1.0,)
    with pytest.raises(UserError, match=r"config.method.width must be from 16 to 1000000, got 8"):
        ProCo(width=8)
    with pytest.raises(UserError, match="ProCo trains one expert, got 3; leave experts alone"):
        ProCo().network(tiny_network.experts(3), Context(COUNTS))
