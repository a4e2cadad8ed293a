# SPDX-License-Identifier: Apache-2.0
"""Former names of config fields, with which records and commands still work."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

# By the old dotted name; a section stands for all fields in it.
SECTIONS = {"mixup": "mix", "stage2": "phase2"}
FIELDS = {
    "cache_dir": "compilation_cache_dir",
    "remark": "note",
    "data.check_counts": "data.verify_counts",
    "data.class_run": "data.samples_per_class",
    "data.resize": "data.eval_resize",
    "eval.aggregation_epochs": "eval.expert_weights_epochs",
    "eval.aggregation_rate": "eval.expert_weights_rate",
    "eval.prior_significance": "eval.shift_test_level",
    "mix.exponent": "mix.sampling_power",
    "mix.kappa": "mix.remix_kappa",
    "mix.threshold": "mix.remix_tau",
    "model.scale": "model.classifier_scale",
    "optim.accumulate": "optim.accumulation_steps",
    "optim.boundaries": "optim.decay_epochs",
    "optim.factor": "optim.decay_factor",
    "phase2.boundaries": "phase2.decay_epochs",
    "phase2.class_run": "phase2.samples_per_class",
    "phase2.factor": "phase2.decay_factor",
}

# The value that a field had, where it is None today.
NONE_WAS: dict[str, Any] = {
    "data.data_dir": "",
    "data.eval_resize": 0,
    "data.image_size": 0,
    "data.threads": 0,
    "eval.every_epochs": 0,
    "eval.shift_lists": "",
    "method.reweight_epoch": -1,
    "method.teacher": "",
    "mix.last_epoch": 0,
    "model.expert_map": "auto",
    "model.shared_stages": -2,
    "phase2.batch_size": 0,
    **{
        f"{section}.crop_area": 0
        for section in ("augment", "view2", "view3", "test_view", "other_augment")
    },
}
# Settings that are gone, and the value that stood for what is always done now.
GONE: dict[str, Any] = {
    "method.hard_mask": "zero",
    "method.importance": "class",
}
# Fields that held the two ends of the range that `loss.taus` may hold now.
_TAU_ENDS = ("config.loss.tau_min", "config.loss.tau_max")


def current_name(field: str) -> str:
    """Today's dotted name of a field, given that name or an older one."""
    section, dot, rest = field.partition(".")
    field = f"{SECTIONS.get(section, section)}{dot}{rest}"
    return FIELDS.get(field, field)


def rename_fields(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded config under today's names; unknown fields stay as they are.

    Args:
        recorded: Nested dictionaries, as `config.json` holds them.
    """
    renamed: dict[str, Any] = {}
    for name, value in recorded.items():
        section = SECTIONS.get(name, name)
        if isinstance(value, Mapping):
            value = {
                current_name(f"{section}.{field}").removeprefix(f"{section}."): inner
                for field, inner in value.items()
            }
        renamed[current_name(name)] = value
    return renamed


def current_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config under today's names, with its values as they are written today.

    Args:
        config: Nested dictionaries.
    """
    current = {
        name: dict(value) if isinstance(value, Mapping) else value for name, value in config.items()
    }
    for field, none_was in NONE_WAS.items():
        section, _, name = field.partition(".")
        values = current.get(section)
        if isinstance(values, dict) and name in values and values[name] == none_was:
            values[name] = None
    for field, usual in GONE.items():
        section, _, name = field.partition(".")
        values = current.get(section)
        if isinstance(values, dict) and name in values and values[name] == usual:
            del values[name]
    loss = current.get("loss")
    if isinstance(loss, dict) and {"tau_min", "tau_max"} <= set(loss):
        ends = (loss.pop("tau_min"), loss.pop("tau_max"))
        loss["taus"] = loss.get("taus") or ends
    return current


def rename_overrides(
    arguments: Sequence[str], taus: Callable[[], tuple[float, ...]] = lambda: (0.0, 2.0)
) -> list[str]:
    """Arguments of a command, with `--config.FIELD` under today's names.

    Args:
        arguments: Words of the command line; what follows `--` is left alone.
        taus: Function that returns the config's own `loss.taus`, for a command with one end.
    """
    renamed = []
    ended = False
    for argument in arguments:
        ended |= argument == "--"
        dashes = argument[: len(argument) - len(argument.lstrip("-"))]
        field, equals, value = argument[len(dashes) :].partition("=")
        if not ended and dashes in ("-", "--") and field.startswith("config."):
            field = f"config.{current_name(field.removeprefix('config.'))}"
            argument = f"{dashes}{field}{equals}{value}"
        renamed.append(argument)
    return _join_tau_ends(renamed, taus)


def _join_tau_ends(arguments: list[str], taus: Callable[[], tuple[float, ...]]) -> list[str]:
    """The arguments, with `loss.taus` in place of its two former ends."""
    given: dict[str, str] = {}
    kept: list[str] = []
    for argument in arguments if "--" not in arguments else arguments[: arguments.index("--")]:
        field, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and equals and field in _TAU_ENDS:
            given[field] = value
        else:
            kept.append(argument)
    if not given:
        return arguments
    rest = arguments[arguments.index("--") :] if "--" in arguments else []
    own = (None, None) if len(given) == 2 else taus()
    ends = (given.get(_TAU_ENDS[0], own[0]), given.get(_TAU_ENDS[1], own[-1]))
    return [*kept, f"--config.loss.taus=({ends[0]},{ends[1]})", *rest]
