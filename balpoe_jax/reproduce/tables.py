# SPDX-License-Identifier: Apache-2.0
"""All tables that can be run: the papers', and our own."""

from balpoe_jax.reproduce import ablation, paper

TABLES = paper.TABLES | ablation.TABLES
