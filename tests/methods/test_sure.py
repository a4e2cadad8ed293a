# SPDX-License-Identifier: Apache-2.0
"""SURE's preset: the numbers of its authors' scripts, and what scales with the training."""

import numpy as np
import pytest

from balpoe_jax.averages import EpochAverage
from balpoe_jax.config import resolve
from balpoe_jax.experiment.settings import learning_rates
from tests.helpers.config_files import get_config


def test_the_training_on_cifar_is_that_of_the_script() -> None:
    """In its scale of the loss, a sum: rates are half of ours, weight decay is twice ours."""
    settings = resolve(get_config("cifar100_lt", "method=sure"))
    sgd, mix = settings.optim, settings.mix
    assert (settings.total_epochs, settings.batch_size, settings.taus) == (200, 128, (0.0,))
    assert (mix.rule, mix.alpha, mix.rows_per_image) == ("mixup", 10.0, 2)
    assert (sgd.momentum, sgd.nesterov, sgd.weight_decay * 2) == (0.9, False, 5e-4)
    assert (sgd.sam, sgd.average) == (0.05, EpochAverage(120))
    assert (settings.model.classifier, settings.model.classifier_scale) == ("cosine", 8.0)
    rates = learning_rates(settings) / 2
    np.testing.assert_allclose(rates[[0, 100]], [0.1, 0.05], rtol=1e-12)
    np.testing.assert_allclose(rates[120], 0.05 * (1 + np.cos(0.6 * np.pi)), rtol=1e-12)
    np.testing.assert_allclose(rates[130:], 0.05, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "epochs", "swa"),
    [
        ("epochs=20", 20, 12),
        ("recipe=long", 400, 240),
        ("epochs=1", 1, 0),
        ("mixup=false", 200, 120),
    ],
)
def test_it_scales_with_the_training(arguments: str, epochs: int, swa: int) -> None:
    settings = resolve(get_config("cifar100_lt", f"method=sure,{arguments}"))
    assert (settings.total_epochs, settings.optim.swa, settings.optim.sam) == (epochs, swa, 0.05)
    assert settings.mix.rows_per_image == (1 if "mixup" in arguments else 2)
