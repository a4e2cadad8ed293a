# SPDX-License-Identifier: Apache-2.0
"""Sources of random numbers, and checks of their frequencies."""

import numpy as np
import tensorflow as tf

from balpoe_jax.data.randomness import RowRandom


def source(batch_size: int, seed: int = 0, rows: slice | None = None) -> RowRandom:
    """Random numbers for a batch, or for some of its rows."""
    return RowRandom(tf.constant([seed, 1]), batch_size, rows or slice(0, batch_size))


def noise(batch_size: int, side: int = 16) -> tf.Tensor:
    """Images uint8 `[B, side, side, 3]`, always the same."""
    images = np.random.default_rng(0).integers(0, 256, (batch_size, side, side, 3))
    return tf.constant(images, tf.uint8)


def within_four_sigma(hits: np.ndarray, probability: float) -> bool:
    """Whether the frequency of hits, bool, is within four standard deviations."""
    sigma = np.sqrt(probability * (1 - probability) / hits.size)
    return abs(hits.mean() - probability) <= 4 * sigma


def windows_by_hand(shapes, area, log_ratio, position) -> np.ndarray:
    """A slow twin of torchvision's RandomResizedCrop.get_params, one image and try at a time."""
    windows = []
    for (height, width), areas, logs, (down, right) in zip(
        shapes, area, log_ratio, position, strict=True
    ):
        for share, log in zip(areas, logs, strict=True):
            target, aspect = height * width * share, np.exp(log)
            w, h = round(np.sqrt(target * aspect)), round(np.sqrt(target / aspect))
            if 0 < w <= width and 0 < h <= height:
                top, left = int(down * (height - h + 1)), int(right * (width - w + 1))
                break
        else:
            w, h = width, height
            if width / height < 3 / 4:
                h = round(width / (3 / 4))
            elif width / height > 4 / 3:
                w = round(height * (4 / 3))
            top, left = (height - h) // 2, (width - w) // 2
        windows.append((top, left, h, w))
    return np.array(windows)
