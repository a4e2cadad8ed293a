# SPDX-License-Identifier: Apache-2.0
"""The built wheel, installed where there is no checkout: it brings all that the commands need."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("balpoe_jax", "configs", "pyproject.toml", "README.md", "LICENSE")


def test_every_package_is_named() -> None:
    """Setuptools packs those alone, with `configs/` as one of them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    there = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "balpoe_jax").rglob("__init__.py")
    }
    assert project["packages"] == sorted({*there, "balpoe_jax.configs"})
    assert project["package-dir"] == {"balpoe_jax.configs": "configs"}
    folders = {path.parent for path in (ROOT / "balpoe_jax").rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in folders)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a new environment with the wheel; dependencies are those of this process.

    The wheel comes out of the source distribution, as that of a release does.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in BUILT_FROM:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    _build("sdist", source, folder)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    _build("wheel", unpacked, folder)
    (wheel,) = folder.glob("*.whl")

    environment = folder / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    install = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", str(wheel)]
    _run(python, *install, cwd=folder)
    (packages,) = environment.glob("lib/python*/site-packages")
    # After its own, and without what a .pth file in there would add, such as a checkout.
    dependencies = [path for path in sys.path if Path(path).name.endswith("-packages")]
    (packages / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    return python


def _build(kind: str, source: Path, target: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    _run(Path(sys.executable), "-W", "ignore", "-c", code, cwd=source)


def _run(python: Path, *arguments: str, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, *arguments],
        cwd=cwd,
        env={**environment, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.integration
@pytest.mark.slow
def test_the_demo_runs_outside_of_a_checkout(python: Path, tmp_path: Path) -> None:
    typed = ["--config=digits_lt:experts=1", "--config.total_epochs=1", "--workdir=run"]
    _run(python, "-m", "balpoe_jax.main", *typed, cwd=tmp_path)
    run = tmp_path / "run"
    assert json.loads((run / "results.json").read_text())["step"] > 0
    assert (run / "report" / "index.html").stat().st_size > 10_000
    recorded = json.loads((run / "config.json").read_text())["environment"]["command"]
    assert recorded[1:] == typed
    assert python.parents[1] in Path(recorded[0]).parents


@pytest.mark.integration
@pytest.mark.slow
def test_the_parts_of_the_library_need_no_tensorflow(python: Path, tmp_path: Path) -> None:
    code = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tensorflow", "tensorflow_datasets", "google_crc32c"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
import balpoe_jax.losses, balpoe_jax.configs.digits_lt
print(balpoe_jax.losses.__file__)
print(balpoe_jax.configs.digits_lt.get_config().model.num_experts)
"""
    where, experts = _run(python, "-c", code, cwd=tmp_path).split()
    assert python.parents[1] in Path(where).parents
    assert experts == "3"


@pytest.mark.integration
@pytest.mark.slow
def test_tables_of_the_paper_are_planned_outside_of_a_checkout(
    python: Path, tmp_path: Path
) -> None:
    printed = _run(python, "-m", "balpoe_jax.reproduce", "--table=2", "--mode=print", cwd=tmp_path)
    (file,) = {
        word.removeprefix("--config=").partition(":")[0]
        for word in printed.split()
        if word.startswith("--config=") and "cifar100" in word
    }
    assert python.parents[1] in Path(file).parents
    assert Path(file).is_file()
