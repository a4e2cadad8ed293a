# SPDX-License-Identifier: Apache-2.0
"""Compares our input pipeline with the same transforms by Pillow in worker processes.

    python -m benchmarks.input_pipeline --data_dir=DIR [--cores=1] [--profile] [--output=FILE]

Both sides run on the same cores, by turns. `benchmarks/README.md` explains the figures.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from balpoe_jax import cli
from balpoe_jax.errors import UserError
from balpoe_jax.reporting import tables
from benchmarks import measuring
from benchmarks.pil_workers import PilWorkers

CASES = ("cifar standard", "cifar long", "photos standard", "photos long")


def run_case(case: Any, cores: int, repeats: int, seconds: float) -> dict[str, Any]:
    """Measures both sides of a `tf_pipeline.Case`; see `measuring.compare`."""
    with PilWorkers(case.transform, case.pil_examples(), case.settings.batch_size, cores) as pil:
        samples = measuring.take_turns(
            {
                "ours": lambda: case.measure(seconds),
                "theirs": lambda: pil.measure(seconds),
            },
            repeats,
        )
    return {
        "data": case.description,
        "batch_size": case.settings.batch_size,
        **measuring.compare(samples["ours"], samples["theirs"], cores),
    }


def as_text(found: dict[str, Any]) -> str:
    """The figures for a terminal."""
    columns = [tables.Column(name, "number") for name in ("ours", "PIL", "ratio")]
    columns += [tables.Column("range", "number")]
    columns += [tables.Column(name, "number") for name in ("ours/cpu", "PIL/cpu", "ratio/cpu")]
    rows = [(name, measuring.shown(case)) for name, case in found["cases"].items()]
    text = [
        measuring.machine_line(found["machine"]),
        *dict.fromkeys(
            f"{name.split()[0]}: {case['data']}, batches of {case['batch_size']}"
            for name, case in found["cases"].items()
        ),
        f"Images a second and core, medians of {found['repeats']} turns of {found['seconds']:g} s "
        f"on {found['cores']} core(s); /cpu: a second of processor time",
        "",
        tables.as_text(tables.Table("input", "", tuple(columns), rows)),
    ]
    for name, stages in found["profile"].items():
        text += ["", f"{name}: microseconds of processor time an image, by stage", ""]
        text += [f"  {stage:<22}{value:>9.1f}" for stage, value in stages]
    return "\n".join(text)


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("data_dir", "", "TFDS folder; without it images are generated.")
    flags.DEFINE_list(
        "cases", list(CASES), "Names of cases, as in --cases='cifar long,photos long'."
    )
    flags.DEFINE_integer("cores", 1, "Number of cores for each side.", lower_bound=1)
    flags.DEFINE_integer("repeats", 7, "Number of turns of each side.", lower_bound=1)
    flags.DEFINE_float("seconds", 2.0, "Seconds of a turn.", lower_bound=0.0)
    flags.DEFINE_integer("batch_size", 0, "Batch size; 0 for the recipes'.", lower_bound=0)
    flags.DEFINE_integer("image_size", 0, "Size of photographs; 0 for 224.", lower_bound=0)
    flags.DEFINE_bool("profile", False, "Whether to show the time of each stage of our pipeline.")
    flags.DEFINE_string("output", "", "JSON file for the figures, which are printed as well.")


def main(arguments: Sequence[str]) -> None:
    """Measures and prints, following the flags."""
    if len(arguments) > 1:
        raise UserError(f"Unexpected argument {arguments[1]!r}; every option starts with --.")
    values = flags.FLAGS
    for name in values.cases:
        if name not in CASES:
            raise UserError(f"Unknown case {name!r}; choose from {', '.join(CASES)}.")
    measuring.pin(values.cores)
    # Not above: TensorFlow counts the cores, and worker processes must not import it.
    from benchmarks import tf_pipeline

    found: dict[str, Any] = {
        "machine": measuring.describe_machine(("pillow", "tensorflow-cpu")),
        "cores": values.cores,
        "repeats": values.repeats,
        "seconds": values.seconds,
        "cases": {},
        "profile": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        for name in values.cases:
            case = tf_pipeline.make_case(
                name, values.data_dir, Path(scratch), values.batch_size, values.image_size
            )
            found["cases"][name] = run_case(case, values.cores, values.repeats, values.seconds)
            if values.profile:
                found["profile"][name] = tf_pipeline.profile(case, values.seconds)
    print(as_text(found))
    if values.output:
        Path(values.output).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run(define_flags, main)
