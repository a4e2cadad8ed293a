# SPDX-License-Identifier: Apache-2.0
"""Long-tailed selection, image operations and step-indexed tf.data pipelines.

`long_tail` needs NumPy only; everything else here needs TensorFlow. Nothing here imports JAX.
"""
