# SPDX-License-Identifier: Apache-2.0
"""The phases of a training in time: which updates belong to each, at which rates.

Most methods have one. Steps and epochs are counted through all phases, though the number of steps
in an epoch may differ between them.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import optax

from balpoe_jax.methods import Context


@dataclasses.dataclass(frozen=True, eq=False)
class PhasePlan:
    """One phase as it is run.

    Attributes:
        index: Position in the method's phases.
        name: Name in the log.
        context: Constants that the method is told.
        optimizer: Optimizer with its learning-rate schedule; its state has the same structure in
            all phases.
        learning_rates: Rate of each epoch, float64 `[epochs]`.
        first_epoch: Number of epochs before this phase.
    """

    index: int
    name: str
    context: Context
    optimizer: optax.GradientTransformation
    learning_rates: npt.NDArray[np.float64]
    first_epoch: int

    @property
    def first_step(self) -> int:
        """Number of updates before this phase."""
        return self.context.first_step

    @property
    def last_step(self) -> int:
        """Number of updates at its end."""
        return self.first_step + len(self.learning_rates) * self.context.steps_per_epoch

    @property
    def last_epoch(self) -> int:
        """Number of epochs at its end."""
        return self.first_epoch + len(self.learning_rates)

    def learning_rate(self, step: int) -> float:
        """The learning rate of the update that leads to `step`."""
        return float(
            self.learning_rates[(step - 1 - self.first_step) // self.context.steps_per_epoch]
        )


def phase_of(plans: Sequence[PhasePlan], step: int) -> PhasePlan:
    """The phase of the update that leads to `step`."""
    return next((plan for plan in plans if step <= plan.last_step), plans[-1])


def epoch_at(plans: Sequence[PhasePlan], step: int) -> float:
    """Number of epochs that `step` updates are."""
    plan = phase_of(plans, step)
    return plan.first_epoch + (step - plan.first_step) / plan.context.steps_per_epoch


def step_at(plans: Sequence[PhasePlan], epoch: int) -> int:
    """Number of updates that `epoch` epochs are."""
    plan = next((plan for plan in plans if epoch <= plan.last_epoch), plans[-1])
    return plan.first_step + (epoch - plan.first_epoch) * plan.context.steps_per_epoch
