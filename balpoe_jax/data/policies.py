# SPDX-License-Identifier: Apache-2.0
"""Augmentation policies: which operations, how often, how strong; drawn for each image.

A policy is a table; only the operations that were drawn run, each once on the images that drew it.
RandAugment, which is no table, has a module of its own.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from balpoe_jax.data import image_ops
from balpoe_jax.data.randomness import RowRandom
from balpoe_jax.data.settings import POLICY_TABLES, Rule


class _Operation(NamedTuple):
    """How an operation turns magnitudes into parameters.

    Attributes:
        apply: from images and float32 `[n]` parameters to images.
        origin: the parameter from which strengths count.
        strengths: distance from `origin` for each magnitude index.
        signed: whether the distance goes either way, with even odds.
    """

    apply: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
    origin: float
    strengths: tuple[float, ...]
    signed: bool


def _operations(height: int, width: int) -> dict[str, _Operation]:
    """The operations with the magnitudes of the reference, for images of one size."""

    def up_to(strongest: float) -> tuple[float, ...]:
        return tuple(np.linspace(0, strongest, 10))

    def without_parameter(operation: Callable[[tf.Tensor], tf.Tensor]) -> _Operation:
        return _Operation(lambda images, _: operation(images), 0, up_to(0), False)

    posterize_bits = (8, 8, 7, 7, 6, 6, 5, 5, 4, 4)
    return {
        "shear_x": _Operation(image_ops.shear_x, 0, up_to(0.3), True),
        "shear_y": _Operation(image_ops.shear_y, 0, up_to(0.3), True),
        "translate_x": _Operation(image_ops.translate_x, 0, up_to(150 / 331 * width), True),
        "translate_y": _Operation(image_ops.translate_y, 0, up_to(150 / 331 * height), True),
        "rotate": _Operation(image_ops.rotate, 0, up_to(30), False),
        "color": _Operation(image_ops.color, 1, up_to(0.9), True),
        "contrast": _Operation(image_ops.contrast, 1, up_to(0.9), True),
        "sharpness": _Operation(image_ops.sharpness, 1, up_to(0.9), True),
        "brightness": _Operation(image_ops.brightness, 1, up_to(0.9), True),
        "posterize": _Operation(
            lambda images, bits: image_ops.posterize(images, tf.cast(bits, tf.int32)),
            0,
            posterize_bits,
            False,
        ),
        "solarize": _Operation(image_ops.solarize, 256, up_to(-256), False),
        "invert": without_parameter(image_ops.invert),
        "autocontrast": without_parameter(image_ops.autocontrast),
        "equalize": without_parameter(image_ops.equalize),
    }


def apply_policy(images: tf.Tensor, random: RowRandom, name: str) -> tf.Tensor:
    """Draws a sequence of the policy for each image and applies it.

    Args:
        images: uint8 `[rows, H, W, 3]`, the rows of `random`.
        random: source of the draws.
        name: of a policy that is a table.

    Returns:
        uint8 `[rows, H, W, 3]`.
    """
    policy = POLICY_TABLES[name]
    if not policy:
        return images
    _, height, width, _ = images.shape
    operations = _operations(height, width)
    chosen = random.uniform("pair", 0, len(policy), tf.int32)
    for position in range(2):
        draws = random.stream(f"position {position}")
        rules = [pair[position] for pair in policy]
        images = _apply_rules(images, draws, rules, chosen, operations)
    return images


def _apply_rules(
    images: tf.Tensor,
    random: RowRandom,
    rules: list[Rule],
    chosen: tf.Tensor,
    operations: dict[str, _Operation],
) -> tf.Tensor:
    """Applies to each image its chosen rule, with the rule's probability."""
    names = [name for name, _, _ in rules]
    strengths = [operations[name].strengths[magnitude] for name, _, magnitude in rules]
    probability = tf.gather([probability for _, probability, _ in rules], chosen)
    runs = random.uniform("gate") < probability
    strength = tf.gather(tf.constant(strengths, tf.float32), chosen)
    sign = tf.where(random.uniform("sign") < 0.5, -1.0, 1.0)
    for name in sorted(set(names)):
        operation = operations[name]
        distance = sign * strength if operation.signed else strength
        uses = tf.gather([other == name for other in names], chosen)
        images = _apply_where(images, runs & uses, operation, operation.origin + distance)
    return images


def _apply_where(
    images: tf.Tensor, selected: tf.Tensor, operation: _Operation, parameters: tf.Tensor
) -> tf.Tensor:
    """Runs an operation on the selected images alone, and not at all when there are none."""
    rows = tf.where(selected)

    def run() -> tf.Tensor:
        picked = tf.ensure_shape(tf.gather_nd(images, rows), [None, *images.shape[1:]])
        changed = operation.apply(picked, tf.gather_nd(parameters, rows))
        return tf.tensor_scatter_nd_update(images, rows, changed)

    changed = tf.cond(tf.size(rows) > 0, run, lambda: images)
    return tf.ensure_shape(changed, images.shape)
