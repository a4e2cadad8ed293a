# SPDX-License-Identifier: Apache-2.0
"""Nothing that is read is run: no pickles, no shells, and dependencies whose hashes are known."""

import ast
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.helpers import ROOT

SOURCES = [
    p for f in ("balpoe_jax", "configs", "launch", "benchmarks") for p in (ROOT / f).rglob("*.py")
]
# Modules that run, or can be made to run, what they read.
FORBIDDEN = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
# Calls that must say so themselves, whatever the library's default is.
SAFE = {"np.load": ("allow_pickle", False), "torch.load": ("weights_only", True)}
NEVER = {"eval", "exec", "os.system", "os.popen", "yaml.load", "np.fromfile"}


def findings(text: str) -> list[str]:
    """What in a source could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN:
            found.append(node.module or "")
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in NEVER or given.get("shell", "False") != "False":
                found.append(name)
            if name in SAFE and given.get(SAFE[name][0]) != str(SAFE[name][1]):
                found.append(name)
    return found


def test_nothing_that_is_read_is_run() -> None:
    assert len(SOURCES) > 60
    assert {
        str(path): findings(path.read_text()) for path in SOURCES if findings(path.read_text())
    } == {}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from pickle import load", "import joblib.x", "np.load(f)",
        "np.load(f, allow_pickle=True)", "torch.load(f)", "torch.load(f, weights_only=False)",
        "subprocess.run(c, shell=True)", "os.system(c)", "eval(x)",
    ],
)  # fmt: skip
def test_what_would_run_is_found(text: str) -> None:
    assert findings(text)


def pinned(name: str) -> dict[str, str]:
    """Versions by package, of a file of `NAME==VERSION` lines."""
    lines = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", (ROOT / name).read_text(), re.M)
    return {
        package.lower().replace("_", "-").replace(".", "-"): version for package, version in lines
    }


def locked(name: str) -> list[tuple[Requirement, list[str]]]:
    """Each requirement of a lock file with its hashes."""
    entries = (ROOT / name).read_text().replace("\\\n", " ").splitlines()
    return [
        (
            Requirement(entry.split("--hash")[0]),
            re.findall(r"--hash=sha256:([0-9a-f]{64})\b", entry),
        )
        for entry in entries
        if entry.strip()
    ]


@pytest.mark.parametrize("name", ["requirements", "requirements-dev", ".ci/audit"])
def test_a_lock_pins_and_hashes_everything(name: str) -> None:
    entries = locked(f"{name}.lock")
    for requirement, hashes in entries:
        assert hashes and requirement.url is None, requirement
        assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), requirement
    # Made after the last change of what it locks.
    specifiers: dict[str, list[SpecifierSet]] = {}
    for requirement, _ in entries:
        specifiers.setdefault(requirement.name.lower(), []).append(requirement.specifier)
    for package, version in pinned(f"{name}.txt").items():
        assert [str(found) for found in specifiers[package]] == [f"=={version}"], package


def test_the_locks_agree() -> None:
    own = {str(requirement) for requirement, _ in locked("requirements.lock")}
    assert len(own) > 60
    assert own <= {str(requirement) for requirement, _ in locked("requirements-dev.lock")}


def test_what_is_pinned_is_what_the_package_asks_for() -> None:
    """Whoever installs the package itself gets at least versions that are tested."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"].values()
    asked = [Requirement(each) for part in (project["dependencies"], *optional) for each in part]
    pins = pinned("requirements.txt") | pinned("requirements-dev.txt")
    for requirement in asked:
        name = requirement.name.lower().replace("_", "-")
        assert name not in pins or requirement.specifier.contains(pins[name]), requirement
    for name in pins:
        assert name in {r.name.lower().replace("_", "-") for r in asked}, name
