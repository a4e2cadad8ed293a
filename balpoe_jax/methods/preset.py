# SPDX-License-Identifier: Apache-2.0
"""What a method's name in a config file's arguments stands for, as data."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from balpoe_jax.methods.base import Method


@dataclasses.dataclass(frozen=True)
class PublishedResult:
    """A published result, in percent of the balanced test set.

    Attributes:
        dataset: as in `Preset.on`, "cifar100_lt", "imagenet_lt" or "inaturalist2018".
        arguments: what else stands after the config file's colon, such as "ir=100".
        accuracy: top-1, over all classes.
        source: who reports it.
        ece: expected calibration error, where published.
        network: Network that it was measured on, in words; empty where that is not said.
    """

    dataset: str
    arguments: str
    accuracy: float
    source: str
    ece: float | None = None
    network: str = ""


@dataclasses.dataclass(frozen=True)
class Preset:
    """A method with its hyper-parameters, and how its authors train it on each data set.

    Attributes:
        method: its fields become the section `method` of the config.
        about: what it is called in a table.
        experts: how many.
        taus: ends of the range of taus, of BalPoE's kin; None for the data set's own.
        mixup: whether images are mixed by the data set's own mixup unless it is turned off; what
            mixes otherwise says so in `fields`.
        fields: of the config, by dotted name, on every data set; `phase2.*` asks for a second
            phase and `view2.*`, `view3.*` for further views of an image.
        on: further fields by data set, "cifar100_lt", or data set and argument,
            "cifar100_lt:ir=50" or "imagenet_lt:backbone=resnext50"; "cifar100_lt:recipe=long" is
            the authors' long training.
        epochs: of the training that the method's own fields are for, where a data set's recipe
            does not say how long it is.
        published: results.
        teacher: recipe and arguments of the run that it learns from, such as ("ride", "experts=6"),
            which tables train before it; None for a method that learns from the labels alone.

    With the length of the training scale the method's fields that `base.epochs` marks, and of the
    fields here those that `balpoe_jax.config.dataset_defaults` lists.
    """

    method: Method
    about: str
    experts: int = 1
    taus: tuple[float, float] | None = None
    mixup: bool = False
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    on: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    epochs: int = 200
    published: tuple[PublishedResult, ...] = ()
    teacher: tuple[str, str] | None = None

    def own(self, dataset: str, *arguments: str) -> dict[str, Any]:
        """The fields on a data set under arguments such as "ir=50" and "recipe=long"."""
        fields = dict(self.fields) | dict(self.on.get(dataset, {}))
        for argument in arguments:
            fields |= self.on.get(f"{dataset}:{argument}", {})
        return fields
