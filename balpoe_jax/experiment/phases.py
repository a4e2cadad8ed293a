# SPDX-License-Identifier: Apache-2.0
"""The stages of a training in time: which updates belong to each, at which rates.

Most methods have one. Steps are counted through all of them; epochs too, though an epoch of another
stage may have another number of steps.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import optax

from balpoe_jax.methods import Facts


@dataclasses.dataclass(frozen=True, eq=False)
class StagePlan:
    """One stage as it is run.

    Attributes:
        index: position in the method's stages.
        name: for the log.
        facts: what the method is told.
        optimizer: with its learning-rate schedule; the structure of its state is that of all
            stages.
        learning_rates: float64 `[epochs]`.
        first_epoch: epochs made before this stage.
    """

    index: int
    name: str
    facts: Facts
    optimizer: optax.GradientTransformation
    learning_rates: npt.NDArray[np.float64]
    first_epoch: int

    @property
    def first_step(self) -> int:
        """Updates made before this stage."""
        return self.facts.first_step

    @property
    def last_step(self) -> int:
        """Updates made at its end."""
        return self.first_step + len(self.learning_rates) * self.facts.steps_per_epoch

    @property
    def last_epoch(self) -> int:
        """Epochs made at its end."""
        return self.first_epoch + len(self.learning_rates)

    def rate_before(self, step: int) -> float:
        """The learning rate of the update that leads to `step`."""
        return float(
            self.learning_rates[(step - 1 - self.first_step) // self.facts.steps_per_epoch]
        )


def before(plans: Sequence[StagePlan], step: int) -> StagePlan:
    """The stage of the update that leads to `step`."""
    return next((plan for plan in plans if step <= plan.last_step), plans[-1])


def epoch_at(plans: Sequence[StagePlan], step: int) -> float:
    """How many epochs `step` updates are."""
    plan = before(plans, step)
    return plan.first_epoch + (step - plan.first_step) / plan.facts.steps_per_epoch


def step_at(plans: Sequence[StagePlan], epoch: int) -> int:
    """How many updates `epoch` epochs are."""
    plan = next((plan for plan in plans if epoch <= plan.last_epoch), plans[-1])
    return plan.first_step + (epoch - plan.first_epoch) * plan.facts.steps_per_epoch
