# SPDX-License-Identifier: Apache-2.0
"""Presets: what a method's name in a config file's arguments stands for, as data."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from balpoe_jax.methods.base import Method

_TRUNKS = {
    "resnet8": "ResNet-8",
    "resnet20": "ResNet-20",
    "resnet32": "ResNet-32",
    "resnet44": "ResNet-44",
    "resnet56": "ResNet-56",
    "resnet32_bbn": "ResNet-32 of BBN",
    "resnet50": "ResNet-50",
    "resnet101": "ResNet-101",
    "resnet152": "ResNet-152",
    "resnext50": "ResNeXt-50",
    "efficientnet_lite0": "EfficientNet-Lite0",
}


@dataclasses.dataclass(frozen=True)
class PublishedResult:
    """A published result, in percent of the balanced test set.

    Attributes:
        dataset: Name of the data set as in `Preset.on`, such as "cifar100_lt".
        arguments: Other arguments after the config file's colon, such as "ir=100".
        accuracy: Top-1 accuracy over all classes.
        source: Source of the figures.
        ece: Expected calibration error, where published.
        network: Network of the figures, such as "ResNet-34"; None for that of the preset.
    """

    dataset: str
    arguments: str
    accuracy: float
    source: str
    ece: float | None = None
    network: str | None = None

    def measured_on(self, preset: "Preset") -> str:
        """The network in words: what `network` says, or that of the preset that has this result."""
        return self.network or preset.trained_network(self.dataset, self.arguments)


@dataclasses.dataclass(frozen=True)
class Preset:
    """A method with its hyper-parameters, and how its authors train it on each data set.

    Attributes:
        method: Method, whose fields become the section `method` of the config.
        about: Name in tables.
        experts: Number of experts.
        taus: Ends of the range of the experts' taus; None for the data set's own.
        mixup: Whether the data set's own mixup is on by default; other mixing is set in `fields`.
        fields: Fields of the config, by dotted name, on every data set. `phase2.*` asks for a
            second phase, and `view2.*`, `view3.*` for further views of an image.
        on: Further fields by data set ("cifar100_lt"), or by data set and argument
            ("cifar100_lt:ir=50" or "imagenet_lt:backbone=resnext50"). "cifar100_lt:recipe=long" is
            the authors' long training.
        epochs: Number of epochs of the training that the method's own fields are for, where the
            fields of a data set do not set it.
        published: Published results.
        teacher: Preset and arguments of the run that it learns from, such as ("ride", "experts=6"),
            which tables train before it; None for a method that learns only from labels.

    When the length of the training changes, the method's fields made by `base.epochs` scale with
    it, and so do the fields listed in `balpoe_jax.config.dataset_defaults`.
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

    def trained_network(self, dataset: str, arguments: str) -> str:
        """The network that a config trains, in words, such as "ResNet-32, 3 experts".

        Args:
            dataset: Name of the config file, such as "cifar100_lt".
            arguments: What stands after the file's colon, such as "ir=100,experts=3".
        """
        given = dict(part.split("=", 1) for part in arguments.split(",") if "=" in part)
        default = "resnet50" if dataset in ("imagenet_lt", "inaturalist2018") else "resnet32"
        words = [_TRUNKS[given.get("backbone", default)]]
        own = self.own(dataset, *arguments.split(","))
        experts = int(given.get("experts", self.experts))
        width = int(given.get("width", own.get("model.width", 1)))
        if width != 1:
            words[0] += f" x{width}"
        if experts > 1:
            words.append(f"{experts} experts")
        if own.get("model.reduce_dimension"):
            words.append("reduced width")
        return ", ".join(words)
