# SPDX-License-Identifier: Apache-2.0
"""Any image set that TFDS has prepared: opened, divided, and read as files of one's own are."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from balpoe_jax.config import resolve
from balpoe_jax.data.datasets import tfds_sets
from balpoe_jax.data.records import photographs
from balpoe_jax.data.records.sources import RecordSource, SmallSource
from balpoe_jax.errors import UserError
from tests.helpers.config_files import get_config
from tests.helpers.small_photos import jpeg, prepare

pytestmark = pytest.mark.integration

TRAIN = np.array([30, 12, 6] + [5] * 997)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet-LT's classes with few images each."""
    folder = tmp_path_factory.mktemp("photos")
    test = (np.arange(1000) < 3) * 2
    prepare("imagenet_lt", folder, {"train": TRAIN, "validation": test, "test": test})
    return folder


@pytest.fixture(scope="module", params=["tfrecord", "array_record"])
def small(request: pytest.FixtureRequest, tmp_path_factory) -> Path:
    """CIFAR-10's classes with a few images each, and no test split."""
    folder = tmp_path_factory.mktemp(request.param)
    builder = tfds.builder("cifar10", data_dir=str(folder), file_format=request.param)

    def examples() -> Iterator[tuple[str, dict]]:
        random = np.random.default_rng(0)
        for i in range(300):
            image = random.integers(0, 256, (32, 32, 3)).astype(np.uint8)
            yield f"train_{i}", {"id": f"train_{i}", "image": image, "label": i % 10}

    builder._split_generators = lambda manager: {"train": examples()}
    builder.download_and_prepare()
    return folder


def test_photographs_keep_their_splits_and_names(photos: Path) -> None:
    data = tfds_sets.load_set("imagenet_lt", str(photos), 16, 18, held_out_share=0.0)
    assert isinstance(data.train, RecordSource) and data.train.image_shape == (16, 16, 3)
    np.testing.assert_array_equal(data.class_counts, TRAIN)
    assert len(data.test) == 6 == len(data.held_out)
    assert {name.partition("_")[0] for name in data.test.names} == {"test"}
    assert {name.partition("_")[0] for name in data.held_out.names} == {"validation"}
    assert len(data.class_names) == 1000 and data.class_names[0] == "n01440764"
    assert data.train.read_image(0) in {jpeg(i) for i in range(1600)}


def test_small_images_are_divided_by_their_names(small: Path) -> None:
    data = tfds_sets.load_set("cifar10", str(small))
    sources = (data.train, data.test, data.held_out)
    assert all(isinstance(source, SmallSource) for source in sources)
    assert sum(map(len, sources)) == 300 and len(set.union(*(set(s.names) for s in sources))) == 300
    assert data.class_names == tuple(map(str, range(10)))  # without the downloaded names
    again = tfds_sets.load_set("cifar10", str(small))
    np.testing.assert_array_equal(again.test.names, data.test.names)
    pixels = data.train.read_pixels(3)
    np.testing.assert_array_equal(pixels, photographs.pixels(data.train.read_image(3)))
    assert pixels.shape == (32, 32, 3)
    windows = tfds_sets.load_set("cifar10", str(small), 24, 27)
    assert isinstance(windows.train, RecordSource) and windows.train.image_size == 24


def test_configs_choose_by_what_is_there(photos: Path, small: Path) -> None:
    settings = resolve(get_config("folder", f"tfds=imagenet_lt,dir={photos}"))
    assert settings.data.name == "tfds:imagenet_lt" and settings.data.image_size == 64
    assert settings.data.data_dir == str(photos)
    settings = resolve(get_config("folder", f"tfds=cifar10,dir={small}"))
    assert settings.data.image_size is None and settings.model.name == "resnet32"
    assert settings.augment.crop_padding == 4


def test_what_cannot_be_used_is_one_sentence(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(UserError, match="The data set cifar10 is not in"):
        tfds_sets.open_set("cifar10", str(tmp_path))
    with pytest.raises(UserError, match="image_size must be set, since imagenet_lt has no small"):
        tfds_sets.load_set("imagenet_lt", str(photos))


def test_examples_without_names_are_numbered() -> None:
    names = np.array(["", "", "a"])
    assert tfds_sets._names(names, ["train", "train", "test"]) == ("train/0", "train/1", "test/2")
    assert tfds_sets._names(np.array(["a", "b", "a"]), ["train", "train", "test"]) == (
        "train/a", "train/b", "test/a",
    )  # fmt: skip
