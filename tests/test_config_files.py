# SPDX-License-Identifier: Apache-2.0
"""What --config means: a file, one of the package's, or the short name of one."""

from pathlib import Path

import pytest

from balpoe_jax import config_files
from balpoe_jax.errors import UserError
from tests.helpers import commands

ROOT = Path(__file__).parents[1]
NAMES = ["cifar100_lt", "cifar10_lt", "digits_lt", "folder", "imagenet_lt", "inaturalist2018"]


def test_the_packages_configs_are_those_at_the_top_of_the_repository() -> None:
    assert config_files.folder() == ROOT / "configs"
    assert config_files.names() == NAMES


def test_an_installed_package_has_them_inside(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(config_files, "_PACKAGE", tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").touch()
    (tmp_path / "configs" / "mine.py").touch()
    assert config_files.folder() == tmp_path / "configs"
    assert config_files.names() == ["mine"]


@pytest.mark.parametrize("arguments", ["", ":ir=50", ":", ":a=b:c"])
@pytest.mark.parametrize("given", ["digits_lt", "configs/digits_lt.py", "./configs/digits_lt.py"])
def test_a_file_comes_before_the_packages(
    tmp_path: Path, monkeypatch, given: str, arguments: str
) -> None:
    monkeypatch.chdir(tmp_path)
    packaged = f"{ROOT}/configs/digits_lt.py{arguments}"
    assert config_files.locate(given + arguments) == packaged
    (tmp_path / "configs").mkdir()
    assert config_files.locate(given + arguments) == packaged
    (tmp_path / "configs" / "digits_lt.py").touch()
    own = given if "/" in given else "configs/digits_lt.py"
    assert config_files.locate(given + arguments) == own + arguments


def test_a_name_may_be_that_of_an_own_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config_files.locate("mine:x=1") == "mine:x=1"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.py").touch()
    assert config_files.locate("mine:x=1") == "configs/mine.py:x=1"


@pytest.mark.parametrize(
    "given",
    [
        "", ":", ":x=1", ".", "..", "nonsense", "digits_lt.py", "elsewhere/digits_lt.py",
        "configs/__init__.py", "__init__", "configs/../configs/nonsense.py", "/digits_lt", "\0",
        "/dev/null", "configs/digits_lt", "digits_lt/", "configs/configs/digits_lt.py",
    ],
)  # fmt: skip
def test_what_nobody_has_stays_as_it_is(tmp_path: Path, monkeypatch, given: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert config_files.locate(given) == given


def test_every_spelling_of_the_flag_is_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = f"{ROOT}/configs/digits_lt.py"
    given = [
        *("main", "--config=digits_lt:mixup=false", "-config=digits_lt", "--config", "digits_lt"),
        *("-config", "configs/digits_lt.py:experts=1", "digits_lt", "--config.seed=1"),
        *("--workdir=digits_lt", "--", "--config=digits_lt", "--config", "digits_lt"),
    ]
    assert config_files.locate_all(given) == [
        *("main", f"--config={file}:mixup=false", f"-config={file}", "--config", file),
        *("-config", f"{file}:experts=1", "digits_lt", "--config.seed=1"),
        *("--workdir=digits_lt", "--", "--config=digits_lt", "--config", "digits_lt"),
    ]
    assert config_files.locate_all(["--config"]) == ["--config"]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("nonsense", f"Error: There is no config 'nonsense'; choose from {', '.join(NAMES)}, or"),
        ("nonsense:experts=1", "Error: There is no config 'nonsense'; choose from cifar100_lt, "),
        ("configs/nonsense.py", "Error: The config file configs/nonsense.py cannot be read; "),
        ("digits_lt:speed=1", "Error: "),
    ],
)
def test_unknown_names_are_one_sentence(tmp_path: Path, given: str, expected: str) -> None:
    result = commands.run("balpoe_jax.main", f"--config={given}", f"--workdir={tmp_path}")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(expected)
    if "nonsense" in given:
        assert ", ".join(NAMES) in line


def test_a_config_is_loaded_by_name_or_by_path(tmp_path: Path) -> None:
    assert config_files.load("digits_lt:epochs=3").total_epochs == 3
    file = tmp_path / "mine.py"
    file.write_text("def get_config(arguments=None):\n    return arguments\n")
    assert config_files.load(f"{file}:a=b:c") == "a=b:c"
    assert config_files.load(str(file)) is None


def test_what_is_no_config_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no config file mine; .*digits_lt"):
        config_files.load("mine")
    file = tmp_path / "mine.py"
    file.touch()
    with pytest.raises(
        UserError, match=r"mine\.py is no config file: it does not define get_config"
    ):
        config_files.load(str(file))
