# SPDX-License-Identifier: Apache-2.0
"""Writes a trained run in a format of other programs.

    python -m balpoe_jax.export --workdir=RUN --format=stablehlo --output=DIR

DIR gets the program, or the weights, and `model.json` with the class names, the size of the images
and how they are made, and the temperature.
"""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from balpoe_jax import cli, files
from balpoe_jax.errors import UserError

log = logging.getLogger("balpoe_jax.export")  # not __main__, as which it is started

FORMATS = ("stablehlo", "savedmodel", "onnx", "safetensors", "hub")
ABOUT = "model.json"


def define_flags() -> None:
    """Defines --workdir, --format, --push and --output."""
    flags.DEFINE_string("workdir", "", "Folder of the run.")
    flags.DEFINE_list("format", ["stablehlo"], f"Formats, from {', '.join(FORMATS)}.")
    flags.DEFINE_string(
        "push",
        "",
        "Repository OWNER/NAME of Hugging Face's hub that --format=hub is uploaded to.",
    )
    flags.DEFINE_string("output", "", "Folder of what is written; empty for RUN/export.")


def main(arguments: Sequence[str]) -> None:
    """Exports, following the flags.

    Raises:
        UserError (a `ValueError`): wrong flags, no run, or a format that is not installed.
    """
    if len(arguments) > 1:
        raise UserError(f"Unexpected argument {arguments[1]!r}; every option starts with --.")
    values = flags.FLAGS
    if not values.workdir:
        raise UserError("Expected the workdir of a trained run; give it with --workdir=RUN.")
    unknown = [name for name in values.format if name not in FORMATS]
    if unknown or not values.format:
        raise UserError(
            f"--format must be one or more of {', '.join(FORMATS)}; got "
            f"{','.join(values.format)!r}."
        )
    if values.push and "hub" not in values.format:
        raise UserError("--push uploads the folder of --format=hub; add this format.")
    from balpoe_jax.predictor import load

    predictor = load(values.workdir)
    folder = Path(values.output or Path(values.workdir) / "export")
    with files.reports_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name in values.format:
        log.info("Written: %s", _writer(name)(predictor, folder))
    files.write_atomically(folder / ABOUT, json.dumps(describe(predictor), indent=2) + "\n")
    if values.push:
        from balpoe_jax.export import hub

        log.info("Uploaded: %s", hub.push(folder, values.push))
    if not predictor.is_calibrated:
        log.warning("No temperature was fitted on held-out images: probabilities are as they are.")


def describe(predictor: Any) -> dict[str, Any]:
    """What a program needs to know to use an export.

    Args:
        predictor: Restored run, a `Predictor`.
    """
    scale, offset = predictor.normalisation
    return {
        "inputs": {
            "images": ["n", predictor.image_size, predictor.image_size, 3],
            "dtype": "uint8",
        },
        "outputs": ["expert_logits [n, E, C]", "logits [n, C]", "probabilities [n, C]"],
        "resize_short_side": predictor.resize,
        "crop": "centre",
        "scale": scale.tolist(),
        "offset": offset.tolist(),
        "temperature": predictor.temperature,
        "is_calibrated": predictor.is_calibrated,
        "classes": list(predictor.classes),
        "class_counts": predictor.class_counts.tolist(),
    }


def _writer(name: str) -> Callable[[Any, Path], Path]:
    from balpoe_jax.export import hub, onnx_model, saved_model, stablehlo, weights

    return {
        "stablehlo": stablehlo.write,
        "savedmodel": saved_model.write,
        "onnx": onnx_model.write,
        "safetensors": weights.write,
        "hub": hub.write,
    }[name]


if __name__ == "__main__":
    cli.run(define_flags, main)
