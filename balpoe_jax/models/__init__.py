# SPDX-License-Identifier: Apache-2.0
"""Models by name: backbones with experts, pure Flax Linen modules."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from balpoe_jax.errors import UserError
from balpoe_jax.models import heads, resnet_cifar, resnet_imagenet
from balpoe_jax.models.batch_norm import BatchNormInParts
from balpoe_jax.models.convolutions import conv_by_expert
from balpoe_jax.models.ensemble import EXPERT_MAPS, Expert, ExpertEnsemble, Outputs
from balpoe_jax.models.layers import BatchNorm

__all__ = [
    "CIFAR_MODELS",
    "IMAGENET_MODELS",
    "MODELS",
    "ExpertEnsemble",
    "Outputs",
    "create_model",
]


class Architecture(NamedTuple):
    """What tells a model from the others of its family.

    Attributes:
        stage_sizes: blocks in each stage.
        groups, group_width: see `resnet_imagenet.Bottleneck`.
        branches: whether it ends in two blocks side by side, see `resnet_cifar`.
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

# For large images: see `resnet_imagenet`. ResNeXt-50 is the one of 32 groups of 4 channels.
IMAGENET_MODELS = {
    "resnet50": Architecture((3, 4, 6, 3)),
    "resnet101": Architecture((3, 4, 23, 3)),
    "resnet152": Architecture((3, 8, 36, 3)),
    "resnext50": Architecture((3, 4, 6, 3), groups=32, group_width=4),
}

MODELS = CIFAR_MODELS | IMAGENET_MODELS


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
        name: one of `MODELS`.
        num_classes: `C`.
        num_experts: `E`, at least 1.
        axis_name: the mapped axis over which BatchNorm takes its statistics, so that they are
            those of the global batch; None for each device's own.
        expert_map: "loop", "vmap" or "stacked", see `ExpertEnsemble`; the parameters are the same.
        classifier: "cosine" (scaled cosine similarity, no bias), "cosine_bias" or "linear".
        scale: of the cosine classifier.
        classifier_init: Initial values of a linear classifier, "he" or "torch" (PyTorch's own);
            None for He's in `CIFAR_MODELS` and PyTorch's in `IMAGENET_MODELS`.
        reduce_dimension: widths 24 and 48 in the experts instead of 32 and 64; for
            `IMAGENET_MODELS`, 192 and 384 instead of 256 and 512.
        shared_stages: how many stages the experts share: None for one, or two of
            `IMAGENET_MODELS`; 0 for the stem alone; -1 for nothing, E complete networks.
        stage_sizes: blocks in each stage instead of the model's own: three numbers, four for
            `IMAGENET_MODELS`.
        dtype: of the computations in trunk and bodies, such as `jnp.bfloat16`; None for that of
            images and parameters. Parameters, statistics, features and heads stay in float32.
        remat: compute the inside of blocks again in the backward pass instead of keeping it: less
            memory, more work, the same results.
        norm_in_parts: whether BatchNorm adds up its rows part by part, for GPUs, see
            `balpoe_jax.models.batch_norm.BatchNormInParts`.

    Raises:
        UserError (a `ValueError`): an unknown name or option.

    The architecture is the reference repository's, to the initialiser, except that Flax stores
    the biased batch variance in its running average where PyTorch stores the unbiased one.
    """
    _check_choice("model", name, tuple(MODELS))
    _check_choice("expert_map", expert_map, EXPERT_MAPS)
    _check_choice("classifier", classifier, heads.CLASSIFIERS)
    if num_classes < 1 or num_experts < 1:
        raise UserError(
            f"Expected num_classes >= 1 and num_experts >= 1, got {num_classes} and {num_experts}."
        )
    small = name in CIFAR_MODELS
    architecture = MODELS[name]
    if stage_sizes is not None:
        architecture = architecture._replace(stage_sizes=_checked_sizes(name, stage_sizes))
    sizes = architecture.stage_sizes
    shared = (1 if small else 2) if shared_stages is None else shared_stages
    if not -1 <= shared <= len(sizes):
        raise UserError(
            f"shared_stages of {name} must be from -1 (nothing is shared) to {len(sizes)}, got "
            f"{shared_stages}."
        )
    family = resnet_cifar if small else resnet_imagenet
    widths = family.REDUCED_WIDTHS if reduce_dimension else family.WIDTHS
    norm = BatchNormInParts if norm_in_parts else BatchNorm
    options = {"axis_name": axis_name, "dtype": dtype, "remat": remat, "norm": norm}
    ending = {"last_width": widths[-1]} if architecture.branches else {}
    if not small:
        options["block"] = partial(
            resnet_imagenet.Bottleneck,
            groups=architecture.groups,
            group_width=architecture.group_width,
            axis_name=axis_name,
            dtype=dtype,
            norm=norm,
        )
    convolve = conv_by_expert if expert_map == "stacked" else None
    stem, cut = shared >= 0, max(0, shared)
    trunk = family.Trunk(sizes[:cut], widths[:cut], stem=stem, **options)
    body = family.ExpertBody(
        sizes[cut:],
        widths[cut:],
        first_stage=cut + 1,
        stem=not stem,
        convolve=convolve,
        **ending,
        **options,
    )
    # The reference initialises a linear layer itself only in its networks for small images.
    linear_init = classifier_init or ("he" if small else "torch")
    _check_choice("classifier_init", linear_init, tuple(heads.INITIALISERS))
    head = (
        heads.LinearHead(num_classes, heads.INITIALISERS[linear_init])
        if classifier == "linear"
        else heads.CosineHead(num_classes, scale, use_bias=classifier == "cosine_bias")
    )
    return ExpertEnsemble(
        trunk=trunk, expert=Expert(body, head), num_experts=num_experts, expert_map=expert_map
    )


def _checked_sizes(name: str, stage_sizes: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(stage_sizes)
    expected = len(MODELS[name].stage_sizes)
    if len(sizes) != expected or min(sizes) < 1:
        count = {3: "three", 4: "four"}[expected]
        raise UserError(
            f"stage_sizes of {name} must be {count} numbers of at least 1, got {sizes}."
        )
    return sizes


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"Unknown {what} {value[:80]!r}; choose from {', '.join(choices)}.")
