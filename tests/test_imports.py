# SPDX-License-Identifier: Apache-2.0
"""Importing the package does nothing, and the library parts stay light."""

import ast
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
            ["tensorflow", "ml_collections"],
        ),
        (["metrics", "data.long_tail"], ["jax", "tensorflow"]),
    ],
)
def test_the_library_parts_stay_light(
    tmp_path: Path, modules: list[str], absent: list[str]
) -> None:
    imports = "\n".join(f"import balpoe_jax.{module}" for module in modules)
    loaded = run_python(f"{imports}\nprint(*sys.modules)", tmp_path).split()
    assert not set(absent) & set(loaded)


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("data", {"jax", "flax", "optax", "ml_collections"}),
        ("models", {"tensorflow", "ml_collections", "absl"}),
        ("metrics", {"jax", "tensorflow", "ml_collections", "absl"}),
    ],
)
def test_layers_name_only_what_they_may(folder: str, forbidden: set[str]) -> None:
    """By their text, since TensorFlow itself imports JAX where it can."""
    for path in (ROOT / "balpoe_jax" / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not forbidden & {name.partition(".")[0] for name in names}, path
            own = [name for name in names if name.startswith("balpoe_jax.")]
            allowed = (f"balpoe_jax.{folder}", "balpoe_jax.errors")
            assert all(name.startswith(allowed) for name in own), (path, own)


def test_importing_everything_touches_no_device_file_or_flag(tmp_path: Path) -> None:
    imports = "\n".join(f"import {module}" for module in MODULES)
    code = f"""
import os
# What these libraries do to the environment is theirs.
import flax, jax, matplotlib, ml_collections, optax, orbax.checkpoint, tensorflow
before = dict(os.environ)
{imports}
from absl import flags
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a device was touched"
assert "workdir" not in flags.FLAGS and "config" not in flags.FLAGS, "a flag was defined"
assert dict(os.environ) == before, "the environment was changed"
"""
    run_python(code, tmp_path)
    assert not list(tmp_path.iterdir())
