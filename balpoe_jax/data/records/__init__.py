# SPDX-License-Identifier: Apache-2.0
"""Where stored images lie: in memory, or as records of files."""
