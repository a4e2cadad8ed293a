# SPDX-License-Identifier: Apache-2.0
"""Training batches made in the memory of devices: NumPy draws, JAX executes; no TensorFlow."""
