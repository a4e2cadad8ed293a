# SPDX-License-Identifier: Apache-2.0
"""Crops, flip and rotation, which read every pixel of a batch from the data set once.

The host turns windows and angles into whole numbers, in float64 like Pillow.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from balpoe_jax.data.device.packing import as_packed, channels, join, unpack
from balpoe_jax.data.device.randomness import RowUniforms, whole
from balpoe_jax.data.settings import AugmentSettings

_FRACTION_BITS = 16
_WEIGHT_BITS = 22
_TRIES = 10
_LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))

# Rows and columns.
Positions = tuple[jax.Array, jax.Array]

# The numbers that a row needs, for `RowUniforms`.
WIDTHS = {
    "area": _TRIES,
    "ratio": _TRIES,
    "position": 2,
    "top": 1,
    "left": 1,
    "flip": 1,
    "degrees": 1,
}


def draw_moves(
    uniforms: RowUniforms, settings: AugmentSettings, height: int, width: int
) -> dict[str, np.ndarray]:
    """Draws what `read_moved` does to each row.

    Returns:
        Those of the following that the settings ask for.
            window: Top, left, height and width, int16 `[rows, 4]`.
            top, left: Corner of the crop, int16 `[rows]`, from minus to plus the padding.
            flip: Whether to mirror left and right, bool `[rows]`.
            matrix: Rotation, int32 `[rows, 6]`, see `rotation_matrices`.
    """
    drawn = {}
    if settings.crop_area:
        drawn["window"] = _random_windows(uniforms, settings.crop_area, height, width)
    if padding := settings.crop_padding:
        for name in ("top", "left"):
            corner = whole(uniforms.one(name), 2 * padding + 1) - padding
            drawn[name] = corner.astype(np.int16)
    if settings.flip:
        drawn["flip"] = uniforms.one("flip") < 0.5
    if settings.rotation:
        degrees = (2 * uniforms.one("degrees") - 1) * settings.rotation
        drawn["matrix"] = rotation_matrices(degrees, height, width)
    return drawn


def rotation_matrices(degrees: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pillow's fixed-point matrices of counter-clockwise rotations about the centre.

    Args:
        degrees: Angles, float64 `[rows]`.
        height, width: Size of the images.

    Returns:
        int32 `[rows, 6]` for `source_pixels`.
    """
    return fixed_point(inverse_rotations(degrees, height, width))


def inverse_rotations(degrees: np.ndarray, height: int, width: int) -> list[np.ndarray]:
    """Matrices `(a, b, c, d, e, f)` from output to input points, six float64 `[rows]`.

    The entries are rounded to 15 decimals, as Pillow does before it computes the offsets.
    """
    radians = -np.asarray(degrees, np.float64) * (math.pi / 180)
    cosine, sine = np.round(np.cos(radians) * 1e15) / 1e15, np.round(np.sin(radians) * 1e15) / 1e15
    center_x, center_y = width / 2, height / 2
    offset_x = cosine * -center_x + sine * -center_y + center_x
    offset_y = -sine * -center_x + cosine * -center_y + center_y
    return [cosine, sine, offset_x, -sine, cosine, offset_y]


def fixed_point(matrix: list[np.ndarray]) -> np.ndarray:
    """Matrices of six float64 `[rows]` in 16.16 fixed point, int32 `[rows, 6]`.

    They start at the centre of the first pixel, and have the order of `source_pixels`.
    """
    a, b, c, d, e, f = matrix
    entries = np.stack([c + a * 0.5 + b * 0.5, a, b, f + d * 0.5 + e * 0.5, d, e], axis=-1)
    return np.floor(entries * 2**_FRACTION_BITS + 0.5).astype(np.int32)


def source_pixels(matrix: jax.Array, height: int, width: int) -> Positions:
    """Nearest input pixel of every output pixel.

    Args:
        matrix: Matrices int32 `[..., 6]` in 16.16 fixed point: the input column at the first pixel,
            its increase from column to column and from row to row, and the same for the input row.
        height, width: Size of the images.

    Returns:
        Rows and columns, int32 `[..., H, W]`.
    """
    entries = [matrix[..., i, None, None] for i in range(6)]
    return source_of(entries, *_all_pixels(matrix.ndim - 1, height, width))


def source_of(entries: Sequence[jax.Array], rows: jax.Array, columns: jax.Array) -> Positions:
    """`source_pixels` of given output pixels.

    Args:
        entries: The six entries of a matrix, int32.
        rows, columns: Output pixels, int32, of a shape that broadcasts with the entries.
    """
    start_x, x_by_column, x_by_row, start_y, y_by_column, y_by_row = entries
    found_columns = (start_x + x_by_column * columns + x_by_row * rows) >> _FRACTION_BITS
    found_rows = (start_y + y_by_column * columns + y_by_row * rows) >> _FRACTION_BITS
    return found_rows, found_columns


def within(rows: jax.Array, columns: jax.Array, height: int, width: int) -> jax.Array:
    """Whether positions lie within an image, bool."""
    return (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)


def _all_pixels(batch_dims: int, height: int, width: int) -> Positions:
    """Rows and columns of all pixels of an image, int32 `[..., H, 1]` and `[..., 1, W]`."""
    ahead = [1] * batch_dims
    rows = jnp.arange(height, dtype=jnp.int32).reshape([*ahead, height, 1])
    return rows, jnp.arange(width, dtype=jnp.int32).reshape([*ahead, 1, width])


def read_moved(
    images: jax.Array, index: jax.Array, drawn: dict[str, Any], shown: Positions | None = None
) -> jax.Array:
    """Reads images from the data set, cropped, mirrored and rotated.

    Args:
        images: Packed uint32 `[N, H, W]`, or uint8 `[N, H, W, 3]`.
        index: Positions of the images, int32 `[B]`.
        drawn: Draws of `draw_moves`, as arrays of `B` rows.
        shown: Pixels of the result to read, int32 `[B, n]`; positions outside of the image give any
            value. None for all pixels.

    Returns:
        Packed `[B, H, W]` or uint8 `[B, H, W, 3]`, in the form of the images. With `shown` it is
        `[B, n]` or `[B, n, 3]`.
    """
    if "window" in drawn:
        enlarged = _enlarge(images, index, drawn["window"].astype(jnp.int32))
        rest = {name: leaf for name, leaf in drawn.items() if name != "window"}
        own = jnp.arange(len(index), dtype=jnp.int32)
        moved = _read(enlarged, own, rest, shown)
        return moved if images.dtype == jnp.uint32 else unpack(moved)
    return _read(images, index, drawn, shown)


def _read(
    images: jax.Array, index: jax.Array, drawn: dict[str, Any], shown: Positions | None
) -> jax.Array:
    """`read_moved` without windows, for uint8 `[N, H, W, 3]` or packed `[N, H, W]`."""
    if not drawn and shown is None:
        return images.at[index].get(mode="promise_in_bounds")
    height, width = images.shape[1:3]
    inside = None
    rows, columns = _all_pixels(1, height, width) if shown is None else shown

    def across(leaf: jax.Array) -> jax.Array:
        """One number for each image, in a shape that broadcasts to the positions."""
        return leaf.reshape([-1] + [1] * (rows.ndim - 1))

    if "matrix" in drawn:
        matrix = drawn["matrix"]
        rows, columns = source_of([across(matrix[:, i]) for i in range(6)], rows, columns)
        # Pixels that the crop cut off are black, too.
        inside = within(rows, columns, height, width)
    if "flip" in drawn:
        columns = jnp.where(across(drawn["flip"]), width - 1 - columns, columns)
    if "top" in drawn:
        rows = rows + across(drawn["top"].astype(jnp.int32))
        columns = columns + across(drawn["left"].astype(jnp.int32))
        found = within(rows, columns, height, width)
        inside = found if inside is None else inside & found
    if inside is not None or shown is not None:
        rows, columns = jnp.clip(rows, 0, height - 1), jnp.clip(columns, 0, width - 1)
    # Unsigned, or else every index is tested for being negative.
    where = tuple(x.astype(jnp.uint32) for x in (across(index), rows, columns))
    pixels = images.at[where].get(mode="promise_in_bounds")
    if inside is None:
        return pixels
    inside = inside.reshape([*inside.shape, *[1] * (pixels.ndim - inside.ndim)])
    return jnp.where(inside, pixels, jnp.zeros((), pixels.dtype))


def _random_windows(
    uniforms: RowUniforms, least_area: float, height: int, width: int
) -> np.ndarray:
    """Windows by the rule of torchvision's RandomResizedCrop, int16 `[rows, 4]`.

    The share of the area is uniform from the least one to 1, the logarithm of width / height
    between those of 3/4 and 4/3. The first of ten tries that fits is taken, at a uniform position.
    If none fits, it is the largest central window whose ratio is within these bounds.
    """
    area = (least_area + uniforms.many("area") * (1 - least_area)) * (height * width)
    low, high = _LOG_RATIO
    spread = np.exp(low + uniforms.many("ratio") * (high - low))
    tries = np.rint(np.sqrt(np.stack([area / spread, area * spread], axis=-1)))
    size = np.array([height, width])
    fits = np.all((tries > 0) & (tries <= size), axis=-1)
    drawn = tries[np.arange(len(tries)), fits.argmax(axis=1)]
    corner = np.floor(uniforms.many("position") * (size - drawn + 1))
    extent = np.array(
        [
            np.rint(width / 0.75) if width < 0.75 * height else height,
            np.rint(height * 4 / 3) if width > 4 / 3 * height else width,
        ]
    )
    central = np.concatenate([np.floor((size - extent) / 2), extent])
    window = np.concatenate([corner, drawn], axis=1)
    return np.where(np.any(fits, axis=1, keepdims=True), window, central).astype(np.int16)


def _enlarge(images: jax.Array, index: jax.Array, windows: jax.Array) -> jax.Array:
    """Windows int32 `[B, 4]` of images, enlarged to the size of an image, the width first.

    Each pixel is a mean of two by two, with Pillow's weights.
    """
    height, width = images.shape[1:3]
    top, left, tall, wide = (windows[:, i] for i in range(4))
    (first, second), weights = _two_lines(left, wide, width)
    rows = jnp.arange(height, dtype=jnp.int32)[None, :, None]

    def columns(position: jax.Array) -> jax.Array:
        found = images.at[index[:, None, None], rows, position[:, None, :]]
        return as_packed(found.get(mode="promise_in_bounds"))

    widened = _weighted(columns(first), columns(second), [w[:, None, :] for w in weights])
    # Without it, every line would be computed again for each line that it contributes to.
    widened = jax.lax.optimization_barrier(widened)
    (first, second), weights = _two_lines(top, tall, height)
    own = jnp.arange(len(index), dtype=jnp.int32)[:, None]

    def lines(position: jax.Array) -> jax.Array:
        return widened.at[own, position].get(mode="promise_in_bounds")

    return _weighted(lines(first), lines(second), [w[:, :, None] for w in weights])


def _weighted(first: jax.Array, second: jax.Array, weights: list[jax.Array]) -> jax.Array:
    """Means of packed pixels with weights of `_WEIGHT_BITS` bits."""
    half = 1 << (_WEIGHT_BITS - 1)
    return join(
        [
            (one * weights[0] + other * weights[1] + half) >> _WEIGHT_BITS
            for one, other in zip(channels(first), channels(second), strict=True)
        ]
    )


def _two_lines(
    start: jax.Array, length: jax.Array, size: int
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """The two lines that make up each line of an enlarged axis, and weights, int32 `[B, size]`.

    Args:
        start, length: Start and length of the window, int32 `[B]`.
        size: Length to which it is enlarged.
    """
    before, *weights = (jnp.asarray(table)[length] for table in _enlargement(size))
    last = length[:, None] - 1
    lines = tuple(jnp.clip(before + i, 0, last) + start[:, None] for i in (0, 1))
    return lines, tuple(weights)  # type: ignore[return-value]


def _enlargement(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each length from 0 to `size`: the line before each position, and both weights, int32."""
    length = np.arange(size + 1, dtype=np.float64)[:, None]
    position = (np.arange(size, dtype=np.float64) + 0.5) * (length / size) - 0.5
    before = np.floor(position)
    share = position - before
    weights = [np.floor(w * 2**_WEIGHT_BITS + 0.5).astype(np.int32) for w in (1 - share, share)]
    return before.astype(np.int32), *weights
