# SPDX-License-Identifier: Apache-2.0
"""Step-indexed tf.data pipelines: batch k is a function of (seed, k) and of nothing else.

No iterator state needs to be saved, a resumed run reads batch k at step k, and any number of hosts
or threads makes the same global batches.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from balpoe_jax.data import mixing, photos, pixels, unreadable
from balpoe_jax.data.augment import (
    AugmentSettings,
    augment_batch,
    change_image,
    draw_changes,
    normalize,
)
from balpoe_jax.data.randomness import RowRandom, fold_in, stream_id
from balpoe_jax.data.sources import RecordSource, Source
from balpoe_jax.errors import UserError

Arrays = dict[str, np.ndarray]
_Batch = dict[str, Any]  # of tensors

# Enough for every core, and bounds the memory where there are many.
_BATCHES_AT_ONCE = 8


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How training batches are made.

    Attributes:
        batch_size: of the global batch.
        seed: of order, augmentation and mixup.
        mean, std: of the normalisation, by channel, for images in [0, 1].
        augment: what happens to the uint8 images.
        mixup_alpha: of the Beta distribution; 0 for no mixup.
        mixup_groups: see `mixing.draw_mix`.
        dtype: of the images, "float32" or "bfloat16", to which they are rounded at the end.
    """

    batch_size: int
    seed: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    augment: AugmentSettings
    mixup_alpha: float = 0.0
    mixup_groups: int = 1
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Host:
    """Which part of each global batch to make, and with how many threads (0: all cores)."""

    index: int = 0
    count: int = 1
    threads: int = 0

    def rows(self, batch_size: int) -> slice:
        """This host's rows of a global batch."""
        if batch_size % self.count:
            raise UserError(
                f"The batch size must be a multiple of the {self.count} hosts, got {batch_size}."
            )
        share = batch_size // self.count
        return slice(self.index * share, (self.index + 1) * share)


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """`ceil(N / B)`: the last batch of an epoch wraps to the start of the epoch's permutation.

    The reference makes as many steps, the last of them with the smaller rest as a batch.
    """
    return -(-num_examples // batch_size)


def train_batches(
    source: Source,
    settings: TrainSettings,
    first_step: int,
    last_step: int,
    host: Host = Host(),
    replacements: unreadable.Replacements | None = None,
) -> Iterator[Arrays]:
    """The batches of steps `first_step` to `last_step - 1`.

    Each is a dict of NumPy arrays, `b` being this host's share of the batch: `images` of
    `settings.dtype` `[b, H, W, 3]`, augmented, normalised and mixed; `labels` and `other_labels`
    int32 `[b]`; and `weight` float32 `[b]`, the share of `labels` (1 without mixup).

    Every epoch is a permutation of all examples, drawn from (seed, epoch); augmentation is drawn
    from (seed, step, row), mixup from (seed, step). With `replacements`, photographs that cannot be
    read are replaced as these say; without, they end the iteration.

    Raises:
        UserError (a `ValueError`): a batch size or groups that the hosts cannot share; while
            iterating, a photograph that cannot be read, with its name.
    """
    rows = host.rows(settings.batch_size)
    if settings.mixup_alpha > 0:
        mixing.check_groups(settings.batch_size, settings.mixup_groups, host.count)
    stages = _TrainStages(source, settings, rows)

    def make(step: int) -> Iterator[Arrays]:
        order = _epoch_order(len(source), settings.batch_size, settings.seed, step, last_step)
        if replacements is not None:
            table = tf.constant(replacements.table, tf.int32)
            order = order.map(lambda step, indices: (step, tf.gather(table, indices)))
        if not source.encoded:
            return _iterate(order, lambda *batch: stages.finish(stages.read(*batch)), host)
        read = order.map(lambda *batch: stages.draw_windows(stages.read(*batch)), **_parallel(host))
        images = _map_rows(read, stages.decode, rows.stop - rows.start, host)
        return _iterate(images, stages.finish, host)

    def recover(step: int) -> bool:
        indices = batch_indices(len(source), settings, step)[rows]
        if replacements is not None:
            return replacements.find(indices, step + 1)
        unreadable.refuse(
            source, indices, "training", ", or train without it: --config.data.on_bad_image=skip"
        )
        return False

    return _guarded(make, first_step, recover)


def batch_indices(num_examples: int, settings: TrainSettings, step: int) -> npt.NDArray[np.int64]:
    """Which examples the global batch of a step is made of, positions int64 `[B]`.

    Counted as for `train_batches`: the batch of step 0 leads to a state of step 1.
    """
    order = _epoch_order(num_examples, settings.batch_size, settings.seed, step, step + 1)
    ((_, indices),) = order.as_numpy_iterator()
    return indices.astype(np.int64)


class _TrainStages:
    """The stages in which a training batch is made, each a function inside the graph."""

    def __init__(self, source: Source, settings: TrainSettings, rows: slice) -> None:
        self._reader = source.reader()
        self._settings = settings
        self._rows = rows
        self._image_size = source.image_shape[0]
        # What is done to a batch, and before that to each photograph: to mirror while it is
        # resized, and to change it unless it is to be cropped or rotated before.
        self._of_batch, self._of_each = settings.augment, AugmentSettings()
        if source.encoded:
            self._of_batch = dataclasses.replace(self._of_batch, flip=False)
            if not self._of_batch.moves:
                self._of_batch, self._of_each = self._of_batch.without_changes()

    def read(self, step: tf.Tensor, indices: tf.Tensor) -> _Batch:
        """This host's images, as they are stored, and labels."""
        images, labels = self._reader.read(indices[self._rows])
        return {"step": tf.fill(tf.shape(labels), step), "images": images, "labels": labels}

    def draw_windows(self, batch: _Batch) -> _Batch:
        """Adds what `decode` needs."""
        random = self._random(batch)
        windows = photos.random_windows(photos.shapes(batch["images"]), random.stream("window"))
        flips = random.stream("move").uniform("flip") < (0.5 if self._settings.augment.flip else 0)
        changes = draw_changes(random, self._of_each)
        return {**batch, "windows": windows, "flips": flips, "changes": changes}

    def decode(self, row: _Batch) -> _Batch:
        """One photograph's window, resized and changed; packed."""
        image = photos.decode_window(row["images"], row["windows"], row["flips"], self._image_size)
        image = change_image(image, row["changes"], self._of_each)
        return {"step": row["step"], "images": image, "labels": row["labels"]}

    def finish(self, batch: _Batch) -> _Batch:
        """Augments, normalises and mixes images."""
        settings, labels = self._settings, batch["labels"]
        images = augment_batch(batch["images"], self._random(batch), self._of_batch)
        mixed = {"other_labels": labels, "weight": tf.ones_like(labels, tf.float32)}
        mix = None
        if settings.mixup_alpha > 0:
            mix = mixing.draw_mix(
                _seed(settings.seed, "mixup", batch["step"][0]),
                settings.mixup_alpha,
                settings.batch_size,
                settings.mixup_groups,
                self._rows,
            )
            mixed["other_labels"] = tf.gather(labels, mix.partners)
            mixed["weight"] *= mix.weight
        # Of photographs a batch exceeds every cache: compiled, all this is one pass over it.
        packed = images.dtype == tf.uint32
        to_input = pixels.compiled(self._to_input) if packed else self._to_input
        return {"images": to_input(images, mix), "labels": labels, **mixed}

    def _to_input(self, images: tf.Tensor, mix: mixing.Mix | None) -> tf.Tensor:
        """What the network gets."""
        settings = self._settings
        images = normalize(images, settings.mean, settings.std)
        if mix is not None:
            images = mixing.mix_images(images, mix)
        return tf.cast(images, settings.dtype)

    def _random(self, batch: _Batch) -> RowRandom:
        seed = _seed(self._settings.seed, "augment", batch["step"][0])
        return RowRandom(seed, self._settings.batch_size, self._rows)


def eval_batches(
    source: Source,
    batch_size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    host: Host = Host(),
    dtype: str = "float32",
) -> Iterator[Arrays]:
    """Every example once, in order; the last batch is padded.

    Each batch is a dict of NumPy arrays: `images` of `dtype` `[b, H, W, 3]`, normalised, `labels`
    int32 `[b]`, and `mask` bool `[b]`, False for padding.
    """
    rows = host.rows(batch_size)
    reader = source.reader()

    def read(step: tf.Tensor) -> _Batch:
        positions = (tf.cast(step, tf.int32) * batch_size + tf.range(batch_size))[rows]
        images, labels = reader.read(tf.minimum(positions, len(source) - 1))
        return {"images": images, "labels": labels, "mask": positions < len(source)}

    def finish(batch: _Batch) -> _Batch:
        return {**batch, "images": tf.cast(normalize(batch["images"], mean, std), dtype)}

    def recover(step: int) -> bool:
        positions = step * batch_size + np.arange(batch_size)[rows]
        unreadable.refuse(source, positions[positions < len(source)], "test or held-out", "")
        return False

    steps = tf.data.Dataset.range(steps_per_epoch(len(source), batch_size))
    if not isinstance(source, RecordSource):
        return _iterate(steps, lambda step: finish(read(step)), host)

    def decode(row: _Batch) -> _Batch:
        image = photos.decode_central(row["images"], source.resize, source.image_size)
        return {**row, "images": image}

    encoded = _map_rows(steps.map(read, **_parallel(host)), decode, rows.stop - rows.start, host)
    return _guarded(lambda _: _iterate(encoded, finish, host), 0, recover)


def _epoch_order(
    num_examples: int, batch_size: int, seed: int, first_step: int, last_step: int
) -> tf.data.Dataset:
    """Pairs of a step and the positions int32 `[B]` of its global batch."""
    per_epoch = steps_per_epoch(num_examples, batch_size)

    def steps_of_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
        permutation = tf.random.experimental.stateless_shuffle(
            tf.range(num_examples), _seed(seed, "order", epoch), "philox"
        )

        def indices(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            start = tf.cast(step - epoch * per_epoch, tf.int32) * batch_size
            return step, tf.gather(permutation, (start + tf.range(batch_size)) % num_examples)

        start = tf.maximum(epoch * per_epoch, first_step)
        stop = tf.minimum((epoch + 1) * per_epoch, last_step)
        return tf.data.Dataset.range(start, stop).map(indices)

    epochs = tf.data.Dataset.range(first_step // per_epoch, -(-last_step // per_epoch))
    return epochs.flat_map(steps_of_epoch)


def _map_rows(
    batches: tf.data.Dataset, function: Callable[[_Batch], _Batch], rows: int, host: Host
) -> tf.data.Dataset:
    """Maps a function of one row over batches: the rows of several batches run in parallel."""
    mapped = batches.unbatch().map(function, **_parallel(host, at_most=_threads(host)))
    return mapped.batch(rows, drop_remainder=True)


def _iterate(
    dataset: tf.data.Dataset, make_batch: Callable[..., _Batch], host: Host
) -> Iterator[Arrays]:
    options = tf.data.Options()
    options.deterministic = True
    # It measures and plans without end, and an iterator cannot be left before it has planned: on a
    # busy machine that took up to a minute.
    options.autotune.enabled = False
    if host.threads:
        options.threading.private_threadpool_size = host.threads
    batches = dataset.map(make_batch, **_parallel(host))
    return batches.prefetch(2).with_options(options).as_numpy_iterator()


def _guarded(
    make: Callable[[int], Iterator[Arrays]], step: int, recover: Callable[[int], bool]
) -> Iterator[Arrays]:
    """The batches from a step on; what cannot be read or decoded becomes one sentence.

    Args:
        make: iterates over the batches from a step on.
        step: the first.
        recover: called with the step whose batch could not be made; whether it is worth another
            try, or else a `UserError` that names the image.
    """
    failure = tf.errors.OpError  # bound here: TensorFlow may be gone when Python ends a generator
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
                    "images is to blame; prepare the data set anew if it stays so."
                ) from error


def _parallel(host: Host, at_most: int = _BATCHES_AT_ONCE) -> dict[str, Any]:
    """How a stage of the pipeline is mapped, of whole batches if nothing else is said."""
    return {"num_parallel_calls": min(_threads(host), at_most), "deterministic": True}


def _threads(host: Host) -> int:
    if host.threads:
        return host.threads
    # Those that this process may use, where the system tells.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _seed(seed: int, stream: str, index: tf.Tensor) -> tf.Tensor:
    """The int32 `[2]` seed of one batch or epoch in one stream of random numbers."""
    root = tf.constant([seed & 0x7FFFFFFF, seed >> 31 & 0x7FFFFFFF], tf.int32)
    return fold_in(fold_in(root, stream_id(stream)), index)
