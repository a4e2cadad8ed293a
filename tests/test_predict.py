# SPDX-License-Identifier: Apache-2.0
"""A trained run predicts files and arrays: its evaluation's numbers, and rows for bad files."""

import csv
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import balpoe_jax
from balpoe_jax import predict
from balpoe_jax.config import from_record, resolve
from balpoe_jax.errors import UserError
from balpoe_jax.evaluation import predictions
from balpoe_jax.evaluation.abstention import find_threshold
from balpoe_jax.evaluation.priors import estimate_prior
from balpoe_jax.experiment.build import build
from balpoe_jax.metrics import softmax
from balpoe_jax.predictor import Predictor
from balpoe_jax.train import train
from tests.helpers import flag_calls
from tests.helpers.config_files import get_config

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("tiny_experts")]

CLASSES = {"ant": 40, "owl": 20, "yak": 3}


def make(root: Path, photographs: bool) -> Path:
    random = np.random.default_rng(0)
    for label, (name, number) in enumerate(CLASSES.items()):
        (root / name).mkdir(parents=True)
        for i in range(number):
            height, width = random.integers(12, 20, 2) if photographs else (8, 8)
            pixels = (random.integers(0, 90, (height, width, 3)) + 60 * label).astype(np.uint8)
            kind = ("jpg", "png", "webp", "bmp")[i % 4] if photographs else "png"
            Image.fromarray(pixels).save(root / name / f"{i}.{kind}")
    return root


@pytest.fixture(scope="module", params=["small images", "photographs"])
def trained(request: pytest.FixtureRequest, tmp_path_factory, tiny_experts) -> tuple[Path, Path]:
    """Folder of the images, and of the run."""
    photographs = request.param == "photographs"
    folder = tmp_path_factory.mktemp("predict")
    images = make(folder / "images", photographs)
    size = ",image_size=8" if photographs else ",backbone=resnet8"
    config = get_config("folder", f"dir={images},batch_size=8,epochs=2,experts=2{size}")
    config.eval.batch_size = 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("balpoe_jax.reporting.report.write_report_of", lambda *given: "no page")
        train(resolve(config), str(folder / "run"))
    return images, folder / "run"


@pytest.fixture
def predictor(trained: tuple[Path, Path]) -> Predictor:
    return balpoe_jax.load(str(trained[1]))


def evaluated(run: Path, images: Path) -> tuple[list[str], predictions.Predictions]:
    """The test images of a run, and what its evaluation predicted."""
    config = json.loads((run / "config.json").read_text())["config"]
    names = build(from_record(config)).data.test.names
    return [str(images / name) for name in names], predictions.load(run / "predictions")


def test_files_get_the_numbers_of_the_evaluation(trained, predictor: Predictor) -> None:
    images, run = trained
    paths, expected = evaluated(run, images)
    found = predictor.predict(paths)
    np.testing.assert_allclose(found.expert_logits, expected.expert_logits, rtol=1e-6, atol=1e-6)
    results = json.loads((run / "results.json").read_text())
    assert predictor.temperature == results["temperature"]["ensemble"]["value"]
    mean = np.asarray(expected.expert_logits, np.float64).mean(axis=0)
    np.testing.assert_allclose(
        found.probabilities, softmax(mean / predictor.temperature), rtol=1e-5, atol=1e-7
    )
    accuracy = np.mean([predictor.classes[i] for i in expected.labels] == np.array(found.names))
    assert accuracy == pytest.approx(results["test"]["top1"])
    assert predictor.classes == tuple(CLASSES) and not found.reasons


def test_bad_files_are_rows_that_say_why(trained, predictor: Predictor, tmp_path: Path) -> None:
    images, _ = trained
    good = sorted(str(path) for path in (images / "ant").iterdir())[:10]
    buffer = io.BytesIO()
    Image.effect_noise((40, 40), 50).convert("RGB").save(buffer, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[:500])
    (tmp_path / "text.jpg").write_text("no image")
    paths = [
        *good[:3], str(tmp_path / "cut.jpg"), *good[3:], str(tmp_path / "text.jpg"),
        str(tmp_path / "none.jpg"),
    ]  # fmt: skip
    found = predictor.predict(paths)
    assert sorted(found.reasons) == [3, 11, 12]
    assert found.reasons[11] == "it is no image of a known format"
    assert found.reasons[12] == "No such file or directory"
    assert np.isnan(found.probabilities[[3, 11, 12]]).all() and found.names[3] == ""
    alone = predictor.predict(good)
    kept = [i for i in range(13) if i not in found.reasons]
    np.testing.assert_allclose(found.probabilities[kept], alone.probabilities, atol=1e-6)


def test_arrays_of_the_networks_size_are_the_files(predictor: Predictor, tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    found = predictor.predict(pixels)
    assert found.probabilities.shape == (5, 3)
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1)
    again = predictor.predict(list(pixels[:2]))
    np.testing.assert_allclose(again.probabilities, found.probabilities[:2], atol=1e-6)
    if predictor._settings.data.image_size is None:
        paths = [tmp_path / f"{i}.png" for i in range(5)]
        for path, image in zip(paths, pixels, strict=True):
            Image.fromarray(image).save(path)
        np.testing.assert_array_equal(predictor.predict(paths).probabilities, found.probabilities)
    assert predictor.predict([]).probabilities.shape == (0, 3)
    with pytest.raises(UserError, match=r"uint8 \[H, W, 3\]; got float64 \(8, 8, 3\)"):
        predictor.predict([pixels[0] / 255])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def call(run: Path | str, *arguments: str, **options: object) -> None:
    given = [f"--{name}={value}" for name, value in {"top": 2, **options}.items()]
    flag_calls.call(predict, f"--workdir={run}", *given, *arguments)


@pytest.mark.slow_cases("photographs")
def test_names_of_files_are_any_bytes(trained, tmp_path: Path) -> None:
    images, run = trained
    path = tmp_path / os.fsdecode(b"\xff\xfe.png")
    shutil.copy(next((images / "ant").glob("*.png")), path)
    for suffix in ("csv", "jsonl"):
        output = tmp_path / f"out.{suffix}"
        call(run, str(path), output=str(output))
        assert b"\xff\xfe.png" in output.read_bytes()


@pytest.mark.slow_cases("photographs-balanced", "photographs-file", "small images-file")
@pytest.mark.parametrize("prior", ["balanced", "train", "file"])
def test_the_command_writes_classes_and_probabilities(
    trained, predictor: Predictor, tmp_path: Path, prior: str
) -> None:
    images, run = trained
    shares = predictor.class_counts / predictor.class_counts.sum()
    if prior == "file":
        shares = np.array([0.2, 0.5, 0.3])
        lines = [f"{name},{share}" for name, share in zip(CLASSES, shares, strict=True)]
        prior = str(tmp_path / "prior.csv")
        Path(prior).write_text("\n".join(["class,probability", *lines]))
    output = tmp_path / "out" / "p.csv"
    call(run, str(images), output=str(output), prior=prior, experts=True)
    found = rows(output)
    paths = sorted(str(path) for path in images.rglob("*.*"))
    assert [row["path"] for row in found] == paths and {row["status"] for row in found} == {"ok"}
    plain = predictor.predict(paths)
    expected = plain.probabilities
    if prior != "balanced":
        expected = softmax(plain.logits / predictor.temperature + np.log(shares))
    for row, values in zip(found, expected, strict=True):
        best, second = np.argsort(-values, kind="stable")[:2]
        assert (row["class_1"], row["class_2"]) == tuple(
            predictor.classes[i] for i in (best, second)
        )
        assert float(row["probability_1"]) == pytest.approx(values[best], abs=2e-6)
    assert {"expert_1", "expert_2_probability"} <= set(found[0])
    call(run, str(images / "yak"), output=str(tmp_path / "p.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and lines[0]["status"] == "ok" and 0 < lines[0]["probability_1"] <= 1


def test_a_prior_in_python_is_that_of_the_command(
    trained, predictor: Predictor, tmp_path: Path
) -> None:
    images, run = trained
    call(run, str(images), output=str(tmp_path / "p.csv"), prior="train")
    paths = [row["path"] for row in rows(tmp_path / "p.csv")]
    found = predictor.predict(paths, predictor.class_counts)
    assert found.names == [row["class_1"] for row in rows(tmp_path / "p.csv")]
    plain = predictor.predict(paths)
    np.testing.assert_array_equal(found.logits, plain.logits)
    odds = found.probabilities / plain.probabilities / predictor.class_counts
    np.testing.assert_allclose(odds, np.repeat(odds[:, :1], len(CLASSES), axis=1), rtol=1e-5)


@pytest.mark.parametrize(
    "prior", [[0.5, 0.5], [1.0, -0.5, 0.5], [0.0, 0.0, 0.0], [np.nan, 1, 1], 1.0]
)
def test_shares_that_are_none(predictor: Predictor, prior) -> None:
    image = np.zeros((40, 40, 3), np.uint8)
    with pytest.raises(UserError, match="A prior has a share for each of the 3 classes"):
        predictor.predict([image], prior)


def test_the_command_is_unsure_where_it_is_not_precise_enough(
    trained, predictor: Predictor, tmp_path: Path, caplog
) -> None:
    images, run = trained
    held_out, labels = predictor.held_out()
    confidence = held_out.probabilities.max(axis=1)
    right = held_out.probabilities.argmax(axis=1) == labels
    expected = find_threshold(confidence, right, 0.5)
    with caplog.at_level("INFO"):
        call(run, str(images), output=str(tmp_path / "p.csv"), abstain=0.5)
    found = rows(tmp_path / "p.csv")
    least = 0.0 if expected is None else expected.confidence
    for row in found:
        named = float(row["probability_1"]) >= round(least, 6)
        assert row["decision"] == (row["class_1"] if named else "unsure")
    said = "No confidence reaches" if expected is None else f"below a confidence of {least:.3f}"
    assert said in caplog.text


@pytest.mark.slow_cases("photographs")
def test_the_prior_is_estimated_from_the_images(
    trained, predictor: Predictor, tmp_path: Path, caplog
) -> None:
    images, run = trained
    with caplog.at_level("INFO"):
        call(run, str(images / "ant"), output=str(tmp_path / "p.csv"), prior="estimate")
    assert "Class distribution estimated from 40 images" in caplog.text
    paths = sorted(str(path) for path in (images / "ant").iterdir())
    plain = predictor.predict(paths)
    prior = estimate_prior(plain.probabilities, concentration=1 + 0.3 * 40 / 3).prior
    expected = softmax(plain.logits / predictor.temperature + np.log(np.asarray(prior) + 1e-9))
    found = [float(row["probability_1"]) for row in rows(tmp_path / "p.csv")]
    np.testing.assert_allclose(found, expected.max(axis=1), atol=2e-6)


def test_images_are_found_by_file_folder_pattern_and_list(tmp_path: Path) -> None:
    for name in ("b/2.jpg", "b/1.PNG", "b/notes.txt", "b/.hidden.jpg", "a.dat"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    listed = io.StringIO("x y.jpg\n\nz.png\r\n")
    found = predict.find_images(
        [str(tmp_path / "a.dat"), str(tmp_path / "b"), f"{tmp_path}/b/*.jpg", "-"], listed
    )
    assert [path.removeprefix(f"{tmp_path}/") for path in found] == [
        "a.dat", "b/1.PNG", "b/2.jpg", "b/2.jpg", "x y.jpg", "z.png",
    ]  # fmt: skip
    with pytest.raises(UserError, match="none names no image"):
        predict.find_images([str(tmp_path / "none")])
    with pytest.raises(UserError, match="Expected images: name files, folders"):
        predict.find_images([])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("class,share\nant,1\n", "with the header class,probability, and cannot be read so"),
        ("class,probability\nant,1\n", "each of the run's 3 classes; 2 are missing and 0 are unk"),
        ("class,probability\nant,1\nowl,1\nyak,1\n", "must not be negative and have a sum of 1"),
    ],
)
def test_priors_that_cannot_be(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "prior.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        predict._read_prior(str(tmp_path / "prior.csv"), tuple(CLASSES))


@pytest.mark.parametrize(
    ("workdir", "options", "message"),
    [
        ("", {}, "Expected the workdir of a trained run"),
        ("run", {"output": "a.xlsx"}, r"must end in \.csv or \.jsonl, or be -; got 'a\.xlsx'"),
        ("run", {"prior": "none.csv"}, r"balanced, train, or a CSV file .* cannot be read so"),
        ("run", {"abstain": 1.5}, r"above 0 and at most 1, got 1\.5"),
    ],
)
def test_flags_that_cannot_be(trained, workdir: str, options: dict, message: str) -> None:
    images, run = trained
    with pytest.raises(UserError, match=message):
        call(run if workdir else "", str(images), **options)


def test_rows_go_to_standard_output(trained, capsys) -> None:
    images, run = trained
    call(run, str(images / "yak"), output="-")
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading == "path,class_1,probability_1,class_2,probability_2,status"
    assert [line.partition(",")[0] for line in lines] == sorted(
        map(str, (images / "yak").iterdir())
    )


def test_a_prior_needs_an_image_that_can_be_read(trained, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="--prior=estimate needs images that can be read"):
        call(trained[1], str(tmp_path / "a.png"), output=tmp_path / "p.csv", prior="estimate")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        balpoe_jax.load(str(tmp_path))
