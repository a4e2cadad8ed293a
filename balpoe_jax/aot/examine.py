# SPDX-License-Identifier: Apache-2.0
"""The needs of an experiment's compiled steps: memory, operations, traffic, communication."""

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from balpoe_jax.aot import gpus, hlo, kernels
from balpoe_jax.aot.gpus import Gpu
from balpoe_jax.aot.topologies import Chip, chip_of, compile_only_devices
from balpoe_jax.data.types import EvalBatch, TrainBatch
from balpoe_jax.errors import UserError
from balpoe_jax.flops import count_flops
from balpoe_jax.parallel import make_parallel

if TYPE_CHECKING:  # it takes a second to import
    from balpoe_jax.config import Settings
    from balpoe_jax.experiment.program import Program

# The mode that compiles for absent devices; pmap gives the same numbers, but only where they are.
_MODE = "shard_map"

# Labels, places and units of the figures in the text.
_ROWS = (
    ("compile time, s", ("compile_seconds",), 1),
    ("memory: arguments, MB", ("memory", "arguments"), 1e6),
    ("memory: results, MB", ("memory", "outputs"), 1e6),
    ("memory: of these shared, MB", ("memory", "aliased"), 1e6),
    ("memory: temporaries, MB", ("memory", "temporaries"), 1e6),
    ("memory: program, MB", ("memory", "code"), 1e6),
    ("memory in all, MB", ("memory", "total"), 1e6),
    ("  of the device's, %", ("memory", "fraction"), 0.01),
    ("products needed, GFLOP", ("flops", "needed"), 1e9),
    ("counted by the compiler, GFLOP", ("flops", "compiler"), 1e9),
)
_TPU_ROWS = (
    ("estimated cycles, million", ("cycles",), 1e6),
    ("  time, ms", ("seconds",), 1e-3),
    ("  images/s on all devices", ("images_per_second",), 1),
    ("  utilisation, %", ("utilisation",), 0.01),
)
_GPU_ROWS = (
    ("kernels", ("kernels", "count"), 1),
    *((f"  {kind}", ("kernels", "kinds", kind), 1) for kind in kernels.KINDS),
    ("launches", ("kernels", "launches"), 1),
    ("memory traffic, MB", ("kernels", "bytes"), 1e6),
    ("  takes at least, ms", ("kernels", "traffic_seconds"), 1e-3),
    ("products take at least, ms", ("kernels", "product_seconds"), 1e-3),
)


def examine(settings: "Settings", topology: str) -> dict[str, Any]:
    """Compiles both steps of an experiment for a topology; returns the figures of the command.

    Raises:
        UserError (a `ValueError`): a topology that is unknown, no compiler, a config that is not
            valid or whose batch the devices cannot share, or steps that need too much memory.
    """
    if topology in gpus.TOPOLOGIES:
        gpu = gpus.GPUS[topology.partition(":")[0]]
        found = examine_on(settings, gpus.compile_only_devices(topology), gpu)
    else:
        found = examine_on(settings, compile_only_devices(topology), chip_of(topology))
    return {"topology": topology, **found}


def examine_on(
    settings: "Settings", devices: Sequence[jax.Device], chip: Chip | Gpu, evaluation: bool = True
) -> dict[str, Any]:
    """Compiles the steps of an experiment for given devices, as `examine` does.

    Args:
        settings: Settings of the experiment.
        devices: Devices, all of that chip.
        chip: Kind of the devices.
        evaluation: Whether to compile the eval step, too.
    """
    # Here and not above, so that wrong flags are told at once.
    from balpoe_jax.experiment.build import build_program, describe_data
    from balpoe_jax.experiment.program import num_parameters

    counts, image_shape = describe_data(settings)
    parallel = make_parallel(_MODE, devices)

    without = dataclasses.replace(settings, model=dataclasses.replace(settings.model, remat=False))
    program = build_program(settings, parallel, counts, image_shape)
    plain = build_program(without, parallel, counts, image_shape)
    state = program.abstract_state()

    train_batch, eval_batch = abstract_batches(program)
    train_arguments, eval_arguments = (state, train_batch), (state.variables, eval_batch)
    # What is computed twice to save memory is needed once.
    train_flops = count_flops(plain.map_train_step(), *train_arguments)
    train_step = program.map_train_step()
    if settings.data.pipeline == "device":
        train_step, *planned = _planned_step(settings, program, counts)
        train_arguments = (state, *planned)
    found = {
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "hbm_bytes": chip.hbm_bytes,
        "peak_flops": chip.peak_flops,
        "parallel_mode": _MODE,
        "model": settings.model.name,
        "dtype": settings.model.dtype,
        "num_experts": settings.model.num_experts,
        "expert_map": program.model.expert_map,
        "num_parameters": num_parameters(state.params),
        "image_shape": image_shape,
        "accumulate": settings.optim.accumulation_steps,
        "pipeline": settings.data.pipeline or "host",
        "train": examine_step(train_step, train_arguments, settings.batch_size, train_flops, chip),
    }
    if evaluation:
        eval_flops = count_flops(plain.map_eval_step(), *eval_arguments)
        found["eval"] = examine_step(
            program.map_eval_step(), eval_arguments, program.eval_batch_size, eval_flops, chip
        )
    return found


def abstract_batches(program: "Program") -> tuple[TrainBatch, EvalBatch]:
    """Shapes, dtypes and placement of what `data.pipeline` feeds the train and the eval step."""
    dtype, placement = jnp.dtype(program.settings.model.dtype), program.parallel.sharded

    def rows(size: int, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *shape), dtype, sharding=placement)

    settings, shape = program.settings, program.image_shape
    size = settings.batch_size * settings.mix.rows_per_image
    views = tuple(rows(size, dtype, *shape) for _ in range(program.method.views))
    labels, weight = rows(size, jnp.int32), rows(size, jnp.float32)
    size = program.eval_batch_size
    tested = rows(size, dtype, *shape), rows(size, jnp.int32), rows(size, jnp.bool_)
    return TrainBatch(views, labels, labels, weight), EvalBatch(*tested)


def _planned_step(
    settings: "Settings", program: "Program", counts: npt.NDArray[np.int64]
) -> tuple[Any, Any, Any, Any]:
    """The train step that makes its own batch, with its abstract plan, images and constants."""
    from balpoe_jax.data.device.plans import Planner
    from balpoe_jax.experiment.inputs import map_planned_step
    from balpoe_jax.experiment.settings import train_settings

    labels = np.repeat(np.arange(len(counts)), counts)
    planner = Planner(labels, program.image_shape, train_settings(settings)[0])
    placed = program.parallel

    def abstract(tree: Any, placement: jax.sharding.Sharding) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement), tree
        )

    images = jax.ShapeDtypeStruct((len(labels), *program.image_shape[:2]), jnp.uint32)
    of_batches = {"images": images, "tables": planner.tables()}
    return (
        map_planned_step(placed, program.train_step(), planner, scanned=False),
        abstract(planner.step(0), placed.sharded),
        abstract(of_batches, placed.replicated),
        {},
    )


def examine_step(
    step: Any, arguments: tuple[Any, ...], batch_size: int, needed_flops: int, chip: Chip | Gpu
) -> dict[str, Any]:
    """Compiles a step and returns what it needs, a part of the result of `examine`.

    Args:
        step: Function that `jax.jit` returned, over devices that are such chips.
        arguments: Abstract arguments with shardings, see `jax.ShapeDtypeStruct`.
        batch_size: Size of the global batch.
        needed_flops: Operations of one device, see `flops.count_flops`.
        chip: Kind of the devices.
    """
    start = time.perf_counter()
    try:
        compiled, launches = _compile(step.lower(*arguments), chip)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).partition("RESOURCE_EXHAUSTED: ")[2].partition("\n")[0].rstrip(".")
        raise UserError(
            f"The step does not fit into a device's memory ({reason}); choose a smaller "
            "--config.batch_size, --config.optim.accumulation_steps=2 or more, "
            "--config.model.remat=True, --config.model.dtype=bfloat16 or a larger topology."
        ) from error
    seconds = time.perf_counter() - start
    text = compiled.as_text()
    cycles = hlo.estimated_cycles(text)
    found = {
        "batch_size": batch_size,
        "compile_seconds": seconds,
        "memory": _memory(compiled.memory_analysis(), chip),
        "flops": {
            "needed": needed_flops,
            "compiler": (compiled.cost_analysis() or {}).get("flops"),  # a GPU's keeps silent
        },
        "collectives": [
            {"kind": each.kind, "count": each.count, "bytes": each.bytes}
            for each in hlo.collectives(text)
        ],
    }
    if isinstance(chip, Gpu):
        counted = kernels.kernels(text)
        return found | {
            "kernels": {
                "count": counted.count,
                "kinds": counted.kinds,
                "launches": launches,
                "bytes": counted.bytes,
                "traffic_seconds": counted.bytes / chip.bandwidth,
                "product_seconds": needed_flops / chip.peak_flops,
            }
        }
    duration = cycles / chip.clock_hertz if cycles else None
    return found | {
        "cycles": cycles,
        "seconds": duration,
        "images_per_second": batch_size / duration if duration else None,
        "utilisation": needed_flops / (cycles * chip.flops_per_cycle) if cycles else None,
    }


def _compile(lowered: Any, chip: Chip | Gpu) -> tuple[Any, int | None]:
    """The compiled program, and for a GPU the number of its launches, which only a dump tells."""
    if not isinstance(chip, Gpu):
        return lowered.compile(), None
    with tempfile.TemporaryDirectory() as dump:
        compiled = lowered.compile(compiler_options={"xla_dump_to": dump})
        return compiled, kernels.launches(Path(dump))


def _memory(stats: Any, chip: Chip | Gpu) -> dict[str, float]:
    """Bytes on one device; results that reuse the memory of arguments count once in the total."""
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    total = sum(memory.values()) - 2 * memory["aliased"]
    return {**memory, "total": total, "fraction": total / chip.hbm_bytes}


def as_text(found: dict[str, Any]) -> str:
    """The result of `examine`, for a terminal."""
    from balpoe_jax.reporting import tables

    steps = [found["train"], found["eval"]]
    own = _GPU_ROWS if "kernels" in found["train"] else _TPU_ROWS
    rows = [
        (label, [_figure(step, path, unit) for step in steps])
        for label, path, unit in (*_ROWS, *own)
    ]
    for kind in hlo.COLLECTIVES:
        of_kind = [[each for each in s["collectives"] if each["kind"] == kind] for s in steps]
        if any(of_kind):
            rows.append((kind, [str(sum(e["count"] for e in each)) for each in of_kind]))
            sizes = [_shown(sum(e["bytes"] for e in each) / 1e6) for each in of_kind]
            rows.append((f"  {kind}, MB", sizes))
    columns = tuple(tables.Column(name) for name in ("train", "eval"))
    parts = [
        f"{step['batch_size']} ({step['batch_size'] // found['devices']} a device" for step in steps
    ]
    microbatches, note = "", ""
    if found["accumulate"] > 1:
        microbatches = f" in {found['accumulate']} microbatches"
        note = " (the compiler counts the operations of one microbatch)"
    return "\n".join(
        (
            f"{found['model']}, experts: {found['num_experts']} ({found['expert_map']}), "
            f"{found['dtype']}, {found['num_parameters']:,} parameters, images of "
            f"{'x'.join(map(str, found['image_shape']))}",
            f"{found['devices']} devices {found['device_kind']}, global batch to train: "
            f"{parts[0]}{microbatches}), to evaluate: {parts[1]})",
            f"Compiled with parallel.mode={_MODE}: pmap compiles only where the devices are",
            f"Figures are of one device and step{note}:",
            "",
            tables.as_text(tables.Table("aot", "", columns, rows)),
        )
    )


def _figure(step: dict[str, Any], path: tuple[str, ...], unit: float) -> str:
    value: Any = step
    for key in path:
        value = value.get(key)
    return "-" if value is None else _shown(value / unit)


def _shown(value: float) -> str:
    """Four digits, all digits of large numbers, and none of an exponent."""
    return f"{value:,.0f}" if value >= 1000 else f"{float(f'{value:.3g}'):g}"
