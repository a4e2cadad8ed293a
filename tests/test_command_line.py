# SPDX-License-Identifier: Apache-2.0
"""Bad input on the command line: one sentence, exit code 2, no traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from balpoe_jax import cli
from balpoe_jax.cli import use_compilation_cache
from balpoe_jax.errors import UserError
from tests.helpers import ROOT
from tests.helpers.commands import run_main

pytestmark = pytest.mark.integration


def test_a_command_starts_from_nothing() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "balpoe_jax.main", "--mode=fly"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1


def test_libraries_are_quiet_unless_they_are_told_otherwise(monkeypatch) -> None:
    monkeypatch.setattr(cli, "_log_to_terminal", lambda: None)
    monkeypatch.setattr(os, "environ", {"TF_CPP_MIN_LOG_LEVEL": "0"})

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        cli.run(stop, print)
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0"
    assert os.environ["GRPC_VERBOSITY"] == "ERROR"


@pytest.mark.slow_cases("arguments19-tfds build cifar10 --data_dir=")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config=configs/digits_lt.py"], "--workdir must have a value"),
        (["--workdir={dir}"], "--config must have a value"),
        (["--nonsense=1"], "Unknown command line flag 'nonsense'"),
        (["--mode=fly"], "<train|eval>"),
        (["--config=configs/absent.py", "--workdir={dir}"], "configs/absent.py cannot be read"),
        (
            ["--config=configs/digits_lt.py:speed=1", "--workdir={dir}"],
            "method, recipe, mixup, experts, epochs",
        ),
        (["--config=configs/cifar100_lt.py:ir=20", "--workdir={dir}"], "one of 100, 50, 10"),
        (
            ["--config=configs/digits_lt.py", "--config.data.nme=x", "--workdir={dir}"],
            "Unknown config field config.data.nme; config.data has check_archive, chosen, class_n",
        ),
        (
            ["--config=configs/digits_lt.py", "--config.seed=one", "--workdir={dir}"],
            "--config.seed=one",
        ),
        (["--config=configs/digits_lt.py", "--workdir={dir}", "more"], "Unexpected argument"),
        (["--config=configs/digits_lt.py", "--workdir="], "must name a local folder"),
        (
            ["--config=configs/digits_lt.py", "--config.model=resnet8", "--workdir={dir}"],
            "config.model is a section of the config; set one of its fields: classifier",
        ),
        (
            ["--config=configs/digits_lt.py", "--config.loss.taus=(0,1,2,3)", "--workdir={dir}"],
            "one value for each of the 3 experts",
        ),
        (
            ["--config=configs/digits_lt.py", "--mode=eval", "--workdir={dir}/none"],
            "holds no run",
        ),
        (["--config=configs/digits_lt.py", "--workdir={dir}/file"], "cannot be written to"),
        (
            ["--config=configs/digits_lt.py", "--workdir={dir}", "--process_id=1"],
            "give all three, or none",
        ),
        (
            [
                *("--config=configs/digits_lt.py", "--workdir={dir}", "--process_id=1"),
                *("--num_processes=2", "--coordinator_address=localhost:1"),
            ],
            "need --distributed",
        ),
        (
            [
                *("--config=configs/digits_lt.py", "--workdir={dir}", "--process_id=2"),
                *("--num_processes=2", "--coordinator_address=localhost:1", "--distributed"),
            ],
            "--process_id must be below --num_processes, got 2 of 2",
        ),
        (
            ["--config=configs/digits_lt.py", "--workdir={dir}", "--distributed"],
            "name --coordinator_address, --num_processes and --process_id",
        ),
        (
            [
                "--config=configs/cifar10_lt.py",
                "--config.data.data_dir={dir}",
                "--workdir={dir}/run",
            ],
            "tfds build cifar10 --data_dir=",
        ),
    ],
)
def test_refuses_with_one_sentence(tmp_path: Path, arguments: list[str], expected: str) -> None:
    (tmp_path / "file").write_text("a file where a folder is asked for")
    result = run_main(*(argument.format(dir=tmp_path) for argument in arguments))
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    assert expected in lines[0]
    assert "Traceback" not in result.stdout


def test_an_interruption_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    # A process that was started in the background ignores interruptions unless told otherwise. The
    # tiny network compiles in a second.
    code = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from tests.helpers import tiny_network; from balpoe_jax.experiment import build; "
        "build.create_model = tiny_network.create_model; "
        "runpy.run_module('balpoe_jax.main', run_name='__main__', alter_sys=True)"
    )
    options = ["--config.checkpoint.every_epochs=1", "--config.log_every_steps=5"]
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", code, "--config=configs/digits_lt.py:experts=1"),
            *(*options, f"--workdir={tmp_path}"),
        ],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while "step 15/" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    step = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert step >= 15
    assert errors == f"Interrupted: step {step} is saved; start again to go on from there.\n"
    assert f'"step": {step}' in (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
    assert not (tmp_path / "run.lock").exists()


def test_compiled_programs_are_kept_for_the_next_start(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "cache"
    code = f"""
from balpoe_jax.cli import use_compilation_cache
use_compilation_cache({str(folder)!r})
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x + 1)(1.0)
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=60)
    assert any(path.name.startswith("jit__lambda") for path in folder.iterdir())


def test_a_cache_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"cache .*/file/cache cannot be written to; .*compilation_cache_dir"
    ):
        use_compilation_cache(str(tmp_path / "file" / "cache"))


@pytest.mark.slow
def test_a_preemption_saves_the_step_it_comes_at(tmp_path: Path) -> None:
    workdir, temporary = tmp_path / "run", tmp_path / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-m", "balpoe_jax.main", "--config=configs/digits_lt.py:experts=1"]
    options = ["--config.checkpoint.every_epochs=100", "--config.log_every_steps=1"]
    process = subprocess.Popen(
        [*command, *options, f"--workdir={workdir}"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while "step 5/" not in process.stdout.readline():
        assert process.poll() is None
    # Where AutoGraph would have put source that it rewrites, which takes seconds.
    rewritten = list(temporary.glob("__autograph*"))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert not rewritten
    (checkpoint,) = (workdir / "checkpoints").iterdir()
    assert int(checkpoint.name) >= 5
    assert (
        errors == f"Preempted: step {checkpoint.name} is saved; start again to go on from there.\n"
    )
    rows = (workdir / "metrics.jsonl").read_text().splitlines()
    assert f'"step": {checkpoint.name},' in rows[-1]


def test_programs_are_kept_in_the_users_folder_unless_jax_has_one(tmp_path: Path) -> None:
    code = """
from balpoe_jax.cli import use_compilation_cache
import jax

use_compilation_cache("")
print(jax.config.jax_compilation_cache_dir)
use_compilation_cache(None)
print(jax.config.jax_compilation_cache_dir)
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}

    def folders() -> list[str]:
        result = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment,
            check=True,
            timeout=60,
            capture_output=True,
            text=True,
        )
        return result.stdout.split()

    set_by_conftest = environment["JAX_COMPILATION_CACHE_DIR"]
    assert folders() == [set_by_conftest] * 2
    assert not any(tmp_path.iterdir())
    del environment["JAX_COMPILATION_CACHE_DIR"]
    none, chosen = folders()
    assert none == "None"
    assert Path(chosen).parent == tmp_path / "balpoe_jax" / "xla"
    assert Path(chosen).stat().st_mode & 0o777 == 0o700
