# SPDX-License-Identifier: Apache-2.0
"""Kills trainings at random moments, restarts them until they finish, and looks for lost data.

    python -m benchmarks.kill_test --kills=100 --seed=0 --output=kills.json

Each run must end like an undisturbed one: with the same bits in every array of the last
checkpoint, the same bytes in `results.json` and the predictions, the same rows in `metrics.jsonl`
(except for speeds), and no further file. Moments are drawn by phase, so that short phases get their
share.
"""

import collections
import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging

_VOLATILE = ("images_per_second", "data_wait_fraction")
_POLL_SECONDS = 0.002
_TIMEOUT_SECONDS = 600.0
# Longest time from the beginning of a phase to the signal.
_SPREAD_SECONDS = {"steps": 0.5, "checkpoint": 0.1, "evaluation": 0.3, "report": 0.2}
_SHORTEST_FIRST = ("checkpoint", "evaluation", "report", "steps")
_PHASES = ("start-up", *_SPREAD_SECONDS)
# Exit codes after each signal; a process that does not handle signals yet is ended by the kernel.
_ENDINGS = {"KILL": (-9,), "TERM": (143, -15), "INT": (130, -2)}


@dataclasses.dataclass
class Command:
    """The command under test, with a small experiment."""

    config: str
    epochs: int
    cache: Path

    def start(self, workdir: Path) -> subprocess.Popen[str]:
        """Starts or resumes the run of a workdir."""
        overrides = {
            "total_epochs": self.epochs,
            "batch_size": 140,
            "log_every_steps": 1,
            "checkpoint.every_epochs": 1,
            "eval.every_epochs": 2,
            "compilation_cache_dir": self.cache,
        }
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "balpoe_jax.main", f"--config={self.config}"),
                *(f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in overrides.items())),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )


class Watch:
    """Tells the current phases of a start of a run from its files."""

    def __init__(self, workdir: Path) -> None:
        self._workdir = workdir
        self._rows = self._size("metrics.jsonl")
        self._results = self._changed("results.json")
        self._leftovers = set(self._hidden())

    def phases(self) -> set[str]:
        """All phases that are going on."""
        found = set()
        hidden = set(self._hidden()) - self._leftovers
        if any(path.parent.name == "checkpoints" for path in hidden):
            found.add("checkpoint")
        if any(path.parent.name == "predictions" for path in hidden):
            found.add("evaluation")
        if self._changed("results.json") != self._results:
            found.add("report")
        elif self._size("metrics.jsonl") > self._rows:
            found.add("steps")
        return found

    def _hidden(self) -> Iterator[Path]:
        yield from self._workdir.glob("checkpoints/*.orbax-checkpoint-tmp")
        yield from self._workdir.glob("predictions/.*")

    def _size(self, name: str) -> int:
        path = self._workdir / name
        return path.stat().st_size if path.exists() else 0

    def _changed(self, name: str) -> int:
        path = self._workdir / name
        return path.stat().st_mtime_ns if path.exists() else 0


def disturb(
    process: subprocess.Popen[str],
    workdir: Path,
    phase: str,
    delay: float,
    name: str,
) -> str | None:
    """Sends a signal `delay` seconds into a phase; returns the phase it met, None if none came."""
    watch = Watch(workdir)
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while phase != "start-up" and phase not in watch.phases():
        if process.poll() is not None:
            return None
        if time.monotonic() > deadline:
            raise TimeoutError(f"{workdir} did not come to its {phase}.")
        time.sleep(_POLL_SECONDS)
    time.sleep(delay)
    met = watch.phases()
    if process.poll() is not None:
        return None
    process.send_signal(getattr(signal, f"SIG{name}"))
    # The shortest current phase counts.
    return next((one for one in _SHORTEST_FIRST if one in met), "start-up")


def difference(run: Path, undisturbed: Path) -> str | None:
    """The first difference of a finished run from the undisturbed one; None if there is none."""
    for name in ("results.json", "predictions/expert_logits.npy", "predictions/labels.npy"):
        if (run / name).read_bytes() != (undisturbed / name).read_bytes():
            return f"{name} differs"
    if not (run / "metrics.jsonl").read_text().endswith("\n"):
        return "metrics.jsonl ends in a torn line"
    if list(_rows(run)) != list(_rows(undisturbed)):
        return "metrics.jsonl differs"
    extra = _files(run) ^ _files(undisturbed)
    if extra - {"metrics.discarded.jsonl"}:
        return f"only one has {', '.join(sorted(extra))}"
    return _difference_of_state(run, undisturbed)


def _rows(workdir: Path) -> Iterator[dict[str, Any]]:
    for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        yield {key: value for key, value in json.loads(line).items() if key not in _VOLATILE}


def _files(workdir: Path) -> set[str]:
    """Names down to the second level, except TensorBoard's, since each start adds some."""
    paths = [*workdir.glob("*"), *workdir.glob("*/*")]
    names = {str(path.relative_to(workdir)) for path in paths}
    return {name for name in names if not name.startswith("tensorboard/")}


def _difference_of_state(run: Path, undisturbed: Path) -> str | None:
    import jax
    import numpy as np

    states = [_state(workdir) for workdir in (run, undisturbed)]
    there, here = (jax.tree_util.tree_leaves_with_path(state) for state in states)
    if [path for path, _ in there] != [path for path, _ in here]:
        return "the last checkpoint has other arrays"
    for (path, one), (_, other) in zip(there, here, strict=True):
        if np.asarray(one).tobytes() != np.asarray(other).tobytes():
            return f"{jax.tree_util.keystr(path)} of the last checkpoint differs"
    return None


def _state(workdir: Path) -> Any:
    import orbax.checkpoint as ocp

    steps = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(
            (workdir / "checkpoints" / str(max(steps)) / "state").absolute()
        )


@dataclasses.dataclass
class Figures:
    """The outcome of the test.

    Attributes:
        kills: Number of kills by signal and phase.
        runs: Number of runs that were finished and compared.
        starts: Number of starts of the command.
        losses: Descriptions of lost data.
    """

    kills: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    runs: int = 0
    starts: int = 0
    losses: list[str] = dataclasses.field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The figures as plain values."""
        return {
            "kills": sum(self.kills.values()),
            "by_signal_and_phase": dict(sorted(self.kills.items())),
            "runs": self.runs,
            "starts": self.starts,
            "losses": self.losses,
        }


def kill_and_compare(
    command: Command,
    folder: Path,
    kills: int,
    seed: int,
    signals: Sequence[str],
    warm: bool = True,
) -> Figures:
    """Makes an undisturbed run, then disturbed ones until there were `kills`, and compares them.

    Args:
        command: Command to start.
        folder: Folder of the runs.
        kills: Number of kills in all.
        seed: Seed of the moments.
        signals: Names of the signals, without SIG.
        warm: Whether to time the start-up with a warm cache, which takes another undisturbed run.
    """
    draw, figures = random.Random(seed), Figures()
    undisturbed = folder / "undisturbed"
    for _ in range(1 + warm):  # the second run finds the programs of the first
        shutil.rmtree(undisturbed, ignore_errors=True)
        process = command.start(undisturbed)
        start, watch, start_up = time.monotonic(), Watch(undisturbed), 0.0
        while process.poll() is None:
            if not start_up and watch.phases():
                start_up = time.monotonic() - start
            time.sleep(_POLL_SECONDS)
        _, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"The undisturbed run failed: {errors}")
    while sum(figures.kills.values()) < kills:
        workdir = folder / f"run-{figures.runs}"
        lost = _run(command, workdir, kills, start_up, draw, signals, figures)
        lost = lost or difference(workdir, undisturbed)
        figures.runs += 1
        if lost:
            figures.losses.append(f"{workdir}: {lost}")
        else:
            shutil.rmtree(workdir)
        print(json.dumps(figures.as_json()), flush=True)
    return figures


def _run(
    command: Command,
    workdir: Path,
    kills: int,
    start_up: float,
    draw: random.Random,
    signals: Sequence[str],
    figures: Figures,
) -> str | None:
    """Starts one run again and again until it finishes; returns what went wrong, or None."""
    while True:
        process = command.start(workdir)
        figures.starts += 1
        name, met = draw.choice(signals), None
        if sum(figures.kills.values()) < kills:
            phase = draw.choice(_PHASES)
            spread = _SPREAD_SECONDS.get(phase, start_up)
            met = disturb(process, workdir, phase, draw.uniform(0, spread), name)
        _, errors = process.communicate(timeout=_TIMEOUT_SECONDS)
        if met is not None:
            figures.kills[f"SIG{name} {met}"] += 1
        if process.returncode == 0:
            return None
        if met is None or process.returncode not in _ENDINGS[name]:
            return f"a start ended with exit code {process.returncode}: {errors[-500:]}"


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_integer("kills", 100, "Number of kills in all.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the moments.")
    flags.DEFINE_multi_enum(
        "signal",
        ["KILL"],
        ["KILL", "TERM", "INT"],
        "Signal to send; if repeated, one is drawn each time.",
    )
    flags.DEFINE_string("folder", None, "Folder of the runs; a temporary one by default.")
    flags.DEFINE_string("config", "configs/digits_lt.py:experts=1", "Config of the runs.")
    flags.DEFINE_integer("epochs", 6, "Number of epochs of a run.", lower_bound=1)
    flags.DEFINE_string("output", None, "JSON file for the figures.")


def main(arguments: Sequence[str]) -> None:
    """Kills, compares and prints the figures; exits with 1 if anything was lost."""
    del arguments
    logging.set_verbosity(logging.ERROR)
    # In the background of a script SIGINT is ignored, which the runs would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    values = flags.FLAGS
    folder = Path(values.folder or tempfile.mkdtemp(prefix="kill_test-"))
    command = Command(values.config, values.epochs, folder / "cache")
    figures = kill_and_compare(command, folder, values.kills, values.seed, values.signal)
    if values.output:
        Path(values.output).write_text(json.dumps(figures.as_json(), indent=2) + "\n")
    if figures.losses:
        sys.exit(1)


if __name__ == "__main__":
    define_flags()
    app.run(main)
