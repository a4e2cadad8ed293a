# SPDX-License-Identifier: Apache-2.0
"""The augmentations that recipes name, as fields of a config's section.

`basic`, `rotated` and `strong` are of small images (with AutoAugment and Cutout in `strong`),
`regular`, `rand`, `stack` and `photo_similar` of photographs; `similar` and `photo_similar` are the
views of contrastive learning (SimCLR's). Photographs are cropped at random besides.
"""

from typing import Any

_JITTER = (0.4, 0.4, 0.4)

_NOTHING: dict[str, Any] = {
    "crop_padding": 0,
    "flip": True,
    "rotation": 0.0,
    "color_jitter": (0.0, 0.0, 0.0),
    "policy": "none",
    "cutout": 0,
    "crop_area": 0.0,
    "hue": 0.0,
    "jitter_probability": 1.0,
    "grayscale": 0.0,
    "blur": 0.0,
    "randaugment_layers": 2,
}
_BASIC = {**_NOTHING, "crop_padding": 4}
_REGULAR = {**_NOTHING, "color_jitter": _JITTER}
_GRAY_AND_BLUR = {"grayscale": 0.2, "blur": 0.5}
_RAND = {**_REGULAR, "policy": "randaugment"}

VIEWS: dict[str, dict[str, Any]] = {
    "basic": _BASIC,
    "rotated": {**_BASIC, "rotation": 15.0},
    "strong": {**_BASIC, "policy": "autoaugment_cifar", "cutout": 16},
    "similar": {
        **_NOTHING,
        "crop_area": 0.2,
        "color_jitter": _JITTER,
        "hue": 0.1,
        "jitter_probability": 0.8,
        **_GRAY_AND_BLUR,
    },
    "regular": _REGULAR,
    "rand": _RAND,
    "stack": {**_RAND, **_GRAY_AND_BLUR},
    "photo_similar": {**_REGULAR, **_GRAY_AND_BLUR},
}


def views(*names: str) -> dict[str, Any]:
    """The fields of a recipe whose first, second and third view are these."""
    sections = ("augment", "view2", "view3")
    return {
        field: value
        for section, name in zip(sections, names, strict=False)
        for field, value in _section(section, name).items()
    }


def either_of(first: str, second: str) -> dict[str, Any]:
    """The fields of a recipe that augments each image in one of these two ways."""
    return {**_section("augment", first), **_section("other_augment", second)}


def _section(section: str, name: str) -> dict[str, Any]:
    return {f"{section}.{field}": value for field, value in VIEWS[name].items()}
