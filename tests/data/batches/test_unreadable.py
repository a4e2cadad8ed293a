# SPDX-License-Identifier: Apache-2.0
"""Photographs that are damaged or of another kind: decoded, or named and replaced."""

import dataclasses
import errno
import io
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from balpoe_jax.data import pipeline
from balpoe_jax.data.batches import unreadable
from balpoe_jax.data.batches.mixing import Mixer
from balpoe_jax.data.batches.replacements import Replacements
from balpoe_jax.data.pipeline import eval_batches, train_batches
from balpoe_jax.data.records import sources, tfrecords
from balpoe_jax.data.records.sources import RecordSource
from balpoe_jax.data.settings import AugmentSettings, Host, MixSettings, TrainSettings
from balpoe_jax.data.types import EvalBatch, TrainBatch
from balpoe_jax.errors import TransientError, UserError
from balpoe_jax.run import bad_images
from tests.helpers.records import write
from tests.helpers.small_photos import jpeg

pytestmark = pytest.mark.integration

SIZE, CLASSES, PER_CLASS, BATCH = 16, 4, 10, 8
NUM = CLASSES * PER_CLASS
SETTINGS = TrainSettings(
    BATCH, 3, (0.5,) * 3, (0.25,) * 3, AugmentSettings(flip=True), MixSettings(alpha=0.3)
)


def write_photos(folder: Path, changed: dict[int, bytes] | None = None) -> RecordSource:
    """Forty photographs, with their classes in turn, in two files."""
    images = [(changed or {}).get(i, jpeg(i)) for i in range(NUM)]
    examples = [
        {"image": image, "label": i % CLASSES, "file_name": f"photo{i}.JPEG".encode()}
        for i, image in enumerate(images)
    ]
    halves = examples[: NUM // 2], examples[NUM // 2 :]
    paths = tuple(write(folder / f"part{i}", half) for i, half in enumerate(halves))
    return RecordSource(tfrecords.scan(paths, "file_name"), SIZE, SIZE + 2, paths=paths)


def damage(source: RecordSource, i: int, kind: str) -> str:
    """Damages the image at a position in its file; returns what is said of it."""
    path = Path(source.paths[source.index.files[i]])
    content = bytearray(path.read_bytes())
    middle = int(source.index.offsets[i] + source.index.sizes[i] // 2)
    if kind == "cut off":
        path.write_bytes(content[:middle])
        return "the file ends within its record"
    if kind == "one bit":
        content[middle] ^= 4
    elif kind == "checksum":
        content[int(source.index.starts[i] + source.index.lengths[i])] ^= 1
    path.write_bytes(content)
    return "the checksum of its record is wrong"


def evaluate(source: RecordSource) -> list[EvalBatch]:
    return list(eval_batches(source, BATCH, (0.5,) * 3, (0.25,) * 3))


@pytest.mark.slow_cases("cut off")
@pytest.mark.parametrize("kind", ["cut off", "checksum"])
def test_a_damaged_record_is_named(tmp_path: Path, kind: str) -> None:
    source = write_photos(tmp_path)
    reason = damage(source, 39, kind)
    where = rf"photo39.JPEG \(example 39, record (19|-1) of {tmp_path}/part1\)"
    with pytest.raises(UserError, match=rf"^The test or held-out image {where} .*: {reason}; "):
        evaluate(source)
    with pytest.raises(UserError, match=rf"^The training image {where} .*on_bad_image=skip\.$"):
        list(train_batches(source, SETTINGS, 0, 5))


@pytest.mark.slow_cases("content1-Invalid JPEG data, size 300")
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Input is empty"),
        (jpeg(0)[:300], "Invalid JPEG data, size 300"),
    ],
)
def test_what_is_no_image_is_named_by_both_parts(tmp_path: Path, content, reason) -> None:
    source = write_photos(tmp_path, {21: content})
    with pytest.raises(UserError, match=r"photo21.JPEG \(example 21, record 1 of ") as caught:
        evaluate(source)
    assert f"cannot be read: {reason}; " in str(caught.value)
    assert "\n" not in str(caught.value) and "Op:" not in str(caught.value)
    with pytest.raises(UserError, match=r"training image photo21.JPEG"):
        list(train_batches(source, SETTINGS, 0, 5))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def kinds_of_images() -> dict[str, tuple[bytes, np.ndarray]]:
    """Files of every kind that a data set of photographs has, and what they show."""
    image = Image.open(io.BytesIO(jpeg(5)))
    grey = image.convert("L")
    deep = Image.fromarray(np.asarray(grey, np.uint16) * 257)
    shown = {"grey": np.asarray(grey.convert("RGB")), "colour": np.asarray(image)}
    return {
        "grey JPEG": (encoded(grey, "JPEG", quality=95), shown["grey"]),
        "CMYK JPEG": (encoded(image.convert("CMYK"), "JPEG", quality=95), shown["colour"]),
        "PNG": (encoded(image, "PNG"), shown["colour"]),
        "grey PNG": (encoded(grey, "PNG"), shown["grey"]),
        "grey PNG of 16 bits": (encoded(deep, "PNG"), shown["grey"]),
        "PNG with transparency": (encoded(image.convert("RGBA"), "PNG"), shown["colour"]),
        "PNG with a palette": (
            encoded(image.quantize(64), "PNG"),
            np.asarray(image.quantize(64).convert("RGB")),
        ),
        "colour PNG of 16 bits": (
            tf.io.encode_png(np.asarray(image, np.uint16) * 257).numpy(),
            shown["colour"],
        ),
        "BMP": (encoded(image, "BMP"), shown["colour"]),
        "WebP": (encoded(image, "WEBP", lossless=True), shown["colour"]),
    }


@pytest.mark.parametrize("kind", kinds_of_images())
def test_other_kinds_of_images_are_decoded(tmp_path: Path, kind: str) -> None:
    content, shown = kinds_of_images()[kind]
    source = write_photos(tmp_path, {2: content, 3: encoded(Image.fromarray(shown), "PNG")})
    batch = evaluate(source)[0].images
    tolerance = 0.15 if "JPEG" in kind else 1e-6  # of values that span four
    assert np.abs(batch[2] - batch[3]).mean() < tolerance
    assert unreadable.examine(source, 2) is None


def test_an_empty_record_and_a_wrong_length_are_named(tmp_path: Path) -> None:
    path = write_photos(tmp_path).paths[0]
    with tf.io.TFRecordWriter(path) as writer:
        writer.write(b"")
    with pytest.raises(UserError, match=r"Record 0 of .*part0 is not .* \(it has no content\)"):
        tfrecords.scan([path], "file_name")
    source = write_photos(tmp_path)
    content = bytearray(Path(path).read_bytes())
    content[int(source.index.starts[3]) - 3] ^= 1
    Path(path).write_bytes(content)
    with pytest.raises(UserError, match=r"part0 is cut off or damaged at record 3; prepare"):
        tfrecords.scan([path], "file_name")


@pytest.mark.slow
def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    source = write_photos(tmp_path)
    os.unlink(source.paths[1])
    with pytest.raises(UserError, match=r"part1 cannot be read \(No such file"):
        tfrecords.load_index(source.paths, "file_name")
    for batches in (evaluate, lambda source: list(train_batches(source, SETTINGS, 0, 5))):
        with pytest.raises(UserError, match=r"part1 cannot be read \(No such file"):
            batches(source)


def test_storage_that_does_not_answer_is_no_bad_image(tmp_path: Path, monkeypatch) -> None:
    """It passes; not even `skip` may leave out what it does not show."""
    source = write_photos(tmp_path)

    def refuse(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sources.tfrecords, "read_image", refuse)
    replacements = Replacements(source)
    with pytest.raises(TransientError, match=r"part[01] cannot be read \(Input/output error\)"):
        list(train_batches(source, SETTINGS, 0, 5, replacements=replacements))


def bad_source(folder: Path) -> RecordSource:
    """Images 6, 10 and 38 of class 2 and 3 of class 3 cannot be read."""
    source = write_photos(folder, {6: b"", 10: jpeg(0)[:300]})
    damage(source, 38, "one bit")
    damage(source, 3, "one bit")
    return source


class Found(list):
    def __call__(self, found: list) -> None:
        self[:] = found


def make_skipping(source: RecordSource, known=()) -> tuple[Replacements, Found]:
    found = Found(known)
    return Replacements(source, known, found), found


def assert_equal(left: list[TrainBatch], right: list[TrainBatch]) -> None:
    for a, b in zip(left, right, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_skipped_images_are_replaced_by_the_next_of_their_class(tmp_path: Path) -> None:
    source = bad_source(tmp_path)
    replacements, found = make_skipping(source)
    batches = list(train_batches(source, SETTINGS, 0, 5, replacements=replacements))
    assert sorted(bad.index for bad in found) == [3, 6, 10, 38]
    assert {bad.id for bad in found} == {f"photo{i}.JPEG" for i in (3, 6, 10, 38)}
    expected = np.arange(NUM)
    expected[[3, 6, 10, 38]] = [7, 14, 14, 2]  # round the end, and past what is bad itself
    np.testing.assert_array_equal(replacements.table, expected)
    # The same as if the replacements had been there from the start, so nothing else has changed.
    clean = source.select(expected)
    assert_equal(batches, list(train_batches(clean, SETTINGS, 0, 5)))
    labels = np.concatenate([batch.labels for batch in batches])
    np.testing.assert_array_equal(np.bincount(labels), [PER_CLASS] * CLASSES)


@pytest.mark.slow
def test_skipping_goes_on_after_a_resume_and_on_any_hosts(tmp_path: Path) -> None:
    source = bad_source(tmp_path)
    replacements, found = make_skipping(source)
    whole = list(train_batches(source, SETTINGS, 0, 5, replacements=replacements))
    assert len({bad.step for bad in found}) > 1
    again, found_again = make_skipping(source, [bad for bad in found if bad.step <= 3])
    assert_equal(list(train_batches(source, SETTINGS, 3, 5, Host(threads=1), again)), whole[3:])
    assert sorted(found_again, key=lambda b: b.index) == sorted(found, key=lambda b: b.index)
    unmixed = dataclasses.replace(SETTINGS, mix=MixSettings())
    one = list(train_batches(source, unmixed, 0, 3, replacements=make_skipping(source)[0]))
    half = list(train_batches(source, unmixed, 0, 3, Host(1, 2), make_skipping(source)[0]))
    assert_equal(half, jax.tree.map(lambda x: x[BATCH // 2 :], one))


@pytest.mark.slow
def test_too_many_bad_images_are_refused(tmp_path: Path) -> None:
    source = write_photos(tmp_path, dict.fromkeys(range(0, 33, 3), b""))
    with pytest.raises(UserError, match="More than 10 of the 40 training images cannot be read"):
        list(train_batches(source, SETTINGS, 0, 5, replacements=make_skipping(source)[0]))


def test_a_class_without_any_image_is_refused(tmp_path: Path) -> None:
    source = write_photos(tmp_path, dict.fromkeys(range(1, NUM, CLASSES), b""))
    with pytest.raises(UserError, match=r"No training image of class 1 can be read \(one of"):
        list(train_batches(source, SETTINGS, 0, 5, replacements=make_skipping(source)[0]))


@pytest.mark.slow_cases("fail")
@pytest.mark.parametrize("on_bad_image", ["fail", "skip"])
def test_a_batch_without_a_bad_image_is_not_tried_for_ever(
    tmp_path: Path, monkeypatch, on_bad_image: str
) -> None:
    source = write_photos(tmp_path, {4: b""})
    monkeypatch.setattr(unreadable, "examine", lambda *_: None)
    replacements = make_skipping(source)[0] if on_bad_image == "skip" else None
    with pytest.raises(UserError, match="none of its images is to blame"):
        list(train_batches(source, SETTINGS, 0, 5, replacements=replacements))


@pytest.mark.slow
def test_what_was_replaced_is_recorded(tmp_path: Path) -> None:
    source = bad_source(tmp_path)
    assert bad_images.make_replacements("fail", source, tmp_path, 0) is None
    assert bad_images.count("fail", tmp_path, 5) == {}
    assert bad_images.count("skip", tmp_path, 5) == {"bad_images": 0}
    replacements = bad_images.make_replacements("skip", source, tmp_path, 0)
    list(train_batches(source, SETTINGS, 0, 5, replacements=replacements))
    text = (tmp_path / "bad_images.jsonl").read_text()
    steps = sorted(json.loads(line)["step"] for line in text.splitlines())
    counts = [bad_images.count("fail", tmp_path, step).get("bad_images", 0) for step in range(6)]
    assert counts == [sum(found <= step for found in steps) for step in range(6)]
    first = steps[0]
    assert counts[first] < counts[5] == 4
    # What was found in steps that are made again is found again.
    again = bad_images.make_replacements("skip", source, tmp_path, first)
    assert bad_images.count("skip", tmp_path, 5) == {"bad_images": counts[first]}
    list(train_batches(source, SETTINGS, first, 5, replacements=again))
    assert sorted((tmp_path / "bad_images.jsonl").read_text().splitlines()) == sorted(
        text.splitlines()
    )
    (tmp_path / "bad_images.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="is damaged; remove it"):
        bad_images.count("skip", tmp_path, 5)


@pytest.mark.slow
def test_pipelines_without_damage_examine_nothing(tmp_path: Path, monkeypatch) -> None:
    source = write_photos(tmp_path)
    monkeypatch.setattr(unreadable, "examine", None)
    plain = list(train_batches(source, SETTINGS, 0, 5))
    assert_equal(
        list(train_batches(source, SETTINGS, 0, 5, replacements=make_skipping(source)[0])), plain
    )
    assert pipeline.batch_indices(np.zeros(NUM, int), SETTINGS, 4).shape == (BATCH,)


@pytest.mark.slow
def test_a_partner_of_the_second_sampler_is_replaced_too(tmp_path: Path) -> None:
    cmo = dataclasses.replace(SETTINGS, mix=MixSettings(alpha=1.0, rule="cmo"))
    labels = np.arange(NUM) % CLASSES
    mixer = Mixer(cmo.mix, labels, (SIZE, SIZE, 3), BATCH, cmo.seed, slice(0, BATCH))
    partners = mixer.partners_to_read(tf.constant(0, tf.int64)).numpy()
    bad = int(np.setdiff1d(partners, pipeline.batch_indices(labels, cmo, 0))[0])
    source = write_photos(tmp_path, {bad: b""})
    replacements, found = make_skipping(source)
    (batch,) = train_batches(source, cmo, 0, 1, replacements=replacements)
    assert [image.index for image in found] == [bad]
    np.testing.assert_array_equal(batch.other_labels, labels[partners])
