# SPDX-License-Identifier: Apache-2.0
"""The results of `accelerator` as Markdown, for `benchmarks/README.md` and for `results/`."""

from collections.abc import Iterable, Sequence
from typing import Any

from balpoe_jax.reporting import tables
from balpoe_jax.reporting.runs import spread
from balpoe_jax.reproduce.paper import PaperFigure, PaperRow
from benchmarks.sides import Row

_SCORES = {
    "held-out": "held_out", "ACC": "top1", "many": "many", "medium": "medium", "few": "few",
    "ECE": "ece", "MCE": "mce",
}  # fmt: skip

OTHER_DRAW = (
    "The data set is not in the order of the archive: the training images are another draw of the "
    "published counts, so that the figures are not of the paper's images."
)
BELIEVED = (
    "The training images are believed to be the paper's: labels begin in the archive's order."
)
GENERATED = "Images are generated: the figures mean nothing."
TOY = "This is a toy run with tiny networks: it shows that all works, and its figures mean nothing."


def benchmarks(rows: Sequence[Row]) -> str:
    """Step times, first losses and bits.

    Args:
        rows: List of all results.
    """
    timed = [row for row in rows if "ms_a_step" in row]
    columns = (
        tables.Column("how"),
        tables.Column("ms a step", "decimal"),
        tables.Column("range"),
        tables.Column("images/s"),
        tables.Column("TFLOP/s", "short"),
        tables.Column("data wait"),
        tables.Column("PyTorch/this", "short"),
    )
    lines = [(_network(row), _step_cells(row, _torch_time(row, timed))) for row in timed]
    table = tables.Table(
        "benchmarks",
        "Training step on an accelerator",
        columns,
        lines,
        "Three experts; one update on all images of a batch. Range: of five rounds. Data wait: "
        "share of the time in which the step waited for its plan. PyTorch/this: time of PyTorch's "
        "step of the same network, batch and precision (CUDA graph if measured, else eager) over "
        f"this one's; above 1, this one is faster. {_about(rows)}",
    )
    return tables.as_markdown(table) + "".join(f"\n- {line}" for line in _notes(rows)) + "\n"


def _network(row: Row) -> str:
    return f"{row['network']} x 3, batch {row['batch']}, {row['dtype']}"


def _step_cells(row: Row, torch_time: float | None) -> list[Any]:
    if "how" in row:
        how = f"PyTorch, {'CUDA graph' if row['how'] == 'graph' else row['how']}"
    else:
        steps = row["steps_a_dispatch"]
        inputs = "ready batch" if row["dispatch"] == "ready" else f"device pipeline, K={steps}"
        flags = ", conv fusion" if row["side"] == "conv_fusion" else ""
        how = f"{row['mode']}, {row['expert_map']}, {inputs}{flags}"
    return [
        how,
        row["ms_a_step"],
        f"{row['ms_low']:.3f} to {row['ms_high']:.3f}",
        f"{row['images_per_second']:,.0f}",
        row.get("tflops"),
        row.get("data_wait"),
        torch_time / row["ms_a_step"] if torch_time else None,
    ]


def _torch_time(row: Row, timed: Iterable[Row]) -> float | None:
    """Milliseconds of PyTorch's step of the same kind: of a CUDA graph if there is one."""
    same = ("network", "batch", "dtype")
    found = {
        other["how"]: other["ms_a_step"]
        for other in timed
        if "how" in other and all(other[name] == row[name] for name in same)
    }
    return found.get("graph", found.get("eager"))


def _notes(rows: Sequence[Row]) -> list[str]:
    """Lines on first losses, on equal bits, and on what is not measured and why."""
    lines = []
    for row in rows:
        where = f"{row['part']}, {row['side']}: {_label(row)}"
        if "agrees" in row:
            verdict = "agree" if row["agrees"] else "DIFFER"
            lines.append(
                f"First losses of {row['network']} ({row['side']}, {row['precision']} precision) "
                f"and PyTorch's {verdict}: {_losses(row['losses'])} and "
                f"{_losses(row['torch_losses'])}."
            )
        elif "equal" in row:
            verdict = "the same bits" if row["equal"] else "other bits"
            lines.append(f"Two runs, {row['flags']}: {verdict} after {row['steps']} steps.")
        elif "skipped" in row:
            lines.append(f"Not measured ({where}): {row['skipped']}.")
        elif "error" in row:
            lines.append(f"Failed ({where}): {row['error']}.")
    return lines


def _label(row: Row) -> str:
    parts = ("network", "batch", "dtype", "how", "expert_map", "mode", "dispatch", "row", "seed")
    return " ".join(str(row[name]) for name in parts if name in row) or "all"


def _losses(losses: Iterable[float]) -> str:
    return ", ".join(f"{loss:.5f}" for loss in losses)


def results(rows: Sequence[Row], wanted: Sequence[PaperRow]) -> str:
    """Trained rows, and what is published of them.

    Args:
        rows: List of all results.
        wanted: Rows to show.
    """
    trained = [row for row in rows if "top1" in row]
    lines = []
    for paper in wanted:
        runs = [row for row in trained if row["name"] == paper.experiment.name]
        cells: list[Any] = [str(len(runs))]
        for key in _SCORES.values():
            found = spread([run[key] for run in runs if run.get(key) is not None])
            cells.append((found.mean, found.std) if found.mean is not None else None)
        cells += [runs[0].get(key) if runs else None for key in tables.SIZE_COLUMNS]
        seconds = [run["seconds"] for run in runs]
        cells.append(f"{sum(seconds) / len(seconds):.0f}" if seconds else None)
        lines.append((paper.method, [*cells, *_published(paper)]))
    columns = (
        tables.Column("seeds"),
        *(tables.Column(name, "spread") for name in _SCORES),
        *tables.SIZE_COLUMNS.values(),
        tables.Column("seconds a seed"),
        *(tables.Column(f"paper's {name}") for name in ("ACC", "ECE", "MCE")),
    )
    table = tables.Table(
        "results",
        "CIFAR-100-LT on an accelerator, at full scale",
        columns,
        lines,
        "Percent, last epoch; mean and standard deviation over seeds. Held-out: balanced accuracy "
        "on training images that were held out. Seconds: from the start of the run to its report, "
        f"compilation included. A dash is not measured. {tables.SIZE_NOTE} {_draw(rows)} "
        f"{_about(rows)}",
    )
    left_out = [
        f"{row.get('row', row['part'])}, seed {row.get('seed', 1)}: "
        f"{row.get('skipped') or row.get('error')}."
        for row in rows
        if row["part"] in ("table2", "seeds") and ("skipped" in row or "error" in row)
    ]
    return tables.as_markdown(table) + "".join(f"\n- {line}" for line in left_out) + "\n"


def _published(row: PaperRow) -> list[str | None]:
    published = {score.name: score for score in row.scores}
    names = ("ACC", "ECE", "MCE")
    return [_figure(published[name]) if name in published else None for name in names]


def _figure(score: PaperFigure) -> str | None:
    if score.paper is None:
        return None
    return f"{score.paper:.1f}" + ("" if score.paper_std is None else f"±{score.paper_std:.1f}")


def _draw(rows: Iterable[Row]) -> str:
    """A sentence on the images that the figures are for."""
    for row in rows:
        if row["part"] == "data" and "archive_order" in row:
            if row["generated"]:
                return GENERATED
            return BELIEVED if row["archive_order"] else OTHER_DRAW
    return "There were no data."


def _about(rows: Iterable[Row]) -> str:
    """Device, driver, versions and date."""
    rows = list(rows)
    toy = TOY if any(row.get("toy") for row in rows) else ""
    device = next((row for row in rows if row.get("part") == "device" and "kind" in row), None)
    if device is None:
        return f"The device is not known. {toy}".strip()
    driver = f", driver: {device['driver']}" if device["driver"] else ""
    packages = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "torch")
    versions = [f"{name} {device[name]}" for name in packages if name in device]
    return (
        f"{device['kind']} ({device['platform']}){driver}; Python {device['python']}, "
        f"{', '.join(versions)}; {device['date']}. {toy}".strip()
    )
