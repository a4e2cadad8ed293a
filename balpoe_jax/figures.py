# SPDX-License-Identifier: Apache-2.0
"""Figures of a run as SVG text, to stand inside a page: they take its text colour and font."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from balpoe_jax.metrics import Calibration, ShotGroups

# Stands for the page's text colour while matplotlib draws, and is replaced by `currentColor`.
_INK = "#010203"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "balpoe_jax",  # element names that do not differ from run to run
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}
_ENSEMBLE, _OVER, _UNDER = "#2b7bba", "#e59aa5", "#17496f"
_GROUP_COLORS = {"many": "#2b7bba", "medium": "#e08e0b", "few": "#c2185b"}
_PANELS_A_ROW = 4


def reliability_diagrams(panels: Mapping[str, Calibration]) -> str:
    """Accuracy against confidence in bins, and how many examples each bin has.

    Args:
        panels: title and calibration of each diagram.
    """
    columns = min(len(panels), _PANELS_A_ROW)
    blocks = -(-len(panels) // columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(2.5 * columns + 0.5, 3.4 * blocks), layout="constrained")
        heights = [3, 1] * blocks
        axes = figure.subplots(2 * blocks, columns, squeeze=False, height_ratios=heights)
        for axis in axes.flat[:]:
            axis.set_axis_off()
        for i, (title, calibration) in enumerate(panels.items()):
            row, column = divmod(i, columns)
            _draw_reliability(axes[2 * row, column], title, calibration, labelled=column == 0)
            _draw_fractions(axes[2 * row + 1, column], calibration, labelled=column == 0)
        handles = axes[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=min(4, 2 * columns))
        return _svg(figure, "reliability")


def class_accuracies(
    class_counts: npt.NDArray,
    per_class: npt.NDArray[np.float64],
    groups: ShotGroups,
    expert_groups: Sequence[tuple[str, Mapping[str, float]]],
) -> str:
    """The ensemble's accuracy of each class against its training images, and group means.

    Args:
        class_counts: `[C]`.
        per_class: `[C]` accuracies of the ensemble, nan where there are no test examples.
        groups: which classes are many, medium and few.
        expert_groups: name of each expert and its mean accuracy in each group.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10.5, 3.6), layout="constrained")
        axis = figure.subplots()
        for name, members in groups._asdict().items():
            axis.scatter(
                class_counts[members],
                per_class[members],
                s=18,
                color=_GROUP_COLORS[name],
                alpha=0.75,
                label=f"{name}-shot classes ({int(members.sum())})",
            )
        for (name, means), color in zip(
            expert_groups, _expert_colors(len(expert_groups)), strict=True
        ):
            label: str | None = f"{name}, group means"
            for group, members in groups._asdict().items():
                if members.any():
                    counts = class_counts[members]
                    ends = [counts.min() / 1.06, counts.max() * 1.06]
                    axis.plot(ends, [means[group]] * 2, color=color, linewidth=2, label=label)
                    label = None
        axis.set(xscale="log", xlabel="training images of the class", ylabel="test accuracy")
        axis.set_ylim(-0.03, 1.03)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return _svg(figure, "classes")


def training_curves(
    train_rows: Sequence[Mapping[str, Any]],
    test_rows: Sequence[Mapping[str, Any]],
    expert_names: Sequence[str],
) -> str:
    """Loss of each expert, learning rate, and test accuracy over the epochs.

    Args:
        train_rows: rows of `metrics.jsonl` with a loss.
        test_rows: those with `test_top1`.
        expert_names: for the legend.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10.5, 2.7), layout="constrained")
        losses, rates, tests = figure.subplots(1, 3, sharex=True)
        epochs = [row["epoch"] for row in train_rows]
        by_expert = np.array([row["expert_losses"] for row in train_rows], float)
        for name, values, color in zip(
            expert_names, by_expert.T, _expert_colors(len(expert_names)), strict=True
        ):
            losses.plot(epochs, values, color=color, linewidth=1.2, label=name)
        losses.set(title="training loss", xlabel="epoch", ylim=(0, None))
        losses.legend()
        rates.step(
            epochs, [row["learning_rate"] for row in train_rows], where="pre", color=_ENSEMBLE
        )
        rates.set(title="learning rate", xlabel="epoch", ylim=(0, None))
        for name, color in {"top1": _INK, **_GROUP_COLORS}.items():
            values = np.array([row[f"test_{name}"] for row in test_rows], float)
            label = "all" if name == "top1" else name
            marks = "o" if len(values) < 20 else None
            tests.plot(
                [row["epoch"] for row in test_rows],
                values,
                color=color,
                marker=marks,
                markersize=3,
                linewidth=1.2,
                label=label,
            )
        tests.set(title="test accuracy", xlabel="epoch", ylim=(0, 1.02))
        tests.legend()
        return _svg(figure, "curves")


def _draw_reliability(axis: Axes, title: str, calibration: Calibration, labelled: bool) -> None:
    num_bins = len(calibration.bin_fraction)
    centers = (np.arange(num_bins) + 0.5) / num_bins
    filled = calibration.bin_fraction > 0
    accuracy, confidence = calibration.bin_accuracy[filled], calibration.bin_confidence[filled]
    axis.set_axis_on()
    axis.bar(centers[filled], accuracy, 0.92 / num_bins, color=_ENSEMBLE, label="accuracy")
    for label, color, gap in (
        ("over-confidence", _OVER, np.maximum(confidence - accuracy, 0)),
        ("under-confidence", _UNDER, np.minimum(confidence - accuracy, 0)),
    ):
        axis.bar(centers[filled], gap, 0.92 / num_bins, bottom=accuracy, color=color, label=label)
    axis.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle="--", label="calibrated")
    axis.set(
        title=f"{title}\nECE {100 * calibration.ece:.1f}%, MCE {100 * calibration.mce:.1f}%",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    axis.set_xticks([0, 0.5, 1], labels=[])
    if labelled:
        axis.set_ylabel("accuracy")


def _draw_fractions(axis: Axes, calibration: Calibration, labelled: bool) -> None:
    num_bins = len(calibration.bin_fraction)
    centers = (np.arange(num_bins) + 0.5) / num_bins
    axis.set_axis_on()
    axis.bar(centers, calibration.bin_fraction, 0.92 / num_bins, color=_INK, alpha=0.45)
    axis.set(xlim=(0, 1), xlabel="confidence")
    axis.set_xticks([0, 0.5, 1], labels=["0", "0.5", "1"])
    if labelled:
        axis.set_ylabel("share of\nexamples")


def _expert_colors(count: int) -> list[str]:
    """From violet to orange, in the order of the experts."""
    plasma = matplotlib.colormaps["plasma"]
    return [matplotlib.colors.to_hex(plasma(x)) for x in np.linspace(0.25, 0.75, count)]


def _svg(figure: Figure, name: str) -> str:
    """The `<svg>` element, the same for the same data, its element names beginning with `name`."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # The figure's white ground would hide the page's own.
    text = re.sub(r'<g id="patch_1">.*?</g>', "", text, count=1, flags=re.DOTALL)
    text = re.sub(r"fill: #ffffff", "fill: none", text)
    return re.sub(r'(id="|href="#|url\(#)', rf"\1{name}-", text)
