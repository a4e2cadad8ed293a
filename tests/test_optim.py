# SPDX-License-Identifier: Apache-2.0
"""Schedules and the optimizer: against the reference's numbers, and against a second derivation."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from balpoe_jax.errors import UserError
from balpoe_jax.optim import learning_rates, make_optimizer, rate_of_step, swa_rates
from tests.helpers.golden import golden

PRESETS = {
    "cifar_standard": (200, 0.1, "step", (160, 180), 0.1, 5),
    "cifar_long": (400, 0.1, "step", (320, 360), 0.1, 10),
    "imagenet_standard": (180, 0.025, "cosine"),
    "custom_step": (40, 0.05, "step", (25, 33), 0.2, 3),
    "custom_nowarm": (12, 0.1, "step", (6, 9), 0.1, 0),
}


@pytest.mark.parametrize("recipe", PRESETS)
def test_schedules_are_the_references(recipe: str) -> None:
    expected = golden("schedules")[recipe]
    np.testing.assert_allclose(learning_rates(*PRESETS[recipe]), expected, rtol=1e-12)


def test_the_rate_is_constant_within_an_epoch() -> None:
    rates = learning_rates(4, 1.0, boundaries=(2,), warmup_epochs=2)
    schedule = rate_of_step(rates, steps_per_epoch=3)
    steps = [float(schedule(jnp.asarray(step))) for step in range(15)]
    expected = np.repeat([0.5, 1.0, 0.1, 0.1, 0.1], 3)  # the last one stays in force
    np.testing.assert_allclose(steps, expected, rtol=1e-6)


def test_warm_up_serves_the_cosine_too() -> None:
    plain = learning_rates(10, 2.0, "cosine")
    warm = learning_rates(10, 2.0, "cosine", warmup_epochs=4)
    np.testing.assert_allclose(warm / plain, [0.25, 0.5, 0.75, *[1.0] * 7], rtol=1e-12)


def test_warm_up_may_begin_above_zero() -> None:
    """As LADE and NCL do, from a third of the rate."""
    rates = learning_rates(7, 1.0, boundaries=(6,), warmup_epochs=5, warmup_start=1 / 3)
    expected = [(1 - t / 5) / 3 + t / 5 for t in (1, 2, 3, 4, 5)]
    np.testing.assert_allclose(rates, [*expected, 1, 0.1], rtol=1e-12)


def test_the_cosine_after_the_warm_up() -> None:
    """PaCo's, by its own formula, and BCL's, which is the one without warm-up."""
    rates = learning_rates(400, 0.05, "cosine_after_warmup", warmup_epochs=10)
    paco = [
        0.05 * (e + 1) / 10 if e < 10 else 0.025 * (1 + np.cos(np.pi * (e - 9) / (400 - 9)))
        for e in range(400)
    ]
    np.testing.assert_allclose(rates, paco, rtol=1e-9)
    bcl = [0.05 * (1 + np.cos(np.pi * (e + 1) / 91)) for e in range(90)]
    np.testing.assert_allclose(learning_rates(90, 0.1, "cosine_after_warmup"), bcl, rtol=1e-9)


def test_sgd_is_pytorchs(x64) -> None:
    """By hand: decay joins the gradient before momentum, on every parameter."""
    rate, momentum, decay = 0.1, 0.9, 0.05
    optimizer = make_optimizer(rate, momentum, True, decay)
    random = np.random.default_rng(0)
    params = {"kernel": random.normal(size=(3, 2)), "scale": random.normal(size=3)}
    ours = {name: jnp.asarray(value) for name, value in params.items()}
    state = optimizer.init(ours)
    buffers = {name: np.zeros_like(value) for name, value in params.items()}
    for _ in range(4):
        grads = {name: random.normal(size=value.shape) for name, value in params.items()}
        updates, state = optimizer.update(
            {name: jnp.asarray(grad) for name, grad in grads.items()}, state, ours
        )
        ours = optax.apply_updates(ours, updates)
        for name, grad in grads.items():
            decayed = grad + decay * params[name]
            buffers[name] = momentum * buffers[name] + decayed
            params[name] = params[name] - rate * (decayed + momentum * buffers[name])
    for name in params:
        np.testing.assert_allclose(ours[name], params[name], rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"schedule": "linear"},
            "Unknown schedule 'linear'; choose from step, cosine, cosine_after_warmup",
        ),
        ({"epochs": 0}, "epochs >= 1"),
        ({"warmup_start": 1.5}, "a warmup_start from 0 to 1"),
        ({"base_lr": float("nan")}, "base_lr >= 0"),
        ({"boundaries": (5, 3)}, "must increase"),
    ],
)
def test_refuses_what_is_not_valid(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        learning_rates(**{"epochs": 10, "base_lr": 0.1, **options})


def test_rates_of_weight_averaging_go_over_to_a_constant() -> None:
    """PyTorch's SWALR as it computes: from the rate of the step before, anneal and go on."""
    cosine = learning_rates(200, 0.1, "cosine")
    found = swa_rates(cosine, 120, 0.05, 10)
    rate, expected = cosine[120], list(cosine[:121])
    for step in range(1, 80):
        before, now = ((1 - np.cos(np.pi * min(1, max(0, t) / 10))) / 2 for t in (step - 1, step))
        start = 0.05 if before == 1 else (rate - before * 0.05) / (1 - before)
        rate = 0.05 * now + start * (1 - now)
        expected.append(rate)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert cosine[120] < 0.035 and found[130:].tolist() == [0.05] * 70
    assert swa_rates(cosine, 120, 0.05, 0)[120:123].tolist() == [cosine[120], 0.05, 0.05]
