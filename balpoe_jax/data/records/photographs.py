# SPDX-License-Identifier: Apache-2.0
"""Image files as Pillow reads them, whatever their format, depth, colours or orientation.

TensorFlow decodes plain JPEG and PNG files to the same bits as Pillow. It does not know of EXIF's
orientation, and reads other colours in its own way. `plain` therefore turns whatever is not plain
into a file that TensorFlow decodes as Pillow does, so that training, evaluation and prediction see
the same pixels.
"""

import functools
import io
import warnings
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

# Ending of the files that are taken for images, in lower case.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

_ORIENTATION = 0x0112
_UPRIGHT = 1


class BadFile(Exception):  # noqa: N818
    """A file that is no image that can be read; the text says why."""


class Header(NamedTuple):
    """What an image file says of itself.

    Attributes:
        format: Name of the format, such as "JPEG".
        mode: Pillow's name of the colours, such as "RGB".
        height, width: Size in pixels of the upright image.
        is_upright: Whether the file holds the image as it is to be seen.
    """

    format: str
    mode: str
    height: int
    width: int
    is_upright: bool


def read_header(content: bytes) -> Header:
    """The header of an image file.

    Args:
        content: Content of the file; the beginning is read.

    Raises:
        BadFile: no image.
    """
    with _open(content) as image:
        return _header(image)


def plain(content: bytes) -> bytes:
    """An image file that TensorFlow decodes to the pixels of `pixels`: often the file itself.

    Args:
        content: Content of the file.

    Raises:
        BadFile: no image, or one that cannot be decoded.
    """
    with _open(content) as image:
        if _is_plain(image, content):
            return content
        buffer = io.BytesIO()
        _upright_colours(image).save(buffer, "BMP")
        return buffer.getvalue()


def pixels(content: bytes) -> npt.NDArray[np.uint8]:
    """The upright image in colours, uint8 `[H, W, 3]`.

    Transparency is left out, grey becomes colours, and of 16 bits the upper eight are taken. Of
    several images in a file it is the first.

    Args:
        content: Content of the file.

    Raises:
        BadFile: no image, or one that cannot be decoded.
    """
    with _open(content) as image:
        return np.asarray(_upright_colours(image))


def _open(content: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images and of odd metadata
            return Image.open(io.BytesIO(content))
    except Exception as error:  # Pillow's formats raise whatever they meet
        raise BadFile(_explain(error, content)) from error


def _explain(error: Exception, content: bytes) -> str:
    if not content:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is no image of a known format"
    return " ".join(str(error).split())[:200] or type(error).__name__


def _header(image: Image.Image) -> Header:
    width, height = image.size
    orientation = _orientation(image)
    if orientation >= 5:  # a quarter turn
        width, height = height, width
    return Header(str(image.format), image.mode, height, width, orientation == _UPRIGHT)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; what is no such number counts as upright, as in Pillow."""
    try:
        found = image.getexif().get(_ORIENTATION, _UPRIGHT)
    except Exception:  # EXIF that cannot be read
        return _UPRIGHT
    return found if found in range(1, 9) else _UPRIGHT


def _is_plain(image: Image.Image, content: bytes) -> bool:
    """Whether TensorFlow decodes the file as Pillow does."""
    modes = {"JPEG": ("RGB", "L"), "PNG": ("RGB", "L")}.get(str(image.format), ())
    # The byte after width and height in the first chunk of a PNG file: the bits of a sample.
    is_deep = image.format == "PNG" and content[24:25] > b"\x08"
    has_alpha = "transparency" in image.info
    return image.mode in modes and not is_deep and not has_alpha and _orientation(image) == _UPRIGHT


def _upright_colours(image: Image.Image) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = ImageOps.exif_transpose(image) if _orientation(image) != _UPRIGHT else image
            if image.mode.startswith("I"):  # 16 bits, which Pillow would clip
                upper = np.asarray(image).astype(np.int64) >> 8
                image = Image.fromarray(upper.clip(0, 255).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:
        raise BadFile(_explain(error, b"content")) from error


@functools.cache
def blank() -> bytes:
    """The file of a black image of one pixel."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    return buffer.getvalue()
