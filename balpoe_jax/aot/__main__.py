# SPDX-License-Identifier: Apache-2.0
"""Compiles an experiment's steps for absent devices: `python -m balpoe_jax.aot`."""

from balpoe_jax import cli
from balpoe_jax.aot.examine import define_flags, main

if __name__ == "__main__":
    cli.run(define_flags, main)
