# SPDX-License-Identifier: Apache-2.0
"""Trains rows of CIFAR-100-LT with the package's own `train`, in a process of its own.

`benchmarks.accelerator` runs this. Each seed gets a workdir with a report, like a run of
`python -m balpoe_jax.main`, and a line of results once it is evaluated.
"""

import runpy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from balpoe_jax import cli, files
from balpoe_jax.config import resolve
from balpoe_jax.reporting import tables
from balpoe_jax.run.startup_times import of_this_process
from balpoe_jax.train import train
from benchmarks import toy_network
from benchmarks.sides import ROOT, Job, Results, Row, read

CONFIG = ROOT / "configs" / "cifar100_lt.py"

# The scores of the test set that a result has.
SCORES = ("top1", "many", "medium", "few", "ece", "mce", "nll")


def train_row(
    arguments: str, seed: int, workdir: Path, fields: dict[str, Any], began: float
) -> Row:
    """Trains and evaluates a seed of a row.

    Args:
        arguments: Arguments after the colon of `--config`.
        seed: Seed of the run.
        workdir: Folder of the run.
        fields: Further fields of the config, such as `data.data_dir`.
        began: Start of the row, in seconds since the epoch.

    Returns:
        Scores as fractions, the balanced accuracy on held-out images, parameters, operations of a
        prediction, seconds in all, steps and images a second.
    """
    config = runpy.run_path(str(CONFIG))["get_config"](arguments)
    config.update_from_flattened_dict({"seed": seed, "data.pipeline": "device", **fields})
    results = train(resolve(config), str(workdir))
    rows = read(workdir / files.METRICS)
    # The first interval is mostly compilation.
    speeds = sorted(row["images_per_second"] for row in rows[1:] if "images_per_second" in row)
    speed = speeds[len(speeds) // 2] if speeds else None
    return {
        **{name: results["test"][name] for name in SCORES},
        "held_out": (results.get("held_out") or {}).get("balanced"),
        **{name: results.get(name) for name in tables.SIZE_COLUMNS},
        "steps": max(row["step"] for row in rows),
        "images_per_second": speed,
        "seconds": time.time() - began,
        "device": jax.devices()[0].device_kind,
    }


def main(arguments: Sequence[str]) -> None:
    """Trains the rows of the job one after the other, as long as there is time."""
    job = Job.parse(arguments)
    began = of_this_process().began
    results, options = Results(job), job.options
    cli.use_compilation_cache(options["cache"])
    for row in options["rows"]:
        label = {name: row[name] for name in ("row", "name", "seed", "arguments")}
        workdir = Path(options["runs"]) / f"{row['name']}_seed{row['seed']}"

        def one(row: Row = row, workdir: Path = workdir, began: float = began) -> Row:
            fields = {**options["fields"], **row.get("fields", {})}
            with toy_network.used(options["toy"]):
                found = train_row(row["arguments"], row["seed"], workdir, fields, began)
            return {**found, "workdir": workdir.name}

        results.attempt(label, row["estimate"], one)
        began = time.time()


if __name__ == "__main__":
    cli.run(lambda: None, main)
