# SPDX-License-Identifier: Apache-2.0
"""Whole runs on the digits: their configs, rows and last states, and interruptions."""

import json
import shutil
from pathlib import Path

from balpoe_jax.config import resolve
from balpoe_jax.experiment.build import build
from balpoe_jax.run.checkpoint import Checkpoints
from tests.helpers.config_files import get_config

STEPS_PER_EPOCH = 3


def tiny_config(total_epochs: int = 2, **changes):
    """A config for 413 digits, with three steps an epoch."""
    config = get_config("digits_lt")
    config.batch_size = 140
    config.total_epochs = total_epochs
    config.log_every_steps = 1
    config.checkpoint.every_epochs = 1
    config.checkpoint.keep = 10
    config.eval.every_epochs = None
    config.update_from_flattened_dict({name.replace("__", "."): v for name, v in changes.items()})
    return config


def rows(workdir: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The rows of a file in JSON Lines."""
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def final_state(config, workdir: Path):
    """The state of the newest checkpoint."""
    with Checkpoints(str(workdir / "checkpoints")) as checkpoints:
        return checkpoints.restore_latest(build(resolve(config)).program.abstract_state())


def interrupt(finished: Path, workdir: Path, epoch: int) -> None:
    """Copies a run as if it had been killed some time after the checkpoint of `epoch`."""
    shutil.copytree(finished, workdir)
    for checkpoint in (workdir / "checkpoints").iterdir():
        if int(checkpoint.name) > epoch * STEPS_PER_EPOCH:
            shutil.rmtree(checkpoint)
    (workdir / "results.json").unlink()
