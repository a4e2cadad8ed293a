# SPDX-License-Identifier: Apache-2.0
"""The phases of a training in time: which updates belong to each, at which rates.

Most methods have one. Steps are counted through all of them; epochs too, though an epoch of another
phase may have another number of steps.
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
        index: position in the method's phases.
        name: for the log.
        context: what the method is told.
        optimizer: with its learning-rate schedule; the structure of its state is that of all
            phases.
        learning_rates: float64 `[epochs]`.
        first_epoch: epochs made before this phase.
    """

    index: int
    name: str
    context: Context
    optimizer: optax.GradientTransformation
    learning_rates: npt.NDArray[np.float64]
    first_epoch: int

    @property
    def first_step(self) -> int:
        """Updates made before this phase."""
        return self.context.first_step

    @property
    def last_step(self) -> int:
        """Updates made at its end."""
        return self.first_step + len(self.learning_rates) * self.context.steps_per_epoch

    @property
    def last_epoch(self) -> int:
        """Epochs made at its end."""
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
    """How many epochs `step` updates are."""
    plan = phase_of(plans, step)
    return plan.first_epoch + (step - plan.first_step) / plan.context.steps_per_epoch


def step_at(plans: Sequence[PhasePlan], epoch: int) -> int:
    """How many updates `epoch` epochs are."""
    plan = next((plan for plan in plans if epoch <= plan.last_epoch), plans[-1])
    return plan.first_step + (epoch - plan.first_epoch) * plan.context.steps_per_epoch
