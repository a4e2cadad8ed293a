# SPDX-License-Identifier: Apache-2.0
"""What happens to images in TensorFlow: decoding and augmentation."""
