# SPDX-License-Identifier: Apache-2.0
"""Policies that are tables, such as AutoAugment: their draws, and the numbers of their operations.

Magnitudes are discrete. So the plan has one number for each of a row's two operations. The device
looks up all others by it, among constants of the program.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from balpoe_jax.data.device import operations, tones
from balpoe_jax.data.device.lines import line_weights
from balpoe_jax.data.device.moves import fixed_point, inverse_rotations
from balpoe_jax.data.device.packing import packed_colour
from balpoe_jax.data.device.randomness import RowUniforms, whole
from balpoe_jax.data.magnitudes import autoaugment_magnitudes
from balpoe_jax.data.settings import POLICY_TABLES, Rule

# Packed colour outside of images.
GREY = packed_colour((128, 128, 128))
POSITIONS = 2

# The numbers that a row needs, for `RowUniforms`.
WIDTHS = {"pair": 1, "gate": POSITIONS, "sign": POSITIONS}

_GEOMETRY = {
    "rotate": "nearest",
    "translate_x": "nearest",
    "translate_y": "nearest",
    "shear_x": "rows",
    "shear_y": "columns",
}


@dataclasses.dataclass(frozen=True)
class Variants:
    """The operations, with their parameters, that may be drawn at one position of a policy.

    Attributes:
        kinds: Names of the kinds of operations that occur, "none" first.
        names: Operation of each variant; variant 0 is none.
        parameters: Parameter of each, as in `batch_ops`, float32 `[variants]`.
        numbers: Numbers for `operations.apply`, with a row for each variant.
        shares: Probability of each, float64 `[variants]`.
    """

    kinds: tuple[str, ...]
    names: tuple[str, ...]
    parameters: np.ndarray
    numbers: dict[str, Any]
    shares: np.ndarray

    def share(self, still: Sequence[int]) -> float:
        """The probability of a kind that is not among the given ones."""
        return float(self.shares[~np.isin(self.numbers["kind"], still)].sum())


class TablePolicy:
    """A policy that is a table, for images of one size.

    Args:
        name: Name of the policy.
        height, width: Size of the images.
    """

    def __init__(self, name: str, height: int, width: int) -> None:
        pairs = POLICY_TABLES[name]
        self._probabilities = np.array([[rule[1] for rule in pair] for pair in pairs])
        self.variants = tuple(
            _variants([pair[position] for pair in pairs], height, width)
            for position in range(POSITIONS)
        )

    @property
    def tables(self) -> dict[str, np.ndarray]:
        """Constants that the device needs."""
        if any("autocontrast" in variants.kinds for variants in self.variants):
            return {"autocontrast": tones.autocontrast_table()}
        return {}

    def draw(self, uniforms: RowUniforms) -> np.ndarray:
        """The variants of each row, uint8 `[rows, 2]`.

        A pair is drawn with even odds; its rules run with their probabilities.
        """
        pair = whole(uniforms.one("pair"), len(self._probabilities))
        runs = uniforms.many("gate") < self._probabilities[pair]
        negative = uniforms.many("sign") < 0.5
        return np.where(runs, 1 + 2 * pair[:, None] + negative, 0).astype(np.uint8)

    def numbers(self, drawn: jax.Array) -> list[dict[str, Any]]:
        """The numbers that `apply` needs, for each position, of the variants drawn for all rows."""
        return [
            jax.tree.map(
                lambda leaf, chosen=drawn[:, position]: (
                    jnp.asarray(leaf).at[chosen].get(mode="promise_in_bounds")
                ),
                variants.numbers,
            )
            for position, variants in enumerate(self.variants)
        ]

    def apply(
        self,
        pixels: jax.Array,
        numbers: list[dict[str, Any]],
        tables: dict[str, Any],
        choose: operations.Choose = jax.lax.switch,
    ) -> jax.Array:
        """Applies the two operations of an image, packed `[H, W]`, with its row of `numbers`."""
        for variants, own in zip(self.variants, numbers, strict=True):
            pixels = operations.apply(pixels, own, tables, variants.kinds, GREY, choose)
        return pixels


def _variants(rules: Sequence[Rule], height: int, width: int) -> Variants:
    """The variants of one position: none, then each rule with a positive and a negative sign."""
    magnitudes = autoaugment_magnitudes(height, width)
    names, parameters, shares = ["none"], [np.float32(0)], [0.0]
    for name, probability, magnitude in rules:
        origin, strengths, signed = magnitudes[name]
        strength = np.float32(strengths[magnitude])
        names += [name, name]
        shares += [probability / (2 * len(rules))] * 2
        parameters += [np.float32(origin) + strength]
        parameters += [np.float32(origin) + (-strength if signed else strength)]
    kind_of = {"none": "none", **_GEOMETRY, **operations.KIND_OF}
    kinds = tuple(
        sorted({kind_of[name] for name in names}, key=lambda kind: (kind != "none", kind))
    )
    values = np.array(parameters, np.float32)
    numbers: dict[str, Any] = {
        "kind": np.array([kinds.index(kind_of[name]) for name in names], np.uint8)
    }
    numbers |= numbers_of(names, values, kinds, height, width)
    shares[0] = 1 - sum(shares)
    return Variants(kinds, tuple(names), values, numbers, np.array(shares))


def numbers_of(
    names: Sequence[str], parameters: np.ndarray, kinds: Sequence[str], height: int, width: int
) -> dict[str, Any]:
    """The numbers that the kinds of operations need, with a row for each operation.

    Args:
        names: Names of the operations, `[n]`; may include "none".
        parameters: Parameter of each, as in `batch_ops`, float `[n]`.
        kinds: Names of the kinds that occur.
        height, width: Size of the images.
    """
    wide = parameters.astype(np.float64)

    def only(name: str, otherwise: float = 0.0) -> np.ndarray:
        return np.where(np.array(names) == name, wide, otherwise)

    numbers: dict[str, Any] = {}
    if "nearest" in kinds:
        matrix = inverse_rotations(only("rotate"), height, width)
        matrix[2] = matrix[2] + only("translate_x")
        matrix[5] = matrix[5] + only("translate_y")
        numbers["matrix"] = fixed_point(matrix)
    if {"rows", "columns"} & set(kinds):
        across = np.arange(max(height, width)) + 0.5
        shifts = (only("shear_x") + only("shear_y"))[:, None] * across
        numbers["lines"] = line_weights(shifts, np.ones(len(names), bool))
    if "points" in kinds:
        numbers["points"] = _points(names, wide)
    if set(kinds) & {"brightness", "contrast", "color", "sharpness"}:
        numbers["factor"] = parameters.astype(np.float32)
    return numbers


def _points(names: Sequence[str], parameters: np.ndarray) -> dict[str, np.ndarray]:
    """The numbers of `tones.change_points`, int16 each."""
    points = {name: np.full(len(names), value, np.int16) for name, value in tones.NO_CHANGE.items()}
    for i, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        if name == "invert":
            points["threshold"][i] = 0
        elif name == "solarize":
            points["threshold"][i] = np.ceil(parameter)
        elif name == "posterize":
            points["mask"][i] = 256 - (1 << (8 - int(parameter)))
    return points
