# SPDX-License-Identifier: Apache-2.0
"""Runs commands of the package in their own processes, without the seconds that imports take.

One process imports everything and does nothing else. Each command is a fork of it, with its own
arguments, output and exit code. `test_a_command_starts_from_nothing` tests the commands without it.
"""

import atexit
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]  # not imported: this file is also run by itself


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m module arguments` in the root of the repository."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        ask = _server()
        code = ask({"module": module, "arguments": list(arguments), "outputs": outputs})
        stdout, stderr = (Path(path).read_text() for path in outputs)
    return subprocess.CompletedProcess([module, *arguments], code, stdout, stderr)


def run_main(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m balpoe_jax.main arguments`."""
    return run("balpoe_jax.main", *arguments)


@cache
def _server() -> Callable[[dict], int]:
    process = subprocess.Popen(
        [sys.executable, __file__],
        cwd=ROOT,
        # `balpoe_jax.cli` sets these before a command imports TensorFlow.
        env={
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "TF_ENABLE_ONEDNN_OPTS": "0",
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.kill)

    def ask(request: dict) -> int:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    return ask


def _serve() -> None:
    # Only imports: they touch no device and start no thread of TensorFlow or JAX.
    import balpoe_jax.compare
    import balpoe_jax.evaluate
    import balpoe_jax.reproduce.scores
    import balpoe_jax.torch_import
    import balpoe_jax.train  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            _become(request)
            return
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(request: dict) -> None:
    """Turns this process into the command, and exits with the command's code."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, path in enumerate(request["outputs"], start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    module = request["module"]
    sys.modules.pop(module, None)  # so that it runs again
    sys.argv = [module, *request["arguments"]]
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    # Skips the seconds that Python takes to unload all modules.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
