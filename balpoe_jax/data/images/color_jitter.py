# SPDX-License-Identifier: Apache-2.0
"""Color jitter: changes of brightness, contrast, color and perhaps hue in a random order.

It follows torchvision's ColorJitter on Pillow's images, which rounds to 8 bits after each change.
Hue goes through Pillow's 8-bit HSV. Pillow mixes single and double precision there, and so does
this: all 16.7 million colours come out the same.
"""

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from balpoe_jax.data.images import packed_ops
from balpoe_jax.data.randomness import RowRandom


@packed_ops.compiled
def change_hue(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Turns the hue of every pixel by a share of the circle.

    Args:
        image: Packed `[H, W]`, see `packed_ops`.
        factor: Share of the circle, float scalar from -0.5 to 0.5.

    Returns:
        Packed `[H, W]`.
    """
    hue, saturation, value = _to_hsv(*tf.unstack(packed_ops.to_float(image), axis=-1))
    # torchvision truncates the turn to 8 bits and lets the sum wrap round the circle.
    turn = tf.cast(factor, tf.float64) * 255
    hue = (hue + tf.cast(tf.cast(turn, tf.int32), tf.float64)) % 256
    return packed_ops.pack(tf.stack(_to_rgb(hue, saturation, value), axis=-1))


def _to_hsv(
    red: tf.Tensor, green: tf.Tensor, blue: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """float32 red, green and blue -> float64 hue, saturation and value; all whole, 0 to 255."""
    greatest = tf.maximum(red, tf.maximum(green, blue))
    spread = greatest - tf.minimum(red, tf.minimum(green, blue))
    saturation = tf.math.divide_no_nan(spread, greatest)
    of_red, of_green, of_blue = (
        tf.math.divide_no_nan(greatest - channel, spread) for channel in (red, green, blue)
    )
    wide_red, wide_green, wide_blue = (tf.cast(x, tf.float64) for x in (of_red, of_green, of_blue))
    sector = tf.where(
        red == greatest,
        of_blue - of_green,
        tf.where(
            green == greatest,
            tf.cast(2 + wide_red - wide_blue, tf.float32),
            tf.cast(4 + wide_green - wide_red, tf.float32),
        ),
    )
    turn = tf.cast((tf.cast(sector, tf.float64) / 6 + 1) % 1, tf.float32)
    hue = tf.where(spread > 0, tf.floor(tf.cast(turn, tf.float64) * 255), 0)
    return hue, tf.floor(tf.cast(saturation, tf.float64) * 255), tf.cast(greatest, tf.float64)


def _to_rgb(hue: tf.Tensor, saturation: tf.Tensor, value: tf.Tensor) -> list[tf.Tensor]:
    """float64 hue, saturation and value -> red, green and blue; all whole, 0 to 255."""
    position = hue * 6 / 255
    sector = tf.floor(position)
    fraction = tf.cast(position - sector, tf.float32)
    single = tf.cast(saturation / 255, tf.float32)
    share, wide = tf.cast(single, tf.float64), tf.cast(fraction, tf.float64)
    low = tf.floor(value * (1 - share) + 0.5)
    falling = tf.floor(value * (1 - tf.cast(single * fraction, tf.float64)) + 0.5)
    rising = tf.floor(value * (1 - share * (1 - wide)) + 0.5)
    sector = tf.cast(sector, tf.int32) % 6

    def choose(*by_sector: tf.Tensor) -> tf.Tensor:
        chosen = by_sector[0]
        for number, channel in enumerate(by_sector[1:], 1):
            chosen = tf.where(sector == number, channel, chosen)
        return chosen

    return [
        choose(value, falling, low, low, rising, value),
        choose(rising, value, value, falling, low, low),
        choose(low, low, rising, value, value, falling),
    ]


# Each takes a packed image and a factor; the last one is left out if hue does not change.
CHANGES: tuple[Callable[..., Any], ...] = (
    packed_ops.brightness,
    packed_ops.contrast,
    packed_ops.color,
    change_hue,
)


def draw_jitter(
    random: RowRandom, strengths: tuple[float, float, float], hue: float
) -> tuple[tf.Tensor, tf.Tensor]:
    """Draws factors and orders of the changes for all rows of `random`.

    Args:
        random: Source of the draws.
        strengths: Largest distances from 1 of the factors of brightness, contrast and color.
        hue: Largest distance from 0 of the factor of hue; 0 for no change of hue.

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
    """Applies the changes in their order.

    Args:
        image: Packed `[H, W]`, see `packed_ops`.
        factors: Factors of the first three or four of `CHANGES`, float32 `[3]` or `[4]`.
        order: Permutation of their numbers from 0, int32 of the same length.
    """
    changes = list(zip(CHANGES, tf.unstack(factors), strict=False))
    for which in tf.unstack(order):
        branches = [functools.partial(change, image, factor) for change, factor in changes]
        image = tf.switch_case(which, branches)
    return image
