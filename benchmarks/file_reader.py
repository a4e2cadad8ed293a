# SPDX-License-Identifier: Apache-2.0
"""Compares photographs in files of their own with the same photographs in TFRecord files.

    python -m benchmarks.file_reader --data_dir=DIR [--cores=1] [--output=FILE]

Both are read by our pipeline, on the same cores, by turns. Three kinds of files: the JPEG files as
they are, the same with EXIF's mark of a quarter turn, and WebP files. Pillow decodes the
latter two.
"""

import functools
import io
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from balpoe_jax import cli
from balpoe_jax.errors import UserError
from balpoe_jax.reporting import tables
from benchmarks import measuring

KINDS = ("jpeg", "turned jpeg", "webp")

_QUARTER_TURN = 6
_ORIENTATION = 0x0112


def _as_it_is(content: bytes) -> bytes:
    return content


def _turned(content: bytes) -> bytes:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        exif, buffer = image.getexif(), io.BytesIO()
        exif[_ORIENTATION] = _QUARTER_TURN
        image.convert("RGB").save(buffer, "JPEG", quality=90, exif=exif)
    return buffer.getvalue()


def _webp(content: bytes) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(io.BytesIO(content)) as image:
        image.convert("RGB").save(buffer, "WEBP", quality=90)
    return buffer.getvalue()


_WRITERS: dict[str, Callable[[bytes], bytes]] = dict(
    zip(KINDS, (_as_it_is, _turned, _webp), strict=True)
)


def as_text(found: dict[str, Any]) -> str:
    """The figures for a terminal."""
    columns = [tables.Column(name, "number") for name in ("files", "records", "ratio", "range")]
    columns += [tables.Column(name, "number") for name in ("files/cpu", "rec./cpu", "ratio/cpu")]
    rows = [(name, measuring.shown(kind)) for name, kind in found["kinds"].items()]
    return "\n".join(
        [
            measuring.machine_line(found["machine"]),
            found["data"],
            f"Images a second and core, medians of {found['repeats']} turns of "
            f"{found['seconds']:g} s on {found['cores']} core(s); /cpu: a second of processor time",
            "",
            tables.as_text(tables.Table("files", "", tuple(columns), rows)),
        ]
    )


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("data_dir", "", "TFDS folder of imagenet_lt; without it, generated images.")
    flags.DEFINE_integer("cores", 1, "Number of cores for each side.", lower_bound=1)
    flags.DEFINE_integer("repeats", 5, "Number of turns of each side.", lower_bound=1)
    flags.DEFINE_float("seconds", 2.0, "Seconds of a turn.", lower_bound=0.0)
    flags.DEFINE_integer("batch_size", 0, "Batch size; 0 for the recipe's.", lower_bound=0)
    flags.DEFINE_integer("image_size", 0, "Size of photographs; 0 for 224.", lower_bound=0)
    flags.DEFINE_string("output", "", "JSON file for the figures, which are printed as well.")


def main(arguments: Sequence[str]) -> None:
    """Measures and prints, following the flags."""
    if len(arguments) > 1:
        raise UserError(f"Unexpected argument {arguments[1]!r}; every option starts with --.")
    values = flags.FLAGS
    measuring.pin(values.cores)
    from benchmarks import tf_pipeline  # TensorFlow counts the cores

    found: dict[str, Any] = {
        "machine": measuring.describe_machine(("pillow", "tensorflow-cpu")),
        "cores": values.cores,
        "repeats": values.repeats,
        "seconds": values.seconds,
        "kinds": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        records = tf_pipeline.make_case(
            "photos standard",
            values.data_dir,
            Path(scratch),
            values.batch_size,
            values.image_size,
        )
        found["data"] = records.description
        for kind in KINDS:
            files = tf_pipeline.as_files(records, Path(scratch) / kind, _WRITERS[kind])
            sides = {
                "files": functools.partial(files.measure, values.seconds),
                "records": functools.partial(records.measure, values.seconds),
            }
            samples = measuring.take_turns(sides, values.repeats)
            found["kinds"][kind] = measuring.compare(
                samples["files"], samples["records"], values.cores
            )
    print(as_text(found))
    if values.output:
        Path(values.output).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run(define_flags, main)
