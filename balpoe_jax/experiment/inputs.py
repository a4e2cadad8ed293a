# SPDX-License-Identifier: Apache-2.0
"""Where the batches of an experiment are made: with tf.data on the host, or on the devices.

Both kinds of inputs have the same verbs, so that training and evaluation ask neither which it is.
They are two streams of one distribution: batch k is a function of (seed, k) in each, and the draws
are not the same.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from balpoe_jax.data import extras
from balpoe_jax.data.batches.replacements import Replacements
from balpoe_jax.data.datasets.types import LongTailed
from balpoe_jax.data.device.batches import make_batch, normalize
from balpoe_jax.data.device.packing import pack_on_host, unpack
from balpoe_jax.data.device.plans import Planner
from balpoe_jax.data.device.randomness import generator
from balpoe_jax.data.device.views import DeviceView
from balpoe_jax.data.records.sources import ArraySource, SmallSource, Source, StoredSource
from balpoe_jax.data.settings import (
    NO_MIXING,
    AugmentSettings,
    Host,
    TrainSettings,
    steps_per_epoch,
)
from balpoe_jax.data.types import EvalBatch
from balpoe_jax.errors import UserError
from balpoe_jax.parallel import AXIS_NAME, Parallel, Prefetcher

log = logging.getLogger(__name__)

PIPELINES = ("host", "device")

# The share of a device's memory that a data set may take, and the bytes where its size is unknown.
_SHARE_OF_MEMORY, _ASSUMED_LIMIT = 0.25, 2 * 2**30

Dispatches = Iterable[tuple[int, int]]


def choose_pipeline(wanted: str | None, data: LongTailed, parallel: Parallel) -> str:
    """One of `PIPELINES`.

    Args:
        wanted: Pipeline to take; None for the device's where the data set fits and the platform is
            an accelerator, or where TensorFlow is not installed, and the host's otherwise.
        data: The data set.
        parallel: The devices.

    Raises:
        UserError (a `ValueError`): a pipeline that cannot be had.
    """
    if wanted not in (None, *PIPELINES):
        raise UserError(
            f"config.data.pipeline must be None, {' or '.join(PIPELINES)}; got {wanted!r}."
        )
    sources = [source for source in (data.train, data.test, data.held_out) if source is not None]
    of_one_size = all(isinstance(source, ArraySource | SmallSource) for source in sources)
    has_tensorflow = extras.has_tensorflow()
    device = parallel.mesh.devices.flat[0]
    if wanted is None:
        fits = of_one_size and sum(map(_num_bytes, sources)) <= _memory_for_data(device)
        on_device = fits and (device.platform != "cpu" or not has_tensorflow)
        wanted = "device" if on_device else "host"
    if wanted == "device" and not of_one_size:
        raise UserError(
            "config.data.pipeline=device holds all images in device memory, and these are "
            "photographs that are read from files; set it to host."
        )
    if wanted == "host" and not has_tensorflow:
        raise UserError(
            "config.data.pipeline=host needs TensorFlow, which is not installed; "
            f"{extras.INSTALL}{', or set it to device' if of_one_size else ''}."
        )
    return wanted


def _num_bytes(source: Source) -> int:
    height, width, _ = source.image_shape
    return len(source) * height * width * 4  # as packed pixels


def in_memory(data: LongTailed) -> LongTailed:
    """The data set with small images that lie in files read into memory.

    Raises:
        UserError (a `ValueError`): an image that cannot be read.
    """

    def load(source: Source) -> Source:
        return source.load() if isinstance(source, SmallSource) else source

    held_out = data.held_out and load(data.held_out)
    return dataclasses.replace(
        data, train=load(data.train), test=load(data.test), held_out=held_out
    )


def _memory_for_data(device: jax.Device) -> float:
    try:
        limit = (device.memory_stats() or {}).get("bytes_limit")
    except (jax.errors.JaxRuntimeError, NotImplementedError):  # a device that is not here
        limit = None
    return limit * _SHARE_OF_MEMORY if limit else _ASSUMED_LIMIT


def unmixed(settings: TrainSettings) -> TrainSettings:
    """Settings of the same images in the same order, augmented alike, in one view and not mixed."""
    return dataclasses.replace(settings, mix=NO_MIXING, views=())


class HostInputs:
    """Batches of a tf.data pipeline, placed on the devices before they are asked for.

    Args:
        parallel: The devices.
        data: The data set.
        settings: Settings of the training batches of each phase.
        test_view: Augmentation of the random views of test images.
        seed: Seed of the run.
        threads: Number of the pipeline's threads; None for all cores.
        on_bad_image: What `statistics_batches` makes of a training image that cannot be read, see
            `config.data.on_bad_image`.
    """

    pipeline = "host"

    def __init__(
        self,
        parallel: Parallel,
        data: LongTailed,
        settings: tuple[TrainSettings, ...],
        test_view: AugmentSettings,
        seed: int,
        threads: int | None = None,
        on_bad_image: str = "fail",
    ) -> None:
        self._parallel, self._data, self._settings = parallel, data, settings
        self._skips_bad_images = on_bad_image == "skip"
        self._test_view, self._seed = test_view, seed
        self._host = Host(jax.process_index(), parallel.num_hosts, threads)
        extras.require_tensorflow("config.data.pipeline=host")

    def steps_per_dispatch(self, phase: int) -> int:
        """Number of steps that one call makes in a phase."""
        return 1

    def map_train_step(
        self, step: Callable[..., Any], phase: int, constants: Mapping[str, Any] | None = None
    ) -> Callable[..., Any]:
        """The compiled update `(state, inputs) -> (state, metrics)`, which donates the state.

        Args:
            step: Update of one device, see `step.make_train_step`.
            phase: Position in the settings.
            constants: Constants of the step, on the devices; None for none.
        """
        mapped = self._parallel.map_step(step, donate=True, constants=1)
        return lambda state, inputs: mapped(state, inputs, constants or {})

    def train(self, phase: int, dispatches: Dispatches, replacements: Any = None) -> Prefetcher:
        """What `map_train_step`'s function takes, one dispatch after the other.

        Args:
            phase: Position in the settings.
            dispatches: Pairs of the first step, counted from 0 in the phase, and the one after the
                last; consecutive.
            replacements: Images for those that cannot be read, see `data.batches.replacements`.
        """
        from balpoe_jax.data import pipeline

        steps = list(dispatches)
        (first_step, _), (_, last_step) = steps[0], steps[-1]
        batches = pipeline.train_batches(
            self._data.train, self._settings[phase], first_step, last_step, self._host, replacements
        )
        return Prefetcher(batches, self._parallel)

    def positions(self, phase: int, step: int) -> npt.NDArray[np.int64]:
        """Training examples that a step's batch is made of, int64 `[B]`; steps count from 0."""
        from balpoe_jax.data import pipeline

        return pipeline.batch_indices(self._data.train.labels, self._settings[phase], step)

    def map_statistics_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled `(carried, inputs) -> carried` of statistics.

        Args:
            step: Function of one device, see `step.make_statistics_step`.
        """
        return self._parallel.map_step(step)

    def statistics_batches(self) -> Prefetcher:
        """What `map_statistics_step`'s function takes: an epoch of the last phase, unmixed."""
        from balpoe_jax.data import pipeline

        train, settings = self._data.train, unmixed(self._settings[-1])
        last_step = steps_per_epoch(len(train), settings.batch_size)
        replacements = None
        if self._skips_bad_images and isinstance(train, StoredSource):
            replacements = Replacements(train)  # a function of the data, whatever the run met
        batches = pipeline.train_batches(train, settings, 0, last_step, self._host, replacements)
        return Prefetcher(batches, self._parallel)

    def map_eval_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled prediction `(variables, inputs, source) -> outputs`.

        Args:
            step: Prediction of one device, see `step.make_eval_step`.
        """
        mapped = self._parallel.map_step(step)
        return lambda variables, inputs, source: mapped(variables, inputs)

    def predict(self, source: Source, batch_size: int, view: int | None = None) -> Prefetcher:
        """Every example of a source once, in order, as `map_eval_step`'s function takes them.

        Args:
            source: The examples.
            batch_size: Size of the global batch; the last one is padded.
            view: Number of a random view of them; None for the images as they are.
        """
        from balpoe_jax.data import pipeline

        settings = self._settings[0]
        options = (source, batch_size, settings.mean, settings.std)
        if view is None:
            batches = pipeline.eval_batches(*options, self._host, settings.dtype)
        else:
            batches = pipeline.view_batches(
                *options, self._test_view, self._seed, view, self._host, settings.dtype
            )
        return Prefetcher(batches, self._parallel)


class DeviceInputs:
    """Batches that the compiled step makes of the data set in device memory, as NumPy plans them.

    Args:
        parallel: The devices.
        train: The training set, in memory.
        settings: Settings of the training batches of each phase.
        test_view: Augmentation of the random views of test images.
        seed: Seed of the run.
        steps_per_dispatch: Number of steps that one call makes; None for an epoch on an
            accelerator and 1 on a CPU, where loops are slow.
    """

    pipeline = "device"

    def __init__(
        self,
        parallel: Parallel,
        train: ArraySource,
        settings: tuple[TrainSettings, ...],
        test_view: AugmentSettings,
        seed: int,
        steps_per_dispatch: int | None = None,
    ) -> None:
        self._parallel, self._train, self._settings = parallel, train, settings
        shape = train.image_shape
        self._planners = tuple(Planner(train.labels, shape, each) for each in settings)
        self._test_view, self._seed = DeviceView(test_view, shape), seed
        self._steps = steps_per_dispatch
        self._host = Host(jax.process_index(), parallel.num_hosts)
        self._placed: dict[int, jax.Array] = {}

    def steps_per_dispatch(self, phase: int) -> int:
        """Number of steps that one call makes in a phase."""
        if self._steps is not None:
            return self._steps
        if self._parallel.mesh.devices.flat[0].platform == "cpu":
            return 1
        return -(-len(self._train) // self._settings[phase].batch_size)

    def map_train_step(
        self, step: Callable[..., Any], phase: int, constants: Mapping[str, Any] | None = None
    ) -> Callable[..., Any]:
        """The compiled updates `(state, inputs) -> (state, metrics)`, which donate the state.

        Several steps are a loop in the program, and so is a remainder of one: loops of any length
        make the same bits, which a bare step need not.

        Args:
            step: Update of one device, see `step.make_train_step`.
            phase: Position in the settings.
            constants: Constants of the step, on the devices; None for none.
        """
        scanned = self.steps_per_dispatch(phase) > 1
        mapped = map_planned_step(self._parallel, step, self._planners[phase], scanned)
        tables = self._parallel.replicate(self._planners[phase].tables())
        of_batches = {"images": self._images(self._train), "tables": tables}
        return lambda state, inputs: mapped(state, inputs, of_batches, constants or {})

    def train(self, phase: int, dispatches: Dispatches, replacements: Any = None) -> Prefetcher:
        """What `map_train_step`'s function takes, one dispatch after the other.

        Args:
            phase: Position in the settings.
            dispatches: Pairs of the first step, counted from 0 in the phase, and the one after the
                last.
            replacements: Nothing, since all images in memory can be read.
        """
        assert replacements is None
        planner = self._planners[phase]
        rows = self._host.rows(self._settings[phase].batch_size)
        scanned = self.steps_per_dispatch(phase) > 1

        def plan(dispatch: tuple[int, int]) -> Any:
            if scanned:
                return jax.tree.map(lambda x: x[:, rows], planner.steps(*dispatch))
            return jax.tree.map(lambda x: x[rows], planner.step(dispatch[0]))

        return Prefetcher(_made_ahead(plan, dispatches), self._parallel, axis=int(scanned))

    def positions(self, phase: int, step: int) -> npt.NDArray[np.int64]:
        """Training examples that a step's batch is made of, int64 `[B]`; steps count from 0."""
        return self._planners[phase].positions(step).astype(np.int64)

    def map_statistics_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled `(carried, inputs) -> carried` of statistics.

        Args:
            step: Function of one device, see `step.make_statistics_step`.
        """
        planner = self._statistics_planner

        def planned(carried: Any, plan: Any, of_batches: Any) -> Any:
            return step(carried, make_batch(of_batches, plan, planner, AXIS_NAME))

        mapped = self._parallel.map_step(planned, constants=1)
        tables = self._parallel.replicate(planner.tables())
        of_batches = {"images": self._images(self._train), "tables": tables}
        return lambda carried, inputs: mapped(carried, inputs, of_batches)

    def statistics_batches(self) -> Prefetcher:
        """What `map_statistics_step`'s function takes: an epoch of the last phase, unmixed."""
        planner = self._statistics_planner
        rows = self._host.rows(planner.settings.batch_size)
        last_step = steps_per_epoch(len(self._train), planner.settings.batch_size)

        def plan(step: int) -> Any:
            return jax.tree.map(lambda x: x[rows], planner.step(step))

        return Prefetcher(_made_ahead(plan, range(last_step)), self._parallel)

    @cached_property
    def _statistics_planner(self) -> Planner:
        settings = unmixed(self._settings[-1])
        return Planner(self._train.labels, self._train.image_shape, settings)

    def map_eval_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled prediction `(variables, inputs, source) -> outputs`.

        Args:
            step: Prediction of one device, see `step.make_eval_step`.
        """
        settings, view = self._settings[0], self._test_view

        def predict(variables: Any, rows: Any, constants: Any) -> Any:
            images, index = constants["images"], rows["index"]
            if "view" in rows:
                images = view.augment(images, index, rows["view"], constants["tables"])
            else:
                images = unpack(images[index])
            images = normalize(images, settings.mean, settings.std).astype(settings.dtype)
            return step(variables, EvalBatch(images, rows["labels"], rows["mask"]))

        mapped = self._parallel.map_step(predict, constants=1)
        tables = self._parallel.replicate(view.tables())

        def run(variables: Any, inputs: Any, source: Source) -> Any:
            return mapped(variables, inputs, {"images": self._images(source), "tables": tables})

        return run

    def predict(self, source: Source, batch_size: int, view: int | None = None) -> Prefetcher:
        """Every example of a source once, in order, as `map_eval_step`'s function takes them.

        Args:
            source: The examples.
            batch_size: Size of the global batch; the last one is padded.
            view: Number of a random view of them, which does not depend on the batch size; None for
                the images as they are.
        """
        rows = self._host.rows(batch_size)
        drawn = None
        if view is not None:
            drawn = self._test_view.draw(generator(self._seed, "views", view), len(source))

        def batches() -> Iterator[Any]:
            for first in range(0, len(source), batch_size):
                positions = (first + np.arange(batch_size))[rows]
                index = np.minimum(positions, len(source) - 1).astype(np.int32)
                batch: dict[str, Any] = {
                    "index": index,
                    "labels": source.labels[index].astype(np.int32),
                }
                batch["mask"] = positions < len(source)
                if drawn is not None:
                    batch["view"] = jax.tree.map(lambda x: x[index], drawn)  # noqa: B023
                yield batch

        return Prefetcher(batches(), self._parallel)

    def _images(self, source: Source) -> jax.Array:
        """The images of a source in device memory, placed when they are first asked for."""
        assert isinstance(source, ArraySource)
        if id(source) not in self._placed:
            self._placed[id(source)] = self._parallel.replicate(pack_on_host(source.images))
        return self._placed[id(source)]


Inputs = HostInputs | DeviceInputs


def map_planned_step(
    parallel: Parallel, step: Callable[..., Any], planner: Planner, scanned: bool
) -> Callable[..., Any]:
    """The compiled `(state, plan, of_batches, constants)` to `(state, metrics)`.

    It donates the state. Batches are made from the `images` and `tables` of `of_batches`; the
    constants are those of the step.

    Args:
        parallel: The devices.
        step: Update of one device, see `step.make_train_step`.
        planner: Planner that makes the plans.
        scanned: Whether plans and metrics are of several steps, with a leading axis.
    """

    def one(state: Any, plan: Any, of_batches: Any, constants: Any) -> Any:
        return step(state, make_batch(of_batches, plan, planner, AXIS_NAME), constants)

    def several(state: Any, plans: Any, of_batches: Any, constants: Any) -> Any:
        made = jax.lax.scan if len(plans["index"]) > 1 else _loop_once
        return made(lambda state, plan: one(state, plan, of_batches, constants), state, plans)

    function = several if scanned else one
    return parallel.map_step(function, donate=True, constants=2, axis=int(scanned))


def _loop_once(body: Callable[..., Any], state: Any, plans: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` of length 1 that stays a loop in the compiled program.

    The compiler removes a loop that it knows to run once, and the bare step rounds differently. So
    the length is computed from the count of steps, which is never negative.
    """
    plan = jax.tree.map(lambda x: x[0], plans)
    _, metrics = jax.eval_shape(body, state, plan)
    empty = jax.tree.map(lambda x: jnp.zeros((1, *x.shape), x.dtype), metrics)
    length = jnp.where(state.step < 0, 2, 1)

    def more(carry: Any) -> jax.Array:
        return carry[0] < length

    def step(carry: Any) -> Any:
        i, state, metrics = carry
        state, made = body(state, jax.tree.map(lambda x: x[i], plans))
        put = partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0)
        return i + 1, state, jax.tree.map(put, metrics, made)

    _, state, metrics = jax.lax.while_loop(more, step, (jnp.zeros((), jnp.int32), state, empty))
    return state, metrics


def _made_ahead(make: Callable[[Any], Any], arguments: Iterable[Any]) -> Iterator[Any]:
    """What `make` returns for each argument; the next one is made in a thread meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for argument in arguments:
            following = thread.submit(make, argument)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
