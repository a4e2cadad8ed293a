# SPDX-License-Identifier: Apache-2.0
"""Augmentation policies that are tables: which operations, how often, how strong.

A pair of operations is drawn for each image. Each operation runs once, on the images that drew it.
RandAugment, which is no table, has a module of its own.
"""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from balpoe_jax.data.images import batch_ops
from balpoe_jax.data.magnitudes import autoaugment_magnitudes
from balpoe_jax.data.randomness import RowRandom
from balpoe_jax.data.settings import POLICY_TABLES, Rule


class _Operation(NamedTuple):
    """An operation, and how it turns magnitudes into parameters.

    Attributes:
        apply: Function of images and float32 `[n]` parameters that returns images.
        origin, strengths, signed: Fields of `Magnitudes`.
    """

    apply: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
    origin: float
    strengths: tuple[float, ...]
    signed: bool


def _operations(height: int, width: int) -> dict[str, _Operation]:
    """The operations with the magnitudes of the reference, for images of one size."""

    def without_parameter(
        operation: Callable[[tf.Tensor], tf.Tensor],
    ) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
        return lambda images, _: operation(images)

    functions = {
        name: getattr(batch_ops, name)
        for name in (
            "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "color", "contrast",
            "sharpness", "brightness", "solarize",
        )
    }  # fmt: skip
    functions["posterize"] = lambda images, bits: batch_ops.posterize(
        images, tf.cast(bits, tf.int32)
    )
    for name in ("invert", "autocontrast", "equalize"):
        functions[name] = without_parameter(getattr(batch_ops, name))
    return {
        name: _Operation(functions[name], *magnitudes)
        for name, magnitudes in autoaugment_magnitudes(height, width).items()
    }


def apply_policy(images: tf.Tensor, random: RowRandom, name: str) -> tf.Tensor:
    """Draws a pair of the policy's operations for each image and applies it.

    Args:
        images: uint8 `[rows, H, W, 3]`, the rows of `random`.
        random: Source of the draws.
        name: Name of a policy in `POLICY_TABLES`.

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
    """Runs an operation on the selected images alone, and skips it if there are none."""
    rows = tf.where(selected)

    def run() -> tf.Tensor:
        picked = tf.ensure_shape(tf.gather_nd(images, rows), [None, *images.shape[1:]])
        changed = operation.apply(picked, tf.gather_nd(parameters, rows))
        return tf.tensor_scatter_nd_update(images, rows, changed)

    changed = tf.cond(tf.size(rows) > 0, run, lambda: images)
    return tf.ensure_shape(changed, images.shape)
