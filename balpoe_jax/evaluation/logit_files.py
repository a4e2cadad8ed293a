# SPDX-License-Identifier: Apache-2.0
"""Logits of any model in a file, with labels; and class counts in a file.

A file of logits is what `numpy.savez` writes: `logits`, float `[N, C]`, or `[E, N, C]` for several
models whose logits are averaged, and `labels`, int `[N]`. It may have `held_out_logits` and
`held_out_labels` of the same kind. Log-probabilities are logits, too.
"""

import json
import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from balpoe_jax.errors import UserError
from balpoe_jax.evaluation.predictions import Predictions
from balpoe_jax.metrics import check_finite

_HOW = "write it with numpy.savez(FILE, logits=LOGITS, labels=LABELS)"


class StoredLogits(NamedTuple):
    """Content of a file of logits.

    Attributes:
        test: Rows that are scored.
        held_out: Rows on which everything is chosen; None where the file has none.
    """

    test: Predictions
    held_out: Predictions | None


def read_logits(path: str) -> StoredLogits:
    """Reads and checks a file of logits.

    Args:
        path: Path of the file.

    Raises:
        UserError (a `ValueError`): no such file, arrays that are missing or do not fit, labels out
            of range, or logits that are not finite.
    """
    try:
        with open(path, "rb") as file:
            stored = np.load(file, allow_pickle=False)
            arrays = dict(stored) if isinstance(stored, np.lib.npyio.NpzFile) else {}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or "it is no .npz file of arrays"
        raise UserError(f"The logits {path} cannot be read ({reason}); {_HOW}.") from error
    test = _predictions(arrays, "", path)
    if not {"held_out_logits", "held_out_labels"} & set(arrays):
        return StoredLogits(test, None)
    held_out = _predictions(arrays, "held_out_", path)
    sizes = [part.expert_logits.shape[::2] for part in (test, held_out)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"The held-out logits in {path} should be of as many models and classes as the "
            f"others, and are of {sizes[1][0]} and {sizes[1][1]} in place of {sizes[0][0]} and "
            f"{sizes[0][1]}."
        )
    return StoredLogits(test, held_out)


def _predictions(arrays: dict[str, npt.NDArray], prefix: str, path: str) -> Predictions:
    names = f"{prefix}logits", f"{prefix}labels"
    missing = [name for name in names if name not in arrays]
    if missing:
        found = ", ".join(arrays) or "nothing"
        raise UserError(f"{path} should have the array {missing[0]} and has {found}; {_HOW}.")
    logits, labels = (arrays[name] for name in names)
    if logits.ndim == 2:
        logits = logits[None]
    fit = logits.ndim == 3 and logits.dtype.kind == "f" and labels.shape == logits.shape[1:2]
    if not fit or not labels.size or logits.shape[2] < 2:
        raise UserError(
            f"{names[0]} in {path} should be float [N, C] or [E, N, C] with C >= 2 and {names[1]} "
            f"int [N] with N >= 1, got {arrays[names[0]].dtype} {arrays[names[0]].shape} and "
            f"{labels.dtype} {labels.shape}."
        )
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= logits.shape[2]:
        raise UserError(
            f"{names[1]} in {path} should be whole numbers from 0 to {logits.shape[2] - 1}, the "
            "positions of the classes in the logits."
        )
    for one in logits:
        check_finite(one, what="rows")
    return Predictions(logits.astype(np.float32), labels.astype(np.int32))


def hold_out(rows: Predictions, share: float, seed: int) -> StoredLogits:
    """Holds out a share of the rows of each class, drawn at random.

    Args:
        rows: Rows with labels.
        share: Share of each class, rounded down.
        seed: Seed of the draw.

    Raises:
        UserError (a `ValueError`): too few rows to hold one out.
    """
    random = np.random.default_rng(seed)
    order = random.permutation(len(rows.labels))
    chosen = []
    for label in np.unique(rows.labels):
        members = order[rows.labels[order] == label]
        chosen.append(members[: int(share * len(members))])
    held_out = np.sort(np.concatenate(chosen))
    if not len(held_out):
        raise UserError(
            f"No class has enough rows to hold {100 * share:g}% of them out; give "
            "held_out_logits and held_out_labels, or a larger --held_out_share."
        )
    rest = np.setdiff1d(np.arange(len(rows.labels)), held_out)
    test, apart = (
        Predictions(rows.expert_logits[:, part], rows.labels[part]) for part in (rest, held_out)
    )
    return StoredLogits(test, apart)


def read_counts(given: str, num_classes: int) -> npt.NDArray[np.int64]:
    """Training examples of each class: numbers separated by commas, or a file.

    A file has one number a line, or is a `.npy` file or a JSON list. Of numbers with names before
    them, separated by a comma, the last one of each line counts.

    Args:
        given: Numbers or the path of a file.
        num_classes: Number of classes.

    Raises:
        UserError (a `ValueError`): no such file, what is no number, or another number of them.
    """
    try:
        values = _numbers(given)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"--counts={given} should be training examples by class, separated by commas, or a "
            f"file with one number a line (.npy or .json, too); it cannot be read so ({error})."
        ) from error
    counts = np.asarray(values)
    is_whole = (
        counts.ndim == 1 and counts.dtype.kind in "iuf" and (counts == np.round(counts)).all()
    )
    if not is_whole or counts.shape != (num_classes,) or counts.min() < 1:
        raise UserError(
            f"--counts={given} should have a whole number of at least 1 for each of the "
            f"{num_classes} classes, got {counts.size}"
            + (f" with a minimum of {counts.min():g}." if is_whole and counts.size else ".")
        )
    return counts.astype(np.int64)


def _numbers(given: str) -> npt.ArrayLike:
    path = Path(given)
    if not os.path.isfile(given):  # and not Path's, which refuses long names
        return [float(part) for part in given.split(",")]
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json":
        return json.loads(text)
    lines = [line.rpartition(",")[2].strip() for line in text.splitlines() if line.strip()]
    header = 1 if lines and not lines[0].lstrip("-").isdecimal() else 0
    return [float(line) for line in lines[header:]]
