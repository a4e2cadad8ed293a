# SPDX-License-Identifier: Apache-2.0
"""Config files, their arguments, and the checks before anything starts."""

import dataclasses
import json

import pytest

from balpoe_jax import config as config_lib
from balpoe_jax.config import from_record, reference, resolve, to_record
from balpoe_jax.config.settings import Phase2Settings, Settings
from balpoe_jax.data.settings import AugmentSettings, MixSettings
from balpoe_jax.errors import UserError
from balpoe_jax.methods import METHODS
from balpoe_jax.run import record
from balpoe_jax.setting import Section, described, type_of
from tests.helpers import ROOT
from tests.helpers.config_files import get_config


@pytest.mark.parametrize(
    "name", ["digits_lt", "cifar10_lt", "cifar100_lt", "imagenet_lt", "inaturalist2018"]
)
def test_configs_are_valid_and_say_how_to_run_them(name: str) -> None:
    config = get_config(name)
    config_lib.resolve(config)
    assert len(config_lib.resolve(config).taus) == 3
    text = (ROOT / "configs" / f"{name}.py").read_text()
    assert f"python -m balpoe_jax.main --config=configs/{name}.py" in text


@pytest.mark.parametrize(
    ("recipe", "epochs", "boundaries", "warmup", "rotation", "policy"),
    [
        ("standard", 200, (160, 180), 5, 15.0, "none"),
        ("strong", 200, (160, 180), 5, 0.0, "autoaugment_cifar"),
        ("long", 400, (320, 360), 10, 0.0, "autoaugment_cifar"),
    ],
)
def test_cifar_recipes(recipe, epochs, boundaries, warmup, rotation, policy) -> None:
    config = get_config("cifar100_lt", f"ir=50,recipe={recipe}")
    assert config.data.imbalance_ratio == 50
    assert config.total_epochs == epochs
    assert config.optim.decay_epochs == boundaries
    assert config.optim.warmup_epochs == warmup
    assert (config.augment.rotation, config.augment.policy) == (rotation, policy)
    assert (config.batch_size, config.optim.learning_rate) == (128, 0.1)
    assert (config.optim.weight_decay, config.optim.nesterov) == (5e-4, True)


def test_mixup_strength_is_the_data_sets() -> None:
    assert get_config("cifar100_lt").mix.alpha == 0.4
    assert get_config("cifar10_lt").mix.alpha == 0.8
    assert get_config("cifar10_lt", "mixup=false").mix.alpha == 0


def test_epochs_scale_the_schedule() -> None:
    config = get_config("cifar100_lt", "epochs=30")
    assert config.total_epochs == 30
    assert config.optim.decay_epochs == (24, 27)
    assert config.optim.warmup_epochs == 1
    assert get_config("cifar100_lt", "method=mislas,epochs=60").phase2.epochs == 3
    assert get_config("cifar100_lt", "method=sade,epochs=60").eval.expert_weights_epochs == 5


def test_a_record_from_before_a_field_has_the_fields_default() -> None:
    """Also in sections that not every config has, and in those of methods."""
    config = get_config("cifar100_lt", "method=ncl_contrast")
    with config.unlocked():
        config.other_augment = config.view2.copy_and_resolve_references()
    older = json.loads(config.to_json())
    for section in ("augment", "view2", "other_augment"):
        del older[section]["randaugment_layers"], older[section]["randaugment_magnitude"]
    del older["method"]["momentum"], older["optim"]["accumulation_steps"]
    assert older != json.loads(config.to_json())
    assert record.experiment_fields(older) == record.experiment_fields(config.to_dict())
    older["view2"]["blur"] = 0.25
    found = record.experiment_fields(older)
    assert found["view2.blur"] == 0.25 and found["view2.randaugment_layers"] == 2


@pytest.mark.parametrize(
    ("arguments", "taus"),
    [
        ("method=balanced_softmax", (1.0,)),
        ("method=cross_entropy", (0.0,)),
        ("experts=5", (0.0, 0.5, 1.0, 1.5, 2.0)),
        ("experts=1", (1.0,)),
        ("method=cross_entropy,experts=2", (0.0, 0.0)),
    ],
)
def test_methods_set_experts_and_taus(arguments: str, taus: tuple[float, ...]) -> None:
    assert config_lib.resolve(get_config("digits_lt", arguments)).taus == taus


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("speed=1", "Unknown config argument 'speed'; choose from ratio, flag, kind"),
        ("ratio=abc", "ratio must be of type int, got 'abc'"),
        ("flag=2", "flag must be true or false, got '2'"),
        ("kind=c", "kind must be one of a, b; got 'c'"),
        ("flag", "once, as key=value; got 'flag'"),
        ("ratio=1,ratio=2", "once, as key=value; got 'ratio=2'"),
    ],
)
def test_arguments_that_are_not_valid(text: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        config_lib.parse_arguments(text, ratio=100, flag=True, kind=("a", "b"))


def test_arguments_are_typed() -> None:
    parsed = config_lib.parse_arguments("ratio=50,flag=False", ratio=100, flag=True, kind=("a",))
    assert vars(parsed) == {"ratio": 50, "flag": False, "kind": "a"}


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("total_epochs", 0, "config.total_epochs must be from 1 to 1000000, got 0"),
        ("seed", 2**31, "config.seed must be from 0 to 2147483647, got 2147483648"),
        ("data.selection_seed", -1, "config.data.selection_seed must be from 0"),
        ("mix.alpha", -0.1, "config.mix.alpha must be from 0 to"),
        ("data.imbalance_ratio", float("nan"), "config.data.imbalance_ratio must be from 1 to"),
        ("data.std", (0.2, 0.0, 0.2), "config.data.std must be from 1e-06 to 1000000000, each"),
        ("data.mean", (0.5,), "config.data.mean must be 3 numbers"),
        ("optim.decay_epochs", ("a",), "config.optim.decay_epochs must be numbers"),
        (
            "eval.prior_strength",
            float("inf"),
            r"config.eval.prior_strength must be from 0 to 1000000000, got inf",
        ),
        (
            "eval.shift_ratios",
            (2.0, float("inf")),
            r"shift_ratios must be from 1.000000001 to 1e\+12, each",
        ),
        (
            "eval.shift_ratios",
            (2.0, float("nan")),
            r"shift_ratios must be from 1.000000001 to 1e\+12, each",
        ),
        ("total_epochs", 10**12, "config.total_epochs must be from 1 to 1000000, got 10000"),
        ("model.num_experts", 10**400, r"must be from 1 to 100, got 1000.*\.\.\."),
        ("loss.taus", (0.0, float("nan")), "config.loss.taus must be from"),
        ("data.on_bad_image", "drop", "data.on_bad_image must be one of fail, skip; got 'drop'"),
        ("loss.taus", (0.0, 1.0, 2.0, 3.0), r"for each of the 3 experts, got \(0.0"),
        ("model.dtype", "float16", "model.dtype must be one of float32, bfloat16; got 'float16'"),
        (
            "model.precision",
            "half",
            "must be one of tf32, full, or None; got 'half'",
        ),
        (
            "optim.accumulation_steps",
            0,
            "config.optim.accumulation_steps must be from 1 to 1048576, got 0",
        ),
        ("profile.steps", (5,), r"first and the last step .* counted from 1.* got \(5,\)"),
        ("profile.steps", (3, 2), r"first and the last step .* got \(3, 2\)"),
    ],
)
def test_values_that_are_not_valid(field: str, value, expected: str) -> None:
    config = get_config("digits_lt")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=expected):
        config_lib.resolve(config)


def test_the_page_of_settings_is_not_stale() -> None:
    """`python -m balpoe_jax.config` writes it."""
    page = (ROOT / reference.PAGE).read_text()
    assert page == reference.page()
    for section in dataclasses.fields(Settings):
        assert f"`{section.name}`" in page or f"## {section.name}\n" in page
    for name, method in METHODS.items():
        assert all(f"| `{field.name}` |" in page for field in dataclasses.fields(method)), name


def test_every_setting_says_what_it_is() -> None:
    """A sentence that begins with a noun, as far as its form tells."""
    kinds = [AugmentSettings, MixSettings, Phase2Settings, Settings, *METHODS.values()]
    kinds += [type(value) for value in vars(Settings()).values() if isinstance(value, Section)]
    for kind in kinds:
        told = dict(described(kind))
        values = [field for field in dataclasses.fields(kind) if field not in told]
        sections = (issubclass(type_of(kind, field.name)[0], Section) for field in values)
        assert all(sections), [field.name for field in values]
        for field, about in told.items():
            assert about.about[0].isupper() and about.about.endswith("."), field.name
            assert about.about.split()[0] not in ("Of", "To", "In", "If", "The", "A"), field.name


def test_a_config_and_its_settings_are_the_same_fields() -> None:
    for name in ("digits_lt", "cifar100_lt", "imagenet_lt"):
        for method in ("balpoe", "mislas", "sade", "paco", "bcl"):
            config = get_config(name, f"method={method}")
            assert to_record(resolve(config)) == config.to_dict()


def test_fields_that_there_are_not() -> None:
    record = to_record(Settings())
    with pytest.raises(UserError, match=r"Unknown config field optim.rate; config.optim has lea"):
        from_record({**record, "optim": {"rate": 3}})
    with pytest.raises(UserError, match="Unknown config field rate; config has seed, total_epo"):
        from_record({**record, "rate": 3})
    with pytest.raises(UserError, match=r"config.optim must be a section, got '3'"):
        from_record({**record, "optim": 3})
    with pytest.raises(UserError, match=r"config.view2.hue must be from 0 to 0.5, got 2.0"):
        from_record({**record, "view2": {"hue": 2.0}})
