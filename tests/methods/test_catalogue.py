# SPDX-License-Identifier: Apache-2.0
"""Methods are found by their files, the catalogue is theirs, a new one begins with a template."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from balpoe_jax import methods
from balpoe_jax.errors import UserError
from balpoe_jax.methods import MODULES, PRESETS, Preset, catalogue, scaffold
from balpoe_jax.methods.__main__ import main, write_catalogue, write_new
from balpoe_jax.methods.balpoe import BalPoE
from balpoe_jax.methods.sade import Sade
from tests.helpers import ROOT

pytestmark = pytest.mark.integration

FOLDER = ROOT / "balpoe_jax" / "methods"
HINT = "write it again with python -m balpoe_jax.methods catalogue"


def test_every_file_with_presets_is_a_method() -> None:
    """By their text; BalPoE's first, for the others are compared with it."""
    files = [
        path.stem
        for path in FOLDER.glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PRESETS"
    ]
    found = [module.__name__.rpartition(".")[2] for module in MODULES]
    assert found == sorted(files, key=lambda name: (name != "balpoe", name))
    assert list(PRESETS) == [name for module in MODULES for name in module.PRESETS]


def test_two_files_with_one_name_are_refused() -> None:
    first = SimpleNamespace(__name__="a", PRESETS={"one": Preset(BalPoE(), "one")})
    again = SimpleNamespace(__name__="b", PRESETS={"one": Preset(Sade(), "another one")})
    with pytest.raises(UserError, match="that no other method has, got 'one' and Sade in b; ren"):
        methods._collect([first, again])
    other = type("BALPOE", (Sade,), {})
    again.PRESETS = {"two": Preset(other(), "another class of that name")}
    with pytest.raises(UserError, match="got 'two' and BALPOE in b"):
        methods._collect([first, again])


def test_importing_the_methods_reads_their_folder_and_their_code_alone(tmp_path: Path) -> None:
    code = f"""
import sys, os
sys.path.insert(0, {str(ROOT)!r})
import flax.linen, jax, optax
seen = []
def watch(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str):
        seen.append((event, arguments[0]))
sys.addaudithook(watch)
import balpoe_jax.methods

for event, path in seen:
    print(event, path)
"""
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    ours = [line.split() for line in out.splitlines() if str(ROOT) in line]
    opened = {Path(path) for event, path in ours if event == "open"}
    assert {path.suffix for path in opened} <= {".py", ".pyc"} and len(opened) > 10
    listed = [path for event, path in ours if event != "open"]
    # By Python's own finder and by pkgutil.
    assert listed.count(str(FOLDER)) <= 2


def test_the_catalogue_is_that_of_the_files() -> None:
    assert (ROOT / catalogue.PAGE).read_text() == catalogue.page(MODULES), HINT
    readme = (ROOT / catalogue.README).read_text()
    assert catalogue.table(MODULES) in readme, HINT


def test_the_catalogue_has_every_preset_and_figure() -> None:
    page = catalogue.page(MODULES)
    for name, preset in PRESETS.items():
        (row,) = re.findall(rf"^\| `{name}` \|.*$", page, flags=re.MULTILINE)
        assert preset.about in row
        for published in preset.published:
            assert f": {published.accuracy:g}" in row and f"({published.source}" in row
            assert published.network in row
    assert "CIFAR-100-LT `ir=100`: 52, ECE 4.9 (BalPoE's Table 2)" in page
    assert "44.07 (logit adjustment's repository; network: not ours, a bottleneck ResNet" in page


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_a_file_says_in_its_first_sentence_where_it_comes_from(module) -> None:
    assert re.search(r"\([^)]+\)", catalogue.summary(module)), module.__doc__


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what `new` and `catalogue` work on."""
    for folder in ("balpoe_jax", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "tests").mkdir()
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, tmp_path)
    return tmp_path


@pytest.mark.slow_cases("ab", "methodoftwentyfourletter")
@pytest.mark.parametrize("name", ["ab", "a_b", "methodoftwentyfourletter"])
def test_a_new_method_passes_the_checks(checkout: Path, name: str) -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    write_new(checkout, name)
    files = (f"balpoe_jax/methods/{name}.py", f"tests/methods/test_{name}.py")
    run("ruff", "check", "--no-cache", *files)
    run("ruff", "format", "--no-cache", "--check", *files)
    if name == "a_b":
        # Whose classes of ours it takes for granted; `make check` looks at all.
        run("mypy", "--follow-imports=skip", "--cache-dir=/dev/null", files[0])
        run("pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", files[1])
        run("balpoe_jax.methods", "catalogue")
        assert f"| `{name}` | a method of ours | - |" in (checkout / catalogue.PAGE).read_text()
        assert f"| `{name}` | AB: say in one" in (checkout / catalogue.README).read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Expected what to write, got nothing; call python -m balpoe_jax.methods cat"),
        (["new"], "Expected what to write, got new; call"),
        (["catalogue", "x"], "Expected what to write, got catalogue x; call"),
        (["new", "My-Method"], "that begins with a letter and is no word of Python, got 'My-Meth"),
        (["new", "class"], "no word of Python, got 'class'; choose such a name"),
        (["new", "1st"], "got '1st'"),
        (["new", "../x"], "got '../x'"),
        (["new", "x" * 25], "Expected a name of at most 24 lower-case letters"),
        (["new", "sade"], r"got 'sade', which balpoe_jax/methods/sade.py has already; choose an"),
        (["new", "ldam"], "got 'ldam', which a preset or a class has already"),
        (["new", "post_hoc"], "got 'post_hoc', which a preset or a class has already"),
        (["new", "contrast"], "which tests/methods/test_contrast.py has already"),
    ],
)
def test_what_is_refused(arguments: list[str], message: str) -> None:
    before = sorted(path.name for path in FOLDER.iterdir())
    with pytest.raises(UserError, match=message):
        main(["methods", *arguments])
    assert sorted(path.name for path in FOLDER.iterdir()) == before


def test_a_refusal_is_one_sentence_and_exit_code_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "balpoe_jax.methods", "new", "sade"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1


def test_a_package_outside_of_a_checkout_is_left_alone(tmp_path: Path) -> None:
    for write in (write_catalogue, lambda root: write_new(root, "ab")):
        with pytest.raises(UserError, match="Expected a checkout of the project around the packag"):
            write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_names_of_classes() -> None:
    assert [scaffold.class_name(name) for name in ("ab", "my_method", "x2_y")] == [
        "Ab",
        "MyMethod",
        "X2Y",
    ]
