# SPDX-License-Identifier: Apache-2.0
"""Stored images: arrays in memory, or records in files."""
