# SPDX-License-Identifier: Apache-2.0
"""Configs for images of one's own: defaults that suit the size of the set, each with its reason."""

import dataclasses
import os
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
from ml_collections import ConfigDict

from balpoe_jax.config.arguments import parse_arguments
from balpoe_jax.config.dataset_defaults import (
    IMAGENET_LT,
    RECIPE_CHOICES,
    fit_trunk,
    set_method,
)
from balpoe_jax.config.resolve import default_config
from balpoe_jax.data.datasets import image_files, tfds_sets
from balpoe_jax.data.datasets.listing import Listing
from balpoe_jax.data.datasets.splitting import divide
from balpoe_jax.data.records import photographs
from balpoe_jax.errors import UserError
from balpoe_jax.methods import PRESETS
from balpoe_jax.models import CIFAR_MODELS, IMAGENET_MODELS, MOBILE_MODELS

# Files whose headers are read to choose defaults; all files are read before training.
_SAMPLE = 64

# Sides in pixels that photographs are resized to, and the number of images that a training of the
# published length sees: 180 epochs of ImageNet-LT, 200 of CIFAR-100-LT at ratio 100.
_SIDES = (224, 160, 128, 96, 64)
_SEEN = {"photographs": 20_000_000, "small images": 2_000_000}
# Factor of the learning rate where a training begins with pretrained weights.
_PRETRAINED_RATE = 0.1
_EPOCHS = (30, 200)


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """What defaults are chosen by.

    Attributes:
        class_counts: Training images of each class, int `[C]`.
        short_side: Median of the shorter side of some images, in pixels.
        side: Side of all images looked at, where they are small squares of one size; else None.
    """

    class_counts: npt.NDArray[np.int64]
    short_side: int
    side: int | None

    @property
    def num_train(self) -> int:
        """Number of training images."""
        return int(self.class_counts.sum())

    @property
    def kind(self) -> str:
        """What the images are treated as."""
        return "small images" if self.side else "photographs"


def folder_config(arguments: str | None) -> ConfigDict:
    """The experiment on image files that a config file's arguments ask for.

    Args:
        arguments: Arguments dir, list, tfds, val_list, test_list, classes, test_share,
            held_out_share, backbone, pretrained, recipe, method, mixup, experts, epochs,
            batch_size, image_size; see `configs/folder.py`.

    Raises:
        UserError (a `ValueError`): an argument that is not valid, or images that cannot be listed.
    """
    args = parse_arguments(
        arguments,
        dir="",
        list="",
        tfds="",
        val_list="",
        test_list="",
        classes="",
        test_share=image_files.TEST_SHARE,
        held_out_share=image_files.HELD_OUT_SHARE,
        backbone=("", *CIFAR_MODELS, *IMAGENET_MODELS, *MOBILE_MODELS),
        recipe=RECIPE_CHOICES[1:],  # the lengths that authors chose are for other sets
        method=tuple(PRESETS),
        mixup=bool,
        experts=0,
        epochs=0,
        batch_size=0,
        image_size=0,
        pretrained="",
    )
    if args.pretrained and args.backbone not in MOBILE_MODELS:
        raise UserError(
            f"The argument pretrained needs backbone={' or backbone='.join(MOBILE_MODELS)}."
        )
    config = default_config()
    images = _look_at_set(config, args) if args.tfds else _look_at_files(config, args)
    reasons = _set_training(config, args, images)
    set_method(config, "cifar100_lt" if images.side else "imagenet_lt", args)
    fit_trunk(config)
    config.model.pretrained = os.path.abspath(args.pretrained) if args.pretrained else None
    config.data.chosen = "; ".join(reasons)
    return config


def _place(args: SimpleNamespace) -> image_files.Place:
    if not (args.dir or args.list):
        raise UserError(
            "configs/folder.py needs images: dir=FOLDER of class folders, list=FILE of paths and "
            "labels, or tfds=NAME of a data set in TFDS."
        )
    if (args.val_list or args.test_list) and not args.list:
        raise UserError("The lists of val and test images need one of training images, list=FILE.")
    lists = {}
    if args.list:
        several = args.val_list or args.test_list
        lists = {"train" if several else "": args.list, "val": args.val_list}
        lists = {split: path for split, path in {**lists, "test": args.test_list}.items() if path}
    for share in ("test_share", "held_out_share"):
        if not 0 <= getattr(args, share) <= 0.9:
            raise UserError(
                f"The argument {share} must be from 0 to 0.9, got {getattr(args, share)}."
            )
    return image_files.Place(
        os.path.abspath(os.path.expanduser(args.dir)) if args.dir else "",
        lists,
        args.classes,
        args.test_share,
        args.held_out_share,
    )


def _sample(listing: Listing) -> list[int]:
    chosen = np.linspace(0, len(listing) - 1, min(_SAMPLE, len(listing))).round()
    return [int(i) for i in chosen]


def _train_counts(listing: Listing, args: SimpleNamespace) -> npt.NDArray[np.int64]:
    train = divide(listing, args.test_share, args.held_out_share).train
    return image_files.count(listing, train)


def _look_at_set(config: ConfigDict, args: SimpleNamespace) -> ImageSet:
    """Sets the place of a set of TFDS; its class counts and sizes, from the headers of some."""
    for other in ("list", "val_list", "test_list", "classes"):
        if getattr(args, other):
            raise UserError(f"The argument {other} belongs to image files; leave out it or tfds.")
    found = tfds_sets.open_set(args.tfds, os.path.expanduser(args.dir))
    config.data.name = f"{tfds_sets.PREFIX}{args.tfds}"
    config.data.data_dir = os.path.abspath(os.path.expanduser(args.dir)) if args.dir else None
    config.data.test_share, config.data.held_out_share = args.test_share, args.held_out_share
    counts = _train_counts(found.listing, args)
    side = None if args.image_size else found.side
    short = side or int(np.median(found.short_sides(_sample(found.listing))))
    return ImageSet(counts, short, side)


def _look_at_files(config: ConfigDict, args: SimpleNamespace) -> ImageSet:
    """Sets the place of image files; their class counts and sizes, from the headers of some."""
    place = _place(args)
    listing = place.listing()
    _set_place(config, args, place)
    counts, image_size = _train_counts(listing, args), args.image_size
    sizes = []
    for i in _sample(listing):
        try:
            with open(os.path.join(listing.root, listing.names[i]), "rb") as file:
                header = photographs.read_header(file.read())
        except (OSError, photographs.BadFile):  # named with all others when the set is checked
            continue
        sizes.append((header.height, header.width))
    if not sizes:
        return ImageSet(counts, image_size or _SIDES[0], None)
    side = sizes[0][0]
    is_small = set(sizes) == {(side, side)} and side <= image_files.SMALL and not image_size
    return ImageSet(counts, int(np.median(np.min(sizes, axis=1))), side if is_small else None)


def _set_place(config: ConfigDict, args: SimpleNamespace, place: image_files.Place) -> None:
    config.data.name = "folder"
    config.data.data_dir = place.folder or None
    config.data.lists = (
        ";".join(
            f"{split}={os.path.abspath(path)}" if split else os.path.abspath(path)
            for split, path in place.lists.items()
        )
        or None
    )
    config.data.class_names = os.path.abspath(args.classes) if args.classes else None
    config.data.test_share = place.test_share
    config.data.held_out_share = place.held_out_share


def _set_training(config: ConfigDict, args: SimpleNamespace, images: ImageSet) -> list[str]:
    """Sets what depends on the images; returns a reason for each choice."""
    counts, number = images.class_counts, images.num_train
    reasons = []
    if images.side:
        reasons.append(f"images of {images.side} x {images.side} pixels are cropped with a margin")
        config.augment.crop_padding = max(1, images.side // 8)
        config.augment.rotation = 0.0
        config.model.name = args.backbone or "resnet32"
        full_batch, rate = 128, 0.1
        config.optim.warmup_epochs = 5
    else:
        side = args.image_size or next((s for s in _SIDES if s <= images.short_side), _SIDES[-1])
        if not args.image_size:
            reasons.append(
                f"image_size={side}, the largest usual size that does not enlarge most images, "
                f"whose median short side is {images.short_side} pixels"
            )
        config.data.image_size = side
        config.data.mean, config.data.std = IMAGENET_LT.mean, IMAGENET_LT.std
        config.augment.update(crop_padding=0, rotation=0.0, color_jitter=(0.4,) * 3)
        config.model.name = args.backbone or "resnet50"
        full_batch, rate = 64, IMAGENET_LT.learning_rate
        config.optim.warmup_epochs = 0
        config.eval.batch_size = 256
    batch = args.batch_size or _batch_size(number, full_batch)
    if not args.batch_size:
        reasons.append(f"batch_size={batch}, for {number:,} training images")
    config.batch_size = batch
    config.optim.learning_rate = rate * batch / full_batch
    if args.pretrained:
        config.optim.learning_rate *= _PRETRAINED_RATE
        reasons.append(
            f"a learning rate of {config.optim.learning_rate:.3g}, a tenth for a start "
            "from pretrained weights"
        )
    config.optim.schedule, config.optim.decay_epochs = "cosine", ()
    epochs = int(np.clip(round(_SEEN[images.kind] / number), *_EPOCHS))
    epochs *= 2 if args.recipe == "long" else 1
    config.total_epochs = epochs
    if not args.epochs:
        reasons.append(
            f"epochs={epochs}, as many images as published trainings see, but from {_EPOCHS[0]} to "
            f"{_EPOCHS[1]} epochs"
        )
    low, high = _thresholds(counts)
    config.data.shot_thresholds = (low, high)
    if (low, high) == (20, 100):
        reasons.append("few is below 20 images and many above 100, as in the literature")
    else:
        reasons.append(
            f"few is below {low} images and many above {high}, a third of the classes each"
        )
    if args.recipe in ("strong", "long"):
        config.augment.policy = "autoaugment_cifar" if images.side else "randaugment"
    config.mix.alpha = 0.4 if images.side else IMAGENET_LT.mixup_alpha
    config.eval.shift_ratios = ()
    config.log_every_steps = max(1, min(100, number // batch))
    config.checkpoint.every_epochs = max(1, epochs // 20)
    return reasons


def _batch_size(number: int, full: int) -> int:
    """The usual size, halved as long as an epoch has fewer than 20 steps, but at least 8."""
    size = full
    while size > 8 and number < 20 * size:
        size //= 2
    return size


def _thresholds(counts: npt.NDArray[np.int64]) -> tuple[int, int]:
    """The literature's thresholds where all three groups have classes, and thirds otherwise.

    Classes of nearly one size are not divided into thirds.
    """
    few, many = (counts < 20).sum(), (counts > 100).sum()
    if (few and many and few + many < len(counts)) or counts.max() < 2 * counts.min():
        return 20, 100
    low, high = np.quantile(counts, [1 / 3, 2 / 3])
    return int(np.ceil(low)), max(int(high), int(np.ceil(low)))
