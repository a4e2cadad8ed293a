# SPDX-License-Identifier: Apache-2.0
"""The table and the page: what they say, what they need, and that they stand alone."""

import csv
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from balpoe_jax.errors import UserError
from balpoe_jax.evaluation import pictures
from balpoe_jax.reporting import comparison
from balpoe_jax.reporting.report import result_text, write_report
from balpoe_jax.reporting.result_tables import result_tables
from balpoe_jax.reporting.runs import find_runs, group_runs
from tests.helpers import commands
from tests.helpers.fake_runs import make_run

pytestmark = pytest.mark.integration

VOID = {"meta", "br", "link", "img"}


class Balanced(HTMLParser):
    """Fails on an element that is not closed in its place; collects text and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.attributes: list[tuple[str, str, str | None]] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data


def parse(page: Path) -> Balanced:
    parser = Balanced()
    parser.feed(page.read_text())
    assert not parser.open
    return parser


def text_tables(results: dict, width: int = 80) -> dict[str, list[str]]:
    """The lines of each printed table by its title."""
    parts = result_text(results, width).split("\n\n")
    return {part.splitlines()[0]: part.splitlines()[1:] for part in parts}


@pytest.mark.parametrize("num_experts", [1, 3, 7])
def test_the_table_has_a_row_for_each_expert_and_the_ensemble(
    tmp_path: Path, num_experts: int
) -> None:
    results = make_run(tmp_path / "run", num_experts)
    lines = text_tables(results)["Accuracy and calibration"]
    assert len(lines) == 1 + num_experts + 1
    assert lines[0].split() == ["tau", "all", "many", "medium", "few", "ECE", "MCE"]
    cells = lines[-1].split()
    expected = [results["test"][key] for key in ("top1", "many", "medium", "few", "ece", "mce")]
    assert cells == ["ensemble", *(f"{100 * value:.1f}" for value in expected)]
    assert lines[1].split()[:3] == ["expert", "1", f"{results['experts'][0]['tau']:.4g}"]


def test_the_tables_fit_80_columns_and_use_a_wide_terminal(tmp_path: Path) -> None:
    results = make_run(tmp_path / "run", 7)
    assert max(map(len, result_text(results, 80).splitlines())) <= 80
    assert len(result_text(results, 80).split("\n\n")) == 6
    wide = text_tables(results, 140)["Accuracy and calibration"]
    assert wide[0].split()[-3:] == ["NLL", "Brier", "aECE"]
    assert wide[-1].split()[-3] == f"{results['test']['nll']:.3f}"


def test_what_is_undefined_is_a_dash(tmp_path: Path) -> None:
    results = make_run(tmp_path / "run")
    results["test"]["few"] = None
    assert text_tables(results)["Accuracy and calibration"][-1].split()[4] == "-"


def test_classes_of_unequal_size_have_a_balanced_accuracy(tmp_path: Path) -> None:
    results = make_run(tmp_path / "run")
    heading, *_ = text_tables(results)["Accuracy and calibration"]
    assert heading.split()[:3] == ["tau", "all", "many"]
    results["test"]["balanced"] = results["test"]["top1"] - 0.25
    heading, *_, row = text_tables(results)["Accuracy and calibration"]
    assert heading.split()[:4] == ["tau", "all", "balanced", "many"]
    assert float(row.split()[1]) - float(row.split()[2]) == pytest.approx(25)
    results["test"]["balanced"] = None
    assert "balanced" not in text_tables(results)["Accuracy and calibration"][0]


@pytest.mark.usefixtures("no_drawing")
def test_files_hold_the_tables(tmp_path: Path) -> None:
    results = make_run(tmp_path / "run")
    folder = write_report(str(tmp_path / "run")).parent
    with (folder / "shift.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["", "F50", "F2", "uni", "B2", "B50"]
    assert [float(cell) for cell in rows[2][1:]] == [
        scores["prior"] for scores in results["shift"].values()
    ]
    markdown = (folder / "tables.md").read_text()
    assert markdown.count("\n## ") == len(list(folder.glob("*.csv"))) == 12
    row = next(line for line in markdown.splitlines() if line.startswith("| ensemble"))
    assert f" {100 * results['test']['top1']:.1f} |" in row


def test_the_page_stands_alone_and_says_what_the_results_say(tmp_path: Path) -> None:
    results = make_run(tmp_path / "run")
    page = write_report(str(tmp_path / "run"))
    assert page == tmp_path / "run" / "report" / "index.html"
    parsed = parse(page)
    references = [value for _, name, value in parsed.attributes if name in ("src", "href")]
    assert not [value for value in references if not str(value).startswith(("#", "data:"))]
    assert page.read_text().count("<script") == 1  # which sorts the table of classes
    for key in ("top1", "few", "ece"):
        assert f"{100 * results['test'][key]:.1f}" in parsed.text
    assert "main.py --config=a&b" in parsed.text
    text = page.read_text()
    described = re.findall(r'<svg role="img" aria-label="([^"]+)"', text)
    assert len(described) == text.count("<svg") == 4 + 3 + 1 + 4 + 1 + 1
    assert f"{100 * results['test']['ece']:.1f}%" in described[0]


@pytest.mark.usefixtures("no_drawing")
def test_pictures_are_shown_with_names_and_listed(tmp_path: Path) -> None:
    names = ("a<b>", "owl", "yak", "emu")
    make_run(tmp_path / "run", signal=0, names=names)
    page = write_report(str(tmp_path / "run"))
    shown = pictures.load(tmp_path / "run" / "predictions", 4)
    sources = [
        value for tag, name, value in parse(page).attributes if (tag, name) == ("img", "src")
    ]
    assert sources == [picture.uri for picture in shown] and len(sources) == 32
    assert "a<b>" in parse(page).text
    with (page.parent / "pictures.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    labels = np.load(tmp_path / "run" / "predictions" / "labels.npy")
    for row, picture in zip(rows, shown, strict=True):
        assert row[0] == picture.name and row[2] == names[labels[int(row[0])]]
        assert row[3] == names[picture.predicted] and float(row[4]) == picture.confidence
    (tmp_path / "run" / "predictions" / pictures.FILE).unlink()
    assert "<img" not in write_report(str(tmp_path / "run")).read_text()


def test_figures_are_well_formed_and_their_names_do_not_clash(tmp_path: Path) -> None:
    make_run(tmp_path / "run", num_experts=7)
    text = write_report(str(tmp_path / "run")).read_text()
    figures = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    for figure in figures:
        ElementTree.fromstring(figure)
        assert "#ffffff" not in figure  # no ground of its own on a dark page
    names = re.findall(r'\bid="([^"]+)"', text)
    assert len(names) == len(set(names))
    used = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    assert used <= set(names)
    assert "#010203" not in text  # the page's own colour took its place


@pytest.mark.usefixtures("no_drawing")
def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    make_run(tmp_path / "run", name='<b>"x"</b>')
    page = write_report(str(tmp_path / "run"))
    assert "<b>" not in page.read_text()
    assert '<b>"x"</b>, resnet8' in parse(page).text


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("metrics.jsonl", "no training metrics"),
        ("config.json", "no config.json"),
        ("predictions/labels.npy", "no predictions"),
    ],
)
def test_a_missing_file_leaves_its_part_out(tmp_path: Path, missing: str, sentence: str) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "run" / missing).unlink()
    assert sentence in parse(write_report(str(tmp_path / "run"))).text


@pytest.mark.usefixtures("no_drawing")
def test_a_torn_last_row_does_not_lose_the_curves(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "lo')
    assert "no training metrics" not in parse(write_report(str(tmp_path / "run"))).text


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_results_are_needed(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=r"no results\.json|results\.json is damaged"):
        write_report(str(tmp_path))


def test_a_class_that_is_never_predicted_has_an_infinite_divergence(tmp_path: Path) -> None:
    results = make_run(tmp_path / "run", never=3)
    assert results["bias"]["ensemble"]["kl"] is None
    page = write_report(str(tmp_path / "run"))
    assert parse(page).text.count("infinite") >= 4
    assert "KL divergence infinite nats" in page.read_text()
    assert "-" not in (page.parent / "bias.csv").read_text().splitlines()[-1]


@pytest.mark.usefixtures("no_drawing")
def test_every_output_of_a_run_has_its_note(tmp_path: Path) -> None:
    results = make_run(tmp_path / "run", note="a small version")
    assert result_text(results).startswith("Note: a small version\n\n")
    folder = write_report(str(tmp_path / "run")).parent
    assert len(list(folder.iterdir())) >= 9
    for path in folder.iterdir():
        assert "a small version" in path.read_text(), path.name


def test_the_terminal_says_how_far_estimates_and_marginals_are_off(tmp_path: Path) -> None:
    results = make_run(tmp_path / "run")
    printed = text_tables(results)
    distances = [row.split() for row in printed["L1 distance of estimated priors from the truth"]]
    assert distances[0] == ["F50", "F2", "uni", "B2", "B50"]
    assert [row[0] for row in distances[1:]] == ["uniform", "MAP", "ML", "MAP,"]
    sets = results["shift_sets"].values()
    assert distances[2][1:] == [f"{s['estimates']['map']['l1']:.2f}" for s in sets]
    assert printed["Bias"][1].split()[4] == f"{results['bias']['experts'][0]['kl']:.3f}"


@pytest.mark.usefixtures("no_drawing")
def test_files_have_the_accuracy_and_calibration_of_every_kind_of_prior(tmp_path: Path) -> None:
    results = make_run(tmp_path / "run")
    folder = write_report(str(tmp_path / "run")).parent
    sets = results["shift_sets"].values()
    found = {}
    for name in ("estimate_accuracies", "shift_calibration"):
        with (folder / f"{name}.csv").open(newline="") as file:
            found[name] = {row[0]: row[1:] for row in list(csv.reader(file))[1:]}
    for label, kind in {"MAP": "map", "ML": "ml", "MAP, raw": "map_uncorrected"}.items():
        assert [float(cell) for cell in found["estimate_accuracies"][label]] == [
            scores["estimates"][kind]["top1"] for scores in sets
        ]
    for label, kind in {"no prior": "none", "known": "prior", "estimated": "estimated"}.items():
        assert [float(cell) for cell in found["shift_calibration"][label]] == [
            scores["ece"][kind] for scores in sets
        ]


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        (
            "expert_logits",
            np.full((3, 100, 4), np.nan, np.float32),
            "logits of 100 of 100 examples",
        ),
        ("expert_logits", np.zeros((2, 100, 4), np.float32), "not those of its results"),
        ("labels", np.zeros(7, np.int32), r"logits (3, 100, 4) and labels (7,) do not fit"),
        ("labels", np.full(100, 4, np.int32), "are damaged"),
        ("labels", np.zeros(100), "are damaged"),
        ("labels", None, "cannot be read"),
    ],
)
def test_predictions_that_cannot_be_used_are_said_to_be_there(
    tmp_path: Path, file: str, content: np.ndarray | None, sentence: str
) -> None:
    make_run(tmp_path / "run")
    path = tmp_path / "run" / "predictions" / f"{file}.npy"
    if content is None:
        path.write_bytes(b"")
    else:
        np.save(path, content)
    text = parse(write_report(str(tmp_path / "run"))).text
    assert sentence in text
    assert "no predictions" not in text
    out = tmp_path / "out"
    groups = group_runs(find_runs([str(tmp_path / "run")]))
    if "its results" not in sentence:
        assert sentence in parse(comparison.write(out, groups, comparison.compare(groups))).text


def test_estimates_whose_rounds_ran_out_are_named(tmp_path: Path) -> None:
    results = make_run(tmp_path / "run")
    note = {table.name: table.note for table in result_tables(results)}["prior_estimates"]
    assert "rounds ran out" not in note
    for name in ("forward50", "uniform"):
        results["shift_sets"][name]["estimates"]["ml"]["converged"] = False
    note = {table.name: table.note for table in result_tables(results)}["prior_estimates"]
    assert "ML still changed on F50, uni when its rounds ran out" in note
    assert "MAP still" not in note


def test_the_command_writes_the_same_report_again(tmp_path: Path) -> None:
    results = make_run(tmp_path / "run")
    first = write_report(str(tmp_path / "run")).read_bytes()
    (tmp_path / "run" / "report" / "index.html").write_text("an older page")
    before = (tmp_path / "run" / "results.json").read_bytes()
    done = commands.run("balpoe_jax.report", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    page = tmp_path / "run" / "report" / "index.html"
    assert f"Report: {page}" in done.stderr + done.stdout
    assert f"{100 * results['test']['top1']:.1f}" in parse(page).text
    assert page.read_bytes() == first
    assert (tmp_path / "run" / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Expected the folder of one run, got 0 arguments"),
        (["one", "two"], "Expected the folder of one run, got 2 arguments"),
        (["nowhere"], "holds no results.json to report; evaluate the run first"),
    ],
)
def test_the_command_refuses_with_one_sentence(
    tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    done = commands.run("balpoe_jax.report", *(str(tmp_path / name) for name in arguments))
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
