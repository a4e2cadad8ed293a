# SPDX-License-Identifier: Apache-2.0
"""A policy that is a table, applied to a whole batch at once with few kernels: for TPUs.

The result equals that of `TablePolicy.apply`, which works image by image, to the bit. It gets there
in another way:

- Moves decide where the data set is read. Nothing is moved afterwards.
- Other operations are computed only for the images that have them, as many at a time as a batch is
  expected to have. A loop handles any number, and nearly always runs once.
- The numbers of operations are selected instead of gathered: a TPU gathers element by element.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from balpoe_jax.data.device import colours, tones
from balpoe_jax.data.device.autoaugment import TablePolicy, Variants
from balpoe_jax.data.device.lines import NEIGHBOURS, interpolate
from balpoe_jax.data.device.moves import Positions, source_of, within
from balpoe_jax.data.device.packing import SHIFTS, channels, for_all_pixels, join

Numbers = dict[str, Any]
Read = Callable[[Positions], jax.Array]

_MOVES = ("nearest", "columns")
# After these a move may come first: they change each pixel by itself.
_BY_PIXEL = ("none", "brightness", "color", "points")


def can_apply(policy: TablePolicy) -> bool:
    """Whether `apply` supports a policy, given its moves and the operations before them."""
    first, second = policy.variants
    if {"rows", "turn"} & {*first.kinds, *second.kinds} or "columns" in second.kinds:
        return False
    if not all({"factor", "points"} <= set(own.numbers) for own in policy.variants):
        return False
    for variant, kind in enumerate(_kinds(second)):
        if kind == "nearest":
            if second.numbers["matrix"][variant, [1, 2, 4, 5]].tolist() != [1 << 16, 0, 0, 1 << 16]:
                return False  # more than a shift
            # The first operation is none, or that of the same pair.
            before = {_kinds(first)[i] for i in (0, 2 * ((variant - 1) // 2) + 1)}
            right = _shifts(second)[1][variant]
            if not before <= {*_BY_PIXEL, "nearest", "columns" if right == 0 else "nearest"}:
                return False
    return True


def apply(
    policy: TablePolicy,
    drawn: jax.Array,
    read: Read,
    tables: Numbers,
    size: tuple[int, int],
    fill: int,
) -> jax.Array:
    """Reads a batch and applies both operations of each image.

    Args:
        policy: Policy that `can_apply` accepts.
        drawn: Draws of the policy, uint8 `[B, 2]`.
        read: Function that reads pixels of the images before the policy, packed `[B, n]`.
        tables: Constants in device memory.
        size: Height and width of the images.
        fill: Packed colour outside the images.

    Returns:
        Packed `[B, H, W]`.
    """
    chosen = [drawn[:, i].astype(jnp.int32) for i in range(2)]
    pixels, outside = _read_moved(policy, chosen, read, size, fill)
    for variants, own in zip(policy.variants, chosen, strict=True):
        pixels = _change_some(pixels, own, variants, tables, size)
    if outside is not None:
        pixels = jnp.where(outside, jnp.uint32(fill), pixels)
    return pixels.reshape(-1, *size)


def _kinds(variants: Variants) -> list[str]:
    return [variants.kinds[number] for number in variants.numbers["kind"]]


def _number_of(values: np.ndarray, chosen: jax.Array) -> jax.Array:
    """Selects the values `[variants]` of the chosen variants, in the shape of `chosen`."""
    different, counts = np.unique(values, return_counts=True)
    common = different[counts.argmax()]
    found = jnp.full(chosen.shape, common)
    for value in different[different != common]:
        is_one: Any = False
        for variant in np.flatnonzero(values == value):
            is_one = is_one | (chosen == int(variant))
        found = jnp.where(is_one, value, found)
    return found


def _lines_of(table: np.ndarray, chosen: jax.Array) -> jax.Array:
    """Selects rows of a table `[variants, n]` that mostly equal the first; int32 `[B, n]`."""
    found: Any = table[:1].astype(np.int32)
    for variant in np.flatnonzero((table != table[0]).any(axis=1)):
        own = table[variant : variant + 1].astype(np.int32)
        found = jnp.where((chosen == int(variant))[:, None], own, found)
    return found


def _read_moved(
    policy: TablePolicy, chosen: list[jax.Array], read: Read, size: tuple[int, int], fill: int
) -> tuple[jax.Array, jax.Array | None]:
    """The batch after its moves, and where the second ones leave the image; `[B, H * W]`."""
    height, width = size
    first, second = policy.variants
    sheared = "columns" in first.kinds
    # Interpolation reads neighbours above and below the image.
    before, after = (-NEIGHBOURS[0], NEIGHBOURS[-1]) if sheared else (0, 0)
    all_rows = np.arange(-before, height + after, dtype=np.int32)
    rows: Any = np.repeat(all_rows, width)[None]
    columns: Any = np.tile(np.arange(width, dtype=np.int32), len(all_rows))[None]
    own = slice(before * width, (before + height) * width)
    outside, unseen, shears = None, None, None
    if "nearest" in second.kinds:
        down, right = _shifts(second)
        rows = rows + _number_of(down, chosen[1])[:, None]
        columns = columns + _number_of(right, chosen[1])[:, None]
        outside = ~within(rows, columns, height, width)[:, own]
    if sheared:
        shears = _Shears(first, chosen[0], size)
        rows, beyond = shears.move(rows, len(all_rows))
        unseen = beyond[:, own]
    if "nearest" in first.kinds:
        rows, columns = source_of(_entries(first, chosen[0]), rows, columns)
        left = ~within(rows, columns, height, width)[:, own]
        unseen = left if unseen is None else unseen | left
    shape = (len(chosen[0]), len(all_rows) * width)
    found = read((jnp.broadcast_to(rows, shape), jnp.broadcast_to(columns, shape)))
    found = jax.lax.optimization_barrier(found)
    pixels = found[:, own]
    if shears is not None:
        starts = [(before + i) * width for i in NEIGHBOURS]
        neighbours = [found[:, start : start + height * width] for start in starts]
        pixels = shears.interpolate(neighbours, pixels)
    if unseen is not None:
        pixels = jnp.where(unseen, jnp.uint32(fill), pixels)
    return pixels, outside


class _Shears:
    """The shears of columns that some images of a batch get at the first position.

    Args:
        variants: Variants of the position.
        chosen: Variant of each image, int32 `[B]`.
        size: Height and width of the images.
    """

    def __init__(self, variants: Variants, chosen: jax.Array, size: tuple[int, int]) -> None:
        self._height, width = size
        self._chosen = chosen
        kinds = np.array([kind == "columns" for kind in _kinds(variants)])
        self._sheared = _number_of(kinds, chosen)[:, None]
        self._lines = {name: leaf[:, :width] for name, leaf in variants.numbers["lines"].items()}

    def move(self, rows: Any, times: int) -> tuple[jax.Array, jax.Array]:
        """The rows that pixels are read from, and whether that is outside, `[B, times * W]`.

        Args:
            rows: Rows of the pixels in the result, int32, `times` rows of the image's width.
            times: Number of these rows.
        """
        seen = rows + self._shifts("nearest", times)
        outside = self._sheared & ((seen < 0) | (seen >= self._height))
        shifted = jnp.clip(rows + self._shifts("first", times), 0, self._height - 1)
        return jnp.where(self._sheared, shifted, rows), outside

    def interpolate(self, neighbours: list[jax.Array], pixels: jax.Array) -> jax.Array:
        """The interpolated pixels of sheared images, and the pixels of others, `[B, H * W]`."""
        weights = np.tile(self._lines["weights"], (1, self._height, 1, 1))
        of_parts = [
            [_lines_of(weights[:, :, part, i], self._chosen) for i in range(len(NEIGHBOURS))]
            for part in range(weights.shape[2])
        ]
        return jnp.where(self._sheared, interpolate(neighbours, of_parts), pixels)

    def _shifts(self, name: str, times: int) -> jax.Array:
        return _lines_of(np.tile(self._lines[name], times), self._chosen)


def _entries(variants: Variants, chosen: jax.Array) -> list[jax.Array]:
    """The entries of each image's matrix for `source_of`, int32 `[B, 1]` each."""
    return [_number_of(column, chosen)[:, None] for column in variants.numbers["matrix"].T]


def _shifts(variants: Variants) -> tuple[np.ndarray, np.ndarray]:
    """Whole rows and columns by which variants move images, int32 `[variants]`."""
    matrix = variants.numbers["matrix"]
    return matrix[:, 3] >> 16, matrix[:, 0] >> 16


def _change_some(
    pixels: jax.Array,
    chosen: jax.Array,
    variants: Variants,
    tables: Numbers,
    size: tuple[int, int],
) -> jax.Array:
    """Applies the operations that move nothing, to as many images at a time as are expected."""
    batch, kinds = len(pixels), np.array(_kinds(variants))
    # Equalizing costs most, so it has a group of its own.
    groups = [kinds == "equalize", ~np.isin(kinds, ("none", "equalize", *_MOVES))]
    sizes = [_enough(float(variants.shares[group].sum()), batch) for group in groups]
    among = [_number_of(group, chosen) for group in groups]
    numbers = [jnp.sum(own, dtype=jnp.int32) for own in among]
    # The position of each image in its group.
    earlier = np.tri(batch, k=-1, dtype=bool)
    places = [jnp.sum(own[None, :] & earlier, axis=1, dtype=jnp.int32) for own in among]

    def change(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        turn, pixels = state
        slot, start = jnp.full(batch, -1), 0
        for own, place, some in zip(among, places, sizes, strict=True):
            now = place - turn * some
            slot = jnp.where(own & (now >= 0) & (now < some), start + now, slot)
            start += some
        takes = slot[None, :] == jnp.arange(start, dtype=jnp.int32)[:, None]
        # Free places compute the first image, and their result is not used.
        source = jnp.sum(jnp.where(takes, jnp.arange(batch, dtype=jnp.int32)[None, :], 0), axis=1)
        own = jnp.sum(jnp.where(takes, chosen[None, :], 0), axis=1)
        taken = pixels.at[source.astype(jnp.uint32)].get(mode="promise_in_bounds")
        some = sizes[0]
        changed = jnp.concatenate(
            [
                _equalize(taken[:some]),
                _change(taken[some:], own[some:, None], variants, tables, size),
            ]
        )
        back = jnp.maximum(slot, 0).astype(jnp.uint32)
        back = changed.at[back].get(mode="promise_in_bounds")
        return turn + 1, jnp.where((slot >= 0)[:, None], back, pixels)

    def goes_on(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        left = [number > state[0] * some for number, some in zip(numbers, sizes, strict=True)]
        return left[0] | left[1]

    return jax.lax.while_loop(goes_on, change, (jnp.int32(0), pixels))[1]


def _enough(share: float, batch: int) -> int:
    """The number of images to change at a time: nearly always enough for all; a multiple of 8."""
    expected = share * batch
    deviation = math.sqrt(expected * (1 - share))
    return min(batch, 8 * math.ceil((expected + 3 * deviation) / 8))


def _change(
    pixels: jax.Array,
    chosen: jax.Array,
    variants: Variants,
    tables: Numbers,
    size: tuple[int, int],
) -> jax.Array:
    """Applies the operation of each image, packed `[n, H * W]`, except equalize and moves.

    Args:
        pixels: Images, packed `[n, H * W]`.
        chosen: Variant of each image, int32 `[n, 1]`.
        variants: Variants of the position.
        tables: Constants in device memory.
        size: Height and width of the images.
    """
    whole = {"kind": variants.numbers["kind"], **variants.numbers["points"]}
    numbers = [_number_of(table.astype(np.int32), chosen) for table in whole.values()]
    numbers += [_number_of(variants.numbers["factor"], chosen), colours.mean_grey(pixels)[:, None]]
    kind, *of_points, factor, grey = for_all_pixels(numbers, pixels.shape)
    points = dict(zip(variants.numbers["points"], of_points, strict=True))
    made = {
        "autocontrast": lambda: tones.stretch(pixels, tables["autocontrast"]),
        "brightness": lambda: colours.brightness(pixels, factor),
        "color": lambda: colours.color(pixels, factor),
        "contrast": lambda: colours.blend_with_grey(pixels, grey, factor),
        "points": lambda: tones.change_points(pixels, **points),
        "sharpness": lambda: colours.sharpen(pixels, factor, *size),
    }
    changed = pixels
    for number, name in enumerate(variants.kinds):
        if name in made:
            changed = jnp.where(kind == number, made[name](), changed)
    return changed


def _equalize(pixels: jax.Array) -> jax.Array:
    """`tones.equalize` of images, packed `[n, H * W]`."""
    images, size = pixels.shape
    below = tones.below_by_product(jnp.stack(channels(pixels)))
    below = jax.lax.optimization_barrier(below)
    made = join(list(tones.even_tables(below, size)))
    made, flat = jax.lax.optimization_barrier((made.reshape(-1), pixels.reshape(-1)))
    start = jnp.arange(images * size, dtype=jnp.int32) // size * 256
    red, green, blue = (
        made.at[(start + values).astype(jnp.uint32)].get(mode="promise_in_bounds") & (0xFF << shift)
        for values, shift in zip(channels(flat), SHIFTS, strict=True)
    )
    return jax.lax.optimization_barrier(red | green | blue).reshape(pixels.shape)
