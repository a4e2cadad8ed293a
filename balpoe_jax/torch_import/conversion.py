# SPDX-License-Identifier: Apache-2.0
"""The names and layouts of the reference's PyTorch code, converted to those of our parameters.

The table of names below is one-to-one, so that what does not fit is reported by the names in the
checkpoint.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from balpoe_jax.errors import UserError
from balpoe_jax.models import IMAGENET_MODELS, create_model
from balpoe_jax.models.weight_files import TORCH_LEAVES

# Our module's path -> the reference's name, where {expert} is empty if there is only one expert.
_MODULES = (
    (r"trunk/(conv1|bn1)", r"backbone.\1"),
    (r"trunk/layer(\d+)/block(\d+)/([\w.]+)", r"backbone.layer\1.\2.\3"),
    (r"expert/body/layer(\d+)/block(\d+)/([\w.]+)", r"backbone.layer\1{expert}.\2.\3"),
    (r"expert/head(?:/dense)?", r"backbone.linear{expert}"),
)

# Modules of a block that the reference only numbers.
_SHORTCUTS = {"shortcut_conv": "downsample.0", "shortcut_bn": "downsample.1"}

# PyTorch's axes in our order, by the rank of a kernel: OIHW to HWIO, and [C, F] to [F, C].
_KERNEL_AXES = {4: (2, 3, 1, 0), 2: (1, 0)}

_MOST_LISTED = 10


def convert(state_dict: Mapping[str, npt.ArrayLike]) -> dict[str, Any]:
    """The reference's parameters and statistics as variables of a model of `create_model`.

    The architecture (blocks, widths, experts, classes, classifier) is inferred from the names and
    shapes; all that `create_model` makes are known.

    Args:
        state_dict: float arrays by the reference's names, such as
            `backbone.layer2s.0.4.conv1.weight`, any number of experts. A prefix `module.` of all
            names and the counters `num_batches_tracked` are dropped.

    Returns:
        `{"params": ..., "batch_stats": ...}` of new NumPy arrays of the given dtypes, expert leaves
        stacked on a leading axis `[E, ...]`. Running variances stay as they are: PyTorch averages
        unbiased variances and Flax biased ones, which matters only to further training.

    Raises:
        UserError (a `ValueError`): listing names that are missing, unexpected or misshapen.
    """
    arrays = _arrays(state_dict)
    shapes = {name: array.shape for name, array in arrays.items()}
    model = _infer_model(shapes)
    _check_fit(shapes, _torch_shapes(model), "the network that its names describe")
    converted: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for leaf in _leaves(model):
        per_expert = [np.transpose(arrays[name], leaf.axes) for name in leaf.names]
        node = converted
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        node[leaf.path[-1]] = np.stack(per_expert) if leaf.stacked else np.array(per_expert[0])
    return converted


def check_against(variables: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuses converted variables that do not fit a model.

    Args:
        variables: Variables that `convert` returned.
        expected: Variables of the model, or anything with their shapes.

    Raises:
        UserError (a `ValueError`): listing, by the reference's names, those that are missing,
            unexpected or misshapen.
    """
    _check_fit(_torch_shapes(variables), _torch_shapes(expected), "the model of the config")


def refuse_non_finite(state_dict: Mapping[str, npt.ArrayLike]) -> None:
    """Refuses a state dict with values that are not finite.

    Raises:
        UserError (a `ValueError`): naming the arrays that have such values.
    """
    strange = [name for name, value in _arrays(state_dict).items() if not np.isfinite(value).all()]
    if strange:
        raise UserError(
            f"The checkpoint has values that are not finite in {_listed(strange)}; it is damaged, "
            "or of a training that diverged."
        )


class _Leaf(NamedTuple):
    """One of our arrays, and its place in the checkpoint.

    Attributes:
        path: Path in our variables.
        names: Names in the reference; one for each expert if stacked.
        axes: Axes of the reference's arrays, in our order.
        shape: Shape of each of the reference's arrays.
        stacked: Whether ours has a leading axis of experts.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    stacked: bool


def _leaves(variables: Mapping[str, Any]) -> Iterator[_Leaf]:
    """The table above, applied to a tree of arrays or of shapes."""
    for keys, array in jax.tree_util.tree_leaves_with_path(variables):
        path = tuple(key.key for key in keys)
        stacked = path[1] == "expert"
        shape = array.shape[1:] if stacked else array.shape
        axes = tuple(range(len(shape)))
        # The cosine classifier's weight, alone, is [F, C] in PyTorch too.
        if path[-1] == "kernel" and path[-2] != "head":
            axes = _KERNEL_AXES[len(shape)]
        yield _Leaf(
            path=path,
            names=_torch_names(path, array.shape[0] if stacked else 1),
            axes=axes,
            shape=tuple(shape[axes.index(axis)] for axis in range(len(axes))),
            stacked=stacked,
        )


def _torch_names(path: tuple[str, ...], experts: int) -> tuple[str, ...]:
    module = "/".join(_SHORTCUTS.get(key, key) for key in path[1:-1])
    for pattern, replacement in _MODULES:
        match = re.fullmatch(pattern, module)
        if match:
            name = f"{match.expand(replacement)}.{TORCH_LEAVES[path[-1]]}"
            numbers = [""] if experts == 1 else [f"s.{expert}" for expert in range(experts)]
            return tuple(dict.fromkeys(name.format(expert=number) for number in numbers))
    raise NotImplementedError(f"the reference's name of {'/'.join(path)}")


def _torch_shapes(variables: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for leaf in _leaves(variables) for name in leaf.names}


def _arrays(state_dict: Mapping[str, npt.ArrayLike]) -> dict[str, np.ndarray]:
    """Arrays by name, without the prefix of a wrapped model and without counters."""
    prefix = "module." if all(str(name).startswith("module.") for name in state_dict) else ""
    arrays = {
        str(name)[len(prefix) :]: np.asarray(value)
        for name, value in state_dict.items()
        if not str(name).endswith(".num_batches_tracked")
    }
    if not arrays:
        raise UserError("The checkpoint holds no parameters; give one with a state dict.")
    strange = [
        f"{name} of {array.dtype}"
        for name, array in arrays.items()
        if not jnp.issubdtype(array.dtype, jnp.floating)
    ]
    if strange:
        raise UserError(f"Expected arrays of floating-point numbers, got {_listed(strange)}.")
    return arrays


def _infer_model(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The abstract variables of the model that these names and shapes suggest."""
    name = _infer_name(shapes)
    stages, last_norm = ((1, 2, 3, 4), "bn3") if name in IMAGENET_MODELS else ((1, 2, 3), "bn2")
    features = _size(shapes, rf"backbone\.layer{stages[-1]}(?:s\.\d+)?\.0\.{last_norm}\.weight", 0)
    head = r"backbone\.linear(?:s\.\d+)?"
    linear = any(re.fullmatch(rf"{head}\.bias", found) for found in shapes)
    # At most two digits, so that a nonsensical name is reported and not built.
    experts = _indices(shapes, r"backbone\.(?:layer\d+|linear)s\.(\d{1,2})\.")
    blocks = [
        _indices(shapes, rf"backbone\.layer{stage}(?:s\.\d+)?\.(\d{{1,2}})\.") for stage in stages
    ]
    model = create_model(
        name,
        num_classes=max(_size(shapes, rf"{head}\.weight", 0 if linear else 1), 1),
        num_experts=max(experts, default=0) + 1,
        classifier="linear" if linear else "cosine",
        reduce_dimension=features in (48, 1536),
        stage_sizes=[max(found, default=0) + 1 for found in blocks],
    )
    image = jnp.zeros((1, 32, 32, 3))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))


def _infer_name(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The model's name from the widths of the stem and the first block; blocks are not counted."""
    if _size(shapes, r"backbone\.(?:conv1|bn1)\.weight", 0) != 64:
        return "resnet32"
    inner = _size(shapes, r"backbone\.layer1\.0\.(?:conv1|bn1)\.weight", 0)
    return "resnext50" if inner == 128 else "resnet50"


def _indices(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> list[int]:
    """The numbers that a pattern captures at the start of names, where it matches."""
    matches = (re.match(pattern, name) for name in shapes)
    return [int(match[1]) for match in matches if match]


def _size(shapes: Mapping[str, tuple[int, ...]], pattern: str, axis: int) -> int:
    """The length of an axis of the first array whose name matches; 1 if there is none."""
    found = [shape for name, shape in shapes.items() if re.fullmatch(pattern, name)]
    return next((shape[axis] for shape in found if axis < len(shape)), 1)


def _check_fit(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], what: str
) -> None:
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "misshapen": [
            f"{name} {found[name]} instead of {expected[name]}"
            for name in sorted(found.keys() & expected.keys())
            if found[name] != expected[name]
        ],
    }
    parts = [f"{kind} {_listed(names)}" for kind, names in problems.items() if names]
    if parts:
        raise UserError(f"The checkpoint does not fit {what}: {'; '.join(parts)}.")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(names[:_MOST_LISTED]) + more
