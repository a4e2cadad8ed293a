# SPDX-License-Identifier: Apache-2.0
"""Color jitter: changes of brightness, contrast, color and perhaps hue in a random order.

It follows torchvision's ColorJitter, which rounds to 8 bits after each change.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from balpoe_jax.data.device import colours
from balpoe_jax.data.device.hue import change_hue
from balpoe_jax.data.device.operations import Choose
from balpoe_jax.data.device.randomness import RowUniforms
from balpoe_jax.data.settings import AugmentSettings

# The numbers that a row needs, for `RowUniforms`.
WIDTHS = {"factors": 4, "order": 4, "jittered": 1}


def draw_jitter(uniforms: RowUniforms, settings: AugmentSettings) -> dict[str, np.ndarray]:
    """Draws what `jitter` does to each row.

    Returns:
        factors: Factors of brightness, contrast and color, float32 `[rows, 3]`.
        turn: Only with hue: turns as in `change_hue`, int16 `[rows]`.
        order: A permutation of the changes, uint8 `[rows, 3]`, or with hue `[rows, 4]`. An image
            that is not jittered has the number of changes in all places.
    """
    count = 4 if settings.hue else 3
    deviation = (2 * uniforms.many("factors") - 1).astype(np.float32)
    reach = np.array([*settings.color_jitter, settings.hue], np.float32)
    factors = np.array([1, 1, 1, 0], np.float32) + deviation * reach
    order = np.argsort(uniforms.many("order")[:, :count], axis=1)
    jittered = uniforms.many("jittered") < settings.jitter_probability
    drawn = {
        "factors": factors[:, :3],
        "order": np.where(jittered, order, count).astype(np.uint8),
    }
    if settings.hue:
        drawn["turn"] = whole_turns(factors[:, 3])
    return drawn


def whole_turns(factors: np.ndarray) -> np.ndarray:
    """Shares of the circle, float32, as int16 in 255ths, truncated as in torchvision."""
    return np.trunc(factors.astype(np.float64) * 255).astype(np.int16)


def jitter(
    pixels: jax.Array,
    drawn: dict[str, Any],
    tables: dict[str, Any],
    choose: Choose = jax.lax.switch,
) -> jax.Array:
    """Applies the changes to an image in their order.

    Args:
        pixels: Packed uint32 `[H, W]`.
        drawn: Row of what `draw_jitter` drew.
        tables: Tables of `hue_tables`; unused without hue.
        choose: Function that computes the change whose turn it is, see `operations.Choose`.
    """
    brightness, contrast, color = drawn["factors"]
    changes = [
        lambda image: colours.brightness(image, brightness),
        lambda image: colours.contrast(image, contrast),
        lambda image: colours.color(image, color),
    ]
    if "turn" in drawn:
        turn = drawn["turn"].astype(jnp.int32)
        changes.append(lambda image: change_hue(image, turn, tables))
    changes.append(lambda image: image)
    for which in drawn["order"]:
        pixels = choose(which.astype(jnp.int32), changes, pixels)
        pixels = jax.lax.optimization_barrier(pixels)
    return pixels
