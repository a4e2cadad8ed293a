# SPDX-License-Identifier: Apache-2.0
"""The operations of policies: one for each image, with numbers of its own.

Operations that differ in their numbers alone are one *kind*. On CPUs an image goes through its own
kind; accelerators compute the kinds for all images at once and choose, in a few kernels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from balpoe_jax.data.device import colours, tones
from balpoe_jax.data.device.lines import shift_lines
from balpoe_jax.data.device.moves import source_pixels
from balpoe_jax.data.device.turns import turn

Numbers = dict[str, Any]
# A packed image `[H, W]`, its numbers, the tables of the device and the packed colour outside.
_Kind = Callable[[jax.Array, Numbers, Numbers, int], jax.Array]

# As `jax.lax.switch`: the number of a branch, the branches, and the image that each takes.
Choose = Callable[[jax.Array, Sequence[Callable[[jax.Array], jax.Array]], jax.Array], jax.Array]

# The kind of each operation but those of geometry, which policies choose themselves.
KIND_OF = {
    **dict.fromkeys(("invert", "posterize", "solarize", "solarize_add"), "points"),
    **{
        name: name
        for name in ("autocontrast", "equalize", "brightness", "contrast", "color", "sharpness")
    },
}


def nearest(pixels: jax.Array, matrix: jax.Array, fill: int) -> jax.Array:
    """The pixels of `source_pixels` for an int32 `[6]`, packed `[H, W]`; `fill` outside."""
    height, width = pixels.shape
    rows, columns = source_pixels(matrix, height, width)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
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
    """What `jax.lax.switch` gives, to be mapped over images.

    A mapped switch would make a copy of every table for each image, 16 MB of autocontrast's.
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
    """Applies to an image the operation that was drawn for it.

    Args:
        pixels: Packed uint32 `[H, W]`.
        numbers: Number of the kind among `kinds`, as "kind", and what the kinds need.
        tables: Constants in device memory.
        kinds: Names of the kinds that occur.
        fill: Packed colour outside the image.
        choose: Way to compute the branch that was drawn.
    """
    branches = [
        lambda image, kind=kind: _KINDS[kind](image, numbers, tables, fill) for kind in kinds
    ]
    changed = choose(numbers["kind"].astype(jnp.int32), branches, pixels)
    # Else what follows would compute all of it again for each of the pixels that it reads.
    return jax.lax.optimization_barrier(changed)
