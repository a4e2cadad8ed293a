# SPDX-License-Identifier: Apache-2.0
"""Speed, measured against the alternative in the same run; see README.md."""
