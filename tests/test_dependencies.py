# SPDX-License-Identifier: Apache-2.0
"""What is imported is declared and public, and what is declared is used."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SOURCES = [*sorted((ROOT / "balpoe_jax").rglob("*.py")), *sorted((ROOT / "configs").rglob("*.py"))]

# The distribution of what is imported, where its name is another.
DISTRIBUTIONS = {
    "absl": "absl-py",
    "PIL": "pillow",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
    "tensorflow": "tensorflow-cpu",
}
# Imported as a part of another: JAX names the one version of jaxlib that it runs with, and Jinja2
# takes its `Markup` from there.
PARTS = {"jaxlib": "jax", "markupsafe": "jinja2"}
# What others import and do not declare, by who does; `test_what_others_do_not_declare...`.
UNDECLARED = {"importlib_resources": "tensorflow_datasets"}
# Extras of tools and of plugins, which nothing imports by name.
NOT_IMPORTED = ("dev", "benchmark", "aot", "aot-gpu")

# The one private import, by its file.
PRIVATE = {"balpoe_jax/run/key_value_store.py": ["jax._src.distributed"]}


def imported(text: str) -> Iterator[str]:
    """Dotted names that a source imports, wherever it does."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def libraries(text: str) -> set[str]:
    tops = {name.partition(".")[0] for name in imported(text)}
    return tops - sys.stdlib_module_names - {"balpoe_jax", "__future__"}


def dotted(node: ast.expr) -> str:
    """The name of an attribute of a name; empty where it is one of something else."""
    if isinstance(node, ast.Attribute):
        start = dotted(node.value)
        return f"{start}.{node.attr}" if start else ""
    return node.id if isinstance(node, ast.Name) else ""


def private_names(text: str) -> list[str]:
    """Private modules and attributes of other packages that a source names."""
    tree = ast.parse(text)
    found = [name for name in imported(text) if not name.startswith("balpoe_jax.")]
    modules = {
        alias.asname or alias.name.partition(".")[0]: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        and (isinstance(node, ast.Import) or not (node.module or "").startswith("balpoe_jax"))
        for alias in node.names
        if isinstance(node, ast.Import) or node.module not in sys.stdlib_module_names
    }
    theirs = {
        name
        for name, module in modules.items()
        if module.partition(".")[0] not in sys.stdlib_module_names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = dotted(node)
            found += [name] if name.partition(".")[0] in theirs else []
        # Such as the argument of `importlib.import_module`.
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += [node.value] if re.fullmatch(r"\w+(\.\w+)*\._\w+(\.\w+)*", node.value) else []
    found = [name for name in found if name.partition(".")[0] not in sys.stdlib_module_names]
    return sorted({name for name in found if re.search(r"(^|\.)_(?!_)", name)})


@pytest.mark.integration
def test_nothing_private_of_another_library_is_used() -> None:
    found = {
        str(path.relative_to(ROOT)): names
        for path in SOURCES
        if (names := private_names(path.read_text()))
    }
    assert found == PRIVATE


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from jax._src import core", ["jax._src.core"]),
        ("import jax._src.core", ["jax._src.core"]),
        ("import orbax.checkpoint as ocp\nocp._src.path", ["ocp._src", "ocp._src.path"]),
        ("from orbax.checkpoint.path import _private", ["orbax.checkpoint.path._private"]),
        ("def f():\n    from a._b import c", ["a._b.c"]),
        ("import importlib\nimportlib.import_module('jax._src.core')", ["jax._src.core"]),
        ("import numpy as np\nnp._core", ["np._core"]),
        ("import numpy as np\nnp.__version__", []),
        ("from balpoe_jax.run import lock\nlock._alive\nself._jax.x", []),
        ("from __future__ import annotations", []),
    ],
)
def test_private_names_are_found(text: str, expected: list[str]) -> None:
    assert private_names(text) == expected


def test_jax_has_no_public_key_value_store_yet() -> None:
    """When this fails, JAX has grown: see whether the private import can go."""
    public = {name for name in vars(jax.distributed) if not name.startswith("_")}
    assert public == {"initialize", "is_initialized", "shutdown"}, (
        f"jax.distributed has {sorted(public)}: if one of them is a key-value store, take it in "
        "balpoe_jax/run/key_value_store.py in place of jax._src.distributed"
    )


def declared() -> dict[str, set[str]]:
    """Names of distributions by extra; of those that are always needed under ""."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = {"": project["dependencies"], **project["optional-dependencies"]}
    return {
        extra: {canonicalize_name(Requirement(line).name) for line in lines}
        for extra, lines in lists.items()
    }


def needed() -> set[str]:
    tops = set().union(*(libraries(path.read_text()) for path in SOURCES)) - PARTS.keys()
    return {canonicalize_name(DISTRIBUTIONS.get(top, top)) for top in tops}


def test_all_that_is_imported_is_declared() -> None:
    named = set().union(*(names for extra, names in declared().items() if extra != "dev"))
    assert needed() - named == set()


def test_all_that_is_declared_is_imported() -> None:
    named = set().union(
        *(names for extra, names in declared().items() if extra not in NOT_IMPORTED)
    )
    assert named - needed() == {canonicalize_name(name) for name in UNDECLARED}


def test_what_is_pinned_is_what_is_declared() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    names = {canonicalize_name(each.name) for each in pinned}
    assert names == declared()[""] | declared()["tfds"]
    for each in pinned:
        assert re.fullmatch(r"==[\w.]+", str(each.specifier)), each
    locked = (ROOT / "requirements.lock").read_text()
    for each in pinned:
        name = canonicalize_name(each.name)
        assert re.search(rf"^{name}(\[\w+\])?{each.specifier} ", locked, re.MULTILINE), each


def test_what_others_do_not_declare_they_still_import() -> None:
    """When this fails, the declaration in pyproject.toml has lost its reason."""
    for name, importer in UNDECLARED.items():
        pytest.importorskip(importer)
        (distribution,) = set(importlib.metadata.packages_distributions()[importer])
        files = importlib.metadata.files(distribution) or []
        sources = (file.locate() for file in files if file.suffix == ".py")
        assert any(f"import {name}" in Path(source).read_text() for source in sources)
        required = importlib.metadata.requires(distribution) or []
        assert not any(
            canonicalize_name(each.name) == canonicalize_name(name)
            and (not each.marker or each.marker.evaluate({"extra": ""}))
            for each in map(Requirement, required)
        )
