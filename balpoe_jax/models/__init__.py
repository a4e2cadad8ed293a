# SPDX-License-Identifier: Apache-2.0
"""Models by name: backbones with experts, pure Flax Linen modules."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from flax import linen as nn

from balpoe_jax.errors import UserError
from balpoe_jax.models import efficientnet, heads, resnet_cifar, resnet_imagenet
from balpoe_jax.models.batch_norm import BatchNormInParts
from balpoe_jax.models.convolutions import conv_by_expert
from balpoe_jax.models.ensemble import EXPERT_MAPS, Expert, ExpertEnsemble, Outputs
from balpoe_jax.models.layers import BatchNorm

__all__ = [
    "CIFAR_MODELS",
    "IMAGENET_MODELS",
    "MOBILE_MODELS",
    "MODELS",
    "ExpertEnsemble",
    "Outputs",
    "create_model",
]


class Architecture(NamedTuple):
    """What tells a model from the others of its family.

    Attributes:
        stage_sizes: Blocks in each stage.
        groups, group_width: Groups of the 3x3 convolutions, see `resnet_imagenet.Bottleneck`.
        branches: Whether it ends in two parallel blocks, see `resnet_cifar`.
    """

    stage_sizes: tuple[int, ...]
    groups: int = 1
    group_width: int = 64
    branches: bool = False


# For small images: see `resnet_cifar`.
CIFAR_MODELS = {
    "resnet8": Architecture((1, 1, 1)),
    "resnet20": Architecture((3, 3, 3)),
    "resnet32": Architecture((5, 5, 5)),
    "resnet44": Architecture((7, 7, 7)),
    "resnet56": Architecture((9, 9, 9)),
    "resnet32_bbn": Architecture((5, 5, 4), branches=True),
}

# For large images: see `resnet_imagenet`. ResNeXt-50 is the variant 32x4d.
IMAGENET_MODELS = {
    "resnet50": Architecture((3, 4, 6, 3)),
    "resnet101": Architecture((3, 4, 23, 3)),
    "resnet152": Architecture((3, 8, 36, 3)),
    "resnext50": Architecture((3, 4, 6, 3), groups=32, group_width=4),
}

# For large images on small machines: see `efficientnet`.
MOBILE_MODELS = {"efficientnet_lite0": Architecture((1, 2, 2, 3, 3, 4, 1, 1))}

MODELS = CIFAR_MODELS | IMAGENET_MODELS | MOBILE_MODELS

# Number of stages that the experts share by default, by the number of stages.
_SHARED = {3: 1, 4: 2, 8: 5}


def create_model(
    name: str,
    *,
    num_classes: int,
    num_experts: int,
    axis_name: str | None = None,
    expert_map: str = "loop",
    classifier: str = "cosine",
    scale: float = 30.0,
    classifier_init: str | None = None,
    reduce_dimension: bool = False,
    width: int = 1,
    shared_stages: int | None = None,
    stage_sizes: Sequence[int] | None = None,
    dtype: Any = None,
    remat: bool = False,
    norm_in_parts: bool = False,
) -> ExpertEnsemble:
    """Builds an ensemble of experts on a shared trunk.

    Call `module.init(key, images, train=False)` for `{"params", "batch_stats"}`, and
    `module.apply(variables, images, train=...)` for `Outputs` with `logits` `[E, B, C]` and
    `features` `[E, B, D]`, where images are float `[B, H, W, 3]`. With `train=True`, apply with
    `mutable=["batch_stats"]`.

    Args:
        name: One of `MODELS`.
        num_classes: Number of classes, `C`.
        num_experts: Number of experts, `E`, at least 1.
        axis_name: Mapped axis over which BatchNorm takes its statistics, so that they are those of
            the global batch; None for each device's own.
        expert_map: "loop", "vmap" or "stacked", see `ExpertEnsemble`; the parameters are the same.
        classifier: "cosine" (scaled cosine similarity, no bias), "cosine_bias" or "linear".
        scale: Scale of the cosine classifier.
        classifier_init: Initial values of a linear classifier, "he" or "torch" (PyTorch's own);
            None for He's in `CIFAR_MODELS` and PyTorch's in all others.
        reduce_dimension: Whether the experts have reduced widths: 24 and 48 instead of 32 and 64;
            for `IMAGENET_MODELS`, 192 and 384 instead of 256 and 512; not for `MOBILE_MODELS`.
        width: Factor of the channels of the stem and all stages, for `CIFAR_MODELS` only: a
            ResNet-32 has 0.5 M parameters, and 7.4 M with a width of 4.
        shared_stages: Number of stages that the experts share: None for one, two of
            `IMAGENET_MODELS`, or five of `MOBILE_MODELS`; 0 for the stem alone; -1 for nothing, E
            complete networks.
        stage_sizes: Blocks in each stage instead of the model's own: three numbers, four for
            `IMAGENET_MODELS`, or eight for `MOBILE_MODELS`, whose last is not used.
        dtype: Type of the computations in trunk and bodies, such as `jnp.bfloat16`; None for that
            of images and parameters. Parameters, statistics, features and heads stay in float32.
        remat: Whether the backward pass computes the inside of blocks again instead of storing it:
            less memory, more work, the same results.
        norm_in_parts: Whether BatchNorm adds up its rows part by part, for GPUs, see
            `balpoe_jax.models.batch_norm.BatchNormInParts`.

    Raises:
        UserError (a `ValueError`): an unknown name or option.

    The ResNets and their initialisers are the reference repository's, with one exception: Flax
    averages the biased variance of batches, PyTorch the unbiased one.
    """
    _check_choice("model", name, tuple(MODELS))
    _check_choice("expert_map", expert_map, EXPERT_MAPS)
    _check_choice("classifier", classifier, heads.CLASSIFIERS)
    if num_classes < 1 or num_experts < 1:
        raise UserError(
            f"Expected num_classes >= 1 and num_experts >= 1, got {num_classes} and {num_experts}."
        )
    architecture = MODELS[name]
    if stage_sizes is not None:
        architecture = architecture._replace(stage_sizes=_checked_sizes(name, stage_sizes))
    if reduce_dimension and name in MOBILE_MODELS:
        raise UserError(f"reduce_dimension is not for {name}; leave it out.")
    trunk, body = _make_trunk_and_body(
        name,
        architecture,
        _checked_shared_stages(name, shared_stages),
        reduce_dimension,
        _checked_width(name, width),
        conv_by_expert if expert_map == "stacked" else None,
        axis_name=axis_name,
        dtype=dtype,
        norm=BatchNormInParts if norm_in_parts else BatchNorm,
        remat=remat,
    )
    head = _make_head(name, classifier, num_classes, scale, classifier_init)
    return ExpertEnsemble(
        trunk=trunk, expert=Expert(body, head), num_experts=num_experts, expert_map=expert_map
    )


def _make_trunk_and_body(
    name: str,
    architecture: Architecture,
    shared: int,
    reduce_dimension: bool,
    width: int,
    convolve: Any,
    *,
    remat: bool,
    **options: Any,
) -> tuple[nn.Module, nn.Module]:
    """The shared part of a network, and the expert's part without its head.

    Args:
        name: One of `MODELS`.
        architecture: Architecture of the network.
        shared: Number of shared stages; -1 if the stem is not shared, either.
        reduce_dimension: Whether the experts have reduced widths.
        width: Factor of the channels.
        convolve: Function that computes the expert's convolutions; None for Flax's.
        remat: Whether blocks are computed again in the backward pass.
        **options: `axis_name`, `dtype` and `norm` of all layers.
    """
    stem, cut = shared >= 0, max(0, shared)
    both: dict[str, Any] = {"remat": remat, **options}
    sizes = architecture.stage_sizes
    if name in MOBILE_MODELS:
        widths = efficientnet.WIDTHS
        return (
            efficientnet.Trunk(sizes[:cut], widths[:cut], stem=stem, **both),
            efficientnet.ExpertBody(
                sizes[cut:],
                widths[cut:],
                first_stage=cut + 1,
                stem=not stem,
                convolve=convolve,
                **both,
            ),
        )
    family = resnet_cifar if name in CIFAR_MODELS else resnet_imagenet
    base = family.REDUCED_WIDTHS if reduce_dimension else family.WIDTHS
    widths = tuple(width * own for own in base)
    if family is resnet_cifar:
        both["stem_width"] = width * family.STEM_WIDTH
    else:
        both["block"] = partial(
            resnet_imagenet.Bottleneck,
            groups=architecture.groups,
            group_width=architecture.group_width,
            **options,
        )
    trunk = family.Trunk(sizes[:cut], widths[:cut], stem=stem, **both)
    ending = {"last_width": widths[-1]} if architecture.branches else {}
    body = family.ExpertBody(
        sizes[cut:],
        widths[cut:],
        first_stage=cut + 1,
        stem=not stem,
        convolve=convolve,
        **ending,
        **both,
    )
    return trunk, body


def _make_head(
    name: str, classifier: str, num_classes: int, scale: float, classifier_init: str | None
) -> nn.Module:
    # Only in its networks for small images the reference replaces PyTorch's initialisation.
    linear_init = classifier_init or ("he" if name in CIFAR_MODELS else "torch")
    _check_choice("classifier_init", linear_init, tuple(heads.INITIALISERS))
    if classifier != "linear":
        return heads.CosineHead(num_classes, scale, use_bias=classifier == "cosine_bias")
    return heads.LinearHead(num_classes, heads.INITIALISERS[linear_init])


def _checked_shared_stages(name: str, shared_stages: int | None) -> int:
    stages = len(MODELS[name].stage_sizes)
    if shared_stages is None:
        return _SHARED[stages]
    if not -1 <= shared_stages <= stages:
        raise UserError(
            f"shared_stages of {name} must be from -1 (nothing is shared) to {stages}, got "
            f"{shared_stages}."
        )
    return shared_stages


def _checked_width(name: str, width: int) -> int:
    if width < 1 or (width > 1 and name not in CIFAR_MODELS):
        raise UserError(
            "Expected a width of at least 1, and of 1 for all but "
            f"{', '.join(CIFAR_MODELS)}, got {width} for {name}."
        )
    return width


def _checked_sizes(name: str, stage_sizes: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(stage_sizes)
    expected = len(MODELS[name].stage_sizes)
    if len(sizes) != expected or min(sizes) < 1:
        count = {3: "three", 4: "four", 8: "eight"}[expected]
        raise UserError(
            f"stage_sizes of {name} must be {count} numbers of at least 1, got {sizes}."
        )
    return sizes


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"Unknown {what} {value[:80]!r}; choose from {', '.join(choices)}.")
