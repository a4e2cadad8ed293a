# SPDX-License-Identifier: Apache-2.0
"""Runs and collects the rows of a table: `python -m balpoe_jax.reproduce`."""

from balpoe_jax import cli
from balpoe_jax.reproduce.jobs import define_flags, main

if __name__ == "__main__":
    cli.run(define_flags, main)
