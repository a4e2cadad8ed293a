# SPDX-License-Identifier: Apache-2.0
"""The result of a run for people: a table for the terminal and a page with figures.

Everything is read from the plain files of the workdir, so a report can be written again at any
time. The page stands alone: no scripts, no other files, no network.
"""

import contextlib
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from balpoe_jax import figures, metrics
from balpoe_jax.errors import UserError

_COLUMNS = ("tau", "all", "many", "medium", "few", "ECE", "MCE")

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --ground: #ffffff;
  --line: #d9dee5; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6e9ee; --soft: #a0aab8; --ground: #14181e; --line: #333b47; }} }}
body {{ margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: var(--ink);
  background: var(--ground); font: 16px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.5rem; margin-bottom: 0; }}
h2 {{ font-size: 1.1rem; margin: 2.2rem 0 0.5rem; }}
p.soft, figcaption, caption {{ color: var(--soft); font-size: 0.9rem; }}
div.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
caption {{ caption-side: bottom; text-align: left; padding-top: 0.4rem; }}
th, td {{ padding: 0.25rem 0.9rem; border-bottom: 1px solid var(--line); text-align: right; }}
th:first-child, td.text {{ text-align: left; }}
tr.ensemble td, tr.ensemble th {{ font-weight: 600; }}
th {{ font-weight: 500; }}
figure {{ margin: 0; }}
svg {{ max-width: 100%; height: auto; }}
code {{ font-size: 0.85em; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="soft">{subtitle}</p>
{sections}
</body>
</html>
"""


def result_table(results: Mapping[str, Any]) -> str:
    """A row for each expert and one for the ensemble, in percent, 80 characters wide or less.

    Args:
        results: what `results.json` holds.
    """
    lines = ["".join([f"{'':10}", *(f"{name:>9}" for name in _COLUMNS)])]
    for name, tau, scores in _table_rows(results):
        cells = [f"{tau:>9}", *(f"{_percent(score):>9}" for score in scores)]
        lines.append("".join([f"{name:10}", *cells]))
    return "\n".join(lines)


def write_report(workdir: str) -> Path:
    """Writes `report/index.html` from the files of a run and returns its path.

    `results.json` must be there; what else is missing (predictions, metrics.jsonl, config.json) is
    left out of the page, which says so.

    Raises:
        UserError (a `ValueError`): no or unreadable results.
    """
    path = Path(workdir).absolute()
    results = _read_json(path / "results.json")
    if results is None:
        raise UserError(
            f"{path} holds no readable results.json to report; evaluate the run first, with "
            "--mode=eval."
        )
    run = _read_json(path / "config.json") or {}
    title, subtitle = _headline(results, run)
    sections = [
        _section("Result", _result_html(results, run)),
        _section("Calibration", _calibration_html(path, results, run)),
        _section("Accuracy and class size", _classes_html(path, results, run)),
        _section("Training", _curves_html(path, results)),
        _section("The run", _facts_html(results, run)),
    ]
    page = path / "report" / "index.html"
    page.parent.mkdir(exist_ok=True)
    temporary = page.with_name(".index.html")
    text = _PAGE.format(title=title, subtitle=subtitle, sections="\n".join(sections))
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(page)
    return page


def _table_rows(results: Mapping[str, Any]) -> list[tuple[str, str, list[float | None]]]:
    """Name, tau and scores (fractions, None where undefined) of each row of the result table."""
    keys = ("top1", "many", "medium", "few", "ece", "mce")
    rows = [
        (f"expert {i}", f"{expert['tau']:.4g}", [expert[key] for key in keys])
        for i, expert in enumerate(results["experts"], start=1)
    ]
    return [*rows, ("ensemble", "", [results["test"][key] for key in keys])]


def _headline(results: Mapping[str, Any], run: Mapping[str, Any]) -> tuple[str, str]:
    config = run.get("config", {})
    data, model = config.get("data", {}), config.get("model", {})
    experts = len(results["experts"])
    counts = np.array(results["class_counts"])
    title = (
        f"{data.get('name', 'Run')}, {model.get('name', 'model')} with {experts} "
        f"expert{'s' if experts > 1 else ''}"
    )
    subtitle = (
        f"{counts.sum():,} training images in {len(counts)} classes, {counts.max():,} down to "
        f"{counts.min():,} a class; {results['num_parameters']:,} parameters; "
        f"epoch {results['epoch']}, step {results['step']:,}"
    )
    return html.escape(title), html.escape(subtitle)


def _result_html(results: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    low, high = _thresholds(run)
    header = "".join(f'<th scope="col">{name}</th>' for name in ("", *_COLUMNS))
    rows = [
        f'<tr class="{name.split()[0]}"><th scope="row">{name}</th><td>{tau}</td>'
        + "".join(f"<td>{_percent(score)}</td>" for score in scores)
        + "</tr>"
        for name, tau, scores in _table_rows(results)
    ]
    return (
        f'<div class="wide"><table><caption>Percent, on the balanced test set. Many-shot classes '
        f"have more than {high} training images, few-shot ones fewer than {low}; the figure of a "
        "group is the mean over its classes. Each expert is trained with the prior weighted by its "
        "tau; the ensemble is the mean of their logits.</caption>"
        f"<thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _calibration_html(path: Path, results: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    logits, labels = _predictions(path)
    if logits is None:
        return _absent("There are no predictions in this folder.")
    num_bins = run.get("config", {}).get("eval", {}).get("num_bins", 15)
    named = {"ensemble": logits.mean(axis=0, dtype=np.float64)}
    if len(logits) > 1:
        named |= dict(zip(_expert_names(results), logits, strict=True))
    panels = {
        name: metrics.calibration(metrics.softmax(values), labels, num_bins)
        for name, values in named.items()
    }
    described = "; ".join(f"{name} {100 * panel.ece:.1f}%" for name, panel in panels.items())
    return _figure(
        figures.reliability_diagrams(panels),
        f"Reliability diagrams. Expected calibration error: {described}.",
        "Accuracy of the examples in each bin of confidence, and how far their mean confidence is "
        "above (over-confidence) or below it. Beneath, how the examples spread over the bins.",
    )


def _classes_html(path: Path, results: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    logits, labels = _predictions(path)
    if logits is None:
        return _absent("There are no predictions in this folder.")
    counts, thresholds = np.array(results["class_counts"]), _thresholds(run)
    predicted = logits.mean(axis=0, dtype=np.float64).argmax(axis=1)
    per_class = metrics.shot_accuracy(predicted, labels, counts, thresholds).per_class
    experts = [
        (name, {group: _number(expert[group]) for group in ("many", "medium", "few")})
        for name, expert in zip(_expert_names(results), results["experts"], strict=True)
    ]
    test = results["test"]
    return _figure(
        figures.class_accuracies(
            counts, per_class, metrics.shot_groups(counts, thresholds), experts
        ),
        "Test accuracy of each class against its number of training images. Ensemble, group means: "
        + ", ".join(f"{name} {_percent(test[name])}%" for name in ("many", "medium", "few")),
        "A point is a class under the ensemble; a line is the mean of an expert over a group.",
    )


def _curves_html(path: Path, results: Mapping[str, Any]) -> str:
    rows = _read_rows(path / "metrics.jsonl")
    train_rows = [row for row in rows if "expert_losses" in row]
    test_rows = [row for row in rows if "test_top1" in row]
    if not train_rows:
        return _absent("There are no training metrics in this folder.")
    first, last = train_rows[0], train_rows[-1]
    return _figure(
        figures.training_curves(train_rows, test_rows, _expert_names(results)),
        f"Curves over epochs {first['epoch']:.1f} to {last['epoch']:.1f}: the loss goes from "
        f"{first['loss']:.3f} to {last['loss']:.3f}.",
        "Losses are means over the steps since the row before; test accuracy is the ensemble's.",
    )


def _facts_html(results: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    config, environment = run.get("config", {}), run.get("environment", {})
    if not config:
        return _absent("There is no config.json in this folder.")
    data, optim = config["data"], config["optim"]
    versions = environment.get("versions", {})
    facts = {
        "data": f"{data['name']}, imbalance ratio {data['imbalance_ratio']:g}",
        "class counts": "as they should be for this data set"
        if run.get("data", {}).get("counts_as_published")
        else "not as they should be for this data set",
        "taus": ", ".join(f"{expert['tau']:.4g}" for expert in results["experts"]),
        "mixup": f"alpha {config['mixup']['alpha']:g}" if config["mixup"]["alpha"] else "none",
        "schedule": f"{config['total_epochs']} epochs, batch {config['batch_size']}, learning rate "
        f"{optim['learning_rate']:g} ({optim['schedule']}), weight decay "
        f"{optim['weight_decay']:g}",
        "seed": config["seed"],
        "devices": f"{environment.get('device_count')} x {environment.get('device_kind')}",
        "started": environment.get("started"),
        "source": environment.get("git_commit") or "not from a git repository",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "command": " ".join(environment.get("command", [])),
    }
    rows = "".join(
        f'<tr><th scope="row">{name}</th><td class="text"><code>{html.escape(str(value))}</code>'
        "</td></tr>"
        for name, value in facts.items()
    )
    return f'<div class="wide"><table><tbody>{rows}</tbody></table></div>'


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{heading}</h2>\n{body}\n</section>"


def _figure(svg: str, alternative: str, caption: str) -> str:
    label = html.escape(alternative, quote=True)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _absent(sentence: str) -> str:
    return f'<p class="soft">{sentence}</p>'


def _expert_names(results: Mapping[str, Any]) -> list[str]:
    return [
        f"expert {i}, tau {expert['tau']:.4g}"
        for i, expert in enumerate(results["experts"], start=1)
    ]


def _thresholds(run: Mapping[str, Any]) -> tuple[int, int]:
    data = run.get("config", {}).get("data", {})
    low, high = data.get("shot_thresholds", metrics.DEFAULT_THRESHOLDS)
    return low, high


def _predictions(path: Path) -> tuple[Any, Any]:
    folder = path / "predictions"
    try:
        logits = np.load(folder / "expert_logits.npy", mmap_mode="r", allow_pickle=False)
        return logits, np.load(folder / "labels.npy", allow_pickle=False)
    except (OSError, ValueError):
        return None, None


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None when there is no readable one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _read_rows(path: Path) -> Sequence[dict[str, Any]]:
    """The rows of a file of one object a line, without those that an interruption tore."""
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


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f}"
