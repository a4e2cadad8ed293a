# SPDX-License-Identifier: Apache-2.0
"""RandAugment as timm's `rand-n2-m10-mstd0.5`, which the reference's long recipes use.

Two of fifteen operations are drawn for each image, with replacement, and each is applied with
probability 1/2. The magnitude is normal around 10 with deviation 0.5, clipped to [0, 10]: exactly
10 in half of the cases. Geometric operations go either way, and interpolate linearly or cubically
with even odds; rotation is linear here always, where the reference draws for it too.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from balpoe_jax.data import image_ops
from balpoe_jax.data.affine import rotate_linear, shift_rows
from balpoe_jax.data.randomness import RowRandom

IMAGENET_MEAN = (124, 116, 104)

_LAYERS = 2
_PROBABILITY = 0.5
_MAGNITUDE = 10.0
_DEVIATION = 0.5
_GREATEST = 10.0


class Draw(NamedTuple):
    """What is drawn for one operation on each image.

    Attributes:
        level: float32 `[B]` in [0, 1], the magnitude over its greatest.
        sign: float32 `[B]`, 1 or -1.
        cubic: bool `[B]`, how geometric operations interpolate.
    """

    level: tf.Tensor
    sign: tf.Tensor
    cubic: tf.Tensor


Operation = Callable[[tf.Tensor, Draw], tf.Tensor]


def apply_randaugment(
    images: tf.Tensor, random: RowRandom, fill: Sequence[int] = IMAGENET_MEAN
) -> tf.Tensor:
    """Draws operations for each image and applies them, and computes no others.

    Args:
        images: uint8 `[rows, H, W, 3]`, the rows of `random`.
        random: source of the draws.
        fill: colour outside the image after a geometric operation; the reference takes ImageNet's
            mean for iNaturalist too.

    Returns:
        uint8 `[rows, H, W, 3]`.
    """
    operations: list[Operation] = [lambda images, _: images, *_operations(fill).values()]

    def one(inputs: tuple[tf.Tensor, tf.Tensor, Draw]) -> tf.Tensor:
        image, which, draws = inputs
        image = image[None]
        for layer in range(_LAYERS):
            draw = Draw(*(x[layer, None] for x in draws))
            branches = [functools.partial(operation, image, draw) for operation in operations]
            image = tf.switch_case(which[layer], branches)
        return image[0]

    # Image by image the values stay in the cache.
    return tf.map_fn(
        one,
        (images, *_draw(random, len(operations) - 1)),
        fn_output_signature=tf.TensorSpec(images.shape[1:], tf.uint8),
    )


def _draw(random: RowRandom, count: int) -> tuple[tf.Tensor, Draw]:
    """Numbers of the operations, int32 `[rows, 2]`, 0 for none, and what else they need."""
    layers = (_LAYERS,)
    which = 1 + random.uniform("operation", 0, count, tf.int32, layers)
    runs = random.uniform("gate", per_row=layers) < _PROBABILITY
    magnitude = _MAGNITUDE + _DEVIATION * random.normal("magnitude", layers)
    level = tf.clip_by_value(magnitude, 0, _GREATEST) / _GREATEST
    sign = tf.where(random.uniform("sign", per_row=layers) < 0.5, -1.0, 1.0)
    cubic = random.uniform("interpolation", per_row=layers) < 0.5
    return tf.where(runs, which, 0), Draw(level, sign, cubic)


def _operations(fill: Sequence[int]) -> dict[str, Operation]:
    """The operations with the reference's ranges, in its order."""

    def whole(draw: Draw, greatest: float) -> tf.Tensor:
        return tf.floor(draw.level * greatest)

    def factor(draw: Draw) -> tf.Tensor:
        return 0.1 + 1.8 * draw.level

    def signed(draw: Draw, greatest: float) -> tf.Tensor:
        return tf.cast(draw.sign * draw.level, tf.float64) * greatest

    def shear_x(images: tf.Tensor, draw: Draw) -> tf.Tensor:
        row = tf.range(images.shape[1], dtype=tf.float64) + 0.5
        return shift_rows(images, signed(draw, 0.3)[:, None] * row, draw.cubic, fill)

    def translate_x(images: tf.Tensor, draw: Draw) -> tf.Tensor:
        _, height, width, _ = images.shape
        shift = tf.repeat(signed(draw, 0.45 * width)[:, None], height, axis=1)
        return shift_rows(images, shift, draw.cubic, fill)

    return {
        "autocontrast": lambda images, _: image_ops.autocontrast(images),
        "equalize": lambda images, _: image_ops.equalize(images),
        "invert": lambda images, _: image_ops.invert(images),
        "rotate": lambda images, draw: rotate_linear(images, signed(draw, 30), fill),
        "posterize": lambda images, draw: image_ops.posterize(
            images, tf.cast(whole(draw, 4), tf.int32)
        ),
        "solarize": lambda images, draw: image_ops.solarize(images, whole(draw, 256)),
        "solarize_add": lambda images, draw: image_ops.solarize_add(images, whole(draw, 110)),
        "color": lambda images, draw: image_ops.color(images, factor(draw)),
        "contrast": lambda images, draw: image_ops.contrast(images, factor(draw)),
        "brightness": lambda images, draw: image_ops.brightness(images, factor(draw)),
        "sharpness": lambda images, draw: image_ops.sharpness(images, factor(draw)),
        "shear_x": shear_x,
        "shear_y": _transposed(shear_x),
        "translate_x": translate_x,
        "translate_y": _transposed(translate_x),
    }


def _transposed(operation: Operation) -> Operation:
    """The same for columns as `operation` does for rows."""

    def apply(images: tf.Tensor, draw: Draw) -> tf.Tensor:
        changed = operation(tf.transpose(images, [0, 2, 1, 3]), draw)
        return tf.transpose(changed, [0, 2, 1, 3])

    return apply
