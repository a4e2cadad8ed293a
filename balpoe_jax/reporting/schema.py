# SPDX-License-Identifier: Apache-2.0
"""`results.json` and `config.json` of a run, read and checked.

Both may come from another version, from an interruption or from an editor. A reader can rely on the
shapes below; a file of another shape is refused with one sentence.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from balpoe_jax import files, metrics
from balpoe_jax.errors import UserError
from balpoe_jax.renames import current_name, current_values, rename_fields

# A shape of plain values is the name of a kind, a list of one shape for lists of it, or an object's
# keys with their shapes. A key that ends in "?" may be missing or null, "*" stands for any key, and
# keys that are not listed may hold anything.
_COUNT, _NUMBER, _TEXT = "a whole number", "a number", "text"
_FIGURE = "a number or null"

_ACCURACIES = dict.fromkeys(("top1", "many", "medium", "few"), _FIGURE)
_CALIBRATION = dict.fromkeys(("ece", "mce", "adaptive_ece", "nll", "brier"), _FIGURE)
_ERRORS = dict.fromkeys(("ece", "mce"), _FIGURE)
_OTHERS = dict.fromkeys(("balanced?", "adaptive_ece?", "nll?", "brier?"), _FIGURE)
_SCORES = {**_ACCURACIES, **_ERRORS, **_OTHERS}
_BY_GROUP = dict.fromkeys(("many", "medium", "few"), _CALIBRATION)
_TEMPERATURE = {"value": _NUMBER, "ece": _FIGURE, "nll": _FIGURE, "groups?": _BY_GROUP}
_BY_PRIOR = dict.fromkeys(("none", "prior", "estimated"), _FIGURE)

_RESULTS = {
    "step": _COUNT,
    "epoch": _COUNT,
    "num_parameters": _COUNT,
    "forward_flops?": _COUNT,
    "class_counts": [_COUNT],
    "test": _SCORES,
    "experts": [{"tau": _FIGURE, **_SCORES}],
    "note?": _TEXT,
    "origin?": _TEXT,
    "class_names?": [_TEXT],
    "posthoc?": {
        "tau": _NUMBER,
        "temperature": _NUMBER,
        "variants": [{"name": _TEXT, "top1": _FIGURE}],
        "thresholds": [{"precision": _NUMBER, "confidence": _FIGURE}],
    },
    "weights?": {"average": _TEXT, "epochs?": _COUNT, "decay?": _NUMBER},
    "num_bins?": _COUNT,
    "experts_used?": _NUMBER,
    "settings?": {},
    "group_confusion?": [[_FIGURE]],
    "calibration_groups?": {"ensemble": _BY_GROUP},
    "ensemble?": {
        "gain": _NUMBER,
        "disagreement": [[_FIGURE]],
        "mean_disagreement": _FIGURE,
        "subsets": [{"experts": [_COUNT], **_ACCURACIES, "top1": _NUMBER}],
    },
    "bias?": {
        "experts": [{"lambda": _FIGURE, "kl": _FIGURE}],
        "ensemble": {"kl": _FIGURE},
    },
    "held_out?": {"num_examples": _COUNT, **_SCORES},
    "temperature?": {"fitted_on": _TEXT, "ensemble": _TEMPERATURE, "experts": [_TEMPERATURE]},
    "shift?": {"*": _BY_PRIOR},
    "aggregation?": {
        "*": {"weights": [_NUMBER], "top1": dict.fromkeys(("equal", "learnt", "used"), _NUMBER)}
    },
    "shift_sets?": {
        "*": {
            "origin": _TEXT,
            "l1_of_uniform": _NUMBER,
            "ece?": _BY_PRIOR,
            "estimates": {"*": {"top1": _FIGURE, "l1": _NUMBER}},
        }
    },
}

_CONFIG = {
    "config": {
        "seed": _COUNT,
        "total_epochs": _COUNT,
        "batch_size": _COUNT,
        "data": {"name": _TEXT, "imbalance_ratio": _NUMBER, "shot_thresholds?": [_NUMBER]},
        "model": {"name": _TEXT, "num_experts": _COUNT},
        "mix": {"alpha": _NUMBER, "rule?": _TEXT},
        "method?": {"name?": _TEXT},
        "optim": {"learning_rate": _NUMBER, "schedule": _TEXT, "weight_decay": _NUMBER},
    },
    "resolved?": {"total_steps?": _COUNT},
    "data?": {"class_names?": [_TEXT]},
    "environment?": {"versions?": {}, "command?": [_TEXT]},
}


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What `config.json` says of a run, by today's names.

    Attributes:
        config: All fields of the config as nested dictionaries; those that came later may be
            missing.
        seed: Seed of initialisation, order, augmentation and mixing.
        total_epochs: Number of epochs of the first phase.
        batch_size: Number of images in a batch.
        dataset: Name of the data set.
        imbalance_ratio: Count of the largest class over the smallest's.
        shot_thresholds: Class counts below which a class is few-shot, and above which many-shot.
        counts_as_published: Whether the class counts were found to be the published ones.
        model: Name of the trunk.
        num_experts: Number of experts.
        method: Name of the method's class.
        mix_rule, mix_alpha: Rule by which images are mixed, and its parameter; 0 for no mixing.
        learning_rate, schedule, weight_decay: Settings of the optimizer.
        total_steps: Number of updates of the whole training; None in older records.
        device_count, device_kind: Devices on which the run began.
        started: Date and time at which it began.
        git_commit: Commit of the source; None outside of a repository.
        versions: Versions of packages by their names.
        command: Words of the command line.
        class_names: Names of the classes; empty where only their numbers are known.
    """

    config: Mapping[str, Any]
    seed: int
    total_epochs: int
    batch_size: int
    dataset: str
    imbalance_ratio: float
    shot_thresholds: tuple[int, int]
    counts_as_published: bool
    model: str
    num_experts: int
    method: str
    mix_rule: str
    mix_alpha: float
    learning_rate: float
    schedule: str
    weight_decay: float
    total_steps: int | None
    device_count: int | None
    device_kind: str | None
    started: str | None
    git_commit: str | None
    versions: Mapping[str, Any]
    command: tuple[str, ...]
    class_names: tuple[str, ...]

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "RunRecord":
        """The record that a file's content is.

        Args:
            content: Content of the shape `_CONFIG`.
        """
        config = content["config"]
        data, model, mix, optim = (config[name] for name in ("data", "model", "mix", "optim"))
        environment = content.get("environment") or {}
        low, high = data.get("shot_thresholds") or metrics.DEFAULT_THRESHOLDS
        return cls(
            config=config,
            seed=config["seed"],
            total_epochs=config["total_epochs"],
            batch_size=config["batch_size"],
            dataset=data["name"],
            imbalance_ratio=data["imbalance_ratio"],
            shot_thresholds=(low, high),
            counts_as_published=bool((content.get("data") or {}).get("counts_as_published")),
            model=model["name"],
            num_experts=model["num_experts"],
            method=(config.get("method") or {}).get("name") or "balpoe",
            mix_rule=mix.get("rule") or "mixup",
            mix_alpha=mix["alpha"],
            learning_rate=optim["learning_rate"],
            schedule=optim["schedule"],
            weight_decay=optim["weight_decay"],
            total_steps=(content.get("resolved") or {}).get("total_steps"),
            device_count=environment.get("device_count"),
            device_kind=environment.get("device_kind"),
            started=environment.get("started"),
            git_commit=environment.get("git_commit"),
            versions=environment.get("versions") or {},
            command=tuple(environment.get("command") or ()),
            class_names=tuple(map(str, (content.get("data") or {}).get("class_names") or ())),
        )


def load_results(workdir: Path) -> dict[str, Any] | None:
    """The content of `results.json` in a workdir; None if there is no such file.

    Raises:
        UserError (a `ValueError`): a file that cannot be read, or the first part of it that is not
            as an evaluation writes it.
    """
    return _load(workdir / files.RESULTS, _RESULTS, _check_results, _rename_results)


def load_config(workdir: Path) -> RunRecord | None:
    """The record in `config.json` of a workdir; None if there is no such file.

    Raises:
        UserError (a `ValueError`): as for `load_results`.
    """
    content = _load(workdir / files.CONFIG, _CONFIG, _check_config, _rename_config)
    return None if content is None else RunRecord.of(content)


def _load(
    path: Path,
    shape: Mapping[str, Any],
    check: Callable[[Mapping[str, Any]], str | None],
    rename: Callable[[dict[str, Any]], dict[str, Any]],
) -> dict[str, Any] | None:
    content = files.read_json(path)
    if content is None:
        if path.exists():
            raise _damaged(path, "it is no readable JSON object")
        return None
    content = rename(content)
    problem = _mismatch(content, shape, "") or check(content)
    if problem:
        raise _damaged(path, problem)
    return content


def _rename_config(content: dict[str, Any]) -> dict[str, Any]:
    config = content.get("config")
    return {**content, "config": rename_fields(config)} if isinstance(config, dict) else content


def _rename_results(results: dict[str, Any]) -> dict[str, Any]:
    renamed = {current_name(name): value for name, value in results.items()}
    if isinstance(results.get("settings"), dict):
        renamed["settings"] = current_values(rename_fields({"eval": results["settings"]}))["eval"]
    return renamed


def _damaged(path: Path, problem: str) -> UserError:
    # An evaluation writes results again, but never a config.
    results = path.name == files.RESULTS
    remedy = "evaluate the run again, with --mode=eval" if results else "fix it"
    return UserError(
        f"{path} is damaged or of another version: {problem}; {remedy}, or leave the run out."
    )


def _mismatch(value: Any, shape: Any, name: str) -> str | None:
    """A clause on the first part of a value that is not of its shape; None if all are."""
    if isinstance(shape, str):
        return None if _is_kind(value, shape) else f"{name} should be {shape}, not {_shown(value)}"
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{name} should be a list, not {_shown(value)}"
        parts = [(f"{name}[{i}]", item, shape[0]) for i, item in enumerate(value)]
    else:
        if not isinstance(value, dict):
            return f"{name} should be an object, not {_shown(value)}"
        parts = []
        for key, inner in shape.items():
            optional, bare = key.endswith("?"), key.removesuffix("?")
            path = f"{name}.{bare}" if name else bare
            if key == "*":
                parts += [(f"{name}.{other}", item, inner) for other, item in value.items()]
            elif bare not in value and not optional:
                return f"{path} is missing"
            elif not optional or value.get(bare) is not None:
                parts.append((path, value[bare], inner))
    problems = (_mismatch(item, inner, path) for path, item, inner in parts)
    return next((problem for problem in problems if problem), None)


def _is_kind(value: Any, kind: str) -> bool:
    if kind == _FIGURE and value is None:
        return True
    if kind == _TEXT:
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
        return False
    return kind != _COUNT or (value >= 0 and value == int(value))


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _check_results(results: Mapping[str, Any]) -> str | None:
    """A clause on the first section whose size does not fit the others'; None if all do."""
    experts = len(results["experts"])
    if not experts or not sum(results["class_counts"]):
        return f"{'class_counts' if experts else 'experts'} is empty"
    for section in ("bias", "temperature"):
        if results.get(section) and len(results[section]["experts"]) != experts:
            return f"{section}.experts is not of {experts} experts"
    squares = {"group_confusion": (results.get("group_confusion"), 3)}
    if results.get("ensemble"):
        squares["ensemble.disagreement"] = (results["ensemble"]["disagreement"], experts)
    for name, (rows, size) in squares.items():
        if rows is not None and [len(row) for row in rows] != [size] * size:
            return f"{name} is not {size} x {size}"
    sets = results.get("shift_sets")
    if sets is not None and sets.keys() != (results.get("shift") or {}).keys():
        return "shift and shift_sets are not of the same distributions"
    return None


def _check_config(content: Mapping[str, Any]) -> str | None:
    thresholds = content["config"]["data"].get("shot_thresholds")
    if thresholds is not None and len(thresholds) != 2:
        return f"config.data.shot_thresholds should be two numbers, not {thresholds}"
    return None
