# SPDX-License-Identifier: Apache-2.0
"""What the steps of an experiment need on devices that are not here."""
