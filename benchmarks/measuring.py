# SPDX-License-Identifier: Apache-2.0
"""Tools of the benchmarks: equal cores for both sides, turns, and medians.

Machines are noisy. So the sides take turns in short runs, ratios are taken within each round, and
the result is their median over the rounds. Processor time is measured as well as the time by the
clock; other programs on the same cores have little effect on it.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

from balpoe_jax.errors import UserError


class Sample(NamedTuple):
    """One short run of one side.

    Attributes:
        done: Number of images or steps.
        seconds: Time by the clock.
        cpu_seconds: Processor time of all threads and processes of the side.
    """

    done: int
    seconds: float
    cpu_seconds: float


def pin(cores: int) -> None:
    """Restricts this process, and those that it starts, to a number of cores.

    Call it before importing a library that counts the cores.

    Raises:
        UserError: too few cores, or a system that cannot pin.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise UserError("The benchmarks pin themselves to cores, which needs Linux.")
    available = sorted(os.sched_getaffinity(0))
    if not 1 <= cores <= len(available):
        raise UserError(f"--cores must be 1 to {len(available)}, got {cores}.")
    os.sched_setaffinity(0, available[-cores:])


def measure(step: Callable[[], Any], seconds: float) -> Sample:
    """Runs a step again and again for some seconds, at least once."""
    start, start_cpu = time.perf_counter(), time.process_time()
    count = 0
    while count == 0 or time.perf_counter() < start + seconds:
        step()
        count += 1
    return Sample(count, time.perf_counter() - start, time.process_time() - start_cpu)


class Rounds(NamedTuple):
    """Seconds per call, over several rounds of calls; each round is waited for as a whole.

    Attributes:
        median, low, high: Median, least and greatest of the rounds.
        returns: Least time that a call takes to return, before its work is done.
    """

    median: float
    low: float
    high: float
    returns: float

    def per_step(self, steps: int, batch_size: int) -> dict[str, float]:
        """Milliseconds a step, and images a second.

        Args:
            steps: Number of steps that a call makes.
            batch_size: Number of images of a step.
        """
        return {
            "ms_a_step": 1e3 * self.median / steps,
            "ms_low": 1e3 * self.low / steps,
            "ms_high": 1e3 * self.high / steps,
            "call_returns_ms": 1e3 * self.returns,
            "images_per_second": batch_size * steps / self.median,
        }


def time_rounds(
    call: Callable[[], Any], wait: Callable[[], Any], seconds: float, rounds: int = 5
) -> Rounds:
    """Times calls whose work a device does asynchronously.

    Args:
        call: Function that begins some work and returns.
        wait: Function that returns when all work is done.
        seconds: Intended time of all rounds together; a round has at least one call.
        rounds: Number of rounds.
    """
    wait()
    start = time.perf_counter()
    call()
    wait()
    one = time.perf_counter() - start
    calls = max(1, min(200, int(seconds / rounds / max(one, 1e-4))))
    times, returns = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        returns.append((time.perf_counter() - start) / calls)
        wait()
        times.append((time.perf_counter() - start) / calls)
    return Rounds(statistics.median(times), min(times), max(times), min(returns))


def take_turns(
    sides: Mapping[str, Callable[[], Sample]], repeats: int
) -> dict[str, Sequence[Sample]]:
    """`repeats` samples of each side, taken in turns; the order alternates between rounds."""
    samples: dict[str, list[Sample]] = {name: [] for name in sides}
    for number in range(repeats):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            samples[name].append(sides[name]())
    return dict(samples)


def compare(ours: Sequence[Sample], theirs: Sequence[Sample], cores: int) -> dict[str, Any]:
    """Medians of both sides' rates per core, and of the ratios within the rounds.

    Returns:
        `ours` and `theirs`, each with `per_second` (by the clock, per core) and `per_cpu_second`;
        `ratio` and `cpu_ratio`, above 1 if ours is faster; `ratio_range`, the least and greatest
        ratio of a round by the clock.
    """

    def rates(samples: Sequence[Sample]) -> dict[str, float]:
        return {
            "per_second": statistics.median(s.done / s.seconds / cores for s in samples),
            "per_cpu_second": statistics.median(s.done / s.cpu_seconds for s in samples),
        }

    pairs = list(zip(ours, theirs, strict=True))
    ratios = [(a.done / a.seconds) / (b.done / b.seconds) for a, b in pairs]
    cpu_ratios = [(a.done / a.cpu_seconds) / (b.done / b.cpu_seconds) for a, b in pairs]
    return {
        "ours": rates(ours),
        "theirs": rates(theirs),
        "ratio": statistics.median(ratios),
        "ratio_range": (min(ratios), max(ratios)),
        "cpu_ratio": statistics.median(cpu_ratios),
    }


def shown(compared: Mapping[str, Any]) -> list[str]:
    """What `compare` returned, for a table: rates and ratios by the clock, and by the processor."""
    ours, theirs = compared["ours"], compared["theirs"]
    return [
        f"{ours['per_second']:,.0f}",
        f"{theirs['per_second']:,.0f}",
        f"{compared['ratio']:.2f}",
        "{:.2f}-{:.2f}".format(*compared["ratio_range"]),
        f"{ours['per_cpu_second']:,.0f}",
        f"{theirs['per_cpu_second']:,.0f}",
        f"{compared['cpu_ratio']:.2f}",
    ]


def describe_machine(packages: Sequence[str]) -> dict[str, Any]:
    """Processor, cores, load, and versions of Python and of those `packages` that are installed."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages if _is_installed(name)},
    }


def machine_line(machine: Mapping[str, Any]) -> str:
    """The description in one line."""
    versions = [f"{k} {v}" for k, v in machine.items() if k not in ("processor", "cores", "load")]
    return (
        f"{machine['processor']}, {machine['cores']} cores, load {machine['load']:.1f}; "
        f"{', '.join(versions)}"
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2] for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0].strip() if names else platform.machine()


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
