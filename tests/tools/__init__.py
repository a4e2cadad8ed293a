# SPDX-License-Identifier: Apache-2.0
"""Tools that try the tests themselves."""
