# SPDX-License-Identifier: Apache-2.0
"""Whole runs whose averaged weights are evaluated: resumed, restored, recorded, refused."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import balpoe_jax
from balpoe_jax.config import Settings, resolve
from balpoe_jax.errors import UserError
from balpoe_jax.evaluate import Evaluator, evaluate
from balpoe_jax.evaluation import predictions, statistics
from balpoe_jax.experiment.build import build
from balpoe_jax.experiment.settings import learning_rates
from balpoe_jax.reporting import report
from balpoe_jax.run import teachers
from balpoe_jax.run.checkpoint import Checkpoints
from balpoe_jax.train import train
from tests.helpers.config_files import get_config
from tests.helpers.digits_runs import final_state, interrupt, tiny_config

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("tiny_experts", "no_page")]

ALL = {"optim__sam": 0.05, "mix__regmixup": True, "mix__alpha": 10.0}
AVERAGES = {
    "ema": {"optim__ema": 0.8, **ALL},
    "swa": {"optim__swa": 1, "optim__swa_learning_rate": 0.02, **ALL},
    "device": {"optim__swa": 1, "data__pipeline": "device", **ALL},
    "bfloat16": {
        "optim__ema": 0.8,
        "model__dtype": "bfloat16",
        "model__remat": True,
        "optim__accumulation_steps": 5,
        "optim__skip_non_finite": 1,
        **ALL,
    },
}
SAYS = {"average": "ema", "decay": 0.8}, {"average": "swa", "epochs": 2}


def config_of(name: str, **changes):
    fields = {"total_epochs": 3, "eval__held_out_per_class": 2, "eval__shift_ratios": (10.0,)}
    return tiny_config(**{**fields, **AVERAGES[name], **changes})


@pytest.mark.slow
@pytest.mark.parametrize("name", AVERAGES)
def test_a_run(name: str, tmp_path: Path) -> None:
    """Resumed it has the same bits; restored it gives the same results, which name the weights."""
    config, finished, resumed = config_of(name), tmp_path / "finished", tmp_path / "resumed"
    results = train(resolve(config), str(finished))
    assert results["weights"] == SAYS["swa" in str(AVERAGES[name])]
    written = (finished / "results.json").read_bytes()
    interrupt(finished, resumed, epoch=2)
    train(resolve(config), str(resumed))
    jax.tree.map(
        np.testing.assert_array_equal, final_state(config, resumed), final_state(config, finished)
    )
    assert (resumed / "results.json").read_bytes() == written
    (finished / "results.json").unlink()
    evaluate(resolve(config), str(finished))
    assert (finished / "results.json").read_bytes() == written


def predicted(evaluator: Evaluator, state, folder: Path) -> np.ndarray:
    evaluator.score_test(state, folder)
    return np.load(folder / "expert_logits.npy").copy()


def test_what_is_predicted_is_of_the_averaged_weights(tmp_path: Path) -> None:
    """And of statistics that do not depend on the running averages of the newest ones."""
    config = config_of("swa", mix__regmixup=False)
    experiment = build(resolve(config))
    evaluator, state = Evaluator(experiment), experiment.program.init_state()
    state = state.replace(step=state.step + 6)  # two epochs; the second one counts
    first = predicted(evaluator, state, tmp_path / "a")
    newest = jax.tree.map(lambda x: 2 * x + 1, (state.params, state.batch_stats))
    moved = state.replace(params=newest[0], batch_stats=newest[1])
    np.testing.assert_array_equal(predicted(evaluator, moved, tmp_path / "b"), first)
    early = moved.replace(step=moved.step - 1)  # before there is an average
    assert (predicted(evaluator, early, tmp_path / "c") != first).any()
    averages = jax.tree.map(lambda x: 2 * x, state.averages)
    other = predicted(evaluator, state.replace(averages=averages), tmp_path / "d")
    assert (other != first).any()


@pytest.mark.slow_cases("ema")
@pytest.mark.parametrize("name", ["swa", "ema"])
def test_a_run_predicts_by_the_weights_that_were_evaluated(name: str, tmp_path: Path) -> None:
    """Without its training images; before an evaluation SWA has no statistics to predict with."""
    config = config_of(name, mix__regmixup=False, total_epochs=2, optim__sam=0.0)
    train(resolve(config), str(tmp_path))
    test = build(resolve(config)).data.test
    expected = predictions.load(tmp_path / "predictions").expert_logits
    found = balpoe_jax.load(str(tmp_path)).predict(test.images)
    np.testing.assert_allclose(found.expert_logits, expected, rtol=1e-5, atol=1e-5)
    if name == "swa":
        file = tmp_path / "predictions" / statistics.FILE
        statistics.save(file.parent, 5, {"a": np.zeros(3)})
        with pytest.raises(UserError, match=r"statistics after step 6 are not there; evaluate it"):
            balpoe_jax.load(str(tmp_path))
        statistics.save(file.parent, 6, {"a": np.zeros(3)})
        with pytest.raises(UserError, match=r"averaged_statistics\.npz does not fit the run's net"):
            balpoe_jax.load(str(tmp_path))
        cut = file.read_bytes()[:90]
        with file.open("wb") as other:
            np.savez(other, step=np.arange(3))
        assert statistics.load(file.parent, 6) is None
        with file.open("wb") as other:
            np.save(other, np.arange(3))  # an array alone
        assert statistics.load(file.parent, 6) is None
        file.write_bytes(cut)
        with pytest.raises(UserError, match=r"are not there; evaluate it"):
            balpoe_jax.load(str(tmp_path))


def test_statistics_are_of_unmixed_training_images() -> None:
    for pipeline in ("host", "device"):
        experiment = build(resolve(config_of("swa", data__pipeline=pipeline)))
        batches = list(experiment.inputs.statistics_batches())
        assert len(batches) == experiment.program.context.steps_per_epoch == 3
        labels = batches[0].labels if pipeline == "host" else batches[0]["labels"]
        assert labels.size == 140  # and not twice as many


def test_a_second_phase_begins_an_average_of_its_own() -> None:
    config = get_config("digits_lt", "method=crt,epochs=2")
    config.optim.ema = 0.9
    program = build(resolve(config)).program
    state = program.init_state()
    assert all(map(np.array_equal, *map(jax.tree.leaves, (state.averages["params"], state.params))))
    later = state.replace(averages=jax.tree.map(lambda x: x + 1, state.averages))
    begun = program.begin_phase(1, later)
    expected = {"params": begun.params, "batch_stats": begun.batch_stats}
    jax.tree.map(np.testing.assert_array_equal, begun.averages, expected)


def test_a_checkpoint_without_an_average_has_nothing_of_it(tmp_path: Path) -> None:
    """Neither in memory nor on disk; with another config it is refused."""
    plain = build(resolve(tiny_config())).program
    assert plain.abstract_state().averages is None
    with Checkpoints(str(tmp_path / "checkpoints")) as checkpoints:
        checkpoints.save(plain.init_state())
        checkpoints.wait()
        saved = checkpoints._manager.item_metadata(0)["state"]
        assert set(saved) == {"step", "params", "batch_stats", "opt_state"}
        averaging = build(resolve(tiny_config(optim__ema=0.9))).program
        with pytest.raises(UserError, match=r"absent instead of .* use the config that it was"):
            checkpoints.restore_latest(averaging.abstract_state())


def test_the_rates_of_swa_begin_with_the_first_averaged_epoch() -> None:
    phase = resolve(config_of("swa", total_epochs=4, optim__swa_anneal_epochs=0))
    plain = resolve(tiny_config(total_epochs=4))
    expected = [*learning_rates(plain)[:2], 0.02, 0.02]
    np.testing.assert_allclose(learning_rates(phase), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("balpoe", {"ema": 0.9, "swa": 1}, r"each say which average .* got 0\.9 and 1; set one"),
        ("balpoe", {"swa": 2}, r"swa must be less than config\.total_epochs, .* got 2 of 2"),
        ("mislas", {"swa": 1}, r"of one phase, and config\.phase2\.epochs .* use config\.optim\.e"),
        ("balpoe", {"ema": 1.0}, r"config\.optim\.ema must be from 1e-06 to"),
        ("balpoe", {"sam": -0.1}, r"config\.optim\.sam must be from 0 to 1000, or None"),
    ],
)
def test_what_does_not_go_together_is_refused(method: str, changes: dict, message: str) -> None:
    config = get_config("digits_lt", f"method={method},epochs=2")
    config.optim.update(changes)
    with pytest.raises(UserError, match=message):
        resolve(config)


def test_a_teacher_teaches_by_its_averaged_weights(tmp_path: Path) -> None:
    state = build(resolve(tiny_config(optim__ema=0.9))).program.init_state()
    state = state.replace(averages=jax.tree.map(lambda x: x + 1, state.averages))
    with Checkpoints(str(tmp_path / "checkpoints")) as checkpoints:
        checkpoints.save(state)
    loaded = teachers.load(str(tmp_path), state)
    jax.tree.map(np.testing.assert_array_equal, loaded, state.averages)


def test_a_teacher_without_statistics_is_refused(tmp_path: Path) -> None:
    config = tiny_config(optim__swa=1)
    (tmp_path / "config.json").write_text(json.dumps({"config": config.to_dict()}))
    with pytest.raises(UserError, match=r"config\.optim\.swa=1, whose average has no statistics"):
        teachers.read_settings(str(tmp_path), Settings(data=resolve(config).data))


def test_the_report_names_the_weights() -> None:
    told = [report._weights(weights) for weights in (*SAYS, {"average": "none"})]
    assert told == [
        "moving average of the weights, decay 0.8",
        "mean of the weights after 2 epochs",
        "the newest weights",
    ]
