# SPDX-License-Identifier: Apache-2.0
"""What every method must do: the same step on any number of devices, a state that a checkpoint
holds, a prediction, recipes that make valid configs."""

import dataclasses
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balpoe_jax.config import resolve
from balpoe_jax.data.types import EvalBatch, TrainBatch
from balpoe_jax.errors import UserError
from balpoe_jax.experiment.settings import check
from balpoe_jax.methods import (
    METHODS,
    PRESETS,
    Context,
    make_method,
    scaled_fields,
    settings,
)
from balpoe_jax.methods.balpoe import BalPoE
from balpoe_jax.methods.base import ExpertLosses, mix_losses
from balpoe_jax.optim import make_optimizer
from balpoe_jax.parallel import make_parallel
from balpoe_jax.run.checkpoint import Checkpoints
from balpoe_jax.step import make_eval_step, make_train_step
from tests.helpers import tiny_network
from tests.helpers.config_files import get_config
from tests.helpers.method_steps import (
    BATCH,
    DISTINCT,
    RATE,
    batch_of,
    fresh,
    mapped_step,
    parts,
    phases,
    run,
)

CASES = [(name, phase) for name in DISTINCT for phase in phases(name)]


@pytest.mark.integration
@pytest.mark.slow_cases(
    "bcl-0",
    "ride_distill-0",
    "paco-0",
    "balpoe_cs-0",
    "los-1",
    "mdcs-0",
    "sade-0",
    "gpaco-0",
    "balanced_softmax-0",
    "ldam_drw-0",
    "ride_router-0",
    "ride_router-1",
    # Their first phase is cross-entropy, as the tests of their own files say.
    "ltwb-0",
    "los-0",
    "crt-0",
    "lws-0",
    # A loss of rows for one layer, as that of others is.
    "crt-1",
    "lws-1",
    "mislas-1",
    "shike-1",
    "balpoe_plus-1",
    "balpoe_plus_cs-1",
    # What devices share is what others share: paco, bcl, balpoe_cs, ride_distill.
    "ncl_contrast-0",
    "ncl-0",
    "glmc-0",
    "dirmixe-0",
    "balpoe_plus_cs-0",
    "focal_cb-0",
    "mislas-0",
    "concutmix-0",
    "balpoe_plus-0",
    "tlc-0",
    "lade-0",
    "shike-0",
)
@pytest.mark.parametrize(("name", "phase"), CASES)
def test_devices_and_modes_change_nothing(name: str, phase: int, x64) -> None:
    """In double precision, in which steps do not amplify roundings to be seen."""
    expected = run(name, "pmap", 1, phase, np.float64)
    state, metrics = expected[-1]
    assert metrics["finite"] and int(state.step) == len(expected)
    # The two are compared for one method with a state and a loss of the whole batch.
    for mode in ("pmap", "shard_map") if name == "paco" else ("shard_map",):
        found = run(name, mode, 4, phase, np.float64)
        chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.integration
@pytest.mark.slow_cases(
    *("mdcs", "sade", "gpaco", "ride_router", "ldam_drw", "los", "crt", "lws", "shike", "glmc"),
    *("concutmix", "balpoe_plus", "balpoe_cs", "lade", "focal_cb", "ncl", "tlc", "dirmixe"),
    *("ncl_contrast", "balpoe_plus_cs", "bcl", "ride_distill"),
)
@pytest.mark.parametrize("name", DISTINCT)
def test_a_restored_state_goes_on_bit_for_bit(name: str, tmp_path: Path, x64) -> None:
    """Through a checkpoint in the middle, with whatever state the method keeps."""
    history = run(name, "pmap", 1, 0, np.float64)
    middle = len(history) // 2
    devices, step = mapped_step(name, "pmap", 1)
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(devices.replicate(history[middle - 1][0]))
        state = checkpoints.restore_latest(devices.replicate(history[0][0]))
    for i in range(middle, len(history)):
        state, _ = step(state, devices.shard(batch_of(name, i, np.float64)))
    chex.assert_trees_all_equal(jax.device_get(state), history[-1][0])


@pytest.mark.integration
@pytest.mark.parametrize("name", DISTINCT)
def test_something_is_predicted(name: str) -> None:
    method, context, network = parts(name)
    devices = make_parallel("shard_map")
    step = devices.map_step(make_eval_step(network, method, context))
    trained_on = tiny_network.batch(BATCH)
    batch = EvalBatch(trained_on.images, trained_on.labels, np.arange(BATCH) < 13)
    state = devices.replicate(fresh(name))
    found = jax.device_get(step(state.variables, devices.shard(batch)))
    experts = network.num_experts if hasattr(network, "num_experts") else len(found["logits"])
    assert found["logits"].shape == (experts, BATCH, context.num_classes)
    assert found.get("ensemble", found["logits"][0]).shape == (BATCH, context.num_classes)
    chex.assert_tree_all_finite(found)
    np.testing.assert_array_equal(found["mask"], batch.mask)


@pytest.mark.parametrize(
    ("names", "taus"),
    [
        ("balpoe balpoe_cs mdcs", (0, 1, 2)),
        ("balanced_softmax lade bayias paco gpaco bcl ncl logit_adjustment", (1, 1, 1)),
        ("cross_entropy cutmix cmo_ce", (0, 0, 0)),
        ("sade", (0, 1, None)),
        ("cross_entropy_cb ce_drw focal ldam ride mislas tlc", (None, None, None)),
    ],
)
def test_the_taus_that_are_shown(names: str, taus: tuple) -> None:
    for name in names.split():
        config = get_config("cifar100_lt", f"method={name}")
        config_taus = (0.0, 1.0, 2.0) if config.model.num_experts > 1 else resolve(config).taus * 3
        assert PRESETS[name].method.expert_taus(config_taus) == taus, name


@pytest.mark.parametrize("name", PRESETS)
def test_recipes_make_valid_configs(name: str) -> None:
    devices = make_parallel()
    for data in ("digits_lt", "cifar100_lt", "imagenet_lt", "inaturalist2018"):
        config = get_config(data, f"method={name}")
        check(resolve(config), devices)
        assert len(resolve(config).taus) == config.model.num_experts, data
        if data != "digits_lt":
            for recipe in ("standard", "strong", "long"):
                check(resolve(get_config(data, f"method={name},recipe={recipe},epochs=7")), devices)


def test_what_a_recipe_publishes_it_can_run() -> None:
    for name, recipe in PRESETS.items():
        assert len({(p.dataset, p.arguments) for p in recipe.published}) == len(recipe.published)
        for published in recipe.published:
            config = get_config(published.dataset, f"method={name},{published.arguments}")
            check(resolve(config), make_parallel())
            assert 0 < published.accuracy < 100 and published.source


def test_a_recipe_may_depend_on_the_backbone() -> None:
    """PaCo's authors train ResNeXt-50 with other views and another temperature."""
    plain, wide = (
        get_config("imagenet_lt", f"method=paco{backbone}")
        for backbone in ("", ",backbone=resnext50")
    )
    assert (plain.method.temperature, wide.method.temperature) == (0.2, 0.07)
    assert (plain.augment.blur, wide.augment.blur) == (0.0, 0.5)
    assert plain.method.queue_size == wide.method.queue_size == 8192


def test_hyper_parameters_of_another_method_are_refused() -> None:
    section = settings(PRESETS["balpoe"].method)
    assert make_method(section) == PRESETS["balpoe"].method
    with pytest.raises(UserError, match=r"method.alpha does not fit the method balpoe; choose"):
        make_method({**section, "alpha": 1.0})
    with pytest.raises(UserError, match=r"Unknown config.method.name 'x'; choose from balpoe"):
        make_method({**section, "name": "x"})


def test_a_context_tells_the_step_from_the_epochs_of_its_phase() -> None:
    context = Context(tiny_network.COUNTS, steps_per_epoch=3, first_step=4)
    moments = [context.at(step) for step in range(4, 11)]
    assert [moment.epoch for moment in moments] == [0, 0, 0, 1, 1, 1, 2]
    assert [moment.is_first_step_of_epoch for moment in moments] == [True, False, False] * 2 + [
        True
    ]
    assert dataclasses.replace(context, axis_name="x").batch_norm_axis == "x"
    assert (
        dataclasses.replace(context, axis_name="x", sync_batch_norm=False).batch_norm_axis is None
    )


@dataclasses.dataclass(frozen=True)
class Witness(BalPoE):
    """Keeps what it was told of the step."""

    def on_step_start(self, method_state, params, context: Context):
        now = (context.step, context.epoch, context.is_first_step_of_epoch)
        return {"before": jnp.stack([jnp.asarray(x, jnp.int32) for x in now])}

    def loss(self, network, method_state, batch, context: Context):
        now = jnp.stack([context.step, context.epoch])
        kept = {**method_state, "within": now.astype(jnp.int32)}
        return super().loss(network, method_state, batch, context)._replace(method_state=kept)


@pytest.mark.integration
def test_a_step_tells_the_method_which_one_it_is() -> None:
    devices = make_parallel("pmap", jax.devices()[:1])
    _, context, network = parts("balanced_softmax")
    step = make_train_step(network, make_optimizer(RATE), Witness(), context)
    state = fresh("balanced_softmax")
    kept = {"before": np.zeros(3, np.int32), "within": np.zeros(2, np.int32)}
    state = devices.replicate(state.replace(method_state=kept))
    mapped = devices.map_step(step)
    for expected in ([0, 0, 1], [1, 0, 0], [2, 1, 1]):
        state, _ = mapped(state, devices.shard(tiny_network.batch(BATCH, views=1)))
        assert state.method_state["before"].tolist() == expected
        assert state.method_state["within"].tolist() == expected[:2]


@pytest.mark.parametrize("total", ["mean", "sum"])
def test_a_loss_for_each_expert_and_row_makes_a_method(total: str) -> None:
    """Of squared logits, whose statistics in a test are the averages."""
    kind = type("Squares", (ExpertLosses,), {"total": total, "expert_losses": squares})
    images = np.random.default_rng(0).normal(size=(6, 2, 5))  # logits of 2 experts
    batch = tiny_network.batch(6)._replace(views=(images,))
    context = Context(tiny_network.COUNTS)
    found = kind().loss(tiny_network.logits_as_images, {"kept": 1}, batch, context)
    by_expert = (images**2).sum(axis=2).mean(axis=0)
    np.testing.assert_allclose(found.by_expert, by_expert, rtol=1e-5)
    expected = by_expert.mean() if total == "mean" else by_expert.sum()
    np.testing.assert_allclose(found.total, expected, rtol=1e-5)
    assert found.method_state == {"kept": 1} and not found.terms


def squares(method, logits, batch, context):
    return jnp.square(logits).sum(axis=-1)


def test_fields_that_scale_with_the_training_are_marked() -> None:
    """Those that a rule by their names found before; such a name without a mark is a slip."""
    marked = {(kind.__name__, field) for kind in METHODS.values() for field in scaled_fields(kind)}
    assert marked >= {
        *{("BalPoECS", "warmup_epochs"), ("MDCS", "warmup_epochs"), ("RIDE", "reweight_epoch")},
        *{("Reweighted", "reweight_epoch"), ("TLC", "reweight_epoch"), ("TLC", "kl_epochs")},
    }
    assert marked >= {
        (kind.__name__, field.name)
        for kind in METHODS.values()
        for field in dataclasses.fields(kind)
        if field.name.endswith(("epoch", "epochs"))
    }


@pytest.mark.parametrize("name", PRESETS)
def test_twice_the_length_doubles_what_is_marked_and_the_schedule(name: str) -> None:
    """Of every preset, and nothing else: not what an evaluation does, nor how often one saves."""
    once, twice = (
        get_config("cifar100_lt", f"method={name},epochs={epochs}").to_dict()
        for epochs in (6000, 12000)
    )
    flat = [dict(_flatten(config)) for config in (once, twice)]
    changed = {field for field, value in flat[0].items() if flat[1][field] != value}
    positive = lambda value: value not in ((), None) and np.all(np.array(value) > 0)  # noqa: E731
    scaled = {
        *{"total_epochs", "optim.decay_epochs", "optim.warmup_epochs"},
        *(f"method.{field}" for field in scaled_fields(type(PRESETS[name].method))),
        *{"mix.first_epoch", "mix.last_epoch", "phase2.epochs", "phase2.warmup_epochs"},
        *{"optim.swa", "optim.swa_anneal_epochs"}.intersection(PRESETS[name].fields),
    }
    assert changed == {x for x in scaled if x in flat[0] and positive(flat[0][x])}
    for field in changed:
        ratio = np.array(flat[1][field]) / np.array(flat[0][field])
        np.testing.assert_allclose(ratio, 2, rtol=0.02, err_msg=field)


def _flatten(section: dict, prefix: str = ""):
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def test_methods_are_data() -> None:
    for recipe in PRESETS.values():
        assert dataclasses.is_dataclass(recipe.method) and hash(recipe.method)


def test_losses_are_mixed_by_rows_whatever_their_rank() -> None:
    batch = TrainBatch((), np.array([0, 1]), np.array([2, 3]), np.array([0.25, 1.0]))
    rows = mix_losses(batch, lambda labels: jax.numpy.asarray(10.0 * labels))
    np.testing.assert_allclose(rows, [15.0, 10.0])
    experts = mix_losses(batch, lambda labels: jax.numpy.stack([10.0 * labels, 20.0 * labels]))
    np.testing.assert_allclose(experts, [[15.0, 10.0], [30.0, 20.0]])


@pytest.mark.parametrize(
    ("method", "field", "value", "message"),
    [
        ("sade", "test_view.blur", 2.0, "config.test_view.blur must be from 0 to 1, got 2"),
        ("sade", "test_view.color_jitter", ("a",) * 3, "config.test_view.color_jitter must be 3"),
        ("bcl", "view2.rotation", 400.0, "config.view2.rotation must be from 0 to 180, got 400"),
        ("bcl", "view3.cutout", 3, "config.view3.cutout must be even, got 3"),
        ("sade", "test_view.cutout", 3, "config.test_view.cutout must be even"),
    ],
)
def test_views_that_are_not_valid(method: str, field: str, value, message: str) -> None:
    config = get_config("digits_lt", f"method={method}")
    config.unlock()
    section, _, name = field.partition(".")
    config[section][name] = value
    with pytest.raises(UserError, match=message):
        check(resolve(config), make_parallel())
