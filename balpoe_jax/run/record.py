# SPDX-License-Identifier: Apache-2.0
"""The record of a run: plain files in its workdir.

`config.json` claims the workdir for one configuration, `metrics.jsonl` grows by a line at a time,
`results.json` is written at the end, `train.log` repeats the terminal, and `tensorboard/` holds the
same curves as events.
"""

import contextlib
import datetime
import importlib.metadata
import json
import logging
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

import balpoe_jax
from balpoe_jax import files
from balpoe_jax.config import with_defaults
from balpoe_jax.errors import PassingError, UserError, passes
from balpoe_jax.files import plain, read_json, write_atomically, writing
from balpoe_jax.run import multihost
from balpoe_jax.run.events import EventFile

CONFIG, METRICS, DISCARDED, RESULTS, LOG = (
    "config.json",
    "metrics.jsonl",
    "metrics.discarded.jsonl",
    "results.json",
    "train.log",
)

# Where, how often and in what order things are read, written, computed and scored, and what to let
# pass: may differ between starts of one run.
_OPERATIONAL = (
    "data.data_dir",
    "data.check_archive",
    "data.threads",
    # What a run began with is kept, see `train`.
    "data.pipeline",
    "data.steps_per_dispatch",
    "data.on_bad_image",
    "optim.skip_non_finite",
    "log_every_steps",
    "remark",
    "checkpoint.",
    "eval.",
    "model.expert_map",
    "model.remat",
    "cache_dir",
    "profile.",
)

# Of the fields of "eval.", those on which the figures of results.json depend, which repeats them.
EVALUATION_SETTINGS = (
    "num_bins",
    "held_out_per_class",
    "shift_lists",
    "prior_strength",
    "prior_significance",
    "aggregation_epochs",
    "aggregation_rate",
)

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-cpu")


def locate(workdir: str) -> Path:
    """The absolute path of a workdir, `~` expanded; refuses what is not a local folder's name."""
    if not workdir or "://" in workdir:
        raise UserError(f"--workdir must name a local folder so far, got {workdir!r}.")
    return Path(workdir).expanduser().absolute()


def open_workdir(workdir: str) -> Path:
    """Creates the workdir if needed; refuses one that cannot be written to.

    Every process must call this, and sees what process 0 made of it.
    """
    path = locate(workdir)
    multihost.on_first(lambda: _make_writable(path))
    multihost.check_shared(path)
    return path


def _make_writable(path: Path) -> None:
    files.clear(path, path / "predictions", path / "report")
    probe = files.temporary(path / "writable")
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise (PassingError if passes(error) else UserError)(
            f"The workdir {path} cannot be written to ({error.strerror}); choose another one with "
            "--workdir=DIR."
        ) from error


def is_claimed(workdir: Path) -> bool:
    """Whether the workdir already holds a run."""
    return (workdir / CONFIG).exists()


def claim(
    workdir: Path, config: Mapping[str, Any], resolved: Mapping[str, Any], data: Mapping[str, Any]
) -> None:
    """Writes `config.json`: from then on the workdir belongs to this configuration.

    Args:
        workdir: of the run.
        config: all its fields.
        resolved: what the fields that are left open turned out to be.
        data: what the data set turned out to be.
    """
    content = {"config": config, "resolved": resolved, "data": data, "environment": environment()}
    write_atomically(workdir / CONFIG, json.dumps(plain(content), indent=2) + "\n")


def recorded_pipeline(workdir: Path) -> str | None:
    """Where the batches of the run in a workdir are made; None when it holds no run."""
    if not is_claimed(workdir):
        return None
    resolved = (read_json(workdir / CONFIG) or {}).get("resolved")
    # Older runs knew no other.
    return str(resolved.get("pipeline", "host")) if isinstance(resolved, dict) else "host"


def check_claim(workdir: Path, config: Mapping[str, Any]) -> None:
    """Raises UserError unless `workdir` holds a run of this configuration."""
    path = workdir / CONFIG
    try:
        before = json.loads(path.read_text())["config"]
        if not isinstance(before, dict):
            raise TypeError(f"its config is {before!r}")
    except FileNotFoundError as error:
        raise UserError(
            f"{workdir} holds no run (there is no {CONFIG}); train first, or name the workdir of a "
            "run with --workdir=DIR."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); choose another workdir.") from error
    there, here = experiment_fields(before), experiment_fields(config)
    differing = [
        f"{field} was {there.get(field)!r} and is now {here.get(field)!r}"
        for field in sorted(there.keys() | here.keys())
        if there.get(field) != here.get(field)
    ]
    if differing:
        raise UserError(
            f"The workdir {workdir} holds a run of another config: {'; '.join(differing)}. "
            "Choose another --workdir, or the config that the run was started with."
        )


def experiment_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields on which what is trained depends, by their dotted names, as plain values.

    A field that `config` lacks, since it was recorded before there was the field, has its default.
    """
    fields = _flatten(plain(with_defaults(config)))
    return {name: value for name, value in fields.items() if not name.startswith(_OPERATIONAL)}


def check_same_config(config: Mapping[str, Any]) -> None:
    """Refuses processes with different configs, but for the fields about the host itself."""
    fields = _flatten(plain(config))
    own = ("data.data_dir", "data.threads")
    shared = {name: fields[name] for name in fields if name not in own}
    multihost.check_same(shared, "config", "use one command line for all")


def environment() -> dict[str, Any]:
    """Versions and source of this process, devices of all."""
    devices = jax.devices()
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "balpoe_jax": balpoe_jax.__version__,
            **{name: _version(name) for name in _PACKAGES},
        },
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "platform": devices[0].platform,
        "runtime": devices[0].client.platform_version,
        "driver": _driver(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "process_count": jax.process_count(),
        "git_commit": _git_commit(),
        "command": sys.argv,
    }


class MetricWriter:
    """Appends rows to `metrics.jsonl` and to TensorBoard events; used as a context.

    Of several processes only the first writes.

    Args:
        workdir: of the run.
        from_step: rows of later steps are left over from before an interruption. They move to
            `metrics.discarded.jsonl`, since the steps will be made again.
    """

    def __init__(self, workdir: Path, from_step: int) -> None:
        self._writes = multihost.is_first()
        if not self._writes:
            return
        _discard_rows_after(workdir, from_step)
        self._path = workdir / METRICS
        with writing(self._path):
            self._file = self._path.open("a", encoding="utf-8")
        self._events = EventFile(workdir / "tensorboard")

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writes:
            with contextlib.suppress(OSError):  # of a row that could not be written
                self._file.close()
            self._events.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes one row; it must have an integer `step`.

        Raises:
            UserError (a `ValueError`): it cannot be written.
        """
        if not self._writes:
            return
        with writing(self._path):
            self._file.write(json.dumps(plain(row)) + "\n")
            self._file.flush()
        scalars = {
            name: value
            for name, value in row.items()
            if isinstance(value, int | float) and name != "step"
        }
        self._events.add(row["step"], scalars)


@contextlib.contextmanager
def log_to_file(workdir: Path) -> Iterator[None]:
    """Repeats the package's log lines in `train.log`, whether or not the caller shows them.

    Of several processes only the first logs; the others keep to warnings, and write no file.
    """
    package = logging.getLogger("balpoe_jax")
    level = package.level
    if not multihost.is_first():
        package.setLevel(logging.WARNING)
        try:
            yield
        finally:
            package.setLevel(level)
        return
    with writing(workdir / LOG):
        handler = _LogFile(workdir / LOG, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    package.setLevel(min(level, logging.INFO) if level else logging.INFO)
    package.addHandler(handler)
    try:
        yield
    finally:
        package.setLevel(level)
        package.removeHandler(handler)
        handler.close()


class _LogFile(logging.FileHandler):
    """Of which a line that cannot be written is lost, instead of a traceback for each."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Does nothing; the terminal has the line."""

    def close(self) -> None:
        """Closes the file, whether or not it has all lines."""
        with contextlib.suppress(OSError):
            super().close()


def has_test_row(workdir: Path, step: int) -> bool:
    """Whether `metrics.jsonl` has the test scores of a step."""
    lines = (workdir / METRICS).read_text(encoding="utf-8").splitlines()
    return any(row["step"] == step and "test_top1" in row for row in map(json.loads, lines))


def _discard_rows_after(workdir: Path, step: int) -> None:
    path = workdir / METRICS
    if not path.exists():
        return
    kept: list[str] = []
    dropped: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        (kept if _row_step(line) <= step else dropped).append(line)
    if dropped:
        with open(workdir / DISCARDED, "a", encoding="utf-8") as discarded:
            discarded.writelines(line if line.endswith("\n") else line + "\n" for line in dropped)
        write_atomically(path, "".join(kept))


def _row_step(line: str) -> float:
    """The step of a row; a line torn by an interruption counts as later than any."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The version of the NVIDIA driver, as it tells it; None without one."""
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return None


def _git_commit() -> str | None:
    """The commit of the source, with "+" when files were changed; None outside a repository."""
    root = Path(balpoe_jax.__file__).parent
    try:
        # An installed package may lie inside a repository that is not its own.
        tracked = ["git", "ls-files", "--error-unmatch", "__init__.py"]
        subprocess.run(tracked, cwd=root, capture_output=True, timeout=10, check=True)
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None
