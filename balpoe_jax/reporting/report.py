# SPDX-License-Identifier: Apache-2.0
"""The report of a run: tables for the terminal and files, and a page with figures.

All it needs is in the plain files of the workdir, so it can be written again at any time.
"""

import contextlib
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from balpoe_jax import metrics
from balpoe_jax.errors import UserError
from balpoe_jax.evaluation import pictures, predictions
from balpoe_jax.reporting import figures, html, per_class, result_tables, schema, tables

# The tables that a terminal shows; the page and the files have all.
_PRINTED = (
    "result", "calibration", "shift", "prior_estimates", "aggregation", "bias", "experts",
)  # fmt: skip
_POSTHOC = ("variants", "thresholds")


def result_text(results: Mapping[str, Any], width: int = 80) -> str:
    """The note on the run, if any, and the main tables, for a terminal of `width` characters.

    Args:
        results: Content of `results.json`.
        width: Number of characters in a line, 80 or more.
    """
    printed = [table for table in result_tables.result_tables(results) if table.name in _PRINTED]
    parts = [f"{table.title}\n{tables.as_text(table, width)}" for table in printed]
    if results.get("note"):
        parts.insert(0, textwrap.fill(f"Note: {results['note']}", width))
    return "\n\n".join(parts)


def posthoc_text(results: Mapping[str, Any], width: int = 80) -> str:
    """The tables of adjusted and calibrated logits, for a terminal of `width` characters.

    Args:
        results: Content of `results.json`.
        width: Number of characters in a line, 80 or more.
    """
    printed = [table for table in result_tables.result_tables(results) if table.name in _POSTHOC]
    return "\n\n".join(f"{table.title}\n{tables.as_text(table, width)}" for table in printed)


def write_report(workdir: str) -> Path:
    """Writes `report/` from the files of a run and returns the path of its page.

    It has `index.html`, `tables.md` with all tables, and a CSV file for each table. `results.json`
    must be there. The page says what else is missing (predictions, metrics.jsonl, config.json).

    Raises:
        UserError (a `ValueError`): no results, or results or a config that are damaged.
    """
    path = Path(workdir).absolute()
    results = schema.load_results(path)
    if results is None:
        raise UserError(
            f"{path} holds no results.json to report; evaluate the run first, with --mode=eval."
        )
    return _write(path, results, _load_summaries(path, results))


def write_report_of(
    workdir: Path, results: Mapping[str, Any], test: predictions.Predictions | None
) -> Path:
    """Writes `report/` of an evaluation that has just been made; returns the path of its page.

    Args:
        workdir: Folder of the run, with its `config.json` and `metrics.jsonl`.
        results: Content of its `results.json`.
        test: Predictions of the test set; None for those in the workdir.

    Raises:
        UserError (a `ValueError`): a config that is damaged.
    """
    path = workdir.absolute()
    shown = _Summaries(test) if test is not None else _load_summaries(path, results)
    return _write(path, results, shown)


def _write(path: Path, results: Mapping[str, Any], summaries: "_Summaries | str") -> Path:
    recorded = schema.load_config(path)
    content = {table.name: table for table in result_tables.result_tables(results)}
    names = _class_names(results, recorded)
    shown: list[pictures.Picture] = []
    if not isinstance(summaries, str):
        class_tables = _class_tables(results, names, summaries)
        content |= {table.name: table for table in class_tables}
        shown = pictures.load(path / predictions.FOLDER, len(names))
    if shown:
        content["pictures"] = per_class.picture_table(names, shown)
    title, subtitle = _headline(results, recorded)
    folder = path / "report"
    tables.write_files(
        folder,
        list(content.values()),
        f"# {title}\n\n{subtitle}",
        note=results.get("note") or "",
    )
    sections = [
        *(_posthoc_section(content) if "variants" in content else ()),
        html.section("Result", html.table(content["result"], heading=False)),
        _calibration_section(content, results, summaries),
        _classes_section(results, recorded, summaries),
        *(_every_class_section(content) if "classes" in content else ()),
        *(_pictures_section(names, shown) if shown else ()),
        *(_shift_section(content, results) if "shift" in content else ()),
        *(_experts_section(content, results, summaries) if "bias" in content else ()),
    ]
    if not results.get("origin"):
        sections += [
            html.section("Training", _curves(path, results)),
            html.section("The run", _facts(results, recorded)),
        ]
    return html.write(folder / "index.html", title, subtitle, sections)


class _Summaries:
    """The labels and the summaries of all classifiers, which the page needs of predictions."""

    def __init__(self, test: predictions.Predictions) -> None:
        self.labels = test.labels
        ensemble, self.experts = predictions.summarize_experts(test)
        self.ensemble = ensemble


def _load_summaries(path: Path, results: Mapping[str, Any]) -> _Summaries | str:
    """The summaries of the run's predictions, or a sentence that says why there are none."""
    try:
        test = predictions.load(path / predictions.FOLDER)
        experts, _, classes = test.expert_logits.shape
        if (experts, classes) != (len(results["experts"]), len(results["class_counts"])):
            return "The predictions in this folder are not those of its results."
        return _Summaries(test)
    except FileNotFoundError:
        return "There are no predictions in this folder."
    except UserError as error:
        return str(error)


def _headline(results: Mapping[str, Any], recorded: schema.RunRecord | None) -> tuple[str, str]:
    dataset, model = (recorded.dataset, recorded.model) if recorded else ("Run", "model")
    experts = len(results["experts"])
    counts = np.array(results["class_counts"])
    if results.get("origin"):
        return results["origin"], (
            f"{counts.sum():,} training examples in {len(counts)} classes, {counts.max():,} down "
            f"to {counts.min():,} a class; adjusted and calibrated after training"
        )
    title = f"{dataset}, {model} with {experts} expert{'s' if experts > 1 else ''}"
    flops = results.get("forward_flops")
    operations = "" if flops is None else f", {flops / 1e6:,.1f} MFLOP an image"
    subtitle = (
        f"{counts.sum():,} training images in {len(counts)} classes, {counts.max():,} down to "
        f"{counts.min():,} a class; {results['num_parameters']:,} parameters{operations}; "
        f"epoch {results['epoch']}, step {results['step']:,}"
    )
    if results.get("weights"):
        subtitle += f"; {_weights(results['weights'])}"
    if results.get("note"):
        subtitle += f"; {results['note']}"
    return title, subtitle


def _weights(weights: Mapping[str, Any]) -> str:
    """Which weights were evaluated, in words."""
    if weights["average"] == "ema" and weights.get("decay") is not None:
        return f"moving average of the weights, decay {weights['decay']:g}"
    if weights["average"] == "swa" and weights.get("epochs") is not None:
        return f"mean of the weights after {weights['epochs']} epochs"
    return "the newest weights"


def _calibration_section(
    content: Mapping[str, tables.Table], results: Mapping[str, Any], summaries: _Summaries | str
) -> Markup:
    parts = [html.table(content["calibration"], heading=False), _reliability(results, summaries)]
    if "calibration_groups" in content:
        parts.append(html.table(content["calibration_groups"]))
    return html.section("Calibration", *parts)


def _reliability(results: Mapping[str, Any], summaries: _Summaries | str) -> Markup:
    if isinstance(summaries, str):
        return html.absent(summaries)
    named = {"ensemble": summaries.ensemble}
    if len(summaries.experts) > 1:
        named |= dict(zip(_expert_names(results), summaries.experts, strict=True))
    drawn = []
    for i, (name, summary) in enumerate(named.items()):
        correct = summary.predicted == summaries.labels
        bins = metrics.bin_confidences(summary.confidence, correct, (results.get("num_bins") or 15))
        drawn.append(
            html.figure(
                figures.reliability_diagram(name, bins, f"reliability{i}"),
                f"Reliability diagram of {name}: expected calibration error "
                f"{100 * bins.ece:.1f}%, maximum {100 * bins.mce:.1f}%.",
            )
        )
    caption = (
        "Accuracy of the test examples in each bin of confidence, and the gap to their mean "
        "confidence: orange where it exceeds the accuracy, light blue where it falls short. "
        "Beneath, how the examples spread over the bins."
    )
    return html.figures(*drawn) + html.absent(caption)


def _classes_section(
    results: Mapping[str, Any], recorded: schema.RunRecord | None, summaries: _Summaries | str
) -> Markup:
    counts, test = np.array(results["class_counts"]), results["test"]
    thresholds = recorded.shot_thresholds if recorded else metrics.DEFAULT_THRESHOLDS
    low, high = thresholds
    names = [f"expert {i}" for i in range(1, len(results["experts"]) + 1)]
    accuracies = [*results["experts"], test]
    means = ", ".join(f"{group} {_percent(test[group])}%" for group in metrics.ShotGroups._fields)
    drawn = [
        html.figure(
            figures.group_accuracies([*names, "ensemble"], accuracies),
            f"Accuracy of each expert and the ensemble by shot group; ensemble: {means}.",
            f"Many-shot classes have more than {high} training images, few-shot ones fewer than "
            f"{low}.",
        )
    ]
    if results.get("group_confusion"):
        confusion = np.array(results["group_confusion"], float)
        stays = ", ".join(
            f"{group} {_percent(value)}%"
            for group, value in zip(metrics.ShotGroups._fields, confusion.diagonal(), strict=True)
        )
        drawn.append(
            html.figure(
                figures.group_confusion(confusion),
                f"Confusion between shot groups. Examples predicted in their own group: {stays}.",
                "Where the ensemble puts the examples of each group, right class or not.",
            )
        )
    if isinstance(summaries, str):
        drawn.append(html.absent(summaries))
    else:
        predicted = summaries.ensemble.predicted
        per_class = metrics.shot_accuracy(predicted, summaries.labels, counts, thresholds).per_class
        drawn.insert(
            0,
            html.figure(
                figures.class_accuracies(
                    counts, per_class, metrics.shot_groups(counts, thresholds)
                ),
                f"Test accuracy of each class against its training images; group means: {means}.",
                "A point is a class under the ensemble.",
            ),
        )
    return html.section("Classes and shot groups", html.figures(*drawn, broad=True))


def _class_names(results: Mapping[str, Any], recorded: schema.RunRecord | None) -> tuple[str, ...]:
    """The names of the classes, or their numbers where these are all that is known."""
    number = len(results["class_counts"])
    names = recorded.class_names if recorded else tuple(results.get("class_names") or ())
    return names if len(names) == number else tuple(str(i) for i in range(number))


def _class_tables(
    results: Mapping[str, Any], names: Sequence[str], summaries: _Summaries
) -> list[tables.Table]:
    counts = np.array(results["class_counts"])
    labels, ensemble = summaries.labels, summaries.ensemble
    bins = results.get("num_bins") or 15
    return [
        per_class.class_table(names, counts, labels, ensemble.predicted, ensemble.confidence, bins),
        per_class.confused_pairs(names, labels, ensemble.predicted),
    ]


def _every_class_section(content: Mapping[str, tables.Table]) -> tuple[Markup, ...]:
    classes, pairs = content["classes"], content["confused"]
    shown = [html.sortable(classes)]
    if pairs.rows:
        shown.append(html.table(pairs))
    return (html.section(classes.title, *shown),)


def _posthoc_section(content: Mapping[str, tables.Table]) -> tuple[Markup, ...]:
    gain = html.table(content["variants"], "adjusted, temperature", heading=False)
    thresholds = html.table(content["thresholds"])
    return (html.section(content["variants"].title, gain, thresholds),)


def _pictures_section(
    names: Sequence[str], shown: Sequence[pictures.Picture]
) -> tuple[Markup, ...]:
    parts = []
    for kind, title, note in (
        (
            pictures.WRONG,
            "Wrong with high confidence",
            "Test images whose prediction is wrong, from the most confident on: first the class "
            "in the data, then the prediction. A wrong label shows here first.",
        ),
        (
            pictures.RARE,
            "Of the rarest classes",
            "Test images from the class with the fewest training images on.",
        ),
    ):
        items = [_item(names, picture) for picture in shown if picture.kind == kind]
        if items:
            parts.append(html.pictures(title, note, items))
    return (html.section("Pictures", *parts),)


def _item(names: Sequence[str], picture: pictures.Picture) -> dict[str, str]:
    label, sure = names[picture.label], f"{100 * picture.confidence:.0f}%"
    is_right = picture.label == picture.predicted
    said = f"right, {sure}" if is_right else f"as {names[picture.predicted]}, {sure}"
    return {
        "uri": picture.uri,
        "name": picture.name,
        "label": label,
        "predicted": said,
        "alternative": f"{picture.name}: {label}, predicted {said}",
    }


def _shift_section(
    content: Mapping[str, tables.Table], results: Mapping[str, Any]
) -> tuple[Markup, ...]:
    shift = results["shift"]
    names = [result_tables.short_name(name) for name in shift]
    ends = [name for name in shift if name in (next(iter(shift)), "uniform", next(reversed(shift)))]
    said = "; ".join(
        f"{name}: " + ", ".join(f"{kind} {_percent(shift[name][kind])}%" for kind in shift[name])
        for name in ends
    )
    details = ("aggregation", "prior_estimates", "estimate_accuracies", "shift_calibration")
    drawn = html.figure(
        figures.shift_accuracies(shift, names),
        f"Accuracy by target distribution with each kind of prior. {said}.",
    )
    return (
        html.section(
            "Test distributions",
            html.table(content["shift"], heading=False),
            html.figures(drawn, broad=True),
            *(html.table(content[name]) for name in details if name in content),
        ),
    )


def _experts_section(
    content: Mapping[str, tables.Table], results: Mapping[str, Any], summaries: _Summaries | str
) -> tuple[Markup, ...]:
    bias = [html.table(content["bias"], heading=False)]
    if isinstance(summaries, str):
        bias.append(html.absent(summaries))
    else:
        bias.append(html.figures(*_marginals(results, summaries)))
    sections = [html.section("Bias of the experts", *bias)]
    if len(results["experts"]) > 1:
        curve = _experts_curve(results)
        sections.append(
            html.section("Number of experts", html.table(content["experts"], heading=False), curve)
        )
    return tuple(sections)


def _marginals(results: Mapping[str, Any], summaries: _Summaries) -> list[Markup]:
    counts = np.array(results["class_counts"])
    uniform = np.full(len(counts), 1 / len(counts))
    panels = [
        (name, metrics.target_prior(counts, expert["tau"]), summary.marginal, bias["kl"])
        for name, expert, summary, bias in zip(
            _expert_names(results),
            results["experts"],
            summaries.experts,
            results["bias"]["experts"],
            strict=True,
        )
        if expert["tau"] is not None
    ]
    kl = results["bias"]["ensemble"]["kl"]
    panels.append(("ensemble", uniform, summaries.ensemble.marginal, kl))
    return [
        html.figure(
            figures.marginal(f"{name}: KL {_nats(kl)}", counts, target, expected, f"marginal{i}"),
            f"Expected marginal of {name} against its target prior: KL divergence "
            f"{_nats(kl)} nats.",
        )
        for i, (name, target, expected, kl) in enumerate(panels)
    ]


def _experts_curve(results: Mapping[str, Any]) -> Markup:
    by_size = result_tables.subsets_by_size(results)
    keys = {"all": "top1", "many": "many", "medium": "medium", "few": "few"}
    values = {
        label: [[_number(subset[key]) for subset in subsets] for subsets in by_size.values()]
        for label, key in keys.items()
    }
    means = {label: [float(np.mean(v)) for v in per_size] for label, per_size in values.items()}
    spreads = {label: [(min(v), max(v)) for v in per_size] for label, per_size in values.items()}
    said = ", ".join(
        f"{size}: {100 * mean:.1f}%" for size, mean in zip(by_size, means["all"], strict=True)
    )
    return html.figures(
        html.figure(
            figures.experts_curve(list(by_size), means, spreads),
            f"Mean accuracy over subsets by number of experts: {said}.",
            "Lines are means over the subsets of each size, bands go from the worst to the best.",
        ),
        broad=True,
    )


def _curves(path: Path, results: Mapping[str, Any]) -> Markup:
    rows = _read_rows(path / "metrics.jsonl")
    train_rows = [row for row in rows if "expert_losses" in row]
    test_rows = [row for row in rows if "test_top1" in row]
    if not train_rows:
        return html.absent("There are no training metrics in this folder.")
    first, last = train_rows[0], train_rows[-1]
    drawn = [
        html.figure(
            figures.training_losses(train_rows, _expert_names(results)),
            f"Training over epochs {first['epoch']:.1f} to {last['epoch']:.1f}: the loss goes from "
            f"{first['loss']:.3f} to {last['loss']:.3f}.",
            "Losses are means over the steps since the row before.",
        )
    ]
    if len(test_rows) > 1:
        drawn.append(
            html.figure(
                figures.test_curves(test_rows),
                f"Test accuracy over the epochs: from {_percent(test_rows[0]['test_top1'])}% to "
                f"{_percent(test_rows[-1]['test_top1'])}%.",
                "The ensemble's.",
            )
        )
    return html.figures(*drawn, broad=True)


def _facts(results: Mapping[str, Any], recorded: schema.RunRecord | None) -> Markup:
    if recorded is None:
        return html.absent("There is no config.json in this folder.")
    return html.definitions(
        {
            "data": f"{recorded.dataset}, imbalance ratio {recorded.imbalance_ratio:g}",
            "class counts": "as they should be for this data set"
            if recorded.counts_as_published
            else "not as they should be for this data set",
            "taus": ", ".join(_tau(expert) for expert in results["experts"]),
            "method": recorded.method,
            "mixing": f"{recorded.mix_rule}, alpha {recorded.mix_alpha:g}"
            if recorded.mix_alpha
            else "none",
            "schedule": f"{recorded.total_epochs} epochs, batch {recorded.batch_size}, learning "
            f"rate {recorded.learning_rate:g} ({recorded.schedule}), weight decay "
            f"{recorded.weight_decay:g}",
            "seed": recorded.seed,
            "devices": f"{recorded.device_count} x {recorded.device_kind}",
            "started": recorded.started,
            "source": recorded.git_commit or "not from a git repository",
            "versions": ", ".join(f"{name} {v}" for name, v in recorded.versions.items() if v),
            "command": " ".join(recorded.command),
        }
    )


def _expert_names(results: Mapping[str, Any]) -> list[str]:
    return [
        f"expert {i}" if expert["tau"] is None else f"expert {i}, tau {_tau(expert)}"
        for i, expert in enumerate(results["experts"], start=1)
    ]


def _tau(expert: Mapping[str, Any]) -> str:
    return "-" if expert["tau"] is None else f"{expert['tau']:.4g}"


def _read_rows(path: Path) -> Sequence[dict[str, Any]]:
    """The rows of a file with one JSON object a line, without lines that were cut short."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _nats(kl: float | None) -> str:
    return tables.Column("", "decimal").show(result_tables.divergence(kl))


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None or np.isnan(fraction) else f"{100 * fraction:.1f}"
