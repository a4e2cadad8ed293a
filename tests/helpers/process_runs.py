# SPDX-License-Identifier: Apache-2.0
"""Code of the tests of several processes, for the test itself and for the processes it starts.

    python tests/helpers/process_runs.py PORT PROCESS_ID TASK [FOLDER ...]

runs one of two processes with two CPU devices each; `start` starts both.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).parents[2]  # not imported: this file is also run by itself
HEARTBEAT_SECONDS = 10
STEPS = 3
MODES = ("pmap", "shard_map")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Pair:
    """Two started processes with their outputs in files, so that neither waits for a reader."""

    def __init__(self, commands: list[list[str]], folder: Path, **variables: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._outputs = [folder / f"{i}.out" for i in range(2)]
        self._errors = [folder / f"{i}.err" for i in range(2)]
        environment = {
            **os.environ,
            "JAX_NUM_CPU_DEVICES": "2",
            "PYTHONUNBUFFERED": "1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "TF_ENABLE_ONEDNN_OPTS": "0",
            **variables,
        }
        self.processes = []
        for command, output, error in zip(commands, self._outputs, self._errors, strict=True):
            with output.open("w") as stdout, error.open("w") as stderr:
                self.processes.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr
                    )
                )

    def output(self, process: int) -> str:
        return self._outputs[process].read_text()

    def error(self, process: int) -> str:
        return self._errors[process].read_text()

    def wait_for(self, text: str, process: int = 0, timeout: float = 300) -> None:
        """Waits until a process has printed `text`."""
        deadline = time.monotonic() + timeout
        while text not in self.output(process):
            assert self.processes[process].poll() is None, self.everything()
            assert time.monotonic() < deadline, self.everything()
            time.sleep(0.05)

    def wait(self, timeout: float = 300) -> list[int]:
        """Waits until both have ended; returns their exit codes."""
        deadline = time.monotonic() + timeout
        try:
            return [p.wait(max(0, deadline - time.monotonic())) for p in self.processes]
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"still running: {self.everything()}") from error

    def everything(self) -> str:
        return "\n".join(f"{i}: {self.output(i)}\n{self.error(i)}" for i in range(2))


@contextmanager
def start(commands: list[list[str]], folder: Path, **variables: str) -> Iterator[Pair]:
    """Starts two commands with these variables in their environment; leaves none behind."""
    pair = Pair(commands, folder, **variables)
    try:
        yield pair
    finally:
        for process in pair.processes:
            process.kill()
            process.wait()


def task_commands(task: str, *folders: Path) -> list[list[str]]:
    port = str(free_port())
    script = str(Path(__file__))
    return [[sys.executable, script, port, str(i), task, *map(str, folders)] for i in range(2)]


def digits_config(**changes):
    """A config for 413 digits and three steps, mixed in two groups."""
    from tests.helpers.config_files import get_config

    config = get_config("digits_lt", "experts=1")
    config.batch_size = 140
    config.total_epochs = 1
    config.log_every_steps = 1
    config.mix.groups = 2
    config.optim.learning_rate = 0.01  # so low that training hardly amplifies rounding
    config.checkpoint.every_epochs = 1
    config.eval.every_epochs = None
    config.eval.batch_size = 150  # is rounded up for 4 devices, and the last batch is padded
    config.eval.held_out_per_class = 0
    config.update_from_flattened_dict({name.replace("__", "."): v for name, v in changes.items()})
    return config


def device_config(mode: str):
    """The same with the device pipeline: a dispatch of two steps, then one of the step left."""
    return digits_config(data__pipeline="device", data__steps_per_dispatch=2, parallel__mode=mode)


def cifar_steps(mode: str):
    """Losses and state of three steps at CIFAR's size, with augmentation, mixed in two groups."""
    from balpoe_jax.data.pipeline import train_batches
    from balpoe_jax.data.records.sources import ArraySource
    from balpoe_jax.data.settings import AugmentSettings, Host, MixSettings, TrainSettings
    from balpoe_jax.methods import Context
    from balpoe_jax.methods.balpoe import BalPoE
    from balpoe_jax.models import create_model
    from balpoe_jax.optim import make_optimizer, rate_of_step
    from balpoe_jax.parallel import AXIS_NAME, Prefetcher, make_parallel
    from balpoe_jax.step import create_state, make_train_step

    random = np.random.default_rng(0)
    images = random.integers(0, 256, (40, 32, 32, 3)).astype(np.uint8)
    positions = np.arange(len(images))
    settings = TrainSettings(
        batch_size=16,
        seed=3,
        mean=(0.49, 0.48, 0.45),
        std=(0.2, 0.2, 0.2),
        augment=AugmentSettings(crop_padding=4, flip=True, rotation=15.0),
        mix=MixSettings(alpha=0.4, groups=2),
    )
    devices = make_parallel(mode)
    host = Host(jax.process_index(), jax.process_count())
    batches = train_batches(
        ArraySource(images, positions % 10, positions), settings, 0, STEPS, host
    )
    model = create_model("resnet8", num_classes=10, num_experts=1, axis_name=AXIS_NAME)
    optimizer = make_optimizer(rate_of_step([0.05], steps_per_epoch=STEPS))
    create = partial(create_state, model, optimizer, image_shape=(32, 32, 3))
    state = jax.jit(lambda seed: create(jax.random.key(seed)), out_shardings=devices.replicated)(
        np.int32(0)
    )
    context = Context(np.arange(10, 0, -1), (1.0,), axis_name=AXIS_NAME)
    step = devices.map_step(make_train_step(model, optimizer, BalPoE(), context), donate=True)
    losses = []
    for batch in Prefetcher(batches, devices):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, state


def dump(path: Path, losses: list[float], state) -> None:
    """Writes losses and state, after checking that all devices of this process agree."""
    leaves = jax.tree.leaves(state)
    for leaf in leaves:
        first, *others = (np.asarray(shard.data) for shard in leaf.addressable_shards)
        for other in others:
            np.testing.assert_array_equal(other, first)
    arrays = [np.asarray(leaf.addressable_data(0)) for leaf in leaves]
    np.savez(path, losses, *arrays)


def load(path: Path) -> list[np.ndarray]:
    with np.load(path) as arrays:
        return [arrays[name] for name in arrays.files]


def agree(folder: Path) -> None:
    """Makes one process fail in several ways, and writes the errors of this process."""
    from balpoe_jax.config import Settings, resolve
    from balpoe_jax.data.datasets import balanced
    from balpoe_jax.errors import UserError
    from balpoe_jax.experiment.build import build_together
    from balpoe_jax.run import multihost, record

    own = folder / f"only-{jax.process_index()}"

    def refuse() -> None:
        assert multihost.is_first()
        raise UserError("No.")

    profile, load = balanced.BALANCED_DATASETS["digits"]

    def load_own(*place: object):
        train, test = load(*place)
        order = np.arange(len(train))
        # As if it had been prepared in another way, with the same counts.
        return train.select(order if multihost.is_first() else order[::-1]), test

    refusals = []
    balanced.BALANCED_DATASETS["digits"] = (profile, load_own)
    for attempt in (
        lambda: record.open_workdir(str(own)),
        lambda: record.check_config_everywhere(Settings(seed=jax.process_index())),
        lambda: multihost.run_on_process_0(refuse),
        lambda: record.open_workdir("/dev/null/x" if multihost.is_first() else str(own)),
        lambda: build_together(resolve(digits_config())),
    ):
        try:
            attempt()
        except UserError as error:
            refusals.append(str(error))
    balanced.BALANCED_DATASETS["digits"] = (profile, load)
    record.check_config_everywhere(Settings())
    record.open_workdir(str(folder / "shared"))
    (folder / f"refusals-{jax.process_index()}.json").write_text(json.dumps(refusals))


def whole(folder: Path, reference: Path, twin: bool = False) -> None:
    """Runs `agree`, trains the digits, and evaluates a reference run of one process.

    With `twin` it also trains under `shard_map` and makes `cifar_steps`, all with the config's
    network. Otherwise the network is tiny, and no page is drawn.
    """
    from balpoe_jax.config import resolve
    from balpoe_jax.evaluate import Evaluator
    from balpoe_jax.experiment import build
    from balpoe_jax.reporting import report
    from balpoe_jax.run import metric_writer
    from balpoe_jax.run.checkpoint import Checkpoints
    from balpoe_jax.train import train
    from tests.helpers import tiny_network

    who = jax.process_index()
    if not twin:
        build.create_model = tiny_network.create_model
        report.write_report_of = lambda workdir, results, test: "no page"
    with metric_writer.log_to_file(folder):
        agree(folder)
    results = train(resolve(digits_config()), str(folder / "run"))
    assert bool(results) == (who == 0)
    for mode in MODES if twin else MODES[:1]:
        train(resolve(device_config(mode)), str(folder / f"device-{mode}"))
    if twin:
        dump(folder / f"cifar-{who}.npz", *cifar_steps("shard_map"))
    with metric_writer.log_to_file(folder):
        experiment = build.build(resolve(digits_config(parallel__mode="shard_map")))
    with Checkpoints(str(reference / "checkpoints"), read_only=True) as checkpoints:
        state = checkpoints.restore_latest(experiment.program.abstract_state())
    scores = Evaluator(experiment).score_test(state, folder / "predictions")
    assert bool(scores) == (who == 0)
    dump(folder / f"restored-{who}.npz", [], state)


def meet(ending: str) -> None:
    """Makes one collective after another, until a process ends as asked or is ended."""
    from jax.experimental import multihost_utils

    from balpoe_jax.errors import UserError

    for i in range(10_000):
        multihost_utils.process_allgather(np.array(i))
        if i == 3 and jax.process_index() == 0:
            print("going on")
        if i == 10 and ending == "refuse" and jax.process_index() == 1:
            raise UserError("This host has bad data.")
        if i == 10 and ending == "break" and jax.process_index() == 1:
            raise RuntimeError("A bug on one host.")
        time.sleep(0.02)


def save(folder: Path, restore: bool = False) -> None:
    """Kills the second process while the first one saves or restores."""
    from jax.experimental import multihost_utils

    from balpoe_jax.parallel import make_parallel
    from balpoe_jax.run.checkpoint import Checkpoints
    from balpoe_jax.step import TrainState

    create = jax.jit(
        lambda step: TrainState(step, {"w": jnp.ones((500, 2000))}, {}, {}),
        out_shardings=make_parallel("pmap").replicated,
    )
    state = create(np.int32(5))
    with Checkpoints(str(folder)) as checkpoints:
        if restore:
            checkpoints.save(state)
            checkpoints.wait()
        multihost_utils.process_allgather(np.array(0))
        if jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        print("going on")
        time.sleep(0.3)  # until the connection is known to be lost
        if restore:
            checkpoints.restore_latest(state)
        else:
            checkpoints.save(state)


def main() -> None:
    port, process_id, task, *folders = sys.argv[1:]
    if hasattr(os, "sched_setaffinity"):  # not the one core of the test process
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    jax.config.update("jax_numpy_rank_promotion", "raise")
    sys.path.insert(0, str(ROOT))  # where the package is not installed
    from balpoe_jax import cli
    from balpoe_jax.run import multihost

    package = logging.getLogger("balpoe_jax")
    package.setLevel(logging.INFO)
    package.addHandler(logging.StreamHandler(sys.stdout))
    paths = [Path(folder) for folder in folders]
    tasks = {
        "whole": whole,
        "whole, twin": partial(whole, twin=True),
        "save": save,
        "restore": partial(save, restore=True),
    }
    with multihost.process_group(
        f"127.0.0.1:{port}",
        2,
        int(process_id),
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        start_timeout_seconds=2 if task == "alone" else 120,
        report=cli.report,
    ):
        if task in tasks:
            tasks[task](*paths)
        else:
            meet(task)


if __name__ == "__main__":
    main()
