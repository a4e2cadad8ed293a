# SPDX-License-Identifier: Apache-2.0
"""Flags and process start-up, then training or evaluation: `python -m balpoe_jax.main --help`."""

from collections.abc import Sequence

from absl import flags

from balpoe_jax import command_line, start_up
from balpoe_jax.errors import UserError


def define_flags() -> None:
    """Defines --config, --workdir and --mode."""
    command_line.define_run_flags()
    flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train and evaluate, or evaluate only.")


def main(arguments: Sequence[str]) -> None:
    """Trains or evaluates as the flags say."""
    if len(arguments) > 1:
        raise UserError(f"Unexpected argument {arguments[1]!r}; every option starts with --.")
    # Here and not above: TensorFlow reads its environment when it is imported.
    import tensorflow as tf

    from balpoe_jax.evaluate import evaluate
    from balpoe_jax.train import train

    tf.config.set_visible_devices([], "GPU")  # TensorFlow only feeds; the GPUs are JAX's
    config, workdir = flags.FLAGS.config, flags.FLAGS.workdir
    command_line.use_compilation_cache(config.cache_dir)
    if flags.FLAGS.mode == "train":
        train(config, workdir, start_up.of_this_process())
    else:
        evaluate(config, workdir)


if __name__ == "__main__":
    command_line.run(define_flags, main)
