# SPDX-License-Identifier: Apache-2.0
"""Per-example random numbers that are a function of (seed, step, row) alone.

Every host draws the numbers of the whole global batch, which are few, and keeps its own rows. So
the batches are the same for any number of hosts, threads and restarts.
"""

import dataclasses
import zlib

import tensorflow as tf

_ALGORITHM = "philox"


@dataclasses.dataclass(frozen=True)
class RowRandom:
    """Random numbers for the rows `rows` of a global batch of `batch_size` examples.

    Attributes:
        seed: Seed int32 `[2]`, already folded with the step.
        batch_size: Number of rows of the global batch.
        rows: Rows that this host makes: a slice, or positions int32 `[rows]`.
    """

    seed: tf.Tensor
    batch_size: int
    rows: slice | tf.Tensor

    def stream(self, name: str) -> "RowRandom":
        """An independent source for the sub-task `name`."""
        return dataclasses.replace(self, seed=fold_in(self.seed, stream_id(name)))

    def uniform(
        self,
        name: str,
        low: float = 0.0,
        high: float = 1.0,
        dtype: tf.DType = tf.float32,
        per_row: tuple[int, ...] = (),
    ) -> tf.Tensor:
        """Uniform in `[low, high)`, shape `[rows, *per_row]`; integers when `dtype` is one."""
        drawn = tf.random.stateless_uniform(
            [self.batch_size, *per_row],
            fold_in(self.seed, stream_id(name)),
            low,
            high,
            dtype,
            _ALGORITHM,
        )
        return self._own(drawn)

    def normal(self, name: str, per_row: tuple[int, ...] = ()) -> tf.Tensor:
        """Standard normal float32, shape `[rows, *per_row]`."""
        drawn = tf.random.stateless_normal(
            [self.batch_size, *per_row], fold_in(self.seed, stream_id(name)), alg=_ALGORITHM
        )
        return self._own(drawn)

    def _own(self, drawn: tf.Tensor) -> tf.Tensor:
        return drawn[self.rows] if isinstance(self.rows, slice) else tf.gather(drawn, self.rows)


def stream_seed(seed: int, stream: str, index: tf.Tensor | int) -> tf.Tensor:
    """The int32 `[2]` seed of one batch or epoch in one stream of random numbers.

    Args:
        seed: Seed of the run.
        stream: Name of the stream.
        index: Number of the step or the epoch.
    """
    root = tf.constant([seed & 0x7FFFFFFF, seed >> 31 & 0x7FFFFFFF], tf.int32)
    return fold_in(fold_in(root, stream_id(stream)), index)


def stream_id(name: str) -> int:
    """A stable 31-bit number for a name (Python's `hash` changes from run to run)."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def fold_in(seed: tf.Tensor, data: tf.Tensor | int) -> tf.Tensor:
    """A new int32 `[2]` seed from a seed and a number."""
    return _fold_in(seed, tf.cast(data, tf.int32))


# A function of its own, which is traced once: the operations of a batch need dozens of seeds, and
# tracing each of them takes a third of the time of making the graph.
@tf.function(
    autograph=False, input_signature=[tf.TensorSpec([2], tf.int32), tf.TensorSpec([], tf.int32)]
)
def _fold_in(seed: tf.Tensor, data: tf.Tensor) -> tf.Tensor:
    return tf.random.fold_in(seed, data, _ALGORITHM)
