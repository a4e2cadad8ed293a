# SPDX-License-Identifier: Apache-2.0
"""Tables of numbers, as text for a terminal, Markdown, CSV."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from balpoe_jax.files import reports_write_errors

_LABEL_WIDTH = 10
_WIDE = 110
_DECIMALS = {"decimal": 3, "short": 2}


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of numbers.

    Attributes:
        name: Heading.
        kind: Kind of the numbers: "percent" for fractions, "points" for signed differences of
            fractions, "decimal" for three places, "short" for two, "p" for p-values, "number" for
            the places that it needs, or "spread" for pairs of fractions, mean and standard
            deviation (None of a single value). Text is shown as it is in any column.
        wide: Whether a terminal shows it only if there is room.
    """

    name: str
    kind: str = "percent"
    wide: bool = False

    def show(self, value: Any) -> str:
        """A cell's text; a dash where there is no value."""
        if value is None or (isinstance(value, float) and np.isnan(value)):
            return "-"
        if isinstance(value, str):
            return value
        if self.kind == "percent":
            return f"{100 * value:.1f}"
        if self.kind == "points":
            return f"{100 * value:+.1f}"
        if self.kind == "spread":
            mean, std = value
            spread = "" if std is None else f"±{100 * std:.1f}"
            return "-" if mean is None else f"{100 * mean:.1f}{spread}"
        if self.kind == "p":
            return "<0.001" if value < 0.001 else f"{value:.3f}"
        if self.kind == "number":
            return f"{value:.4g}"
        return f"{value:.{_DECIMALS[self.kind]}f}"


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of values under columns.

    Attributes:
        name: Name of its files.
        title: Title, one line.
        columns: Columns, without that of the row labels.
        rows: Label and values of each row; fractions, None where undefined.
        note: Help to read it.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: Sequence[tuple[str, Sequence[Any]]]
    note: str = ""


def as_text(table: Table, width: int = 80) -> str:
    """Aligned columns for a terminal of `width` characters, without the title."""
    shown = [i for i, column in enumerate(table.columns) if width >= _WIDE or not column.wide]
    label = max(_LABEL_WIDTH, *(len(name) for name, _ in table.rows))
    wanted = min(9, (width - label) // len(shown))
    lines = [" " * label, *(f"{name:{label}}" for name, _ in table.rows)]
    for i in shown:
        column = table.columns[i]
        cells = [column.name, *(column.show(values[i]) for _, values in table.rows)]
        cell = max(wanted, 1 + max(map(len, cells)))
        lines = [f"{line}{text:>{cell}}" for line, text in zip(lines, cells, strict=True)]
    return "\n".join(lines)


def as_markdown(table: Table) -> str:
    """A heading, the table with all columns, and the note."""
    header = ["", *(column.name for column in table.columns)]
    lines = [_pipes(header), _pipes(["---"] * len(header))]
    for name, values in table.rows:
        cells = (column.show(value) for column, value in zip(table.columns, values, strict=True))
        lines.append(_pipes([name, *cells]))
    note = f"\n{table.note}\n" if table.note else ""
    return f"## {table.title}\n\n" + "\n".join(lines) + f"\n{note}"


def as_csv(table: Table, note: str = "") -> str:
    """The table with all columns: values are fractions, and empty where undefined.

    A column of means and spreads becomes two. A note is a last column, the same in every row.
    """
    header = [""]
    for column in table.columns:
        header += [column.name, f"{column.name} std"] if column.kind == "spread" else [column.name]
    marks = [note] if note else []
    header += ["note"] if note else []
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    for name, values in table.rows:
        cells = [name]
        for column, value in zip(table.columns, values, strict=True):
            pair = value if isinstance(value, tuple) else (value, None)
            parts = pair if column.kind == "spread" else (value,)
            cells += ["" if part is None else part for part in parts]
        writer.writerow(cells + marks)
    return buffer.getvalue()


def write_files(
    folder: Path, content: Sequence[Table], heading: str, name: str = "tables", note: str = ""
) -> None:
    """Writes `NAME.md` with all tables under a heading, and a CSV file for each.

    Args:
        folder: Folder of the files, created when missing.
        content: Tables.
        heading: Heading in Markdown.
        name: Name of the Markdown file.
        note: Note on the runs for the CSV files; the heading must repeat it.

    Raises:
        UserError (a `ValueError`): the folder or a file cannot be written.
    """
    files = {f"{table.name}.csv": as_csv(table, note) for table in content}
    markdown = "\n".join(as_markdown(table) for table in content)
    files[f"{name}.md"] = f"{heading}\n\n{markdown}"
    with reports_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        with reports_write_errors(folder / file):
            (folder / file).write_text(text, encoding="utf-8")


def _pipes(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
