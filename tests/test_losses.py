# SPDX-License-Identifier: Apache-2.0
"""The losses against the reference's numbers, and the properties that the method rests on."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from balpoe_jax.errors import UserError
from balpoe_jax.losses import (
    balpoe_loss,
    equidistant_taus,
    expert_losses,
    log_prior,
    logit_adjusted_cross_entropy,
)
from tests.helpers.golden import cases, golden, max_relative

COUNTS = [500, 120, 30, 8, 2]


def random_case(*, experts: int = 3, batch: int = 6, classes: int = 5, scale: float = 3.0):
    """Logits `[E, B, C]` and labels `[B]`."""
    random = np.random.default_rng(7)
    logits = scale * random.standard_normal((experts, batch, classes))
    return jnp.asarray(logits), jnp.asarray(random.integers(0, classes, batch))


# --- the reference's numbers -------------------------------------------------------------------


def mixed_labels(case: dict[str, np.ndarray]) -> np.ndarray:
    one_hot = np.eye(len(case["class_counts"]))
    return case["lam"] * one_hot[case["labels"]] + (1 - case["lam"]) * one_hot[case["labels_b"]]


@pytest.mark.parametrize("mixup", [False, True])
@pytest.mark.parametrize(
    ("name", "dtype", "rtol"),
    # The log prior has float32 precision even here, hence no less than 1e-7.
    [(name, np.float64, 1e-7) for name in cases("balpoe")]
    + [(name, np.float32, 1e-5) for name in ("e3_inat", "e7_c100", "extreme80")],
)
def test_balpoe_loss_is_the_references(name, mixup, dtype, rtol, x64):
    case, kind = golden(f"balpoe/{name}"), "mixup" if mixup else "plain"
    labels = jnp.asarray(mixed_labels(case) if mixup else case["labels"])
    prior = log_prior(case["class_counts"], allow_empty=True)
    taus = jnp.asarray(case["taus"], jnp.float32)

    def loss_fn(logits):
        losses = expert_losses(logits, labels, prior, taus)
        return balpoe_loss(logits, labels, prior, taus).mean(), losses.mean(axis=1)

    logits = jnp.asarray(case["expert_logits"], dtype)
    (loss, by_expert), grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(logits)
    assert loss.dtype == dtype
    np.testing.assert_allclose(loss, case[f"loss_{kind}_f64"], rtol=rtol)
    np.testing.assert_allclose(by_expert, case[f"expert_losses_{kind}_f64"], rtol=rtol)
    if f"grad_{kind}" in case:
        assert max_relative(grad, case[f"grad_{kind}"]) <= 2e-5


@pytest.mark.parametrize("name", [n for n in cases("balpoe") if n != "e7_c100"])
def test_bias_is_the_references(name):
    case = golden(f"balpoe/{name}")
    prior = log_prior(case["class_counts"], allow_empty=True)
    np.testing.assert_allclose(np.outer(case["taus"], prior), case["bias"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", cases("ce"))
def test_without_tau_the_loss_is_the_references_cross_entropy(name, x64):
    case = golden(f"ce/{name}")
    prior = log_prior(np.arange(1, 11))

    def loss_fn(logits):
        return logit_adjusted_cross_entropy(logits, case["labels"], prior, 0.0).mean()

    loss, grad = jax.value_and_grad(loss_fn)(jnp.asarray(case["logits"], jnp.float64))
    np.testing.assert_allclose(loss, case["loss_f64"], rtol=1e-12)
    assert max_relative(grad, case["grad"]) <= 2e-5


def test_equidistant_taus_are_the_references():
    rows = golden("tau_lists")["tau_lists"]
    assert len(rows) > 3
    for num_experts, low, high, *taus in rows:
        actual = equidistant_taus(low, high, int(num_experts))
        np.testing.assert_allclose(actual, [t for t in taus if not np.isnan(t)], rtol=1e-15)


# --- properties --------------------------------------------------------------------------------


class LossVariants(chex.TestCase):
    """The definition, written out, with and without compilation."""

    @chex.variants(with_jit=True, without_jit=True)
    def test_definition(self):
        logits, labels = random_case()
        prior, taus = log_prior(COUNTS), equidistant_taus(-1.0, 3.0, 3)
        losses = self.variant(balpoe_loss)(logits, labels, prior, jnp.array(taus))
        chex.assert_shape(losses, (6,))
        expected = np.zeros(6)
        for tau, expert in zip(taus, np.asarray(logits, np.float64), strict=True):
            adjusted = np.exp(expert) * (np.array(COUNTS) / sum(COUNTS)) ** tau
            picked = adjusted[np.arange(6), labels]
            expected += -np.log(picked / adjusted.sum(axis=1)) / 3
        np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_without_tau_the_loss_is_plain_cross_entropy():
    logits, labels = random_case()
    actual = logit_adjusted_cross_entropy(logits[0], labels, log_prior(COUNTS), 0.0)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits[0], labels)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    soft = jax.nn.softmax(logits[1])
    actual = logit_adjusted_cross_entropy(logits[0], soft, log_prior(COUNTS), 0.0)
    np.testing.assert_allclose(actual, optax.softmax_cross_entropy(logits[0], soft), rtol=1e-6)


@pytest.mark.parametrize("tau", [-1.0, 0.5, 1.0, 3.0])
def test_a_uniform_prior_changes_nothing(tau):
    logits, labels = random_case()
    actual = logit_adjusted_cross_entropy(logits[0], labels, log_prior([7] * 5), tau)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits[0], labels)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_a_common_shift_of_the_logits_changes_nothing(x64):
    logits, labels = random_case()
    prior, taus = log_prior(COUNTS), (0.0, 1.0, 2.0)
    shift = jnp.array([-50.0, 0.5, 300.0])[:, None, None]
    shifted = balpoe_loss(logits + shift, labels, prior, taus)
    np.testing.assert_allclose(shifted, balpoe_loss(logits, labels, prior, taus), rtol=1e-12)


def test_soft_labels_are_the_mixture_of_two_labels(x64):
    logits, labels = random_case()
    prior, taus, weight = log_prior(COUNTS), (0.0, 1.0, 2.0), 0.3
    other = (labels + 2) % 5
    soft = weight * jax.nn.one_hot(labels, 5) + (1 - weight) * jax.nn.one_hot(other, 5)
    mixture = weight * balpoe_loss(logits, labels, prior, taus)
    mixture += (1 - weight) * balpoe_loss(logits, other, prior, taus)
    np.testing.assert_allclose(balpoe_loss(logits, soft, prior, taus), mixture, rtol=1e-12)


def test_the_loss_is_the_mean_over_experts():
    logits, labels = random_case()
    prior, taus = log_prior(COUNTS), (0.0, 1.0, 2.0)
    singles = [
        logit_adjusted_cross_entropy(expert, labels, prior, tau)
        for expert, tau in zip(logits, taus, strict=True)
    ]
    losses = balpoe_loss(logits, labels, prior, taus)
    np.testing.assert_allclose(losses, np.mean(singles, axis=0), rtol=1e-6)
    each = expert_losses(logits, labels, prior, taus)
    np.testing.assert_allclose(each, np.stack(singles), rtol=1e-6)


def test_one_expert_of_tau_one_is_balanced_softmax():
    logits, labels = random_case(experts=1)
    actual = balpoe_loss(logits, labels, log_prior(COUNTS), equidistant_taus(0.0, 2.0, 1))
    weighted = np.exp(np.asarray(logits[0], np.float64)) * COUNTS
    expected = -np.log(weighted[np.arange(6), labels] / weighted.sum(axis=1))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_the_products_of_experts_is_unbiased_where_the_taus_average_to_one():
    # Experts that fit log p(x|y) + (1 - tau) log pi give a mean without the prior.
    likelihood, _ = random_case(experts=1)
    prior, taus = log_prior(COUNTS), np.array(equidistant_taus(0.0, 2.0, 5))
    lambdas = (1 - taus)[:, None, None]
    ensemble = (likelihood + lambdas * np.asarray(prior)[None, None]).mean(axis=0)
    np.testing.assert_allclose(ensemble, likelihood[0], atol=1e-6)


@pytest.mark.integration
@pytest.mark.slow_cases("False")
@pytest.mark.parametrize("soft", [False, True])
def test_gradients(soft, x64):
    logits, labels = random_case()
    labels = jax.nn.softmax(logits[2]) if soft else labels
    prior = log_prior(COUNTS)
    check_grads(
        lambda x: balpoe_loss(x, labels, prior, (0.0, 1.0, 2.0)), (logits,), order=2, rtol=1e-6
    )


def test_the_gradient_is_prediction_minus_label(x64):
    logits, labels = random_case(experts=1)
    prior = log_prior(COUNTS)
    grad = jax.grad(lambda x: balpoe_loss(x, labels, prior, (2.0,)).sum())(logits)
    probabilities = jax.nn.softmax(logits + 2.0 * prior[None, None])
    expected = probabilities - jax.nn.one_hot(labels, 5)[None]
    np.testing.assert_allclose(grad, expected, atol=1e-12)


def test_taus_may_differ_by_example():
    logits, labels = random_case()
    prior, taus = log_prior(COUNTS), jnp.array([0.0, 1.0, 2.0, -1.0, 0.5, 3.0])
    together = logit_adjusted_cross_entropy(logits[0], labels, prior, taus)
    for i, tau in enumerate(taus):
        alone = logit_adjusted_cross_entropy(logits[0, i], labels[i], prior, tau)
        np.testing.assert_allclose(together[i], alone, rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("soft", [False, True])
def test_any_leading_shape(shape, soft):
    random = np.random.default_rng(1)
    logits = random.standard_normal((*shape, 5)).astype(np.float32)
    labels = random.integers(0, 5, shape)
    targets = np.eye(5, dtype=np.float32)[labels] if soft else labels
    prior = log_prior(COUNTS)
    losses = logit_adjusted_cross_entropy(logits, targets, prior, 1.0)
    assert losses.shape == shape
    flat = logit_adjusted_cross_entropy(logits.reshape(-1, 5), labels.reshape(-1), prior, 1.0)
    np.testing.assert_allclose(losses.reshape(-1), flat, rtol=1e-6)


# --- extremes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [80.0, 1e4])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("soft", [False, True])
def test_extreme_logits_stay_finite(size, dtype, soft):
    signs = np.random.default_rng(3).choice([-1.0, 0.0, 1.0], (3, 8, 5))
    logits, labels = jnp.asarray(size * signs, dtype), jnp.arange(8) % 5
    labels = jax.nn.one_hot(labels, 5) if soft else labels
    prior = log_prior([10**6, 1000, 10, 1, 1])
    losses, vjp = jax.vjp(lambda x: balpoe_loss(x, labels, prior, (-1.0, 1.0, 3.0)), logits)
    chex.assert_tree_all_finite((losses, vjp(jnp.ones_like(losses))))
    assert losses.dtype == jnp.float32
    exact = balpoe_loss(logits.astype(jnp.float32), labels, prior, (-1.0, 1.0, 3.0))
    np.testing.assert_array_equal(losses, exact)


def test_extreme_priors_stay_finite():
    prior = log_prior([10**9, 1, 0], allow_empty=True)
    np.testing.assert_allclose(prior, np.log([1.0, 2e-9, 1e-9]), rtol=1e-6, atol=1e-7)
    logits = jnp.zeros((2, 3, 3))
    losses = balpoe_loss(logits, jnp.arange(3), prior, (-1.0, 3.0))
    chex.assert_tree_all_finite(losses)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [0.0, 1e4])
@pytest.mark.parametrize("soft", [False, True])
def test_losses_and_gradients_are_finite_at_every_extreme_at_once(dtype, size, soft):
    """A class of one image in ten millions, taus from -3 to 5, and logits of both signs."""
    prior = log_prior([10_000_000 - 11, 10, 1])
    taus = equidistant_taus(-3.0, 5.0, 9)
    signs = np.array([[1, -1, 0], [-1, 1, 0], [0, -1, 1], [1, 1, 1], [-1, 0, 1], [0, 1, -1]])
    logits = jnp.broadcast_to(jnp.asarray(size * signs, dtype), (len(taus), *signs.shape))
    labels = jnp.arange(len(signs)) % 3
    if soft:  # as mixup makes them
        labels = 0.7 * jax.nn.one_hot(labels, 3) + 0.3 * jax.nn.one_hot(labels[::-1], 3)

    def total(logits):
        losses = balpoe_loss(logits, labels, prior, taus)
        return losses.sum(), losses

    gradient, losses = jax.jit(jax.grad(total, has_aux=True))(logits)
    chex.assert_tree_all_finite((losses, gradient))
    assert (losses >= 0).all()
    assert np.abs(gradient.astype(jnp.float32)).max() <= 1 / len(taus) + 1e-3
    if size:
        assert losses.max() > 1e3


def test_the_dtype_is_at_least_float32(x64):
    logits, labels = random_case()
    for given, expected in [
        (jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float32),
        (jnp.float32, jnp.float32),
        (jnp.float64, jnp.float64),
    ]:
        losses = balpoe_loss(logits.astype(given), labels, log_prior(COUNTS), (0.0, 1.0, 2.0))
        assert losses.dtype == expected


# --- errors ------------------------------------------------------------------------------------


def test_log_prior_is_float32_and_normalised():
    prior = log_prior(COUNTS)
    assert prior.dtype == jnp.float32
    chex.assert_shape(prior, (5,))
    np.testing.assert_allclose(np.exp(prior), np.array(COUNTS) / sum(COUNTS), rtol=1e-5)


def test_an_empty_class_is_refused_unless_allowed():
    with pytest.raises(ValueError, match="class 1"):
        log_prior([5, 0, 3])
    prior = log_prior([5, 0, 3], allow_empty=True)
    np.testing.assert_allclose(prior[1], np.log(1e-9), rtol=1e-6)


@pytest.mark.parametrize("counts", [[], [[1, 2]], [3, -1], [0, 0], [1.0, np.nan], [1.0, np.inf]])
def test_log_prior_refuses_what_is_no_count(counts):
    with pytest.raises(UserError):
        log_prior(counts, allow_empty=True)


@pytest.mark.parametrize(
    ("logits", "labels", "prior", "taus"),
    [
        pytest.param((3, 4, 5), (3,), (5,), (3,), id="batch"),
        pytest.param((3, 4, 5), (3, 4), (5,), (3,), id="labels for each expert"),
        pytest.param((3, 4, 5), (4,), (4,), (3,), id="classes"),
        pytest.param((3, 4, 5), (4,), (1, 5), (3,), id="prior of two dimensions"),
        pytest.param((3, 4, 5), (4,), (5,), (2,), id="taus"),
        pytest.param((3, 4, 5), (4,), (5,), (), id="scalar tau"),
        pytest.param((4, 5), (4,), (5,), (3,), id="logits without experts"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(logits, labels, prior, taus):
    with pytest.raises(ValueError, match="shape"):
        balpoe_loss(
            jnp.zeros(logits), jnp.zeros(labels, jnp.int32), jnp.zeros(prior), jnp.zeros(taus)
        )


def test_soft_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="label distributions"):
        balpoe_loss(jnp.zeros((2, 4, 5)), jnp.zeros((4, 6)), jnp.zeros(5), (0.0, 1.0))
    with pytest.raises(ValueError, match="label distributions"):
        balpoe_loss(jnp.zeros((2, 4, 5)), jnp.zeros(4), jnp.zeros(5), (0.0, 1.0))


def test_integer_logits_are_refused():
    with pytest.raises(ValueError, match="floating"):
        logit_adjusted_cross_entropy(jnp.zeros((4, 5), jnp.int32), jnp.arange(4), jnp.zeros(5), 1.0)


@pytest.mark.parametrize("label", [-1, 5, 100])
def test_a_label_out_of_range_gives_nan(label):
    loss = logit_adjusted_cross_entropy(jnp.zeros(5), jnp.array(label), log_prior(COUNTS), 1.0)
    assert np.isnan(loss)


def test_no_experts_are_refused():
    with pytest.raises(ValueError, match="num_experts"):
        equidistant_taus(0.0, 2.0, 0)
