# SPDX-License-Identifier: Apache-2.0
"""The claim of a workdir: its `config.json` says which config the run there has."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from balpoe_jax import files
from balpoe_jax.config import Settings, to_record, with_defaults
from balpoe_jax.errors import TransientError, UserError, is_transient
from balpoe_jax.files import CONFIG, to_json
from balpoe_jax.run import multihost
from balpoe_jax.run.environment import environment

# Fields that may differ between starts of one run: where, how often and in what order things are
# read, written, computed and scored, and which trouble is let pass.
_OPERATIONAL = (
    "data.data_dir",
    "data.lists",  # as the folder: what is in them is compared by a digest
    "data.class_names",
    "data.check_archive",
    "data.chosen",
    "data.threads",
    # What a run began with is kept, see `train`.
    "data.pipeline",
    "data.steps_per_dispatch",
    "data.on_bad_image",
    "optim.skip_non_finite",
    "log_every_steps",
    "note",
    "checkpoint.",
    "eval.",
    "model.expert_map",
    "model.remat",
    "compilation_cache_dir",
    "profile.",
)

# The fields of "eval." on which figures depend; results.json repeats them.
EVALUATION_SETTINGS = (
    "num_bins",
    "held_out_per_class",
    "shift_lists",
    "prior_strength",
    "shift_test_level",
    "expert_weights_epochs",
    "expert_weights_rate",
)


def locate(workdir: str) -> Path:
    """The absolute path of a workdir, `~` expanded; refuses anything but a local folder's name."""
    if not workdir or "://" in workdir:
        raise UserError(f"--workdir must name a local folder so far, got {workdir!r}.")
    return Path(workdir).expanduser().absolute()


def open_workdir(workdir: str) -> Path:
    """Creates the workdir if needed; refuses one that cannot be written to.

    Every process must call this; all get the result of process 0.
    """
    path = locate(workdir)
    multihost.run_on_process_0(lambda: _make_writable(path))
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
        raise (TransientError if is_transient(error) else UserError)(
            f"The workdir {path} cannot be written to ({error.strerror}); choose another one with "
            "--workdir=DIR."
        ) from error


def has_config(workdir: Path) -> bool:
    """Whether the workdir already holds a run."""
    return (workdir / CONFIG).exists()


def write_config(
    workdir: Path, settings: Settings, resolved: Mapping[str, Any], data: Mapping[str, Any]
) -> None:
    """Writes `config.json`: from then on the workdir belongs to this configuration.

    Args:
        workdir: Folder of the run.
        settings: Settings of the experiment.
        resolved: Values in use of what the config leaves open.
        data: Class counts and sizes of the data set.
    """
    content = {
        "config": to_record(settings),
        "resolved": resolved,
        "data": data,
        "environment": environment(),
    }
    files.write_atomically(workdir / CONFIG, json.dumps(to_json(content), indent=2) + "\n")


def recorded_pipeline(workdir: Path) -> str | None:
    """The place where the batches of the run in a workdir are made; None if it holds no run."""
    if not has_config(workdir):
        return None
    resolved = (files.read_json(workdir / CONFIG) or {}).get("resolved")
    # Older runs had the host's pipeline alone.
    return str(resolved.get("pipeline", "host")) if isinstance(resolved, dict) else "host"


def read_config(path: Path) -> dict[str, Any]:
    """The config in a `config.json`, perhaps under older names.

    Raises:
        OSError: a file that is not there (`FileNotFoundError`), or that cannot be read.
        ValueError: a file without a config.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    config = content.get("config") if isinstance(content, dict) else None
    if not isinstance(config, dict):
        raise ValueError(f"its config is {config!r}")
    return config


def check_same_config(workdir: Path, settings: Settings) -> None:
    """Raises UserError unless `workdir` holds a run of these settings."""
    path = workdir / CONFIG
    try:
        before = read_config(path)
    except FileNotFoundError as error:
        raise UserError(
            f"{workdir} holds no run (there is no {CONFIG}); train first, or name the workdir of a "
            "run with --workdir=DIR."
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); choose another workdir.") from error
    there, here = experiment_fields(before), experiment_fields(to_record(settings))
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


def check_same_images(workdir: Path, data: Mapping[str, Any]) -> None:
    """Raises UserError if a run was begun with other training images of the user's own.

    Args:
        workdir: Folder of the run.
        data: The data set as it is now, see `write_config`.
    """
    before = (files.read_json(workdir / CONFIG) or {}).get("data") or {}
    if before.get("digest") not in (None, data.get("digest")):
        raise UserError(
            f"The run in {workdir} was begun with {before.get('num_train')} training images of "
            f"{len(before.get('class_names', ()))} classes, and those that are there now are "
            f"others ({data.get('num_train')}); bring them back, or choose another --workdir."
        )


def experiment_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that determine what is trained, by their dotted names, as plain values.

    A field that is newer than the record has its default.
    """
    fields = _flatten(to_json(with_defaults(config)))
    return {name: value for name, value in fields.items() if not name.startswith(_OPERATIONAL)}


def check_config_everywhere(settings: Settings) -> None:
    """Refuses processes with different configs, but for the fields about the host itself."""
    fields = _flatten(to_json(to_record(settings)))
    own = ("data.data_dir", "data.threads")
    shared = {name: fields[name] for name in fields if name not in own}
    multihost.check_same(shared, "config", "use one command line for all")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
