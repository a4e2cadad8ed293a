# SPDX-License-Identifier: Apache-2.0
"""Runs side by side: grouped over seeds, averaged, compared, refused."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from balpoe_jax.errors import UserError
from balpoe_jax.reporting.comparison import compare, write
from balpoe_jax.reporting.runs import find_runs, group_runs, significance, spread
from balpoe_jax.reporting.tables import Column, as_text
from tests.helpers import ROOT
from tests.helpers.fake_runs import make_run

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two experiments with three seeds each."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (1, 2, 3):
        make_run(folder / "ir100_plain" / f"seed{seed}", seed=seed, mix__alpha=0.0, signal=1)
        make_run(folder / "ir100_balpoe" / f"seed{seed}", seed=seed)
    return folder


def test_runs_are_grouped_over_seeds(folder: Path) -> None:
    groups = group_runs(find_runs([str(folder / "ir100_plain"), str(folder / "ir100_balpoe")]))
    assert [group.name for group in groups] == ["plain", "balpoe"]
    assert [[run.seed for run in group.runs] for group in groups] == [[1, 2, 3], [1, 2, 3]]


def test_means_spreads_and_differences(folder: Path) -> None:
    results = {
        name: [
            json.loads((folder / name / f"seed{seed}" / "results.json").read_text())
            for seed in (1, 2, 3)
        ]
        for name in ("ir100_plain", "ir100_balpoe")
    }
    plain, balpoe = ([r["test"]["top1"] for r in rs] for rs in results.values())
    groups = group_runs(find_runs([str(folder / name) for name in results]))
    content = {table.name: table for table in compare(groups)}
    label, cells = content["scores"].rows[1]
    assert label == "balpoe (3)"
    assert cells[-2:] == [1_234_000, 56_700_000]
    assert as_text(content["scores"]).splitlines()[1].split()[-2:] == ["1.23M", "56.7M"]
    assert cells[0] == pytest.approx((np.mean(balpoe), np.std(balpoe, ddof=1)))
    difference = content["differences"].rows[0][1]
    assert difference[0] == pytest.approx(np.mean(balpoe) - np.mean(plain))
    assert content["fields"].rows[0] == ("plain", ["0.0"])
    shift = next(
        row for name, row in content["shift"].rows if (name, row[0]) == ("balpoe", "known")
    )
    backward = [r["shift"]["backward50"]["prior"] for r in results["ir100_balpoe"]]
    assert shift[-1] == pytest.approx(np.mean(backward))
    for table in content.values():
        assert max(map(len, as_text(table).splitlines())) <= 80


def test_files_of_a_comparison(folder: Path, tmp_path: Path) -> None:
    groups = group_runs(find_runs([str(folder)]))
    page = write(tmp_path / "out", groups, compare(groups))
    assert page.read_text().count("<svg") == 2 + 2
    with (page.parent / "scores.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][:3] == ["", "all", "all std"]
    written = json.loads((page.parent / "compare.json").read_text())
    assert written["plain"]["seeds"] == [1, 2, 3]
    assert rows[0][-2:] == ["params", "FLOPs"] and rows[1][-2:] == ["1234000", "56700000"]
    assert written["plain"]["forward_flops"] == 56_700_000
    assert float(rows[-1][1]) == pytest.approx(np.mean(written["plain"]["all"]))


def test_a_record_of_an_older_version_is_compared_without_operations(tmp_path: Path) -> None:
    results = make_run(tmp_path / "old")
    del results["forward_flops"]
    (tmp_path / "old" / "results.json").write_text(json.dumps(results))
    (scores, *_) = compare(group_runs(find_runs([str(tmp_path)])))
    assert as_text(scores).splitlines()[1].split()[-2:] == ["1.23M", "-"]


def test_a_sweep_of_experts_has_its_curve(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        make_run(tmp_path / f"e{number}", number)
    groups = group_runs(find_runs([str(tmp_path)]))
    assert [group.name for group in groups] == ["e1", "e2", "e3"]
    page = write(tmp_path / "out", groups, compare(groups))
    assert "Accuracy by number of experts that were trained: 1: " in page.read_text()


def test_a_single_run_is_shown_without_differences(folder: Path) -> None:
    groups = group_runs(find_runs([str(folder / "ir100_balpoe" / "seed1")]))
    assert [table.name for table in compare(groups)] == ["scores", "shift", "bias"]
    assert groups[0].spread("test", "top1").std is None


def test_spreads_and_significance_need_values() -> None:
    assert spread([]) == spread([None]) == (None, None)
    assert spread([0.5, None]) == (0.5, None)
    assert significance([0.5], [0.6, 0.7]) is None
    assert significance([0.5, 0.5], [0.6, 0.6]) is None
    one, two = [0.50, 0.51, 0.46], [0.53, 0.55, 0.52, 0.51]
    expected = stats.ttest_ind(one, two, equal_var=False).pvalue
    assert significance(one, two) == pytest.approx(expected)


def test_what_cannot_be_compared_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no evaluated run"):
        find_runs([str(tmp_path)])
    make_run(tmp_path / "again", seed=1)
    with pytest.raises(UserError, match="same experiment with the same seed 1"):
        group_runs(find_runs([str(folder / "ir100_balpoe"), str(tmp_path / "again")]))
    make_run(tmp_path / "other", name="cifar10")
    with pytest.raises(UserError, match=r"different data sets .*cifar10, digits"):
        group_runs(find_runs([str(folder / "ir100_balpoe"), str(tmp_path / "other")]))


def test_an_infinite_divergence_is_not_averaged_away(tmp_path: Path) -> None:
    make_run(tmp_path / "run" / "seed1", seed=1)
    make_run(tmp_path / "run" / "seed2", seed=2, never=3)
    content = {t.name: t for t in compare(group_runs(find_runs([str(tmp_path)])))}
    assert content["bias"].rows[0][1] == ["infinite"] * 4


def test_a_sweep_without_few_shot_classes_has_its_curve(tmp_path: Path) -> None:
    for number in (1, 2):
        path = tmp_path / f"e{number}" / "results.json"
        results = make_run(path.parent, number)
        results["test"]["few"] = None
        path.write_text(json.dumps(results))
    make_run(tmp_path / "e3", 3)
    groups = group_runs(find_runs([str(tmp_path)]))
    page = write(tmp_path / "out", groups, compare(groups))
    assert "Accuracy by number of experts that were trained: 1: " in page.read_text()


def test_every_output_of_a_comparison_has_the_note(tmp_path: Path) -> None:
    for seed in (1, 2):
        make_run(tmp_path / "runs" / f"seed{seed}", seed=seed, note="a small version")
    other = tmp_path / "other"
    groups = group_runs(find_runs([str(tmp_path / "runs")]))
    for path in write(tmp_path / "out", groups, compare(groups)).parent.iterdir():
        assert "a small version" in path.read_text(), path.name
    make_run(other, seed=1, mix__alpha=0.0)
    groups = group_runs(find_runs([str(tmp_path / "runs"), str(other)]))
    write(tmp_path / "out", groups, compare(groups))
    assert "Note: runs: a small version\n" in (tmp_path / "out" / "compare.md").read_text()


def test_the_terminal_shows_the_note_of_compared_runs(tmp_path: Path) -> None:
    make_run(tmp_path / "run", note="a small version")
    result = subprocess.run(
        [sys.executable, "-m", "balpoe_jax.compare", str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Note: a small version\n")


def evaluate_anew(workdir: Path, **settings) -> None:
    """Pretends that a run was evaluated with these settings."""
    path = workdir / "results.json"
    results = json.loads(path.read_text())
    path.write_text(json.dumps({**results, "settings": {"num_bins": 15, **settings}}))


def test_runs_that_were_evaluated_differently_are_not_pooled(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        make_run(tmp_path / "all" / f"seed{seed}", seed=seed)
        evaluate_anew(tmp_path / "all" / f"seed{seed}", num_bins=5 if seed == 3 else 15)
    groups = group_runs(find_runs([str(tmp_path)]))
    assert [[run.seed for run in group.runs] for group in groups] == [[1, 2], [3]]
    content = {table.name: table for table in compare(groups)}
    assert [column.name for column in content["fields"].columns] == ["eval.num_bins"]
    assert [row[1] for row in content["fields"].rows] == [["15"], ["5"]]


def test_bins_alone_tell_older_evaluations_apart(tmp_path: Path) -> None:
    for seed, bins in ((1, 15), (2, 15), (3, 5)):
        make_run(tmp_path / "all" / f"seed{seed}", seed=seed)
        path = tmp_path / "all" / f"seed{seed}" / "results.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "num_bins": bins}))
    groups = group_runs(find_runs([str(tmp_path)]))
    assert [[run.seed for run in group.runs] for group in groups] == [[1, 2], [3]]


def test_target_distributions_of_any_run_have_a_column(tmp_path: Path) -> None:
    make_run(tmp_path / "none", seed=1, mix__alpha=0.2)
    make_run(tmp_path / "some", seed=1)
    make_run(tmp_path / "more", seed=1, mix__alpha=0.0)
    for name in ("none", "some", "more"):
        path = tmp_path / name / "results.json"
        results = json.loads(path.read_text())
        del results["shift_sets"]
        if name == "none":
            results["shift"] = {}
        if name == "some":
            del results["shift"]["forward50"], results["shift"]["backward2"]
        path.write_text(json.dumps(results))
    groups = group_runs(find_runs([str(tmp_path / name) for name in ("none", "some", "more")]))
    content = compare(groups)
    shift = next(table for table in content if table.name == "shift")
    assert [column.name for column in shift.columns[1:]] == ["F50", "F2", "uni", "B2", "B50"]
    assert [name for name, _ in shift.rows] == ["some"] * 3 + ["more"] * 3
    assert [value is None for value in shift.rows[0][1]] == [False, True, False, False, True, False]
    page = write(tmp_path / "out", groups, content).read_text()
    assert "none was not scored on target distributions" in page


def test_p_values_are_never_zero() -> None:
    column = Column("p", "p")
    assert [column.show(value) for value in (0.0004, 0.001, 0.25, None)] == [
        "<0.001", "0.001", "0.250", "-",
    ]  # fmt: skip


def test_differences_show_p_values(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        for name, alpha, top1 in (("a", 0.0, 0.5), ("b", 0.4, 0.9)):
            path = tmp_path / name / f"seed{seed}" / "results.json"
            results = make_run(path.parent, seed=seed, mix__alpha=alpha)
            results["test"]["top1"] = top1 + seed / 1000
            path.write_text(json.dumps(results))
    content = {t.name: t for t in compare(group_runs(find_runs([str(tmp_path)])))}
    assert "<0.001" in as_text(content["differences"])
