# SPDX-License-Identifier: Apache-2.0
"""Data sets of image files: divided, checked, opened; what is wrong is told before training."""

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from balpoe_jax.data.datasets import file_checks
from balpoe_jax.data.datasets.image_files import Place, histogram, load_files, parse_lists
from balpoe_jax.data.records import photographs
from balpoe_jax.data.records.sources import FileSource, SmallSource
from balpoe_jax.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def image(seed: int, height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def make(root: Path, sizes: dict[str, int], side: int = 0) -> Path:
    """PNG files of random size, or of one side, in class folders."""
    seed = 0
    for label, size in sizes.items():
        (root / label).mkdir(parents=True)
        for number in range(size):
            height, width = (side, side) if side else (20 + seed % 7, 24 + seed % 5)
            image(seed, height, width).save(root / label / f"{number}.png")
            seed += 1
    return root


def test_a_folder_becomes_a_long_tailed_set(tmp_path: Path, caplog) -> None:
    root = make(tmp_path / "photos", {"ant": 60, "owl": 30, "yak": 3})
    with caplog.at_level(logging.INFO, logger="balpoe_jax"):
        data = load_files(Place(str(root)), image_size=16, resize=18)
    assert data.class_names == ("ant", "owl", "yak")
    sources = (data.train, data.test, data.held_out)
    assert all(type(source) is FileSource and source.encoded for source in sources)
    assert sum(len(source) for source in sources) == 93
    np.testing.assert_array_equal(data.class_counts, np.bincount(data.train.labels))
    assert data.class_counts[2] == 3 and 2 not in data.test.labels
    assert set(data.test_names) == set(data.test.names)
    for source in sources:
        for name, label in zip(source.names, source.labels, strict=True):
            assert name.startswith(data.class_names[label] + "/")
        assert photographs.pixels(source.read_image(0)).shape[2] == 3
    text = "\n".join(caplog.messages)
    assert "Trained on whole" in text and "yak (3)" in text
    assert "Training images by class" in text and "20% of the images, by a hash" in text
    assert f"fitted on {len(data.held_out)} held-out images, which is few" in text


def test_small_images_of_one_size_are_read_as_pixels(tmp_path: Path) -> None:
    root = make(tmp_path / "photos", {"ant": 20, "owl": 20}, side=8)
    data = load_files(Place(str(root)))
    assert type(data.train) is SmallSource and not data.train.encoded
    assert data.train.image_shape == (8, 8, 3)
    loaded = data.train.load()
    np.testing.assert_array_equal(loaded.labels, data.train.labels)
    for i in range(len(loaded)):
        np.testing.assert_array_equal(loaded.images[i], data.train.read_pixels(i))
    with pytest.raises(UserError, match="image_size must be set, since the images are 70 x 70"):
        load_files(Place(str(make(tmp_path / "large", {"ant": 20, "owl": 20}, side=70))))


def test_an_image_that_has_another_size_by_now_is_no_small_image(tmp_path: Path) -> None:
    root = make(tmp_path / "photos", {"ant": 20, "owl": 20}, side=8)
    data = load_files(Place(str(root)))
    image(0, 8, 9).save(data.train.file(3))
    with pytest.raises(photographs.BadFile, match="it is 9 x 8 pixels, and the others are 8 x 8"):
        data.train.read_pixels(3)
    with pytest.raises(UserError, match=r"cannot be read \(it is 9 x 8 pixels"):
        data.train.load()


def test_files_are_opened_once_and_again_when_they_change(tmp_path: Path, monkeypatch) -> None:
    root = make(tmp_path / "photos", {"ant": 20, "owl": 20})
    opened = []

    def count(content: bytes) -> photographs.Header:
        opened.append(len(content))
        return read(content)

    read = photographs.read_header
    monkeypatch.setattr(photographs, "read_header", count)
    place = Place(str(root))
    first = load_files(place, 16, 18)
    assert len(opened) == 40
    again = load_files(place, 16, 18)
    assert len(opened) == 40
    np.testing.assert_array_equal(again.train.names, first.train.names)
    image(99, 30, 31).save(root / "ant" / "0.png")
    image(98, 30, 31).save(root / "ant" / "new.png")
    load_files(place, 16, 18)
    assert len(opened) == 42
    # A list on the same folder adds to what is known.
    names = [f"{name}/{i}.png {name}\n" for name in ("ant", "owl") for i in range(20)]
    (tmp_path / "all.txt").write_text("".join(names))
    load_files(Place(str(root), {"": str(tmp_path / "all.txt")}), 16, 18)
    load_files(place, 16, 18)
    assert len(opened) == 42
    # What was found is kept, although a bad file ends the start.
    image(97, 30, 31).save(root / "ant" / "newer.png")
    (root / "ant" / "bad.png").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(UserError, match="1 of the 43 images"):
            load_files(place, 16, 18)
    (root / "ant" / "bad.png").unlink()
    load_files(place, 16, 18)
    assert sorted(opened[42:]) == [0, 0, (root / "ant" / "newer.png").stat().st_size]
    opened.clear()
    (cached,) = (tmp_path / "cache" / "balpoe_jax").iterdir()
    cached.write_bytes(b"damaged")
    load_files(place, 16, 18)
    assert len(opened) == 42


def test_files_that_are_no_images_are_named_with_their_reasons(tmp_path: Path) -> None:
    root = make(tmp_path / "photos", {"ant": 20, "owl": 20})
    (root / "ant" / "1.png").write_bytes(b"")
    (root / "ant" / "2.png").write_text("a page that says 404")
    for number in (5, 6, 7):
        (root / "owl" / f"{number}.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError) as error:
        load_files(Place(str(root)), 16, 18)
    assert "5 of the 40 images of" in str(error.value) and "and 2 more" in str(error.value)
    assert "ant/1.png (the file is empty)" in str(error.value)
    assert "ant/2.png (it is no image of a known format)" in str(error.value)


def test_an_image_in_two_splits_is_refused_unless_told_otherwise(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for split in ("train", "test"):
        make(root / split, {"ant": 10, "owl": 10})
    shutil.copy(root / "train/ant/3.png", root / "test/owl/copy.png")
    for label in ("ant", "owl"):  # others differ
        for number in range(10):
            image(1000 + number, 21, 22).save(root / "test" / label / f"{number}.png")
    message = r"1 are in two: train/ant/3.png \(train\) and test/owl/copy.png \(test\); remove one"
    with pytest.raises(UserError, match=message):
        load_files(Place(str(root), held_out_share=0.0), 16, 18)
    data = load_files(Place(str(root), held_out_share=0.0), 16, 18, refuses_shared=False)
    assert len(data.test) == 21 and data.held_out is None


def test_copies_are_left_out_where_names_divide_the_images(tmp_path: Path, caplog) -> None:
    """No copy of a test image is trained on or held out, whatever its name."""
    root = make(tmp_path / "photos", {"ant": 60, "owl": 60})
    place = Place(str(root))
    before = load_files(place, 16, 18)
    for number in range(60):
        shutil.copy(root / "ant" / f"{number}.png", root / "ant" / f"copy{number}.png")
    with caplog.at_level(logging.INFO, logger="balpoe_jax"):
        data = load_files(place, 16, 18)
    assert "Left out, since they are copies" in caplog.text
    contents = [
        {Path(source.file(i)).read_bytes() for i in range(len(source))}
        for source in (data.train, data.test, data.held_out)
    ]
    assert not contents[0] & contents[1] and not contents[2] & (contents[0] | contents[1])
    assert set(before.test.names) <= set(data.test.names)


def test_a_class_that_is_only_tested_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    make(root / "train", {"ant": 10})
    make(root / "test", {"ant": 5, "owl": 5})
    with pytest.raises(UserError, match="1 of 2 have none: owl; add some, or remove"):
        load_files(Place(str(root)), 16, 18)


def test_paths_that_are_not_there_are_counted_and_named(tmp_path: Path) -> None:
    make(tmp_path / "photos", {"ant": 10, "owl": 10})
    rows = [f"{label}/{i}.png {label}" for label in ("ant", "owl") for i in range(12)]
    path = tmp_path / "list.txt"
    path.write_text("\n".join(rows))
    place = Place(str(tmp_path / "photos"), {"": str(path)})
    message = r"4 of the 24 images of .*list.txt are not below .*photos: ant/10.png, .* and 1 more"
    with pytest.raises(UserError, match=message):
        load_files(place, 16, 18)


def test_images_of_one_class_are_refused(tmp_path: Path) -> None:
    root = make(tmp_path / "photos", {"ant": 30})
    with pytest.raises(UserError, match=r"should have images of two classes or more, .* of 'ant'"):
        load_files(Place(str(root)), 16, 18)


def test_too_few_images_for_a_test_are_refused(tmp_path: Path) -> None:
    root = make(tmp_path / "photos", {"ant": 4, "owl": 3})
    with pytest.raises(UserError, match="7 images, and none of them is left for a test"):
        load_files(Place(str(root)), 16, 18)


def test_storage_that_fails_is_no_bad_image(tmp_path: Path, monkeypatch) -> None:
    root = make(tmp_path / "photos", {"ant": 10, "owl": 10})

    def fail(path, *arguments, **options):
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(file_checks, "open", fail, raising=False)
    with pytest.raises(UserError, match=r"cannot be read \(Input/output error\); start again"):
        load_files(Place(str(root)), 16, 18)


def test_a_histogram_shows_the_largest_and_the_smallest_class() -> None:
    counts = np.array([3, 400, *range(100, 130)])
    text = histogram(counts, [f"class {i}" for i in range(32)])
    lines = text.splitlines()
    assert len(lines) == 13 and "12 of 32 classes" in lines[0]
    assert "400 " + "#" * 40 in lines[1] and lines[-1].endswith(" 3 #")
    assert len(histogram(np.array([2, 1]), ["a", "b"]).splitlines()) == 3


def test_lists_by_split() -> None:
    assert parse_lists("") == {} and parse_lists("b.csv") == {"": "b.csv"}
    assert parse_lists("train=a;test=b") == {"train": "a", "test": "b"}
    for text in ("dev=a", "train=a;train=b", "train="):
        with pytest.raises(UserError, match="must be FILE or train=FILE"):
            parse_lists(text)
