# SPDX-License-Identifier: Apache-2.0
"""A run: its record, checkpoints, lock, and its life with other processes and preemptions."""
