# SPDX-License-Identifier: Apache-2.0
"""Trained runs that another run learns from: their settings and their variables."""

import dataclasses
import logging
from typing import Any

from balpoe_jax import files
from balpoe_jax.config import Settings, from_record, with_defaults
from balpoe_jax.errors import UserError
from balpoe_jax.run import record
from balpoe_jax.run.checkpoint import Checkpoints
from balpoe_jax.step import TrainState

log = logging.getLogger(__name__)


def read_settings(workdir: str, student: Settings) -> Settings:
    """The settings of a teacher's run, with batches that the student's devices can share.

    Args:
        workdir: Folder of the teacher's run.
        student: Settings of the run that learns from it.

    Raises:
        UserError (a `ValueError`): no run there, one that cannot be read, or one on other data.
    """
    path = record.locate(workdir) / files.CONFIG
    try:
        settings = from_record(with_defaults(record.read_config(path)))
    except FileNotFoundError as error:
        raise UserError(
            f"The teacher's workdir {path.parent} holds no run (there is no {files.CONFIG}); "
            "train it first, or name another one with --config.method.teacher=DIR."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"The teacher's {path} cannot be read ({error}); name another one with "
            "--config.method.teacher=DIR."
        ) from error
    if settings.data.name != student.data.name:
        raise UserError(
            f"The teacher in {path.parent} was trained on {settings.data.name}, not on "
            f"{student.data.name}; name another one with --config.method.teacher=DIR."
        )
    if settings.optim.swa is not None:
        raise UserError(
            f"The teacher in {path.parent} was trained with config.optim.swa={settings.optim.swa}, "
            "whose average has no statistics of BatchNorm before an evaluation; train one without "
            "it, or with config.optim.ema."
        )
    second = settings.phase2 and dataclasses.replace(settings.phase2, batch_size=None)
    return dataclasses.replace(
        settings,
        batch_size=student.batch_size,
        optim=dataclasses.replace(settings.optim, accumulation_steps=1),
        mix=dataclasses.replace(settings.mix, groups=student.mix.groups),
        phase2=second,
    )


def load(workdir: str, like: TrainState) -> dict[str, Any]:
    """`params` and `batch_stats` of a teacher's newest checkpoint, as a program would hold them.

    Args:
        workdir: Folder of the teacher's run.
        like: Abstract state of its program.

    Raises:
        UserError (a `ValueError`): no checkpoint there, or one that does not fit.
    """
    path = record.locate(workdir)
    with Checkpoints(str(path / "checkpoints"), read_only=True) as checkpoints:
        state = checkpoints.restore_latest(like)
    if state is None:
        raise UserError(
            f"There is no checkpoint of the teacher in {path}; train it first, or name another one "
            "with --config.method.teacher=DIR."
        )
    log.info("The teacher is the checkpoint of step %d in %s", int(state.step), path)
    # Read above: no average but one that has statistics of its own.
    return state.variables if state.averages is None else state.averages
