# SPDX-License-Identifier: Apache-2.0
"""Folders that look like those of evaluated runs, written without training."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from balpoe_jax.data.datasets.test_distributions import make_targets
from balpoe_jax.data.records.sources import ArraySource
from balpoe_jax.evaluation import pictures
from balpoe_jax.evaluation.predictions import Predictions
from balpoe_jax.evaluation.scoring import score
from balpoe_jax.files import to_json

COUNTS = np.array([300, 120, 50, 8])


def make_run(
    workdir: Path, num_experts: int = 3, name: str = "digits", seed: int = 0, **changes: Any
) -> dict:
    """Writes the files of a run with random predictions, and returns its results.

    `changes` are fields of the config, with two underscores for a dot, and four more: `signal`,
    which is added to the logit of the right class; `never`, a class that is never predicted;
    `names`, the classes' names; and `note`, the results' note.
    """
    signal, never = changes.pop("signal", 2), changes.pop("never", None)
    note, names = changes.pop("note", ""), changes.pop("names", ())
    logits, labels = _draw_predictions(num_experts, seed, signal, never)
    scores = score(
        Predictions(logits, labels),
        COUNTS,
        tuple(np.linspace(0, 2, num_experts)),
        held_out=Predictions(logits[:, ::3], labels[::3]),
        held_out_description="34 of the very same",
        targets=make_targets(labels, COUNTS, (2, 50)),
    )
    sizes = {"num_parameters": 1_234_000, "forward_flops": 56_700_000}
    results = to_json({"step": 20, "epoch": 2, **sizes, **scores})
    if note:
        results["note"] = note
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "predictions").mkdir()
    np.save(workdir / "predictions" / "expert_logits.npy", logits)
    np.save(workdir / "predictions" / "labels.npy", labels)
    images = np.arange(100 * 4 * 4 * 3).reshape(100, 4, 4, 3).astype(np.uint8)
    source = ArraySource(images, labels.astype(np.int64), np.arange(100))
    pictures.save(workdir / "predictions", source, Predictions(logits, labels), COUNTS)
    (workdir / "results.json").write_text(json.dumps(results))
    (workdir / "config.json").write_text(
        json.dumps(
            {
                "config": _make_config(num_experts, name, seed, changes),
                "data": {"class_names": list(names)},
                "environment": {
                    "versions": {"jax": "1.2.3"},
                    "command": ["main.py", "--config=a&b"],
                },
            }
        )
    )
    rows = _make_rows(num_experts, results["test"])
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return results


def _draw_predictions(
    num_experts: int, seed: int, signal: float, never: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Logits float32 `[E, 100, 4]` and labels int32 `[100]`; `make_run` has the arguments."""
    labels = np.repeat(np.arange(4), 25).astype(np.int32)
    logits = np.random.default_rng(seed).normal(size=(num_experts, 100, 4)).astype(np.float32)
    logits[:, np.arange(100), labels] += signal
    if never is not None:
        logits[:, :, never] -= 5000
    return logits, labels


def _make_config(num_experts: int, name: str, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "data": {"name": name, "imbalance_ratio": 40.0, "shot_thresholds": [20, 100]},
        "model": {"name": "resnet8", "num_experts": num_experts},
        "mix": {"alpha": 0.4},
        "optim": {"learning_rate": 0.1, "schedule": "step", "weight_decay": 5e-4},
        "eval": {"num_bins": 15},
        "total_epochs": 2,
        "batch_size": 10,
        "seed": seed,
    }
    for field, value in changes.items():
        section, _, key = field.partition("__")
        config[section][key] = value
    return config


def _make_rows(num_experts: int, test: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`: four of training, and one with the scores of the test set."""
    rows: list[dict[str, Any]] = [
        {"step": step, "epoch": step / 10, "loss": 2 - step / 20, "learning_rate": 0.1}
        | {"expert_losses": [2 - step / 20] * num_experts}
        for step in (5, 10, 15, 20)
    ]
    scores = {f"test_{key}": test[key] for key in ("top1", "many", "medium", "few")}
    return [*rows, {"step": 20, "epoch": 2.0, **scores}]
