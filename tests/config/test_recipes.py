# SPDX-License-Identifier: Apache-2.0
"""The recipes for photographs are those of the reference's config files."""

import pytest

from balpoe_jax.config import resolve
from balpoe_jax.config.dataset_defaults import IMAGENET_LT, INATURALIST2018, photo_config
from balpoe_jax.data.settings import AugmentSettings
from balpoe_jax.errors import UserError


@pytest.mark.parametrize(
    ("recipe", "arguments", "epochs", "batch", "rate", "decay", "taus", "alpha", "policy"),
    [
        (IMAGENET_LT, "", 180, 64, 0.025, 5e-4, (0, 1.25, 2.5), 0.3, "none"),
        (IMAGENET_LT, "recipe=long", 400, 64, 0.025, 5e-4, (0, 1.25, 2.5), 0.3, "randaugment"),
        (IMAGENET_LT, "recipe=strong", 180, 64, 0.025, 5e-4, (0, 1.25, 2.5), 0.3, "randaugment"),
        (INATURALIST2018, "", 100, 512, 0.2, 2e-4, (-1, 1, 3), 0.2, "none"),
        (INATURALIST2018, "recipe=long", 400, 512, 0.2, 2e-4, (-1, 1, 3), 0.2, "randaugment"),
    ],
)
def test_published_recipes(
    recipe, arguments, epochs, batch, rate, decay, taus, alpha, policy
) -> None:
    config = photo_config(recipe, arguments)
    resolve(config)
    assert (config.total_epochs, config.batch_size) == (epochs, batch)
    assert (config.optim.learning_rate, config.optim.weight_decay) == (rate, decay)
    assert (config.optim.schedule, config.optim.warmup_epochs) == ("cosine", 0)
    assert resolve(config).taus == taus
    assert (config.mix.alpha, config.augment.policy) == (alpha, policy)
    assert (config.model.name, config.model.num_experts) == ("resnet50", 3)
    assert (config.data.image_size, config.augment.crop_padding) == (224, 0)
    AugmentSettings(**config.augment.to_dict())


def test_colour_jitter_is_part_of_all_recipes_but_inaturalists_standard_one() -> None:
    jitters = [
        photo_config(recipe, f"recipe={name}").augment.color_jitter[0]
        for recipe in (IMAGENET_LT, INATURALIST2018)
        for name in ("standard", "strong", "long")
    ]
    assert jitters == [0.4, 0.4, 0.4, 0.0, 0.4, 0.4]


def test_one_expert_has_the_tau_of_its_method() -> None:
    assert resolve(photo_config(IMAGENET_LT, "experts=1")).taus == (1.25,)
    assert resolve(photo_config(INATURALIST2018, "method=balanced_softmax")).taus == (1,)
    assert resolve(photo_config(INATURALIST2018, "method=cross_entropy,mixup=false")).taus == (0,)


def test_the_learning_rate_follows_the_batch_size() -> None:
    config = photo_config(IMAGENET_LT, "batch_size=1024,epochs=90,backbone=resnext50")
    assert config.optim.learning_rate == pytest.approx(0.4)
    assert (config.batch_size, config.total_epochs) == (1024, 90)
    assert config.model.name == "resnext50"


@pytest.mark.parametrize("arguments", ["backbone=resnet32", "recipe=best", "ir=100", "epochs=x"])
def test_other_arguments_are_refused(arguments: str) -> None:
    with pytest.raises(UserError):
        photo_config(IMAGENET_LT, arguments)
