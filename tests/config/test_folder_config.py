# SPDX-License-Identifier: Apache-2.0
"""Defaults for images of one's own: by size and number, each with a reason, and all can be set."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from balpoe_jax.config import folder_defaults, resolve
from balpoe_jax.errors import UserError
from balpoe_jax.methods import PRESETS
from tests.helpers.config_files import get_config

SMALL = folder_defaults.ImageSet(np.array([500, 200, 80, 30, 10]), 32, 32)
PHOTOS = folder_defaults.ImageSet(np.array([50, 20, 9]), 130, None)


def make(root: Path, side: int, per_class: tuple[int, ...] = (8, 6)) -> Path:
    for label, number in enumerate(per_class):
        (root / f"class{label}").mkdir(parents=True)
        for i in range(number):
            Image.new("RGB", (side, side), (i, label, 0)).save(root / f"class{label}" / f"{i}.png")
    return root


def test_small_images_are_trained_as_cifar_is(tmp_path: Path) -> None:
    config = get_config("folder", f"dir={make(tmp_path / 'small', 16)}")
    settings = resolve(config)
    assert settings.data.name == "folder" and settings.data.image_size is None
    assert settings.model.name == "resnet32" and settings.augment.crop_padding == 2
    assert (settings.data.test_share, settings.data.held_out_share) == (0.2, 0.1)
    assert "16 x 16 pixels are cropped with a margin" in settings.data.chosen
    assert "batch_size=8" in settings.data.chosen and "epochs=200" in settings.data.chosen
    assert settings.eval.shift_ratios == ()


def test_photographs_are_trained_as_imagenet_is(tmp_path: Path) -> None:
    settings = resolve(get_config("folder", f"dir={make(tmp_path / 'photos', 130)}"))
    assert settings.data.image_size == 128 and settings.model.name == "resnet50"
    assert "image_size=128" in settings.data.chosen and "130 pixels" in settings.data.chosen
    given = resolve(get_config("folder", f"dir={tmp_path / 'photos'},image_size=48,batch_size=4"))
    assert (given.data.image_size, given.batch_size) == (48, 4)
    assert "image_size" not in given.data.chosen and "batch_size" not in given.data.chosen


def test_what_is_given_takes_the_place_of_defaults(tmp_path: Path) -> None:
    make(tmp_path / "small", 16)
    arguments = "method=ride,experts=2,backbone=resnet8,epochs=7,test_share=0.3,held_out_share=0"
    settings = resolve(get_config("folder", f"dir={tmp_path / 'small'},{arguments}"))
    assert settings.model.num_experts == 2 and settings.model.name == "resnet8"
    assert settings.total_epochs == 7 and "epochs=" not in settings.data.chosen
    assert (settings.data.test_share, settings.data.held_out_share) == (0.3, 0)


@pytest.mark.integration
@pytest.mark.parametrize("method", [name for name, p in PRESETS.items() if not p.teacher])
@pytest.mark.parametrize("side", [16, 70])
def test_every_method_trains_as_long_as_is_said(tmp_path: Path, method: str, side: int) -> None:
    settings = resolve(get_config("folder", f"dir={make(tmp_path / 'a', side)},method={method}"))
    assert f"epochs={settings.total_epochs}," in settings.data.chosen
    assert f"batch_size={settings.batch_size}," in settings.data.chosen


@pytest.mark.parametrize(
    ("counts", "thresholds"),
    [
        ([500, 60, 5], (20, 100)),
        ([30, 20, 10, 5, 4, 3], (5, 13)),
        ([50, 49, 48], (20, 100)),
        ([1, 1, 1], (20, 100)),
        ([4, 2, 1, 1], (1, 2)),
    ],
)
def test_thresholds_divide_the_classes(counts: list[int], thresholds: tuple[int, int]) -> None:
    assert folder_defaults._thresholds(np.array(counts)) == thresholds


@pytest.mark.parametrize(
    ("number", "full", "expected"),
    [(10**6, 128, 128), (2560, 128, 128), (2559, 128, 64), (9, 64, 8)],
)
def test_an_epoch_has_twenty_steps_if_it_can(number: int, full: int, expected: int) -> None:
    assert folder_defaults._batch_size(number, full) == expected


def test_lists_and_names_of_classes(tmp_path: Path) -> None:
    make(tmp_path / "small", 16)
    rows = [f"class{c}/{i}.png {c}" for c, n in enumerate((8, 6)) for i in range(n)]
    (tmp_path / "all.txt").write_text("\n".join(rows))
    (tmp_path / "names.txt").write_text("ant\nowl\n")
    where = f"list={tmp_path}/all.txt,dir={tmp_path}/small,classes={tmp_path}/names.txt"
    settings = resolve(get_config("folder", where))
    assert settings.data.lists == f"{tmp_path}/all.txt"
    assert settings.data.class_names == f"{tmp_path}/names.txt"
    where = f"list={tmp_path}/all.txt,test_list={tmp_path}/all2.txt,dir={tmp_path}/small"
    (tmp_path / "all2.txt").write_text("class0/0.png 0\n")
    (tmp_path / "all.txt").write_text("\n".join(rows[1:]))
    settings = resolve(get_config("folder", where))
    assert settings.data.lists == f"train={tmp_path}/all.txt;test={tmp_path}/all2.txt"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "needs images: dir=FOLDER of class folders, list=FILE"),
        ("dir={}/none", "none cannot be read"),
        ("val_list=a.txt,dir={}", "lists of val and test images need one of training images"),
        ("dir={},test_share=0.95", "test_share must be from 0 to 0.9, got 0.95"),
        ("dir={},held_out_share=-1", "held_out_share must be from 0 to 0.9"),
        ("tfds=cifar10,list=a.txt", "argument list belongs to image files; leave out it or tfds"),
    ],
)
def test_arguments_that_cannot_be(tmp_path: Path, arguments: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_config("folder", arguments.format(tmp_path))
