# SPDX-License-Identifier: Apache-2.0
"""Measures the cost of each method's step, relative to that of cross-entropy in the same run.

    python -m benchmarks.method_steps --backbone=resnet8 --output=steps.json

All methods get batches of one size, with as many views as they ask for, on one CPU device. The cost
of making a batch is not included. A method that learns from a teacher gets an untrained one.
Further arguments of a method follow a colon, as in `--methods=ride:experts=6`. On a machine that is
not idle, go by the ratios of processor time.
"""

import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from balpoe_jax import cli
from balpoe_jax.errors import UserError
from balpoe_jax.reporting import tables
from benchmarks import measuring

_BASE = "cross_entropy"


def run(
    methods: Sequence[str], backbone: str, batch_size: int, repeats: int, seconds: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measures each method's step in turns with that of cross-entropy.

    Yields:
        The name of a method, and its `num_parameters` with the figures of `measuring.compare`,
        where cross-entropy is the other side.
    """
    base, _ = _make_step(_BASE, backbone, batch_size)
    for method in methods:
        step, num_parameters = _make_step(method, backbone, batch_size)
        samples = measuring.take_turns(
            {
                "ours": functools.partial(measuring.measure, step, seconds),
                "theirs": functools.partial(measuring.measure, base, seconds),
            },
            repeats,
        )
        compared = measuring.compare(samples["ours"], samples["theirs"], cores=1)
        yield method, {"num_parameters": num_parameters, **compared}


def _make_step(method: str, backbone: str, batch_size: int) -> tuple[Callable[[], None], int]:
    """A compiled update of a method on a fixed batch, and the number of its parameters."""
    # Not above: JAX and TensorFlow count the cores when they are imported.
    import jax

    from balpoe_jax import parallel
    from balpoe_jax.config import resolve
    from balpoe_jax.data.datasets import published
    from balpoe_jax.data.types import TrainBatch
    from balpoe_jax.experiment.build import build_program
    from balpoe_jax.experiment.program import num_parameters
    from balpoe_jax.methods import PRESETS

    config = _config(method, backbone)
    config.batch_size = batch_size
    counts, image_shape = published("cifar100", 100.0)
    devices = parallel.make_parallel(devices=jax.devices("cpu")[:1])
    build = functools.partial(
        build_program, devices=devices, class_counts=counts, image_shape=image_shape
    )
    with tempfile.TemporaryDirectory() as folder:
        if teacher := PRESETS[method.partition(":")[0]].teacher:
            taught_by = _config(":".join(teacher), backbone)
            teacher_state = build(resolve(taught_by)).init_state()
            _pretend_to_have_trained(taught_by, teacher_state, Path(folder))
            config.method.teacher = folder
        program = build(resolve(config))
        state: Any = program.init_state()
        constants = [program.load_constants()] if teacher else []
    random = np.random.default_rng(0)
    views = tuple(
        random.standard_normal((batch_size, *image_shape), np.float32)
        for _ in range(program.method.views)
    )
    labels = random.integers(0, len(counts), (2, batch_size)).astype(np.int32)
    weight = np.full(batch_size, 0.7, np.float32)
    batch = devices.shard(TrainBatch(views, labels[0], labels[1], weight))
    number = num_parameters(state.params)
    update = program.map_train_step()

    def step() -> None:
        nonlocal state
        state, metrics = update(state, batch, *constants)
        jax.block_until_ready(metrics)

    step()
    return step, number


def _config(method: str, backbone: str) -> Any:
    from balpoe_jax.config.dataset_defaults import cifar_config

    name, _, arguments = method.partition(":")
    further = f",{arguments}" if arguments else ""
    return cifar_config("cifar100", 0.4, f"method={name},backbone={backbone}{further}")


def _pretend_to_have_trained(config: Any, state: Any, workdir: Path) -> None:
    """Makes a folder look like the run of a config with this state as its newest checkpoint."""
    from balpoe_jax import files
    from balpoe_jax.run.checkpoint import Checkpoints

    text = json.dumps({"config": files.to_json(config.to_dict())})
    (workdir / files.CONFIG).write_text(text, encoding="utf-8")
    with Checkpoints(str(workdir / "checkpoints")) as checkpoints:
        checkpoints.save(state)


def as_text(found: dict[str, Any]) -> str:
    """The figures for a terminal."""
    rows = [
        (
            name,
            [
                f"{method['num_parameters']:,}",
                f"{1000 / method['ours']['per_second']:,.0f}",
                f"{1 / method['ratio']:.2f}",
                f"{1 / method['cpu_ratio']:.2f}",
            ],
        )
        for name, method in found["methods"].items()
    ]
    columns = tuple(map(tables.Column, ("parameters", "ms a step", "ratio", "ratio/cpu")))
    return "\n".join(
        (
            measuring.machine_line(found["machine"]),
            f"{found['backbone']}, batches of {found['batch_size']}, {found['cores']} core(s); "
            f"medians of {found['repeats']} turns; ratios to a step of {_BASE}",
            "",
            tables.as_text(tables.Table("steps", "", columns, rows)),
        )
    )


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_list(
        "methods",
        [],
        "Methods as in a config file's arguments, such as ride:experts=6; all by default.",
    )
    flags.DEFINE_string("backbone", "resnet8", "Network for small images.")
    flags.DEFINE_integer("batch_size", 128, "Number of images in a step.", lower_bound=2)
    flags.DEFINE_integer("cores", 2, "Number of cores.", lower_bound=1)
    flags.DEFINE_integer("repeats", 5, "Number of turns of each side.", lower_bound=1)
    flags.DEFINE_float(
        "seconds", 1.0, "Seconds of a turn, which is at least one step.", lower_bound=0.0
    )
    flags.DEFINE_string("output", "", "JSON file for the figures, which are printed as well.")


def main(arguments: Sequence[str]) -> None:
    """Measures and prints, following the flags."""
    if len(arguments) > 1:
        raise UserError(f"Unexpected argument {arguments[1]!r}; every option starts with --.")
    values = flags.FLAGS
    measuring.pin(values.cores)
    from balpoe_jax.methods import PRESETS

    unknown = [name for name in values.methods if name.partition(":")[0] not in PRESETS]
    if unknown:
        raise UserError(f"Unknown method {unknown[0]!r}; choose from {', '.join(PRESETS)}.")
    options: dict[str, Any] = {
        name: values[name].value for name in ("backbone", "batch_size", "repeats", "seconds")
    }
    found = {
        "machine": measuring.describe_machine(("jax",)),
        "cores": values.cores,
        **options,
        "methods": {},
    }
    for name, figures in run(values.methods or list(PRESETS), **options):
        found["methods"][name] = figures
        print(f"{name}: {1 / figures['cpu_ratio']:.2f}", flush=True)
        if values.output:  # each time, for all of them take long
            Path(values.output).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(as_text(found))


if __name__ == "__main__":
    cli.run(define_flags, main)
