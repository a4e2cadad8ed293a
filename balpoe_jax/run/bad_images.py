# SPDX-License-Identifier: Apache-2.0
"""The record of training photographs that could not be read and were replaced.

`bad_images.jsonl` in the workdir has a line for each: `{"step", "index", "id", "where", "reason"}`.
With several processes, each writes what it met in its part of the batches, the second one into
`bad_images.1.jsonl` and so on.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import jax

from balpoe_jax import files
from balpoe_jax.data.batches.replacements import BadImage, Replacements
from balpoe_jax.data.records.sources import Source, StoredSource
from balpoe_jax.errors import UserError
from balpoe_jax.run import multihost

_FILE = "bad_images{}.jsonl"


def make_replacements(
    policy: str, source: Source, workdir: Path, first_step: int
) -> Replacements | None:
    """The replacements for images of a training set that cannot be read.

    Args:
        policy: Value of `config.data.on_bad_image`, "fail" or "skip".
        source: Training set.
        workdir: Folder of the run, where they are recorded.
        first_step: Step after which this start continues. Records of later steps are discarded,
            since the steps will be made again.

    Returns:
        None for the policy "fail", and for images in memory.
    """
    if policy == "fail" or not isinstance(source, StoredSource):
        return None
    number = f".{jax.process_index()}" if multihost.count() > 1 and not multihost.is_first() else ""
    path = workdir / _FILE.format(number)
    known = [bad for bad in _read(path) if bad.step <= first_step]
    if path.exists():
        _write(path, known)
    return Replacements(source, known, report=lambda found: _write(path, found))


def count(policy: str, workdir: Path, step: int) -> dict[str, int]:
    """The entry `bad_images` of metrics and results up to a step, if any may or did pass."""
    found = [bad for path in sorted(workdir.glob(_FILE.format("*"))) for bad in _read(path)]
    met = {bad.index for bad in found if bad.step <= step}
    return {"bad_images": len(met)} if met or policy == "skip" else {}


def _write(path: Path, found: Iterable[BadImage]) -> None:
    lines = (json.dumps(dataclasses.asdict(bad)) + "\n" for bad in found)
    files.write_atomically(path, "".join(lines))


def _read(path: Path) -> list[BadImage]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [BadImage(**json.loads(line)) for line in lines]
        if all(isinstance(bad.step, int) and isinstance(bad.index, int) for bad in found):
            return found
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError):
        pass
    raise UserError(f"{path} is damaged; remove it, so that bad images are found again.")
