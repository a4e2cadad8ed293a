# SPDX-License-Identifier: Apache-2.0
"""Fields of a config that had another name once: records and commands with it still work."""

from collections.abc import Mapping, Sequence
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


def current_name(field: str) -> str:
    """Today's dotted name of a field, given that name or an older one."""
    section, dot, rest = field.partition(".")
    field = f"{SECTIONS.get(section, section)}{dot}{rest}"
    return FIELDS.get(field, field)


def rename_fields(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded config under today's names; what is unknown stays as it is.

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


def rename_overrides(arguments: Sequence[str]) -> list[str]:
    """Arguments of a command, with `--config.FIELD` under today's names.

    Args:
        arguments: Words of the command line; what follows `--` is left alone.
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
    return renamed
