# SPDX-License-Identifier: Apache-2.0
"""Measurements of speed against an alternative in the same run; see README.md."""
