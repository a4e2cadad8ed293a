# SPDX-License-Identifier: Apache-2.0
"""Predictions of a data set, and their scores."""
