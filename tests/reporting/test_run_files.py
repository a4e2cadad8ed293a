# SPDX-License-Identifier: Apache-2.0
"""Files of runs as they may be found: whole, older, by the contract alone, damaged."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from balpoe_jax.errors import UserError
from balpoe_jax.reporting.comparison import compare, write
from balpoe_jax.reporting.report import result_text, write_report
from balpoe_jax.reporting.runs import find_runs, group_runs
from balpoe_jax.reporting.schema import load_config, load_results
from tests.helpers import FIXTURES, ROOT
from tests.helpers.fake_runs import make_run

FINISHED = FIXTURES / "runs" / "finished"
COMMITTED = sorted((ROOT / "results").rglob("results.json"))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("run") / "seed1"
    make_run(workdir, seed=1)
    return workdir


def write_changed(run: Path, workdir: Path, name: str, keys: str, value: Any) -> None:
    """A copy of a run's two files, changed at a dotted path; `...` removes what is there."""
    workdir.mkdir()
    for file in ("results.json", "config.json"):
        content = json.loads((run / file).read_text())
        if file == name:
            *path, last = [int(key) if key.isdecimal() else key for key in keys.split(".")]
            node = content
            for key in path:
                node = node[key]
            if value is ...:
                del node[last]
            else:
                node[last] = copy.deepcopy(value)
        (workdir / file).write_text(json.dumps(content))


def test_what_an_evaluation_writes_is_valid(run: Path) -> None:
    assert load_results(run) == json.loads((run / "results.json").read_text())
    recorded = load_config(run)
    assert recorded is not None
    assert recorded.config == json.loads((run / "config.json").read_text())["config"]


def test_a_record_tells_what_it_holds(tmp_path: Path) -> None:
    content = json.loads((FINISHED / "config.json").read_text())
    content["config"]["mixup"]["rule"] = "remix"
    content["config"]["method"]["name"] = "ride"
    (tmp_path / "config.json").write_text(json.dumps(content))
    recorded = load_config(tmp_path)
    assert recorded is not None
    told = dataclasses.asdict(recorded)
    assert told.pop("config").keys() >= {"data", "mix", "compilation_cache_dir"}
    assert told.pop("versions") == content["environment"]["versions"]
    assert told.pop("command") == tuple(content["environment"]["command"])
    assert told == {
        "class_names": (),
        "seed": 1,
        "total_epochs": 2,
        "batch_size": 32,
        "dataset": "digits",
        "imbalance_ratio": 26.0,
        "shot_thresholds": (20, 60),
        "counts_as_published": True,
        "model": "resnet8",
        "num_experts": 3,
        "method": "ride",
        "mix_rule": "remix",
        "mix_alpha": 0.4,
        "learning_rate": 0.1,
        "schedule": "step",
        "weight_decay": 5e-4,
        "total_steps": 26,
        "device_count": 1,
        "device_kind": "cpu",
        "started": "2026-11-28T04:14:03+00:00",
        "git_commit": "4eb25ba9fb5bf7b773ae900f1a30f515c5e9a52d",
    }


def test_a_record_without_what_came_later_is_read(tmp_path: Path) -> None:
    content = json.loads((FINISHED / "config.json").read_text())
    for name in ("resolved", "data", "environment"):
        del content[name]
    del content["config"]["method"], content["config"]["mixup"]["rule"]
    del content["config"]["data"]["shot_thresholds"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    recorded = load_config(tmp_path)
    assert recorded is not None
    assert (recorded.method, recorded.mix_rule) == ("balpoe", "mixup")
    assert recorded.shot_thresholds == (20, 100)
    assert (recorded.total_steps, recorded.counts_as_published) == (None, False)
    assert (recorded.device_kind, recorded.versions, recorded.command) == (None, {}, ())


def test_files_that_are_not_there_are_none(tmp_path: Path) -> None:
    assert load_results(tmp_path) is None
    assert load_config(tmp_path) is None


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: "-".join(path.parts[-3:-1]))
def test_committed_results_stay_readable(path: Path) -> None:
    results = load_results(path.parent)
    assert results is not None
    assert f"{100 * results['test']['top1']:.1f}" in result_text(results)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ("experts", ..., "experts is missing"),
        ("experts", [], "experts is empty"),
        ("test", ..., "test is missing"),
        ("test", [0.5], r"test should be an object, not \[0\.5\]"),
        ("test.few", ..., r"test\.few is missing"),
        ("test.top1", "high", r"test\.top1 should be a number or null, not 'high'"),
        ("test.top1", [0.1, 0.2], r"test\.top1 should be a number or null"),
        ("step", 1.5, r"step should be a whole number, not 1\.5"),
        ("class_counts", [], "class_counts is empty"),
        ("shift.uniform.prior", "x", r"shift\.uniform\.prior should be"),
        ("shift.uniform", ..., "shift and shift_sets are not of the same"),
        ("shift_sets.uniform.estimates.map.l1", ..., r"estimates\.map\.l1 is missing"),
        ("bias.experts", [], r"bias\.experts is not of 3 experts"),
        ("temperature.experts.2", ..., r"temperature\.experts is not of 3 experts"),
        ("group_confusion.0", ..., "group_confusion is not 3 x 3"),
        ("ensemble.disagreement.2", ..., r"ensemble\.disagreement is not 3 x 3"),
    ],
)
def test_damaged_results_are_one_sentence(run, tmp_path, keys: str, value, message: str) -> None:
    write_changed(run, tmp_path / "bad", "results.json", keys, value)
    with pytest.raises(UserError, match=message):
        write_report(str(tmp_path / "bad"))
    with pytest.raises(UserError, match=message):
        find_runs([str(tmp_path / "bad")])


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ("config", "x", "config should be an object, not 'x'"),
        ("config", ..., "config is missing"),
        ("config.data", ..., r"config\.data is missing"),
        ("config.seed", ..., r"config\.seed is missing"),
        ("config.optim.schedule", 3, r"config\.optim\.schedule should be text, not 3"),
        ("config.data.shot_thresholds", [20], "should be two numbers"),
        ("environment", [1], r"environment should be an object"),
    ],
)
def test_damaged_configs_are_one_sentence(run, tmp_path, keys: str, value, message: str) -> None:
    write_changed(run, tmp_path / "bad", "config.json", keys, value)
    with pytest.raises(UserError, match=message):
        write_report(str(tmp_path / "bad"))
    with pytest.raises(UserError, match=message):
        find_runs([str(tmp_path / "bad")])


def test_a_file_that_is_no_object_is_damaged(run: Path, tmp_path: Path) -> None:
    write_changed(run, tmp_path / "bad", "config.json", "config.seed", 1)
    (tmp_path / "bad" / "results.json").write_text('{"step": 1')
    with pytest.raises(UserError, match="no readable JSON object"):
        find_runs([str(tmp_path / "bad")])
    (tmp_path / "bad" / "results.json").write_text('{"step": 1}')
    with pytest.raises(UserError, match="epoch is missing"):
        find_runs([str(tmp_path / "bad")])


@pytest.mark.parametrize("shift", ["kept", "empty", "without uniform"])
def test_the_contract_alone_is_enough(run: Path, tmp_path: Path, shift: str) -> None:
    write_changed(run, tmp_path / "run", "config.json", "resolved", {})
    path = tmp_path / "run" / "results.json"
    results = json.loads(path.read_text())
    keys = ("step", "epoch", "num_parameters", "class_counts", "test", "experts", "shift")
    results = {key: results[key] for key in keys}
    accuracies = ("top1", "many", "medium", "few", "ece", "mce")
    results["test"] = {key: results["test"][key] for key in (*accuracies, "balanced", "nll")}
    results["experts"] = [{k: e[k] for k in ("tau", *accuracies)} for e in results["experts"]]
    if shift == "empty":
        results["shift"] = {}
    elif shift == "without uniform":
        results["shift"].pop("uniform")
        results["shift"]["forward2"]["estimated"] = None
    path.write_text(json.dumps(results))
    page = write_report(str(path.parent)).read_text()
    assert ("Accuracy by target distribution" in page) == (shift != "empty")
    groups = group_runs(find_runs([str(path.parent)]))
    content = compare(groups)
    names = ["scores"] if shift == "empty" else ["scores", "shift"]
    assert [table.name for table in content] == names
    write(tmp_path / "out", groups, content)
