# SPDX-License-Identifier: Apache-2.0
"""The training transforms on single Pillow images, as torchvision and timm do them.

This is the other side of `input_pipeline`. It follows the same rules as `balpoe_jax.data`, with
other random numbers. It imports neither TensorFlow nor JAX, so that worker processes start quickly
and stay small.
"""

import dataclasses
import io
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from random import Random

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageOps

_GREY = (128, 128, 128)
_NEAREST = Image.Resampling.NEAREST
_BILINEAR = Image.Resampling.BILINEAR
_BICUBIC = Image.Resampling.BICUBIC

Rule = tuple[str, float, int]


@dataclasses.dataclass(frozen=True)
class Transform:
    """Makes a training example: augments and normalises an image.

    Attributes:
        size: Height and width of the result.
        mean, std: Statistics of the normalisation, by channel.
        crop_padding, flip, rotation, color_jitter: Fields as in `AugmentSettings`.
        pairs: Pairs of AutoAugment's operations, from which one is drawn; empty for no policy.
        randaugment: Whether timm's `rand-n2-m10-mstd0.5` follows.
        fill: RandAugment's colour outside the image.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_padding: int = 0
    flip: bool = False
    rotation: float = 0.0
    color_jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)
    pairs: tuple[tuple[Rule, Rule], ...] = ()
    randaugment: bool = False
    fill: tuple[int, int, int] = (124, 116, 104)

    def __call__(
        self, example: npt.NDArray[np.uint8] | bytes, random: Random, out: npt.NDArray[np.float32]
    ) -> None:
        """Writes an image uint8 `[size, size, 3]`, or encoded bytes, to `out` as float32."""
        if isinstance(example, bytes):
            image = random_resized_crop(_decode(example), self.size, random)
        else:
            image = Image.fromarray(example)
        image = self._augment(image, random)
        flat = out.reshape(self.size, -1)
        # In place and by rows, which is faster than torchvision's ToTensor and Normalize.
        np.multiply(np.asarray(image).reshape(self.size, -1), self._scale, out=flat)
        flat += self._offset

    def _augment(self, image: Image.Image, random: Random) -> Image.Image:
        if self.crop_padding:
            image = _padded_crop(image, self.crop_padding, random)
        if self.flip and random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.rotation:
            image = image.rotate(random.uniform(-self.rotation, self.rotation), _NEAREST)
        if any(self.color_jitter):
            image = _jitter(image, self.color_jitter, random)
        if self.pairs:
            for rule in random.choice(self.pairs):
                image = _apply_rule(image, rule, random)
        if self.randaugment:
            image = _randaugment(image, self.fill, random)
        return image

    @cached_property
    def _scale(self) -> npt.NDArray[np.float32]:
        return np.tile(1 / (255 * np.array(self.std)), self.size).astype(np.float32)

    @cached_property
    def _offset(self) -> npt.NDArray[np.float32]:
        return np.tile(-np.array(self.mean) / np.array(self.std), self.size).astype(np.float32)


def random_resized_crop(image: Image.Image, size: int, random: Random) -> Image.Image:
    """A random window of 8 to 100% of the area and ratio 3/4 to 4/3, resized."""
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = min(width, round(height * 4 / 3))
        h = min(height, round(width * 4 / 3))
        return _resized(image, (width - w) // 2, (height - h) // 2, w, h, size)
    return _resized(image, random.randint(0, width - w), random.randint(0, height - h), w, h, size)


def _resized(image: Image.Image, left: int, top: int, w: int, h: int, size: int) -> Image.Image:
    return image.crop((left, top, left + w, top + h)).resize((size, size), _BILINEAR)


def _decode(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded)).convert("RGB")


def _padded_crop(image: Image.Image, padding: int, random: Random) -> Image.Image:
    width, height = image.size
    padded = ImageOps.expand(image, border=padding, fill=0)
    left, top = random.randint(0, 2 * padding), random.randint(0, 2 * padding)
    return padded.crop((left, top, left + width, top + height))


def _jitter(image: Image.Image, strengths: Sequence[float], random: Random) -> Image.Image:
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for which in random.sample(range(3), 3):
        strength = strengths[which]
        image = kinds[which](image).enhance(random.uniform(1 - strength, 1 + strength))
    return image


def _transform(
    image: Image.Image, matrix: Sequence[float], resample: int, fill: tuple[int, int, int]
) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling(resample), fillcolor=fill
    )


def _rotate_on_grey(image: Image.Image, degrees: float) -> Image.Image:
    rotated = image.convert("RGBA").rotate(degrees)
    grey = Image.new("RGBA", rotated.size, (128,) * 4)
    return Image.composite(rotated, grey, rotated).convert("RGB")


# AutoAugment's operations: functions of an image and a strength in [0, 1], signed if True.
_POLICY: dict[str, tuple[Callable[[Image.Image, float], Image.Image], bool]] = {
    "shear_x": (lambda i, v: _transform(i, (1, 0.3 * v, 0, 0, 1, 0), _BICUBIC, _GREY), True),
    "shear_y": (lambda i, v: _transform(i, (1, 0, 0, 0.3 * v, 1, 0), _BICUBIC, _GREY), True),
    "translate_x": (
        lambda i, v: _transform(i, (1, 0, v * i.width * 150 / 331, 0, 1, 0), _NEAREST, _GREY),
        True,
    ),
    "translate_y": (
        lambda i, v: _transform(i, (1, 0, 0, 0, 1, v * i.height * 150 / 331), _NEAREST, _GREY),
        True,
    ),
    "rotate": (lambda i, v: _rotate_on_grey(i, 30 * v), False),
    "color": (lambda i, v: ImageEnhance.Color(i).enhance(1 + 0.9 * v), True),
    "contrast": (lambda i, v: ImageEnhance.Contrast(i).enhance(1 + 0.9 * v), True),
    "sharpness": (lambda i, v: ImageEnhance.Sharpness(i).enhance(1 + 0.9 * v), True),
    "brightness": (lambda i, v: ImageEnhance.Brightness(i).enhance(1 + 0.9 * v), True),
    "posterize": (lambda i, v: ImageOps.posterize(i, round(8 - 4 * v)), False),
    "solarize": (lambda i, v: ImageOps.solarize(i, math.ceil(256 - 256 * v)), False),
    "invert": (lambda i, v: ImageOps.invert(i), False),
    "autocontrast": (lambda i, v: ImageOps.autocontrast(i), False),
    "equalize": (lambda i, v: ImageOps.equalize(i), False),
}


def _apply_rule(image: Image.Image, rule: Rule, random: Random) -> Image.Image:
    name, probability, magnitude = rule
    if random.random() >= probability:
        return image
    operation, signed = _POLICY[name]
    strength = magnitude / 9
    if signed and random.random() < 0.5:
        strength = -strength
    return operation(image, strength)


def _solarize_add(image: Image.Image, addition: int) -> Image.Image:
    return image.point([i if i >= 128 else min(255, i + addition) for i in range(256)] * 3)


Fill = tuple[int, int, int]

# RandAugment's: functions of an image, a level in [0, 1], a sign, the interpolation and the fill.
_RANDAUGMENT: tuple[Callable[[Image.Image, float, float, int, Fill], Image.Image], ...] = (
    lambda i, v, s, r, f: ImageOps.autocontrast(i),
    lambda i, v, s, r, f: ImageOps.equalize(i),
    lambda i, v, s, r, f: ImageOps.invert(i),
    lambda i, v, s, r, f: i.rotate(30 * s * v, _BILINEAR, fillcolor=f),
    lambda i, v, s, r, f: ImageOps.posterize(i, int(4 * v)),
    lambda i, v, s, r, f: ImageOps.solarize(i, int(256 * v)),
    lambda i, v, s, r, f: _solarize_add(i, int(110 * v)),
    lambda i, v, s, r, f: ImageEnhance.Color(i).enhance(0.1 + 1.8 * v),
    lambda i, v, s, r, f: ImageEnhance.Contrast(i).enhance(0.1 + 1.8 * v),
    lambda i, v, s, r, f: ImageEnhance.Brightness(i).enhance(0.1 + 1.8 * v),
    lambda i, v, s, r, f: ImageEnhance.Sharpness(i).enhance(0.1 + 1.8 * v),
    lambda i, v, s, r, f: _transform(i, (1, 0.3 * s * v, 0, 0, 1, 0), r, f),
    lambda i, v, s, r, f: _transform(i, (1, 0, 0, 0.3 * s * v, 1, 0), r, f),
    lambda i, v, s, r, f: _transform(i, (1, 0, 0.45 * s * v * i.width, 0, 1, 0), r, f),
    lambda i, v, s, r, f: _transform(i, (1, 0, 0, 0, 1, 0.45 * s * v * i.height), r, f),
)


def _randaugment(image: Image.Image, fill: Fill, random: Random) -> Image.Image:
    for operation in random.choices(_RANDAUGMENT, k=2):
        if random.random() < 0.5:
            continue
        level = min(max(random.gauss(10, 0.5), 0), 10) / 10
        sign = random.choice((-1.0, 1.0))
        image = operation(image, level, sign, random.choice((_BILINEAR, _BICUBIC)), fill)
    return image
