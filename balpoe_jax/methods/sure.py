# SPDX-License-Identifier: Apache-2.0
"""SURE: RegMixup, SAM, SWA and a cosine classifier around cross-entropy (Li et al., CVPR 2024).

None of it needs a method of its own: images are mixed by `mix.regmixup`, and `optim.sam` and
`optim.swa` are options of any training. The authors' code (YutingLi0606/SURE) turns its correctness
ranking loss off for long-tailed data, so there is none here.

The published figures are those of the paper's Table 2 before a second stage of re-weighting, which
is not here. Their ResNet-32 has 64, 128 and 256 channels, and so has the preset's: `width=1` gives
it the channels of the other methods. Their epoch is chosen on the test set.

The numbers are those of the code, whose loss is the sum of a mean over clean and one over mixed
images. Here it is the mean of both, so that on CIFAR the learning rates are twice as high and the
weight decay is half as high, which makes SGD take the same steps.

What differs on purpose: clean and mixed images go through the network together, as in RegMixup's
own code, and not one after the other. Both passes of SAM have the same mixture, and the first alone
moves BatchNorm's running averages. The training has 200 epochs where the code's loop makes 201.
No figures are published for photographs; rates and decay there are those of the data set.
"""

from typing import Any

from balpoe_jax.methods.balpoe import BalPoE
from balpoe_jax.methods.preset import Preset, PublishedResult

_CIFAR: dict[str, Any] = {
    "optim.learning_rate": 0.2,
    "optim.weight_decay": 2.5e-4,
    "optim.swa_learning_rate": 0.1,
    "optim.decay_epochs": (),
    "optim.warmup_epochs": 0,
    "augment.rotation": 0.0,
    "model.width": 4,
}

_PAPER = "SURE's Table 2"


def _on(dataset: str, *accuracies: float) -> tuple[PublishedResult, ...]:
    """Of ratios 100, 50 and 10."""
    return tuple(
        PublishedResult(dataset, f"ir={ratio}", accuracy, _PAPER)
        for ratio, accuracy in zip((100, 50, 10), accuracies, strict=True)
    )


PRESETS = {
    "sure": Preset(
        BalPoE(),
        "SURE, first stage",
        taus=(0.0, 0.0),
        fields={
            "model.classifier": "cosine",
            "model.classifier_scale": 8.0,
            "mix.rule": "mixup",
            "mix.alpha": 10.0,
            "mix.regmixup": True,
            "optim.nesterov": False,
            "optim.schedule": "cosine",
            "optim.sam": 0.05,
            "optim.swa": 120,
            "optim.swa_anneal_epochs": 10,
        },
        on={
            "cifar100_lt": {
                **_CIFAR,
                "data.mean": (0.5071, 0.4867, 0.4408),
                "data.std": (0.2675, 0.2565, 0.2761),
            },
            "cifar10_lt": _CIFAR,
        },
        published=(
            *_on("cifar100_lt", 51.6, 58.57, 71.13),
            *_on("cifar10_lt", 83.28, 87.72, 93.73),
        ),
    ),
}
