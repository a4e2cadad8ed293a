# SPDX-License-Identifier: Apache-2.0
"""Steps whose loss, gradient or new state is not finite: named, counted, skipped or refused.

Each is a line of the workdir's `non_finite.jsonl`, with the examples of its batch, which the seed
and the step determine: `{"step", "learning_rate", "loss", "expert_losses", "grad_norm", "skipped",
"indices", "ids"}`. Indices are positions in the training set, ids what its source calls them.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from balpoe_jax import files
from balpoe_jax.errors import UserError
from balpoe_jax.run import multihost

NON_FINITE = "non_finite.jsonl"

_MOST_LISTED = 8

log = logging.getLogger(__name__)


class NonFiniteSteps:
    """The steps of a run that were not finite; the config lets some of them pass.

    Args:
        workdir: Folder of the run.
        first_step: Step after which this start continues. Records of later steps are discarded,
            since the steps will be made again.
        limit: Number of steps that the config lets pass without an update.
        batch_indices: Positions of the training examples of the update that leads to a step.
        learning_rate: Learning rate of that update.
        ids: Names of training examples at given positions.

    Attributes:
        skipped: Number of steps that passed so far.
    """

    def __init__(
        self,
        workdir: Path,
        first_step: int,
        limit: int,
        batch_indices: Callable[[int], npt.NDArray[np.int64]],
        learning_rate: Callable[[int], float],
        ids: Callable[[npt.NDArray[np.int64]], list[str]],
    ) -> None:
        self._limit = limit
        self._batch_before, self._rate_before, self._ids = batch_indices, learning_rate, ids
        self._path = workdir / NON_FINITE
        rows = _read(self._path)
        self._rows = [row for row in rows if row["step"] <= first_step and row["skipped"]]
        self.skipped = len(self._rows)
        multihost.run_on_process_0(self._write)

    def check(self, step: int, metrics: dict[str, Any]) -> None:
        """Records a step that is not finite.

        Args:
            step: Step to which the update leads.
            metrics: Metrics of the step.

        Raises:
            UserError (a `ValueError`): the limit was reached before.
        """
        batch = self._batch_before(step)
        skip = self.skipped < self._limit
        row = {
            "step": step,
            "learning_rate": self._rate_before(step),
            **{name: metrics[name] for name in ("loss", "expert_losses", "grad_norm")},
            "skipped": skip,
            "indices": batch,
            "ids": self._ids(batch),
        }
        self._rows.append(files.to_json(row))
        if multihost.is_first():
            self._write()
        if not skip:
            raise UserError(self._explain(row))
        self.skipped += 1
        log.warning("Step %d is not finite and skipped, %d of %d", step, self.skipped, self._limit)

    def _explain(self, row: dict[str, Any]) -> str:
        listed = ", ".join(
            f"{index} ({name})"
            for index, name in zip(row["indices"][:_MOST_LISTED], row["ids"], strict=False)
        )
        more = len(row["indices"]) - _MOST_LISTED
        others = f" and {more} more" if more > 0 else ""
        before = f", after {self._limit} that were skipped" if self._limit else ""
        return (
            f"The loss, its gradient or the update is not finite at step {row['step']} (learning "
            f"rate {row['learning_rate']:g}){before}; its batch is training examples {listed}"
            f"{others}, all listed in {self._path}; training stopped and the checkpoints so far "
            "are kept: try a lower --config.optim.learning_rate in a new workdir, or go on without "
            f"the step, with --config.optim.skip_non_finite={self.skipped + 1}."
        )

    def _write(self) -> None:
        if self._rows or self._path.exists():
            text = "".join(json.dumps(row) + "\n" for row in self._rows)
            files.write_atomically(self._path, text)


def summary(limit: int, workdir: Path, step: int) -> dict[str, int]:
    """The entry `skipped_steps` of `results.json` up to a step, if any may or did pass."""
    skipped = sum(row["skipped"] and row["step"] <= step for row in _read(workdir / NON_FINITE))
    return {"skipped_steps": skipped} if skipped or limit else {}


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if all(isinstance(row["step"], int) and row["skipped"] in (True, False) for row in rows):
            return rows
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(
        f"{path} is damaged: it should hold an object with step and skipped on each line; fix it, "
        "or remove it to count from 0."
    )
