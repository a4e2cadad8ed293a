# SPDX-License-Identifier: Apache-2.0
"""The launch scripts: what they would do, that they do it, and that no value meets a shell."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import ROOT
from tests.helpers.fuzzing import fuzzed

pytestmark = pytest.mark.integration

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(
    {
        *LAUNCH.rglob("*.sh"),
        *LAUNCH.rglob("*.sbatch"),
        *(ROOT / ".ci" / name for name in ("run", "audit")),
    }
)
# What a shell, YAML or Kubernetes would each read in its own way.
FLAGS = [
    "--config=configs/digits_lt.py:method=balpoe,mixup=true",
    "--workdir=/runs/a b",
    "--config.loss.taus=(0.0,0.5,2.5)",
    '--config.note=it\'s $(touch hacked) `touch hacked` "x" & $HOME; $$ {a: 1}, [2] # * é 🙂',
]
TPU_POD = ["tpu_pod.sh", "--name=pod", "--zone=us-east5-b"]
GKE = ["gke/submit.sh", "--name=run", "--image=r.io/i:1", "--hosts=4", "--claim=runs"]
GKE_TPU = [*GKE, "--tpu=tpu-v5-lite-podslice", "--topology=4x4", "--chips=4"]
GKE_GPU = [*GKE, "--gpu=nvidia-h100-80gb", "--gpus=8"]


def run(command: list[str], folder: Path | None = None, **environment: str):
    """A script of launch/; programs in `folder` go before those that are installed."""
    path = f"{folder}:{os.environ['PATH']}" if folder else os.environ["PATH"]
    return subprocess.run(
        ["bash", str(LAUNCH / command[0]), *command[1:]],
        cwd=ROOT,
        env={**os.environ, "PATH": path, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def stand_in(folder: Path, name: str, code: int = 0) -> Path:
    """A program that takes down its arguments and its input; returns where the arguments are."""
    program, arguments = folder / name, folder / f"{name}.arguments"
    body = f'#!/bin/sh\nfor a; do printf "%s\\0" "$a"; done >> {arguments}\n'
    program.write_text(f"{body}[ -t 0 ] || cat > {arguments}.input\nexit {code}\n")
    program.chmod(0o755)
    return arguments


def taken(arguments: Path) -> list[str]:
    return arguments.read_text().split("\0")[:-1]


def words(line: str) -> list[str]:
    """How a shell reads a line."""
    result = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True
    )
    return result.stdout.decode().split("\0")[:-1]


def test_shellcheck_finds_nothing() -> None:
    assert len(SCRIPTS) == 7
    program = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    result = subprocess.run([program, *map(str, SCRIPTS)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_local(tmp_path: Path) -> None:
    python = stand_in(tmp_path, "python")
    printed = run(["local.sh", "--dry-run", *FLAGS], PYTHON="my python").stdout.splitlines()
    assert words(printed[0]) == ["cd", str(ROOT)]
    expected = ["-u", "-m", "balpoe_jax.main", *FLAGS]
    assert words(printed[1]) == ["my python", *expected]
    result = run(["local.sh", *FLAGS], PYTHON=str(tmp_path / "python"))
    assert (result.returncode, result.stderr) == (0, "")
    assert taken(python) == expected


def test_tpu_pod(tmp_path: Path) -> None:
    gcloud = stand_in(tmp_path, "gcloud")
    command = [*TPU_POD, "--project=p", "--directory=my code", "--", *FLAGS]
    printed = run([*command[:1], "--dry-run", *command[1:]]).stdout
    assert run(command, tmp_path).returncode == 0
    assert words(printed) == ["gcloud", *taken(gcloud)]
    *common, remote = taken(gcloud)
    where = ["pod", "--zone=us-east5-b", "--project=p", "--worker=all"]
    assert common == ["compute", "tpus", "tpu-vm", "ssh", *where]
    cd, started = remote.removeprefix("--command=").split(" && ", 1)
    assert words(cd) == ["cd", "my code"]
    main = [".venv/bin/python", "-u", "-m", "balpoe_jax.main", "--distributed"]
    assert words(started) == [*main, *FLAGS]


# What a shell, its quotes, YAML and Kubernetes could take for something else than text.
HOSTILE = st.lists(
    st.one_of(
        st.sampled_from("'\"`$;&|\\ \t\r\n!*~#%\x1b\x7f\x85\u2028é🙂"),
        st.sampled_from(["$(touch hacked)", "`touch hacked`", ";touch hacked;", "$HOME", "${IFS}"]),
        st.sampled_from(["$$(X)", "{a: 1}", "- b", "---", "\\u0041", "\\x41"]),
        st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    ),
    max_size=8,
).map("".join)
HOSTILE_FLAGS = st.lists(HOSTILE.map(lambda text: f"--config.note={text}"), min_size=1, max_size=3)


@fuzzed(6, share=0.05)
@given(flags=HOSTILE_FLAGS, where=HOSTILE)
def test_no_value_meets_a_shell(flags: list[str], where: str) -> None:
    """What is printed, read as the shell would that runs it, is what was given, to the letter."""
    local = run(["local.sh", "--dry-run", *flags], PYTHON=f"python{where}").stdout
    assert words(local.split("\n", 1)[1].rstrip("\n")) == [
        *(f"python{where}", "-u", "-m", "balpoe_jax.main"), *flags
    ]  # fmt: skip
    pod = ["tpu_pod.sh", "--dry-run", f"--name=n{where}", "--zone=z", f"--directory=d{where}", "--"]
    gcloud = words(run([*pod, *flags]).stdout.rstrip("\n"))
    assert gcloud[5] == f"n{where}"
    cd, started = gcloud[-1].removeprefix("--command=cd ").split(" && .venv", 1)
    assert words(cd) == [f"d{where}"]
    assert words(started)[5:] == flags
    slurm = run(["slurm.sbatch", "--dry-run", *flags], PYTHON="python3").stdout
    assert words(slurm.split("\n# on exit", 1)[0])[-len(flags) :] == flags
    gke = run([*GKE_GPU, f"--image=i{where}", "--dry-run", "--", *flags])
    job = yaml.safe_load(gke.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["image"] == f"i{where}"
    assert [flag.replace("$$", "$") for flag in container["args"][-len(flags) :]] == flags
    assert not list(ROOT.rglob("hacked")) and not Path("hacked").exists()


def test_tpu_pod_installs_the_pinned_jax() -> None:
    printed = run([*TPU_POD, "--dry-run", "--install", "--", *FLAGS]).stdout.splitlines()
    commands = [words(line)[-1].removeprefix("--command=cd balpoe_jax && ") for line in printed]
    assert words(commands[0]) == ["sh", "launch/setup.sh", "python3", ".venv", "requirements.lock"]
    (version,) = re.findall(r"^jax==(.*)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert words(commands[1])[-1] == f"jax[tpu]=={version}"
    assert len(commands) == 3


def set_up(folder: Path, requirements: str, python: str = "python") -> subprocess.CompletedProcess:
    """launch/setup.sh for the environment `folder/venv`, with the programs of `folder` alone."""
    (folder / "cat").symlink_to(shutil.which("cat"))  # of `stand_in`
    return subprocess.run(
        [shutil.which("sh"), "launch/setup.sh", python, str(folder / "venv"), requirements],
        cwd=ROOT,
        env={"PATH": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("requirements", "options"),
    [
        ("requirements-dev.lock", ["--require-hashes"]),
        ("requirements-dev.txt", []),
        ("requirements-newest.txt", ["--upgrade", "--upgrade-strategy=eager"]),
    ],
)
def test_the_file_decides_what_pip_does(
    tmp_path: Path, requirements: str, options: list[str]
) -> None:
    stand_in(tmp_path, "python")
    programs = tmp_path / "venv" / "bin"
    programs.mkdir(parents=True)
    pip = stand_in(programs, "python")
    result = set_up(tmp_path, requirements)
    assert (result.returncode, result.stderr) == (0, "")
    taken_by_pip = taken(pip)[taken(pip).index("install") + 1 :]
    assert taken_by_pip[2:] == [*options, "--requirement", requirements]


@pytest.mark.parametrize(
    ("requirements", "python", "message"),
    [
        ("requirements.lock", "none", "there is no none here; install Python 3.11, 3.12 or 3.13,"),
        ("requirements.lock", "python", "Python 3.11, 3.12 or 3.13 is needed, and python is"),
        ("requirements-newest.txt", "", "there is no such Python here; install Python 3.12 or"),
        ("requirements-newest.txt", "python", "Python 3.12 or 3.13 is needed, and python is"),
    ],
)
def test_a_python_that_does_not_serve_is_refused(
    tmp_path: Path, requirements: str, python: str, message: str
) -> None:
    stand_in(tmp_path, "python", code=1)
    result = set_up(tmp_path, requirements, python)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"Error: {message}")
    assert ("PYTHON_NEWEST=" in result.stderr) == ("newest" in requirements)


@pytest.mark.parametrize(
    ("codes", "chosen"),
    [({"3.13": 0, "3.12": 0}, "python3.13"), ({"3.13": 127, "3.12": 0}, "python3.12"), ({}, "")],
)
def test_the_newest_versions_take_the_newest_python_that_starts(
    tmp_path: Path, codes: dict[str, int], chosen: str
) -> None:
    """Shims of pyenv are found, and cannot start what is not chosen."""
    for version, code in codes.items():
        stand_in(tmp_path, f"python{version}", code)
    result = subprocess.run(
        [shutil.which("make"), "--dry-run", "test-newest", f"VENV_NEWEST={tmp_path / 'venv'}"],
        cwd=ROOT,
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    command, *_ = [line for line in result.stdout.splitlines() if "launch/setup.sh" in line]
    file = "requirements-newest.txt"
    assert words(command) == ["sh", "launch/setup.sh", chosen, str(tmp_path / "venv"), file]


@pytest.mark.parametrize(
    ("tasks", "devices"), [("8", []), ("1", ["env", "JAX_LOCAL_DEVICE_IDS=0,1,2,3"])]
)
def test_slurm(tmp_path: Path, tasks: str, devices: list[str]) -> None:
    srun = stand_in(tmp_path, "srun")
    slurm = {"SLURM_NTASKS_PER_NODE": tasks, "SLURM_GPUS_ON_NODE": "4"}
    slurm |= {"SLURM_CPUS_PER_TASK": "12", "PYTHON": "python3"}
    printed = run(["slurm.sbatch", "--dry-run", *FLAGS], **slurm).stdout.splitlines()
    assert run(["slurm.sbatch", *FLAGS], tmp_path, **slurm).returncode == 0
    options = ["--kill-on-bad-exit=1", "--gpu-bind=none", "--cpus-per-task=12"]
    options += [f"--chdir={ROOT}"]
    main = ["python3", "-u", "-m", "balpoe_jax.main", "--distributed"]
    assert taken(srun) == [*options, *devices, *main, *FLAGS]
    assert words(printed[0]) == ["srun", *taken(srun)]


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        (143, "", True),
        (143, "20", True),
        (75, "", True),
        (75, "19", True),
        (75, "20", False),
        (2, "", False),
        (3, "", False),
        (0, "", False),
    ],
)
def test_slurm_queues_again_what_a_restart_mends(
    tmp_path: Path, code: int, restarts: str, requeued: bool
) -> None:
    stand_in(tmp_path, "srun", code)
    scontrol = stand_in(tmp_path, "scontrol")
    slurm = {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": restarts}
    result = run(["slurm.sbatch", *FLAGS], tmp_path, **slurm)
    assert scontrol.exists() == requeued
    if requeued:
        assert taken(scontrol) == ["requeue", "77"]
    assert result.returncode == (0 if requeued else code)


def test_slurm_asks_for_a_signal_and_to_be_queued_again() -> None:
    text = (LAUNCH / "slurm.sbatch").read_text()
    assert {"--signal=TERM@120", "--requeue"} <= set(re.findall("^#SBATCH (.*)$", text, re.M))


@pytest.mark.parametrize("command", [GKE_TPU, GKE_GPU])
def test_gke(tmp_path: Path, command: list[str]) -> None:
    kubectl = stand_in(tmp_path, "kubectl")
    printed = run([*command, "--dry-run", "--", *FLAGS])
    assert printed.returncode == 0, printed.stderr
    assert run([*command, "--", *FLAGS], tmp_path).returncode == 0
    assert taken(kubectl) == ["create", "--filename=-"]
    assert Path(f"{kubectl}.input").read_text() == printed.stdout
    manifest = yaml.safe_load(printed.stdout)
    assert (manifest["kind"], manifest["metadata"]["name"]) == ("JobSet", "run")
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (4, 4, "Indexed")
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["terminationGracePeriodSeconds"] == 120
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "runs"}
    own = ["--distributed"]
    if command is GKE_GPU:
        own += ["--coordinator_address=run-hosts-0-0.run:8476", "--num_processes=4"]
        own += ["--process_id=$(JOB_COMPLETION_INDEX)"]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    else:
        assert container["resources"]["limits"] == {"google.com/tpu": 4}
        assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    assert container["args"][: len(own)] == own
    assert [flag.replace("$$", "$") for flag in container["args"][len(own) :]] == FLAGS
    assert not re.search(r"(?<!\$)(\$\$)*\$\(", "".join(container["args"][len(own) :]))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["local.sh"], "nothing to run"),
        (["local.sh", "--dry-run"], "nothing to run"),
        (["slurm.sbatch"], "nothing to run"),
        (["tpu_pod.sh", "--zone=z", "--", "a"], "--name=TPU"),
        (["tpu_pod.sh", "--name=n", "--", "a"], "--zone=ZONE"),
        (TPU_POD, "nothing to run"),
        ([*TPU_POD, "--config=a"], "unknown option --config=a"),
        ([*GKE, "--", "a"], "missing --gpu, --gpus"),
        ([*GKE_TPU, "--gpus=8", "--", "a"], "--gpus does not belong to tpu.yaml"),
        ([*GKE_GPU, "--hosts=many", "--", "a"], "--hosts must be a positive number, got many"),
        ([*GKE_GPU, "--name=A_b", "--", "a"], "--name must be lower-case letters"),
        (GKE_GPU, "nothing to run"),
    ],
)
def test_what_is_missing_is_asked_for(tmp_path: Path, command: list[str], message: str) -> None:
    calls = [stand_in(tmp_path, name) for name in ("gcloud", "kubectl", "srun")]
    result = run(command, tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert not any(call.exists() for call in calls)


def test_the_image_holds_what_a_run_needs() -> None:
    text = (LAUNCH / "Dockerfile").read_text()
    for source in re.findall(r"^COPY (\S+) ", text, re.M):
        assert (ROOT / source).exists()
    assert 'ENTRYPOINT ["python", "-m", "balpoe_jax.main"]' in text
    assert "sed -n 's/^jax==//p' requirements.txt" in text


def test_instructions_name_every_script() -> None:
    text = (ROOT / "docs" / "launch.md").read_text()
    for script in (*LAUNCH.rglob("*.sh"), LAUNCH / "slurm.sbatch", LAUNCH / "Dockerfile"):
        if script.name != "setup.sh":
            assert f"launch/{script.relative_to(LAUNCH)}" in text
