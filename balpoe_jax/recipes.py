# SPDX-License-Identifier: Apache-2.0
"""The published recipes for photographs as data, and the config that they make."""

import dataclasses

from ml_collections import ConfigDict

from balpoe_jax import config as config_lib
from balpoe_jax.models import IMAGENET_MODELS


@dataclasses.dataclass(frozen=True)
class PhotoRecipe:
    """How the reference trains on a data set of photographs.

    Attributes:
        name: of the data set, see `balpoe_jax.data.natural.NATURAL`.
        imbalance_ratio: of the published training set.
        mean, std: of the normalisation, by channel.
        epochs: of the standard and of the long schedule.
        batch_size, learning_rate, weight_decay: of all recipes.
        taus: ends of BalPoE's range of taus.
        mixup_alpha: of all recipes.
        color_jitter: of the standard recipe; the others have 0.4.
        shift_ratios: of the published target distributions.
    """

    name: str
    imbalance_ratio: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    epochs: tuple[int, int]
    batch_size: int
    learning_rate: float
    weight_decay: float
    taus: tuple[float, float]
    mixup_alpha: float
    color_jitter: float
    shift_ratios: tuple[float, ...]


IMAGENET_LT = PhotoRecipe(
    name="imagenet_lt",
    imbalance_ratio=256.0,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    epochs=(180, 400),
    batch_size=64,
    learning_rate=0.025,
    weight_decay=5e-4,
    # Their mean is 1.25, not 1: the reference's own setting.
    taus=(0.0, 2.5),
    mixup_alpha=0.3,
    color_jitter=0.4,
    shift_ratios=(2.0, 5.0, 10.0, 25.0, 50.0),
)

INATURALIST2018 = PhotoRecipe(
    name="i_naturalist2018",
    imbalance_ratio=500.0,
    mean=(0.466, 0.471, 0.380),
    std=(0.195, 0.194, 0.192),
    epochs=(100, 400),
    batch_size=512,
    learning_rate=0.2,
    weight_decay=2e-4,
    taus=(-1.0, 3.0),
    mixup_alpha=0.2,
    color_jitter=0.0,
    shift_ratios=(2.0, 3.0),
)


def photo_config(recipe: PhotoRecipe, arguments: str | None) -> ConfigDict:
    """The experiment on photographs that a config file's arguments ask for.

    Args:
        recipe: of the data set.
        arguments: backbone, recipe, method, mixup, experts, epochs, batch_size; see `configs/`.

    Raises:
        UserError (a `ValueError`): an argument that is not valid.
    """
    args = config_lib.parse_arguments(
        arguments,
        backbone=tuple(IMAGENET_MODELS),
        recipe=("standard", "strong", "long"),
        method=tuple(config_lib.METHODS),
        mixup=True,
        experts=0,
        epochs=0,
        batch_size=0,
    )
    strong = args.recipe != "standard"
    config = config_lib.default_config()
    config.total_epochs = args.epochs or recipe.epochs[args.recipe == "long"]
    config.batch_size = args.batch_size or recipe.batch_size
    config.log_every_steps = 100
    _set_data(config, recipe)
    config.augment.update(
        crop_padding=0,
        rotation=0.0,
        color_jitter=(0.4 if strong else recipe.color_jitter,) * 3,
        policy="randaugment" if strong else "none",
    )
    config.model.name = args.backbone
    config.mixup.alpha = recipe.mixup_alpha
    config.optim.update(
        # The linear scaling rule; at the recipe's own batch size it changes nothing.
        learning_rate=recipe.learning_rate * config.batch_size / recipe.batch_size,
        weight_decay=recipe.weight_decay,
        schedule="cosine",
        boundaries=(),
        warmup_epochs=0,
    )
    config.checkpoint.every_epochs = 1
    config_lib.set_method(config, args.method, args.experts, args.mixup, recipe.taus)
    return config


def _set_data(config: ConfigDict, recipe: PhotoRecipe) -> None:
    config.data.update(
        name=recipe.name,
        imbalance_ratio=recipe.imbalance_ratio,
        image_size=224,
        mean=recipe.mean,
        std=recipe.std,
    )
    config.eval.batch_size = 256
    config.eval.shift_ratios = recipe.shift_ratios
