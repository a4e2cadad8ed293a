# SPDX-License-Identifier: Apache-2.0
"""Worker processes that make batches with Pillow, like those of PyTorch's DataLoader.

A worker makes whole batches in memory that the processes share, so that nothing is copied. Each
worker has two batches under way at any time, the DataLoader's default.
"""

import itertools
import multiprocessing as mp
import os
import time
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.measuring import Sample
from benchmarks.pil_transforms import Transform

_UNDER_WAY = 2
_PATIENCE_SECONDS = 120.0


class PilWorkers:
    """Processes that transform examples; close them when done, or use as a context."""

    def __init__(
        self,
        transform: Transform,
        examples: Sequence[npt.NDArray[np.uint8]] | Sequence[bytes],
        batch_size: int,
        workers: int,
    ) -> None:
        self._batch_size = batch_size
        shape = (_UNDER_WAY * workers, batch_size, transform.size, transform.size, 3)
        # Not fork: the caller has threads.
        context = mp.get_context("spawn")
        memory = context.RawArray("f", int(np.prod(shape)))
        self._slots = np.frombuffer(memory, np.float32).reshape(shape)
        self._requests, self._results = context.Queue(), context.Queue()
        self._numbers = itertools.count()
        self._cpu: dict[int, float] = {}
        self._processes = [
            context.Process(
                target=_work,
                args=(transform, examples, memory, shape, self._requests, self._results),
                daemon=True,
            )
            for _ in range(workers)
        ]
        for process in self._processes:
            process.start()
        for _ in range(workers):  # each says that it is ready
            self._receive()

    def __enter__(self) -> "PilWorkers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def measure(self, seconds: float) -> Sample:
        """Makes batches for some seconds."""
        for slot in range(len(self._slots)):
            self._request(slot)
        for _ in self._slots:
            self._request(self._receive())
        start, start_cpu = time.perf_counter(), self._cpu_seconds()
        count = 0
        while count == 0 or time.perf_counter() < start + seconds:
            self._request(self._receive())
            count += self._batch_size
        sample = Sample(count, time.perf_counter() - start, self._cpu_seconds() - start_cpu)
        for _ in self._slots:
            self._receive()
        return sample

    def batch(self) -> npt.NDArray[np.float32]:
        """One batch, `[B, size, size, 3]`."""
        self._request(0)
        return self._slots[self._receive()].copy()

    def close(self) -> None:
        """Ends the processes."""
        for _ in self._processes:
            self._requests.put(None)
        for process in self._processes:
            process.join()

    def _request(self, slot: int) -> None:
        number = next(self._numbers)
        first = number * self._batch_size
        self._requests.put((slot, number, np.arange(first, first + self._batch_size)))

    def _receive(self) -> int:
        slot, process, self._cpu[process] = self._results.get(timeout=_PATIENCE_SECONDS)
        return slot

    def _cpu_seconds(self) -> float:
        return time.process_time() + sum(self._cpu.values())


def _work(
    transform: Transform,
    examples: Sequence[Any],
    memory: Any,
    shape: tuple[int, ...],
    requests: Any,
    results: Any,
) -> None:
    slots = np.frombuffer(memory, np.float32).reshape(shape)
    results.put((-1, os.getpid(), time.process_time()))
    for slot, seed, indices in iter(requests.get, None):
        random = Random(seed)
        for row, index in enumerate(indices):
            transform(examples[index % len(examples)], random, slots[slot, row])
        results.put((slot, os.getpid(), time.process_time()))
