# SPDX-License-Identifier: Apache-2.0
"""Test sets with other class distributions: forward, uniform and backward. NumPy only.

A forward set has most examples in the classes where the training set has most, a backward set where
it has fewest. For CIFAR they follow a rule. Those of ImageNet-LT and iNaturalist 2018 were
published as lists of files (SADE, which BalPoE follows).
"""

import dataclasses
import glob
import logging
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from balpoe_jax.data.long_tail import check_counts, class_counts, exponential_counts, select_indices
from balpoe_jax.errors import UserError

log = logging.getLogger(__name__)

UNIFORM = "uniform"


@dataclasses.dataclass(frozen=True)
class TestDistribution:
    """A part of the test set with its own class distribution.

    Attributes:
        name: Name such as "forward50", "uniform" or "backward50".
        indices: Positions in the test set, int64 `[M]`.
        counts: Examples of each class, int64 `[C]`.
        origin: "whole test set", "rule", or the name of the list's file.
    """

    name: str
    indices: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    origin: str

    @property
    def prior(self) -> npt.NDArray[np.float64]:
        """The class frequencies, float64 `[C]`."""
        return self.counts / self.counts.sum()


def make_targets(
    labels: npt.NDArray[np.integer],
    train_counts: npt.NDArray[np.int64],
    ratios: Sequence[float],
    names: npt.NDArray[np.str_] | None = None,
    lists: str = "",
) -> list[TestDistribution]:
    """All target distributions from the most forward to the most backward.

    Args:
        labels: Classes of the test set, int `[N]`.
        train_counts: Training images of each class, int `[C]`; their order defines "forward".
        ratios: Ratios of the largest class to the smallest; each gives a forward and a backward
            set.
        names: Names of the examples in the list files, str `[N]`.
        lists: File names or patterns of published lists, separated by commas. A distribution
            without a list follows the rule, and is left out if that leaves no example.

    Raises:
        UserError (a `ValueError`): a list that cannot be read or is of another data set, a ratio
            below 1, or two that are nearly equal.
    """
    ratios = sorted(set(ratios))
    listed = {
        name: _read_list(path, labels, len(train_counts), names)
        for name, path in _find_lists(lists).items()
    }
    forward = {_name("forward", ratio): ("forward", ratio) for ratio in reversed(ratios)}
    backward = {_name("backward", ratio): ("backward", ratio) for ratio in ratios}
    if len(backward) < len(ratios):
        raise UserError(
            f"Two of the ratios {', '.join(map(str, ratios))} have one name; give "
            "--config.eval.shift_ratios that differ in six digits."
        )
    rules = {**forward, UNIFORM: None, **backward}
    unknown = sorted(set(listed) - set(rules))
    if unknown:
        raise UserError(
            f"There is a list for {', '.join(unknown)}, but the ratios to evaluate are "
            f"{', '.join(f'{ratio:g}' for ratio in ratios)}; add its ratio with "
            "--config.eval.shift_ratios."
        )
    targets = []
    for name, rule in rules.items():
        if rule is None:
            indices, origin = np.arange(len(labels)), "whole test set"
        elif name in listed:
            indices, origin = listed[name]
        else:
            indices, origin = _select_by_rule(labels, train_counts, *rule), "rule"
        if not len(indices):
            log.warning("Too few test examples for the target distribution %s: left out", name)
            continue
        counts = class_counts(labels[indices], len(train_counts))
        targets.append(TestDistribution(name, indices, counts, origin))
    return targets


def shifted_counts(
    test_counts: npt.ArrayLike, train_counts: npt.ArrayLike, ratio: float, backward: bool
) -> npt.NDArray[np.int64]:
    """Examples to keep of each class: the exponential profile over the ranks of training counts.

    This is the reference's rule: for CIFAR, `int(max * (1/ratio)**(rank / (C-1)))`, where ranks run
    from the largest training class to the smallest, or the other way round.

    Args:
        test_counts: Test images of each class, int `[C]`. The profile starts at the size of the
            smallest class that is not empty; an empty class stays empty.
        train_counts: Training images of each class, int `[C]`; equal counts rank by class.
        ratio: Size of the largest class over the smallest, at least 1.
        backward: Whether the smallest training class is the largest here.

    Returns:
        int64 `[C]`; a class may be empty where the ratio exceeds the class size.
    """
    test_counts, train_counts = check_counts(test_counts), check_counts(train_counts)
    if len(test_counts) != len(train_counts) or not test_counts.any():
        raise UserError(
            f"Expected test counts of {len(train_counts)} classes, as of training, that are not "
            f"all zero, got {len(test_counts)}."
        )
    ranks = np.argsort(-train_counts, kind="stable")
    largest = int(test_counts[test_counts > 0].min())
    counts = np.empty(len(train_counts), np.int64)
    counts[ranks] = exponential_counts(len(train_counts), largest, ratio, reverse=backward)
    return np.minimum(counts, test_counts)


def _select_by_rule(
    labels: npt.NDArray[np.integer],
    train_counts: npt.NDArray[np.int64],
    direction: str,
    ratio: float,
) -> npt.NDArray[np.int64]:
    test_counts = class_counts(labels, len(train_counts))
    counts = shifted_counts(test_counts, train_counts, ratio, direction == "backward")
    return select_indices(labels, counts)  # seed 0 for each set, as in the reference


def _name(direction: str, ratio: float) -> str:
    return f"{direction}{ratio:g}"


def _parse_name(text: str) -> tuple[str, float]:
    """Direction and ratio that a name or a file name ends in."""
    found = re.search(r"(forward|backward)[_-]?(\d+(?:\.\d+)?)$", text)
    if not found:
        raise UserError(
            f"Cannot tell the distribution from the list name {text!r}; it should end in forward "
            "or backward and the ratio, such as ImageNet_LT_forward50.txt."
        )
    return found[1], float(found[2])


def _find_lists(lists: str) -> dict[str, Path]:
    """List files by the name of their distribution."""
    found: dict[str, Path] = {}
    for pattern in filter(None, (item.strip() for item in lists.split(","))):
        try:
            paths = sorted(glob.glob(str(Path(pattern).expanduser())))
        except (OSError, ValueError, RuntimeError) as error:  # no such user, or no name of a file
            raise UserError(
                f"The list file {pattern!r} cannot be looked for ({error}); check "
                "--config.eval.shift_lists."
            ) from error
        if not paths:
            raise UserError(f"There is no list file {pattern}; check --config.eval.shift_lists.")
        for path in map(Path, paths):
            direction, ratio = _parse_name(path.stem)
            name = _name(direction, ratio)
            if name in found:
                raise UserError(
                    f"Two list files are for {name}: {found[name]} and {path}; name those of one "
                    "data set with --config.eval.shift_lists."
                )
            found[name] = path
    return found


def _read_list(
    path: Path,
    labels: npt.NDArray[np.integer],
    num_classes: int,
    names: npt.NDArray[np.str_] | None,
) -> tuple[npt.NDArray[np.int64], str]:
    """Positions of the examples of a list, in its order, and the name of its file."""
    if names is None:
        raise UserError(f"The list {path} cannot be used: this test set's examples have no names.")
    positions = {str(name): i for i, name in enumerate(names)}
    if not path.is_file():  # such as a device, which might never end
        raise UserError(f"The list {path} is no file; check --config.eval.shift_lists.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"The list {path} cannot be read ({error}).") from error
    indices: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        file, _, label = line.strip().rpartition(" ")
        here = f"Line {number} of {path} ({line.strip()[:200]!r})"
        if not re.fullmatch("[0-9]{1,9}", label) or not file:
            raise UserError(f"{here} is not `path label`.")
        index = _find_example(file, positions)
        if index is None:
            raise UserError(f"{here} matches no example of the test set; is it another data set's?")
        if int(label) != labels[index]:
            raise UserError(
                f"{here} has another label than the test set's {labels[index]} of {num_classes} "
                "classes; is it another data set's?"
            )
        if index in indices:
            raise UserError(f"{here} repeats line {indices[index]}.")
        indices[index] = number
    if not indices:
        raise UserError(f"The list {path} is empty.")
    return np.fromiter(indices, np.int64), path.name


def _find_example(file: str, positions: dict[str, int]) -> int | None:
    """The position of an example by its path, its name, or its name without the suffix."""
    path = PurePosixPath(file)
    for name in (file, path.name, path.stem):
        if name in positions:
            return positions[name]
    return None
