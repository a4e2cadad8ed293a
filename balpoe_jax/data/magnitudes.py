# SPDX-License-Identifier: Apache-2.0
"""How policies turn magnitudes into parameters, and how often their operations run. NumPy only.

Both pipelines use these numbers: `data.images` with TensorFlow, `data.device` with JAX.
"""

from typing import NamedTuple

import numpy as np


class Magnitudes(NamedTuple):
    """How an operation of AutoAugment turns magnitudes into parameters.

    Attributes:
        origin: Parameter from which strengths count.
        strengths: Distance from `origin` for each magnitude index.
        signed: Whether the distance goes either way, with even odds.
    """

    origin: float
    strengths: tuple[float, ...]
    signed: bool


def autoaugment_magnitudes(height: int, width: int) -> dict[str, Magnitudes]:
    """The operations of AutoAugment with the reference's magnitudes, for images of one size."""

    def up_to(strongest: float) -> tuple[float, ...]:
        return tuple(np.linspace(0, strongest, 10))

    without_parameter = Magnitudes(0, up_to(0), False)
    return {
        "shear_x": Magnitudes(0, up_to(0.3), True),
        "shear_y": Magnitudes(0, up_to(0.3), True),
        "translate_x": Magnitudes(0, up_to(150 / 331 * width), True),
        "translate_y": Magnitudes(0, up_to(150 / 331 * height), True),
        "rotate": Magnitudes(0, up_to(30), False),
        "color": Magnitudes(1, up_to(0.9), True),
        "contrast": Magnitudes(1, up_to(0.9), True),
        "sharpness": Magnitudes(1, up_to(0.9), True),
        "brightness": Magnitudes(1, up_to(0.9), True),
        "posterize": Magnitudes(0, (8, 8, 7, 7, 6, 6, 5, 5, 4, 4), False),
        "solarize": Magnitudes(256, up_to(-256), False),
        "invert": without_parameter,
        "autocontrast": without_parameter,
        "equalize": without_parameter,
    }


# Probability that RandAugment applies a drawn operation, and standard deviation of its magnitude.
RANDAUGMENT_PROBABILITY = 0.5
RANDAUGMENT_DEVIATION = 0.5
