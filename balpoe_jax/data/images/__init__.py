# SPDX-License-Identifier: Apache-2.0
"""Decoding and augmentation of images in TensorFlow."""
