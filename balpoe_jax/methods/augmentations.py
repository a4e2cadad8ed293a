# SPDX-License-Identifier: Apache-2.0
"""Augmentations that several presets use, by name, as fields of a config's sections.

`basic`, `rotated`, `strong` (with AutoAugment and Cutout) and `similar` are for small images,
`regular`, `rand`, `stack`, `photo_similar` and `photo_turned` for photographs. `similar` and the
last two are SimCLR's views for contrastive learning; `photo_turned` changes the hue and does not
blur. Photographs are also cropped at random.
"""

import dataclasses
from typing import Any

from balpoe_jax.data.settings import AugmentSettings

_JITTER = (0.4, 0.4, 0.4)

VIEWS = {
    "basic": AugmentSettings(flip=True, crop_padding=4),
    "rotated": AugmentSettings(flip=True, crop_padding=4, rotation=15.0),
    "strong": AugmentSettings(flip=True, crop_padding=4, policy="autoaugment_cifar", cutout=16),
    "similar": AugmentSettings(
        flip=True,
        crop_area=0.2,
        color_jitter=_JITTER,
        hue=0.1,
        jitter_probability=0.8,
        grayscale=0.2,
        blur=0.5,
    ),
    "regular": AugmentSettings(flip=True, color_jitter=_JITTER),
    "rand": AugmentSettings(flip=True, color_jitter=_JITTER, policy="randaugment"),
    "stack": AugmentSettings(
        flip=True, color_jitter=_JITTER, policy="randaugment", grayscale=0.2, blur=0.5
    ),
    "photo_similar": AugmentSettings(flip=True, color_jitter=_JITTER, grayscale=0.2, blur=0.5),
    "photo_turned": AugmentSettings(
        flip=True, color_jitter=_JITTER, hue=0.1, jitter_probability=0.8, grayscale=0.2
    ),
}


def views(*names: str) -> dict[str, Any]:
    """The fields of a preset with these augmentations of the first, second and third view."""
    sections = ("augment", "view2", "view3")
    return {
        field: value
        for section, name in zip(sections, names, strict=False)
        for field, value in _section(section, name).items()
    }


def either_of(first: str, second: str) -> dict[str, Any]:
    """The fields of a preset that augments each image in one of these two ways."""
    return {**_section("augment", first), **_section("other_augment", second)}


def _section(section: str, name: str) -> dict[str, Any]:
    return {f"{section}.{field}": value for field, value in dataclasses.asdict(VIEWS[name]).items()}
