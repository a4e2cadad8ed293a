# SPDX-License-Identifier: Apache-2.0
"""The plan of a step: all that is drawn for its batch, as small arrays. NumPy only."""

from typing import Any

import numpy as np
import numpy.typing as npt

from balpoe_jax.data.device.mixing import Arrays, Mixer
from balpoe_jax.data.device.orders import Labels, Order
from balpoe_jax.data.device.randomness import generator
from balpoe_jax.data.device.views import DeviceView
from balpoe_jax.data.settings import TrainSettings

# Names of the view of partners that a second sampler draws, and of their second view.
OTHERS, OTHERS_2 = "others", "others_2"


class Planner:
    """Plans the batches of a training set: the plan of step k is a function of (seed, k) alone.

    Args:
        labels: Classes of the training set, int `[N]`.
        image_shape: Shape of an image, `(H, W, 3)`.
        settings: Settings of the batches.

    Attributes:
        settings: Settings of the batches.
        views: Augmentations of a batch's views, by their names in the plan.
    """

    def __init__(
        self, labels: Labels, image_shape: tuple[int, int, int], settings: TrainSettings
    ) -> None:
        self.settings = settings
        first = DeviceView(settings.augment, image_shape, settings.other_augment)
        self.views = {"images": first}
        for number, augment in enumerate(settings.views, 2):
            self.views[f"images_{number}"] = DeviceView(augment, image_shape)
        if settings.mix.from_sampler:
            self.views[OTHERS] = first
            if settings.mix.of_two_views and settings.views:
                self.views[OTHERS_2] = DeviceView(settings.views[0], image_shape)
        self._labels = labels.astype(np.int32)
        self._order = Order(labels, settings)
        self._mixer = Mixer(labels, image_shape, settings) if settings.mix.alpha > 0 else None

    def tables(self) -> Arrays:
        """Constants of each view, by its name, which have to lie in device memory."""
        return {name: view.tables() for name, view in self.views.items()}

    def positions(self, step: int) -> npt.NDArray[np.int32]:
        """Positions of the examples of a step's batch, int32 `[B]`, without partners."""
        return self._order.positions(step)

    def step(self, step: int) -> Arrays:
        """The plan of one step, counted from 0; every leaf is `[B, ...]`."""
        index = self.positions(step)
        labels = self._labels[index]
        plan: Arrays = {"index": index, "labels": labels}
        plan |= {"other_labels": labels, "weight": np.ones(len(labels), np.float32)}
        if self._mixer is not None:
            plan["mix"], mixed_labels = self._mixer.draw(step, labels)
            plan |= mixed_labels
        plan["views"] = {
            name: view.draw(generator(self.settings.seed, name, step), len(index))
            for name, view in self.views.items()
        }
        return plan

    def steps(self, first_step: int, last_step: int) -> Arrays:
        """The plans of steps `first_step` to `last_step - 1`; every leaf is `[K, B, ...]`."""
        return _stack([self.step(step) for step in range(first_step, last_step)])


def _stack(plans: list[Any]) -> Any:
    if isinstance(plans[0], dict):
        return {name: _stack([plan[name] for plan in plans]) for name in plans[0]}
    return np.stack(plans)
