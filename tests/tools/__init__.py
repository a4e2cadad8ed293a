# SPDX-License-Identifier: Apache-2.0
"""Tools that test the tests themselves."""
