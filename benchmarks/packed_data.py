# SPDX-License-Identifier: Apache-2.0
"""CIFAR-100-LT in 43 MiB, to be carried to a machine without a network.

Packed are all labels, all test images, and the training images that the selection keeps or holds
out, as mosaics in lossless WebP. Unpacked, they are a `.npz` file in the format of
`balpoe_jax.data.datasets.cifar`, with black images in place of the others. The package's own code
selects the same images from it, which `unpack` verifies.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from balpoe_jax.data import datasets
from balpoe_jax.data.datasets import cifar
from balpoe_jax.data.datasets.types import LongTailed
from balpoe_jax.errors import UserError
from balpoe_jax.files import reports_write_errors

NAME = "cifar100"
LABELS = "labels.npz"

# Largest `eval.held_out_per_class` of a row, the ablation's, and so of what is packed.
HELD_OUT_PER_CLASS = 50

# Images in a row of a mosaic, and rows in a file, which keep to WebP's limit of 16,383 pixels.
_ACROSS, _DOWN = 100, 250
_SIDE = 32

# Labels at the beginning of the Python archive's training set.
_FIRST = (19, 29, 0, 11, 1, 86, 90, 28, 23, 31)

Images = npt.NDArray[np.uint8]


def pack(data_dir: str, folder: Path, ratio: float = 100.0, verify_counts: bool = True) -> int:
    """Writes mosaics and labels.

    Args:
        data_dir: Place of CIFAR-100, as a config's `data.data_dir`.
        folder: Folder to write to; created if it is missing.
        ratio: Imbalance ratio of the selection.
        verify_counts: Whether an incomplete data set is an error.

    Returns:
        Size of what was written, in bytes.

    Raises:
        UserError (a `ValueError`): data that are not there or not complete, a folder that cannot
            be written to.
    """
    train, test = cifar.load(NAME, data_dir)
    if not (train.keys == np.arange(len(train))).all():
        raise UserError(
            f"The training images in {data_dir} should be numbered without gaps, and are not; "
            "prepare the data set again."
        )
    chosen = datasets.load(NAME, ratio, data_dir, verify_counts, 0, HELD_OUT_PER_CLASS)
    keys = _keys(chosen)
    with reports_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write_mosaics(folder, "train", train.images[keys])
        _write_mosaics(folder, "test", test.images)
        np.savez_compressed(
            folder / LABELS,
            train_labels=train.labels.astype(np.uint8),
            test_labels=test.labels.astype(np.uint8),
            keys=keys.astype(np.int32),
            ratio=ratio,
        )
    return sum(path.stat().st_size for path in folder.iterdir())


def unpack(folder: Path, path: Path) -> None:
    """Writes the `.npz` file, black where the selection leaves an image out.

    Args:
        folder: Folder that `pack` wrote.
        path: Path of the file to write.

    Raises:
        UserError (a `ValueError`): files that are not there or that cannot be read, or a selection
            of other images than those packed.
    """
    try:
        with np.load(folder / LABELS, allow_pickle=False) as stored:
            packed = dict(stored)
        keys, ratio = packed["keys"], float(packed["ratio"])
        train = np.zeros((len(packed["train_labels"]), _SIDE, _SIDE, 3), np.uint8)
        train[keys] = _read_mosaics(folder, "train", len(keys))
        test = _read_mosaics(folder, "test", len(packed["test_labels"]))
    except Exception as error:  # NumPy and Pillow each raise their own
        raise UserError(
            f"{folder} should hold mosaics of CIFAR-100 and cannot be read so "
            f"({' '.join(str(error).split())[:200]}); write it again with --pack."
        ) from error
    save(path, train, packed["train_labels"], test, packed["test_labels"])
    chosen = datasets.load(NAME, ratio, str(path), False, 0, HELD_OUT_PER_CLASS)
    if not np.array_equal(np.sort(_keys(chosen)), np.sort(keys)):
        raise UserError(
            f"{folder} holds other images than the selection keeps now; write it again with --pack."
        )


def is_packed(folder: str) -> bool:
    """Whether a path is a folder that `pack` wrote."""
    return (Path(folder) / LABELS).is_file()


def generate(path: Path, train_per_class: int, test_per_class: int) -> None:
    """Writes a `.npz` of 100 classes of random images with something to learn.

    Args:
        path: Path of the file to write.
        train_per_class, test_per_class: Number of images of each class.
    """
    random = np.random.default_rng(0)
    centres = random.integers(64, 192, (100, 1, 1, 3))

    def images(labels: npt.NDArray[np.int64]) -> Images:
        noise = random.integers(-64, 64, (len(labels), _SIDE, _SIDE, 3), np.int16)
        return (centres[labels] + noise).astype(np.uint8)

    train, test = (
        random.permutation(np.arange(100).repeat(n)) for n in (train_per_class, test_per_class)
    )
    save(path, images(train), train, images(test), test)


def save(path: Path, train: Images, train_labels: Any, test: Images, test_labels: Any) -> None:
    """Writes images and labels of both splits as `data.datasets.cifar` reads them."""
    with reports_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            path,
            train_images=train,
            train_labels=train_labels,
            test_images=test,
            test_labels=test_labels,
        )


def has_archive_order(labels: npt.NDArray[np.integer]) -> bool:
    """Whether training labels begin as the Python archive's do.

    The published selection is one of positions in that order. In another order it keeps the same
    number of images of each class, but other images.

    Args:
        labels: Training labels, int `[N]`.
    """
    return labels[: len(_FIRST)].tolist() == list(_FIRST)


def _keys(chosen: LongTailed) -> npt.NDArray[np.int64]:
    """Positions of the images that a selection keeps or holds out."""
    parts = [chosen.train, *([chosen.held_out] if chosen.held_out is not None else [])]
    return np.concatenate([part.keys for part in parts])  # type: ignore[union-attr]


def _write_mosaics(folder: Path, name: str, images: Images) -> None:
    from PIL import Image

    rows = -(-len(images) // _ACROSS)
    padding = np.zeros((rows * _ACROSS - len(images), *images.shape[1:]), np.uint8)
    mosaic = np.concatenate([images, padding]).reshape(rows, _ACROSS, _SIDE, _SIDE, 3)
    for number, first in enumerate(range(0, rows, _DOWN)):
        part = mosaic[first : first + _DOWN].transpose(0, 2, 1, 3, 4)
        sheet = Image.fromarray(part.reshape(-1, _ACROSS * _SIDE, 3))
        path = folder / f"{name}{number}.webp"
        sheet.save(path, lossless=True, quality=90, method=4, exact=True)


def _read_mosaics(folder: Path, name: str, count: int) -> Images:
    from PIL import Image

    parts: list[Images] = []
    for number in range(-(-count // (_ACROSS * _DOWN))):
        with Image.open(folder / f"{name}{number}.webp") as sheet:
            pixels = np.asarray(sheet.convert("RGB"))
        rows = pixels.reshape(-1, _SIDE, _ACROSS, _SIDE, 3).transpose(0, 2, 1, 3, 4)
        parts.append(rows.reshape(-1, _SIDE, _SIDE, 3))
    return np.concatenate(parts)[:count]
