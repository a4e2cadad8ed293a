# SPDX-License-Identifier: Apache-2.0
"""The operations of policies: each image has one, with its own numbers.

Operations that differ only in their numbers are one *kind*. CPUs compute only the kind of each
image; accelerators compute all kinds for all images and choose among them, in a few kernels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from balpoe_jax.data.device import colours, tones
from balpoe_jax.data.device.lines import shift_lines
from balpoe_jax.data.device.moves import source_pixels, within
from balpoe_jax.data.device.turns import turn

Numbers = dict[str, Any]
# From a packed image `[H, W]`, its numbers, the device's tables and the packed colour outside.
_Kind = Callable[[jax.Array, Numbers, Numbers, int], jax.Array]

# Like `jax.lax.switch`: a function of a branch's number, the branches, and the image they take.
Choose = Callable[[jax.Array, Sequence[Callable[[jax.Array], jax.Array]], jax.Array], jax.Array]

# The kind of each operation except the geometric ones, whose kinds depend on the policy.
KIND_OF = {
    **dict.fromkeys(("invert", "posterize", "solarize", "solarize_add"), "points"),
    **{
        name: name
        for name in ("autocontrast", "equalize", "brightness", "contrast", "color", "sharpness")
    },
}


def nearest(pixels: jax.Array, matrix: jax.Array, fill: int) -> jax.Array:
    """Moves an image by a matrix int32 `[6]` of `source_pixels`, to the nearest pixel."""
    height, width = pixels.shape
    rows, columns = source_pixels(matrix, height, width)
    inside = within(rows, columns, height, width)
    rows, columns = jnp.clip(rows, 0, height - 1), jnp.clip(columns, 0, width - 1)
    found = pixels.reshape(-1).at[rows * width + columns].get(mode="promise_in_bounds")
    return jnp.where(inside, found, jnp.uint32(fill))


_KINDS: dict[str, _Kind] = {
    "none": lambda pixels, numbers, tables, fill: pixels,
    "nearest": lambda pixels, numbers, tables, fill: nearest(pixels, numbers["matrix"], fill),
    "turn": lambda pixels, numbers, tables, fill: turn(pixels, numbers["turn"], fill),
    "rows": lambda pixels, numbers, tables, fill: shift_lines(pixels, numbers["lines"], 1, fill),
    "columns": lambda pixels, numbers, tables, fill: shift_lines(pixels, numbers["lines"], 0, fill),
    "points": lambda pixels, numbers, tables, fill: tones.change_points(
        pixels, **{name: value.astype(jnp.int32) for name, value in numbers["points"].items()}
    ),
    "autocontrast": lambda pixels, numbers, tables, fill: tones.autocontrast(
        pixels, tables["autocontrast"]
    ),
    "equalize": lambda pixels, numbers, tables, fill: tones.equalize(pixels),
    "brightness": lambda pixels, numbers, tables, fill: colours.brightness(
        pixels, numbers["factor"]
    ),
    "contrast": lambda pixels, numbers, tables, fill: colours.contrast(pixels, numbers["factor"]),
    "color": lambda pixels, numbers, tables, fill: colours.color(pixels, numbers["factor"]),
    "sharpness": lambda pixels, numbers, tables, fill: colours.sharpness(pixels, numbers["factor"]),
}


def compute_all(
    which: jax.Array, branches: Sequence[Callable[[jax.Array], jax.Array]], pixels: jax.Array
) -> jax.Array:
    """A `Choose` that is mapped over images: computes all branches and selects one.

    A mapped `jax.lax.switch` would copy every table for each image.
    """
    return jax.lax.select_n(which, *[branch(pixels) for branch in branches])


def apply(
    pixels: jax.Array,
    numbers: Numbers,
    tables: Numbers,
    kinds: Sequence[str],
    fill: int,
    choose: Choose = jax.lax.switch,
) -> jax.Array:
    """Applies the operation that was drawn for an image.

    Args:
        pixels: Packed uint32 `[H, W]`.
        numbers: "kind", the number of the kind among `kinds`, and the numbers that the kinds need.
        tables: Constants in device memory.
        kinds: Names of the kinds that occur.
        fill: Packed colour outside the image.
        choose: Function that computes the branch that was drawn.
    """
    branches = [
        lambda image, kind=kind: _KINDS[kind](image, numbers, tables, fill) for kind in kinds
    ]
    changed = choose(numbers["kind"].astype(jnp.int32), branches, pixels)
    # Without it, what follows would compute this again for each pixel that it reads.
    return jax.lax.optimization_barrier(changed)
