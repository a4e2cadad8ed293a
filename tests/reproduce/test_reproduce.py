# SPDX-License-Identifier: Apache-2.0
"""Rows of the paper: every one a valid config, planned once, run, resumed and collected."""

import dataclasses
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from balpoe_jax.config import resolve
from balpoe_jax.errors import UserError
from balpoe_jax.methods import PRESETS
from balpoe_jax.reporting.tables import as_csv, as_markdown, as_text
from balpoe_jax.reproduce import __main__ as command
from balpoe_jax.reproduce import jobs as reproduce
from balpoe_jax.reproduce import scores
from balpoe_jax.reproduce.paper import SCALES, TABLES, PaperFigure, PaperRow, PaperRun, PaperTable
from balpoe_jax.reproduce.tables import TABLES as ALL_TABLES
from balpoe_jax.run import record
from tests.helpers import commands
from tests.helpers.config_files import get_config

pytestmark = pytest.mark.integration

EXPERIMENTS = {
    one
    for table in ALL_TABLES.values()
    for row in table.rows
    for one in row.experiment.with_teacher()
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("table", ALL_TABLES)
def test_every_row_is_a_valid_config(table: str, scale: str) -> None:
    runs = {one for row in ALL_TABLES[table].rows for one in row.experiment.with_teacher()}
    for experiment in sorted(runs, key=lambda e: e.name):
        if scale == "cpu" and experiment.config != "cifar100_lt.py":
            with pytest.raises(UserError, match=f"no small version of {experiment.config}"):
                reproduce._arguments(experiment, SCALES[scale])
            continue
        arguments = reproduce._arguments(experiment, SCALES[scale])
        config = get_config(experiment.config.removesuffix(".py"), arguments)
        config.update_from_flattened_dict(dict(experiment.fields_at(SCALES[scale])))
        resolve(config)
        assert config.model.name == "resnet8" or scale == "full", experiment.name
        assert config.total_epochs == 15 or scale == "full", experiment.name


def test_experiments_have_one_name_each() -> None:
    assert len({experiment.name for experiment in EXPERIMENTS}) == len(EXPERIMENTS)
    assert len({(e.config, e.arguments, e.fields) for e in EXPERIMENTS}) == len(EXPERIMENTS)


def test_rows_are_what_their_names_say() -> None:
    configs = {
        row.method: get_config("cifar100_lt", row.experiment.arguments)
        for row in TABLES["2"].rows[:5]
    }
    trained = {
        name: (
            config.model.num_experts,
            *config.loss.taus,
            config.mix.alpha,
        )
        for name, config in configs.items()
    }
    assert trained == {
        "CE": (1, 0, 0, 0), "Mixup": (1, 0, 0, 0.4), "balanced softmax": (1, 1, 1, 0),
        "BalPoE, no mixup": (3, 0, 2, 0), "BalPoE": (3, 0, 2, 0.4),
    }  # fmt: skip


def test_the_papers_tables_are_whole() -> None:
    """As many figures as the paper prints for these data sets, and of ours no other experiments."""
    assert [len(TABLES[name].rows) for name in ("1", "1-photos")] == [21, 19]
    figures = [
        score.paper
        for name in ("2", "3", "3-photos")
        for row in TABLES[name].rows
        for score in row.scores
        if score.paper is not None
    ]
    # Of Table 2 nine rows, two of them without MCE; of Table 3 nine rows of ten figures.
    assert len(figures) == 9 * 3 - 2 + 9 * 10
    known = {row.experiment for name in TABLES if "methods" in name for row in TABLES[name].rows}
    assert {row.experiment for row in TABLES["2"].rows} <= known
    for name in ("3", "3-photos"):
        others = [row.experiment for row in TABLES[name].rows if "BalPoE" not in row.method]
        assert {e for e in others if "softmax" not in e.name and "cross" not in e.name} <= known
    (learnt,) = (row for row in TABLES["3"].rows if row.method == "SADE, weights learnt")
    assert learnt.scores[0].keys == ("aggregation", "forward50", "top1", "used")


def test_rows_of_a_table_have_names_of_their_own() -> None:
    for name, table in TABLES.items():
        names = [row.method for row in table.rows]
        assert len(set(names)) == len(names), name


@pytest.mark.parametrize(("scale", "decay"), [("full", 0.999), ("cpu", 0.99)])
def test_fields_are_part_of_the_command_and_of_the_settings(
    tmp_path: Path, scale: str, decay: float
) -> None:
    jobs = reproduce.plan(ALL_TABLES["ablation"], SCALES[scale], [1], tmp_path)
    (job,) = reproduce.only(jobs, ["ablation_ema"])
    assert f"--config.optim.ema={decay}" in job.command()
    assert "--config.eval.held_out_per_class=50" in job.command()
    settings = job._settings()
    assert (settings.optim.ema, settings.eval.held_out_per_class) == (decay, 50)


def test_both_ablations_have_the_same_parts_and_other_held_out_images(tmp_path: Path) -> None:
    def settings(table: str, name: str) -> dict:
        jobs = reproduce.plan(ALL_TABLES[table], SCALES["cpu"], [1], tmp_path)
        return {job.experiment.name.removeprefix(name): job._settings() for job in jobs}

    unused, alone = settings("ablation", "ablation"), settings("ablation-alone", "ablation_alone")
    assert list(unused) == list(alone) and len(unused) == 9
    for part, found in alone.items():
        assert found.data.held_out_share == 0.2
        data = dataclasses.replace(found.data, held_out_share=0.0)
        held_out = dataclasses.replace(found.eval, held_out_per_class=50)
        assert dataclasses.replace(found, data=data, eval=held_out) == unused[part]


def tiny_table() -> PaperTable:
    one = PaperRun("digits_one", "digits_lt.py", "method=cross_entropy,mixup=false")
    two = PaperRun("digits_two", "digits_lt.py", "experts=2")
    accuracy = PaperFigure("ACC", ("test", "top1"), 90.0, 1.5)
    return PaperTable(
        "A table",
        (
            PaperRow("first", one, (accuracy, PaperFigure("ECE", ("test", "ece")))),
            PaperRow("second", two, (accuracy, PaperFigure("ECE", ("test", "ece"))), "ResNet-99"),
        ),
    )


def pretend(job: reproduce.Job, top1: float, step: int = 6) -> None:
    """Writes the files that a run of this job would leave."""
    job.workdir.mkdir(parents=True)
    record.write_config(job.workdir, job._settings(), {"total_steps": 6}, {})
    scores = {"top1": top1, "many": 0.9, "medium": 0.8, "few": None, "ece": 0.1, "mce": 0.2}
    results = {
        "step": step,
        "epoch": 2,
        "num_parameters": 1_500_000,
        "forward_flops": 21_000_000,
        "class_counts": [4, 2],
        "test": scores,
        "experts": [{"tau": 0.0, **scores}],
    }
    (job.workdir / "results.json").write_text(json.dumps(results))


def test_states_tell_what_is_left(tmp_path: Path) -> None:
    jobs = reproduce.plan(tiny_table(), SCALES["full"], [1, 2], tmp_path)
    assert [(job.experiment.name, job.seed) for job in jobs] == [
        ("digits_one", 1), ("digits_two", 1), ("digits_one", 2), ("digits_two", 2),
    ]  # fmt: skip
    pretend(jobs[0], 0.5)
    pretend(jobs[1], 0.5, step=3)
    assert [job.state() for job in jobs] == ["done", "begun", "to do", "to do"]
    started = []
    reproduce.subprocess, real = _Recorder(started), reproduce.subprocess
    try:
        failed = reproduce.run(jobs)
    finally:
        reproduce.subprocess = real
    assert [command[4] for command in started] == [
        "--config.seed=1", "--config.seed=2", "--config.seed=2",
    ]  # fmt: skip
    assert [job.seed for job in failed] == [1, 2, 2]


class _Recorder:
    """Stands for the module that starts processes; every one of them fails."""

    def __init__(self, started: list) -> None:
        self._started = started

    def run(self, command: list[str]) -> subprocess.CompletedProcess:
        self._started.append(command)
        return subprocess.CompletedProcess(command, 1)


def test_several_at_once_are_counted_with_their_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = reproduce.plan(tiny_table(), SCALES["full"], [1, 2], tmp_path)
    pretend(jobs[0], 0.5)
    monkeypatch.setattr(reproduce.Job, "command", _pretended_command)
    logging.getLogger("balpoe_jax").addHandler(handler := logging.StreamHandler(sys.stdout))
    logging.getLogger("balpoe_jax").setLevel(logging.INFO)
    try:
        failed = reproduce.run(jobs, at_once=2)
        evaluated = reproduce.run(jobs, again=True, at_once=2)
    finally:
        logging.getLogger("balpoe_jax").removeHandler(handler)
    # Whose seed is 2 fails; the one that is done already is not run, but evaluated again.
    assert failed == jobs[2:] and evaluated == []
    shown = capsys.readouterr().out
    assert re.search(r"\[1/3\] done: digits_two, seed 1, \d+ s, top-1 61.5%", shown)
    assert re.search(rf"\[3/3\] failed \(exit code 4\): .*; see {jobs[3].workdir}/term", shown)
    assert re.search(r"\[1/1\] done: digits_one, seed 1, \d+ s, top-1 50.0%", shown)
    assert (jobs[0].workdir / "terminal.log").read_text() == "--mode=eval\n"


def _pretended_command(job: reproduce.Job) -> list[str]:
    """Writes results with seed 1, and fails with another one."""
    result = json.dumps({"step": 6, "test": {"top1": 0.615}})
    script = f"""if True:
        import sys
        from pathlib import Path
        if {job.seed} > 1:
            sys.exit(4)
        print(*sys.argv[1:])
        if "--mode=eval" not in sys.argv:
            (Path({str(job.workdir)!r}) / "results.json").write_text({result!r})
    """
    return ["-c", script]


@pytest.mark.slow
def test_two_real_runs_at_once(tmp_path: Path) -> None:
    settings = "epochs=1,method=cross_entropy,mixup=false"
    one = PaperRun("digits_one", "digits_lt.py", settings)
    table = PaperTable("A table", (PaperRow("one", one, (PaperFigure("ACC", ("test", "top1")),)),))
    jobs = reproduce.plan(table, SCALES["full"], [1, 2], tmp_path)
    assert reproduce.run(jobs, at_once=2) == []
    assert [job.state() for job in jobs] == ["done", "done"]
    (entry,) = scores.collect(table, jobs)
    assert entry.seeds == "1,2" and 0 < entry.ours.mean < 1
    for job in jobs:
        assert "images/s" in (job.workdir / "terminal.log").read_text()


def test_a_teacher_is_trained_before_its_student_and_named(tmp_path: Path) -> None:
    teacher = PaperRun("digits_teacher", "digits_lt.py", "method=ride,experts=4")
    student = PaperRun("digits_student", "digits_lt.py", "method=ride_distill", teacher)
    table = PaperTable(
        "A table", (PaperRow("student", student, (PaperFigure("ACC", ("test", "top1")),)),)
    )
    jobs = reproduce.plan(table, SCALES["full"], [1, 2], tmp_path)
    assert [job.workdir.relative_to(tmp_path).as_posix() for job in jobs] == [
        "digits_teacher/seed1", "digits_student/seed1",
        "digits_teacher/seed2", "digits_student/seed2",
    ]  # fmt: skip
    option = f"--config.method.teacher={tmp_path}/digits_teacher/seed"
    named = [[x for x in job.command() if x.startswith("--config.method")] for job in jobs]
    assert named == [[], [f"{option}1"], [], [f"{option}2"]]
    # As the command sets it, so that a run is known again.
    assert jobs[1]._settings().method.teacher == f"{tmp_path}/digits_teacher/seed1"
    assert reproduce.only(jobs, ["digits_student"]) == jobs
    assert reproduce.only(jobs, ["digits_teacher"]) == jobs[::2]
    pretend(jobs[1], 0.5)
    assert [job.state() for job in jobs[:2]] == ["to do", "done"]
    (entry,) = scores.collect(table, jobs)
    assert entry.ours.mean == 0.5


def test_the_rows_of_ride_have_a_teacher_of_six_experts_on_the_same_data() -> None:
    rows = [e for e in EXPERIMENTS if e.teacher]
    assert len(rows) == 4 and all("method=ride_distill" in e.arguments for e in rows)
    found = {e.name: e.teacher.arguments for e in rows}
    assert found["cifar100_lt_ir100_ride_distill"] == "ir=100,experts=6,method=ride"
    assert found["cifar100_lt_ir100_experts4_ride_distill"] == "ir=100,experts=6,method=ride"
    assert found["imagenet_lt_backboneresnext50_experts4_ride_distill"] == (
        "backbone=resnext50,experts=6,method=ride"
    )


def test_scores_are_collected_over_the_seeds_that_are_done(tmp_path: Path) -> None:
    jobs = reproduce.plan(tiny_table(), SCALES["full"], [1, 2, 3], tmp_path)
    pretend(jobs[0], 0.80)
    pretend(jobs[2], 0.84)
    entries = scores.collect(tiny_table(), jobs)
    first = entries[0]
    assert (first.method, first.score, first.seeds) == ("first", "ACC", "1,2")
    assert first.ours.mean == pytest.approx(0.82)
    assert first.difference == pytest.approx(-0.08)
    text = as_text(scores.result_table("A table", entries))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "ours, seeds 1,2 82.0±2.8 10.0±0.0 1.5M 21M" in lines
    assert "paper, ResNet-32 90.0±1.5 -" in lines
    assert "paper, ResNet-99 90.0±1.5 -" in lines
    assert "ours: not run - -" in lines
    long = as_csv(scores.entries_table("A table", entries, tmp_path)).splitlines()
    assert long[1].endswith('"1,2",digits_one/seed1/train.log digits_one/seed2/train.log')
    assert long[0].endswith(",paper's network,params,FLOPs,seeds,logs")
    assert ",ResNet-32,1500000,21000000," in long[1]
    assert long[3] == "second,ACC,0.9,0.015,,,,ResNet-99,,,not run,"


def test_a_record_of_an_older_version_has_no_operations(tmp_path: Path) -> None:
    job = reproduce.plan(tiny_table(), SCALES["full"], [1], tmp_path)[0]
    pretend(job, 0.8)
    results = json.loads((job.workdir / "results.json").read_text())
    del results["forward_flops"]
    (job.workdir / "results.json").write_text(json.dumps(results))
    entries = scores.collect(tiny_table(), [job])
    assert entries[0].sizes == [1_500_000, None]
    table = scores.result_table("A table", entries)
    assert "|   ours, seeds 1 | 80.0 | 10.0 | 1.5M | - |" in as_markdown(table)
    assert "a multiply-add being two" in as_markdown(table)


def test_the_papers_figures_stand_with_their_networks() -> None:
    rows = {(name, row.method): row.paper_network for name in TABLES for row in TABLES[name].rows}
    assert rows["methods", "BalPoE"] == rows["2", "BalPoE"] == "ResNet-32, 3 experts"
    assert rows["methods", "CE"] == rows["methods", "PaCo"] == "ResNet-32"
    assert rows["fig5", "7 experts"] == "ResNet-32, 7 experts"
    assert rows["3-photos", "SADE, no prior"] == "ResNeXt-50, 3 experts, reduced width"
    assert rows["methods-inaturalist2018", "PaCo"] == "ResNet-50"
    assert rows["methods", PRESETS["los"].about] == "ResNet-34"
    assert rows["methods-cifar100_lt-10", PRESETS["ltwb"].about] == "ResNet-34"


def test_a_folder_of_another_experiment_is_refused(tmp_path: Path) -> None:
    job = reproduce.plan(tiny_table(), SCALES["full"], [1], tmp_path)[0]
    pretend(job, 0.5)
    content = json.loads((job.workdir / "config.json").read_text())
    content["config"]["batch_size"] = 7
    (job.workdir / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="batch_size was 7 and is now"):
        job.state()


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return commands.run("balpoe_jax.reproduce", *arguments)


def test_commands_for_a_cluster_and_a_table_of_what_is_not_run(tmp_path: Path) -> None:
    options = ["--table=2", "--scale=cpu", "--seeds=1,2", f"--workdir={tmp_path}"]
    printed = call(*options, "--mode=print", "--data_dir=/data/tfds")
    assert printed.returncode == 0, printed.stderr
    commands = printed.stdout.splitlines()
    assert len(commands) == 20
    assert commands[0].startswith("python -m balpoe_jax.main --config=")
    assert "cifar100_lt.py:ir=100,method=cross_entropy,mixup=false,backbone=resnet8" in commands[0]
    assert f"--workdir={tmp_path}/cpu/cifar100_lt_ir100_cross_entropy/seed1" in commands[0]
    assert all("--config.data.data_dir=/data/tfds" in command for command in commands)
    assert all("--config.note=scale cpu: ResNet-8" in command for command in commands)
    collected = call(*options, "--mode=collect")
    assert collected.returncode == 0, collected.stderr
    assert "scale cpu: ResNet-8 for 15 epochs" in collected.stdout
    assert collected.stdout.count("ours: not run") == 10
    for suffix in ("md", "csv", "json"):
        assert "ResNet-8 for 15" in (tmp_path / "cpu" / f"table2.{suffix}").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table=9"], "|1|1-photos|2|3|3-photos|fig5|ablation|ablation-alone>"),
        ([], "--table must have a value"),
        (["--table=2", "--jobs=0"], "--jobs=0"),
        (["--table=2", "--seeds=one"], "--seeds must be numbers"),
        (["--table=2", "--seeds=4294967296", "--mode=print"], "--seeds must be below 2**31"),
        (["--table=2", "--only=x", "--mode=print"], "no row 'x'; choose from cifar100_lt_ir100_cr"),
        (["--table=2", "--scale=tiny"], "<full|cpu>"),
        (["--table=1-photos", "--scale=cpu"], "no small version of imagenet_lt.py"),
        (["--table=2", "more"], "Unexpected argument 'more'"),
    ],
)
def test_wrong_arguments_are_one_sentence(tmp_path: Path, arguments, message: str) -> None:
    result = call(*arguments, f"--workdir={tmp_path}")
    assert result.returncode == 2
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr


@pytest.mark.parametrize("score", ["x", [1, 2], True])
def test_a_damaged_score_is_refused(tmp_path: Path, score) -> None:
    job = reproduce.plan(tiny_table(), SCALES["full"], [1], tmp_path)[0]
    pretend(job, score)
    with pytest.raises(UserError, match=r"test\.top1 should be a number or null"):
        scores.collect(tiny_table(), [job])
    assert job.state() == "done"  # so that --mode=eval writes it again


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("resolved", [], "resolved should be an object"),
        ("config", [], "its config is"),
        ("config", "x", "its config is"),
    ],
)
def test_a_damaged_claim_is_refused(tmp_path: Path, key: str, value, message: str) -> None:
    job = reproduce.plan(tiny_table(), SCALES["full"], [1], tmp_path)[0]
    pretend(job, 0.5)
    content = json.loads((job.workdir / "config.json").read_text())
    (job.workdir / "config.json").write_text(json.dumps({**content, key: value}))
    with pytest.raises(UserError, match=message):
        job.state()


def test_a_run_that_does_not_say_how_long_it_is_has_begun(tmp_path: Path) -> None:
    job = reproduce.plan(tiny_table(), SCALES["full"], [1], tmp_path)[0]
    pretend(job, 0.5)
    content = json.loads((job.workdir / "config.json").read_text())
    (job.workdir / "config.json").write_text(json.dumps({**content, "resolved": None}))
    (job.workdir / "results.json").write_text('{"step": null}')
    assert job.state() == "begun"


def test_runs_that_were_evaluated_differently_are_not_averaged(tmp_path: Path) -> None:
    jobs = reproduce.plan(tiny_table(), SCALES["full"], [1, 2], tmp_path)[::2]
    for job, strength in zip(jobs, (0.3, 1.0), strict=True):
        pretend(job, 0.5)
        path = job.workdir / "results.json"
        settings = {"settings": {"prior_strength": strength}}
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(UserError, match=r"eval\.prior_strength 0\.3 and 1\.0"):
        scores.collect(tiny_table(), jobs)


class _Flags:
    """The command's flags, in this process."""

    def __init__(self, workdir: Path, **values) -> None:
        defaults = {
            "table": "2", "scale": "cpu", "seeds": ["1"], "only": [], "mode": "run", "jobs": 1,
            "workdir": str(workdir), "data_dir": "",
        }  # fmt: skip
        self.__dict__.update({**defaults, **values})


def test_a_command_says_which_runs_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    """And collects what there is first; the tables of our own are among those that it knows."""
    ran = []

    def fail_first(jobs, again, at_once):
        ran.append((len(jobs), again, at_once))
        return jobs[:1]

    monkeypatch.setattr(command, "run", fail_first)
    names = ["ablation_swa", "ablation_ema"]
    values = {"table": "ablation", "only": names, "jobs": 2}
    monkeypatch.setattr(command.flags, "FLAGS", _Flags(tmp_path, **values))
    message = (
        r"1 of 2 runs failed: .*ablation_ema/seed1; see the terminal.log there, and start this"
    )
    with caplog.at_level(logging.INFO), pytest.raises(UserError, match=message):
        command.main(["reproduce"])
    assert ran == [(2, False, 2)] and "Written to" in caplog.text
    assert "Parts of BalPoE+" in (tmp_path / "cpu" / "ablation.md").read_text()
    monkeypatch.setattr(command, "run", lambda *given: [])
    monkeypatch.setattr(command.flags, "FLAGS", _Flags(tmp_path, **values, mode="eval"))
    command.main(["reproduce"])
    with pytest.raises(UserError, match="Unexpected argument 'more'"):
        command.main(["reproduce", "more"])


def test_a_command_prints_what_is_to_do(tmp_path: Path, monkeypatch, capsys) -> None:
    flags = _Flags(tmp_path, mode="print", table="ablation-alone", seeds=["1", "2"])
    monkeypatch.setattr(command.flags, "FLAGS", flags)
    command.main(["reproduce"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 18
    assert all("--config.data.held_out_share=0.2" in line for line in printed)
