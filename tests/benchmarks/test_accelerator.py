# SPDX-License-Identifier: Apache-2.0
"""The command for a borrowed accelerator, tried out on a CPU; its figures mean nothing here."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from balpoe_jax.data import datasets
from balpoe_jax.data.datasets import cifar
from balpoe_jax.errors import UserError
from balpoe_jax.reporting.tables import SIZE_COLUMNS
from benchmarks import accelerator, accelerator_tables, packed_data, sides
from benchmarks.sides import Clock, Job, Results
from tests.helpers import ROOT

pytestmark = pytest.mark.integration


# Not on a borrowed machine; as Python's site does it, so that processes it starts lack them, too.
ABSENT = ("tensorflow", "tensorflow_datasets", "google_crc32c", "importlib_resources")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command in an environment that lacks these packages."""
    blocked = folder / "blocked"
    blocked.mkdir()
    lines = [f"sys.modules[{name!r}] = None" for name in ABSENT]
    (blocked / "sitecustomize.py").write_text("\n".join(["import sys", *lines]))
    variables = {**os.environ, "PYTHONPATH": str(blocked), "JAX_PLATFORMS": "cpu"}
    variables.pop("JAX_COMPILATION_CACHE_DIR", None)
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.accelerator", *arguments],
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_toy_run_measures_everything(tmp_path: Path) -> None:
    """All parts write their results, and both tables are written and printed."""
    output = tmp_path / "out"
    process = start(tmp_path, "--toy", "--minutes=30", f"--output={output}")
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    rows = sides.read(output / "results.jsonl")
    assert not [row for row in rows if "error" in row]
    skipped = {(row["part"], row["side"]) for row in rows if "skipped" in row}
    torch = {("steps", "torch"), ("photos", "torch")}
    assert skipped == (set() if importlib.util.find_spec("torch") else torch)
    (device,) = (row for row in rows if row["part"] == "device")
    assert device["platform"] == "cpu" and device["jax"]
    timed = [row for row in rows if "ms_a_step" in row]
    assert {(row["part"], row["side"]) for row in timed} - torch == {
        ("steps", "jax"), ("steps", "conv_fusion"), ("photos", "jax"),
    }  # fmt: skip
    assert {row["dispatch"] for row in timed} == {"ready", "single", "several"}
    assert all(row["ms_a_step"] > 0 and np.isfinite(row["losses"]).all() for row in timed)
    equal = {row["side"]: row["equal"] for row in rows if "equal" in row}
    assert equal == {"deterministic": True}
    trained = {(row["part"], row["row"], row["seed"]): row for row in rows if "top1" in row}
    assert set(trained) == {("table2", "BalPoE", 1), ("seeds", "BalPoE", 2)}
    for row in trained.values():
        assert (output / "runs" / row["workdir"] / "report" / "index.html").exists()
    for name, title in {"benchmarks": "Training step on", "results": "CIFAR-100-LT on"}.items():
        text = (output / f"{name}.md").read_text()
        assert text.startswith(f"## {title} an accelerator") and text in said
        assert "toy run" in text and "cpu" in text
    results = (output / "results.md").read_text()
    assert "| BalPoE | 2 |" in results and "| Mixup | 0 | - |" in results


def test_a_terminated_run_writes_what_it_has(tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start(tmp_path, "--toy", f"--output={output}")
    results = output / "results.jsonl"
    until = time.monotonic() + 120
    while not (results.exists() and results.read_text().count("\n") >= 2):  # the second side runs
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert "Preempted: what was measured is written" in said
    for name in ("benchmarks.md", "results.md"):
        assert (output / name).read_text() in said


@pytest.mark.parametrize("generated", [True, False])
def test_without_complete_data_nothing_is_trained(tmp_path: Path, generated: bool) -> None:
    place = ""
    if generated:
        packed_data.generate(tmp_path / "data" / "cifar100.npz", 10, 2)
        place = str(tmp_path / "data")
    bench = accelerator.Bench(
        tmp_path, minutes=1, data_dir=place, toy=False, rows_to_train=accelerator.TABLE_2
    )
    accelerator.first_seed(bench)
    data, trained = bench.rows
    reason = "cifar100 should have 500 training" if generated else "no --data_dir was given"
    assert reason in data["skipped"]
    assert trained == {"part": "table2", "side": "jax", "skipped": "there are no data"}


@pytest.fixture
def _few_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise is slow to pack."""
    monkeypatch.setattr(packed_data, "HELD_OUT_PER_CLASS", 2)


@pytest.mark.usefixtures("_few_held_out")
def test_packed_images_are_those_that_the_selection_keeps(tmp_path: Path) -> None:
    """To the bit, with labels, order and test set; black is what it leaves out."""
    whole, again = (str(tmp_path / f"{name}.npz") for name in ("whole", "again"))
    packed_data.generate(Path(whole), 12, 1)
    folder = tmp_path / "mosaics"
    size = packed_data.pack(whole, folder, ratio=10.0, verify_counts=False)
    assert size == sum(path.stat().st_size for path in folder.iterdir())
    packed_data.unpack(folder, Path(again))
    one, two = (
        datasets.load("cifar100", 10.0, path, False, 0, packed_data.HELD_OUT_PER_CLASS)
        for path in (whole, again)
    )
    for name in ("train", "test", "held_out"):
        for array in ("images", "labels", "keys"):
            np.testing.assert_array_equal(
                getattr(getattr(one, name), array), getattr(getattr(two, name), array)
            )
    np.testing.assert_array_equal(one.class_counts, two.class_counts)
    train, _ = cifar.load("cifar100", again)
    kept = np.concatenate([two.train.keys, two.held_out.keys])
    assert not np.delete(train.images, kept, axis=0).any() and len(kept) < len(train)


@pytest.mark.usefixtures("_few_held_out")
def test_packed_images_of_another_selection_are_refused(tmp_path: Path) -> None:
    path, folder = tmp_path / "whole.npz", tmp_path / "mosaics"
    packed_data.generate(path, 12, 1)
    packed_data.pack(str(path), folder, ratio=10.0, verify_counts=False)
    with np.load(folder / packed_data.LABELS) as stored:
        labels = dict(stored) | {"ratio": 5.0}
    np.savez(folder / packed_data.LABELS, **labels)
    with pytest.raises(UserError, match="holds other images than the selection keeps"):
        packed_data.unpack(folder, tmp_path / "again.npz")
    (folder / "test0.webp").unlink()
    with pytest.raises(UserError, match="should hold mosaics of CIFAR-100"):
        packed_data.unpack(folder, tmp_path / "again.npz")


def test_nothing_begins_that_cannot_end() -> None:
    """Estimates follow what was measured: here everything takes twice as long."""
    now = 0.0
    clock = Clock(deadline=100.0, now=lambda: now)
    assert clock.fits(100) and not clock.fits(101)
    with clock.learn(10):
        now = 20.0
    assert clock.left == 80 and clock.fits(40) and not clock.fits(41)


def test_what_fails_or_does_not_fit_is_a_result(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results = Results(Job("part", "side", str(path), time.time() + 30))

    def fail() -> dict:
        raise ValueError("of two\nlines")

    results.attempt({"case": 1}, 1, fail)
    results.attempt({"case": 2}, 1, lambda: {"found": float("nan")})
    results.attempt({"case": 3}, 1e9, fail)
    failed, found, late = sides.read(path)
    assert failed["error"] == "ValueError: of two lines"
    assert found == {"part": "part", "side": "side", "case": 2, "found": None}
    assert "left" in late["skipped"]


@pytest.mark.parametrize(
    ("code", "seconds", "error"),
    [
        ("print('so it is'); raise SystemExit(3)", 60, "it ended with exit code 3: so it is"),
        ("import time; time.sleep(100)", 1, "it was ended at its time limit"),
    ],
)
def test_a_side_that_dies_or_hangs_costs_its_part_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, seconds: float, error: str
) -> None:
    (tmp_path / "side.py").write_text(code)
    monkeypatch.setattr(sides, "ROOT", tmp_path)
    path = tmp_path / "results.jsonl"
    begun = time.monotonic()
    sides.run("side", Job("part", "one", str(path), time.time() + seconds), tmp_path / "log")
    assert time.monotonic() - begun < 50
    assert sides.read(path) == [{"part": "part", "side": "one", "error": error}]


def test_flags_that_this_xla_does_not_know_are_not_passed(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    job = Job("part", "one", str(path), time.time() + 60)
    sides.run("no_module", job, tmp_path / "log", ["--xla_gpu_no_such_thing=true"])
    (row,) = sides.read(path)
    assert row["error"] == "this XLA does not know --xla_gpu_no_such_thing=true"
    assert all(map(sides.is_known, (accelerator.CONV_FUSION, *accelerator.DETERMINISTIC)))


def scanned(side: str, ms: float, losses: list[float]) -> dict:
    kind = {"dtype": "float32", "expert_map": "loop", "dispatch": "several"}
    return {"part": "steps", "side": side, **kind, "ms_a_step": ms, "losses": losses}


def test_flags_are_chosen_and_time_is_estimated_by_measurement() -> None:
    plain, losses = scanned("jax", 5.0, [9.0, 8.0, 7.0]), [9.001, 8.0, 7.0]
    assert accelerator.fusion_helps([plain, scanned("conv_fusion", 4.0, losses)])
    assert not accelerator.fusion_helps([plain, scanned("conv_fusion", 4.95, losses)])
    assert not accelerator.fusion_helps([plain, scanned("conv_fusion", 4.0, [9.0, 8.1, 7.0])])
    assert not accelerator.fusion_helps([plain])
    assert accelerator.seed_seconds([plain]) == pytest.approx(40 + 85)
    seed = {"part": "table2", "side": "jax", "top1": 0.5, "seconds": 70.0}
    assert accelerator.seed_seconds([plain, seed]) == 70


def test_tables_say_which_images_they_are_of() -> None:
    known = [*accelerator_tables.results([], accelerator.TABLE_2).splitlines()]
    assert any(line.startswith("| BalPoE | 0 | - |") for line in known)
    for order, sentence in (
        (True, accelerator_tables.BELIEVED),
        (False, accelerator_tables.OTHER_DRAW),
    ):
        data = {"part": "data", "side": "-", "archive_order": order, "generated": False}
        assert sentence in accelerator_tables.results([data], accelerator.TABLE_2)


def test_rows_are_found_by_their_folders() -> None:
    names = ["ablation_swa", "cifar100_lt_ir100_balpoe"]
    assert [row.experiment.name for row in accelerator.find_rows(names)] == names
    assert [row.method for row in accelerator.TABLE_2] == [
        *("BalPoE", "BalPoE, no mixup", "CE", "Mixup", "balanced softmax"),
    ]
    for name, reason in (
        ("ablation_sva", "has a row 'ablation_sva'; did you mean ablation_swa"),
        ("@", "has a row '@'; see --mode=print.$"),
        ("cifar100_lt_ir100_ride_distill", "should be of CIFAR-100-LT and without a teacher"),
        ("imagenet_lt_resnext50_balpoe", "should be of CIFAR-100-LT and without a teacher"),
    ):
        with pytest.raises(UserError, match=reason):
            accelerator.find_rows([name])


@pytest.mark.slow
def test_a_row_that_is_named_is_trained_with_its_fields(tmp_path: Path) -> None:
    """Alone, and shown with its parameters and the accuracy on held-out images."""
    output = tmp_path / "out"
    process = start(tmp_path, "--toy", "--rows=ablation_5_experts", f"--output={output}")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    rows = sides.read(output / "results.jsonl")
    assert {row["part"] for row in rows} == {"device", "data", "seeds"}
    (trained,) = (row for row in rows if "top1" in row)
    assert trained["name"] == "ablation_5_experts" and trained["held_out"] >= 0
    workdir = output / "runs" / trained["workdir"]
    config = json.loads((workdir / "config.json").read_text())["config"]
    assert config["model"]["num_experts"] == 5 and config["model"]["reduce_dimension"]
    size = SIZE_COLUMNS["num_parameters"].show(trained["num_parameters"])
    assert f"| {size} |" in (output / "results.md").read_text()


def test_the_order_of_the_archive_is_recognised() -> None:
    labels = np.zeros(100, np.int64)
    labels[:10] = (19, 29, 0, 11, 1, 86, 90, 28, 23, 31)
    assert packed_data.has_archive_order(labels)
    assert not packed_data.has_archive_order(labels[::-1])


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old").touch()
    process = start(tmp_path, "--toy", f"--output={tmp_path}")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "is not empty; choose another --output" in said
