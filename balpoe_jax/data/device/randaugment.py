# SPDX-License-Identifier: Apache-2.0
"""RandAugment as in `data.images.randaugment`: its draws, and the numbers of its operations.

Magnitudes are continuous, so the host computes the numbers of every operation that it draws.
"""

from typing import Any

import jax
import numpy as np

from balpoe_jax.data.device import operations, tones
from balpoe_jax.data.device.lines import line_weights
from balpoe_jax.data.device.moves import inverse_rotations
from balpoe_jax.data.device.packing import packed_colour
from balpoe_jax.data.device.randomness import RowUniforms, normal, whole
from balpoe_jax.data.device.turns import turn_matrices
from balpoe_jax.data.magnitudes import RANDAUGMENT_DEVIATION, RANDAUGMENT_PROBABILITY
from balpoe_jax.data.settings import RANDAUGMENT_GREATEST, AugmentSettings

# In the order of the reference; number 0 is none.
NAMES = (
    "none", "autocontrast", "equalize", "invert", "rotate", "posterize", "solarize",
    "solarize_add", "color", "contrast", "brightness", "sharpness", "shear_x", "shear_y",
    "translate_x", "translate_y",
)  # fmt: skip
_KIND_OF = {
    "none": "none",
    "rotate": "turn",
    "shear_x": "rows",
    "shear_y": "columns",
    "translate_x": "rows",
    "translate_y": "columns",
    **operations.KIND_OF,
}
KINDS = tuple(dict.fromkeys(_KIND_OF[name] for name in NAMES))
_KIND_OF_NUMBER = np.array([KINDS.index(_KIND_OF[name]) for name in NAMES], np.uint8)


class RandAugment:
    """RandAugment for images of one size.

    Args:
        settings: Augmentation, whose fill, number of layers and magnitude are read.
        height, width: Size of the images.
    """

    def __init__(self, settings: AugmentSettings, height: int, width: int) -> None:
        self._layers = settings.randaugment_layers
        self._magnitude = settings.randaugment_magnitude
        self._fill = packed_colour(settings.fill)
        self._height, self._width = height, width
        # The numbers that a row needs, for `RowUniforms`.
        names = ("operation", "gate", "first", "second", "sign", "cubic")
        self.widths = {f"randaugment {name}": self._layers for name in names}

    def draw(self, uniforms: RowUniforms) -> dict[str, Any]:
        """Draws for all rows: the `numbers` of each layer, `[rows, layers, ...]`."""

        def numbers(name: str) -> np.ndarray:
            return uniforms.many(f"randaugment {name}").reshape(-1)

        which = 1 + whole(numbers("operation"), len(NAMES) - 1)
        which = np.where(numbers("gate") < RANDAUGMENT_PROBABILITY, which, 0)
        magnitude = self._magnitude + RANDAUGMENT_DEVIATION * normal(
            numbers("first"), numbers("second")
        )
        level = np.clip(magnitude, 0, RANDAUGMENT_GREATEST) / RANDAUGMENT_GREATEST
        sign = np.where(numbers("sign") < 0.5, -1.0, 1.0)
        drawn = self.numbers(which, level, sign, numbers("cubic") < 0.5)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, self._layers, *leaf.shape[1:]), drawn)

    def numbers(
        self, which: np.ndarray, level: np.ndarray, sign: np.ndarray, cubic: np.ndarray
    ) -> dict[str, Any]:
        """The numbers that `operations.apply` needs.

        Args:
            which: Operations as positions in `NAMES`, int `[n]`.
            level: Magnitudes over the greatest one, float64 `[n]`.
            sign: Directions of geometric operations, 1 or -1, float64 `[n]`.
            cubic: Whether they interpolate cubically, bool `[n]`.
        """

        def where(name: str, values: Any, otherwise: float = 0) -> np.ndarray:
            return np.where(which == NAMES.index(name), values, otherwise)

        points = {
            "mask": where("posterize", 256 - (1 << (8 - (level * 4).astype(int))), 255),
            "addition": where("solarize_add", np.floor(level * 110)),
            "threshold": where("invert", 0, 256) - where("solarize", 256 - np.floor(level * 256)),
        }
        return {
            "kind": _KIND_OF_NUMBER[which],
            "factor": (level * 1.8 + 0.1).astype(np.float32),
            "points": {name: values.astype(np.int16) for name, values in points.items()},
            "lines": self._lines(which, level * sign, cubic),
            "turn": turn_matrices(
                inverse_rotations(where("rotate", sign * level * 30), self._height, self._width)
            ),
        }

    def apply(
        self,
        pixels: jax.Array,
        drawn: dict[str, Any],
        tables: dict[str, Any],
        choose: operations.Choose = jax.lax.switch,
    ) -> jax.Array:
        """Applies the operations of an image, packed `[H, W]`, with its row of `draw`."""
        for layer in range(self._layers):
            own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], drawn)
            pixels = operations.apply(pixels, own, tables, KINDS, self._fill, choose)
        return pixels

    @property
    def tables(self) -> dict[str, np.ndarray]:
        """Constants that the device needs."""
        return {"autocontrast": tones.autocontrast_table()}

    def _lines(
        self, which: np.ndarray, amount: np.ndarray, cubic: np.ndarray
    ) -> dict[str, np.ndarray]:
        """`line_weights` of shears and shifts, zeros for other operations."""
        across = np.arange(max(self._height, self._width)) + 0.5
        reaches = dict.fromkeys(("shear_x", "shear_y"), 0.3 * across)
        reaches["translate_x"] = np.full(len(across), 0.45 * self._width)
        reaches["translate_y"] = np.full(len(across), 0.45 * self._height)
        reach = np.stack([reaches.get(name, np.zeros(len(across))) for name in NAMES])
        moving = np.flatnonzero(np.isin(which, [NAMES.index(name) for name in reaches]))
        found = line_weights(
            amount[moving, None] * reach[which[moving]], cubic[moving], len(across)
        )
        lines = {}
        for name, leaf in found.items():
            lines[name] = np.zeros((len(which), *leaf.shape[1:]), leaf.dtype)
            lines[name][moving] = leaf
        return lines
