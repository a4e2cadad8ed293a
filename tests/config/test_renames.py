# SPDX-License-Identifier: Apache-2.0
"""Fields of a config by their older names: in records, results and commands."""

import dataclasses
import json
from pathlib import Path

import pytest

from balpoe_jax.config import default_config, from_record, with_defaults
from balpoe_jax.config.settings import Phase2Settings
from balpoe_jax.errors import UserError
from balpoe_jax.renames import (
    FIELDS,
    NONE_WAS,
    SECTIONS,
    current_name,
    current_values,
    rename_fields,
    rename_overrides,
)
from balpoe_jax.reporting import schema
from tests.helpers import FIXTURES, commands
from tests.helpers.config_files import get_config

RUNS = FIXTURES / "runs"


def fields_of(section: object, prefix: str = "") -> set[str]:
    if not isinstance(section, dict):
        return {prefix.rstrip(".")}
    return set().union(*(fields_of(value, f"{prefix}{name}.") for name, value in section.items()))


def test_each_new_name_is_a_field_and_no_old_one_is() -> None:
    config = get_config("cifar100_lt", "method=mislas").to_dict()
    fields = fields_of(default_config().to_dict()) | fields_of(config)
    assert set(FIELDS.values()) <= fields
    assert not set(FIELDS) & fields
    assert not set(SECTIONS) & config.keys() and set(SECTIONS.values()) <= config.keys()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mixup.alpha", "mix.alpha"),
        ("mixup.kappa", "mix.remix_kappa"),
        ("stage2.boundaries", "phase2.decay_epochs"),
        ("optim.factor", "optim.decay_factor"),
        ("optim.decay_factor", "optim.decay_factor"),
        ("seed", "seed"),
        ("augment.mixup", "augment.mixup"),
    ],
)
def test_current_name_of_a_field(old: str, new: str) -> None:
    assert current_name(old) == new


def test_a_record_of_an_older_version_has_all_of_todays_fields() -> None:
    recorded = json.loads((RUNS / "interrupted" / "config.json").read_text())["config"]
    assert "mixup" in recorded and "boundaries" in recorded["optim"]  # written before the renames
    renamed = rename_fields(recorded)
    assert fields_of(with_defaults(recorded)) == fields_of(with_defaults(renamed))
    assert renamed["mix"]["alpha"] == recorded["mixup"]["alpha"]
    assert renamed["optim"]["decay_epochs"] == recorded["optim"]["boundaries"]
    ends = {"loss.tau_min", "loss.tau_max"}
    assert fields_of(renamed) - fields_of(with_defaults(recorded)) == ends


def test_what_none_was_written_as() -> None:
    old = {
        "model": {"shared_stages": -2, "expert_map": "auto"},
        "mix": {"last_epoch": 0, "first_epoch": 0},
        "augment": {"crop_area": 0.0},
        "loss": {"taus": (), "tau_min": 0.5, "tau_max": 2.0},
        "seed": 0,
    }
    assert current_values(old) == {
        "model": {"shared_stages": None, "expert_map": None},
        "mix": {"last_epoch": None, "first_epoch": 0},
        "augment": {"crop_area": None},
        "loss": {"taus": (0.5, 2.0)},
        "seed": 0,
    }
    gone = {"method": {"name": "lade", "importance": "class", "alpha": 0.1}}
    assert current_values(gone) == {"method": {"name": "lade", "alpha": 0.1}}
    kept = {"method": {"name": "lade", "importance": "sample"}}  # refused by name, and not ignored
    assert current_values(kept) == kept
    assert old["model"]["shared_stages"] == -2  # the record itself stays as it is
    listed = {"loss": {"taus": (0.0, 1.0, 3.0), "tau_min": 0.0, "tau_max": 2.0}}
    assert current_values(listed) == {"loss": {"taus": (0.0, 1.0, 3.0)}}
    fields = fields_of(get_config("cifar100_lt", "method=sade").to_dict()) | fields_of(
        get_config("cifar100_lt", "method=ride_distill").to_dict()
    )
    known = fields | {f"phase2.{field.name}" for field in dataclasses.fields(Phase2Settings)}
    views = {"view2.crop_area", "view3.crop_area", "other_augment.crop_area"}
    assert set(NONE_WAS) - views <= known


@pytest.mark.parametrize(
    ("preset", "recorded", "expected"),
    [
        ("ride_distill", {"repeat_by_experts": True}, {"repeat_by_experts": True}),
        ("ride_distill", {"repeat_by_experts": False}, {"repeat_by_experts": False}),
        # Of the time without the field, when a distilled run never repeated its loss.
        ("ride_distill", {}, {"repeat_by_experts": False}),
        ("focal_cb", {"focal_p": "weighted"}, {"focal_p": "weighted"}),
        ("focal_cb", {"focal_p": "unweighted"}, {"focal_p": "unweighted"}),
        ("focal_cb", {}, {"focal_p": "unweighted"}),
        ("gpaco", {}, {"queue_without_momentum": False, "passes_by_view": False}),
        ("mislas", {}, {"shift_statistics": True}),
        ("paco", {}, {"projection_init": "torch"}),
    ],
)
def test_an_older_run_keeps_what_its_method_did(
    preset: str, recorded: dict, expected: dict
) -> None:
    """Whatever the recipe of today sets."""
    record = get_config("cifar10_lt", f"method={preset}").to_dict()
    for field in expected:
        del record["method"][field]
    del record["model"]["classifier_init"]
    record["method"] |= recorded
    settings = from_record(with_defaults(record))
    assert {field: getattr(settings.method, field) for field in expected} == expected
    assert settings.model.classifier_init is None


def test_a_value_that_is_gone_is_refused() -> None:
    record = get_config("cifar10_lt", "method=ncl").to_dict()
    record["method"]["hard_mask"] = "inf"
    with pytest.raises(UserError, match=r"config.method.hard_mask does not fit the method ncl"):
        from_record(with_defaults(record))
    record["method"]["hard_mask"] = "zero"
    from_record(with_defaults(record))


def test_ends_of_the_range_of_taus_in_a_command() -> None:
    low, high = "--config.loss.tau_min=0.5", "--config.loss.tau_max=3"
    assert rename_overrides(["main", low, "-x", high]) == [
        "main", "-x", "--config.loss.taus=(0.5,3)",
    ]  # fmt: skip
    assert rename_overrides(["main", high, "--", low], taus=lambda: (1.0, 2.0)) == [
        "main", "--config.loss.taus=(1.0,3)", "--", low,
    ]  # fmt: skip


def test_results_of_an_older_version_are_read_by_todays_names(tmp_path: Path) -> None:
    results = json.loads((RUNS / "finished" / "results.json").read_text())
    assert "aggregation_epochs" in results["settings"]
    (tmp_path / "results.json").write_text(json.dumps(results | {"remark": "a small version"}))
    read = schema.load_results(tmp_path)
    assert read is not None and read["note"] == "a small version"
    assert read["settings"]["expert_weights_epochs"] == results["settings"]["aggregation_epochs"]
    recorded = schema.load_config(RUNS / "finished")
    assert recorded is not None and recorded.mix_alpha == 0.4


def test_overrides_of_older_names_are_renamed() -> None:
    assert rename_overrides(
        ["main", "--config=x.py:mixup=false", "--config.mixup.alpha=0.2", "-config.remark", "hello"]
    ) == ["main", "--config=x.py:mixup=false", "--config.mix.alpha=0.2", "-config.note", "hello"]
    assert rename_overrides(["main", "--", "--config.mixup.alpha=1"])[2] == "--config.mixup.alpha=1"


@pytest.mark.integration
def test_a_command_takes_older_names(tmp_path: Path) -> None:
    """Up to the check of the value, which says the name of today."""
    result = commands.run(
        "balpoe_jax.main",
        "--config=configs/digits_lt.py",
        "--config.mixup.kappa=0.5",
        f"--workdir={tmp_path}",
    )
    assert result.returncode == 2
    assert "config.mix.remix_kappa must be from 1 to 1000000000, got 0.5" in result.stderr
