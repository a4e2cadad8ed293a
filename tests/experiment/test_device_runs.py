# SPDX-License-Identifier: Apache-2.0
"""Whole runs whose batches are made on the devices: dispatched, resumed, evaluated."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from balpoe_jax.config import resolve
from balpoe_jax.errors import Preempted, UserError
from balpoe_jax.evaluate import evaluate
from balpoe_jax.experiment import inputs
from balpoe_jax.experiment.build import build
from balpoe_jax.run.checkpoint import Checkpoints
from balpoe_jax.run.preemption import PreemptionNotice
from balpoe_jax.train import _dispatches, train
from tests.helpers import ROOT
from tests.helpers.config_files import get_config
from tests.helpers.xla_flags import flags_of_xla, quick_flags

# Its bits are those of programs as users compile them.
pytestmark = [
    pytest.mark.integration,
    pytest.mark.optimised,
    pytest.mark.usefixtures("tiny_experts", "no_page"),
]


def config_of(steps: int | None = 3, pipeline: str | None = "device", **changes):
    """Digits: 413 images, three steps an epoch, three epochs."""
    config = get_config("digits_lt")
    config.batch_size, config.total_epochs = 140, 3
    config.log_every_steps = 1
    config.checkpoint.update(every_epochs=1, keep=10)
    config.eval.every_epochs = 0
    config.data.pipeline, config.data.steps_per_dispatch = pipeline, steps
    config.update_from_flattened_dict({name.replace("__", "."): v for name, v in changes.items()})
    return config


def rows(workdir: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def final_state(workdir: Path):
    with Checkpoints(str(workdir / "checkpoints"), read_only=True) as checkpoints:
        return checkpoints.restore_latest(build(resolve(config_of())).program.abstract_state())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """An undisturbed run, an epoch a dispatch."""
    workdir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("balpoe_jax.reporting.report.write_report_of", lambda *given: "no page")
        train(resolve(config_of()), str(workdir))
    return workdir


def test_a_row_a_dispatch_is_written_and_the_pipeline_recorded(finished: Path) -> None:
    assert [row["step"] for row in rows(finished) if "loss" in row] == [3, 6, 9]
    resolved = json.loads((finished / "config.json").read_text())["resolved"]
    assert (resolved["pipeline"], resolved["steps_per_dispatch"]) == ("device", 3)
    (start,) = rows(finished, "start_up.jsonl")
    assert start["step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 100])
def test_where_dispatches_are_cut_changes_no_bit(
    finished: Path, tmp_path: Path, steps: int
) -> None:
    """Two steps, or the one to the end of an epoch; or as many as there are to a checkpoint."""
    train(resolve(config_of(steps)), str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path), final_state(finished))
    ends = [2, 3, 4, 6, 8, 9] if steps == 2 else [3, 6, 9]
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == ends


@pytest.mark.slow
def test_single_steps_round_otherwise_at_most(finished: Path, tmp_path: Path) -> None:
    train(resolve(config_of(steps=None)), str(tmp_path))  # which is 1 on a CPU
    singly = [row["loss"] for row in rows(tmp_path) if "loss" in row]
    together = [row["loss"] for row in rows(finished) if "loss" in row]
    assert len(singly) == 9
    np.testing.assert_allclose(np.mean(np.reshape(singly, (3, 3)), axis=1), together, rtol=1e-4)


def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(
    finished: Path, tmp_path: Path
) -> None:
    """It goes on in the pipeline that it began in, though the config leaves it open."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    for step in (6, 9):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    train(resolve(config_of(pipeline=None)), str(workdir))
    jax.tree.map(np.testing.assert_array_equal, final_state(workdir), final_state(finished))
    assert (workdir / "results.json").read_bytes() == (finished / "results.json").read_bytes()


@pytest.mark.slow
def test_a_signal_ends_the_run_after_the_dispatch(
    finished: Path, tmp_path: Path, monkeypatch
) -> None:
    notice = PreemptionNotice()
    monkeypatch.setattr(notice, "requested", lambda: True)
    with pytest.raises(Preempted, match="step 2 is saved"):
        train(resolve(config_of(steps=2)), str(tmp_path), notice=notice)
    train(resolve(config_of(steps=2)), str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path), final_state(finished))


def test_a_step_that_is_not_finite_is_named_within_its_dispatch(tmp_path: Path) -> None:
    config = config_of(steps=3, optim__learning_rate=1e12, optim__warmup_epochs=0)
    with pytest.raises(UserError, match=r"is not finite at step [2-6] \(learning rate") as raised:
        train(resolve(config), str(tmp_path))
    (row,) = rows(tmp_path, "non_finite.jsonl")
    assert f"step {row['step']} " in str(raised.value)
    experiment = build(resolve(config))
    np.testing.assert_array_equal(row["indices"], experiment.batch_indices(row["step"]))


@pytest.mark.slow
def test_both_pipelines_evaluate_alike(finished: Path, tmp_path: Path) -> None:
    on_device = evaluate(resolve(config_of()), str(shutil.copytree(finished, tmp_path / "device")))
    on_host = evaluate(
        resolve(config_of(None, "host")), str(shutil.copytree(finished, tmp_path / "host"))
    )
    assert on_device["test"] == pytest.approx(on_host["test"], rel=1e-4, abs=1e-5)
    logits = [
        np.load(tmp_path / where / "predictions" / f"{part}expert_logits.npy")
        for where in ("device", "host")
        for part in ("", "held_out_")
    ]
    for ours, theirs in zip(logits[:2], logits[2:], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_random_views_do_not_depend_on_the_batch_size() -> None:
    def views(batch_size: int) -> np.ndarray:
        experiment = build(resolve(config_of(eval__batch_size=batch_size)))

        def pixels(variables, batch):
            gather = partial(jax.lax.all_gather, axis_name="devices", tiled=True, to="invarying")
            return jax.tree.map(gather, batch)

        step = experiment.inputs.map_eval_step(pixels)
        test = experiment.data.test
        batches = experiment.inputs.predict(test, experiment.program.eval_batch_size, view=1)
        out = [jax.device_get(step({}, batch, test)) for batch in batches]
        return np.concatenate([one.images[one.mask] for one in out])

    small, large = views(100), views(256)
    assert len(small) == 400
    np.testing.assert_array_equal(small, large)


def test_dispatches_end_where_something_is_to_be_done() -> None:
    config = config_of(steps=4, eval__every_epochs=2, checkpoint__every_epochs=3)
    experiment = build(resolve(config))
    (plan,) = experiment.program.phases
    assert list(_dispatches(experiment, plan, 0)) == [(0, 4), (4, 6), (6, 8), (8, 9)]
    assert list(_dispatches(experiment, plan, 5)) == [(5, 6), (6, 8), (8, 9)]
    traced = build(resolve(config_of(steps=100, profile__steps=(2, 2), checkpoint__every_epochs=3)))
    assert list(_dispatches(traced, plan, 0)) == [(0, 1), (1, 2), (2, 9)]


def test_a_run_does_not_change_its_pipeline(finished: Path) -> None:
    with pytest.raises(UserError, match="makes its batches on the device, and the host would"):
        train(resolve(config_of(None, "host")), str(finished))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline": "gpu"}, "data.pipeline must be one of host, device, or None; got 'gpu'"),
        ({"pipeline": "host", "steps": 3}, "steps_per_dispatch=3 needs the device pipeline"),
        ({"steps": 0}, "steps_per_dispatch must be from 1 to 10000"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(resolve(config_of(**changes)))


def test_photographs_are_not_for_device_memory() -> None:
    photos = type("Photos", (), {"train": object(), "test": object(), "held_out": None})()
    parallel = build(resolve(config_of())).program.parallel
    with pytest.raises(UserError, match="photographs that are read from files; set it to host"):
        inputs.choose_pipeline("device", photos, parallel)
    assert inputs.choose_pipeline(None, photos, parallel) == "host"


@pytest.mark.parametrize(
    ("platform", "tensorflow", "limit", "expected"),
    [
        ("cpu", True, None, "host"),
        ("cpu", False, None, "device"),
        ("gpu", True, 2**30, "device"),
        ("gpu", True, 2**18, "host"),
        ("tpu", False, None, "device"),
    ],
)
def test_the_default_follows_platform_memory_and_what_is_installed(
    monkeypatch, platform: str, tensorflow: bool, limit: int | None, expected: str
) -> None:
    device = type("Device", (), {"platform": platform, "memory_stats": lambda self: stats})()
    stats = limit and {"bytes_limit": limit}
    mesh = type("Mesh", (), {"devices": np.array([device])})()
    parallel = type("Parallel", (), {"mesh": mesh})()
    monkeypatch.setattr(inputs.extras, "has_tensorflow", lambda: tensorflow)
    data = build(resolve(config_of())).data
    assert inputs.choose_pipeline(None, data, parallel) == expected


BLOCKED = ("tensorflow", "tensorflow_datasets", "google_crc32c", "importlib_resources")


def test_digits_are_trained_and_evaluated_without_tensorflow(tmp_path: Path, request) -> None:
    """In a process of its own that cannot import it; with `--all` the config's own network."""
    tiny = (
        ""
        if request.config.getoption("--all")
        else """
from tests.helpers import tiny_network
from balpoe_jax.experiment import build
build.create_model = tiny_network.create_model
"""
    )
    code = f"""
import sys
for name in {BLOCKED}:
    sys.modules[name] = None
{tiny}
import runpy
sys.argv = ["main", *{["--config=configs/digits_lt.py:experts=1", "--config.total_epochs=1"]},
            "--workdir={tmp_path}/run"]
runpy.run_module("balpoe_jax.main", run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **flags_of_xla(quick_flags(request.config))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ensemble" in done.stdout
    resolved = json.loads((tmp_path / "run" / "config.json").read_text())["resolved"]
    assert resolved["pipeline"] == "device"
    assert (tmp_path / "run" / "report" / "index.html").exists()
