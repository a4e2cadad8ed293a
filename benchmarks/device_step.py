# SPDX-License-Identifier: Apache-2.0
"""Measures the package's training steps on this machine's device, in a process of its own.

`benchmarks.accelerator` runs this with several sets of XLA's flags. A job describes the device; or
it times the cases of `step_cases` and compares first losses with PyTorch's; or it makes a few steps
and hashes the resulting bits.
"""

import datetime
import hashlib
import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from balpoe_jax import cli
from balpoe_jax.config import resolve
from balpoe_jax.data.types import TrainBatch
from balpoe_jax.experiment.build import Experiment, build
from balpoe_jax.experiment.program import Program
from balpoe_jax.flops import count_flops
from balpoe_jax.torch_import import convert
from benchmarks import measuring, step_cases, toy_network
from benchmarks.sides import Job, Results, Row
from benchmarks.step_cases import Case, Sizes
from benchmarks.step_programs import make_config, make_program, with_stages

# Largest relative difference of first losses; rounding to TF32 causes less.
TOLERANCE = 1e-3

_PACKAGES = (
    "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu", "flax", "optax",
    "orbax-checkpoint", "numpy", "torch", "tensorflow", "tensorflow-cpu",
)  # fmt: skip


def describe_device() -> Row:
    """The device, its driver, versions and flags."""
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit")
    return {
        "kind": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "memory_mb": memory / 1e6 if memory else None,
        "driver": _driver(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **measuring.describe_machine(_PACKAGES),
    }


def _driver() -> str | None:
    """Name, driver, power limit and clocks from `nvidia-smi`; None where there is none."""
    if not shutil.which("nvidia-smi"):
        return None
    fields = "name,driver_version,power.limit,clocks.max.sm,clocks.max.mem"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return result.stdout.strip() or result.stderr.strip()[:200]


def measure(case: Case, sizes: Sizes, data: str) -> Row:
    """Times a case.

    Args:
        case: Case to time.
        sizes: Sizes of networks and images.
        data: File of generated images for the device pipeline, see `packed_data.generate`.
    """
    config = make_config(case, sizes)
    before = _peak()
    if case.dispatch == "ready":
        program, many = make_program(config, sizes), 1
        call = _on_ready_batch(program)
    else:
        many = sizes.dispatch if case.dispatch == "several" else 1
        experiment = _build(config, data, many)
        program, call = experiment.program, _on_pipeline(experiment)
    start = time.perf_counter()
    losses = np.ravel(jax.device_get(call.run())).tolist()
    compiled = time.perf_counter() - start
    while len(losses) < 3:
        losses.append(float(jax.device_get(call.run())))
    waited = call.waited()
    began = time.perf_counter()
    rounds = measuring.time_rounds(call.run, call.wait, sizes.seconds)
    share = (call.waited() - waited) / (time.perf_counter() - began)
    flops, size = _count(program), config.batch_size
    peak = _peak()
    return {
        **rounds.per_step(many, size),
        "tflops": flops / rounds.median * many / 1e12,
        "gflop_a_step": flops / 1e9,
        "compile_s": compiled,
        "steps_a_dispatch": many,
        "data_wait": share,
        "losses": losses[:3],
        # The device keeps the peak of the whole process: known if this case needed the most.
        "peak_mb": peak / 1e6 if peak > before else None,
    }


class _Calls:
    """Calls of a compiled step; each takes the state of the call before.

    Args:
        step: Compiled step, `(state, inputs) -> (state, metrics)`.
        state: First state.
        inputs: Function that returns the inputs of a call.
        waited: Function that returns the seconds spent on waiting for inputs so far.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        state: Any,
        inputs: Callable[[], Any],
        waited: Callable[[], float],
    ) -> None:
        self._step, self._state, self._inputs, self.waited = step, state, inputs, waited

    def run(self) -> jax.Array:
        """Begins a call; returns its losses, on the device, without waiting."""
        self._state, metrics = self._step(self._state, self._inputs())
        return metrics["loss"]

    def wait(self) -> None:
        """Waits for all calls."""
        jax.block_until_ready(self._state)


def _on_ready_batch(program: Program) -> _Calls:
    """Single steps on a batch that stays on the device."""
    batch = _place_batch(program)
    return _Calls(program.map_train_step(), program.init_state(), lambda: batch, lambda: 0.0)


def _on_pipeline(experiment: Experiment) -> _Calls:
    """Dispatches of the device pipeline, as in training."""
    many = experiment.inputs.steps_per_dispatch(0)
    dispatches = ((i * many, (i + 1) * many) for i in itertools.count())
    inputs = experiment.inputs.train(0, dispatches)
    step = experiment.inputs.map_train_step(experiment.program.train_step(), 0)
    return _Calls(
        step, experiment.program.init_state(), lambda: next(inputs), lambda: inputs.waited
    )


def _build(config: ConfigDict, data: str, many: int) -> Experiment:
    config.data.update(
        data_dir=data, pipeline="device", steps_per_dispatch=many, verify_counts=False
    )
    return build(resolve(config))


def _place_batch(program: Program) -> Any:
    """A ready batch on the devices, with images of the network's precision."""
    size = program.settings.batch_size
    batch = step_cases.ready_batch(size, program.image_shape, program.context.class_counts)
    images = batch.images.astype(jax.numpy.dtype(program.settings.model.dtype))
    return program.parallel.shard(batch._replace(views=(images,)))


def _count(program: Program) -> int:
    """Floating-point operations of a step, on one device."""
    return count_flops(program.map_train_step(), program.abstract_state(), _place_batch(program))


def _peak() -> int:
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def check_losses(path: Path, case: Case, sizes: Sizes, precision: str | None) -> Row:
    """Compares the first two losses, on PyTorch's weights and batch, with PyTorch's.

    Args:
        path: File that the side in PyTorch wrote.
        case: Case on a ready batch in float32.
        sizes: Sizes of networks and images.
        precision: "highest" for full float32; None for the device's default.
    """
    with np.load(path, allow_pickle=False) as stored:
        arrays = dict(stored)
    weights, fields = (
        {name.partition(" ")[2]: x for name, x in arrays.items() if name.startswith(kind)}
        for kind in ("weight ", "batch ")
    )
    batch = TrainBatch(**fields)._replace(views=tuple(fields["views"]))
    program = make_program(make_config(case, sizes), sizes)
    if case.network != "small" and sizes.photo_stages:
        program = with_stages(program, sizes.photo_stages)
    with jax.default_matmul_precision(precision):
        step, placed = program.map_train_step(), program.parallel.shard(batch)
        state: Any = program.init_state()
        state = state.replace(**program.parallel.replicate(convert(weights)))
        losses = []
        for _ in range(2):
            state, metrics = step(state, placed)
            losses.append(float(metrics["loss"]))
    theirs = arrays["losses"].tolist()
    relative = [abs(a - b) / abs(b) for a, b in zip(losses, theirs, strict=True)]
    return {
        "losses": losses,
        "torch_losses": theirs,
        "relative": relative,
        "agrees": max(relative) <= TOLERANCE,
    }


def make_bits(sizes: Sizes, data: str, dispatches: int = 2) -> Row:
    """Makes the first steps of a training and hashes the resulting state.

    Args:
        sizes: Sizes of networks and images.
        data: File of generated images, as for `measure`.
        dispatches: Number of calls, each of `sizes.dispatch` steps.
    """
    config = make_config(step_cases.SMALL[0], sizes)
    calls = _on_pipeline(_build(config, data, sizes.dispatch))
    losses = np.concatenate([np.ravel(jax.device_get(calls.run())) for _ in range(dispatches)])
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(calls._state)):
        digest.update(np.asarray(leaf).tobytes())
    return {"digest": digest.hexdigest(), "last_loss": float(losses[-1]), "steps": len(losses)}


def main(arguments: Sequence[str]) -> None:
    """Runs the job."""
    job = Job.parse(arguments)
    options = job.options
    results, sizes = Results(job), step_cases.sizes(options["toy"])
    cli.use_compilation_cache(options.get("cache", ""))
    if options["task"] == "device":
        results.write(case="device", toy=options["toy"], **describe_device())
    elif options["task"] == "bits":

        def bits() -> Row:
            with toy_network.used(options["toy"]):
                return make_bits(sizes, options["data"])

        results.attempt({"case": "bits", "run": options["run"]}, 40, bits)
    else:
        _measure_all(results, sizes, options)


def _measure_all(results: Results, sizes: Sizes, options: dict[str, Any]) -> None:
    check = Path(options["check"]) if options.get("check") else None
    if check and check.exists():
        like = Case(options["network"], 64, "float32", "loop", "shard_map", "ready", 20)
        for precision in options["precisions"]:

            def losses(precision: str = precision) -> Row:
                return check_losses(
                    check, like, sizes, None if precision == "default" else precision
                )

            network = _network_name(like, sizes)
            label = {"case": "check", "network": network, "precision": precision}
            results.attempt(label, like.estimate, losses)
    for values in options["cases"]:
        case = Case(**values)
        label = {
            "case": "step",
            "network": _network_name(case, sizes),
            "batch": step_cases.batch_size(case, sizes),
            "dtype": case.dtype,
            "expert_map": case.expert_map,
            "mode": case.mode,
            "dispatch": case.dispatch,
        }

        def one(case: Case = case) -> Row:
            with toy_network.used(options["toy"]):
                return measure(case, sizes, options.get("data", ""))

        results.attempt(label, case.estimate, one)


def _network_name(case: Case, sizes: Sizes) -> str:
    return sizes.small if case.network == "small" else case.network


if __name__ == "__main__":
    cli.run(lambda: None, main)
