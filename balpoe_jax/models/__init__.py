# SPDX-License-Identifier: Apache-2.0
"""Models by name: backbones with experts, pure Flax Linen modules."""

from collections.abc import Sequence
from typing import Any

from balpoe_jax.errors import UserError
from balpoe_jax.models.ensemble import EXPERT_MAPS, Expert, ExpertEnsemble, Outputs
from balpoe_jax.models.heads import CLASSIFIERS, CosineHead, LinearHead
from balpoe_jax.models.resnet_cifar import ExpertBody, Trunk

__all__ = ["MODELS", "ExpertEnsemble", "Outputs", "create_model"]

# Blocks in each of the three stages.
MODELS = {
    "resnet8": (1, 1, 1),
    "resnet20": (3, 3, 3),
    "resnet32": (5, 5, 5),
    "resnet44": (7, 7, 7),
    "resnet56": (9, 9, 9),
}


def create_model(
    name: str,
    *,
    num_classes: int,
    num_experts: int,
    axis_name: str | None = None,
    expert_map: str = "loop",
    classifier: str = "cosine",
    scale: float = 30.0,
    reduce_dimension: bool = False,
    stage_sizes: Sequence[int] | None = None,
    dtype: Any = None,
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
        expert_map: "loop" or "vmap", see `ExpertEnsemble`; the parameters are the same.
        classifier: "cosine" (scaled cosine similarity, no bias) or "linear".
        scale: of the cosine classifier.
        reduce_dimension: widths 24 and 48 in the experts instead of 32 and 64.
        stage_sizes: blocks in each of the three stages, instead of the model's own.
        dtype: of the body's computations; None for that of images and parameters. Parameters,
            statistics and heads stay in float32.

    Raises:
        UserError (a `ValueError`): an unknown name or option.

    The architecture is the reference repository's, to the initialiser, except that Flax stores
    the biased batch variance in its running average where PyTorch stores the unbiased one.
    """
    _check_choice("model", name, tuple(MODELS))
    _check_choice("expert_map", expert_map, EXPERT_MAPS)
    _check_choice("classifier", classifier, CLASSIFIERS)
    if num_classes < 1 or num_experts < 1:
        raise UserError(
            f"Expected num_classes >= 1 and num_experts >= 1, got {num_classes} and {num_experts}."
        )
    blocks = tuple(MODELS[name] if stage_sizes is None else stage_sizes)
    if len(blocks) != 3 or min(blocks) < 1:
        raise UserError(f"stage_sizes must be three numbers of at least 1, got {blocks}.")
    widths = (24, 48) if reduce_dimension else (32, 64)
    head = CosineHead(num_classes, scale) if classifier == "cosine" else LinearHead(num_classes)
    return ExpertEnsemble(
        trunk=Trunk(blocks[0], axis_name, dtype),
        expert=Expert(ExpertBody(blocks[1:], widths, axis_name, dtype), head),
        num_experts=num_experts,
        expert_map=expert_map,
    )


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"Unknown {what} {value!r}; choose from {', '.join(choices)}.")
