# SPDX-License-Identifier: Apache-2.0
"""Tables, figures and pages of what finished runs left."""
