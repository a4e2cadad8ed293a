# SPDX-License-Identifier: Apache-2.0
"""The scores of a table of the paper, and ours over the seeds that are done."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from balpoe_jax import files
from balpoe_jax.errors import UserError
from balpoe_jax.reporting import tables
from balpoe_jax.reporting.runs import Run, RunGroup, Spread, load_run
from balpoe_jax.reporting.tables import Column, Table
from balpoe_jax.reproduce.jobs import Job
from balpoe_jax.reproduce.paper import PaperTable
from balpoe_jax.run import record


@dataclasses.dataclass(frozen=True)
class MeasuredFigure:
    """A score of a row: the paper's and ours, as fractions.

    Attributes:
        method: Name of the row.
        score: Name of the column.
        paper: Published mean and deviation; both None where the paper prints nothing.
        ours: Mean and deviation over our seeds; both None if nothing has been run.
        runs: Runs that are done.
        network: Network that the paper's score was measured on.
    """

    method: str
    score: str
    paper: Spread
    ours: Spread
    runs: tuple[Run, ...]
    network: str = ""

    @property
    def sizes(self) -> list[int | None]:
        """What our network costs, under `tables.SIZE_COLUMNS`; None when nothing has been run."""
        return RunGroup(self.method, self.runs).sizes

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's."""
        if self.paper.mean is None or self.ours.mean is None:
            return None
        return self.ours.mean - self.paper.mean

    @property
    def seeds(self) -> str:
        """The seeds that are done, separated by commas, or "not run"."""
        return ",".join(str(run.seed) for run in self.runs) or "not run"


def collect(table: PaperTable, jobs: Sequence[Job]) -> list[MeasuredFigure]:
    """Every score of a table, ours over the seeds that are done.

    Raises:
        UserError (a `ValueError`): a run whose files are damaged, or of another config, or runs of
            a row that were evaluated with different settings.
    """
    entries = []
    for row in table.rows:
        done = [job for job in jobs if job.experiment == row.experiment and job.state() == "done"]
        runs = tuple(load_run(job.workdir) for job in done)
        _refuse_mixed_settings(runs)
        for score in row.scores:
            published = (
                None if value is None else value / 100 for value in (score.paper, score.paper_std)
            )
            ours = RunGroup(row.method, runs).spread(*score.keys)
            entries.append(
                MeasuredFigure(
                    row.method, score.name, Spread(*published), ours, runs, row.paper_network
                )
            )
    return entries


def _refuse_mixed_settings(runs: Sequence[Run]) -> None:
    """Raises UserError unless runs of one experiment were evaluated alike."""
    for run in runs[1:]:
        first, other = runs[0].fields, run.fields
        for name in (name for name in first if name.startswith("eval.")):
            if first[name] != other.get(name):
                raise UserError(
                    f"{runs[0].path} and {run.path} were evaluated with different settings ({name} "
                    f"{first[name]!r} and {other.get(name)!r}); evaluate them alike, with "
                    "--mode=eval."
                )


def result_table(title: str, entries: Sequence[MeasuredFigure]) -> Table:
    """Lines for each method: the paper's scores if there are any, ours, and the difference."""
    names = tuple(dict.fromkeys(entry.score for entry in entries))
    spread, points = Column("", "spread"), Column("", "points")
    sizes = tuple(tables.SIZE_COLUMNS.values())
    none = ["" for _ in sizes]
    rows: list[tuple[str, list[str]]] = []
    for method in dict.fromkeys(entry.method for entry in entries):
        own = [entry for entry in entries if entry.method == method]
        first = own[0]
        rows.append((method, ["" for _ in own] + none))
        if any(entry.paper.mean is not None for entry in own):
            paper = [spread.show(entry.paper) for entry in own]
            rows.append((f"  paper, {first.network}" if first.network else "  paper", paper + none))
        if not first.runs:
            rows.append(("  ours: not run", ["-" for _ in own] + none))
            continue
        ours = [spread.show(entry.ours) for entry in own]
        cost = [column.show(value) for column, value in zip(sizes, first.sizes, strict=True)]
        rows.append((f"  ours, seeds {first.seeds}", ours + cost))
        if any(entry.difference is not None for entry in own):
            rows.append(("  difference", [points.show(x.difference) for x in own] + none))
    return Table(
        "result",
        title,
        (*(Column(name) for name in names), *sizes),
        rows,
        "Percent; mean ± sample standard deviation over seeds, last epoch. A dash is a figure that "
        f"the paper does not print, or that has not been measured. {tables.SIZE_NOTE}",
    )


def entries_table(title: str, entries: Sequence[MeasuredFigure], root: Path) -> Table:
    """A line for each score, with the paths of its runs' logs below `root`."""
    columns = (
        Column("score"),
        Column("paper", "spread"),
        Column("ours", "spread"),
        Column("difference", "points"),
        Column("paper's network"),
        *tables.SIZE_COLUMNS.values(),
        Column("seeds"),
        Column("logs"),
    )
    rows = [
        (
            entry.method,
            [
                entry.score,
                entry.paper,
                entry.ours,
                entry.difference,
                entry.network,
                *entry.sizes,
                entry.seeds,
                " ".join(str(run.path.relative_to(root) / files.LOG) for run in entry.runs),
            ],
        )
        for entry in entries
    ]
    return Table("entries", title, columns, rows)


def write(
    root: Path, name: str, content: Table, entries: Sequence[MeasuredFigure], note: str
) -> None:
    """Writes `NAME.md` for people; `NAME.csv` and `NAME.json` with a line for each score.

    Args:
        root: Folder of all runs, created when missing.
        name: Name of the files.
        content: Table that `result_table` made.
        entries: Scores in the table.
        note: Note on the runs, for the CSV and the JSON file.

    Raises:
        UserError (a `ValueError`): a folder or a file that cannot be written.
    """
    record.open_workdir(str(root))
    long = entries_table(content.title, entries, root)
    logs = "\n".join(
        f"- {method}: {cells[-1] or 'not run'}" for method, cells in dict(long.rows).items()
    )
    files.write_atomically(root / f"{name}.md", f"{tables.as_markdown(content)}\nLogs:\n\n{logs}\n")
    files.write_atomically(root / f"{name}.csv", tables.as_csv(long, note))
    written = {
        "title": content.title,
        "note": note,
        "rows": [
            {"method": method, **dict(zip((c.name for c in long.columns), cells, strict=True))}
            for method, cells in long.rows
        ],
    }
    files.write_atomically(
        root / f"{name}.json", json.dumps(files.to_json(written), indent=2) + "\n"
    )
