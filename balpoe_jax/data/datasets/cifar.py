# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 and CIFAR-100 from the binary archive, a NumPy file or TFDS."""

import logging
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from balpoe_jax.data import extras
from balpoe_jax.data.datasets import cifar_archive
from balpoe_jax.data.records.sources import ArraySource
from balpoe_jax.errors import UserError

log = logging.getLogger(__name__)

_IMAGE_SHAPE = (32, 32, 3)

Splits = tuple[ArraySource, ArraySource]


def loader(name: str) -> Callable[[str, bool], Splits]:
    """`load` for one data set: a function of `data_dir` and `check_archive`."""
    return lambda data_dir, check_archive: load(name, data_dir, check_archive)


def load(name: str, data_dir: str = "", check_archive: bool = True) -> Splits:
    """The training and the test images of CIFAR, in the archive's order.

    Args:
        name: "cifar10" or "cifar100".
        data_dir: Path of the binary archive, of a `.npz` file or of a folder. A folder is searched
            for the archive, then for `cifar10.npz` or `cifar100.npz`, then for a TFDS data set.
            Empty for TFDS's own folder if TFDS is installed, else for the archive in the user's
            cache; a data set that is absent there is downloaded.
        check_archive: Whether an archive without the published checksum is an error.

    Raises:
        UserError (a `ValueError`): a data set that is not there, cannot be read or is another one.
    """
    path = _find_file(name, data_dir)
    if path.endswith(".npz"):
        splits = _read_npz(path)
    elif path:
        splits = cifar_archive.read(name, path, check_archive)
    else:
        return _load_prepared(name, data_dir)
    unchecked = "" if check_archive or path.endswith(".npz") else ", whose checksum is not checked"
    log.info("%s is read from %s%s", name, path, unchecked)
    return splits


def _find_file(name: str, data_dir: str) -> str:
    """The archive or the NumPy file to read; empty for a data set that TFDS has prepared."""
    archive = cifar_archive.ARCHIVES[name].file
    if not data_dir:
        return "" if extras.has_tfds() else str(cifar_archive.download(name))
    place = os.path.expanduser(data_dir)
    if place.endswith((".npz", ".tar.gz")) and not os.path.isdir(place):
        if not os.path.isfile(place):
            raise UserError(
                f"There is no file {place}; name a {archive}, a .npz file or a folder with "
                "--config.data.data_dir."
            )
        return place
    candidates = (os.path.join(place, archive), os.path.join(place, f"{name}.npz"))
    return next((path for path in candidates if os.path.isfile(path)), "")


def _load_prepared(name: str, data_dir: str) -> Splits:
    archive = cifar_archive.ARCHIVES[name].file
    if not extras.has_tfds():
        raise UserError(
            f"There is no {archive} and no {name}.npz in {data_dir}, and TFDS, which would look "
            f"for a data set of its own there, is not installed; name a folder with one of the two "
            f"by --config.data.data_dir=DIR, or {extras.INSTALL}."
        )
    # Not above: it imports TensorFlow.
    from balpoe_jax.data.datasets import cifar_tfds

    return cifar_tfds.read(name, data_dir, f"{archive} from {cifar_archive.PAGE}")


def _read_npz(path: str) -> Splits:
    try:
        with np.load(path, allow_pickle=False) as stored:
            train, test = (
                _make_source(stored[f"{split}_images"], stored[f"{split}_labels"])
                for split in ("train", "test")
            )
    except UserError:
        raise
    except Exception as error:  # NumPy, its archive and its compression each raise their own
        raise UserError(
            f"{path} should hold the arrays train_images, train_labels, test_images and "
            f"test_labels, but cannot be read so ({' '.join(str(error).split())[:200]}); write it "
            "with numpy.savez."
        ) from error
    return train, test


def _make_source(images: Any, labels: Any) -> ArraySource:
    if images.dtype != np.uint8 or images.shape[1:] != _IMAGE_SHAPE:
        raise ValueError(f"images of {images.dtype} {list(images.shape)}, not uint8 [N, 32, 32, 3]")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise ValueError(f"labels of {labels.dtype} {list(labels.shape)}, not whole numbers [N]")
    return ArraySource(images, labels.astype(np.int64), np.arange(len(labels)))
