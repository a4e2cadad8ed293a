# SPDX-License-Identifier: Apache-2.0
"""What a config describes, built: program, phases, data and batches."""
