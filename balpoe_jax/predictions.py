# SPDX-License-Identifier: Apache-2.0
"""The logits of all experts for a data set: streamed to disk as they come, read back mapped."""

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from balpoe_jax.errors import UserError, writing
from balpoe_jax.leftovers import temporary

FOLDER = "predictions"
TEST, HELD_OUT = "", "held_out_"


class Predictions(NamedTuple):
    """Logits and labels of a data set, in its order.

    Attributes:
        expert_logits: float32 `[E, N, C]`, memory-mapped when read from disk.
        labels: int32 `[N]`.
    """

    expert_logits: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int32]


def stream(
    folder: Path,
    prefix: str,
    shape: tuple[int, int, int],
    outputs: Iterable[Mapping[str, npt.NDArray]],
) -> Predictions:
    """Writes what an evaluation puts out, a batch at a time, and returns it mapped.

    The files `{prefix}expert_logits.npy` and `{prefix}labels.npy` replace earlier ones as a whole.

    Args:
        folder: created when missing.
        prefix: `TEST` or `HELD_OUT`.
        shape: `(E, N, C)`.
        outputs: batches with `logits` `[E, b, C]`, `labels` `[b]` and `mask` `[b]`, False for
            padding.

    Raises:
        UserError (a `ValueError`): the files cannot be written.
    """
    # Names of this process's own: a training may be evaluating itself at the same time.
    partial = temporary(folder / f"{prefix}expert_logits.npy")
    partial_labels = temporary(folder / f"{prefix}labels.npy")
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            logits = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
        labels = _fill(logits, outputs)
        with writing(folder):
            logits.flush()
            np.save(partial_labels, labels)
            os.replace(partial_labels, folder / f"{prefix}labels.npy")
            os.replace(partial, folder / f"{prefix}expert_logits.npy")
    except BaseException:
        # What is in the way of the folder is in the way of these, too.
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
            partial_labels.unlink(missing_ok=True)
        raise
    return load(folder, prefix)


def _fill(
    logits: npt.NDArray[np.float32], outputs: Iterable[Mapping[str, npt.NDArray]]
) -> npt.NDArray[np.int32]:
    """Puts batches one after the other into `logits` `[E, N, C]`; returns the labels `[N]`."""
    labels = np.empty(logits.shape[1], np.int32)
    seen = 0
    for output in outputs:
        valid = output["mask"]
        end = seen + int(valid.sum())
        logits[:, seen:end] = output["logits"][:, valid]
        labels[seen:end] = output["labels"][valid]
        seen = end
    if seen != len(labels):
        raise RuntimeError(f"Predicted {seen} of {len(labels)} examples.")
    return labels


def load(folder: Path, prefix: str = TEST) -> Predictions:
    """What `stream` wrote.

    Raises:
        FileNotFoundError: nothing was written there.
        UserError (a `ValueError`): files that cannot be read, or that do not fit each other.
    """
    files = (folder / f"{prefix}expert_logits.npy", folder / f"{prefix}labels.npy")
    try:
        logits = np.load(files[0], mmap_mode="r", allow_pickle=False)
        labels = np.load(files[1], allow_pickle=False)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"The predictions in {folder} cannot be read ({error}); evaluate the run anew, with "
            "--mode=eval."
        ) from error
    fit = logits.ndim == 3 and labels.shape == logits.shape[1:2] and labels.size
    fit = fit and logits.dtype.kind == "f" and labels.dtype.kind in "iu"
    if not fit or labels.min() < 0 or labels.max() >= logits.shape[2]:
        raise UserError(
            f"The predictions in {folder} are damaged: logits {logits.shape} and labels "
            f"{labels.shape} do not fit; evaluate the run anew, with --mode=eval."
        )
    return Predictions(logits, labels)
