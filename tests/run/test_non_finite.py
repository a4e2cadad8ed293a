# SPDX-License-Identifier: Apache-2.0
"""Steps that are not finite: found, named with their batch, skipped within bounds, never saved."""

import json
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from balpoe_jax.config import resolve
from balpoe_jax.data import pipeline
from balpoe_jax.data.types import TrainBatch
from balpoe_jax.errors import UserError
from balpoe_jax.evaluate import evaluate
from balpoe_jax.experiment.build import build
from balpoe_jax.experiment.settings import train_settings
from balpoe_jax.methods import Context
from balpoe_jax.methods.balpoe import BalPoE
from balpoe_jax.models import create_model
from balpoe_jax.optim import make_optimizer, rate_of_step
from balpoe_jax.parallel import AXIS_NAME, make_parallel
from balpoe_jax.run.checkpoint import Checkpoints
from balpoe_jax.step import all_finite as state_is_finite
from balpoe_jax.step import create_state, make_train_step
from balpoe_jax.train import train
from tests.helpers.digits_runs import STEPS_PER_EPOCH, final_state, rows, tiny_config

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("tiny_experts", "no_page")]

BAD_STEP = 5  # in the second epoch
make_batches = pipeline.train_batches


def config_of(skip: int, **changes):
    return tiny_config(model__num_experts=1, optim__skip_non_finite=skip, **changes)


def spoil(monkeypatch, *steps: int) -> None:
    """One pixel of the batches that lead to these steps is not a number."""

    def batches(source, settings, first_step: int, *others):
        made = make_batches(source, settings, first_step, *others)
        for step, batch in enumerate(made, first_step + 1):
            if step in steps:
                images = batch.images.copy()
                images[3, 0, 0, 0] = np.nan
                batch = batch._replace(views=(images, *batch.views[1:]))
            yield batch

    monkeypatch.setattr(pipeline, "train_batches", batches)


def take_step(rate: float, skip: bool, pixel: float):
    """The states before and after a step on four devices, and its metrics."""
    devices = make_parallel("shard_map")
    model = create_model("resnet8", num_classes=5, num_experts=1, axis_name=AXIS_NAME)
    optimizer = make_optimizer(rate_of_step([rate], 1))
    create = partial(create_state, model, optimizer, image_shape=(8, 8, 3))
    before = jax.device_get(jax.jit(create)(key=jax.random.key(0)))
    images = np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype(np.float32)
    images[0, 0, 0, 0] = pixel
    labels = np.arange(8, dtype=np.int32) % 5
    batch = TrainBatch((images,), labels, labels, np.ones(8, np.float32))
    context = Context(np.array([50, 20, 10, 5, 2]), (1.0,), axis_name=AXIS_NAME)
    step = make_train_step(model, optimizer, BalPoE(), context, skip_non_finite=skip)
    placed = devices.replicate(before), devices.shard(batch)
    after, metrics = jax.device_get(devices.map_step(step)(*placed))
    return before, after, metrics


def all_finite(tree) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def test_a_skipped_step_changes_nothing_but_the_counts() -> None:
    before, after, metrics = take_step(0.1, skip=True, pixel=np.nan)
    assert not metrics["finite"]
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        counts = np.issubdtype(old.dtype, np.integer)
        np.testing.assert_array_equal(new, old + 1 if counts else old)
    assert after.step == 1


def test_without_skipping_the_state_is_lost_and_the_metric_says_so() -> None:
    _, after, metrics = take_step(0.1, skip=False, pixel=np.nan)
    assert not metrics["finite"]
    assert not all_finite(after.params) and not all_finite(after.batch_stats)


def test_an_update_that_overflows_is_seen_in_the_state() -> None:
    before, after, metrics = take_step(3e38, skip=False, pixel=0.0)
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    assert not all_finite(after.params) and not state_is_finite(after)
    assert state_is_finite(before)


@pytest.mark.slow
def test_an_update_that_overflows_is_skipped() -> None:
    before, after, metrics = take_step(3e38, skip=True, pixel=0.0)
    assert np.isfinite(metrics["loss"]) and not metrics["finite"]
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)


def test_a_state_that_overflowed_is_never_saved(tmp_path: Path, monkeypatch) -> None:
    """With metrics that are all finite: what is saved is looked at itself."""
    monkeypatch.setattr("balpoe_jax.progress.all_finite", lambda state: state.step < 3)
    with pytest.raises(UserError, match="the update is not finite at step 3"):
        train(resolve(config_of(0)), str(tmp_path))
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_a_sound_step_is_made_as_ever(request) -> None:
    """To the bit as users compile it; what is compiled quickly, for tests, rounds otherwise."""
    _, plain, _ = take_step(0.1, skip=False, pixel=0.0)
    _, guarded, metrics = take_step(0.1, skip=True, pixel=0.0)
    assert metrics["finite"]
    tolerance = {} if request.config.getoption("--all") else {"rtol": 1e-5, "atol": 1e-6}
    jax.tree.map(partial(np.testing.assert_allclose, **{"rtol": 0, **tolerance}), guarded, plain)


def test_the_batch_of_a_step_can_be_told_afterwards() -> None:
    experiment = build(resolve(config_of(0)))
    source, settings = experiment.data.train, train_settings(experiment.settings)[0]
    for step, batch in enumerate(make_batches(source, settings, 0, 4)):
        indices = pipeline.batch_indices(source.labels, settings, step)
        np.testing.assert_array_equal(source.labels[indices], batch.labels)


@pytest.fixture(scope="module")
def skipped(tmp_path_factory) -> Path:
    """A run of six steps, of which one is skipped."""
    workdir = tmp_path_factory.mktemp("skipped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, BAD_STEP)
        train(resolve(config_of(1)), str(workdir))
    return workdir


def test_skipped_steps_are_counted_in_the_record(skipped: Path) -> None:
    assert json.loads((skipped / "results.json").read_text())["skipped_steps"] == 1
    made = [row for row in rows(skipped) if "loss" in row]
    assert [row["skipped_steps"] for row in made] == [0, 0, 0, 0, 1, 1]
    assert made[BAD_STEP - 1]["loss"] is None and made[BAD_STEP]["loss"] > 0
    (row,) = rows(skipped, "non_finite.jsonl")
    assert (row["step"], row["skipped"]) == (BAD_STEP, True)
    assert row["learning_rate"] == made[BAD_STEP - 1]["learning_rate"]
    experiment = build(resolve(config_of(1)))
    source, settings = experiment.data.train, train_settings(experiment.settings)[0]
    expected = pipeline.batch_indices(source.labels, settings, BAD_STEP - 1)
    assert row["indices"] == expected.tolist()
    assert row["ids"] == [str(key) for key in source.keys[expected]]
    assert "Step 5 is not finite and skipped, 1 of 1" in (skipped / "train.log").read_text()
    assert all_finite(final_state(config_of(1), skipped))
    assert evaluate(resolve(config_of(1)), str(skipped))["skipped_steps"] == 1


@pytest.mark.slow_cases("1")
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_resumed_run_counts_as_an_undisturbed_one(
    skipped: Path, tmp_path: Path, monkeypatch, epoch: int
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(skipped, workdir)
    for checkpoint in (workdir / "checkpoints").iterdir():
        if int(checkpoint.name) > epoch * STEPS_PER_EPOCH:
            shutil.rmtree(checkpoint)
    spoil(monkeypatch, BAD_STEP)
    train(resolve(config_of(1)), str(workdir))
    for name in ("results.json", "non_finite.jsonl"):
        assert (workdir / name).read_bytes() == (skipped / name).read_bytes()
    states = [final_state(config_of(1), path) for path in (workdir, skipped)]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_one_too_many_ends_the_run(skipped: Path, tmp_path: Path, monkeypatch) -> None:
    """Also when the ones before were skipped in an earlier start."""
    workdir = tmp_path / "run"
    shutil.copytree(skipped, workdir)
    shutil.rmtree(workdir / "checkpoints" / "6")
    (row,) = rows(workdir, "non_finite.jsonl")
    (workdir / "non_finite.jsonl").write_text(json.dumps({**row, "step": 3}) + "\n")
    spoil(monkeypatch, BAD_STEP)
    expected = (
        r"not finite at step 5 \(learning rate 0\.[0-9]+\), after 1 that were skipped; its batch "
        r"is training examples \d+ \(\d+\), .* and 132 more, all listed in .*non_finite\.jsonl"
    )
    with pytest.raises(UserError, match=expected):
        train(resolve(config_of(1)), str(workdir))
    assert [row["skipped"] for row in rows(workdir, "non_finite.jsonl")] == [True, False]
    with Checkpoints(str(workdir / "checkpoints"), read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 3
    assert all_finite(final_state(config_of(1), workdir))


def test_a_damaged_count_is_refused(skipped: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(skipped, workdir)
    for text in ("{", '{"step": 3}\n'):
        (workdir / "non_finite.jsonl").write_text(text)
        with pytest.raises(UserError, match=r"non_finite\.jsonl is damaged: it should hold"):
            evaluate(resolve(config_of(1)), str(workdir))
