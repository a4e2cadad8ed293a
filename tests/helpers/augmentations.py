# SPDX-License-Identifier: Apache-2.0
"""Augmentation and mixing that the tests of both pipelines use."""

from balpoe_jax.data.settings import AugmentSettings, MixSettings

UNIMIX = MixSettings(alpha=0.8, groups=2, rule="unimix", sampling_power=-0.5)

# SimCLR's view, which `balpoe_jax.methods.augmentations` calls "similar".
SIM = AugmentSettings(
    crop_area=0.2,
    flip=True,
    color_jitter=(0.4, 0.4, 0.4),
    hue=0.1,
    jitter_probability=0.8,
    grayscale=0.2,
    blur=0.5,
)
