# SPDX-License-Identifier: Apache-2.0
"""The logits of all experts for a data set: streamed to disk as they come, read back mapped."""

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from balpoe_jax.errors import UserError
from balpoe_jax.files import reports_write_errors, temporary
from balpoe_jax.metrics import MeanLogits, Summary, summarize

FOLDER = "predictions"
TEST, HELD_OUT = "", "held_out_"

# File names of the outputs of an evaluation.
_FILES = {
    "logits": "expert_logits",
    "labels": "labels",
    "ensemble": "ensemble_logits",
    "experts_used": "experts_used",
}


class Predictions(NamedTuple):
    """Logits and labels of a data set, in its order.

    Attributes:
        expert_logits: Logits of each expert, float32 `[E, N, C]`, memory-mapped if read from disk.
        labels: Class indices, int32 `[N]`.
        combined: Logits of all experts together, float32 `[N, C]`, memory-mapped if read from disk;
            None for a method that averages them.
        experts_used: Number of experts for each example, float32 `[N]`; None for all.
    """

    expert_logits: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int32]
    combined: npt.NDArray[np.float32] | None = None
    experts_used: npt.NDArray[np.float32] | None = None

    @property
    def ensemble(self) -> MeanLogits | npt.NDArray[np.float32]:
        """The ensemble's logits `[N, C]`."""
        return MeanLogits(self.expert_logits) if self.combined is None else self.combined


def stream(
    folder: Path,
    prefix: str,
    shape: tuple[int, int, int],
    outputs: Iterable[Mapping[str, npt.NDArray]],
) -> Predictions:
    """Writes the outputs of an evaluation, a batch at a time, and returns them mapped.

    The files `{prefix}expert_logits.npy`, `{prefix}labels.npy` and those of a method's further
    outputs replace earlier ones as a whole.

    Args:
        folder: Folder of the files, created when missing.
        prefix: Start of their names, such as `TEST` or `HELD_OUT`.
        shape: Shape of the logits, `(E, N, C)`.
        outputs: Batches with `logits` `[E, b, C]`, `labels` `[b]` and `mask` `[b]`, False for
            padding; perhaps `ensemble` `[b, C]` and `experts_used` `[b]`.

    Raises:
        UserError (a `ValueError`): the files cannot be written.
    """
    # Names of this process's own: a training may be evaluating itself at the same time.
    targets = {name: folder / f"{prefix}{file}.npy" for name, file in _FILES.items()}
    partial = {name: temporary(path) for name, path in targets.items()}
    try:
        with reports_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        made = _fill(partial, shape, outputs)
        with reports_write_errors(folder):
            for array in made.values():
                array.flush()
            for name, path in targets.items():
                if name in made:
                    os.replace(partial[name], path)
                else:
                    path.unlink(missing_ok=True)  # of another method's predictions
    except BaseException:
        # What keeps the folder from being made keeps these from being removed.
        with contextlib.suppress(OSError):
            for path in partial.values():
                path.unlink(missing_ok=True)
        raise
    return load(folder, prefix)


def _fill(
    files: Mapping[str, Path],
    shape: tuple[int, int, int],
    outputs: Iterable[Mapping[str, npt.NDArray]],
) -> dict[str, np.memmap]:
    """Copies batches one after the other into new files of the whole shape, a file an output."""
    _, num_examples, num_classes = shape
    shapes: dict[str, tuple[int, ...]] = {
        "logits": shape,
        "labels": (num_examples,),
        "ensemble": (num_examples, num_classes),
        "experts_used": (num_examples,),
    }
    made: dict[str, np.memmap] = {}
    seen = 0
    for output in outputs:
        valid = output["mask"]
        end = seen + int(valid.sum())
        for name in shapes.keys() & output.keys():
            if name not in made:
                dtype = np.int32 if name == "labels" else np.float32
                with reports_write_errors(files[name].parent):
                    made[name] = np.lib.format.open_memmap(
                        files[name], mode="w+", dtype=dtype, shape=shapes[name]
                    )
            if name == "logits":
                made[name][:, seen:end] = output[name][:, valid]
            else:
                made[name][seen:end] = output[name][valid]
        seen = end
    if seen != num_examples:
        raise RuntimeError(f"Predicted {seen} of {num_examples} examples.")
    return made


def remove(folder: Path, *prefixes: str) -> None:
    """Removes what `stream` wrote under these prefixes."""
    for prefix in prefixes:
        for file in _FILES.values():
            (folder / f"{prefix}{file}.npy").unlink(missing_ok=True)


def load(folder: Path, prefix: str = TEST) -> Predictions:
    """What `stream` wrote.

    Raises:
        FileNotFoundError: nothing was written there.
        UserError (a `ValueError`): files that cannot be read, or that do not fit each other.
    """
    files = {name: folder / f"{prefix}{file}.npy" for name, file in _FILES.items()}
    try:
        logits = np.load(files["logits"], mmap_mode="r", allow_pickle=False)
        labels = np.load(files["labels"], allow_pickle=False)
        combined, used = (
            np.load(files[name], mmap_mode="r", allow_pickle=False)
            if files[name].exists()
            else None
            for name in ("ensemble", "experts_used")
        )
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"The predictions in {folder} cannot be read ({error}); evaluate the run again, with "
            "--mode=eval."
        ) from error
    fit = logits.ndim == 3 and labels.shape == logits.shape[1:2] and labels.size
    fit = fit and logits.dtype.kind == "f" and labels.dtype.kind in "iu"
    fit = fit and (combined is None or combined.shape == logits.shape[1:])
    fit = fit and (used is None or used.shape == labels.shape)
    if not fit or labels.min() < 0 or labels.max() >= logits.shape[2]:
        raise UserError(
            f"The predictions in {folder} are damaged: logits {logits.shape} and labels "
            f"{labels.shape} do not fit; evaluate the run again, with --mode=eval."
        )
    return Predictions(logits, labels, combined, used)


def summarize_experts(test: Predictions) -> tuple[Summary, list[Summary]]:
    """The ensemble's summary and each expert's."""
    ensemble = summarize(test.ensemble, test.labels)
    return ensemble, [summarize(logits, test.labels) for logits in test.expert_logits]
