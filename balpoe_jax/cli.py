# SPDX-License-Identifier: Apache-2.0
"""What the commands share: flags, logging, and errors as one sentence with exit code 2."""

import contextlib
import hashlib
import logging
import os
import platform
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from balpoe_jax import config_files
from balpoe_jax.errors import Preempted, TransientError, UserError
from balpoe_jax.renames import rename_overrides

_EXIT_ERROR = 1
_EXIT_USER_ERROR = 2
_EXIT_PASSING_ERROR = os.EX_TEMPFAIL  # 75
_EXIT_INTERRUPTED = 130  # as a shell reports SIGINT
_EXIT_PREEMPTED = 143  # as a shell reports SIGTERM

# Variables that libraries read when they start; what the user has set stays.
_ENVIRONMENT = {
    # XLA, its plugins for GPUs and TPUs, and TensorFlow log only what ends the process. They would
    # report every attempt of the autotuner and every start of a device, as warnings and errors.
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "GRPC_VERBOSITY": "ERROR",  # otherwise a line for every process that starts
    "TF_ENABLE_ONEDNN_OPTS": "0",  # it announces itself, and rounds differently
    # Keeps the memory of a batch for the next: handing out fresh pages for each batch of
    # photographs would take a sixth of the time.
    "TF_CPU_ALLOCATOR_USE_BFC": "1",
}

_LONGEST_LINE = 3000  # of a message, in characters


def run(define_flags: Callable[[], None], main: Callable[[Sequence[str]], None]) -> None:
    """Runs a command: defines and parses flags, then calls `main` with the remaining arguments.

    Wrong flags and every `UserError` end the process with one line on stderr and exit code 2, a
    `TransientError` with one and 75, an interruption from the keyboard with one and 130, a
    preemption (SIGTERM) with one and 143.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _log_to_terminal()

    def guarded(arguments: Sequence[str]) -> None:
        try:
            main(arguments)
        except (UserError, Preempted) as error:
            sys.exit(report(error))
        except KeyboardInterrupt as error:
            # At once: what writes a checkpoint in the background, which an interruption may have
            # cut short, can keep Python from ending. Half a checkpoint is never taken for one.
            code = report(error)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    define_flags()
    for name in ("config", "workdir"):  # --help lists what belongs to the command's own module
        if name in flags.FLAGS:
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
    app.run(guarded, flags_parser=_parse_flags)


def report(error: BaseException) -> int:
    """Prints why a command ends, in one line if the kind is known, and returns the exit code."""
    if isinstance(error, UserError):
        _print_error(str(error))
        return _EXIT_PASSING_ERROR if isinstance(error, TransientError) else _EXIT_USER_ERROR
    if isinstance(error, Preempted):
        interrupted = error.signal == signal.SIGINT
        print(f"{'Interrupted' if interrupted else 'Preempted'}: {error}", file=sys.stderr)
        return _EXIT_INTERRUPTED if interrupted else _EXIT_PREEMPTED
    if isinstance(error, KeyboardInterrupt):
        print(
            "Interrupted: a training goes on from its last checkpoint when started again.",
            file=sys.stderr,
        )
        return _EXIT_INTERRUPTED
    traceback.print_exception(error)
    return _EXIT_ERROR


def define_run_flags() -> None:
    """Defines --config and --workdir."""
    define_config_flag()
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    flags.mark_flag_as_required("workdir")


def define_config_flag() -> None:
    """Defines --config."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Experiment: a file, FILE.py[:key=value,...], or the name of one in configs/, "
        "NAME[:key=value,...].",
        lock_config=True,
    )
    flags.mark_flag_as_required("config")


def use_compilation_cache(folder: str | None) -> None:
    """Keeps what JAX compiles in a folder, and reuses what another process compiled.

    Args:
        folder: Folder of the cache. None: the user's, by kind of machine, unless JAX has one
            already (such as by `JAX_COMPILATION_CACHE_DIR`). Empty: JAX's own settings.

    Raises:
        UserError (a `ValueError`): a given folder that cannot be written to.
    """
    if folder == "":
        return
    import jax  # not above: the commands that compile nothing start without it

    if folder is not None:
        path = Path(folder).expanduser().absolute()
    elif jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        path = _default_cache()
    else:
        return
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK)
    except OSError:
        writable = False
    if writable:
        jax.config.update("jax_compilation_cache_dir", str(path))
    elif folder is not None:
        raise UserError(
            f"The compilation cache {path} cannot be written to; choose another folder with "
            "--config.compilation_cache_dir=DIR, or none with --config.compilation_cache_dir=."
        )


def _default_cache() -> Path:
    """The user's folder of compiled programs for this kind of machine.

    JAX keys the programs of GPUs and TPUs by the device. Those of CPUs it keys by less than the
    instruction sets that they use.
    """
    home = os.environ.get("XDG_CACHE_HOME", "")
    caches = Path(home) if os.path.isabs(home) else Path("~/.cache").expanduser()
    kind = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        named = ("model name", "flags", "Features", "CPU part")
        kind += "".join(sorted({line for line in lines if line.startswith(named)}))
    digest = hashlib.sha256(kind.encode()).hexdigest()[:12]
    return caches / "balpoe_jax" / "xla" / f"{platform.machine()}-{digest}"


def _log_to_terminal() -> None:
    """Sends our own lines to stdout as they are, and warnings of libraries to stderr."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("balpoe_jax")
    ours.setLevel(logging.INFO)
    ours.propagate = False
    ours.addHandler(handler)
    absl_logging.set_verbosity(absl_logging.WARNING)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    given, argv = sys.argv, config_files.locate_all(argv)
    path = _config_path(argv)
    file = path.partition(":")[0]
    if config_files.is_name(path):
        names = ", ".join(config_files.names())
        _fail(f"There is no config {file!r}; choose from {names}, or name a file, as FILE.py.")
    if os.path.exists(file) and not os.path.isfile(file):  # such as a device, which may never end
        _fail(
            f"The config file {file} is no file; name an experiment's, like configs/digits_lt.py."
        )
    argv = rename_overrides(argv, partial(_own_taus, argv))
    try:
        sys.argv = argv  # where ml_collections looks for overrides
        arguments = flags.FLAGS(argv)
    except flags.Error as error:
        about_field = str(error).startswith("flag --config.")
        _fail((about_field and _unknown_field(argv)) or _own_sentence(error))
    except Exception as error:
        # ml_collections, which names the field at best, met a file that it cannot load, or an
        # override that does not fit the config.
        _fail(_unknown_field(argv) or _own_sentence(error))
    finally:
        sys.argv = given  # as the run's record keeps it
    if "config" in flags.FLAGS and not isinstance(flags.FLAGS.config, ConfigDict):  # unreadable
        _fail(
            f"The config file {path} cannot be read; name an experiment's file, such as "
            f"--config=configs/digits_lt.py, or one of {', '.join(config_files.names())}."
        )
    return arguments


def _own_taus(argv: Sequence[str]) -> tuple[float, ...]:
    """The taus that a config file has, for a command that gives one end by its old name."""
    try:
        return tuple(ConfigFileFlagParser("config").parse(_config_path(argv)).loss.taus)
    except Exception:  # whatever a config file raises; parsing the flags will report it
        return (0.0, 2.0)


def _own_sentence(error: Exception) -> str:
    """The message of an error; only the last line of a traceback that ml_collections quotes."""
    message = str(error)
    if "Traceback (most recent call last)" in message:
        last_line = message.strip().splitlines()[-1]
        return last_line.removeprefix(f"{UserError.__module__}.{UserError.__qualname__}: ")
    return message


def _unknown_field(argv: Sequence[str]) -> str | None:
    """A sentence on the first override that names no field of the config, with the valid ones.

    None if each names a field, or if the config itself cannot be loaded.
    """
    try:
        config = ConfigFileFlagParser("config").parse(_config_path(argv))
    except Exception:  # whatever a config file raises
        return None
    for item in argv:
        name = item.lstrip("-").partition("=")[0]
        if not name.startswith("config."):
            continue
        node = config
        path = name.split(".")
        for depth, part in enumerate(path[1:], start=1):
            if not isinstance(node, ConfigDict) or part not in node:
                above = ".".join(path[:depth])
                valid = ", ".join(node) if isinstance(node, ConfigDict) else "no fields"
                return f"Unknown config field {name}; {above} has {valid}."
            node = node[part]
        if isinstance(node, ConfigDict):
            return f"{name} is a section of the config; set one of its fields: {', '.join(node)}."
    return None


def _config_path(argv: Sequence[str]) -> str:
    """The last value of --config, in either spelling."""
    path = ""
    for item, following in zip(argv, (*argv[1:], ""), strict=True):
        name, equals, value = item.lstrip("-").partition("=")
        if name == "config":
            path = value if equals else following
    return path


def _fail(message: str) -> NoReturn:
    _print_error(message)
    sys.exit(_EXIT_USER_ERROR)


def _print_error(message: str) -> None:
    line = " ".join(message.split())
    if len(line) > _LONGEST_LINE:  # it repeats what it was given
        line = f"{line[: _LONGEST_LINE // 2]} ... {line[-_LONGEST_LINE // 2 :]}"
    # Without characters that a terminal obeys, and without surrogates, which no stream takes.
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
    print(f"Error: {line}", file=sys.stderr)
