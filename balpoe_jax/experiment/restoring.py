# SPDX-License-Identifier: Apache-2.0
"""The state to evaluate: of the newest checkpoint, or of weights that came without one."""

from pathlib import Path

import numpy as np

from balpoe_jax import files
from balpoe_jax.experiment.program import Program
from balpoe_jax.run import weights_file
from balpoe_jax.run.checkpoint import Checkpoints
from balpoe_jax.step import TrainState


def restore(program: Program, path: Path) -> TrainState | None:
    """The state in a workdir; None where there is neither a checkpoint nor a file of weights.

    Weights alone are those that were evaluated, and stand for averaged ones, too.

    Args:
        program: Program of the run.
        path: Workdir.

    Raises:
        UserError (a `ValueError`): a checkpoint or a file that is damaged or of another network.
    """
    if (path / "checkpoints").is_dir() or not (path / weights_file.FILE).is_file():
        with Checkpoints(str(path / "checkpoints"), read_only=True) as checkpoints:
            return checkpoints.restore_latest(program.abstract_state())
    state = program.init_state()
    read = program.parallel.replicate(weights_file.read(path, state.variables))
    step = (files.read_json(path / files.RESULTS) or {}).get("step")
    step = step if isinstance(step, int) and step >= 0 else 0
    return state.replace(
        step=program.parallel.replicate(np.int32(step)),
        params=read["params"],
        batch_stats=read["batch_stats"],
        averages=None if program.average is None else read,
    )
