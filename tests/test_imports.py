# SPDX-License-Identifier: Apache-2.0
"""Importing the package does nothing, and the library parts stay light."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "balpoe_jax").rglob("*.py")
)


def run_python(code: str, cwd: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (
            ["losses", "models", "metrics", "optim", "state", "parallel", "data.long_tail"],
            ["tensorflow", "ml_collections", "absl.flags"],
        ),
        (["metrics", "data.long_tail"], ["jax", "tensorflow"]),
        (["data.pipeline", "data.datasets"], ["jax", "ml_collections", "sklearn"]),
    ],
)
def test_layers_import_only_what_they_may(
    tmp_path: Path, modules: list[str], absent: list[str]
) -> None:
    imports = "\n".join(f"import balpoe_jax.{module}" for module in modules)
    loaded = run_python(f"{imports}\nprint(*sys.modules)", tmp_path).split()
    # chex and orbax define absl flags of their own; ours must not be among what is imported.
    assert not set(absent) - {"absl.flags"} & set(loaded)


def test_importing_everything_touches_no_device_file_or_flag(tmp_path: Path) -> None:
    imports = "\n".join(f"import {module}" for module in MODULES)
    code = f"""
import os, threading
before = dict(os.environ)
{imports}
from absl import flags
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a device was touched"
assert "workdir" not in flags.FLAGS and "config" not in flags.FLAGS, "a flag was defined"
changed = {{k for k in os.environ if os.environ[k] != before.get(k)}}
changed -= {{k for k in changed if k.startswith(("TF2_", "KMP_", "TPU_"))}}  # of TensorFlow and JAX
assert not changed, changed
"""
    run_python(code, tmp_path)
    assert not list(tmp_path.iterdir())
