# SPDX-License-Identifier: Apache-2.0
"""Step-indexed tf.data pipelines: batch k is a function of (seed, k) and of nothing else.

No iterator state needs to be saved, a resumed run reads batch k at step k, and any number of hosts
or threads makes the same global batches.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from balpoe_jax.data.batches import samplers, unreadable
from balpoe_jax.data.batches.replacements import Replacements
from balpoe_jax.data.batches.train_batch import Batch, TrainBatchMaker, to_input
from balpoe_jax.data.images import decoding
from balpoe_jax.data.images.augment import normalize
from balpoe_jax.data.images.views import View
from balpoe_jax.data.randomness import RowRandom, stream_seed
from balpoe_jax.data.records.readers import make_reader
from balpoe_jax.data.records.sources import FileSource, ForgivingSource, Source, StoredSource
from balpoe_jax.data.settings import ONE_HOST, AugmentSettings, Host, TrainSettings, steps_per_epoch
from balpoe_jax.data.tracing import no_autograph
from balpoe_jax.data.types import EvalBatch, TrainBatch
from balpoe_jax.errors import UserError

# Keys of the positions in the training set that a batch reads.
_INDICES = ("indices", "other_indices")

# Enough for every core; a bound on the memory where there are many cores.
_BATCHES_AT_ONCE = 8


def train_batches(
    source: Source,
    settings: TrainSettings,
    first_step: int,
    last_step: int,
    host: Host = ONE_HOST,
    replacements: Replacements | None = None,
) -> Iterator[TrainBatch]:
    """The batches of steps `first_step` to `last_step - 1`.

    A batch holds NumPy arrays of this host's `b` rows. Its views have the type `settings.dtype`.
    They are augmented and normalised, and the first one is mixed.

    By default every epoch is a permutation of all examples, drawn from (seed, epoch). Augmentation
    is drawn from (seed, step, row), mixing from (seed, step). `replacements` replace photographs
    that cannot be read; without them, such a photograph ends the iteration.

    Raises:
        UserError (a `ValueError`): a batch size or groups that the hosts cannot share; while
            iterating, a photograph that cannot be read, with its name.
    """
    rows = host.rows(settings.batch_size)
    if settings.mix.alpha > 0:
        settings.mix.check_groups(settings.batch_size, host.count)
    maker = TrainBatchMaker(source, settings, rows)

    def make(step: int) -> Iterator[TrainBatch]:
        chosen = _order(source.labels, settings, step, last_step).map(no_autograph(maker.indices))
        if replacements is not None:
            table = tf.constant(replacements.table, tf.int32)
            chosen = chosen.map(no_autograph(lambda batch: _replace(batch, table)))
        if not source.encoded:
            return _iterate(chosen, lambda batch: maker.augment_and_mix(maker.read(batch)), host)
        read = chosen.map(
            no_autograph(lambda batch: maker.draw(maker.read(batch))), **_parallel(host)
        )
        images = _map_rows(read, maker.decode, rows.stop - rows.start, host)
        return _iterate(images, maker.augment_and_mix, host)

    def recover(step: int) -> bool:
        ((_, order),) = _order(source.labels, settings, step, step + 1)
        chosen = maker.indices(tf.constant(step, tf.int64), order)
        indices = np.concatenate([chosen[name] for name in _INDICES if name in chosen])
        if replacements is not None:
            return replacements.find(indices, step + 1)
        unreadable.refuse(
            source, indices, "training", "; or train without it: --config.data.on_bad_image=skip"
        )
        return False

    return _guarded(make, first_step, recover)


def batch_indices(
    labels: npt.NDArray[np.integer], settings: TrainSettings, step: int
) -> npt.NDArray[np.int64]:
    """Positions in the training set of the examples of a step's global batch, int64 `[B]`.

    Partners that a second sampler draws for mixing are not among them.

    Args:
        labels: Classes of the training set, int `[N]`.
        settings: Settings of the batches.
        step: Number of the step from 0, as for `train_batches`; step 0 leads to a state of step 1.
    """
    ((_, indices),) = _order(labels, settings, step, step + 1).as_numpy_iterator()
    return indices.astype(np.int64)


def _order(
    labels: npt.NDArray[np.integer], settings: TrainSettings, first_step: int, last_step: int
) -> tf.data.Dataset:
    """Pairs of a step and the positions int32 `[B]` of its global batch."""
    return samplers.batches(
        labels,
        settings.batch_size,
        settings.seed,
        first_step,
        last_step,
        settings.sampler,
        settings.samples_per_class,
    )


def _replace(batch: Batch, table: tf.Tensor) -> Batch:
    """The batch with positions of replacements in place of those of bad images."""
    return batch | {name: tf.gather(table, batch[name]) for name in _INDICES if name in batch}


def eval_batches(
    source: Source,
    batch_size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    host: Host = ONE_HOST,
    dtype: str = "float32",
    bad: dict[int, str] | None = None,
) -> Iterator[EvalBatch]:
    """Every example once, in order; the last batch is padded.

    A batch holds NumPy arrays; its images are normalised and have the type `dtype`. An image that
    cannot be read ends the iteration; or is blank, if its reason can be put into `bad`, by its
    position in the source, before its batch comes.
    """
    if bad is not None:
        assert isinstance(source, FileSource)
        source = ForgivingSource.reading(source, bad)

    def decode(row: Batch) -> Batch:
        assert isinstance(source, StoredSource)
        image = decoding.decode_central(row["images"], source.resize, source.image_size)
        return {**row, "images": image}

    def finish(batch: Batch) -> EvalBatch:
        images = tf.cast(normalize(batch["images"], mean, std), dtype)
        return EvalBatch(images, batch["labels"], batch["mask"])

    return _examples_in_order(source, batch_size, host, lambda batch: batch, decode, finish)


def view_batches(
    source: Source,
    batch_size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    augment: AugmentSettings,
    seed: int,
    epoch: int,
    host: Host = ONE_HOST,
    dtype: str = "float32",
) -> Iterator[EvalBatch]:
    """The batches of `eval_batches`, augmented; photographs by random windows, not central crops.

    The draws are a function of (seed, epoch, position in the source), whatever the batch size and
    the number of hosts. Another seed or epoch gives another view of the same examples.
    """
    view = View(source, augment)

    def random(positions: tf.Tensor) -> RowRandom:
        return RowRandom(stream_seed(seed, "views", epoch), len(source), positions)

    def draw(batch: Batch) -> Batch:
        drawn = view.draw(decoding.shapes(batch["images"]), random(batch["positions"]))
        return {**batch, "drawn": drawn}

    def decode(row: Batch) -> Batch:
        return {**row, "images": view.decode(row["images"], row.pop("drawn"))}

    def finish(batch: Batch) -> EvalBatch:
        images = view.augment(batch["images"], random(batch["positions"]))
        images = to_input(images, mean, std, dtype)
        return EvalBatch(images, batch["labels"], batch["mask"])

    return _examples_in_order(source, batch_size, host, draw, decode, finish)


def _examples_in_order(
    source: Source,
    batch_size: int,
    host: Host,
    draw: Callable[[Batch], Batch],
    decode: Callable[[Batch], Batch],
    finish: Callable[[Batch], EvalBatch],
) -> Iterator[EvalBatch]:
    """Every example once, in order; the last batch is padded with the last example.

    Args:
        source: Source of the examples.
        batch_size: Size of the global batch.
        host: Host whose rows are made.
        draw, decode: Functions for photographs: of an encoded batch, and then of each row.
        finish: Function that turns a decoded batch into the network's input.
    """
    rows = host.rows(batch_size)
    reader = make_reader(source)

    def read(step: tf.Tensor) -> Batch:
        positions = (tf.cast(step, tf.int32) * batch_size + tf.range(batch_size))[rows]
        padded = tf.minimum(positions, len(source) - 1)
        images, labels = reader.read(padded)
        mask = positions < len(source)
        return {"images": images, "labels": labels, "mask": mask, "positions": padded}

    def recover(step: int) -> bool:
        positions = step * batch_size + np.arange(batch_size)[rows]
        positions = positions[positions < len(source)]
        if isinstance(source, ForgivingSource):
            return unreadable.forgive(source, positions)
        unreadable.refuse(source, positions, "test or held-out", "")
        return False

    def make(step: int) -> Iterator[EvalBatch]:
        steps = tf.data.Dataset.range(step, steps_per_epoch(len(source), batch_size))
        if not source.encoded:
            return _iterate(steps, lambda i: finish(read(i)), host)
        drawn = steps.map(no_autograph(lambda i: draw(read(i))), **_parallel(host))
        return _iterate(_map_rows(drawn, decode, rows.stop - rows.start, host), finish, host)

    return _guarded(make, 0, recover)


def _map_rows(
    batches: tf.data.Dataset, function: Callable[[Batch], Batch], rows: int, host: Host
) -> tf.data.Dataset:
    """Maps a function of one row over batches: the rows of several batches run in parallel."""
    parallel = _parallel(host, at_most=_threads(host))
    mapped = batches.unbatch().map(no_autograph(function), **parallel)
    return mapped.batch(rows, drop_remainder=True)


def _iterate(dataset: tf.data.Dataset, make_batch: Callable[..., Any], host: Host) -> Iterator[Any]:
    options = tf.data.Options()
    options.deterministic = True
    # Autotuning never stops planning, and an iterator cannot be dropped while it plans: on a busy
    # machine that took up to a minute.
    options.autotune.enabled = False
    if host.threads:
        options.threading.private_threadpool_size = host.threads
    batches = dataset.map(no_autograph(make_batch), **_parallel(host))
    return batches.prefetch(2).with_options(options).as_numpy_iterator()


def _guarded(
    make: Callable[[int], Iterator[Any]], step: int, recover: Callable[[int], bool]
) -> Iterator[Any]:
    """The batches from a step on; an image that cannot be read or decoded raises one sentence.

    Args:
        make: Function that iterates over the batches from a step on.
        step: Number of the first step.
        recover: Function of the step whose batch failed. It returns whether another try is worth
            it, and raises a `UserError` that names the bad image if there is one.
    """
    failure = tf.errors.OpError  # bound here: TensorFlow may be gone when the generator ends
    while True:
        try:
            for batch in make(step):
                yield batch
                step += 1
            return
        except failure as error:
            if not recover(step):
                raise UserError(
                    f"A batch could not be made ({unreadable.explain(error)}), and none of its "
                    "images is to blame; prepare the data set again if the error stays."
                ) from error


def _parallel(host: Host, at_most: int = _BATCHES_AT_ONCE) -> dict[str, Any]:
    """Options of `Dataset.map`, by default for a function of whole batches."""
    return {"num_parallel_calls": min(_threads(host), at_most), "deterministic": True}


def _threads(host: Host) -> int:
    if host.threads:
        return host.threads
    # The cores that this process may use, where the system tells.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
