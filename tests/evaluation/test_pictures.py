# SPDX-License-Identifier: Apache-2.0
"""Which test images are shown, and that they are these images."""

import base64
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from balpoe_jax.data.records.sources import ArraySource, FileIndex, FileSource
from balpoe_jax.evaluation import pictures
from balpoe_jax.evaluation.predictions import Predictions

COUNTS = np.array([50, 3, 20, 3, 1])


def draw(number: int = 120) -> tuple[np.ndarray, Predictions]:
    """Images of a few pixels, and logits of two experts for five classes; the last is untested."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (number, 6, 8, 3)).astype(np.uint8)
    labels = random.integers(0, 4, number).astype(np.int32)
    logits = random.standard_normal((2, number, 5)).astype(np.float32)
    return images, Predictions(logits, labels)


def decoded(picture: pictures.Picture) -> np.ndarray:
    head, _, content = picture.uri.partition(";base64,")
    assert head in ("data:image/png", "data:image/jpeg")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def test_errors_come_from_the_most_confident_on() -> None:
    labels, predicted = np.array([0, 1, 2, 0, 1]), np.array([0, 2, 2, 1, 0])
    confidence = np.array([0.99, 0.4, 0.9, 0.8, 0.8])
    assert pictures.confident_errors(labels, predicted, confidence).tolist() == [3, 4, 1]
    assert pictures.confident_errors(labels, labels, confidence).tolist() == []


def test_rare_classes_take_turns() -> None:
    labels = np.array([0, 0, 1, 3, 2, 3, 1, 0])
    # Class 4 has the fewest training images and no test image.
    assert pictures.of_rare_classes(labels, COUNTS).tolist() == [2, 3, 4, 0, 6, 5, 1, 7]
    # An untested class takes no place of the sixteen.
    rarer = pictures.of_rare_classes(np.arange(1, 18), np.arange(1, 19))
    assert rarer.tolist() == list(range(16))
    many = np.repeat(np.arange(30), 2)
    first = pictures.of_rare_classes(many, np.arange(30, 0, -1))
    assert many[first[:16]].tolist() == list(range(29, 13, -1)) and set(many[first]) == set(
        range(14, 30)
    )


def test_pictures_are_the_images_and_their_labels(tmp_path: Path) -> None:
    images, test = draw()
    source = ArraySource(images, test.labels.astype(np.int64), 1000 + np.arange(len(images)))
    pictures.save(tmp_path, source, test, COUNTS)
    shown = pictures.load(tmp_path, 5)
    assert [picture.kind for picture in shown] == [pictures.WRONG] * 16 + [pictures.RARE] * 16
    mean = test.expert_logits.astype(np.float64).mean(axis=0)
    odds = np.exp(mean) / np.exp(mean).sum(axis=1, keepdims=True)
    for picture in shown:
        i = int(picture.name) - 1000
        np.testing.assert_array_equal(decoded(picture), images[i])
        assert (picture.label, picture.predicted) == (test.labels[i], odds[i].argmax())
        assert picture.confidence == pytest.approx(odds[i].max())
    wrong = [picture.confidence for picture in shown[:16]]
    assert wrong == sorted(wrong, reverse=True)
    assert all(picture.label != picture.predicted for picture in shown[:16])
    assert {picture.label for picture in shown[16:]} == {0, 1, 2, 3}


def test_photographs_are_made_small_and_bad_files_left_out(tmp_path: Path) -> None:
    _, test = draw(40)
    for i in range(40):
        Image.new("RGB", (300, 150), (6 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "7.png").write_bytes(b"no image")
    names = [f"{i}.png" for i in range(40)]
    # The rarest class that is tested comes first; names of files may be any bytes.
    first = int(pictures.of_rare_classes(test.labels, COUNTS)[0])
    odd = os.fsdecode(b"\xff.png")
    (tmp_path / names[first]).rename(tmp_path / odd)
    names[first] = odd
    index = FileIndex(np.array(names), test.labels.astype(np.int64))
    pictures.save(tmp_path / ".", FileSource(index, 32, 36, root=str(tmp_path)), test, COUNTS)
    shown = pictures.load(tmp_path, 5)
    assert len(shown) == 32 and "7.png" not in {picture.name for picture in shown}
    assert "\\xff.png" in {picture.name for picture in shown}
    for picture in shown:
        pixels = decoded(picture).astype(int)
        number = first if "xff" in picture.name else int(picture.name.removesuffix(".png"))
        assert pixels.shape == (48, 96, 3)
        assert abs(pixels - [6 * number, 0, 0]).max() <= 2


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "other"},
        {"label": 5},
        {"predicted": -1},
        {"confidence": None},
        {"uri": "https://example.org/a.png"},
        {"more": 1},
        "no row",
        [1, 2],
    ],
)
def test_a_damaged_file_shows_nothing(tmp_path: Path, change) -> None:
    images, test = draw()
    source = ArraySource(images, test.labels.astype(np.int64), np.arange(len(images)))
    pictures.save(tmp_path, source, test, COUNTS)
    path = tmp_path / pictures.FILE
    content = json.loads(path.read_text())
    content["pictures"][3] = content["pictures"][3] | change if isinstance(change, dict) else change
    path.write_text(json.dumps(content))
    assert pictures.load(tmp_path, 5) == []
    path.write_text('{"pictures": [')
    assert pictures.load(tmp_path, 5) == []
