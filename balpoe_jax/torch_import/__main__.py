# SPDX-License-Identifier: Apache-2.0
"""Imports a checkpoint of PyTorch: `python -m balpoe_jax.torch_import`."""

from balpoe_jax import cli
from balpoe_jax.torch_import.conversion import define_flags, main

if __name__ == "__main__":
    cli.run(define_flags, main)
