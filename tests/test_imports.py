# SPDX-License-Identifier: Apache-2.0
"""Importing the package does nothing, the library parts stay light, and the import rule holds."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.helpers.cifar_files import members, write_archive

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

EXTRA = {"tensorflow", "tensorflow_datasets", "google_crc32c", "array_record",
    "importlib_resources"}
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


@pytest.mark.integration
@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (
            ["losses", "models", "metrics", "optim", "step", "parallel", "data.long_tail"],
            ["tensorflow", "ml_collections"],
        ),
        (["errors", "files", "metrics", "data.long_tail"], ["jax", "tensorflow"]),
        (["cli", "run.preemption"], ["jax", "tensorflow"]),
        # Not the tables of several runs, which ask the config for the defaults of older ones.
        (["reporting.report", "reporting.html", "reporting.figures"], ["jax", "tensorflow"]),
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


# Who may import whom, by top module or package: what stands further up, and itself.
RULE = (
    ("errors",),
    # Trees as vectors are of use to both the optimizer and the step.
    ("one_vector", "progress_bar", "renames", "config_files"),
    # A setting checks itself, and says so by an error.
    ("setting",),
    (
        "files",
        "cli",
        "flops",
        "losses",
        "averages",
        "optim",
        "parallel",
        "metrics",
        "models",
        "data",
    ),
    ("methods", "evaluation"),
    ("config", "step"),
    ("run",),
    ("experiment", "reporting"),
    ("progress", "evaluate", "predictor"),
    (
        "train",
        "compare",
        "report",
        "reproduce",
        "aot",
        "torch_import",
        "predict",
        "calibrate",
        "export",
        "sklearn",
    ),
    ("main",),
)

# The same within `data`.
RULE_OF_DATA = (
    ("extras", "cache", "long_tail", "magnitudes", "randomness", "settings", "tracing", "types"),
    ("records", "device"),
    ("images",),
    ("batches",),
    ("datasets",),
    ("pipeline",),
)

# What the rule allows in spite of that, with the reason.
EXEMPT: dict[tuple[str, str], str] = {}

_JAX = ("jax", "jaxlib", "flax", "optax", "orbax", "chex")
_TENSORFLOW = ("tensorflow", "tensorflow_datasets")
_COMMANDS = ("absl", "ml_collections")

# Libraries that a module or package must not name, and whether it may inside a function.
WALLS: tuple[tuple[tuple[str, ...], tuple[str, ...], bool], ...] = (
    (
        ("flops", "losses", "averages", "optim", "parallel", "one_vector"),
        (*_TENSORFLOW, *_COMMANDS),
        False,
    ),
    (("models", "methods", "step"), (*_TENSORFLOW, *_COMMANDS), False),
    (("errors", "files", "metrics", "reporting"), (*_JAX, *_TENSORFLOW, *_COMMANDS), False),
    (("data",), (*_JAX, *_COMMANDS), False),
    (("data.device",), (*_TENSORFLOW, "flax", "optax", "orbax", *_COMMANDS), False),
    (("data.long_tail", "data.datasets.test_distributions"), (*_JAX, *_TENSORFLOW), False),
    (("config", "evaluation", "run", "reproduce", "aot", "torch_import"), _TENSORFLOW, False),
    # A command starts at once: what these need of JAX they import once the flags are read.
    (("cli", "run.preemption"), (*_JAX, *_TENSORFLOW), True),
)

# What the walls are not for: the part of a package that has a wall of its own.
APART = {"data": ("data.device",)}

COMMANDS = ("main", "compare", "report", "predict", "aot.__main__", "reproduce.__main__")
COMMANDS += ("torch_import.__main__", "methods.__main__")


def violations(root: Path) -> list[str]:
    """The imports below `root/balpoe_jax` that break the rule or a wall, each in a sentence."""
    found = []
    for path in sorted((root / "balpoe_jax").rglob("*.py")):
        parts = path.relative_to(root / "balpoe_jax").with_suffix("").parts
        module = ".".join(parts).removesuffix("__init__").rstrip(".")
        if not module:
            continue
        for name, inside in imported(path):
            own = name.removeprefix("balpoe_jax").lstrip(".")
            if name.startswith("."):
                found.append(f"{module} imports {name} relatively")
            elif name.partition(".")[0] == "balpoe_jax":
                found += _broken_rules(module, own)
            else:
                found += _broken_walls(module, name.partition(".")[0], inside)
    return found


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """Dotted names that a file imports, wherever it does, and whether inside a function."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                start = "." * child.level + (child.module or "")
                yield from ((f"{start}.{alias.name}", inside) for alias in child.names)
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                yield from walk(child, inside or function)

    return walk(ast.parse(path.read_text()), False)


def _broken_rules(module: str, other: str) -> Iterator[str]:
    if not other or other.startswith("__version__"):
        return
    tops = module.partition(".")[0], other.partition(".")[0]
    if tops[0] == tops[1] == "data":
        pairs = [(module.split(".")[1], other.split(".")[1], RULE_OF_DATA)] if "." in module else []
    else:
        pairs = [(*tops, RULE)]
    for here, there, rule in pairs:
        levels = [_level(name, rule) for name in (here, there)]
        if None in levels:
            yield f"{module} imports {other}, and the rule does not say where both stand"
        elif here != there and levels[1] >= levels[0] and (module, other) not in EXEMPT:
            yield f"{module} imports {other}, which does not stand to its left"
    if any(_within(other, command) for command in COMMANDS):
        yield f"{module} imports {other}, which is a command"


def _broken_walls(module: str, library: str, inside: bool) -> Iterator[str]:
    for modules, forbidden, inside_too in WALLS:
        if library not in forbidden or (inside and inside_too):
            continue
        for one in modules:
            apart = any(_within(module, other) for other in APART.get(one, ()))
            if _within(module, one) and not apart:
                yield f"{module} imports {library}"


def _level(name: str, rule: tuple[tuple[str, ...], ...]) -> int | None:
    return next((i for i, names in enumerate(rule) if name in names), None)


def _within(module: str, other: str) -> bool:
    return module == other or module.startswith(f"{other}.")


def test_the_import_rule_holds() -> None:
    """By the text of all files: imports inside functions and for types count."""
    assert violations(ROOT) == []


def test_the_rule_names_all_that_there_is_and_nothing_else() -> None:
    for rule, folder in ((RULE, ROOT / "balpoe_jax"), (RULE_OF_DATA, ROOT / "balpoe_jax" / "data")):
        there = {
            path.stem
            for path in folder.iterdir()
            if path.suffix == ".py" or (path / "__init__.py").exists()
        }
        assert {name for names in rule for name in names} == there - {"__init__"}


def test_the_page_says_the_same_rule_and_names_files_that_are_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    for rule in (RULE, RULE_OF_DATA):
        assert "\n  < ".join(", ".join(names) for names in rule) in page
    described = page.partition("## The packages")[2].partition("## The way")[0]
    for name in (name for names in RULE for name in names):
        assert f"`{name}`" in described
    answers = page.partition("## I look for")[2]
    paths = re.findall(r"`(balpoe_jax/[^`]+)`", answers)
    assert len(answers.splitlines()) > 12 and paths
    assert all((ROOT / path).is_file() for path in paths), paths


@pytest.mark.parametrize(
    ("file", "line", "sentence"),
    [
        ("losses.py", "from balpoe_jax.methods import Method", "does not stand to its left"),
        ("metrics/one.py", "import balpoe_jax.models.heads", "does not stand to its left"),
        ("run/lock.py", "def f():\n    from balpoe_jax import train", "does not stand to its left"),
        ("run/lock.py", "if TYPE_CHECKING:\n    from balpoe_jax.experiment import build", "left"),
        ("evaluate.py", "from balpoe_jax.progress import Progress", "does not stand to its left"),
        ("run/lock.py", "from balpoe_jax import stray", "the rule does not say where both stand"),
        ("main.py", "import balpoe_jax.aot.__main__ as command", "which is a command"),
        ("data/records/one.py", "from balpoe_jax.data.batches import mixing", "to its left"),
        ("data/pipeline.py", "import jax.numpy as jnp", "data.pipeline imports jax"),
        ("data/device/one.py", "def f():\n    import tensorflow", "imports tensorflow"),
        ("models/heads.py", "def f():\n    import tensorflow as tf", "imports tensorflow"),
        ("reporting/html.py", "import jax", "reporting.html imports jax"),
        ("cli.py", "import jax", "cli imports jax"),
        ("run/lock.py", "from . import record", "run.lock imports ..record relatively"),
    ],
)
def test_a_violation_is_found(tmp_path: Path, file: str, line: str, sentence: str) -> None:
    path = tmp_path / "balpoe_jax" / file
    path.parent.mkdir(parents=True)
    allowed = "import os\nimport numpy as np\nfrom balpoe_jax import errors\n"
    path.write_text(allowed)
    assert violations(tmp_path) == []
    path.write_text(f"{allowed}{line}\n")
    (found,) = violations(tmp_path)
    assert sentence in found


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("data/device/one.py", "import jax"),
        ("cli.py", "def f():\n    import jax"),
        ("data/pipeline.py", "import tensorflow as tf\nfrom balpoe_jax.data.images import views"),
        ("run/environment.py", "import balpoe_jax"),
    ],
)
def test_what_is_allowed_is_not_found(tmp_path: Path, file: str, line: str) -> None:
    path = tmp_path / "balpoe_jax" / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert violations(tmp_path) == []


@pytest.mark.integration
def test_the_package_has_its_light_parts_as_attributes(tmp_path: Path) -> None:
    """None is imported before it is asked for, and none brings TensorFlow."""
    code = f"""
{WITHOUT_THE_EXTRA}
import balpoe_jax
assert not {{"jax", "numpy", "balpoe_jax.losses"}} & set(sys.modules)
assert {{"losses", "metrics", "models"}} <= set(dir(balpoe_jax))
print(balpoe_jax.metrics.shot_accuracy.__name__)
assert "jax" not in sys.modules
print(balpoe_jax.losses.balpoe_loss.__name__, balpoe_jax.models.create_model.__name__)
assert not asked, asked
try:
    balpoe_jax.nothing
except AttributeError as error:
    print(error)
"""
    assert run_python(code, tmp_path).splitlines() == [
        "shot_accuracy",
        "balpoe_loss create_model",
        "module 'balpoe_jax' has no attribute 'nothing'",
    ]


@pytest.mark.integration
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


@pytest.mark.integration
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
    options = {{"verify_counts": False, "check_archive": False}}
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


def test_test_modules_do_not_import_each_other() -> None:
    """What they share is in `tests.helpers`; no folder of tests but these is not the package's."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        names = [name for name, _ in imported(path)]
        modules = [
            name for name in names if re.match(r"(tests\.(?!helpers|tools)|test_|conftest)", name)
        ]
        assert modules == [], path
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    there = {str(folder.relative_to(ROOT / "tests")) for folder in folders}
    ours = {name for name in there if not (ROOT / "balpoe_jax" / name).is_dir()}
    assert ours <= {"benchmarks", "tools"}
