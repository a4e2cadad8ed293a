# SPDX-License-Identifier: Apache-2.0
"""Finished runs, read from their files: found, grouped over seeds, averaged."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from balpoe_jax import files
from balpoe_jax.errors import UserError
from balpoe_jax.reporting import schema
from balpoe_jax.run import record


@dataclasses.dataclass(frozen=True)
class Run:
    """One evaluated run.

    Attributes:
        path: Workdir of the run.
        recorded: Record of the run, from its `config.json`.
        results: Content of its `results.json`.
    """

    path: Path
    recorded: schema.RunRecord
    results: Mapping[str, Any]

    @property
    def seed(self) -> int:
        """Seed of initialisation, order, augmentation and mixing."""
        return self.recorded.seed

    @property
    def fields(self) -> dict[str, Any]:
        """The fields on which its figures depend, of training and of evaluation, by dotted names.

        Of an older evaluation that did not record its settings, only the number of bins is known.
        """
        settings = self.results.get("settings") or {"num_bins": self.results.get("num_bins")}
        return record.experiment_fields(self.recorded.config) | {
            f"eval.{name}": settings.get(name) for name in record.EVALUATION_SETTINGS
        }


@dataclasses.dataclass(frozen=True)
class RunGroup:
    """Runs of one experiment, evaluated alike, that differ in their seed.

    Attributes:
        name: Short name for tables.
        runs: Runs in the order of their seeds, at least one.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def note(self) -> str:
        """The notes on the runs, each once; empty where there is none."""
        return "; ".join(dict.fromkeys(filter(None, self.values("note"))))

    def values(self, *keys: Any) -> list[Any]:
        """The value in `results.json` of every run under these keys; None where it is absent."""
        return [_look_up(run.results, keys) for run in self.runs]

    def spread(self, *keys: Any) -> "Spread":
        """Mean and standard deviation of a figure over the seeds."""
        return spread(self.values(*keys))


class Spread(NamedTuple):
    """Mean and sample standard deviation; None without values, or without two of them."""

    mean: float | None
    std: float | None


def spread(values: Sequence[float | None]) -> Spread:
    """Mean and standard deviation (by n - 1) of the values that are defined."""
    defined = [value for value in values if value is not None]
    mean = float(np.mean(defined)) if defined else None
    return Spread(mean, float(np.std(defined, ddof=1)) if len(defined) > 1 else None)


def significance(first: Sequence[float | None], second: Sequence[float | None]) -> float | None:
    """Two-sided p-value of Welch's t-test that two means are equal; None with fewer than two each.

    With a few seeds the test is weak: a large value does not show that there is no difference.
    """
    one, two = ([value for value in values if value is not None] for values in (first, second))
    if min(len(one), len(two)) < 2 or not (np.ptp(one) or np.ptp(two)):
        return None
    from scipy import stats  # not above: it takes seconds to import

    sizes = [(np.mean(values), np.std(values, ddof=1), len(values)) for values in (one, two)]
    return float(stats.ttest_ind_from_stats(*sizes[0], *sizes[1], equal_var=False).pvalue)


def load_run(path: Path) -> Run:
    """Reads a run's files.

    Raises:
        UserError (a `ValueError`): a folder without them, or files that are damaged.
    """
    results, recorded = schema.load_results(path), schema.load_config(path)
    if results is None or recorded is None:
        raise UserError(
            f"{path} holds no evaluated run (a {files.RESULTS} and a {files.CONFIG}); "
            "train or evaluate it first, with --workdir."
        )
    return Run(path, recorded, results)


def find_runs(folders: Sequence[str]) -> list[Run]:
    """The runs in folders, each a workdir or a folder that holds some at any depth.

    Raises:
        UserError (a `ValueError`): a folder without any evaluated run.
    """
    found: dict[Path, Run] = {}
    for folder in folders:
        path = Path(folder).expanduser().absolute()
        inside = sorted(item.parent for item in path.rglob(files.RESULTS))
        for workdir in inside or [path]:
            found[workdir] = load_run(workdir)
    return list(found.values())


def group_runs(runs: Sequence[Run]) -> list[RunGroup]:
    """Groups runs that differ in nothing but the seed, in the order of their first run.

    Raises:
        UserError (a `ValueError`): two runs of an experiment with one seed, or two data sets.
    """
    names = {run.recorded.dataset for run in runs}
    if len(names) > 1:
        raise UserError(
            f"Runs on different data sets cannot be compared ({', '.join(sorted(names))}); name "
            "runs on one."
        )
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(str(sorted({**run.fields, "seed": None}.items())), []).append(run)
    for members in grouped.values():
        by_seed: dict[int, Run] = {}
        for run in members:
            if run.seed in by_seed:
                raise UserError(
                    f"{by_seed[run.seed].path} and {run.path} are the same experiment with the "
                    f"same seed {run.seed}; name one of them."
                )
            by_seed[run.seed] = run
        members.sort(key=lambda run: run.seed)
    return [
        RunGroup(name, tuple(members))
        for name, members in zip(
            _name_groups(list(grouped.values())), grouped.values(), strict=True
        )
    ]


def differing_fields(groups: Sequence[RunGroup]) -> dict[str, list[Any]]:
    """The fields in which groups differ, with each group's value."""
    fields = [group.runs[0].fields for group in groups]
    names = sorted(set().union(*fields) - {"seed"})
    values = {name: [field.get(name) for field in fields] for name in names}
    return {name: row for name, row in values.items() if any(v != row[0] for v in row)}


def _name_groups(grouped: Sequence[Sequence[Run]]) -> list[str]:
    """Names by the folder above the seeds if these differ, otherwise by the first run's folder.

    A start that all names share, up to an underscore or the like, is left out.
    """
    above = [members[0].path.parent.name for members in grouped]
    own = [members[0].path.name for members in grouped]
    pairs = [f"{one}/{two}" for one, two in zip(above, own, strict=True)]
    seeded = any(len(members) > 1 for members in grouped)
    for names in ([above] if seeded else []) + [own, above, pairs]:
        if len(set(names)) == len(grouped):
            start = _common_words(names) if len(names) > 1 else 0
            return [name[start:] for name in names]
    return [str(members[0].path) for members in grouped]


def _common_words(names: Sequence[str]) -> int:
    """Length of the start that all names share, up to a separator."""
    length = 0
    for position, characters in enumerate(zip(*names, strict=False), start=1):
        if len(set(characters)) > 1:
            break
        if characters[0] in "_-/":
            length = position
    return length


def _look_up(results: Any, keys: Sequence[Any]) -> Any:
    for key in keys:
        try:
            results = results[key]
        except (KeyError, IndexError, TypeError):
            return None
    return results
