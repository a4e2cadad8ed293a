# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run at the smallest size; what they measure is nobody's to test."""

import importlib.util
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from balpoe_jax.data import pipeline
from balpoe_jax.errors import UserError
from benchmarks import measuring, method_steps, tf_pipeline
from benchmarks.measuring import Sample
from tests.helpers import ROOT

pytestmark = pytest.mark.integration


needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed"
)


def command(name: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_compared(found: dict) -> None:
    numbers = [*found["ours"].values(), *found["theirs"].values(), *found["ratio_range"]]
    assert all(math.isfinite(x) and x > 0 for x in [*numbers, found["ratio"], found["cpu_ratio"]])


@pytest.mark.slow
def test_input_pipeline(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    small = ("--batch_size=8", "--image_size=32", "--repeats=1", "--seconds=0")
    cases = ("cifar standard", "photos standard")
    result = command(
        "input_pipeline", f"--cases={','.join(cases)}", f"--output={output}", "--profile", *small
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(output.read_text())
    assert tuple(found["cases"]) == cases
    for case in found["cases"].values():
        assert_compared(case)
    names = [name for name, _ in found["profile"]["photos standard"]]
    assert names == [
        "read", "draw windows", "decode", "resize", "jitter", "normalise", "other", "all",
        "normalise and mix (not compared)",
    ]  # fmt: skip
    for text in ("64 generated photographs", "1,024 generated images", "ratio/cpu", *cases):
        assert text in result.stdout


@pytest.mark.slow
def test_file_reader(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    small = ("--batch_size=8", "--image_size=32", "--repeats=1", "--seconds=0")
    result = command("file_reader", f"--output={output}", *small)
    assert result.returncode == 0, result.stderr
    found = json.loads(output.read_text())
    assert list(found["kinds"]) == ["jpeg", "turned jpeg", "webp"]
    for kind in found["kinds"].values():
        assert_compared(kind)
    assert "64 generated photographs" in result.stdout and "rec./cpu" in result.stdout


def test_unknown_cases_are_refused() -> None:
    result = command("input_pipeline", "--cases=mnist")
    assert result.returncode == 2
    assert result.stderr.startswith("Error: Unknown case 'mnist'; choose from cifar standard")


@needs_torch
def test_train_step(tmp_path: Path) -> None:
    """The command itself refuses losses or numbers of parameters that differ."""
    output = tmp_path / "found.json"
    options = ("--backbone=resnet8", "--batch_size=4", "--cores=1", "--repeats=1", "--seconds=0")
    result = command("train_step", f"--output={output}", *options)
    assert result.returncode == 0, result.stderr
    found = json.loads(output.read_text())
    assert_compared(found)
    for ours, theirs in found["losses"]:
        assert abs(ours - theirs) < 1e-4 * theirs
    assert "JAX/PyTorch" in result.stdout


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="PyTorch is installed")
def test_without_pytorch_one_sentence_says_what_to_install() -> None:
    result = command("train_step")
    assert result.returncode == 2
    assert "PyTorch, which is not installed" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.slow_cases("photos long", "cifar long")
@pytest.mark.parametrize("name", ["cifar standard", "cifar long", "photos long"])
def test_both_sides_make_the_same_distribution_of_images(name: str, tmp_path: Path) -> None:
    """Mean, spread and roughness of many random images, on which every transform has a say."""
    case = tf_pipeline.make_case(name, "", tmp_path, batch_size=64, image_size=48)
    examples = case.pil_examples()
    images, steps = np.zeros((1024, *case.source.image_shape), np.float32), 16
    for number, image in enumerate(images):
        case.transform(examples[number % len(examples)], random.Random(number), image)
    batches = pipeline.train_batches(case.source, case.settings, 0, steps)
    ours = np.concatenate([batch.images for batch in batches])
    for statistic in (np.mean, np.std, lambda x: np.abs(np.diff(x, axis=2)).mean()):
        a, b = ([statistic(image[None]) for image in side] for side in (ours, images))
        error = math.hypot(np.std(a), np.std(b)) / math.sqrt(len(images))
        assert abs(np.mean(a) - np.mean(b)) < 4 * error


def test_ratios_are_taken_within_rounds() -> None:
    """A machine that slows down between rounds changes no ratio."""
    ours = [Sample(20, 1.0, 0.5), Sample(20, 10.0, 0.5), Sample(20, 2.0, 0.5)]
    theirs = [Sample(10, 1.0, 1.0), Sample(10, 10.0, 1.0), Sample(30, 2.0, 1.0)]
    found = measuring.compare(ours, theirs, cores=2)
    assert found["ratio"] == 2 and found["ratio_range"] == (20 / 30, 2)
    assert found["ours"] == {"per_second": 5, "per_cpu_second": 40}
    assert found["cpu_ratio"] == 4


def test_turns_alternate() -> None:
    order: list[str] = []

    def side(name: str):
        def measure() -> Sample:
            order.append(name)
            return Sample(1, 1.0, 1.0)

        return measure

    samples = measuring.take_turns({"a": side("a"), "b": side("b")}, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [len(values) for values in samples.values()] == [3, 3]


def test_more_cores_than_there_are_are_refused() -> None:
    with pytest.raises(UserError, match=r"--cores must be 1 to \d+, got 100000"):
        measuring.pin(100_000)


@pytest.mark.slow
def test_method_steps() -> None:
    """Also of one that has a teacher, and of one with arguments."""
    methods = ["cross_entropy", "ride_distill", "ride:experts=2"]
    found = dict(method_steps.run(methods, "resnet8", 4, repeats=1, seconds=0))
    assert list(found) == methods
    for figures in found.values():
        assert_compared(figures)
    assert found["cross_entropy"]["num_parameters"] == 81040
