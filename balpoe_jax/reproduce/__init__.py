# SPDX-License-Identifier: Apache-2.0
"""The tables of the paper: their rows, and the runs that fill them."""
