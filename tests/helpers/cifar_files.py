# SPDX-License-Identifier: Apache-2.0
"""Small versions of CIFAR, in memory and as the authors' archive."""

import io
import tarfile
from pathlib import Path

import numpy as np

from balpoe_jax.data.datasets import cifar_archive

CLASSES = {"cifar10": 10, "cifar100": 100}
PER_CLASS = {"train": 5, "test": 2}  # divisible by the five members of CIFAR-10


def make_images(name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Noise whose planes and rows differ, and labels in no order."""
    random = np.random.default_rng([CLASSES[name], len(split)])
    labels = random.permutation(np.repeat(np.arange(CLASSES[name]), PER_CLASS[split]))
    # Few values, so that they compress quickly.
    images = random.integers(0, 4, (len(labels), 32, 32, 3)).astype(np.uint8) * 80
    return images, labels


def members(name: str) -> dict[str, bytes]:
    """The files of an archive, written image by image as the authors' page describes them."""
    archive, files = cifar_archive.ARCHIVES[name], {}
    for split, names in (("train", archive.train), ("test", archive.test)):
        images, labels = make_images(name, split)
        rows = [
            bytes([99 - label, label] if name == "cifar100" else [label])
            + b"".join(image[:, :, channel].tobytes() for channel in range(3))
            for image, label in zip(images, labels.tolist(), strict=True)
        ]
        share = len(rows) // len(names)
        for i, member in enumerate(names):
            files[f"some-folder/{member}"] = b"".join(rows[i * share : (i + 1) * share])
    return files


def write_archive(path: Path, files: dict[str, bytes]) -> Path:
    """Writes an archive of these files and one that does not belong to CIFAR."""
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, content in {"../readme.html": b"text", **files}.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path
