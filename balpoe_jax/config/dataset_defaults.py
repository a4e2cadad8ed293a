# SPDX-License-Identifier: Apache-2.0
"""BalPoE's recipes for each data set, and the configs that a config file's arguments ask for.

A config starts from BalPoE's training. The preset of a method, which `balpoe_jax.methods` holds,
changes it.
"""

import dataclasses
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from balpoe_jax.config.arguments import parse_arguments
from balpoe_jax.config.resolve import AUGMENTATIONS, default_config, section_config
from balpoe_jax.config.settings import Phase2Settings
from balpoe_jax.methods import METHODS, PRESETS, scaled_fields
from balpoe_jax.models import CIFAR_MODELS, IMAGENET_MODELS, MOBILE_MODELS, efficientnet

# Values of the argument `recipe`, for schedule and augmentation: the method's own, or one of
# BalPoE's, with which all methods can be compared.
RECIPE_CHOICES = ("own", "standard", "strong", "long")

# The fields of a preset that scale with the length of the training. So do the schedule of `optim`
# and a method's own fields, which are marked where they stand. How a trained model is evaluated
# does not depend on how long it was trained.
_SCALED = (
    "mix.first_epoch",
    "mix.last_epoch",
    "optim.swa",
    "optim.swa_anneal_epochs",
    "phase2.epochs",
    "phase2.decay_epochs",
    "phase2.warmup_epochs",
)

# The reference's recipes for CIFAR: epochs, decay epochs, warm-up epochs, and whether images are
# augmented strongly (AutoAugment) instead of rotated.
CIFAR_SCHEDULES = {
    "standard": (200, (160, 180), 5, False),
    "strong": (200, (160, 180), 5, True),
    "long": (400, (320, 360), 10, True),
}


@dataclasses.dataclass(frozen=True)
class DatasetDefaults:
    """How the reference trains on a data set of photographs.

    Attributes:
        name: Name of the data set, see `balpoe_jax.data.datasets.photos.PHOTO_DATASETS`.
        argument: Name of the data set in the presets of methods.
        imbalance_ratio: Imbalance ratio of the published training set.
        mean, std: Mean and deviation of the normalisation, by channel.
        epochs: Numbers of epochs of the standard and of the long schedule.
        batch_size, learning_rate, weight_decay: Settings of all recipes.
        taus: Ends of BalPoE's range of taus.
        mixup_alpha: Parameter of mixup in all recipes.
        color_jitter: Strength of colour jitter in the standard recipe; the others have 0.4.
        shift_ratios: Imbalance ratios of the published target distributions.
    """

    name: str
    argument: str
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


IMAGENET_LT = DatasetDefaults(
    name="imagenet_lt",
    argument="imagenet_lt",
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

INATURALIST2018 = DatasetDefaults(
    name="i_naturalist2018",
    argument="inaturalist2018",
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


def cifar_config(name: str, mixup_alpha: float, arguments: str | None) -> ConfigDict:
    """The experiment on a long-tailed CIFAR that a config file's arguments ask for.

    Args:
        name: Name of the data set, "cifar10" or "cifar100".
        mixup_alpha: Parameter of mixup in the data set's recipes.
        arguments: Arguments ir, recipe, method, mixup, experts, backbone, width, epochs; see
            `configs/`.

    Raises:
        UserError (a `ValueError`): an argument that is not valid.
    """
    args = parse_arguments(
        arguments,
        ir=(100, 50, 10),
        recipe=RECIPE_CHOICES,
        method=tuple(PRESETS),
        mixup=bool,
        experts=0,
        backbone=("resnet32", *(model for model in CIFAR_MODELS if model != "resnet32")),
        width=0,
        epochs=0,
    )
    config = default_config()
    config.data.name = name
    config.data.imbalance_ratio = float(args.ir)
    config.model.name = args.backbone
    config.mix.alpha = mixup_alpha
    _set_cifar_schedule(config, "standard" if args.recipe == "own" else args.recipe)
    set_method(config, f"{name}_lt", args, f"ir={args.ir}")
    if args.width:
        config.model.width = args.width
    return config


def set_method(
    config: ConfigDict,
    dataset: str,
    args: SimpleNamespace,
    *arguments: str,
    balpoe_taus: tuple[float, float] = (0.0, 2.0),
) -> None:
    """Turns a config that holds BalPoE's training into that of another method.

    Args:
        config: Config with a data set, its mixup and one of BalPoE's recipes; changed in place.
        dataset: Name of the data set in `Preset.on`.
        args: Namespace of `method`, one of `PRESETS`; `recipe`, one of `RECIPE_CHOICES`; `experts`,
            0 for the method's own number; `mixup`, None for the method's own way; `epochs`, to
            which the training is scaled, 0 for its own length.
        *arguments: Arguments that `Preset.own` takes after the data set.
        balpoe_taus: Ends of BalPoE's range, which depend on the data set.
    """
    preset = PRESETS[args.method]
    config.method = section_config(preset.method)
    config.model.num_experts = args.experts or preset.experts
    config.loss.taus = preset.taus or balpoe_taus
    alpha = config.mix.alpha
    if not preset.mixup:
        config.mix.alpha = 0.0
    own_long = f"{dataset}:recipe=long" in preset.on and args.recipe == "long"
    fields = preset.own(dataset, *arguments, *(["recipe=long"] if own_long else []))
    own_epochs = fields.get("total_epochs", preset.epochs)
    if args.recipe != "own" and not own_long:
        fields = {name: value for name, value in fields.items() if not _is_of_schedule(name)}
    _set_fields(config, fields)
    for number in range(2, preset.method.views + 1):
        if f"view{number}" not in config:  # the preset says nothing of it: as the first view
            config[f"view{number}"] = config.augment.copy_and_resolve_references()
    if args.mixup is not None:
        config.mix.alpha = (config.mix.alpha or alpha) if args.mixup else 0.0
    _scale_epochs(config, fields, own_epochs, args.epochs or config.total_epochs)


def fit_trunk(config: ConfigDict) -> None:
    """Adapts a finished config to a trunk that is no ResNet.

    Methods narrow or share the stages of a ResNet, which are others. The published weights of a
    trunk go with their own normalisation of images.

    Args:
        config: Config of photographs; changed in place.
    """
    if config.model.name not in MOBILE_MODELS:
        return
    config.model.reduce_dimension = False
    if (config.model.shared_stages or 0) > 0:
        config.model.shared_stages = None
    config.data.mean, config.data.std = efficientnet.MEAN, efficientnet.STD


def _is_of_schedule(field: str) -> bool:
    """Whether a field is one of those that BalPoE's recipes set for all methods.

    What a method does to gradients and weights is its own, but not a rate that fits other rates.
    """
    if field in ("optim.sam", "optim.ema", "optim.swa"):
        return False
    return field in ("total_epochs", "batch_size") or field.startswith(
        ("optim.", "augment.", "other_augment.")
    )


def _set_fields(config: ConfigDict, fields: Mapping[str, Any]) -> None:
    for field, value in fields.items():
        section, _, name = field.rpartition(".")
        if section == "phase2" and section not in config:
            config.phase2 = section_config(Phase2Settings())
        if section in AUGMENTATIONS and section not in config:
            config[section] = default_config().augment
        part = config[section] if section else config
        if name not in part:
            raise KeyError(f"The preset's field {field} is none of a config.")
        part[name] = value


def _scale_epochs(
    config: ConfigDict, fields: Mapping[str, Any], own_epochs: int, epochs: int
) -> None:
    """Sets the length of the training, and scales the epochs that the preset sets with it."""
    scale = epochs / config.total_epochs
    config.total_epochs = epochs
    config.optim.decay_epochs = tuple(round(x * scale) for x in config.optim.decay_epochs)
    config.optim.warmup_epochs = round(config.optim.warmup_epochs * scale)
    of_method = [f"method.{name}" for name in scaled_fields(METHODS[config.method.name])]
    for field in (*of_method, *(name for name in _SCALED if name in fields)):
        section, _, name = field.rpartition(".")
        config[section][name] = _scaled(config[section][name], epochs / own_epochs)
    if config.optim.swa is not None:  # and at least one epoch is left for it
        config.optim.swa = min(config.optim.swa, epochs - 1)


def _scaled(value: Any, scale: float) -> Any:
    if isinstance(value, tuple):
        return tuple(_scaled(each, scale) for each in value)
    return max(1, round(value * scale)) if value else value


def _set_cifar_schedule(config: ConfigDict, recipe: str) -> None:
    """Sets the schedule and augmentation of one of `CIFAR_SCHEDULES`."""
    epochs, decay_epochs, warmup, strong = CIFAR_SCHEDULES[recipe]
    config.total_epochs = epochs
    config.optim.decay_epochs = decay_epochs
    config.optim.warmup_epochs = warmup
    if strong:
        config.augment.rotation = 0.0
        config.augment.policy = "autoaugment_cifar"


def photo_config(defaults: DatasetDefaults, arguments: str | None) -> ConfigDict:
    """The experiment on photographs that a config file's arguments ask for.

    Args:
        defaults: Defaults of the data set.
        arguments: Arguments backbone, recipe, method, mixup, experts, epochs, batch_size; see
            `configs/`.

    Raises:
        UserError (a `ValueError`): an argument that is not valid.
    """
    args = parse_arguments(
        arguments,
        backbone=(*IMAGENET_MODELS, *MOBILE_MODELS),
        recipe=RECIPE_CHOICES,
        method=tuple(PRESETS),
        mixup=bool,
        experts=0,
        epochs=0,
        batch_size=0,
    )
    strong = args.recipe in ("strong", "long")
    config = default_config()
    config.total_epochs = defaults.epochs[args.recipe == "long"]
    config.batch_size = defaults.batch_size
    config.log_every_steps = 100
    _set_data(config, defaults)
    config.augment.update(
        crop_padding=0,
        rotation=0.0,
        color_jitter=(0.4 if strong else defaults.color_jitter,) * 3,
        policy="randaugment" if strong else "none",
    )
    config.model.name = args.backbone
    config.mix.alpha = defaults.mixup_alpha
    config.optim.update(
        learning_rate=defaults.learning_rate,
        weight_decay=defaults.weight_decay,
        schedule="cosine",
        decay_epochs=(),
        warmup_epochs=0,
    )
    config.checkpoint.every_epochs = 1
    backbone = f"backbone={args.backbone}"
    set_method(config, defaults.argument, args, backbone, balpoe_taus=defaults.taus)
    if args.batch_size:  # with the linear scaling rule
        config.optim.learning_rate *= args.batch_size / config.batch_size
        config.batch_size = args.batch_size
    fit_trunk(config)
    return config


def _set_data(config: ConfigDict, defaults: DatasetDefaults) -> None:
    config.data.update(
        name=defaults.name,
        imbalance_ratio=defaults.imbalance_ratio,
        image_size=224,
        mean=defaults.mean,
        std=defaults.std,
    )
    config.eval.batch_size = 256
    config.eval.shift_ratios = defaults.shift_ratios
