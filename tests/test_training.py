# SPDX-License-Identifier: Apache-2.0
"""Whole runs, small: resume, refuse, evaluate, record."""

import contextlib
import json
import logging
import os
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from balpoe_jax.config import resolve
from balpoe_jax.errors import Preempted, TransientError, UserError
from balpoe_jax.evaluate import evaluate
from balpoe_jax.experiment import program
from balpoe_jax.experiment.build import build
from balpoe_jax.parallel import Parallel
from balpoe_jax.progress import Progress
from balpoe_jax.reporting import report
from balpoe_jax.run import environment, metric_writer, record
from balpoe_jax.run.checkpoint import Checkpoints
from balpoe_jax.run.lock import WorkdirLock
from balpoe_jax.run.preemption import PreemptionNotice
from balpoe_jax.train import missing_test_row, train
from tests.helpers.digits_runs import STEPS_PER_EPOCH, final_state, interrupt, rows, tiny_config

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("tiny_experts")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """An undisturbed run of six steps."""
    workdir = tmp_path_factory.mktemp("run")
    train(resolve(tiny_config()), str(workdir))
    return workdir


@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(
    finished: Path, tmp_path: Path, epoch: int
) -> None:
    workdir = tmp_path / "run"
    interrupt(finished, workdir, epoch)
    train(resolve(tiny_config()), str(workdir))
    undisturbed, resumed = final_state(tiny_config(), finished), final_state(tiny_config(), workdir)
    assert int(resumed.step) == 6
    jax.tree.map(np.testing.assert_array_equal, resumed, undisturbed)
    assert (workdir / "results.json").read_bytes() == (finished / "results.json").read_bytes()
    timeless = ("loss", "expert_losses", "grad_norm", "learning_rate", "step", "epoch", "test_top1")
    for before, after in zip(rows(finished), rows(workdir), strict=True):
        assert {k: before.get(k) for k in timeless} == {k: after.get(k) for k in timeless}
    first_steps = [start["step"] for start in rows(workdir, "start_up.jsonl")]
    assert first_steps == [1, epoch * STEPS_PER_EPOCH + 1]
    discarded = rows(workdir, "metrics.discarded.jsonl")
    assert [row["step"] for row in discarded] == [*range(epoch * STEPS_PER_EPOCH + 1, 7), 6]


@pytest.mark.slow
@pytest.mark.usefixtures("no_page")
def test_another_run_ends_with_the_same_bits(finished: Path, tmp_path: Path) -> None:
    """Whatever the threads of its input, and however often it looks."""
    config = tiny_config(data__threads=1, log_every_steps=4, checkpoint__every_epochs=2)
    train(resolve(config), str(tmp_path))
    states = [final_state(config, workdir) for workdir in (finished, tmp_path)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    for name in ("results.json", "predictions/expert_logits.npy"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("with_all")
def test_a_quickly_compiled_state_has_the_usual_bits(monkeypatch) -> None:
    quick = jax.device_get(build(resolve(tiny_config())).program.init_state())
    monkeypatch.setattr(program, "_QUICK", None)
    usual = jax.device_get(build(resolve(tiny_config())).program.init_state())
    jax.tree.map(np.testing.assert_array_equal, quick, usual)


def test_the_record_of_a_run(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "results.json", "train.log", "checkpoints"}
    assert (finished / "report" / "index.html").exists()
    assert list((finished / "tensorboard").glob("events.*"))
    recorded = json.loads((finished / "config.json").read_text())
    assert recorded["config"]["model"]["num_experts"] == 3
    assert recorded["resolved"]["taus"] == [0, 1, 2]
    assert recorded["resolved"]["expert_map"] == "loop"
    assert sum(recorded["data"]["class_counts"]) == 413
    assert recorded["data"]["groups"] == {"many": 3, "medium": 3, "few": 4}
    assert recorded["environment"]["versions"]["jax"] == jax.__version__
    assert recorded["environment"]["xla_flags"] == os.environ.get("XLA_FLAGS", "")
    assert recorded["environment"]["runtime"]
    assert recorded["resolved"]["precision"] == "full"
    train_rows = [row for row in rows(finished) if "loss" in row]
    assert [row["step"] for row in train_rows] == [1, 2, 3, 4, 5, 6]
    assert all(0 <= row["data_wait_fraction"] <= 1 for row in train_rows)
    (start_up,) = rows(finished, "start_up.jsonl")
    assert start_up["step"] == 1
    parts = ["devices", "data", "restore", "initialise", "pipeline"]
    assert list(start_up["seconds"]) == [*parts, "first batch", "compile", "first step"]
    assert 0 < sum(start_up["seconds"].values()) <= start_up["total_seconds"]
    log = (finished / "train.log").read_text()
    assert "seconds from start to step 1: devices" in log
    assert "413 training images in 10 classes" in log
    assert "step 6/6" in log


def test_results_have_the_schema_of_the_contract(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert {"step", "epoch", "num_parameters", "class_counts", "test", "experts", "shift"} <= set(
        results
    )
    assert 0 < results["num_parameters"] < results["forward_flops"] < 1e9
    scores = {"top1", "many", "medium", "few", "ece", "mce"}
    assert scores | {"balanced", "nll"} <= set(results["test"])
    assert all(scores | {"tau"} <= set(expert) for expert in results["experts"])
    assert (results["step"], results["epoch"]) == (6, 2)
    assert [expert["tau"] for expert in results["experts"]] == [0, 1, 2]
    assert list(results["shift"]) == [
        "forward50", "forward25", "forward10", "forward5", "forward2", "uniform",
        "backward2", "backward5", "backward10", "backward25", "backward50",
    ]  # fmt: skip
    for accuracies in results["shift"].values():
        assert set(accuracies) == {"none", "prior", "estimated"}
        assert all(0 <= value <= 1 for value in accuracies.values())
    assert results["shift"]["uniform"]["none"] == results["test"]["top1"]


def test_results_follow_from_the_predictions(finished: Path) -> None:
    """A second derivation, from the files alone."""
    results = json.loads((finished / "results.json").read_text())
    logits = np.load(finished / "predictions" / "expert_logits.npy")
    labels = np.load(finished / "predictions" / "labels.npy")
    assert logits.shape == (3, 400, 10)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(np.bincount(labels), [40] * 10)
    correct = logits.astype(np.float64).mean(axis=0).argmax(axis=1) == labels
    assert results["test"]["top1"] == pytest.approx(correct.mean())
    by_class = np.array([correct[labels == c].mean() for c in range(10)])
    counts = np.array(results["class_counts"])
    assert results["test"]["many"] == pytest.approx(by_class[counts > 60].mean())
    assert results["test"]["few"] == pytest.approx(by_class[counts < 20].mean())
    for expert, expert_logits in zip(results["experts"], logits, strict=True):
        accuracy = (expert_logits.argmax(axis=1) == labels).mean()
        assert expert["top1"] == pytest.approx(accuracy)


def test_evaluation_does_not_depend_on_the_batch_size(finished: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    before = json.loads((finished / "results.json").read_text())
    after = evaluate(resolve(tiny_config(eval__batch_size=50, note="again")), str(workdir))
    assert after["note"] == "again"
    assert after["settings"] == before["settings"] == {
        "num_bins": 15, "held_out_per_class": 20, "shift_lists": None, "prior_strength": 0.3,
        "shift_test_level": 0.01, "expert_weights_epochs": 0, "expert_weights_rate": 0.1,
    }  # fmt: skip
    assert "; again</p>" in (workdir / "report" / "index.html").read_text()
    for name, value in before["test"].items():
        assert after["test"][name] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("name", ["predictions", "report", "results.json", "train.log"])
def test_what_is_in_the_way_of_an_evaluation_is_named(
    finished: Path, tmp_path: Path, name: str
) -> None:
    """A file where a folder is to be, or the other way round."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    path = workdir / name
    if path.is_dir():
        shutil.rmtree(path)
        path.touch()
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(UserError, match=rf"run/{name} cannot be written \("):
        evaluate(resolve(tiny_config()), str(workdir))
    assert not list(workdir.glob(".*"))


@pytest.mark.usefixtures("no_page")
def test_evaluation_leaves_checkpoints_alone(finished: Path, tmp_path: Path) -> None:
    """A training may be writing one at that moment, and keeps as many as its config says."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
    before = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    evaluate(resolve(tiny_config(checkpoint__keep=1)), str(workdir))
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == before


@pytest.mark.usefixtures("no_page")
def test_a_finished_run_is_only_evaluated_again(finished: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    train(resolve(tiny_config()), str(workdir))
    assert rows(workdir) == rows(finished)
    assert rows(workdir, "start_up.jsonl") == rows(finished, "start_up.jsonl")
    assert not (workdir / "metrics.discarded.jsonl").exists()


@pytest.mark.usefixtures("no_page")
def test_a_run_that_stopped_in_its_last_evaluation_gets_its_row(
    finished: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert "test_top1" in lines[-1]
    (workdir / "metrics.jsonl").write_text("".join(lines[:-1]))
    train(resolve(tiny_config()), str(workdir))
    assert rows(workdir) == rows(finished)


@pytest.mark.usefixtures("no_page")
def test_a_run_that_stopped_in_an_evaluation_on_its_way_makes_it_up(
    finished: Path, tmp_path: Path
) -> None:
    workdir, other = tmp_path / "run", tmp_path / "other"
    for copy in (workdir, other):
        interrupt(finished, copy, epoch=1)
    config = tiny_config(eval__every_epochs=1)
    experiment = build(resolve(config))
    assert [s for s in range(7) if missing_test_row(experiment, workdir, s)] == [3]
    train(resolve(config), str(workdir))
    found = rows(workdir)
    assert [row["step"] for row in found] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert found[3]["test_top1"] == evaluate(resolve(config), str(other))["test"]["top1"]
    jax.tree.map(
        np.testing.assert_array_equal, final_state(config, workdir), final_state(config, finished)
    )
    assert not any(missing_test_row(experiment, workdir, step) for step in range(7))


def test_checkpoints_of_nobody_are_not_adopted(finished: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds checkpoints but no config\.json"):
        train(resolve(tiny_config(seed=5)), str(workdir))


def test_what_is_refused_leaves_the_workdir_free(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mix\.groups must divide the batch size 140"):
        train(resolve(tiny_config(mix__groups=3)), str(tmp_path))
    assert not (tmp_path / "config.json").exists()


def test_another_config_is_refused_with_the_fields(finished: Path) -> None:
    for start in (train, evaluate):
        with pytest.raises(UserError, match=r"mix.alpha was 0.4 and is now 0.2; seed was 1"):
            start(resolve(tiny_config(mix__alpha=0.2, seed=5)), str(finished))


@pytest.mark.usefixtures("no_page")
def test_reading_more_often_is_the_same_run(finished: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    evaluate(resolve(tiny_config(log_every_steps=7, data__threads=1)), str(workdir))


def test_a_run_of_before_a_field_existed_goes_on_with_its_default(
    finished: Path, tmp_path: Path
) -> None:
    content = json.loads((finished / "config.json").read_text())
    for section, field in (("optim", "accumulation_steps"), ("model", "dtype"), ("model", "remat")):
        del content["config"][section][field]
    del content["config"]["profile"], content["config"]["compilation_cache_dir"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    record.check_same_config(tmp_path, resolve(tiny_config()))
    record.check_same_config(
        tmp_path, resolve(tiny_config(profile__steps=(1, 2), model__remat=True))
    )
    with pytest.raises(UserError, match=r"optim\.accumulation_steps was 1 and is now 2"):
        record.check_same_config(tmp_path, resolve(tiny_config(optim__accumulation_steps=2)))


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> tuple[Path, list[int]]:
    """A run of one expert in bfloat16 and two microbatches, traced; compilations by step."""
    workdir = tmp_path_factory.mktemp("traced")
    compilations, by_step = [], []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(duration)

    def add(progress: Progress, before: int, step: int, metrics: object) -> None:
        by_step.append(len(compilations))
        collect(progress, before, step, metrics)

    collect = Progress.add
    config = tiny_config(
        batch_size=136,
        model__num_experts=1,
        model__dtype="bfloat16",
        optim__accumulation_steps=2,
        profile__steps=(2, 3),
        checkpoint__every_epochs=2,
    )
    jax.monitoring.register_event_duration_secs_listener(listen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "add", add)
        patch.setattr(report, "write_report_of", lambda *given: "no page")
        train(resolve(config), str(workdir))
    jax.monitoring.unregister_event_duration_listener(listen)
    return workdir, by_step


def test_nothing_is_compiled_after_the_first_step(traced: tuple[Path, list[int]]) -> None:
    first, *others = traced[1]
    assert first > 0
    assert len(others) > 4
    assert set(others) == {first}


def test_chosen_steps_are_traced(traced: tuple[Path, list[int]], finished: Path) -> None:
    (trace,) = (traced[0] / "profile").rglob("*.xplane.pb")
    content = trace.read_bytes()
    assert trace.stat().st_size > 1000
    assert content.count(b"step_num") >= 1
    assert not (finished / "profile").exists()


def test_the_state_stays_in_single_precision(traced: tuple[Path, list[int]]) -> None:
    config = tiny_config(batch_size=136, model__num_experts=1, model__dtype="bfloat16")
    state = final_state(config, traced[0])
    floats = {x.dtype for x in jax.tree.leaves(state) if x.dtype != np.int32}
    assert floats == {np.dtype(np.float32)}
    assert all(np.isfinite(row["loss"]) for row in rows(traced[0]) if "loss" in row)


def test_transfers_that_nobody_asked_for_end_the_run(monkeypatch, tmp_path: Path) -> None:
    placed = Parallel.shard
    calls: list[None] = []

    def shard(parallel: Parallel, batch: dict, axis: int) -> dict:
        calls.append(None)
        on_devices = placed(parallel, batch, axis)
        if len(calls) < 3:
            return on_devices
        # From the third batch on it stays on the host, where this test may fetch it to.
        with jax.transfer_guard_device_to_host("allow"):
            return jax.tree.map(np.asarray, on_devices)

    monkeypatch.setattr(Parallel, "shard", shard)
    config = tiny_config(model__num_experts=1)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(resolve(config), str(tmp_path))


@pytest.fixture(scope="module")
def diverged(tmp_path_factory) -> Path:
    """A run whose loss is soon not finite, of taus with the mean 0.5."""
    workdir = tmp_path_factory.mktemp("diverged")
    with pytest.raises(UserError, match=r"not finite at step [4-9] \(learning rate"):
        train(resolve(diverging_config()), str(workdir))
    return workdir


def diverging_config():
    return tiny_config(
        total_epochs=4,
        note="not the paper's setting",
        log_every_steps=5,
        loss__taus=(0.0, 1.0),
        optim__warmup_epochs=0,
        optim__decay_epochs=(1,),
        optim__decay_factor=1e20,  # after the first epoch, and its checkpoint
    )


def test_a_loss_that_is_not_finite_leaves_no_such_checkpoint(diverged: Path) -> None:
    experiment = build(resolve(diverging_config()))
    with Checkpoints(str(diverged / "checkpoints")) as checkpoints:
        state = checkpoints.restore_latest(experiment.program.abstract_state())
    assert int(state.step) == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    assert all(np.isfinite(row["loss"]) for row in rows(diverged))


def test_taus_without_mean_one_are_announced(diverged: Path, finished: Path) -> None:
    sentence = (
        "The mean tau is 0.5, not 1: on a balanced test set the ensemble leans to frequent classes"
    )
    assert sentence in (diverged / "train.log").read_text()
    assert "mean tau" not in (finished / "train.log").read_text()


def test_a_note_is_announced_as_training_starts(diverged: Path, finished: Path) -> None:
    assert "Note: not the paper's setting" in (diverged / "train.log").read_text()
    assert "Note" not in (finished / "train.log").read_text()


def test_a_checkpoint_of_another_shape_is_refused(finished: Path) -> None:
    other = build(resolve(tiny_config(model__num_experts=2)))
    message = (
        r"another model.*/mean \(3, \d+\) instead of \(2, \d+\).* and \d+ more; use the config"
    )
    with (
        Checkpoints(str(finished / "checkpoints")) as checkpoints,
        pytest.raises(UserError, match=message),
    ):
        checkpoints.restore_latest(other.program.abstract_state())


@pytest.mark.usefixtures("no_page")
def test_a_damaged_checkpoint_is_passed_over_and_left_alone(
    finished: Path, tmp_path: Path, caplog
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    checkpoints = workdir / "checkpoints"
    before = sorted(path.name for path in checkpoints.iterdir())
    for path in (checkpoints / "6").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:100])
    assert evaluate(resolve(tiny_config()), str(workdir))["step"] == 3
    assert "The checkpoint of step 6 is damaged" in caplog.text
    assert "Taking the checkpoint of step 3 instead" in caplog.text
    assert sorted(path.name for path in checkpoints.iterdir()) == before


def test_the_commit_is_never_that_of_another_repository(monkeypatch, tmp_path: Path) -> None:
    """A package that is installed inside somebody's repository is not tracked by it."""
    package = tmp_path / "site-packages" / "balpoe_jax"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(environment.balpoe_jax, "__file__", str(package / "__init__.py"))
    assert environment._git_commit() is None


def test_workdirs_are_local_and_may_begin_at_home(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert record.open_workdir("~/runs/a") == tmp_path / "runs" / "a"
    with pytest.raises(UserError, match="local folder so far, got 'gs://bucket/run'"):
        train(resolve(tiny_config()), "gs://bucket/run")


def test_a_workdir_without_checkpoint_is_refused(finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "config.json", tmp_path)
    with pytest.raises(UserError, match="no checkpoint in"):
        evaluate(resolve(tiny_config()), str(tmp_path))


class NoticeAt(PreemptionNotice):
    """As if a signal came between the two times that it is asked."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number, self._asked = number, 0

    def requested(self) -> bool:
        self._asked += 1
        return self._asked >= self._number


def test_a_preemption_in_a_test_saves_the_step_and_gives_the_test_up(
    finished: Path, tmp_path: Path
) -> None:
    """Also where no checkpoint was due."""
    config = tiny_config(eval__every_epochs=1, checkpoint__every_epochs=2, eval__batch_size=100)
    workdir = tmp_path / "run"
    with pytest.raises(Preempted, match=r"^step 3 is saved"):
        train(
            resolve(config), str(workdir), notice=NoticeAt(3 + 2)
        )  # three steps, and the second batch
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["3"]
    assert [row["step"] for row in rows(workdir)] == [1, 2, 3]
    assert not list(workdir.glob("predictions/*"))
    assert not (workdir / "run.lock").exists()


def test_a_second_run_in_a_workdir_is_refused(finished: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    with WorkdirLock(workdir), pytest.raises(UserError, match="in use by another run"):
        train(resolve(tiny_config()), str(workdir))
    assert rows(workdir) == rows(finished)


def test_a_workdir_that_vanishes_ends_the_run(tmp_path: Path, monkeypatch) -> None:
    def collect(progress: Progress, wait: bool) -> list[dict]:
        made = rows_of(progress, wait)
        if any(row["step"] == 2 for row in made):
            (tmp_path / "run").rename(tmp_path / "elsewhere")
        return made

    rows_of = Progress.rows
    monkeypatch.setattr(Progress, "rows", collect)
    with pytest.raises(TransientError, match=r"run vanished, or its run\.lock was deleted"):
        train(resolve(tiny_config(model__num_experts=1)), str(tmp_path / "run"))
    assert [row["step"] for row in rows(tmp_path / "elsewhere")] == [1]


def test_rows_that_cannot_be_written_are_an_error_and_log_lines_are_not(
    tmp_path: Path, capsys
) -> None:
    (tmp_path / "train.log").symlink_to("/dev/full")
    with metric_writer.log_to_file(tmp_path):
        logging.getLogger("balpoe_jax").info("a line")
        with metric_writer.MetricWriter(tmp_path, 0) as writer, Path("/dev/full").open("a") as full:
            writer._file.close()
            writer._file = full
            with pytest.raises(
                TransientError, match=r"metrics\.jsonl cannot be written \(No space"
            ):
                writer.write({"step": 1, "loss": 0.5})
            with contextlib.suppress(OSError):  # of what is still in its buffer
                full.close()
    assert "Traceback" not in capsys.readouterr().err
