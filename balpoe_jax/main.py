# SPDX-License-Identifier: Apache-2.0
"""Flags and process start-up, then training or evaluation: `python -m balpoe_jax.main --help`."""

import contextlib
from collections.abc import Sequence

from absl import flags

from balpoe_jax import cli
from balpoe_jax.errors import UserError
from balpoe_jax.run import startup_times
from balpoe_jax.run.preemption import PreemptionNotice


def define_flags() -> None:
    """Defines --config, --workdir, --mode, and the flags of a run of several processes."""
    cli.define_run_flags()
    flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train and evaluate, or evaluate only.")
    flags.DEFINE_bool(
        "distributed",
        False,
        "Whether this is one of several processes; TPU pods (GKE's too), Slurm and Open MPI tell "
        "which.",
    )
    flags.DEFINE_string(
        "coordinator_address", None, "HOST:PORT of process 0, where the cluster does not tell it."
    )
    flags.DEFINE_integer(
        "num_processes",
        None,
        "Number of processes, where the cluster does not tell it.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "process_id", None, "Number of this process, counted from 0.", lower_bound=0
    )
    flags.DEFINE_integer(
        "heartbeat_timeout_seconds",
        60,
        "Seconds without a sign of life from another process before this one ends.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "start_timeout_seconds",
        300,
        "Seconds for all processes to find each other before this one ends, with exit code 75.",
        lower_bound=1,
    )


def main(arguments: Sequence[str]) -> None:
    """Trains or evaluates as the flags say."""
    if len(arguments) > 1:
        raise UserError(f"Unexpected argument {arguments[1]!r}; every option starts with --.")
    with PreemptionNotice(cli.report) as notice, _processes():
        _start(notice)


def _processes() -> contextlib.AbstractContextManager[None]:
    """A context within which this process belongs to the run's others, if the flags name any."""
    # Here and not above: JAX reads its environment when it is imported.
    from balpoe_jax.run import multihost

    values = flags.FLAGS
    which = (values.coordinator_address, values.num_processes, values.process_id)
    if None in which and which != (None, None, None):
        raise UserError(
            "--coordinator_address, --num_processes and --process_id belong together: give all "
            "three, or none where the cluster is known."
        )
    if not values.distributed:
        if None not in which:
            raise UserError(
                "--coordinator_address, --num_processes and --process_id need --distributed."
            )
        return contextlib.nullcontext()
    if None not in which and values.process_id >= values.num_processes:
        raise UserError(
            f"--process_id must be below --num_processes, got {values.process_id} of "
            f"{values.num_processes}."
        )
    return multihost.process_group(
        *which,
        heartbeat_timeout_seconds=values.heartbeat_timeout_seconds,
        start_timeout_seconds=values.start_timeout_seconds,
        report=cli.report,
    )


def _start(notice: PreemptionNotice) -> None:
    """Resolves the config, and trains or evaluates."""
    # Here and not above, so that --help and wrong flags need not wait for JAX.
    from balpoe_jax.config import resolve
    from balpoe_jax.evaluate import evaluate
    from balpoe_jax.train import train

    settings, workdir = resolve(flags.FLAGS.config), flags.FLAGS.workdir
    cli.use_compilation_cache(settings.compilation_cache_dir)
    if flags.FLAGS.mode == "train":
        train(settings, workdir, startup_times.of_this_process(), notice)
    else:
        evaluate(settings, workdir)


if __name__ == "__main__":
    cli.run(define_flags, main)
