# SPDX-License-Identifier: Apache-2.0
"""RandAugment as timm's `rand-n2-m10-mstd0.5`, which the reference's long recipes use.

For each image two of fifteen operations are drawn with replacement, and each is applied with
probability 1/2. The magnitude is normal around 10 with deviation 0.5, clipped to [0, 10], so that
it is exactly 10 in half of the cases. The number of operations and the mean magnitude are settings.
Geometric operations go either way, and interpolate linearly or cubically with even odds. Rotation
is always linear here, where the reference draws for it, too.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from balpoe_jax.data.images import packed_ops
from balpoe_jax.data.magnitudes import RANDAUGMENT_DEVIATION, RANDAUGMENT_PROBABILITY
from balpoe_jax.data.randomness import RowRandom
from balpoe_jax.data.settings import (
    IMAGENET_MEAN,
    RANDAUGMENT_GREATEST,
    RANDAUGMENT_LAYERS,
    RANDAUGMENT_MAGNITUDE,
)


class Draw(NamedTuple):
    """What is drawn for each image, one value for each of its operations in order.

    Attributes:
        which: Number of the operation from 1, int32 `[rows, layers]`; 0 for none.
        level: Magnitude over the greatest one, float32 `[rows, layers]` in [0, 1].
        sign: Direction of a geometric operation, 1 or -1, float32 `[rows, layers]`.
        cubic: Whether a geometric operation interpolates cubically, bool `[rows, layers]`.
    """

    which: tf.Tensor
    level: tf.Tensor
    sign: tf.Tensor
    cubic: tf.Tensor


Operation = Callable[[tf.Tensor, Draw], tf.Tensor]


def draw(
    random: RowRandom, layers: int = RANDAUGMENT_LAYERS, magnitude: float = RANDAUGMENT_MAGNITUDE
) -> Draw:
    """Draws the operations of all rows of `random`.

    Args:
        random: Source of the draws.
        layers: Number of operations per image; half of them are applied on average.
        magnitude: Mean of the magnitudes before clipping, from 0 to `RANDAUGMENT_GREATEST`.
    """
    shape = (layers,)
    which = 1 + random.uniform("operation", 0, len(_operations(IMAGENET_MEAN)), tf.int32, shape)
    runs = random.uniform("gate", per_row=shape) < RANDAUGMENT_PROBABILITY
    drawn = magnitude + RANDAUGMENT_DEVIATION * random.normal("magnitude", shape)
    level = tf.clip_by_value(drawn, 0, RANDAUGMENT_GREATEST) / RANDAUGMENT_GREATEST
    sign = tf.where(random.uniform("sign", per_row=shape) < 0.5, -1.0, 1.0)
    cubic = random.uniform("interpolation", per_row=shape) < 0.5
    return Draw(tf.where(runs, which, 0), level, sign, cubic)


def apply(image: tf.Tensor, drawn: Draw, fill: Sequence[int] = IMAGENET_MEAN) -> tf.Tensor:
    """Applies the operations that were drawn for one image, and computes no other.

    Args:
        image: Packed `[H, W]`, see `packed_ops`.
        drawn: Row of a `Draw`.
        fill: Colour outside the image after a geometric operation. The reference uses ImageNet's
            mean for iNaturalist, too.

    Returns:
        Packed `[H, W]`.
    """
    operations: list[Operation] = [lambda image, _: image, *_operations(fill).values()]
    for layer in range(drawn.which.shape[-1]):
        one = Draw(*(x[layer] for x in drawn))
        branches = [functools.partial(operation, image, one) for operation in operations]
        image = tf.switch_case(one.which, branches)
    return image


def _operations(fill: Sequence[int]) -> dict[str, Operation]:
    """The operations with the reference's ranges, in its order."""

    def whole(draw: Draw, greatest: float) -> tf.Tensor:
        return tf.floor(draw.level * greatest)

    def factor(draw: Draw) -> tf.Tensor:
        return 0.1 + 1.8 * draw.level

    def signed(draw: Draw, greatest: float) -> tf.Tensor:
        return tf.cast(draw.sign * draw.level, tf.float64) * greatest

    def shear(image: tf.Tensor, draw: Draw, axis: int) -> tf.Tensor:
        size = image.shape[1 - axis]
        return shift(
            image, signed(draw, 0.3) * (tf.range(size, dtype=tf.float64) + 0.5), draw, axis
        )

    def translate(image: tf.Tensor, draw: Draw, axis: int) -> tf.Tensor:
        distance = signed(draw, 0.45 * image.shape[axis])
        return shift(image, tf.fill([image.shape[1 - axis]], distance), draw, axis)

    def shift(image: tf.Tensor, shifts: tf.Tensor, draw: Draw, axis: int) -> tf.Tensor:
        along = packed_ops.shift_rows if axis else packed_ops.shift_columns
        return along(image, shifts, draw.cubic, fill)

    return {
        "autocontrast": lambda image, _: packed_ops.autocontrast(image),
        "equalize": lambda image, _: packed_ops.equalize(image),
        "invert": lambda image, _: packed_ops.invert(image),
        "rotate": lambda image, draw: packed_ops.rotate(image, signed(draw, 30), fill),
        "posterize": lambda image, draw: packed_ops.posterize(
            image, tf.cast(whole(draw, 4), tf.int32)
        ),
        "solarize": lambda image, draw: packed_ops.solarize(image, whole(draw, 256)),
        "solarize_add": lambda image, draw: packed_ops.solarize_add(image, whole(draw, 110)),
        "color": lambda image, draw: packed_ops.color(image, factor(draw)),
        "contrast": lambda image, draw: packed_ops.contrast(image, factor(draw)),
        "brightness": lambda image, draw: packed_ops.brightness(image, factor(draw)),
        "sharpness": lambda image, draw: packed_ops.sharpness(image, factor(draw)),
        "shear_x": lambda image, draw: shear(image, draw, axis=1),
        "shear_y": lambda image, draw: shear(image, draw, axis=0),
        "translate_x": lambda image, draw: translate(image, draw, axis=1),
        "translate_y": lambda image, draw: translate(image, draw, axis=0),
    }
