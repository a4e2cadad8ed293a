# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the reference's PyTorch code, as parameters and as a workdir to evaluate.

    python -m balpoe_jax.torch_import FILE --config=configs/NAME.py[:args] --workdir=DIR

makes the workdir. `python -m balpoe_jax.main --mode=eval` evaluates it, with the same config and
workdir.
"""

from balpoe_jax.torch_import.conversion import check_against, convert

__all__ = ["check_against", "convert"]
