# SPDX-License-Identifier: Apache-2.0
"""State dicts from files of PyTorch, NumPy and safetensors, without running code in a file.

Nothing here knows a network: `pretrained` and `balpoe_jax.torch_import` give names a meaning.
"""

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from balpoe_jax.errors import UserError

StateDict = dict[str, np.ndarray]

# PyTorch's word for each array of a convolution, a product or a BatchNorm, by Flax's.
TORCH_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}

# The classes that a genuine checkpoint pickles, apart from tensors and plain containers: its
# config, with paths, and NumPy scalars among the scores. None is needed, so none is ever called.
_INERT_GLOBALS = (
    "parse_config.ConfigParser",
    *(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    ),
    "numpy.dtype",
    "numpy.ndarray",
    *(
        f"numpy.{core}.multiarray.{name}"
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
)


def load_state_dict(path: str | os.PathLike[str]) -> StateDict:
    """The arrays of a file by their names; see `load_checkpoint`."""
    return load_checkpoint(path)[0]


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[StateDict, int | None]:
    """The state dict of a file, and the epoch after which it was saved.

    Args:
        path: Path of a `.npz` or `.safetensors` file, or of a PyTorch file (`.pth`, `.pt`, `.tar`,
            `.bin`) with a state dict, by itself or under "state_dict" and perhaps with an "epoch".
            PyTorch files need torch, which loads them with `weights_only`. Tensors and plain
            containers are read, objects that do nothing stand in for the few classes of a genuine
            checkpoint, and all else is refused.

    Returns:
        Arrays by name, and the number of epochs trained, None if the file does not tell.

    Raises:
        UserError (a `ValueError`): a file that is absent, corrupt, of an unknown kind, holds no
            state dict, or needs a package that is not installed.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _READERS:
        raise UserError(f"Expected a file that ends in {' or '.join(_READERS)}, got {path}.")
    if not Path(path).is_file():
        raise UserError(f"There is no file {path}; name the checkpoint to import.")
    try:
        return _READERS[suffix](Path(path))
    except UserError:
        raise
    except Exception as error:  # a damaged file makes the libraries raise almost anything
        raise UserError(
            f"The file {path} cannot be read ({_reason(error)}); it is damaged or not what its "
            "name says."
        ) from error


def _read_npz(path: Path) -> tuple[StateDict, None]:
    # Opened here, since NumPy leaves a file open when it cannot read it.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays), None


def _read_safetensors(path: Path) -> tuple[StateDict, None]:
    try:
        from safetensors.numpy import load_file
    except ImportError as error:
        raise UserError(
            f"Reading {path} needs a package that is not installed: pip install safetensors."
        ) from error
    return load_file(path), None


def _read_torch(path: Path) -> tuple[StateDict, int | None]:
    content = _load_weights_only(path)
    outer = content if isinstance(content, Mapping) else {}
    state_dict = outer.get("state_dict", outer)
    if not (
        isinstance(state_dict, Mapping)
        and state_dict
        and all(hasattr(value, "detach") for value in state_dict.values())
    ):
        raise UserError(
            f"Expected {path} to hold a state dict (tensors by name), by itself or under "
            "'state_dict', and it does not; is it another kind of PyTorch file?"
        )
    epoch = outer.get("epoch")
    arrays = {str(name): _to_numpy(tensor) for name, tensor in state_dict.items()}
    return arrays, epoch if type(epoch) is int and epoch >= 0 else None


_READERS = {
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".tar": _read_torch,
    ".bin": _read_torch,
}


def _load_weights_only(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"Reading {path} needs PyTorch: pip install torch, or convert the file in the "
            'repository that made it, if you trust it, with: python -c "import numpy, torch; s = '
            f"torch.load('{path}', 'cpu', weights_only=False); s = s.get('state_dict', s); "
            f"numpy.savez('{path.with_suffix('.npz')}', "
            '**{k: v.numpy() for k, v in s.items()})".'
        ) from error
    if not hasattr(torch.serialization, "safe_globals"):
        raise UserError(
            f"Reading {path} needs PyTorch 2.5 or newer, and {torch.__version__} is installed: "
            "pip install --upgrade torch."
        )
    stand_ins: list[Any] = [_stand_in(name) for name in _INERT_GLOBALS]
    with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
        # Warnings of strange files come with an error too.
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            refused = re.search(r"GLOBAL (\S+)", str(error))
            if refused is None:
                raise
            raise UserError(
                f"The file {path} was refused because it asks for {refused[1]} to be called, which "
                "no checkpoint of the reference needs; save its state dict alone, with "
                "torch.save(model.state_dict(), FILE), and import that."
            ) from error


class _Inert:
    """Stands in for an object of a pickle: it takes the arguments and forgets them."""

    def __new__(cls, *_: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _stand_in(name: str) -> type[_Inert]:
    """A class that does nothing, and that PyTorch takes for the class of this full name."""
    module, _, short = name.rpartition(".")
    return type(short, (_Inert,), {"__module__": module, "__qualname__": short})


def _to_numpy(tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    if str(tensor.dtype) == "torch.bfloat16":  # NumPy has no such numbers
        tensor = tensor.float()
    return tensor.numpy()


def _reason(error: Exception) -> str:
    """A library's complaint in a line, without PyTorch's advice to run what the file says."""
    message = str(error)
    if message.startswith("Weights only load failed"):
        message = message.rpartition("WeightsUnpickler error: ")[2]
    first_paragraph = " ".join(message.strip().partition("\n\n")[0].split())
    first_sentence = first_paragraph.partition(". ")[0]
    return first_sentence.rstrip(".")[:200] or type(error).__name__
