# SPDX-License-Identifier: Apache-2.0
"""Batches from the images in device memory: pure functions of JAX for one device."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from balpoe_jax.data.device.packing import unpack
from balpoe_jax.data.device.plans import OTHERS, OTHERS_2, Planner
from balpoe_jax.data.types import TrainBatch


def make_batch(
    constants: dict[str, Any], plan: dict[str, Any], planner: Planner, axis_name: str | None = None
) -> TrainBatch:
    """Makes the batch of a step from its plan.

    Args:
        constants: `images`, the training set as packed uint32 `[N, H, W]`, and the planner's
            `tables`.
        plan: This device's rows `[b, ...]` of one step's plan.
        planner: Planner that made the plan.
        axis_name: Mapped axis along which the rows are shared; None if all are on this device.

    Returns:
        Arrays on the device; the views have the settings' dtype.
    """
    settings = planner.settings
    mix = plan.get("mix")

    def view(name: str, index: jax.Array) -> jax.Array:
        drawn, tables = plan["views"][name], constants["tables"][name]
        return planner.views[name].augment_packed(constants["images"], index, drawn, tables)

    def partners(name: str, packed: jax.Array) -> jax.Array:
        """The images that a view is mixed with, which are read by the first name or are its own."""
        assert mix is not None
        if name in planner.views:
            others = view(name, mix["partner"])
        else:
            others = _gather(packed, axis_name)[mix["partner"]]
        return normalize(unpack(others), settings.mean, settings.std)

    own = [name for name in planner.views if name not in (OTHERS, OTHERS_2)]
    views = [view(name, plan["index"]) for name in own]
    images = [normalize(unpack(x), settings.mean, settings.std) for x in views]
    clean = images[0]
    if mix is not None:
        images[0] = mix_images(images[0], partners(OTHERS, views[0]), mix)
    if mix is not None and "second_box" in mix and len(images) > 1:
        cut = {"share": jnp.ones_like(mix["share"]), "box": mix["second_box"]}
        images[1] = mix_images(images[1], partners(OTHERS_2, views[1]), cut)
    rounded = tuple(view.astype(settings.dtype) for view in images)
    batch = TrainBatch(rounded, plan["labels"], plan["other_labels"], plan["weight"])
    if settings.mix.rows_per_image == 1:
        return batch
    return with_clean_rows(batch, clean.astype(settings.dtype))


def with_clean_rows(batch: TrainBatch, clean: jax.Array) -> TrainBatch:
    """RegMixup's batch of `2 * b` rows: of each image the clean row and then the mixed one.

    Args:
        batch: Mixed batch of `b` rows.
        clean: First view before it was mixed, `[b, H, W, 3]`.
    """

    def pair(first: jax.Array, second: jax.Array) -> jax.Array:
        return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])

    mixed, *further = batch.views
    return TrainBatch(
        views=(pair(clean, mixed), *(pair(view, view) for view in further)),
        labels=pair(batch.labels, batch.labels),
        other_labels=pair(batch.labels, batch.other_labels),
        mix_weight=pair(jnp.ones_like(batch.mix_weight), batch.mix_weight),
    )


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """`(x / 255 - mean) / std` of uint8 `[..., 3]` as float32, with the host pipeline's rounding.

    Args:
        images: uint8 `[..., 3]`.
        mean, std: Statistics by channel, of images in [0, 1].
    """
    scale = (1 / (255 * np.asarray(std, np.float64))).astype(np.float32)
    offset = (-np.divide(mean, std, dtype=np.float64)).astype(np.float32)
    shape = (1,) * (images.ndim - 1) + (3,)
    return _rounded(images.astype(jnp.float32) * scale.reshape(shape)) + offset.reshape(shape)


def mix_images(images: jax.Array, others: jax.Array, mix: dict[str, jax.Array]) -> jax.Array:
    """`share * images + (1 - share) * others`, and only the others in the box.

    Args:
        images, others: Float32 `[b, H, W, 3]`.
        mix: `share` float32 `[b]` and, if the rule has one, `box`, see `mixing.Mixer.draw`.
    """
    _, height, width, _ = images.shape
    share = mix["share"][:, None, None, None]
    if "box" in mix:
        top, bottom, left, right = (mix["box"][:, i, None, None, None] for i in range(4))
        row = jnp.arange(height)[None, :, None, None]
        column = jnp.arange(width)[None, None, :, None]
        inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
        share = jnp.where(inside, 0.0, share)
    return _rounded(share * images) + _rounded((1 - share) * others)


def _gather(images: jax.Array, axis_name: str | None) -> jax.Array:
    """The rows of all devices, among which a row's partner may be."""
    if axis_name is None:
        return images
    return jax.lax.all_gather(images, axis_name, tiled=True)


def _rounded(product: jax.Array) -> jax.Array:
    """Keeps the compiler from fusing a product with a sum, so that every program gives equal bits.

    The values never reach the bounds, but the compiler cannot know that.
    """
    return jnp.clip(product, -1e9, 1e9)
