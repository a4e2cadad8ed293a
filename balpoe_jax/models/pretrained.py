# SPDX-License-Identifier: Apache-2.0
"""Published weights for trunks and bodies, from files as they were published.

A file has the names of its own library. Each module of a network here has one counterpart there;
classifiers are left out, since those of experts begin afresh.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import traverse_util

from balpoe_jax.errors import UserError
from balpoe_jax.models import MOBILE_MODELS, efficientnet, weight_files

Path = tuple[str, ...]
Weights = dict[str, npt.NDArray[np.float32]]

# Names that a file may have for nothing here: counters of batches.
_COUNTERS = "num_batches_tracked"
_SHOWN = 3


def read(path: str, model: str, variables: Mapping[str, Any]) -> Weights:
    """Reads the weights of a network's trunk and bodies.

    Args:
        path: Path of a `.npz`, `.safetensors` or PyTorch file, see
            `balpoe_jax.models.weight_files.load_checkpoint`.
        model: Name of the network, one of `balpoe_jax.models.MODELS`.
        variables: Variables of the network, `{"params", "batch_stats"}`, or their shapes.

    Returns:
        Arrays by the path of a variable, such as `params/trunk/stem_conv/kernel`, without the axis
        of experts.

    Raises:
        UserError (a `ValueError`): a network whose published weights are not known, a file that
            cannot be read, or names, shapes or values that do not fit.
    """
    if model not in _NAMES:
        raise UserError(
            f"config.model.pretrained is for {', '.join(_NAMES)}, and not for {model}; leave it "
            "out, or choose another config.model.name."
        )
    found = weight_files.load_state_dict(path)
    is_classifier = _CLASSIFIERS[model]
    wanted = {
        "/".join(place): _NAMES[model](place) for place in _places(variables) if not _is_head(place)
    }
    _check_names(path, found, set(wanted.values()), is_classifier)
    shapes = {"/".join(place): leaf.shape for place, leaf in _places(variables).items()}
    weights, misshapen = {}, []
    for place, name in wanted.items():
        array = _in_our_layout(place, np.asarray(found[name], np.float32))
        if array.shape not in (shapes[place], shapes[place][1:]):
            misshapen.append(f"{name} {found[name].shape}")
        weights[place] = array
    if misshapen:
        raise UserError(f"{path} is of another network than {model}: {_listed(misshapen)}.")
    strange = [wanted[place] for place, array in weights.items() if not np.isfinite(array).all()]
    if strange:
        raise UserError(f"{path} is damaged: values are not finite in {_listed(strange)}.")
    return weights


def insert(variables: Mapping[str, Any], weights: Mapping[str, Any]) -> Any:
    """Variables with these weights in the place of their own; experts begin alike.

    Args:
        variables: Variables of a network, `{"params", "batch_stats"}`.
        weights: Arrays by path, as `read` returns them.
    """
    replaced = {
        place: jnp.broadcast_to(weights["/".join(place)], leaf.shape).astype(leaf.dtype)
        if "/".join(place) in weights
        else leaf
        for place, leaf in _places(variables).items()
    }
    return traverse_util.unflatten_dict(replaced)


def _places(variables: Mapping[str, Any]) -> dict[Path, jax.Array]:
    return dict(traverse_util.flatten_dict(dict(variables)))


def _is_head(place: Path) -> bool:
    """Whether a variable is of no trunk and no body: of a classifier, or of a method's own part."""
    return "trunk" not in place and "body" not in place


def _in_our_layout(place: str, array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """PyTorch's kernels are `[out, in, H, W]`, and Flax's `[H, W, in, out]`."""
    is_kernel = place.endswith("/kernel") and array.ndim == 4
    return array.transpose(2, 3, 1, 0) if is_kernel else array


def _check_names(
    path: str,
    found: Mapping[str, Any],
    wanted: set[str],
    is_classifier: Callable[[str], bool],
) -> None:
    known = {name for name in found if not name.endswith(_COUNTERS) and not is_classifier(name)}
    problems = [
        f"{len(names)} {what} ({_listed(sorted(names))})"
        for what, names in (("missing", wanted - known), ("unexpected", known - wanted))
        if names
    ]
    if problems:
        raise UserError(
            f"The weights in {path} are of another network: {' and '.join(problems)}; name a file "
            "of the network of config.model.name."
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _efficientnet_name(place: Path) -> str:
    """The name in the files of `efficientnet-lite-pytorch`, which counts blocks through."""
    leaf, module, block = weight_files.TORCH_LEAVES[place[-1]], place[-2], place[-3]
    if not block.startswith("layer"):
        outside = {
            "stem_conv": "_conv_stem",
            "stem_bn": "_bn0",
            "last_conv": "_conv_head",
            "last_bn": "_bn1",
        }
        return f"{outside[module]}.{leaf}"
    stage, number = (int(part) for part in block.removeprefix("layer").split("_block"))
    before = MOBILE_MODELS["efficientnet_lite0"].stage_sizes[: stage - 1]
    norms = {name: f"_bn{i}" for i, name in enumerate(efficientnet.NORMS)}
    return f"_blocks.{sum(before) + number}.{norms.get(module, f'_{module}')}.{leaf}"


_NAMES: dict[str, Callable[[Path], str]] = {"efficientnet_lite0": _efficientnet_name}
_CLASSIFIERS: dict[str, Callable[[str], bool]] = {
    "efficientnet_lite0": lambda name: name.startswith("_fc.")
}
