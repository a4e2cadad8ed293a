# SPDX-License-Identifier: Apache-2.0
"""A folder for a hub: read back with the same numbers, its card, and what is refused."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

import balpoe_jax
from balpoe_jax.config import resolve
from balpoe_jax.errors import UserError
from balpoe_jax.evaluate import evaluate
from balpoe_jax.export import __main__ as exporting
from balpoe_jax.export import hub
from balpoe_jax.run import weights_file
from balpoe_jax.train import train
from tests.helpers import flag_calls, untrained_runs
from tests.helpers.digits_runs import tiny_config

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("tiny_experts", "no_page")]

CONFIG = {"optim__ema": 0.8, "eval__held_out_per_class": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_experts) -> Path:
    """A trained run whose averaged weights are evaluated."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("balpoe_jax.reporting.report.write_report_of", lambda *given: "no page")
        train(resolve(tiny_config(**CONFIG)), str(folder))
    return folder


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> Path:
    output = tmp_path / "hub"
    flag_calls.call(exporting, f"--workdir={run}", "--format=hub", f"--output={output}")
    return output


def test_it_predicts_and_evaluates_as_the_run_does(run: Path, folder: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    side = balpoe_jax.load(str(run)).image_size
    images = images[:, :side, :side]
    expected, found = (balpoe_jax.load(str(x)).predict(images) for x in (run, folder))
    np.testing.assert_array_equal(found.expert_logits, expected.expert_logits)
    np.testing.assert_array_equal(found.probabilities, expected.probabilities)
    before = json.loads((run / "results.json").read_text())
    results = evaluate(resolve(tiny_config(**CONFIG)), str(folder))
    assert results["test"] == before["test"] and results["temperature"] == before["temperature"]
    assert results["step"] == before["step"]


def test_the_card_has_a_head_for_the_hub_and_the_figures(run: Path, folder: Path) -> None:
    text = (folder / hub.CARD).read_text()
    _, head, body = text.split("---\n", 2)
    content = yaml.safe_load(head)
    assert content["pipeline_tag"] == "image-classification"
    results = json.loads((run / "results.json").read_text())
    (reported,) = content["model-index"][0]["results"]
    assert reported["metrics"][0] == {
        "type": "accuracy",
        "value": pytest.approx(results["test"]["top1"], abs=5e-5),
    }
    assert f"| ECE | {100 * results['test']['ece']:.1f} |" in body
    assert "| 0 | 130 |" in body and "413 images, 130 to 5 a class" in body
    for heading in ("## Use", "## Limits", "## Training images by class"):
        assert heading in body


def test_nothing_of_the_machine_is_in_it(run: Path, folder: Path) -> None:
    record = json.loads((folder / "config.json").read_text())
    assert set(record) <= {"config", "resolved", "data"}
    assert record["config"]["data"]["data_dir"] is None
    for path in folder.glob("*.json"):
        assert str(run) not in path.read_text()


def test_other_weights_are_named(folder: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    flat = load_file(folder / weights_file.FILE)
    first, second = sorted(flat)[:2]
    changed = {name: value for name, value in flat.items() if name != first}
    changed |= {"more/kernel": np.zeros(3, np.float32), second: np.zeros((1, 2, 3), np.float32)}
    save_file(changed, folder / weights_file.FILE)
    message = rf"1 missing: {first}; 1 extra: more/kernel; 1 of another shape: {second}\)"
    with pytest.raises(UserError, match=message):
        balpoe_jax.load(str(folder))
    (folder / weights_file.FILE).write_bytes(b"garbage")
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        balpoe_jax.load(str(folder))
    (folder / weights_file.FILE).unlink()
    with pytest.raises(UserError, match="There is no checkpoint in"):
        balpoe_jax.load(str(folder))


def test_a_run_without_results_has_no_card(tmp_path: Path) -> None:
    made = untrained_runs.make(tmp_path / "run", "digits_lt", "")
    with pytest.raises(UserError, match="has no results to show on a card; evaluate it first"):
        hub.write(balpoe_jax.load(str(made)), tmp_path)


def test_the_runs_own_record_stays(run: Path) -> None:
    before = (run / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"is the run's; choose another --output"):
        flag_calls.call(exporting, f"--workdir={run}", "--format=hub", f"--output={run}/.")
    assert (run / "config.json").read_bytes() == before


def test_the_folder_is_uploaded(run: Path, tmp_path: Path, monkeypatch) -> None:
    made: list[tuple] = []

    class Interface:
        def create_repo(self, name: str, exist_ok: bool) -> None:
            made.append((name, exist_ok))

        def upload_folder(self, folder_path: str, repo_id: str) -> str:
            made.append((sorted(path.name for path in Path(folder_path).iterdir()), repo_id))
            return "https://hub/me/digits"

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=Interface))
    given = f"--workdir={run}", f"--output={tmp_path / 'out'}", "--push=me/digits"
    with pytest.raises(UserError, match="--push uploads the folder of --format=hub"):
        flag_calls.call(exporting, *given)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    flag_calls.call(exporting, *given, "--format=hub")
    names = ["README.md", "config.json", "model.json", "model.safetensors", "model.stablehlo"]
    assert made == [("me/digits", True), ([*names, "results.json"], "me/digits")]


class ConnectError(Exception):
    """As that of an HTTP client, which is no OSError."""


@pytest.mark.parametrize("kind", [OSError, ConnectError])
def test_an_upload_that_fails_and_one_without_the_package(
    tmp_path: Path, monkeypatch, kind: type[Exception]
) -> None:
    class Interface:
        def create_repo(self, name: str, exist_ok: bool) -> None:
            raise kind("401 Client Error: no login\nmore")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=Interface))
    with pytest.raises(UserError, match=r"to me/digits \(401 Client Error: no login\); check the"):
        hub.push(tmp_path, "me/digits")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'balpoe_jax\[hub\]'"):
        hub.push(tmp_path, "me/digits")
