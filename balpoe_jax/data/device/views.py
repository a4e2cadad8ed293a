# SPDX-License-Identifier: Apache-2.0
"""A view of images on a device: drawn by NumPy, read and augmented within a compiled program.

    view = DeviceView(settings, (32, 32, 3))
    tables = view.tables()  # once, to the device
    drawn = view.draw(generator(seed, "augment", step), batch_size)
    batch = view.augment(images, index, drawn, tables)  # compiled

The operations and their order are those of `augment.augment_batch`; the draws differ.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from balpoe_jax.data.device import autoaugment, colours, jitter, moves, together
from balpoe_jax.data.device.autoaugment import GREY, TablePolicy
from balpoe_jax.data.device.blur import blur, box_weights
from balpoe_jax.data.device.hue import hue_tables
from balpoe_jax.data.device.operations import Choose, compute_all
from balpoe_jax.data.device.packing import as_packed, unpack
from balpoe_jax.data.device.randaugment import RandAugment
from balpoe_jax.data.device.randomness import RowUniforms, whole
from balpoe_jax.data.settings import BLUR_SIGMA, AugmentSettings

# The numbers that a row needs, before those of RandAugment. They do not depend on the settings, so
# that an image is cropped in the same way whatever else happens to it.
_WIDTHS = {
    **moves.WIDTHS,
    **jitter.WIDTHS,
    "grayscale": 1,
    "blurred": 1,
    "sigma": 1,
    **autoaugment.WIDTHS,
    "cutout": 2,
}

Drawn = dict[str, Any]


class DeviceView:
    """How images in device memory are augmented.

    Args:
        settings: Augmentation of the images.
        image_shape: Height, width and channels of all images.
        other: Augmentation in place of `settings` for half of the images, drawn one by one; None
            for none.
    """

    def __init__(
        self,
        settings: AugmentSettings,
        image_shape: tuple[int, int, int],
        other: AugmentSettings | None = None,
    ) -> None:
        self._ways = [_Way(settings, image_shape)]
        if other is not None:
            self._ways.append(_Way(other, image_shape))

    def draw(self, random: np.random.Generator, rows: int) -> Drawn:
        """Draws what happens to each row of a batch.

        Args:
            random: Source of the draws, which only this call uses.
            rows: Number of rows.

        Returns:
            Arrays `[rows, ...]`, in nested dictionaries. A row's draws do not depend on `rows`.
        """
        widths = [way.width for way in self._ways]
        numbers = random.random((rows, sum(widths) + len(widths) - 1))
        first = self._ways[0].draw(numbers[:, : widths[0]])
        if len(self._ways) == 1:
            return first
        second = self._ways[1].draw(numbers[:, widths[0] : -1])
        return {"first": first, "second": second, "takes_second": numbers[:, -1] < 0.5}

    def tables(self) -> dict[str, np.ndarray]:
        """Constants for `augment` that should lie in device memory; empty if it needs none."""
        tables: dict[str, np.ndarray] = {}
        for way in self._ways:
            tables |= way.tables()
        return tables

    def augment(
        self, images: jax.Array, index: jax.Array, drawn: Drawn, tables: dict[str, Any]
    ) -> jax.Array:
        """Reads images from the data set and augments them.

        Args:
            images: The data set, packed uint32 `[N, H, W]` or uint8 `[N, H, W, 3]`.
            index: Positions in it, int32 `[B]`.
            drawn: Draws of these rows.
            tables: Constants of `tables`, on the device.

        Returns:
            uint8 `[B, H, W, 3]`.
        """
        return unpack(self.augment_packed(images, index, drawn, tables))

    def augment_packed(
        self, images: jax.Array, index: jax.Array, drawn: Drawn, tables: dict[str, Any]
    ) -> jax.Array:
        """Like `augment`, but the result is packed uint32 `[B, H, W]`."""
        if len(self._ways) > 1:
            return self._augment_either(images, index, drawn, tables)
        (way,) = self._ways
        if not way.changes:
            return as_packed(moves.read_moved(images, index, drawn["moves"]))
        rows = (images, index, drawn, tables)
        if not way.has_table_alone:
            return self._augment_alike(*rows)
        return jax.lax.platform_dependent(
            *rows, tpu=self.augment_together, default=self._augment_alike
        )

    def augment_together(
        self, images: jax.Array, index: jax.Array, drawn: Drawn, tables: dict[str, Any]
    ) -> jax.Array:
        """`augment_packed` for TPUs, for a policy that `together.can_apply` accepts."""
        (way,) = self._ways
        return way.apply_together(images, index, drawn, tables)

    def _augment_alike(
        self, images: jax.Array, index: jax.Array, drawn: Drawn, tables: dict[str, Any]
    ) -> jax.Array:
        (way,) = self._ways
        moved = as_packed(moves.read_moved(images, index, drawn["moves"]))
        return _by_image(partial(way.change, tables=tables), moved, way.numbers(drawn))

    def _augment_either(
        self, images: jax.Array, index: jax.Array, drawn: Drawn, tables: dict[str, Any]
    ) -> jax.Array:
        first, second = self._ways
        rows = [
            (as_packed(moves.read_moved(images, index, own["moves"])), way.numbers(own))
            for way, own in zip(self._ways, (drawn["first"], drawn["second"]), strict=True)
        ]

        def change(choose: Choose, takes_second: jax.Array, one: Any, other: Any) -> jax.Array:
            ways = [
                lambda image: first.change(choose, image, one[1], tables),
                lambda _: second.change(choose, other[0], other[1], tables),
            ]
            return choose(takes_second.astype(jnp.int32), ways, one[0])

        return _by_image(change, drawn["takes_second"], *rows)


class _Way:
    """One way to augment the images of a view."""

    def __init__(self, settings: AugmentSettings, image_shape: tuple[int, int, int]) -> None:
        self._settings = settings
        self._height, self._width = image_shape[:2]
        self._widths = dict(_WIDTHS)
        self._policy: TablePolicy | RandAugment | None = None
        if settings.policy == "randaugment":
            self._policy = RandAugment(settings, self._height, self._width)
            self._widths |= self._policy.widths
        elif settings.policy != "none":
            self._policy = TablePolicy(settings.policy, self._height, self._width)

    @property
    def changes(self) -> bool:
        """Whether an image is changed after its crop, flip and rotation."""
        settings = self._settings
        return settings.has_per_image_ops or self._policy is not None or settings.cutout > 0

    @property
    def has_table_alone(self) -> bool:
        """Whether `apply_together` supports the settings."""
        policy = self._policy
        if self._settings.has_per_image_ops or not isinstance(policy, TablePolicy):
            return False
        return together.can_apply(policy)

    @property
    def width(self) -> int:
        """Number of uniform numbers that a row needs."""
        return sum(self._widths.values())

    def draw(self, numbers: np.ndarray) -> Drawn:
        """Draws for all rows of uniform numbers `[rows, width]`."""
        settings, uniforms = self._settings, RowUniforms(numbers, self._widths)
        drawn: Drawn = {"moves": moves.draw_moves(uniforms, settings, self._height, self._width)}
        if settings.has_color_jitter:
            drawn["jitter"] = jitter.draw_jitter(uniforms, settings)
        if settings.grayscale:
            drawn["grayscale"] = uniforms.one("grayscale") < settings.grayscale
        if settings.blur:
            low, high = BLUR_SIGMA
            sigma = low + uniforms.one("sigma") * (high - low)
            drawn["blurred"] = uniforms.one("blurred") < settings.blur
            drawn["blur"] = box_weights(sigma.astype(np.float32))
        if self._policy is not None:
            drawn["policy"] = self._policy.draw(uniforms)
        if settings.cutout:
            corner = whole(uniforms.many("cutout"), np.array([self._height, self._width]))
            drawn["cutout"] = corner.astype(np.int16)
        return drawn

    def tables(self) -> dict[str, np.ndarray]:
        """Constants that should lie in device memory."""
        tables = {} if self._policy is None else self._policy.tables
        return tables | (hue_tables() if self._settings.hue else {})

    def numbers(self, drawn: Drawn) -> Drawn:
        """The numbers that `change` needs for each row."""
        numbers = {name: leaf for name, leaf in drawn.items() if name != "moves"}
        if isinstance(self._policy, TablePolicy):
            numbers["policy"] = self._policy.numbers(drawn["policy"])
        return numbers

    def apply_together(
        self, images: jax.Array, index: jax.Array, drawn: Drawn, tables: dict[str, Any]
    ) -> jax.Array:
        """Reads and changes all images at once, packed `[B, H, W]`."""

        def read(shown: moves.Positions) -> jax.Array:
            return as_packed(moves.read_moved(images, index, drawn["moves"], shown))

        assert isinstance(self._policy, TablePolicy)
        size = (self._height, self._width)
        pixels = together.apply(self._policy, drawn["policy"], read, tables, size, GREY)
        if self._settings.cutout:
            pixels = jax.vmap(partial(_cut_out, size=self._settings.cutout))(
                pixels, drawn["cutout"]
            )
        return pixels

    def change(
        self, choose: Choose, pixels: jax.Array, numbers: Drawn, tables: dict[str, Any]
    ) -> jax.Array:
        """Changes one image, packed `[H, W]`, with its row of `numbers`."""
        if "jitter" in numbers:
            pixels = jitter.jitter(pixels, numbers["jitter"], tables, choose)
        if "grayscale" in numbers:
            pixels = jnp.where(numbers["grayscale"], colours.gray(pixels), pixels)
        if "blur" in numbers:
            ways = [lambda image: image, lambda image: blur(image, numbers["blur"])]
            pixels = choose(numbers["blurred"].astype(jnp.int32), ways, pixels)
        if self._policy is not None:
            pixels = self._policy.apply(pixels, numbers["policy"], tables, choose)
        if self._settings.cutout:
            pixels = _cut_out(pixels, numbers["cutout"], self._settings.cutout)
        return pixels


def _cut_out(pixels: jax.Array, center: jax.Array, size: int) -> jax.Array:
    """Blackens a square about int `[2]` row and column, clipped at the border."""
    height, width = pixels.shape
    row, column = center.astype(jnp.int32)
    rows = jnp.arange(height, dtype=jnp.int32)[:, None] - row
    columns = jnp.arange(width, dtype=jnp.int32)[None, :] - column
    half = size // 2
    inside = (rows >= -half) & (rows < half) & (columns >= -half) & (columns < half)
    return jnp.where(inside, jnp.uint32(0), pixels)


def _by_image(function: Callable[..., jax.Array], *rows: Any) -> jax.Array:
    """Maps a function over images: one by one on CPUs, all at once elsewhere.

    So a CPU computes only what was drawn for each image, and an accelerator needs few kernels.

    Args:
        function: Function of an `operations.Choose` and of a row of `rows`.
        rows: Arrays with a leading axis of the images, in nested containers.
    """
    return jax.lax.platform_dependent(
        *rows,
        cpu=lambda *rows: jax.lax.map(lambda row: function(jax.lax.switch, *row), rows),
        default=jax.vmap(partial(function, compute_all)),
    )
