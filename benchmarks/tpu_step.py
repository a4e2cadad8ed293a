# SPDX-License-Identifier: Apache-2.0
"""Compiles ImageNet-LT's train step for a TPU, and that of Flax's own ImageNet example.

    python -m benchmarks.tpu_step --topology=v5e:2x2 --experts=1,3

Both are ResNet-50 in bfloat16 on equal batches of 224 x 224 images, compiled in one run by the
TPU's compiler (`pip install "jax[tpu]"`; no TPU is needed). Cycles are its estimate for one device,
without communication. Nothing is measured. A step takes minutes to compile.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from balpoe_jax import cli
from balpoe_jax.aot import examine
from balpoe_jax.aot.topologies import chip_of, compile_only_devices
from balpoe_jax.config import resolve
from balpoe_jax.config.dataset_defaults import IMAGENET_LT, photo_config
from balpoe_jax.errors import UserError
from balpoe_jax.flops import count_flops
from balpoe_jax.reporting import tables
from benchmarks import flax_imagenet

# Heading, path in the result of `examine.examine_step`, and unit of each column.
_COLUMNS = (
    ("Mcycles", ("cycles",), 1e6),
    ("GFLOP", ("flops", "needed"), 1e9),
    ("util, %", ("utilisation",), 0.01),
    ("temp, MB", ("memory", "temporaries"), 1e6),
    ("all, MB", ("memory", "total"), 1e6),
    ("compile, s", ("compile_seconds",), 1),
)


def our_config(num_experts: int, batch_size: int) -> ConfigDict:
    """`configs/imagenet_lt.py` in bfloat16, with BatchNorm by device."""
    config = photo_config(IMAGENET_LT, f"experts={num_experts},batch_size={batch_size}")
    config.model.dtype = "bfloat16"
    config.parallel.sync_batch_norm = False
    return config


def compare(
    configs: dict[str, ConfigDict],
    topology: str,
    image_size: int = 224,
    stage_sizes: Sequence[int] = flax_imagenet.STAGE_SIZES,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Compiles Flax's step, then that of each config.

    Args:
        configs: Configs by name, at least one, with one batch size and images of `image_size`.
        topology: One of `topologies.TOPOLOGIES`.
        image_size: Height and width of the images.
        stage_sizes: Blocks in each stage of Flax's network.

    Yields:
        Name and figures of `examine.examine_step` for each compiled step. A config has two more
        figures: `cycles_ratio` and `flops_ratio`, relative to Flax's step.
    """
    chip, devices = chip_of(topology), compile_only_devices(topology)
    (batch_size,) = {config.batch_size for config in configs.values()}
    step, arguments = flax_imagenet.abstract_step(devices, batch_size, image_size, stage_sizes)
    theirs = examine.examine_step(step, arguments, batch_size, count_flops(step, *arguments), chip)
    yield "Flax's example", theirs
    for name, config in configs.items():
        ours = examine.examine_on(resolve(config), devices, chip, evaluation=False)["train"]
        ours["cycles_ratio"] = ours["cycles"] / theirs["cycles"]
        ours["flops_ratio"] = ours["flops"]["needed"] / theirs["flops"]["needed"]
        yield name, ours


def table(found: dict[str, dict[str, Any]]) -> tables.Table:
    """A table of steps; `found` has what `compare` yields, by name."""
    rows = []
    for name, step in found.items():
        values = [_value(step, path) / unit for _, path, unit in _COLUMNS]
        rows.append((name, [*values, step.get("cycles_ratio"), step.get("flops_ratio")]))
    headings = (*(heading for heading, _, _ in _COLUMNS), "cycles/Flax", "FLOP/Flax")
    columns = tuple(tables.Column(heading, "number") for heading in headings)
    return tables.Table("tpu_step", "The train step compiled for a TPU", columns, rows)


def _value(step: dict[str, Any], path: tuple[str, ...]) -> float:
    value: Any = step
    for key in path:
        value = value[key]
    return value


def define_flags() -> None:
    """Defines --topology, --images, --experts and --output."""
    flags.DEFINE_string("topology", "v5e:2x2", "TPU slice to compile for.")
    flags.DEFINE_integer("images", 64, "Number of images on a device.", lower_bound=1)
    flags.DEFINE_list("experts", ["1", "3"], "Numbers of experts; each is compiled by itself.")
    flags.DEFINE_string("output", "", "File to write all figures to as JSON.")


def main(arguments: Sequence[str]) -> None:
    """Compiles and prints, following the flags."""
    if len(arguments) > 1:
        raise UserError(f"Unexpected argument {arguments[1]!r}; every option starts with --.")
    if not all(number.isdecimal() and int(number) > 0 for number in flags.FLAGS.experts):
        raise UserError(f"--experts must be positive numbers, got {','.join(flags.FLAGS.experts)}.")
    jax.config.update("jax_platforms", "cpu")  # whatever accelerator is here stays untouched
    topology = flags.FLAGS.topology
    chip_of(topology)
    batch_size = flags.FLAGS.images * len(compile_only_devices(topology))
    numbers = [int(number) for number in flags.FLAGS.experts]
    configs = {f"BalPoE, experts: {n}": our_config(n, batch_size) for n in numbers}
    found = {}
    for name, step in compare(configs, topology):
        found[name] = step
        print(f"{name}: {step['cycles'] / 1e6:.2f} million cycles", flush=True)
    print(f"\n{flags.FLAGS.images} images a device, {topology}\n")
    print(tables.as_text(table(found), width=110))
    if flags.FLAGS.output:
        Path(flags.FLAGS.output).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run(define_flags, main)
