# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 and CIFAR-100 from the binary archives of their authors' page.

An archive is a compressed tar file whose members are plain bytes. For each image they hold its
labels, a byte each, and 3,072 bytes of pixels in a red, a green and a blue plane. The order of the
images is kept. It is believed to be that of the archives for Python, from which the published
long-tailed subsets were drawn. Members are read into memory, so a member's name never becomes a
path. Needs no TensorFlow.
"""

import gzip
import hashlib
import io
import logging
import os
import tarfile
import tempfile
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from balpoe_jax.data import cache
from balpoe_jax.data.records.sources import ArraySource
from balpoe_jax.errors import TransientError, UserError, is_transient

log = logging.getLogger(__name__)

PAGE = "https://www.cs.toronto.edu/~kriz/"

_SIDE = 32  # pixels
_TIMEOUT = 60  # seconds without an answer
_CHUNK = 2**20  # bytes


class Archive(NamedTuple):
    """The published description of an archive.

    Attributes:
        file: Name of the file.
        md5: Checksum, as on the authors' page.
        train, test: Members that hold the images, in order.
        labels: Number of bytes before an image's pixels; the last one is its class.
    """

    file: str
    md5: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: int


ARCHIVES = {
    "cifar10": Archive(
        "cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        ("test_batch.bin",),
        1,
    ),
    "cifar100": Archive(  # the byte before the class is that of a coarser division
        "cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
        ("train.bin",),
        ("test.bin",),
        2,
    ),
}


def read(name: str, path: str, check: bool = True) -> tuple[ArraySource, ArraySource]:
    """The training and the test images of an archive, in its order; keys are positions in it.

    Args:
        name: One of `ARCHIVES`.
        path: Path of the archive.
        check: Whether another checksum than the published one is an error.

    Raises:
        UserError (a `ValueError`): a file that cannot be read, has another checksum or other
            members; a `TransientError` when that may pass.
    """
    archive = ARCHIVES[name]
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise (TransientError if is_transient(error) else UserError)(
            f"The archive {path} cannot be read ({error.strerror or error}); name another one with "
            "--config.data.data_dir=FILE."
        ) from error
    if check:
        _check(hashlib.md5(content, usedforsecurity=False).hexdigest(), archive, path)
    members = _read_members(content, {*archive.train, *archive.test}, path)

    def split(names: tuple[str, ...]) -> ArraySource:
        missing = [member for member in names if member not in members]
        if missing:
            raise UserError(
                f"{path} should hold {', '.join(names)}, but {', '.join(missing)} is missing; "
                f"download it again from {PAGE}{archive.file}."
            )
        return _decode(b"".join(members[member] for member in names), archive, path)

    return split(archive.train), split(archive.test)


def download(name: str) -> Path:
    """The path of the archive in the user's cache folder; downloads it if it is absent.

    Args:
        name: One of `ARCHIVES`.

    Raises:
        UserError (a `ValueError`): an archive that is not there and cannot be downloaded.
    """
    archive = ARCHIVES[name]
    path = cache.folder() / archive.file
    if path.is_file():
        return path
    url = PAGE + archive.file
    log.info("Downloading %s to %s", url, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _download(url, path, archive)
    except UserError:
        raise
    except Exception as error:  # whatever the network and its libraries raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{archive.file} is not in {path.parent} and could not be downloaded from {url} "
            f"({reason}); put it into a folder and name that with --config.data.data_dir=DIR."
        ) from error
    return path


def _download(url: str, path: Path, archive: Archive) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    # With a name of its own: other processes may download it, too.
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}", delete=False) as part:
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
                while chunk := answer.read(_CHUNK):
                    digest.update(chunk)
                    part.write(chunk)
            part.flush()
            _check(digest.hexdigest(), archive, url)
            os.replace(part.name, path)
        except BaseException:
            Path(part.name).unlink(missing_ok=True)
            raise


def _check(found: str, archive: Archive, where: str) -> None:
    if found != archive.md5:
        raise UserError(
            f"{where} should have the published MD5 checksum {archive.md5} of {archive.file}, but "
            f"has {found}; download it again from {PAGE}{archive.file}, or pass "
            "--config.data.check_archive=False to use it as it is."
        )


def _read_members(content: bytes, wanted: set[str], path: str) -> dict[str, bytes]:
    """The content of each wanted member, by its name without folders."""
    members: dict[str, bytes] = {}
    try:
        with (
            gzip.GzipFile(fileobj=io.BytesIO(content)) as unpacked,
            tarfile.open(fileobj=unpacked, mode="r:") as tar,
        ):
            for member in tar:
                name = member.name.rpartition("/")[2]
                file = tar.extractfile(member) if name in wanted and member.isfile() else None
                if file is not None:
                    members[name] = file.read()
            while unpacked.read(_CHUNK):  # to the end of the file, which verifies its checksum
                pass
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError) as error:
        raise UserError(
            f"{path} should be a compressed tar file, but cannot be read as one ({error}); "
            "download it again."
        ) from error
    return members


def _decode(content: bytes, archive: Archive, path: str) -> ArraySource:
    size = archive.labels + 3 * _SIDE**2
    if not content or len(content) % size:
        raise UserError(
            f"The images in {path} should be a multiple of {size} bytes, but are {len(content)}; "
            f"download it again from {PAGE}{archive.file}."
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    planes = records[:, archive.labels :].reshape(-1, 3, _SIDE, _SIDE)
    images = np.empty((len(records), _SIDE, _SIDE, 3), np.uint8)
    for channel in range(3):  # takes half the time of a transposed copy
        images[..., channel] = planes[:, channel]
    labels = records[:, archive.labels - 1].astype(np.int64)
    return ArraySource(images, labels, np.arange(len(labels)))
