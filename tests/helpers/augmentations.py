# SPDX-License-Identifier: Apache-2.0
"""Augmentations and mixing that the tests of several pipelines take."""

from balpoe_jax.data.settings import AugmentSettings, MixSettings

UNIMIX = MixSettings(alpha=0.8, groups=2, rule="unimix", sampling_power=-0.5)


# c_sim of the contrastive methods.
SIM = AugmentSettings(
    crop_area=0.2,
    flip=True,
    color_jitter=(0.4, 0.4, 0.4),
    hue=0.1,
    jitter_probability=0.8,
    grayscale=0.2,
    blur=0.5,
)
