# SPDX-License-Identifier: Apache-2.0
"""torchvision's change of hue through Pillow's 8-bit HSV, to the bit.

Pillow mixes single and double precision on the way to HSV, so that tables hold its results. The way
back gives the same in whole numbers; `tests/data/device/test_device_ops.py` tries all colours.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from balpoe_jax.data.device.packing import channels, join


@functools.cache
def hue_tables() -> dict[str, np.ndarray]:
    """Pillow's hue and saturation, for `change_hue`.

    Returns:
        hue: uint8 `[6 * 256 * 256]`, by sector of the circle, spread (a pixel's greatest value
            minus its least) and offset (its greatest minus its middle value).
        saturation: uint8 `[256 * 256]`, by spread and greatest value.
    """
    spread = np.arange(256, dtype=np.float32)[:, None]
    offset = np.arange(256, dtype=np.float32)[None, :]
    share = np.divide(offset, spread, out=np.zeros((256, 256), np.float32), where=spread > 0)
    wide = share.astype(np.float64)
    sectors = [
        1 - share,
        share - 1,
        (2 + wide - 1).astype(np.float32),
        (2 + 1 - wide).astype(np.float32),
        (4 + wide - 1).astype(np.float32),
        (4 + 1 - wide).astype(np.float32),
    ]
    turn = ((np.stack(sectors).astype(np.float64) / 6 + 1) % 1).astype(np.float32)
    hue = np.floor(turn.astype(np.float64) * 255)
    hue[:, 0] = 0
    # For saturations, `offset` stands for the greatest value.
    ratio = np.divide(spread, offset, out=np.zeros((256, 256), np.float32), where=offset > 0)
    # Only entries with a spread up to the greatest value, or an offset up to the spread, are used.
    saturation = np.minimum(np.floor(ratio.astype(np.float64) * 255), 255)
    tables = {"hue": hue.astype(np.uint8), "saturation": saturation.astype(np.uint8)}
    return {name: table.reshape(-1) for name, table in tables.items()}


def change_hue(pixels: jax.Array, turn: jax.Array, tables: dict[str, jax.Array]) -> jax.Array:
    """Turns the hue of every pixel.

    Args:
        pixels: Packed uint32 `[H, W]`.
        turn: Number of 256ths of the circle, int32 scalar.
        tables: Tables of `hue_tables`, on the device.
    """
    red, green, blue = channels(pixels)
    greatest = jnp.maximum(red, jnp.maximum(green, blue))
    least = jnp.minimum(red, jnp.minimum(green, blue))
    spread = greatest - least
    sector = jnp.where(
        red == greatest,
        jnp.where(blue == least, 0, 1),
        jnp.where(green == greatest, jnp.where(blue == least, 2, 3), jnp.where(red == least, 4, 5)),
    )
    # The greatest minus the middle value.
    offset = 2 * greatest + least - (red + green + blue)
    entry = (sector << 16) + (spread << 8) + offset
    hue = tables["hue"].at[entry].get(mode="promise_in_bounds").astype(jnp.int32)
    saturation = tables["saturation"].at[(spread << 8) + greatest].get(mode="promise_in_bounds")
    return to_rgb((hue + turn) & 255, saturation.astype(jnp.int32), greatest)


def to_rgb(hue: jax.Array, saturation: jax.Array, value: jax.Array) -> jax.Array:
    """Pillow's packed colours of hue, saturation and value, int32 from 0 to 255 each."""
    sector, fraction = (6 * hue) // 255 % 6, (6 * hue) % 255
    one = 255 * 255

    def lessened(share: jax.Array) -> jax.Array:
        """The rounded value times 1 minus a share, in parts of `one`; no product lies at a half."""
        return (2 * value * (one - share) + one) // (2 * one)

    low = lessened(saturation * 255)
    falling, rising = lessened(saturation * fraction), lessened(saturation * (255 - fraction))

    def choose(*by_sector: jax.Array) -> jax.Array:
        chosen = by_sector[0]
        for number, channel in enumerate(by_sector[1:], 1):
            chosen = jnp.where(sector == number, channel, chosen)
        return chosen

    return join(
        [
            choose(value, falling, low, low, rising, value),
            choose(rising, value, value, falling, low, low),
            choose(low, low, rising, value, value, falling),
        ]
    )
