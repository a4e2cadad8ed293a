# SPDX-License-Identifier: Apache-2.0
"""Figures as SVG text for a page, whose text colour and font they take.

Each is small enough to be read on a phone; a page puts several side by side. Colours can be told
apart with any colour vision (blue, vermilion, green of equal weight); marks or dashes also differ.
"""

import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from balpoe_jax.metrics import Calibration, ShotGroups

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stands for the page's text colour while matplotlib draws, and is replaced by `currentColor`.
_INK = "#010203"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "balpoe_jax",  # element names that do not differ from run to run
    # No white ground of the figure's own: it would hide the page's.
    "figure.frameon": False,
    "axes.facecolor": "none",
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
    "legend.fontsize": 8,
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_BLUE, _VERMILION, _GREEN = "#2b7bba", "#d5622b", "#169c78"
_OVER, _UNDER = "#e59a7d", "#8cc0ea"
_GROUP_COLORS = {"many": _BLUE, "medium": _VERMILION, "few": _GREEN}
_GROUP_MARKS = {"many": "o", "medium": "s", "few": "^"}
_DASHES = ("-", "--", ":", "-.")
_SIZE = (4.6, 3.3)

PRIOR_KINDS = {"none": "no prior", "prior": "known prior", "estimated": "estimated prior"}
_KIND_STYLES = {
    "none": (_INK, "o", "--"),
    "prior": (_BLUE, "s", "-"),
    "estimated": (_VERMILION, "^", "-"),
}


def reliability_diagram(title: str, calibration: Calibration, name: str) -> str:
    """Accuracy against confidence in bins, the gap to it, and how many examples each bin has.

    Args:
        title: Title of the diagram.
        calibration: Bins and errors.
        name: Prefix of the names of the figure's elements, unique on the page.
    """
    with _drawing((3.3, 3.7)) as figure:
        bins, shares = figure.subplots(2, 1, height_ratios=[3.2, 1])
        _draw_reliability(bins, calibration)
        bins.set_title(title)
        _draw_fractions(shares, calibration)
        legend = {"handlelength": 1, "columnspacing": 0.9, "handletextpad": 0.4, "fontsize": 7.5}
        figure.legend(
            *bins.get_legend_handles_labels(), loc="outside lower center", ncols=3, **legend
        )
        return _svg(figure, name)


def class_accuracies(
    class_counts: npt.NDArray, per_class: npt.NDArray[np.float64], groups: ShotGroups
) -> str:
    """The accuracy of each class against its training images.

    Args:
        class_counts: Numbers of training images by class, `[C]`.
        per_class: Accuracy of the ensemble by class, `[C]`, nan where there are no test examples.
        groups: Classes that are many, medium and few.
    """
    with _drawing(_SIZE) as figure:
        axis = figure.subplots()
        for name, members in groups._asdict().items():
            if members.any():
                axis.scatter(
                    class_counts[members],
                    per_class[members],
                    s=18,
                    color=_GROUP_COLORS[name],
                    marker=_GROUP_MARKS[name],
                    alpha=0.75,
                    linewidths=0,
                    label=f"{name} ({int(members.sum())} classes)",
                )
        axis.set(xscale="log", xlabel="training images of the class", ylabel="test accuracy")
        axis.set_ylim(-0.03, 1.03)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        figure.legend(loc="outside upper center", ncols=3, handletextpad=0.1, columnspacing=1)
        return _svg(figure, "classes")


def group_accuracies(names: Sequence[str], accuracies: Sequence[Mapping[str, float | None]]) -> str:
    """The accuracy of each expert and the ensemble in each shot group.

    Args:
        names: Names of the experts and the ensemble.
        accuracies: Accuracies of each, by group.
    """
    with _drawing(_SIZE) as figure:
        axis = figure.subplots()
        positions = np.arange(len(names))
        for i, (group, color) in enumerate(_GROUP_COLORS.items()):
            values = [_number(scores[group]) for scores in accuracies]
            axis.bar(positions + (i - 1) * 0.27, values, 0.25, color=color, label=group)
        axis.set_xticks(positions, names)
        axis.set(ylabel="test accuracy", ylim=(0, 1.0))
        figure.legend(loc="outside upper center", ncols=3)
        return _svg(figure, "groups")


def shift_accuracies(
    shift: Mapping[str, Mapping[str, float | None]],
    targets: Sequence[str],
    name: str = "shift",
    title: str = "",
) -> str:
    """Accuracy from the most forward to the most backward test set, with each kind of prior.

    Args:
        shift: Accuracy with each of `PRIOR_KINDS`, by distribution.
        targets: Short names of the distributions.
        name: Prefix of the names of the figure's elements, unique on the page.
        title: Title of the figure.
    """
    with _drawing(_SIZE) as figure:
        axis = figure.subplots()
        for kind, label in PRIOR_KINDS.items():
            color, mark, dash = _KIND_STYLES[kind]
            values = [_number(scores[kind]) for scores in shift.values()]
            axis.plot(
                range(len(targets)),
                values,
                dash,
                color=color,
                marker=mark,
                markersize=4,
                label=label,
            )
        axis.set_xticks(range(len(targets)), targets)
        axis.set(title=title, xlabel="test set", ylabel="accuracy")
        figure.legend(loc="outside upper center", ncols=3)
        return _svg(figure, name)


def marginal(
    title: str,
    class_counts: npt.NDArray,
    target: npt.NDArray[np.float64],
    expected: npt.NDArray[np.float64],
    name: str,
) -> str:
    """An expert's expected marginal over the classes against the prior that it is meant to have.

    Args:
        title: Title of the figure.
        class_counts: Numbers of training images by class, `[C]`; they order the classes.
        target: Target prior, `[C]`.
        expected: Expected marginal, `[C]`.
        name: Prefix of the names of the figure's elements, unique on the page.
    """
    order = np.argsort(-class_counts, kind="stable")
    with _drawing((3.3, 2.7)) as figure:
        axis = figure.subplots()
        ranks = np.arange(1, len(order) + 1)
        size = 12 if len(order) <= 100 else 3
        axis.scatter(
            ranks, expected[order], s=size, color=_BLUE, linewidths=0, label="expected marginal"
        )
        axis.plot(ranks, target[order], color=_VERMILION, linewidth=1.6, label="target prior")
        axis.set(title=title, yscale="log", xlabel="class, from largest to smallest")
        axis.set_ylabel("probability")
        figure.legend(loc="outside lower center", ncols=2)
        return _svg(figure, name)


def group_confusion(confusion: npt.NDArray[np.float64]) -> str:
    """The shot groups of the classes that are predicted for the examples of each shot group.

    Args:
        confusion: Fractions, `[3, 3]`, rows by label, nan in the row of an empty group.
    """
    names = list(_GROUP_COLORS)
    from matplotlib import patches

    with _drawing((3.9, 3.3)) as figure:
        axis = figure.subplots()
        for row, column in np.ndindex(3, 3):
            value = confusion[row, column]
            shade = 0.0 if np.isnan(value) else 0.85 * float(value)
            axis.add_patch(
                patches.Rectangle(
                    (column - 0.5, row - 0.5), 1, 1, facecolor=_BLUE, alpha=shade, linewidth=0
                )
            )
            text = "-" if np.isnan(value) else f"{100 * value:.1f}%"
            axis.text(column, row, text, ha="center", va="center")
        axis.set(xlim=(-0.5, 2.5), ylim=(2.5, -0.5), aspect="equal")
        axis.set_xticks(range(3), names)
        axis.set_yticks(range(3), names)
        axis.set(xlabel="group of the predicted class", ylabel="group of the true class")
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        return _svg(figure, "confusion")


def experts_curve(
    numbers: Sequence[int],
    means: Mapping[str, Sequence[float]],
    spreads: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    name: str = "experts",
) -> str:
    """Accuracy against the number of experts, over all classes and in each shot group.

    Args:
        numbers: Numbers of experts.
        means: Accuracies at each number, by "all", "many", "medium", "few".
        spreads: Lowest and highest accuracies, by the same keys; None for none.
        name: Prefix of the names of the figure's elements, unique on the page.
    """
    with _drawing(_SIZE) as figure:
        axis = figure.subplots()
        for group, values in means.items():
            color = _GROUP_COLORS.get(group, _INK)
            mark = _GROUP_MARKS.get(group, "D")
            axis.plot(numbers, values, color=color, marker=mark, markersize=4, label=group)
            if spreads:
                low, high = np.array(spreads[group], float).T
                axis.fill_between(numbers, low, high, color=color, alpha=0.15, linewidth=0)
        axis.set_xticks(list(numbers))
        axis.set(xlabel="number of experts", ylabel="test accuracy", ylim=(0, None))
        figure.legend(loc="outside upper center", ncols=4)
        return _svg(figure, name)


def training_losses(train_rows: Sequence[Mapping[str, Any]], expert_names: Sequence[str]) -> str:
    """Loss of each expert and learning rate over the epochs.

    Args:
        train_rows: Rows of `metrics.jsonl` with a loss.
        expert_names: Names in the legend.
    """
    with _drawing(_SIZE) as figure:
        losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[2.5, 1])
        epochs = [row["epoch"] for row in train_rows]
        by_expert = np.array([row["expert_losses"] for row in train_rows], float)
        colors = _expert_colors(len(expert_names))
        for i, (name, values) in enumerate(zip(expert_names, by_expert.T, strict=True)):
            dash = _DASHES[i % len(_DASHES)]
            losses.plot(epochs, values, dash, color=colors[i], linewidth=1.3, label=name)
        losses.set(ylabel="training loss", ylim=(0, None))
        losses.legend(loc="upper right")
        used = [row["learning_rate"] for row in train_rows]
        rates.step(epochs, used, where="pre", color=_INK, linewidth=1.2)
        rates.set(ylabel="rate", xlabel="epoch", ylim=(0, None))
        return _svg(figure, "losses")


def test_curves(test_rows: Sequence[Mapping[str, Any]]) -> str:
    """The ensemble's test accuracy over the epochs, all and by shot group.

    Args:
        test_rows: Rows of `metrics.jsonl` with `test_top1`.
    """
    with _drawing(_SIZE) as figure:
        axis = figure.subplots()
        epochs = [row["epoch"] for row in test_rows]
        for name, color in {"top1": _INK, **_GROUP_COLORS}.items():
            values = np.array([row[f"test_{name}"] for row in test_rows], float)
            mark = _GROUP_MARKS.get(name, "D")
            label = "all" if name == "top1" else name
            axis.plot(epochs, values, color=color, marker=mark, markersize=3.5, label=label)
        axis.set(xlabel="epoch", ylabel="test accuracy", ylim=(0, 1.02))
        figure.legend(loc="outside upper center", ncols=4)
        return _svg(figure, "tests")


def _draw_reliability(axis: "Axes", calibration: Calibration) -> None:
    """Draws bars of accuracy, the gaps to the confidence, and both errors in the corner."""
    num_bins = len(calibration.bin_fraction)
    centers = (np.arange(num_bins) + 0.5) / num_bins
    filled = calibration.bin_fraction > 0
    accuracy, confidence = calibration.bin_accuracy[filled], calibration.bin_confidence[filled]
    width = 0.94 / num_bins
    axis.bar(centers[filled], accuracy, width, color=_BLUE, label="accuracy")
    for label, color, gap in (
        ("over-confidence", _OVER, np.maximum(confidence - accuracy, 0)),
        ("under-confidence", _UNDER, np.minimum(confidence - accuracy, 0)),
    ):
        axis.bar(centers[filled], gap, width, bottom=accuracy, color=color, label=label)
    axis.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle="--")
    axis.text(
        0.04,
        0.96,
        f"ECE {100 * calibration.ece:.1f}%\nMCE {100 * calibration.mce:.1f}%",
        va="top",
        transform=axis.transAxes,
    )
    axis.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    axis.set_xticks([0, 0.5, 1], labels=[])


def _draw_fractions(axis: "Axes", calibration: Calibration) -> None:
    num_bins = len(calibration.bin_fraction)
    centers = (np.arange(num_bins) + 0.5) / num_bins
    axis.bar(centers, calibration.bin_fraction, 0.94 / num_bins, color=_INK, alpha=0.45)
    axis.set(xlim=(0, 1), xlabel="confidence", ylabel="share")
    axis.set_xticks([0, 0.5, 1], labels=["0", "0.5", "1"])


def _expert_colors(count: int) -> list[str]:
    """Colours from magenta to orange by expert, visible on white and on black."""
    import matplotlib

    plasma = matplotlib.colormaps["plasma"]
    return [matplotlib.colors.to_hex(plasma(x)) for x in np.linspace(0.38, 0.72, count)]


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


@contextlib.contextmanager
def _drawing(size: tuple[float, float]) -> Iterator["Figure"]:
    """A figure in the style of the page, to be drawn within the context."""
    # Not above: it takes a second to import, which a training need not wait for.
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=size, layout="constrained")


def _svg(figure: "Figure", name: str) -> str:
    """The `<svg>` element, the same for the same data, its element names beginning with `name`."""
    buffer = io.StringIO()
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    FigureCanvasSVG(figure).print_svg(buffer, metadata=_NO_METADATA)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    # Matplotlib counts its elements in each figure from 1, and a page has several.
    return re.sub(r'(id="|href="#|url\(#)', rf"\1{name}-", text)
