# SPDX-License-Identifier: Apache-2.0
"""The training steps that `accelerator` times, the same in JAX and in PyTorch. NumPy only."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from balpoe_jax.data.types import TrainBatch

# Three experts everywhere, as in the paper's tables.
EXPERTS = 3


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of networks, images and measurements: the paper's, or as small as possible.

    Attributes:
        small: Network for CIFAR.
        small_batch: Batch size of that network.
        photo_stages: Blocks in each stage of the networks for photographs; None for their own.
        photo_size: Height and width of a photograph, in pixels.
        photo_classes: Number of classes of photographs.
        dispatch: Number of steps in a call with several.
        seconds: Seconds of measurement for each case.
        ratio: Imbalance ratio of CIFAR-100-LT.
        train_per_class, test_per_class: Images of each class before the selection.
    """

    small: str
    small_batch: int
    photo_stages: tuple[int, ...] | None
    photo_size: int
    photo_classes: int
    dispatch: int
    seconds: float
    ratio: int
    train_per_class: int
    test_per_class: int


FULL = Sizes("resnet32", 128, None, 224, 1000, 50, 1.2, 100, 500, 100)
TOY = Sizes("resnet8", 8, (1, 1, 1, 1), 32, 10, 3, 0.0, 10, 10, 2)


@dataclasses.dataclass(frozen=True)
class Case:
    """A step in JAX.

    Attributes:
        network: "small", "resnet50" or "resnext50".
        batch: Batch size; 0 for the small network's own.
        dtype: "float32" or "bfloat16".
        expert_map: "loop" or "vmap".
        mode: "pmap" or "shard_map".
        dispatch: "ready" for one step a call on a batch that is there; "single" for one step a call
            and "several" for many, with batches of the device pipeline.
        estimate: Expected seconds on a GPU, mostly compilation.
    """

    network: str
    batch: int
    dtype: str
    expert_map: str
    mode: str
    dispatch: str
    estimate: float


@dataclasses.dataclass(frozen=True)
class TorchCase:
    """A step in PyTorch.

    Attributes:
        network, batch, dtype: Fields as in `Case`.
        how: "eager", "graph" for a CUDA graph, or "compile" for `torch.compile`.
        estimate: Expected seconds on a GPU.
    """

    network: str
    batch: int
    dtype: str
    how: str
    estimate: float


# In order of value: the last case is the first to be left out.
SMALL = (
    Case("small", 0, "float32", "loop", "shard_map", "several", 30),
    Case("small", 0, "float32", "loop", "pmap", "ready", 25),
    Case("small", 0, "bfloat16", "loop", "shard_map", "several", 30),
    Case("small", 0, "float32", "vmap", "shard_map", "several", 30),
    Case("small", 0, "float32", "loop", "shard_map", "single", 25),
    Case("small", 0, "float32", "loop", "shard_map", "ready", 25),
    Case("small", 0, "float32", "loop", "pmap", "single", 25),
    Case("small", 0, "bfloat16", "vmap", "shard_map", "several", 30),
)
SMALL_FUSED = (SMALL[0], SMALL[2])
PHOTOS = (
    Case("resnet50", 64, "bfloat16", "loop", "shard_map", "ready", 45),
    Case("resnext50", 64, "bfloat16", "loop", "shard_map", "ready", 50),
    Case("resnet50", 256, "bfloat16", "loop", "shard_map", "ready", 50),
    Case("resnext50", 256, "bfloat16", "loop", "shard_map", "ready", 55),
)
SMALL_TORCH = (
    TorchCase("small", 0, "float32", "eager", 6),
    TorchCase("small", 0, "float32", "graph", 6),
    TorchCase("small", 0, "bfloat16", "graph", 6),
)
PHOTOS_TORCH = (
    TorchCase("resnet50", 64, "bfloat16", "graph", 8),
    TorchCase("resnext50", 64, "bfloat16", "graph", 8),
    TorchCase("resnet50", 256, "bfloat16", "graph", 10),
    TorchCase("resnext50", 256, "bfloat16", "graph", 10),
    TorchCase("resnet50", 64, "bfloat16", "eager", 8),
)


# One case of each kind, so that a toy run is short.
_TOY: dict[Any, Sequence[Case | TorchCase]] = {
    SMALL: (SMALL[0], SMALL[6]),  # the cases of photographs have ready batches
    SMALL_FUSED: SMALL_FUSED[:1],
    PHOTOS: PHOTOS[:1],
    SMALL_TORCH: SMALL_TORCH,
    PHOTOS_TORCH: PHOTOS_TORCH[:1],
}


def chosen(cases: Sequence[Case | TorchCase], toy: bool) -> list[dict[str, Any]]:
    """Cases as plain values, fewer of them for a toy run."""
    return [dataclasses.asdict(case) for case in (_TOY[cases] if toy else cases)]


def sizes(toy: bool) -> Sizes:
    """The sizes of a toy run, or the paper's."""
    return TOY if toy else FULL


def batch_size(case: Case | TorchCase, sizes: Sizes) -> int:
    """Images of a case's batch."""
    if case.network == "small":
        return sizes.small_batch
    # Not fewer, because BatchNorm over a few values amplifies rounding.
    return 16 if sizes is TOY else case.batch


def ready_batch(
    size: int, image_shape: tuple[int, int, int], class_counts: npt.NDArray[np.int64]
) -> TrainBatch:
    """A batch of random pixels and labels, the same in each process.

    Args:
        size: Number of images, `B`.
        image_shape: `(H, W, 3)`.
        class_counts: Training images of each class, by which labels are drawn.

    Returns:
        NumPy arrays, one view.
    """
    random = np.random.default_rng(0)
    share = class_counts / class_counts.sum()

    def labels() -> npt.NDArray[np.int32]:
        return random.choice(len(share), size, p=share).astype(np.int32)

    images = random.standard_normal((size, *image_shape), np.float32)
    return TrainBatch((images,), labels(), labels(), np.full(size, 0.7, np.float32))
