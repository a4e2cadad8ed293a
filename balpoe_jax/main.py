# SPDX-License-Identifier: Apache-2.0
"""Flags and process start-up, then training or evaluation: `python -m balpoe_jax.main --help`."""

import logging
import os
import sys
from collections.abc import Callable, Sequence

from absl import app, flags
from absl import logging as absl_logging

from balpoe_jax.errors import UserError

_EXIT_USER_ERROR = 2


def run(
    define_flags: Callable[[], None], main: Callable[[Sequence[str]], None]
) -> None:
    """Starts a command line: parses flags, runs `main`, turns `UserError` into exit code 2."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # announces itself, and rounds otherwise
    _log_to_terminal()

    def guarded(arguments: Sequence[str]) -> None:
        try:
            main(arguments)
        except UserError as error:
            _fail(error)

    define_flags()
    app.run(guarded, flags_parser=_parse_flags)


def define_run_flags() -> None:
    """--config and --workdir."""
    from ml_collections import config_flags

    config_flags.DEFINE_config_file(
        "config", None, "File of the experiment, FILE.py[:key=value,...].", lock_config=True
    )
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    flags.mark_flags_as_required(["config", "workdir"])


def _define_flags() -> None:
    define_run_flags()
    flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train and evaluate, or evaluate only.")


def _main(arguments: Sequence[str]) -> None:
    if len(arguments) > 1:
        raise UserError(f"Unexpected argument {arguments[1]!r}; every option starts with --.")
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # TensorFlow only feeds; the GPUs are JAX's
    config, workdir = flags.FLAGS.config, flags.FLAGS.workdir
    if flags.FLAGS.mode == "eval":
        from balpoe_jax.evaluate import evaluate

        evaluate(config, workdir)
    else:
        from balpoe_jax.train import train

        train(config, workdir)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except (flags.Error, UserError) as error:
        _fail(error)
    except (AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        # What ml_collections raises for a file, field or value of --config that is not valid.
        _fail(error)
    raise AssertionError("unreachable")


def _log_to_terminal() -> None:
    """Our own lines as they are on stdout; of the libraries, warnings on stderr."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("balpoe_jax")
    ours.setLevel(logging.INFO)
    ours.propagate = False
    ours.addHandler(handler)
    absl_logging.set_verbosity(absl_logging.WARNING)


def _fail(error: Exception) -> None:
    print(f"Error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(_EXIT_USER_ERROR)


if __name__ == "__main__":
    run(_define_flags, _main)
