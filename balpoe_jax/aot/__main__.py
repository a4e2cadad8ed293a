# SPDX-License-Identifier: Apache-2.0
"""Compiles an experiment's steps for a TPU slice or a GPU without one, and says what they need.

    python -m balpoe_jax.aot --config=configs/cifar100_lt.py --topology=v5e:4x4
    python -m balpoe_jax.aot --config=configs/cifar100_lt.py --topology=h100

The train and the eval step are those of `balpoe_jax.main`, compiled by the device's own compiler
(the package libtpu, or jax-cuda13-plugin and ptxas), so what does not compile there fails here.
The data set need not be there: class counts are the published ones. Your own images are counted.

Nothing is measured. The times for a TPU are those of the compiler's model of a core, without
communication, which overlaps at best. The times for a GPU are lower limits: of moving the bytes,
and of computing the products in bfloat16. A GPU's compiler chooses the algorithms of convolutions
where it runs.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from balpoe_jax import cli
from balpoe_jax.aot.examine import as_text, examine
from balpoe_jax.errors import UserError
from balpoe_jax.files import reports_write_errors


def define_flags() -> None:
    """Defines --config, --topology and --output."""
    cli.define_config_flag()
    flags.DEFINE_string(
        "topology", None, "TPU slice or GPU to compile for, such as v5e:4x4 or h100."
    )
    flags.DEFINE_string(
        "output", "", "File to write the figures to as JSON; they are printed in any case."
    )
    flags.mark_flag_as_required("topology")


def main(arguments: Sequence[str]) -> None:
    """Compiles and prints as the flags say."""
    if len(arguments) > 1:
        raise UserError(f"Unexpected argument {arguments[1]!r}; every option starts with --.")
    output = Path(flags.FLAGS.output) if flags.FLAGS.output else None
    if output and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise UserError(f"--output must be a file in a folder that is there, got {output}.")
    from balpoe_jax.config import resolve  # not above: it imports all methods

    jax.config.update("jax_platforms", "cpu")  # whatever accelerator is here stays untouched
    found = examine(resolve(flags.FLAGS.config), flags.FLAGS.topology)
    print(as_text(found))
    if output:
        with reports_write_errors(output):
            output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run(define_flags, main)
