# SPDX-License-Identifier: Apache-2.0
"""Folders that look like those of evaluated runs, written without training."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from balpoe_jax.data.datasets.test_distributions import make_targets
from balpoe_jax.evaluation.predictions import Predictions
from balpoe_jax.evaluation.scoring import score
from balpoe_jax.files import to_json

COUNTS = np.array([300, 120, 50, 8])


def make_run(
    workdir: Path, num_experts: int = 3, name: str = "digits", seed: int = 0, **changes: Any
) -> dict:
    """Writes the files of a run with drawn predictions and returns its results.

    `changes` are fields of the config by their names with two underscores for a dot; `signal`, the
    logit of the right class; `never`, a class that is never predicted; and `note`.
    """
    random = np.random.default_rng(seed)
    signal, never = changes.pop("signal", 2), changes.pop("never", None)
    note = changes.pop("note", "")
    labels = np.repeat(np.arange(4), 25).astype(np.int32)
    logits = random.normal(size=(num_experts, 100, 4)).astype(np.float32)
    logits[:, np.arange(100), labels] += signal
    if never is not None:
        logits[:, :, never] -= 5000
    taus = tuple(np.linspace(0, 2, num_experts))
    scores = score(
        Predictions(logits, labels),
        COUNTS,
        taus,
        held_out=Predictions(logits[:, ::3], labels[::3]),
        held_out_description="34 of the very same",
        targets=make_targets(labels, COUNTS, (2, 50)),
    )
    sizes = {"num_parameters": 1_234_000, "forward_flops": 56_700_000}
    results = to_json({"step": 20, "epoch": 2, **sizes, **scores})
    if note:
        results["note"] = note
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
    environment = {"versions": {"jax": "1.2.3"}, "command": ["main.py", "--config=a&b"]}
    rows = [
        {"step": step, "epoch": step / 10, "loss": 2 - step / 20, "learning_rate": 0.1}
        | {"expert_losses": [2 - step / 20] * num_experts}
        for step in (5, 10, 15, 20)
    ]
    test = {f"test_{key}": results["test"][key] for key in ("top1", "many", "medium", "few")}
    rows.append({"step": 20, "epoch": 2.0, **test})
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "predictions").mkdir()
    np.save(workdir / "predictions" / "expert_logits.npy", logits)
    np.save(workdir / "predictions" / "labels.npy", labels)
    (workdir / "results.json").write_text(json.dumps(results))
    (workdir / "config.json").write_text(
        json.dumps({"config": config, "data": {}, "environment": environment})
    )
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return results
