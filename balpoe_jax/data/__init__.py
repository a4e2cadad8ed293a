# SPDX-License-Identifier: Apache-2.0
"""Data sets, and batches of their examples, made on the host in TensorFlow or on the devices.

Both pipelines are indexed by the step: a batch is a function of the seed and the step alone. Data
sets in memory need NumPy only; tf.data and records need TensorFlow, `device` needs JAX.
"""
