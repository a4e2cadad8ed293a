# SPDX-License-Identifier: Apache-2.0
"""A trained run that predicts images: files of any kind, or arrays.

    predictor = balpoe_jax.load("runs/mine")
    found = predictor.predict(["a.jpg", "b.png"])
    found.names, found.probabilities

Probabilities are of the ensemble, divided by the temperature that was fitted on held-out images.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from PIL import Image

from balpoe_jax import files, parallel
from balpoe_jax.config import Settings, from_record, with_defaults
from balpoe_jax.data import extras
from balpoe_jax.data.datasets import published
from balpoe_jax.data.records import photographs
from balpoe_jax.data.records.sources import FileIndex, FileSource
from balpoe_jax.data.types import EvalBatch
from balpoe_jax.errors import UserError
from balpoe_jax.evaluation import predictions, statistics
from balpoe_jax.experiment.build import build_program
from balpoe_jax.experiment.program import Program
from balpoe_jax.experiment.restoring import restore
from balpoe_jax.files import CONFIG
from balpoe_jax.metrics import softmax
from balpoe_jax.run import record
from balpoe_jax.step import TrainState

# Files that are predicted in one pipeline; their paths and reasons are held in memory.
_AT_ONCE = 2**15

# Added to the share of a class, so that one which never came stays possible.
_LEAST_SHARE = 1e-9


@dataclasses.dataclass(frozen=True)
class Predicted:
    """Predictions of some images.

    Attributes:
        classes: Names of all classes.
        probabilities: Calibrated probabilities, float64 `[N, C]`; nan where an image is bad.
        logits: Mean logits of the experts, float32 `[N, C]`; nan where an image is bad.
        expert_logits: Logits by expert, float32 `[E, N, C]`.
        reasons: Reason why an image cannot be read, by position.
    """

    classes: tuple[str, ...]
    probabilities: npt.NDArray[np.float64]
    logits: npt.NDArray[np.float32]
    expert_logits: npt.NDArray[np.float32]
    reasons: Mapping[int, str]

    @property
    def names(self) -> list[str]:
        """The name of the most probable class of each image; empty where an image is bad."""
        best = np.nan_to_num(self.probabilities, nan=-1.0).argmax(axis=1)
        return ["" if i in self.reasons else self.classes[label] for i, label in enumerate(best)]


def load(workdir: str) -> "Predictor":
    """Restores a run for prediction; its training images are not needed.

    Args:
        workdir: Folder of the run.

    Raises:
        UserError (a `ValueError`): no run there, no checkpoint, damaged files, or a run that
            evaluates averaged weights and was not evaluated since.
    """
    return Predictor(workdir)


class Predictor:
    """A restored run; see `load`.

    Attributes:
        path: Folder of the run.
        classes: Names of the classes.
        class_counts: Training images of each class, int64 `[C]`.
        temperature: Divisor of the logits; 1 where none was fitted.
        is_calibrated: Whether a temperature was fitted.
        image_size: Height and width in pixels of the network's input.
        variables: The network's `params` and `batch_stats`, as they are evaluated.
    """

    def __init__(self, workdir: str) -> None:
        self.path = path = record.locate(workdir)
        about = files.read_json(path / CONFIG)
        if not isinstance(about, dict) or not isinstance(about.get("config"), dict):
            raise UserError(
                f"{path} holds no run ({CONFIG} is missing or damaged); name the workdir of a "
                "training with --workdir=DIR."
            )
        self._settings = from_record(with_defaults(about["config"]))
        data = about.get("data") or {}
        self.class_counts = np.array(data.get("class_counts") or _counts(self._settings), np.int64)
        names = data.get("class_names") or range(len(self.class_counts))
        self.classes = tuple(str(name) for name in names)
        shape = data.get("image_shape") or _image_shape(self._settings)
        self.image_size = int(shape[0])
        self._parallel = parallel.make_parallel(self._settings.parallel.mode)
        self._program = build_program(
            self._settings, self._parallel, self.class_counts, tuple(shape)
        )
        self.variables = _restore(self._program, path)
        fitted = ((files.read_json(path / files.RESULTS) or {}).get("temperature") or {}).get(
            "ensemble"
        ) or {}
        self.temperature = float(fitted.get("value", 1.0))
        self.is_calibrated = "value" in fitted

    @functools.cached_property
    def _step(self) -> Any:
        return self._parallel.map_step(self._program.eval_step())

    def as_function(self) -> Callable[[Any], dict[str, jax.Array]]:
        """A pure function of images, with weights, preprocessing and temperature inside.

        It takes uint8 `[n, S, S, 3]` of the size `image_size`, and returns `expert_logits` float32
        `[n, E, C]`, `logits` float32 `[n, C]` of the ensemble, and its calibrated `probabilities`
        float32 `[n, C]`.
        """
        return functools.partial(self.as_function_of_variables(), self.variables)

    def as_function_of_variables(self) -> Callable[[Any, Any], dict[str, jax.Array]]:
        """As `as_function`, for `variables` and images: the weights are not inside."""
        predict = self._program.predict()
        scale, offset = (x.reshape(1, 1, 1, 3) for x in self.normalisation)
        dtype, temperature = jnp.dtype(self._settings.model.dtype), self.temperature

        def function(variables: Any, images: Any) -> dict[str, jax.Array]:
            normalised = (images.astype(jnp.float32) * scale + offset).astype(dtype)
            predicted = predict(variables, normalised)
            experts = predicted.logits.astype(jnp.float32)
            logits = experts.mean(axis=0) if predicted.ensemble is None else predicted.ensemble
            return {
                "expert_logits": jnp.moveaxis(experts, 0, 1),
                "logits": logits.astype(jnp.float32),
                "probabilities": jax.nn.softmax(logits.astype(jnp.float32) / temperature),
            }

        return function

    @property
    def normalisation(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Scale and offset of each channel that pixels from 0 to 255 are normalised by, `[3]`."""
        data = self._settings.data
        scale = (1 / (255 * np.asarray(data.std))).astype(np.float32)
        return scale, (-np.divide(data.mean, data.std)).astype(np.float32)

    def predict(
        self,
        images: Sequence[str | Path] | npt.NDArray | Sequence[npt.NDArray],
        prior: npt.ArrayLike | None = None,
    ) -> Predicted:
        """Predicts images.

        Args:
            images: Paths; or images uint8 `[H, W, 3]` of any size, or an array `[N, H, W, 3]`.
                Those of another size than the network's are resized and cropped by Pillow, which
                differs from the files' pipeline by rare roundings.
            prior: Share of each class among such images, float `[C]`, not all zero; the
                `class_counts` for images that come as in training. None for equal shares.

        Raises:
            UserError (a `ValueError`): images of another shape or type, or shares that are not.
        """
        found = self._predict(images)
        if prior is None:
            return found
        return dataclasses.replace(found, probabilities=self.under_prior(found, prior))

    def under_prior(self, found: Predicted, prior: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Calibrated probabilities of predictions, for another distribution of classes.

        Args:
            found: Predictions.
            prior: Share of each class, float `[C]`; they need not sum to 1.

        Returns:
            Probabilities, float64 `[N, C]`.

        Raises:
            UserError (a `ValueError`): shares of another shape, or that are no shares.
        """
        shares = np.asarray(prior, np.float64)
        if (
            shares.shape != (len(self.classes),)
            or not (np.isfinite(shares).all() and (shares >= 0).all())
            or not shares.any()
        ):
            raise UserError(
                f"A prior has a share for each of the {len(self.classes)} classes, none negative "
                f"and not all 0; got {shares.tolist()} of shape {shares.shape}."
            )
        offset = np.log(shares / shares.sum() + _LEAST_SHARE)
        return softmax(found.logits.astype(np.float64) / self.temperature + offset)

    def _predict(
        self, images: Sequence[str | Path] | npt.NDArray | Sequence[npt.NDArray]
    ) -> Predicted:
        paths = [str(image) for image in images if isinstance(image, str | Path)]
        if len(paths) == len(images):
            return _joined(list(self.stream(paths)), self.classes)
        return self._of_pixels([self._fitted(image) for image in images], {})

    def held_out(self) -> tuple[Predicted, npt.NDArray[np.int32]] | None:
        """The evaluation's predictions of held-out images, with their labels; None for none.

        Raises:
            UserError (a `ValueError`): predictions that are damaged.
        """
        try:
            stored = predictions.load(self.path / predictions.FOLDER, predictions.HELD_OUT)
        except FileNotFoundError:
            return None
        outputs = {"logits": stored.expert_logits}
        if stored.combined is not None:
            outputs["ensemble"] = stored.combined
        return self._finish(outputs, np.ones(len(stored.labels), bool), {}), stored.labels

    def stream(self, paths: Sequence[str]) -> Iterator[Predicted]:
        """Predicts files a batch after the other, in order and in bounded memory.

        A file that cannot be read or decoded becomes a row without probabilities.

        Args:
            paths: Paths of the files.
        """
        for first in range(0, len(paths), _AT_ONCE):
            yield from self._stream(paths[first : first + _AT_ONCE])

    def _stream(self, paths: Sequence[str]) -> Iterator[Predicted]:
        size = self._batch_size(len(paths))
        if self._settings.data.image_size is None:
            for first in range(0, len(paths), size):
                yield self._of_small_files(paths[first : first + size])
            return
        extras.require_tensorflow("Reading photographs")
        from balpoe_jax.data import pipeline

        index = FileIndex(np.array(paths), np.zeros(len(paths), np.int64))
        source = FileSource(index, self.image_size, self.resize, root="")
        data, bad = self._settings.data, dict[int, str]()
        batches = pipeline.eval_batches(
            source, size, data.mean, data.std, dtype=self._settings.model.dtype, bad=bad
        )
        done = 0
        for outputs, mask in self._run(batches):
            number = int(mask.sum())
            reasons = {i - done: bad[i] for i in range(done, done + number) if i in bad}
            yield self._finish(outputs, mask, reasons)
            done += number

    @property
    def resize(self) -> int:
        """Length in pixels to which the short side of an image is resized before the crop."""
        data = self._settings.data
        if data.image_size is None:
            return self.image_size
        return data.eval_resize or round(self.image_size * 256 / 224)

    def _batch_size(self, number: int) -> int:
        """The evaluation's, or a smaller one for few images: a power of two for each device."""
        size = self._parallel.num_devices
        while size < min(number, self._program.eval_batch_size):
            size *= 2
        return min(size, self._program.eval_batch_size)

    def _of_small_files(self, paths: Sequence[str]) -> Predicted:
        pixels, reasons = [], {}
        for i, path in enumerate(paths):
            try:
                pixels.append(self._fitted(photographs.pixels(Path(path).read_bytes())))
            except (photographs.BadFile, OSError) as error:
                reasons[i] = getattr(error, "strerror", None) or str(error)
                pixels.append(np.zeros((self.image_size, self.image_size, 3), np.uint8))
        return self._of_pixels(pixels, reasons)

    def _fitted(self, image: Any) -> npt.NDArray[np.uint8]:
        """An image in the network's size: itself, or resized by its short side and cropped."""
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise UserError(
                f"Images must be paths, or uint8 [H, W, 3]; got {image.dtype} {image.shape}."
            )
        side = self.image_size
        if image.shape[:2] == (side, side):
            return image
        resize = self.resize
        height, width = image.shape[:2]
        short = min(height, width)
        full = resize * width // short, resize * height // short
        resized = Image.fromarray(image).resize(full, Image.Resampling.BILINEAR)
        left, top = (round((length - side) / 2) for length in full)
        return np.asarray(resized.crop((left, top, left + side, top + side)))

    def _of_pixels(self, pixels: list[npt.NDArray], reasons: dict[int, str]) -> Predicted:
        size = self._batch_size(len(pixels))
        scale, offset = self.normalisation

        def batches() -> Iterator[EvalBatch]:
            for first in range(0, len(pixels), size):
                chosen = np.stack(pixels[first : first + size])
                padded = np.zeros((size, *chosen.shape[1:]), np.float32)
                padded[: len(chosen)] = chosen.astype(np.float32) * scale + offset
                images = padded.astype(jnp.dtype(self._settings.model.dtype))
                yield EvalBatch(images, np.zeros(size, np.int32), np.arange(size) < len(chosen))

        parts = [self._finish(outputs, mask, {}) for outputs, mask in self._run(batches())]
        joined = _joined(parts, self.classes)
        for i in reasons:
            joined.probabilities[i] = joined.logits[i] = np.nan
        return dataclasses.replace(joined, reasons=reasons)

    def _run(self, batches: Iterator[EvalBatch]) -> Iterator[tuple[Any, npt.NDArray[np.bool_]]]:
        for batch in parallel.Prefetcher(batches, self._parallel):
            outputs = jax.device_get(self._step(self.variables, batch))
            yield outputs, outputs["mask"]

    def _finish(
        self, outputs: Mapping[str, Any], mask: npt.NDArray[np.bool_], reasons: dict[int, str]
    ) -> Predicted:
        experts = np.asarray(outputs["logits"])[:, mask]
        logits = np.asarray(outputs["ensemble"])[mask] if "ensemble" in outputs else None
        mean = experts.mean(axis=0, dtype=np.float64) if logits is None else logits
        probabilities = softmax(np.asarray(mean, np.float64) / self.temperature)
        mean = np.asarray(mean, np.float32)
        for i in reasons:
            probabilities[i] = mean[i] = np.nan
        return Predicted(self.classes, probabilities, mean, experts, reasons)


def _joined(parts: Sequence[Predicted], classes: tuple[str, ...]) -> Predicted:
    if not parts:
        none = np.zeros((0, len(classes)))
        return Predicted(classes, none, none.astype(np.float32), none[None].astype(np.float32), {})
    reasons: dict[int, str] = {}
    before = 0
    for part in parts:
        reasons |= {before + i: reason for i, reason in part.reasons.items()}
        before += len(part.probabilities)
    return Predicted(
        classes,
        np.concatenate([part.probabilities for part in parts]),
        np.concatenate([part.logits for part in parts]),
        np.concatenate([part.expert_logits for part in parts], axis=1),
        reasons,
    )


def _counts(settings: Settings) -> npt.NDArray[np.int64]:
    return published(settings.data.name, settings.data.imbalance_ratio)[0]


def _image_shape(settings: Settings) -> tuple[int, int, int]:
    data = settings.data
    return published(data.name, data.imbalance_ratio, data.image_size or 0)[1]


def _restore(program: Program, path: Path) -> dict[str, Any]:
    state = restore(program, path)
    if state is None:
        raise UserError(f"There is no checkpoint in {path}; train first.")
    return _evaluated(program, state, path)


def _evaluated(program: Program, state: TrainState, path: Path) -> dict[str, Any]:
    """The weights and statistics that an evaluation uses."""
    step = int(state.step)
    if program.average is None:
        return dict(state.variables)
    if program.average.describe(step, program.context.steps_per_epoch)["average"] == "none":
        return dict(state.variables)
    if "batch_stats" in state.averages:
        return dict(state.averages)
    made = statistics.load(path / predictions.FOLDER, step)
    if made is None:
        raise UserError(
            f"The run in {path} evaluates averaged weights (config.optim.swa), "
            f"whose statistics after step {step} are not there; evaluate it first, with "
            "--mode=eval, where its training images are."
        )
    expected = jax.tree.map(np.shape, state.batch_stats)
    if jax.tree.map(np.shape, made) != expected:
        raise UserError(
            f"{path / predictions.FOLDER / statistics.FILE} does not fit the run's network; "
            "evaluate the run again, with --mode=eval."
        )
    return {**state.averages, "batch_stats": made}
