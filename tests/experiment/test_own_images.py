# SPDX-License-Identifier: Apache-2.0
"""Whole runs on image files: recorded with class names, resumed bit for bit, and guarded."""

import base64
import io
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from balpoe_jax.config import resolve
from balpoe_jax.errors import UserError
from balpoe_jax.evaluate import evaluate
from balpoe_jax.evaluation import pictures
from balpoe_jax.experiment.build import build, describe_data
from balpoe_jax.train import train
from tests.helpers.config_files import get_config
from tests.helpers.digits_runs import final_state

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("tiny_experts", "no_page")]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of one colour and noise: 60, 30 and 3 of three classes."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for label, (name, number) in enumerate({"ant": 60, "owl": 30, "yak": 3}.items()):
        (root / name).mkdir()
        for i in range(number):
            pixels = random.integers(0, 64, (8, 8, 3)) + 64 * label
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


def config_of(images: Path, **fields):
    config = get_config("folder", f"dir={images},batch_size=8,epochs=2,experts=2,backbone=resnet8")
    config.log_every_steps = 1
    config.checkpoint.every_epochs, config.checkpoint.keep = 1, 10
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return config


@pytest.mark.slow_cases("device")
@pytest.mark.parametrize("pipeline", ["host", "device"])
def test_a_run_is_recorded_and_resumed_bit_for_bit(
    images: Path, tmp_path: Path, pipeline: str
) -> None:
    config = config_of(images, data__pipeline=pipeline)
    finished, resumed = tmp_path / "finished", tmp_path / "resumed"
    results = train(resolve(config), str(finished))
    recorded = json.loads((finished / "config.json").read_text())["data"]
    assert recorded["class_names"] == ["ant", "owl", "yak"] and len(recorded["digest"]) == 32
    assert results["held_out"]["num_examples"] > 0 and results["shift"] == {}
    shutil.copytree(finished, resumed)
    first, last = sorted(int(path.name) for path in (resumed / "checkpoints").glob("[0-9]*"))
    shutil.rmtree(resumed / "checkpoints" / str(last))
    (resumed / "results.json").unlink()
    assert train(resolve(config), str(resumed)) == results and first < last
    states = [final_state(config, folder) for folder in (finished, resumed)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert evaluate(resolve(config), str(finished))["test"] == results["test"]


def test_a_list_may_move(images: Path, tmp_path: Path) -> None:
    """What is in it is compared, not where it is."""
    files = sorted(images.glob("*/*.png"))
    rows = [f"{path.relative_to(images)},{path.parent.name}" for path in files]
    paths = [tmp_path / "first.csv", tmp_path / "second.csv"]
    configs = []
    for path in paths:
        path.write_text("\n".join(["path,label", *rows, ""]))
        options = "batch_size=8,epochs=1,experts=1,backbone=resnet8"
        configs.append(get_config("folder", f"dir={images},list={path},{options}"))
    results = train(resolve(configs[0]), str(tmp_path / "run"))
    assert evaluate(resolve(configs[1]), str(tmp_path / "run"))["test"] == results["test"]
    paths[1].write_text("\n".join(["path,label", *rows[:-9], ""]))
    with pytest.raises(UserError, match="those that are there"):
        train(resolve(configs[1]), str(tmp_path / "run"))


def test_steps_are_compiled_ahead_for_the_images_that_are_there(images: Path) -> None:
    settings = resolve(config_of(images))
    counts, shape = describe_data(settings)
    data = build(settings).data
    np.testing.assert_array_equal(counts, data.class_counts)
    assert shape == data.train.image_shape == (8, 8, 3) and counts.sum() == len(data.train)


def test_a_run_does_not_go_on_with_other_images(images: Path, tmp_path: Path) -> None:
    config = config_of(images)
    train(resolve(config), str(tmp_path / "run"))
    path = images / "ant" / "new.png"
    Image.new("RGB", (8, 8), (1, 2, 3)).save(path)
    try:
        with pytest.raises(UserError, match="training images of 3 classes, and those that are th"):
            train(resolve(config), str(tmp_path / "run"))
    finally:
        path.unlink()


def test_the_pictures_of_the_page_are_test_files_with_the_labels_of_the_list(
    images: Path, tmp_path: Path
) -> None:
    files = sorted(images.glob("*/*.png"))
    rows = [f"{path.relative_to(images)},{path.parent.name}" for path in files]
    (images / "all.csv").write_text("\n".join(["path,label", *rows, ""]))
    config = get_config(
        "folder", f"list={images / 'all.csv'},batch_size=8,epochs=1,experts=1,backbone=resnet8"
    )
    train(resolve(config), str(tmp_path / "run"))
    shown = pictures.load(tmp_path / "run" / "predictions", 3)
    names = json.loads((tmp_path / "run" / "config.json").read_text())["data"]["class_names"]
    tested = set(build(resolve(config)).data.test.names)
    labels = dict(row.split(",") for row in rows)
    assert len(shown) >= 16 and {picture.name for picture in shown} <= tested
    for picture in shown:
        assert names[picture.label] == labels[picture.name]
        content = base64.b64decode(picture.uri.partition(",")[2])
        np.testing.assert_array_equal(
            np.asarray(Image.open(io.BytesIO(content))),
            np.asarray(Image.open(images / picture.name)),
        )
