# SPDX-License-Identifier: Apache-2.0
"""Turns a checkpoint of the reference's PyTorch code into a workdir to evaluate.

    python -m balpoe_jax.torch_import FILE --config=configs/NAME.py[:args] --workdir=DIR

FILE is a checkpoint of the reference (.pth), or its state dict as .npz or .safetensors.
`python -m balpoe_jax.main --mode=eval` then evaluates it, with the same config and workdir.
"""

from collections.abc import Sequence

from absl import flags

from balpoe_jax import cli
from balpoe_jax.errors import UserError


def define_flags() -> None:
    """Defines --config and --workdir."""
    cli.define_run_flags()


def main(arguments: Sequence[str]) -> None:
    """Imports the file that is named on the command line as the flags say."""
    if len(arguments) != 2:
        raise UserError(
            f"Expected one FILE next to --config and --workdir, got {len(arguments) - 1}: "
            f"{', '.join(arguments[1:]) or 'nothing'}."
        )
    # Here and not above, so that wrong flags are told at once.
    from balpoe_jax.config import resolve
    from balpoe_jax.torch_import.workdir import import_checkpoint

    import_checkpoint(arguments[1], resolve(flags.FLAGS.config), flags.FLAGS.workdir)


if __name__ == "__main__":
    cli.run(define_flags, main)
