# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of the reference as a workdir that `--mode=eval` evaluates."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from balpoe_jax import files
from balpoe_jax.config import Settings
from balpoe_jax.errors import UserError
from balpoe_jax.experiment.build import build
from balpoe_jax.experiment.phases import step_at
from balpoe_jax.experiment.program import Program
from balpoe_jax.models.weight_files import load_checkpoint
from balpoe_jax.run import metric_writer, record
from balpoe_jax.run.checkpoint import Checkpoints
from balpoe_jax.torch_import.conversion import check_against, convert, refuse_non_finite

log = logging.getLogger(__name__)


def import_checkpoint(path: str | os.PathLike[str], settings: Settings, workdir: str) -> None:
    """Makes a workdir that `--mode=eval` evaluates from a checkpoint of the reference.

    The imported state has the step at which the checkpoint's epoch ended (the last step of the
    config if the file tells no epoch), and an optimizer without momentum.

    Args:
        path: Path of the file, see `balpoe_jax.models.weight_files.load_checkpoint`.
        settings: Settings of the experiment; its model must be the checkpoint's.
        workdir: Folder without a run, created when missing.

    Raises:
        UserError (a `ValueError`): a file that cannot be read, parameters that do not fit the
            model, a workdir that holds a run, or what `balpoe_jax.experiment.build.build` refuses.
    """
    state_dict, epoch = load_checkpoint(path)
    variables = convert(state_dict)
    refuse_non_finite(state_dict)
    directory = record.open_workdir(workdir)
    _refuse_used(directory)
    with metric_writer.log_to_file(directory):
        experiment = build(settings)
        program = experiment.program
        expected = program.abstract_state()
        if program.network is not program.model or jax.tree.leaves(expected.method_state):
            raise UserError(
                f"The method {settings.method.name} trains more than the reference's network; "
                "import into a config of method=balpoe."
            )
        check_against(variables, expected.variables)
        step = program.total_steps if epoch is None else step_at(program.phases, epoch)
        try:
            with Checkpoints(str(directory / "checkpoints")) as checkpoints:
                checkpoints.save(_make_state(program, expected, variables, step))
            record.write_config(
                directory, settings, experiment.resolved(), experiment.data_record()
            )
        except BaseException:  # half an import would be in the way of the next try
            shutil.rmtree(directory / "checkpoints", ignore_errors=True)
            raise
        log.info("Imported %s as step %d of %s; evaluate with --mode=eval", path, step, directory)


def _refuse_used(workdir: Path) -> None:
    used = [name for name in (files.CONFIG, "checkpoints") if (workdir / name).exists()]
    if used:
        raise UserError(
            f"The workdir {workdir} already holds a run ({', '.join(used)}); import into another "
            "one with --workdir=DIR."
        )


def _make_state(program: Program, expected: Any, variables: dict[str, Any], step: int) -> Any:
    """The state of a run at `step` with these variables, on every device."""
    cast = jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), variables, expected.variables)
    opt_state = program.phases[0].optimizer.init(cast["params"])
    average = program.average
    state = expected.replace(
        step=jnp.asarray(step, expected.step.dtype),
        params=cast["params"],
        batch_stats=cast["batch_stats"],
        averages=None if average is None else average.start(cast["params"], cast["batch_stats"]),
        # The schedule's counter, so that the learning rate would be that of the step.
        opt_state=optax.tree_utils.tree_set(opt_state, count=jnp.asarray(step, jnp.int32)),
    )
    return program.parallel.replicate(state)
