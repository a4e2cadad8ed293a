# SPDX-License-Identifier: Apache-2.0
"""Importing the package does nothing, and the library parts stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from test_cifar import members, write_archive

ROOT = Path(__file__).parents[1]

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "balpoe_jax").rglob("*.py")
)


# The tf.data pipeline, and what reads records of TFDS.
TENSORFLOW = {
    f"balpoe_jax.data.{module}"
    for module in (
        "batches.mixing", "batches.samplers", "batches.train_batch", "batches.unreadable",
        "datasets.cifar_tfds", "images.affine", "images.augment", "images.autoaugment",
        "images.batch_ops", "images.blur", "images.decoding", "images.color_jitter",
        "images.packed_ops", "images.randaugment", "images.resize", "images.views", "pipeline",
        "randomness", "records.readers", "tracing",
    )
}  # fmt: skip

# Hides what the extra `balpoe-jax[tfds]` brings, and keeps who asked for it.
WITHOUT_THE_EXTRA = """
import sys

EXTRA = {"tensorflow", "tensorflow_datasets", "google_crc32c", "importlib_resources"}
asked = []

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRA:
            asked.append(name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""


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
            ["losses", "models", "metrics", "optim", "step", "parallel", "data.long_tail"],
            ["tensorflow", "ml_collections"],
        ),
        (["metrics", "data.long_tail"], ["jax", "tensorflow"]),
        (
            ["data.datasets", "data.datasets.test_distributions"],
            ["jax", "tensorflow", "tensorflow_datasets"],
        ),
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
        ("data/device", {"tensorflow", "tensorflow_datasets", "flax", "optax", "ml_collections"}),
        ("models", {"tensorflow", "ml_collections", "absl"}),
        ("metrics", {"jax", "tensorflow", "ml_collections", "absl"}),
    ],
)
def test_layers_name_only_what_they_may(folder: str, forbidden: set[str]) -> None:
    """By their text, since TensorFlow itself imports JAX where it can."""
    for path in (ROOT / "balpoe_jax" / folder).rglob("*.py"):
        if folder == "data" and "device" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not forbidden & {name.partition(".")[0] for name in names}, path
            own = [name for name in names if name.startswith("balpoe_jax.")]
            layer = folder.partition("/")[0]
            allowed = (f"balpoe_jax.{layer}", "balpoe_jax.errors")
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


def test_most_modules_neither_need_nor_import_tensorflow(tmp_path: Path) -> None:
    """Nor do the libraries that they import, nor what writes the curves."""
    assert set(MODULES) >= TENSORFLOW
    imports = "\n".join(f"import {name}" for name in set(MODULES) - TENSORFLOW)
    code = f"""
{WITHOUT_THE_EXTRA}
{imports}
from pathlib import Path
from balpoe_jax.run import events
file = events.EventFile(Path("curves"))
file.add(1, {{"loss": 0.5}})
file.close()
assert not asked, asked
"""
    run_python(code, tmp_path)
    (curves,) = (tmp_path / "curves").iterdir()
    assert b"loss" in curves.read_bytes()


def test_data_in_memory_load_without_the_extra(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "cifar-100-binary.tar.gz", members("cifar100"))
    (tmp_path / "records").write_bytes(bytes(16))
    code = f"""
{WITHOUT_THE_EXTRA}
from balpoe_jax.data import datasets
from balpoe_jax.data.records import tfrecords
from balpoe_jax.errors import UserError
print(len(datasets.load("digits", 26.0).train))
for place in ({str(path)!r}, {str(tmp_path)!r}):
    options = {{"check_counts": False, "check_archive": False}}
    print(len(datasets.load("cifar100", 5.0, place, **options).test))
for attempt in (
    lambda: datasets.load("cifar10", 5.0, {str(tmp_path)!r}),
    lambda: datasets.load("imagenet_lt", 1.0, image_size=8, resize=8),
    lambda: tfrecords.scan(["records"], "id"),
):
    try:
        attempt()
    except UserError as error:
        print(error)
assert not EXTRA & set(sys.modules)
"""
    *sizes, cifar, photos, records = run_python(code, tmp_path).splitlines()
    assert sizes == ["413", "200", "200"]
    remedy = 'not installed; pip install "balpoe-jax[tfds]".'
    assert photos == f"Reading imagenet_lt through TFDS needs TensorFlow, which is {remedy}"
    assert records == f"Reading TFRecord files needs google-crc32c, which is {remedy}"
    assert cifar.startswith("There is no cifar-10-binary.tar.gz and no cifar10.npz in ")
    assert cifar.endswith('or pip install "balpoe-jax[tfds]".')
