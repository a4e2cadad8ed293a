# SPDX-License-Identifier: Apache-2.0
"""Our side of `input_pipeline`: the cases, their data, the tf.data pipeline and its profile."""

import dataclasses
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from ml_collections import ConfigDict
from PIL import Image

from balpoe_jax.config.dataset_defaults import IMAGENET_LT, cifar_config, photo_config
from balpoe_jax.data import datasets, pipeline
from balpoe_jax.data.batches import mixing
from balpoe_jax.data.images import decoding, packed_ops
from balpoe_jax.data.images.augment import augment_batch, normalize
from balpoe_jax.data.images.resize import resize
from balpoe_jax.data.randomness import RowRandom
from balpoe_jax.data.records import tfrecords
from balpoe_jax.data.records.readers import make_reader
from balpoe_jax.data.records.sources import ArraySource, FileIndex, FileSource, RecordSource, Source
from balpoe_jax.data.settings import AUTOAUGMENT_CIFAR, AugmentSettings, MixSettings, TrainSettings
from benchmarks.measuring import Sample
from benchmarks.pil_transforms import Transform

# More steps than are ever made.
_STEPS = 10**9
_WARM_UP_BATCHES = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """A case that both sides measure.

    Attributes:
        source: The training set.
        description: Description of the source.
        settings: Settings of our pipeline. It does not mix, since the reference mixes on the
            accelerator.
        transform: The same augmentation for Pillow.
    """

    source: Source
    description: str
    settings: TrainSettings
    transform: Transform

    def pil_examples(self) -> list[npt.NDArray[np.uint8]] | list[bytes]:
        """Arrays, or the bytes of photographs, in random order."""
        order = np.random.default_rng(0).permutation(len(self.source))
        images, _ = make_reader(self.source).read(tf.constant(order))
        return list(images.numpy())

    def measure(self, seconds: float) -> Sample:
        """Makes batches for some seconds, on all cores of the process."""
        batches = pipeline.train_batches(self.source, self.settings, 0, _STEPS)
        for _ in range(_WARM_UP_BATCHES):
            next(batches)
        start, start_cpu = time.perf_counter(), time.process_time()
        count = 0
        while count == 0 or time.perf_counter() < start + seconds:
            count += len(next(batches).labels)
        return Sample(count, time.perf_counter() - start, time.process_time() - start_cpu)


def make_case(
    name: str, data_dir: str, scratch: Path, batch_size: int = 0, image_size: int = 0
) -> Case:
    """A case by name: "cifar" or "photos", a space, and "standard" or "long".

    Args:
        name: Name of the case.
        data_dir: TFDS folder; empty for generated images.
        scratch: Folder for generated photographs.
        batch_size: Batch size; 0 for the recipe's.
        image_size: Size of photographs in a batch; 0 for the recipe's 224.
    """
    kind, recipe = name.split()
    if kind == "cifar":
        config = cifar_config("cifar100", 0.4, f"recipe={recipe}")
        source, description = _cifar(data_dir)
    else:
        config = photo_config(IMAGENET_LT, f"recipe={recipe}")
        source, description = _photos(data_dir, scratch, image_size or config.data.image_size)
    settings = _settings(config, batch_size or config.batch_size)
    return Case(source, description, settings, _pil_transform(settings, source.image_shape[0]))


def as_files(case: Case, folder: Path, write: Callable[[bytes], bytes]) -> Case:
    """The case with its photographs in files of their own.

    Args:
        case: Case of photographs.
        folder: Folder of the files, which is made.
        write: Function that makes the content of a file of an encoded photograph.
    """
    source: Any = case.source
    folder.mkdir()
    names = np.array([f"{i}.image" for i in range(len(source))])
    for i, name in enumerate(names):
        (folder / name).write_bytes(write(source.read_image(i)))
    index = FileIndex(names, source.labels)
    files = FileSource(index, source.image_size, source.resize, root=str(folder))
    return dataclasses.replace(case, source=files)


def profile(case: Case, seconds: float, mixup_alpha: float = 0.3) -> list[tuple[str, float]]:
    """Microseconds of processor time per image of each stage, run by itself.

    Args:
        case: Case whose stages run on one of its batches, again and again.
        seconds: Seconds of each stage.
        mixup_alpha: Parameter of mixup, a stage that the comparison leaves out.

    Returns:
        Names and times; "other" is the time of the whole pipeline minus its stages.
    """
    batch_size, rows = case.settings.batch_size, slice(0, case.settings.batch_size)
    random = RowRandom(tf.constant([1, 2]), batch_size, rows)
    indices = tf.constant(np.arange(batch_size) % len(case.source), tf.int32)
    reader = make_reader(case.source)
    stages: dict[str, float] = {}

    def add(name: str, function: Callable[[], tf.Tensor]) -> tf.Tensor:
        compiled = tf.function(function)
        output = compiled()
        stages[name] = _cpu_seconds(compiled, seconds) / batch_size
        return output

    images = add("read", lambda: reader.read(indices)[0])
    augment = case.settings.augment
    if case.source.encoded:
        images = _profile_photographs(images, case, random, add)
        stages["decode"] -= stages["resize"]
        augment = dataclasses.replace(augment, flip=False)
    for name, part in _parts(augment).items():
        images = add(name, _augmentation(images, random, part))
    settings = case.settings
    as_compiled = packed_ops.compiled if case.source.encoded else lambda function: function
    mixer = mixing.Mixer(
        MixSettings(alpha=mixup_alpha),
        case.source.labels,
        case.source.image_shape,
        batch_size,
        settings.seed,
        rows,
    )
    mix, _ = mixer.draw(tf.constant(0, tf.int64), tf.constant(case.source.labels[:batch_size]))

    def normalized() -> tf.Tensor:
        return normalize(images, settings.mean, settings.std)

    add("normalise", as_compiled(normalized))
    whole = case.measure(4 * seconds)
    total = whole.cpu_seconds / whole.done
    other = total - sum(stages.values())
    add(
        "normalise and mix (not compared)",
        as_compiled(lambda: mixing.mix_images(normalized(), None, mix)),
    )
    last = stages.popitem()
    result = [*stages.items(), ("other", other), ("all", total), last]
    return [(name, 1e6 * value) for name, value in result]


def _profile_photographs(
    encoded: tf.Tensor,
    case: Case,
    random: RowRandom,
    add: Callable[[str, Callable[[], tf.Tensor]], tf.Tensor],
) -> tf.Tensor:
    """The stages of one photograph; "decode" includes "resize"."""
    size = case.source.image_shape[0]
    windows = add(
        "draw windows",
        lambda: decoding.random_windows(decoding.shapes(encoded), random.stream("w")),
    )
    flips = random.uniform("flip") < 0.5
    images = add("decode", lambda: _decode(encoded, windows, flips, size))
    cut = [
        (tf.io.decode_and_crop_jpeg(image, window, channels=3), flip)
        for image, window, flip in zip(encoded, windows, flips, strict=True)
    ]
    full = (size, size)
    add(
        "resize",
        lambda: tf.stack(
            [resize(image, full, full, flip=flip, packed=True) for image, flip in cut]
        ),
    )
    return images


def _decode(encoded: tf.Tensor, windows: tf.Tensor, flips: tf.Tensor, size: int) -> tf.Tensor:
    return tf.map_fn(
        lambda one: decoding.decode_window(one[0], one[1], one[2], size),
        (encoded, windows, flips),
        fn_output_signature=tf.TensorSpec([size, size], tf.uint32),
    )


def _augmentation(
    images: tf.Tensor, random: RowRandom, settings: AugmentSettings
) -> Callable[[], tf.Tensor]:
    return lambda: augment_batch(images, random, settings)


def _parts(settings: AugmentSettings) -> dict[str, AugmentSettings]:
    """The settings of each stage, in the order in which they run."""
    parts = {
        "crop, flip, rotation": AugmentSettings(
            crop_padding=settings.crop_padding, flip=settings.flip, rotation=settings.rotation
        ),
        "jitter": AugmentSettings(color_jitter=settings.color_jitter),
        "policy": AugmentSettings(policy=settings.policy, fill=settings.fill),
    }
    return {name: part for name, part in parts.items() if part != AugmentSettings()}


def _cpu_seconds(function: Callable[[], tf.Tensor], seconds: float) -> float:
    """Processor time of a call: the median of calls during `seconds`, at least three."""
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 3 or time.perf_counter() < start + seconds:
        before = time.process_time()
        function()
        times.append(time.process_time() - before)
    return float(np.median(times))


def _settings(config: ConfigDict, batch_size: int) -> TrainSettings:
    return TrainSettings(
        batch_size=batch_size,
        seed=config.seed,
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        augment=AugmentSettings(**config.augment.to_dict()),
    )


def _pil_transform(settings: TrainSettings, size: int) -> Transform:
    augment = settings.augment
    return Transform(
        size=size,
        mean=settings.mean,
        std=settings.std,
        crop_padding=augment.crop_padding,
        flip=augment.flip,
        rotation=augment.rotation,
        color_jitter=augment.color_jitter,
        pairs=AUTOAUGMENT_CIFAR if augment.policy == "autoaugment_cifar" else (),
        randaugment=augment.policy == "randaugment",
        fill=augment.fill,
    )


def _cifar(data_dir: str) -> tuple[Source, str]:
    if data_dir:
        train = datasets.load("cifar100", 100.0, data_dir).train
        return train, f"CIFAR-100-LT, {len(train):,} images"
    images = np.stack([_smooth_noise(seed, 32, 32) for seed in range(1024)])
    numbers = np.arange(len(images))
    return ArraySource(images, numbers % 100, numbers), f"{len(images):,} generated images"


def _photos(data_dir: str, scratch: Path, image_size: int) -> tuple[Source, str]:
    train: Any
    if data_dir:
        data = datasets.load(
            "imagenet_lt", 1.0, data_dir, verify_counts=False, image_size=image_size,
            resize=image_size,
        )  # fmt: skip
        train, kind = data.train, "imagenet_lt, {:,} photographs"
    else:
        path = scratch / "photos.tfrecord"
        if not path.exists():
            _write_photos(path, 64)
        index = tfrecords.scan([str(path)], "file_name")
        train = RecordSource(index, image_size, image_size, paths=(str(path),))
        kind = "{:,} generated photographs of 500x375"
    kilobytes = train.index.sizes.mean() / 1000
    return train, f"{kind.format(len(train))}, {kilobytes:.0f} kB on average"


def _write_photos(path: Path, count: int) -> None:
    def feature(value: bytes) -> tf.train.Feature:
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    with tf.io.TFRecordWriter(str(path)) as writer:
        for number in range(count):
            buffer = io.BytesIO()
            Image.fromarray(_smooth_noise(number, 375, 500)).save(buffer, "JPEG", quality=92)
            features = {
                "image": feature(buffer.getvalue()),
                "file_name": feature(b"%d" % number),
                "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[number % 10])),
            }
            example = tf.train.Example(features=tf.train.Features(feature=features))
            writer.write(example.SerializeToString())


def _smooth_noise(seed: int, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Noise at several scales, coarse ones stronger, with about the detail of a photograph."""
    random = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for scale in (1, 2, 4, 8, 16, 32):
        coarse = random.integers(0, 256, (height // scale + 1, width // scale + 1, 3), np.uint8)
        layer = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        total += (np.asarray(layer, np.float64) - 127.5) * scale
    return np.clip(127.5 + total / 32, 0, 255).astype(np.uint8)
