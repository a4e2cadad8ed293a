# SPDX-License-Identifier: Apache-2.0
"""The result of a run for people: a table for the terminal and a page with figures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_COLUMNS = ("tau", "all", "many", "medium", "few", "ECE", "MCE")


def result_table(results: Mapping[str, Any]) -> str:
    """A row for each expert and one for the ensemble, in percent, 80 characters wide or less.

    Args:
        results: what `results.json` holds.
    """
    lines = ["".join([f"{'':10}", *(f"{name:>9}" for name in _COLUMNS)])]
    for name, tau, scores in table_rows(results):
        cells = [f"{tau:>9}", *(f"{_percent(score):>9}" for score in scores)]
        lines.append("".join([f"{name:10}", *cells]))
    return "\n".join(lines)


def table_rows(results: Mapping[str, Any]) -> list[tuple[str, str, list[float | None]]]:
    """Name, tau and scores (fractions, None where undefined) of each row of the result table."""
    keys = ("top1", "many", "medium", "few", "ece", "mce")
    rows = [
        (f"expert {i}", f"{expert['tau']:g}", [expert[key] for key in keys])
        for i, expert in enumerate(results["experts"], start=1)
    ]
    return [*rows, ("ensemble", "", [results["test"][key] for key in keys])]


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def write_report(workdir: str) -> Path:
    """Writes `report/index.html` and returns its path."""
    page = Path(workdir).absolute() / "report" / "index.html"
    page.parent.mkdir(exist_ok=True)
    return page
