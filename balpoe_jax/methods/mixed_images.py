# SPDX-License-Identifier: Apache-2.0
"""One classifier on mixed images: CutMix, Remix, UniMix, Bayias and CMO, as presets (2019 to 2022).

How images and labels are mixed is a transform of the data (`balpoe_jax.data.batches.mixing`), and
the losses are BalPoE's for one expert, so that these need no method of their own.

- CutMix (Yun et al., ICCV 2019), and mixup or CutMix by turns.
- Remix (Chou et al., ECCV workshops 2020): the rarer class takes the whole label where it owns more
  than half of the image; with deferred class weights (DRW) the weighted losses are divided by the
  number of rows, as in a later implementation (ntucllab/imbalanced-DL). There is no official code;
  followed is the paper.
- Bayias (Xu et al., NeurIPS 2021) compensates the training prior in the logits, the uniform test
  prior being a constant there: it is balanced softmax under another name. UniMix, of the same
  paper, is a mixup whose coefficients and partners favour rare classes. As in the authors' code
  (XuZhengzhuo/Prior-LT) partners are drawn within the batch, image by image, which leaves them
  head-heavy; `mix.partners=sampler` draws classes, as the paper says. They published no settings
  for photographs: those here are ours.
- CMO (Park et al., CVPR 2022) pastes images from a sampler of rare classes into those of the
  ordinary one. As in the authors' code (naver-ai/cmo) images are drawn in inverse proportion to
  their class, which makes classes uniform; the paper reads as if classes were drawn that way. In
  the long recipe each image is augmented in one of two ways, by AutoAugment (or RandAugment) or as
  a view of contrastive learning. Its warm-up on CIFAR ends with the tenth epoch; the code's has an
  eleventh, at 1.1 times the rate.
"""

from typing import Any

from balpoe_jax.methods.augmentations import either_of
from balpoe_jax.methods.balpoe import BalPoE
from balpoe_jax.methods.preset import Preset, PublishedResult
from balpoe_jax.methods.reweighting import Reweighted

_CROSS_ENTROPY, _BALANCED = (0.0, 0.0), (1.0, 1.0)

_PLAIN = {
    "model.classifier": "linear",
    "optim.nesterov": False,
    "optim.weight_decay": 2e-4,
    "augment.rotation": 0.0,
}

# Remix's training on CIFAR, in whose comparison mixup and CutMix stand too.
_REMIX_CIFAR = {
    "total_epochs": 300,
    "optim.decay_epochs": (150, 250),
    "optim.warmup_epochs": 0,
    "mix.alpha": 1.0,
}
_REMIX_INATURALIST = {
    "total_epochs": 90,
    "batch_size": 256,
    "optim.learning_rate": 0.1,
    "optim.schedule": "step",
    "optim.decay_epochs": (30, 60),
    "augment.color_jitter": (0.4, 0.4, 0.4),
    "mix.alpha": 0.4,
}

_REMIX = "Remix's paper"


# Weights begin with the last drop of the learning rate. They are those of the effective numbers, by
# a beta of (N - 1) / N for N training images; on CIFAR that is nearly the usual 0.9999.
_DRW = Reweighted(weights="class_balanced", reweight_epoch=250, weight_norm="batch")
_DRW_INATURALIST = {
    **_REMIX_INATURALIST,
    "total_epochs": 200,
    "optim.decay_epochs": (75, 150),
    "method.reweight_epoch": 150,
    "method.beta": 1 - 1 / 437_513,
}


def _remix(
    rule: str,
    about: str,
    published: tuple[PublishedResult, ...] = (),
    method: BalPoE | Reweighted | None = None,
    on_inaturalist: dict[str, Any] | None = None,
) -> Preset:
    return Preset(
        method or BalPoE(),
        about,
        taus=_CROSS_ENTROPY,
        fields={**_PLAIN, "mix.rule": rule, "mix.alpha": 1.0},
        on={
            "cifar100_lt": _REMIX_CIFAR,
            "cifar10_lt": _REMIX_CIFAR,
            "imagenet_lt": {"mix.alpha": 0.4},
            "inaturalist2018": on_inaturalist or _REMIX_INATURALIST,
        },
        epochs=300,
        published=published,
    )


def _on_cifar100(*accuracies: float, source: str = _REMIX) -> tuple[PublishedResult, ...]:
    """Of ratio 100, and of ratio 10."""
    return tuple(
        PublishedResult("cifar100_lt", f"ir={ratio}", accuracy, source)
        for ratio, accuracy in zip((100, 10), accuracies, strict=True)
    )


_PRIOR_LT_CIFAR = {"batch_size": 64, "optim.decay_factor": 0.01}
_PRIOR_LT = "UniMix's repository"


def _prior_lt(
    about: str, taus: tuple[float, float], mixes: bool, *published: PublishedResult
) -> Preset:
    mixing: dict[str, Any] = {"mix.rule": "unimix", "mix.alpha": 0.8, "mix.sampling_power": -0.1}
    return Preset(
        BalPoE(),
        about,
        taus=taus,
        fields=_PLAIN | (mixing if mixes else {}),
        on={
            "cifar100_lt": _PRIOR_LT_CIFAR,
            "cifar10_lt": _PRIOR_LT_CIFAR | ({"mix.sampling_power": -0.5} if mixes else {}),
        },
        published=published,
    )


_CMO_LONG = {"total_epochs": 400, "mix.last_epoch": 397, "optim.warmup_epochs": 10}
_CMO_LONG_PHOTOS = {
    **_CMO_LONG,
    "batch_size": 128,
    "optim.learning_rate": 0.02,
    "optim.schedule": "cosine_after_warmup",
    "optim.decay_epochs": (),
    **either_of("rand", "photo_similar"),
}


def _cmo(about: str, taus: tuple[float, float], *published: PublishedResult) -> Preset:
    photos = {
        "total_epochs": 100,
        "optim.learning_rate": 0.1,
        "optim.schedule": "step",
        "optim.warmup_epochs": 5,
        "mix.last_epoch": 97,
    }
    return Preset(
        BalPoE(),
        about,
        taus=taus,
        fields={
            **_PLAIN,
            "mix.rule": "cmo",
            "mix.alpha": 1.0,
            "mix.sampling_power": 0.0,
            "mix.probability": 0.5,
            # The first epochs and the last ones see no mixed image.
            "mix.first_epoch": 4,
            "mix.last_epoch": 197,
        },
        on={
            "cifar100_lt": {"optim.decay_factor": 0.01},
            "cifar100_lt:recipe=long": {
                **_CMO_LONG,
                "optim.decay_factor": 0.1,
                "optim.decay_epochs": (321, 361),
                **either_of("strong", "similar"),
            },
            "imagenet_lt": {
                **photos,
                "batch_size": 128,
                "optim.decay_epochs": (60, 80),
            },
            "imagenet_lt:recipe=long": {**_CMO_LONG_PHOTOS, "optim.weight_decay": 5e-4},
            "inaturalist2018": {**photos, "batch_size": 256, "optim.decay_epochs": (75,)},
            "inaturalist2018:recipe=long": {**_CMO_LONG_PHOTOS, "optim.weight_decay": 1e-4},
        },
        published=published,
    )


_CMO, _PAPER = "CMO's paper", "BalPoE's Table 1"

PRESETS = {
    "mixup_remix": _remix("mixup", "mixup, Remix's training", _on_cifar100(40.83, 58.37)),
    "cutmix": _remix("cutmix", "CutMix", _on_cifar100(41.86, 59.47)),
    "mixup_or_cutmix": _remix("mixup_or_cutmix", "mixup or CutMix"),
    "remix": _remix(
        "remix",
        "Remix",
        (*_on_cifar100(41.94, 59.36), PublishedResult("inaturalist2018", "", 61.3, _REMIX)),
    ),
    "remix_drw": _remix(
        "remix",
        "Remix-DRW",
        (*_on_cifar100(46.77, 61.23), PublishedResult("inaturalist2018", "", 70.5, _REMIX)),
        _DRW,
        _DRW_INATURALIST,
    ),
    "remix_cutmix": _remix("remix_cutmix", "Remix with CutMix", _on_cifar100(43.55, 60.15)),
    "bayias": _prior_lt(
        "Bayias",
        _BALANCED,
        False,
        PublishedResult("cifar100_lt", "ir=100", 43.5, _PAPER.replace("1", "2"), ece=24.3),
    ),
    "unimix": _prior_lt("UniMix", _CROSS_ENTROPY, True),
    "unimix_bayias": _prior_lt(
        "UniMix + Bayias",
        _BALANCED,
        True,
        PublishedResult("cifar100_lt", "ir=100", 45.5, _PAPER.replace("1", "2"), ece=23.0),
        PublishedResult("cifar100_lt", "ir=10", 61.25, _PRIOR_LT),
    ),
    "cmo_ce": _cmo(
        "CMO + CE", _CROSS_ENTROPY, PublishedResult("cifar100_lt", "ir=100", 43.9, _CMO)
    ),
    "cmo_bs": _cmo(
        "CMO + balanced softmax",
        _BALANCED,
        PublishedResult("cifar100_lt", "ir=100", 46.6, _CMO),
        *(
            PublishedResult("cifar100_lt", f"ir={ratio},recipe=long", accuracy, _PAPER)
            for ratio, accuracy in {10: 65.3, 50: 56.7, 100: 51.7}.items()
        ),
        PublishedResult("imagenet_lt", "", 52.3, _CMO),
        PublishedResult("imagenet_lt", "recipe=long", 58.0, _PAPER),
        PublishedResult("inaturalist2018", "recipe=long", 74.0, _PAPER),
    ),
}
