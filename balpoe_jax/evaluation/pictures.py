# SPDX-License-Identifier: Apache-2.0
"""Test images to look at: those that are wrong with high confidence, and those of rare classes.

They are kept as small PNG or JPEG files in one JSON file next to the predictions, so that a report
shows them without the data set.
"""

import base64
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from balpoe_jax import files
from balpoe_jax.data.records import photographs
from balpoe_jax.data.records.sources import UNREADABLE, ArraySource, Source
from balpoe_jax.evaluation.predictions import Predictions
from balpoe_jax.metrics import summarize

FILE = "pictures.json"
WRONG, RARE = "wrong", "rare"

_EACH = 16
_SIDE = 96  # pixels of the long side
_UP_TO = 64  # pixels up to which an image is kept as it is


class Picture(NamedTuple):
    """A test image and what is predicted for it.

    Attributes:
        kind: `WRONG` or `RARE`.
        name: Name of the image in its data set.
        label: True class.
        predicted: Predicted class.
        confidence: Probability of the predicted class.
        uri: Small image as a `data:` address.
    """

    kind: str
    name: str
    label: int
    predicted: int
    confidence: float
    uri: str


def save(
    folder: Path, source: Source, test: Predictions, class_counts: npt.NDArray[np.integer]
) -> None:
    """Writes the pictures of a test set into `folder`; an image that cannot be read is left out.

    Args:
        folder: Folder of the predictions.
        source: Test images, in the order of the predictions.
        test: Predictions of the test set.
        class_counts: Training images of each class, int `[C]`.

    Raises:
        UserError (a `ValueError`): the file cannot be written.
    """
    found = summarize(test.ensemble, test.labels)
    orders = {
        WRONG: confident_errors(test.labels, found.predicted, found.confidence),
        RARE: of_rare_classes(test.labels, class_counts),
    }
    kept = []
    for kind, order in orders.items():
        for i, uri in _first_readable(source, order):
            (given,) = source.ids(np.array([i]))
            name = os.fsencode(given).decode(errors="backslashreplace")  # a page is text
            label, predicted = int(test.labels[i]), int(found.predicted[i])
            kept.append(Picture(kind, name, label, predicted, float(found.confidence[i]), uri))
    content = {"pictures": [picture._asdict() for picture in kept]}
    files.write_atomically(folder / FILE, json.dumps(content, indent=1) + "\n")


def load(folder: Path, num_classes: int) -> list[Picture]:
    """What `save` wrote; nothing where there is no such file, or one that is damaged.

    Args:
        folder: Folder of the predictions.
        num_classes: Number of classes.
    """
    content = files.read_json(folder / FILE) or {}
    rows = content.get("pictures")
    pictures = []
    for row in rows if isinstance(rows, list) else ():
        try:
            picture = Picture(**row)
            is_whole = all(
                isinstance(value, kind)
                for value, kind in zip(picture, (str, str, int, int, float, str), strict=True)
            )
        except TypeError:
            return []
        classes = range(num_classes)
        if not is_whole or picture.label not in classes or picture.predicted not in classes:
            return []
        if picture.kind not in (WRONG, RARE) or not picture.uri.startswith("data:image/"):
            return []
        pictures.append(picture)
    return pictures


def confident_errors(
    labels: npt.NDArray[np.integer],
    predicted: npt.NDArray[np.integer],
    confidence: npt.NDArray[np.floating],
) -> npt.NDArray[np.int64]:
    """Positions of the wrong predictions, the most confident one first.

    Args:
        labels: True classes, int `[N]`.
        predicted: Predicted classes, int `[N]`.
        confidence: Probability of the predicted class, float `[N]`.
    """
    wrong = np.flatnonzero(labels != predicted)
    return wrong[np.argsort(-confidence[wrong], kind="stable")]


def of_rare_classes(
    labels: npt.NDArray[np.integer], class_counts: npt.NDArray[np.integer]
) -> npt.NDArray[np.int64]:
    """Positions of all images: the first of each class from the rarest on, then the second ones.

    Only as many classes take part as pictures are shown.

    Args:
        labels: True classes, int `[N]`.
        class_counts: Training images of each class, int `[C]`.
    """
    tested = np.bincount(labels, minlength=len(class_counts)) > 0
    order = [label for label in np.argsort(class_counts, kind="stable") if tested[label]][:_EACH]
    turns = [
        (turn, rank, i)
        for rank, label in enumerate(order)
        for turn, i in enumerate(np.flatnonzero(labels == label)[:_EACH].tolist())
    ]
    return np.array([i for _, _, i in sorted(turns)], np.int64)


def _first_readable(source: Source, order: npt.NDArray[np.int64]) -> Iterator[tuple[int, str]]:
    shown = 0
    for i in order:
        if shown == _EACH:
            return
        try:
            pixels = _pixels(source, int(i))
        except (*UNREADABLE, OSError):
            continue
        shown += 1
        yield int(i), _uri(pixels)


def _pixels(source: Source, i: int) -> npt.NDArray[np.uint8]:
    if isinstance(source, ArraySource):
        return source.images[i]
    return photographs.pixels(source.read_image(i))


def _uri(pixels: npt.NDArray[np.uint8]) -> str:
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    kind = "png" if max(image.size) <= _UP_TO else "jpeg"
    if kind == "png":
        image.save(buffer, "PNG", optimize=True)
    else:
        image.thumbnail((_SIDE, _SIDE))
        image.save(buffer, "JPEG", quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
