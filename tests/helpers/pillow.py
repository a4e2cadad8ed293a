# SPDX-License-Identifier: Apache-2.0
"""Stored results of Pillow, which `fixtures/make_*_fixtures.py` wrote, and operations by kind."""

from functools import cache

import numpy as np

from tests.helpers import FIXTURES

# AutoAugment's operations.
FREE_OF_PARAMETERS = ("invert", "autocontrast", "equalize")
PARAMETRIC = (
    "rotate", "translate_x", "translate_y", "shear_x", "shear_y", "posterize", "solarize",
    "brightness", "color", "contrast", "sharpness",
)  # fmt: skip

# RandAugment's: equal to Pillow's to the bit, and with interpolation.
EXACT = (
    "autocontrast", "equalize", "invert", "posterize", "solarize", "solarize_add", "color",
    "contrast", "brightness", "sharpness",
)  # fmt: skip
GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


@cache
def image_fixtures() -> dict[str, np.ndarray]:
    """Images and the results of AutoAugment's operations."""
    with np.load(FIXTURES / "pil_image_ops.npz", allow_pickle=False) as file:
        return dict(file)


@cache
def photo_fixtures() -> dict[str, np.ndarray]:
    """Encoded photographs, and windows of them."""
    with np.load(FIXTURES / "pil_photos.npz", allow_pickle=False) as file:
        return dict(file)


@cache
def view_fixtures() -> dict[str, np.ndarray]:
    """Images and the results of the operations of contrastive views."""
    with np.load(FIXTURES / "pil_views.npz", allow_pickle=False) as file:
        return dict(file)
