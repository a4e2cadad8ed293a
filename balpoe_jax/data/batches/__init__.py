# SPDX-License-Identifier: Apache-2.0
"""What makes up a batch on the host: samplers, mixing, replacements of bad images."""
