# SPDX-License-Identifier: Apache-2.0
"""Results of several runs side by side, as tables and as a page.

Runs that differ in nothing but the seed are one row, mean and standard deviation; further rows are
compared with the first.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from balpoe_jax import files, metrics
from balpoe_jax.errors import UserError
from balpoe_jax.evaluation import predictions
from balpoe_jax.reporting import figures, html, result_tables, tables
from balpoe_jax.reporting.runs import RunGroup, differing_fields, significance, spread
from balpoe_jax.reporting.tables import Column, Table
from balpoe_jax.run import record

_SCORES = {
    "all": ("test", "top1"),
    "many": ("test", "many"),
    "medium": ("test", "medium"),
    "few": ("test", "few"),
    "ECE": ("test", "ece"),
    "MCE": ("test", "mce"),
}

_KINDS = {"none": "none", "prior": "known", "estimated": "est."}

# The one field in which groups differ that train different numbers of experts.
_SWEEP = ["model.num_experts"]


def compare(groups: Sequence[RunGroup]) -> list[Table]:
    """The tables of a comparison; several groups have a table of their differences."""
    content = [_scores(groups)]
    if len(groups) > 1:
        content += [_differences(groups), _fields(groups)]
    runs = [run for group in groups for run in group.runs]
    if any(run.results.get("shift") for run in runs):
        content.append(_shift(groups))
    if any(run.results.get("bias") for run in runs):
        content.append(_bias(groups))
    return content


def write(folder: Path, groups: Sequence[RunGroup], content: Sequence[Table]) -> Path:
    """Writes tables and page into `folder`, created when missing, and returns the page's path.

    Raises:
        UserError (a `ValueError`): a folder that cannot be written to.
    """
    folder = record.open_workdir(str(folder))
    note = shared_note(groups)
    heading = "# Comparison" + (f"\n\nNote: {note}" if note else "")
    tables.write_files(folder, content, heading, "compare", note)
    figures_of = {
        group.name: {
            "seeds": [run.seed for run in group.runs],
            "runs": [str(run.path) for run in group.runs],
            **({"note": group.note} if group.note else {}),
            **{name: group.values(*keys) for name, keys in _SCORES.items()},
        }
        for group in groups
    }
    files.write_atomically(
        folder / "compare.json", json.dumps(files.to_json(figures_of), indent=2) + "\n"
    )
    sections = [html.section(table.title, html.table(table, heading=False)) for table in content]
    sections.insert(1, html.section("Reliability", _reliability(groups)))
    if any(table.name == "shift" for table in content):
        sections.append(html.section("Test distributions", _shift_figures(groups)))
    if len(groups) > 2 and list(differing_fields(groups)) == _SWEEP:
        sections.append(html.section("Number of experts", _experts_curve(groups)))
    names = ", ".join(group.name for group in groups)
    subtitle = f"{names}; {note}" if note else names
    return html.write(folder / "index.html", "Comparison", subtitle, sections)


def _label(group: RunGroup) -> str:
    return f"{group.name} ({len(group.runs)})"


def shared_note(groups: Sequence[RunGroup]) -> str:
    """The notes on the runs: once if all have the same, otherwise group by group."""
    notes = [group.note for group in groups]
    if len(set(notes)) == 1:
        return notes[0]
    return "; ".join(f"{group.name}: {group.note}" for group in groups if group.note)


def _scores(groups: Sequence[RunGroup]) -> Table:
    return Table(
        "scores",
        "Results",
        tuple(Column(name, "spread") for name in _SCORES),
        [(_label(group), [group.spread(*keys) for keys in _SCORES.values()]) for group in groups],
        "Percent on the balanced test set, mean ± standard deviation over as many seeds as stand "
        "in parentheses.",
    )


def _differences(groups: Sequence[RunGroup]) -> Table:
    first, *others = groups
    kinds = {"all": _SCORES["all"], "few": _SCORES["few"], "ECE": _SCORES["ECE"]}
    rows = []
    for group in others:
        cells: list[float | None] = []
        for keys in kinds.values():
            one, two = first.spread(*keys).mean, group.spread(*keys).mean
            difference = None if one is None or two is None else two - one
            cells += [difference, significance(first.values(*keys), group.values(*keys))]
        rows.append((_label(group), cells))
    columns = [column for name in kinds for column in (Column(name, "points"), Column("p", "p"))]
    return Table(
        "differences",
        f"Difference from {first.name}",
        tuple(columns),
        rows,
        "Points of percent. p: two-sided Welch's t-test over seeds, where both have several; with "
        "so few seeds a large p does not show that there is no difference.",
    )


def _fields(groups: Sequence[RunGroup]) -> Table:
    fields = differing_fields(groups)
    return Table(
        "fields",
        "What differs in training and evaluation",
        tuple(Column(name) for name in fields),
        [
            (group.name, [str(values[i]) for values in fields.values()])
            for i, group in enumerate(groups)
        ],
    )


def _shift(groups: Sequence[RunGroup]) -> Table:
    names = _targets(groups)
    rows = [
        (group.name, [label, *(group.spread("shift", name, kind).mean for name in names)])
        for group in groups
        if _targets([group])
        for kind, label in _KINDS.items()
    ]
    return Table(
        "shift",
        "Accuracy by target distribution",
        (Column("prior"), *(Column(result_tables.short_name(name)) for name in names)),
        rows,
        "Percent, means over seeds; F forward, B backward. The prior of the test set is not used, "
        "known, or estimated from the unlabelled examples.",
    )


def _targets(groups: Sequence[RunGroup]) -> list[str]:
    """The distributions that any run was scored on, from the most forward to the most backward."""

    def position(name: str) -> float:
        found = re.fullmatch(r"(forward|backward)(\d+(?:\.\d+)?(?:e\+\d+)?)", name)
        return (-1 if found[1] == "forward" else 1) * float(found[2]) if found else 0.0

    shifts = [run.results.get("shift") or {} for group in groups for run in group.runs]
    return sorted(dict.fromkeys(name for shift in shifts for name in shift), key=position)


def _bias(groups: Sequence[RunGroup]) -> Table:
    most = max(len(group.runs[0].results["experts"]) for group in groups)
    rows = [
        (
            group.name,
            [
                *(_mean_divergence(group, "experts", i) for i in range(most)),
                _mean_divergence(group, "ensemble"),
            ],
        )
        for group in groups
    ]
    columns = [Column(f"expert {i}", "decimal") for i in range(1, most + 1)]
    return Table(
        "bias",
        "KL divergence of target priors from expected marginals",
        (*columns, Column("ensemble", "decimal")),
        rows,
        "In nats, means over seeds; the ensemble's target is uniform.",
    )


def _mean_divergence(group: RunGroup, *keys: Any) -> float | str | None:
    """The mean divergence over the runs that have a classifier; infinite as soon as one is."""
    found = [bias for bias in group.values("bias", *keys) if bias]
    if any(bias.get("lambda", 0) is None for bias in found):
        return None  # of experts without a tau
    values = [bias["kl"] for bias in found]
    return result_tables.divergence(None) if None in values else spread(values).mean


def _reliability(groups: Sequence[RunGroup]) -> Markup:
    drawn = []
    for i, group in enumerate(groups):
        run = group.runs[0]
        try:
            test = predictions.load(run.path / predictions.FOLDER)
            ensemble, _ = predictions.summarize_experts(test)
        except FileNotFoundError:
            drawn.append(html.absent(f"There are no predictions in {run.path}."))
            continue
        except UserError as error:
            drawn.append(html.absent(f"{group.name}: {error}"))
            continue
        num_bins = run.results.get("num_bins") or 15
        correct = ensemble.predicted == test.labels
        bins = metrics.bin_confidences(ensemble.confidence, correct, num_bins)
        title = f"{group.name}, seed {run.seed}"
        drawn.append(
            html.figure(
                figures.reliability_diagram(title, bins, f"reliability{i}"),
                f"Reliability diagram of {title}: expected calibration error "
                f"{100 * bins.ece:.1f}%, maximum {100 * bins.mce:.1f}%.",
            )
        )
    return html.figures(*drawn)


def _shift_figures(groups: Sequence[RunGroup]) -> Markup:
    drawn, percent = [], Column("")
    for i, group in enumerate(groups):
        names = _targets([group])
        if not names:
            drawn.append(html.absent(f"{group.name} was not scored on target distributions."))
            continue
        means = {
            name: {kind: group.spread("shift", name, kind).mean for kind in _KINDS}
            for name in names
        }
        short = [result_tables.short_name(name) for name in names]
        drawn.append(
            html.figure(
                figures.shift_accuracies(means, short, f"shift{i}", group.name),
                f"{group.name}: accuracy by target distribution with each kind of prior, from "
                f"{percent.show(means[names[0]]['none'])}% on {short[0]} to "
                f"{percent.show(means[names[-1]]['none'])}% on {short[-1]} without one.",
            )
        )
    return html.figures(*drawn, broad=True)


def _experts_curve(groups: Sequence[RunGroup]) -> Markup:
    """Accuracy against the number of experts, each a training of its own (paper, Fig. 5)."""
    ordered = sorted(groups, key=lambda group: group.runs[0].recorded.num_experts)
    numbers = [group.runs[0].recorded.num_experts for group in ordered]
    # Not-a-number where no run has the figure, as that of an empty shot group: a gap in the line.
    values = {
        label: [
            [v for v in group.values(*_SCORES[label]) if v is not None] or [float("nan")]
            for group in ordered
        ]
        for label in ("all", "many", "medium", "few")
    }
    means = {label: [float(np.mean(v)) for v in rows] for label, rows in values.items()}
    spreads = {label: [(min(v), max(v)) for v in rows] for label, rows in values.items()}
    said = ", ".join(f"{n}: {100 * m:.1f}%" for n, m in zip(numbers, means["all"], strict=True))
    return html.figures(
        html.figure(
            figures.experts_curve(numbers, means, spreads),
            f"Accuracy by number of experts that were trained: {said}.",
            "Lines are means over seeds, bands go from the lowest to the highest.",
        ),
        broad=True,
    )
