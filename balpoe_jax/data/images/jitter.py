# SPDX-License-Identifier: Apache-2.0
"""Color jitter: brightness, contrast, color and perhaps hue, in an order of its own for each image.

By the rule of torchvision's ColorJitter, rounded to 8 bits after each change as it does on Pillow's
images.
"""

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from balpoe_jax.data.images import packed_ops
from balpoe_jax.data.images.hue import change_hue
from balpoe_jax.data.randomness import RowRandom

# Each takes a packed image and a factor; the last one is left out where hue does not change.
CHANGES: tuple[Callable[..., Any], ...] = (
    packed_ops.brightness,
    packed_ops.contrast,
    packed_ops.color,
    change_hue,
)


def draw_jitter(
    random: RowRandom, strengths: tuple[float, float, float], hue: float
) -> tuple[tf.Tensor, tf.Tensor]:
    """Draws for all rows of `random`.

    Args:
        random: source of the draws.
        strengths: how far the factors of brightness, contrast and color are from 1 at most.
        hue: how far that of hue is from 0 at most; 0 for no change of hue.

    Returns:
        Factors float32 and orders int32, both `[rows, 3]`, or with hue `[rows, 4]`.
    """
    middle, reach = [1.0] * 3, list(strengths)
    if hue:
        middle, reach = [*middle, 0.0], [*reach, hue]
    deviation = random.uniform("factors", -1, 1, per_row=(len(reach),))
    factors = tf.constant(middle) + deviation * tf.constant(reach, tf.float32)
    return factors, tf.argsort(random.uniform("order", per_row=(len(reach),)), axis=1)


def color_jitter(image: tf.Tensor, factors: tf.Tensor, order: tf.Tensor) -> tf.Tensor:
    """Makes the changes in turn.

    Args:
        image: packed `[H, W]`, see `pixels`.
        factors: float32 `[3]` or `[4]`, of the first so many `CHANGES`.
        order: int32, a permutation of their numbers from 0.
    """
    changes = list(zip(CHANGES, tf.unstack(factors), strict=False))
    for which in tf.unstack(order):
        branches = [functools.partial(change, image, factor) for change, factor in changes]
        image = tf.switch_case(which, branches)
    return image
