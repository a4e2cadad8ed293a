# SPDX-License-Identifier: Apache-2.0
"""Parameters of the reference's networks: names, seeded values, and ours under their names.

The golden numbers in `fixtures/` were computed with these values. Each parameter has its own
generator, seeded by its name, so that no weight has to be stored.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

State = dict[str, np.ndarray]

# As in the demo's config: 10 classes, ResNet-8.
DIGITS: dict[str, Any] = {"num_classes": 10, "num_experts": 3, "stage_sizes": (1, 1, 1)}


def small_state(**changes: Any) -> State:
    """A state dict of the demo's network, with these options changed."""
    return reference_state(**{**DIGITS, **changes})


def reference_state(
    *,
    num_classes: int,
    num_experts: int,
    classifier: str = "cosine",
    reduce_dimension: bool = False,
    stage_sizes: Sequence[int] = (5, 5, 5),
) -> State:
    """A state dict of the reference's CIFAR network: torch names -> arrays in torch layout."""
    widths = (24, 48) if reduce_dimension else (32, 64)
    experts = [""] if num_experts == 1 else [f"s.{e}" for e in range(num_experts)]
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (16, 3, 3, 3)}
    shapes |= _batch_norm("bn1", 16)
    shapes |= _stage("layer1", 16, 16, stage_sizes[0])
    for expert in experts:
        shapes |= _stage(f"layer2{expert}", 16, widths[0], stage_sizes[1])
    for expert in experts:
        shapes |= _stage(f"layer3{expert}", widths[0], widths[1], stage_sizes[2])
    for expert in experts:
        if classifier == "cosine":
            shapes[f"linear{expert}.weight"] = (widths[1], num_classes)
        else:
            shapes[f"linear{expert}.weight"] = (num_classes, widths[1])
            shapes[f"linear{expert}.bias"] = (num_classes,)
    return {f"backbone.{n}": seeded_value(f"backbone.{n}", s) for n, s in shapes.items()}


def large_reference_state(**options: Any) -> State:
    """A state dict of the reference's network for large images; see `large_reference_shapes`."""
    return {name: seeded_value(name, s) for name, s in large_reference_shapes(**options).items()}


def large_reference_shapes(
    *,
    num_classes: int,
    num_experts: int,
    classifier: str = "cosine",
    reduce_dimension: bool = False,
    stage_sizes: Sequence[int] = (3, 4, 6, 3),
    grouped: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Torch names -> shapes of the ResNet for large images, or ResNeXt 32x4d if `grouped`."""
    widths = (64, 128, 192, 384) if reduce_dimension else (64, 128, 256, 512)
    experts = [""] if num_experts == 1 else [f"s.{e}" for e in range(num_experts)]
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7)}
    shapes |= _batch_norm("bn1", 64)
    in_width = 64
    for stage, (width, blocks) in enumerate(zip(widths, stage_sizes, strict=True), start=1):
        for expert in experts if stage > 2 else [""]:
            name = f"layer{stage}{expert}"
            for i in range(blocks):
                shapes |= _bottleneck(f"{name}.{i}", 4 * width if i else in_width, width, grouped)
            shapes[f"{name}.0.downsample.0.weight"] = (4 * width, in_width, 1, 1)
            shapes |= _batch_norm(f"{name}.0.downsample.1", 4 * width)
        in_width = 4 * width
    for expert in experts:
        if classifier == "cosine":
            shapes[f"linear{expert}.weight"] = (in_width, num_classes)
        else:
            shapes[f"linear{expert}.weight"] = (num_classes, in_width)
            shapes[f"linear{expert}.bias"] = (num_classes,)
    return {f"backbone.{name}": shape for name, shape in shapes.items()}


def seeded_value(name: str, shape: Sequence[int]) -> np.ndarray:
    """The value of one entry: drawn in float64 by a generator with its name as the seed."""
    leaf = name.rsplit(".", 1)[1]
    if leaf == "num_batches_tracked":
        return np.zeros((), np.int64)
    z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if leaf == "weight" and len(shape) == 4:
        z = z * math.sqrt(2 / math.prod(shape[1:]))
    elif leaf == "weight" and len(shape) == 1:
        z = 1 + 0.1 * z
    elif leaf in ("bias", "running_mean"):
        z = 0.1 * z
    elif leaf == "running_var":
        z = np.exp(0.1 * z)
    return z.astype(np.float32)


def to_reference(tree: dict[str, Any]) -> State:
    """A tree of our parameters, statistics or gradients, under the reference's names and layout."""
    return {
        name: _torch_layout(path, np.asarray(leaf) if expert is None else np.asarray(leaf)[expert])
        for path, leaf in _leaves(tree)
        for expert, name in _names(path, np.shape(leaf))
    }


def unbiased_statistics(old: State, new: State, images: Sequence[int]) -> State:
    """Running averages as PyTorch keeps them, from ours after one step of momentum 0.1.

    Ours average the biased variance of a batch, PyTorch's the unbiased one. `old` has the values
    before the step, and `images` is the shape of its batch.
    """
    fixed = {}
    for name, value in new.items():
        if name.endswith("running_var"):
            halvings = {"layer2": 1, "layer3": 2}.get(name.split(".")[1].rstrip("s"), 0)
            n = images[0] * (images[1] >> halvings) * (images[2] >> halvings)
            kept = 0.9 * old[name].astype(value.dtype)
            value = kept + (value - kept) * n / (n - 1)
        fixed[name] = value
    return fixed


def _stage(name: str, in_width: int, width: int, blocks: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(blocks):
        shapes[f"{name}.{i}.conv1.weight"] = (width, width if i else in_width, 3, 3)
        shapes |= _batch_norm(f"{name}.{i}.bn1", width)
        shapes[f"{name}.{i}.conv2.weight"] = (width, width, 3, 3)
        shapes |= _batch_norm(f"{name}.{i}.bn2", width)
    return shapes


def _bottleneck(name: str, in_width: int, width: int, grouped: bool) -> dict[str, tuple[int, ...]]:
    inner, groups = (2 * width, 32) if grouped else (width, 1)
    return {
        f"{name}.conv1.weight": (inner, in_width, 1, 1),
        f"{name}.conv2.weight": (inner, inner // groups, 3, 3),
        f"{name}.conv3.weight": (4 * width, inner, 1, 1),
        **_batch_norm(f"{name}.bn1", inner),
        **_batch_norm(f"{name}.bn2", inner),
        **_batch_norm(f"{name}.bn3", 4 * width),
    }


def _batch_norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    leaves = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{leaf}": (width,) for leaf in leaves} | {f"{name}.num_batches_tracked": ()}


def _leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_SHORTCUTS = {"shortcut_conv": "downsample.0", "shortcut_bn": "downsample.1"}


def _names(path: tuple[str, ...], shape: tuple[int, ...]) -> list[tuple[int | None, str]]:
    """The reference's names of one of our leaves, each with the expert that it belongs to."""
    part, *modules, leaf = path
    modules = [m.removeprefix("block") for m in modules if m not in ("body", "dense")]
    modules = [_SHORTCUTS.get(m, m) for m in modules]
    leaf = _LEAVES.get(leaf, leaf)
    if part == "trunk":
        return [(None, ".".join(["backbone", *modules, leaf]))]
    stage = "linear" if modules[0] == "head" else modules[0]
    experts = [stage] if shape[0] == 1 else [f"{stage}s.{e}" for e in range(shape[0])]
    return [
        (e, ".".join(["backbone", expert, *modules[1:], leaf])) for e, expert in enumerate(experts)
    ]


def _torch_layout(path: tuple[str, ...], value: np.ndarray) -> np.ndarray:
    if path[-1] == "kernel" and value.ndim == 4:
        return value.transpose(3, 2, 0, 1)
    if path[-2:] == ("dense", "kernel"):
        return value.T
    return value
