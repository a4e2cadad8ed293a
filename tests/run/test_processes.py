# SPDX-License-Identifier: Apache-2.0
"""Two processes with two devices each, over loopback, against one process with four devices."""

import json
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from balpoe_jax.config import resolve
from balpoe_jax.errors import UserError
from balpoe_jax.evaluate import evaluate
from balpoe_jax.experiment.build import build
from balpoe_jax.parallel import Parallel, make_parallel
from balpoe_jax.reporting import report
from balpoe_jax.run import multihost
from balpoe_jax.run.checkpoint import Checkpoints
from balpoe_jax.train import train
from tests.helpers import process_runs
from tests.helpers.xla_flags import flags_of_xla, quick_flags

# Here as in the processes that `process_runs` starts.
pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("tiny_experts")]

STEPS = process_runs.STEPS
# A device computes its part alike in both layouts, but the sums over devices are made in another
# order by XLA alone than with Gloo. Measured after three steps: an ulp or two (losses the same,
# parameters 6e-8, momenta 5e-7 apart), and sometimes a rounding that moves a ReLU across its kink:
# gradients then differ by 1e-4 of their norm and a few of 36,864 parameters by 2e-5, so that states
# are compared by norms.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
GRADIENTS = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture(scope="module")
def reference(tiny_experts, tmp_path_factory) -> Path:
    """The digits, trained by one process on four devices."""
    workdir = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report_of", lambda *given: "no page")
        train(resolve(process_runs.digits_config()), str(workdir))
    return workdir


@pytest.fixture(scope="module")
def two(reference: Path, tmp_path_factory, request) -> Path:
    """What two processes made of everything; of the twin mode's training for `make test-all`."""
    folder = tmp_path_factory.mktemp("two")
    task = "whole, twin" if request.config.getoption("--all") else "whole"
    commands = process_runs.task_commands(task, folder, reference)
    flags = flags_of_xla(quick_flags(request.config))
    with process_runs.start(commands, folder / "log", **flags) as pair:
        assert pair.wait() == [0, 0], pair.everything()
    return folder


def restore(workdir: Path, num_devices: int = 4):
    """The newest state, on this process's first devices."""
    placement = make_parallel("pmap", jax.devices()[:num_devices]).replicated
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement),
        build(resolve(process_runs.digits_config())).program.abstract_state(),
    )
    with Checkpoints(str(workdir / "checkpoints"), read_only=True) as checkpoints:
        return checkpoints.restore_latest(abstract)


# Of the norms of a whole state's parts.
STATE_TOLERANCES = {"params": 1e-5, "batch_stats": 1e-5, "opt_state": 1e-3}


def distance(state, expected, part: str) -> float:
    """The norm of the difference of a part, relative to that of the part."""
    found, wanted = getattr(state, part), getattr(expected, part)
    difference = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), found, wanted)
    return float(optax.tree.norm(difference) / optax.tree.norm(wanted))


def assert_same_training(state, expected) -> None:
    for part, tolerance in STATE_TOLERANCES.items():
        assert distance(state, expected, part) < tolerance


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_what_one_does(reference: Path, two: Path) -> None:
    expected, found = rows(reference), rows(two / "run")
    assert [row["step"] for row in found] == [1, 2, 3, 3]
    for name, tolerance in (
        ("loss", TOLERANCE),
        ("expert_losses", TOLERANCE),
        ("grad_norm", GRADIENTS),
    ):
        np.testing.assert_allclose(
            [row[name] for row in found[:STEPS]],
            [row[name] for row in expected[:STEPS]],
            **tolerance,
        )
    state, wanted = restore(two / "run"), restore(reference)
    assert int(state.step) == STEPS
    assert_same_training(state, wanted)
    # The tolerance is a small part of what was learnt.
    fresh = build(resolve(process_runs.digits_config())).program.init_state()
    for part, tolerance in STATE_TOLERANCES.items():
        assert distance(fresh, wanted, part) > 50 * tolerance


@pytest.fixture(scope="module")
def device_reference(tiny_experts, tmp_path_factory) -> Path:
    """The digits, by one process whose four devices make their batches."""
    workdir = tmp_path_factory.mktemp("device_reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report_of", lambda *given: "no page")
        train(resolve(process_runs.device_config("pmap")), str(workdir))
    return workdir


@pytest.mark.slow_cases("shard_map")  # of the twin mode, too
@pytest.mark.parametrize("mode", process_runs.MODES)
def test_two_processes_make_the_batches_of_one_on_their_devices(
    device_reference: Path, two: Path, mode: str, request: pytest.FixtureRequest
) -> None:
    """Each plans its own rows; the rows of a dispatch come together as the global batch."""
    if mode == "shard_map":
        request.getfixturevalue("with_all")
    workdir = two / f"device-{mode}"
    expected, found = rows(device_reference), rows(workdir)
    assert [row["step"] for row in found] == [2, 3, 3]
    np.testing.assert_allclose(
        [row["loss"] for row in found[:2]], [row["loss"] for row in expected[:2]], **TOLERANCE
    )
    assert_same_training(restore(workdir), restore(device_reference))
    resolved = json.loads((workdir / "config.json").read_text())["resolved"]
    assert (resolved["pipeline"], resolved["steps_per_dispatch"]) == ("device", 2)
    logits = [
        np.load(folder / "predictions" / "expert_logits.npy")
        for folder in (device_reference, workdir)
    ]
    np.testing.assert_allclose(logits[1], logits[0], **GRADIENTS)


@pytest.mark.slow
@pytest.mark.usefixtures("with_all")
def test_the_twin_mode_trains_what_one_process_does(two: Path) -> None:
    losses, state = process_runs.cifar_steps("shard_map")
    first, second = (process_runs.load(two / f"cifar-{i}.npz") for i in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    found_losses, *leaves = first
    np.testing.assert_allclose(found_losses, losses, **TOLERANCE)
    assert_same_training(jax.tree.unflatten(jax.tree.structure(state), leaves), state)


@pytest.mark.parametrize("num_devices", [4, 1])
def test_a_checkpoint_of_two_processes_restores_in_one(two: Path, num_devices: int) -> None:
    four, state = restore(two / "run"), restore(two / "run", num_devices)
    jax.tree.map(np.testing.assert_array_equal, state, four)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)} == {num_devices}


def test_a_checkpoint_of_one_process_restores_in_two(reference: Path, two: Path) -> None:
    expected = [np.asarray(leaf) for leaf in jax.tree.leaves(restore(reference, 1))]
    for i in range(2):
        _, *restored = process_runs.load(two / f"restored-{i}.npz")
        for a, b in zip(restored, expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_two_processes_predict_what_one_does(reference: Path, two: Path, tmp_path: Path) -> None:
    """Every test example once, in order: in training by pmap, and by shard_map."""
    logits = {
        name: np.load(folder / "predictions" / "expert_logits.npy")
        for name, folder in (("one", reference), ("shard_map", two), ("pmap", two / "run"))
    }
    assert logits["one"].shape == (1, 400, 10)
    np.testing.assert_allclose(logits["shard_map"], logits["one"], atol=1e-5)
    np.testing.assert_allclose(logits["pmap"], logits["one"], **GRADIENTS)  # of its own training
    workdir = tmp_path / "run"
    shutil.copytree(two / "run", workdir)
    before = json.loads((workdir / "results.json").read_text())
    after = evaluate(resolve(process_runs.digits_config()), str(workdir))
    for name, value in before["test"].items():
        assert after["test"][name] == pytest.approx(value, abs=1e-5)


def test_only_the_first_process_logs(two: Path) -> None:
    output = (two / "log" / "0.out").read_text()
    assert "Batch: 140 images in all, 70 a host, 35 a device; hosts: 2, devices: 4" in output
    assert "3 steps, 3 an epoch, learning rate 0.01" in output
    assert "step 3/3" in output
    silent = (two / "log" / "1.out").read_text().splitlines()
    # Gloo itself writes a line for each group, in pieces.
    assert [x for x in silent if not x.startswith("[Gloo]") and "peer ranks" not in x] == []
    assert (two / "log" / "1.err").read_text() == ""
    assert (two / "run" / "train.log").read_text().count("step 3/3") == 1
    environment = json.loads((two / "run" / "config.json").read_text())["environment"]
    assert (environment["process_count"], environment["device_count"]) == (2, 4)


def test_what_one_process_refuses_all_refuse(two: Path) -> None:
    first, second = (json.loads((two / f"refusals-{i}.json").read_text()) for i in range(2))
    # Each names its own folder in the first.
    assert first[1:] == second[1:]
    assert [message[:50] for message in first] == [message[:50] for message in second]
    assert [message[:50] for message in first] == [
        "The workdir must be one folder on storage that all",
        "All processes must have the same config, and that ",
        "No.",
        "The workdir /dev/null/x cannot be written to (Not a directory); choose another"[:50],
        "All processes must have the same data set, and that of process 0"[:50],
    ]
    assert "is not seen by process 1; choose another --workdir" in first[0]
    assert list((two / "shared").iterdir()) == []
    assert not (two / "only-1").exists()


@pytest.mark.parametrize(
    ("ending", "code", "sentence"),
    [("refuse", 2, "Error: This host has bad data."), ("break", 1, "RuntimeError: A bug on one")],
)
def test_an_error_of_one_process_ends_all(
    tmp_path: Path, ending: str, code: int, sentence: str
) -> None:
    with process_runs.start(process_runs.task_commands(ending), tmp_path) as pair:
        pair.wait_for("going on")
        start = time.monotonic()
        assert pair.wait() == [code, code], pair.everything()
        assert time.monotonic() - start < 2 * process_runs.HEARTBEAT_SECONDS
        assert sentence in pair.error(1)
        message = sentence.split(": ")[1]
        line = f"Error: process 0 of 2 stops because process 1 failed: {message}"
        assert line in pair.error(0), pair.everything()


@pytest.mark.slow_cases("1-9", "1-19")
@pytest.mark.parametrize(
    ("lost", "how"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)]
)
def test_a_process_that_is_lost_ends_the_other(
    tmp_path: Path, lost: int, how: signal.Signals
) -> None:
    """One that stands still leaves its connections open, as a network does that swallows all."""
    with process_runs.start(process_runs.task_commands("go on"), tmp_path) as pair:
        pair.wait_for("going on")
        pair.processes[lost].send_signal(how)
        code = pair.processes[1 - lost].wait(4 * process_runs.HEARTBEAT_SECONDS)
        assert code != 0
        assert pair.error(1 - lost), "it said nothing"


@pytest.mark.slow_cases("1")
@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_stays_alone_gives_up(tmp_path: Path, process: int) -> None:
    command = process_runs.task_commands("alone")[process]
    with process_runs.start([command, ["true"]], tmp_path) as pair:
        assert pair.wait() == [75, 0]
        assert pair.error(0).startswith("Error: The processes did not find each other within 2 s")
        assert len(pair.error(0).splitlines()) == 1


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        joined = multihost.process_group(address, 2, 0, report=lambda error: 1)
        with pytest.raises(UserError, match=r"Process 0 cannot use port .* in use"), joined:
            pass
    for process in range(2):
        joined = multihost.process_group("here", 2, process, report=lambda error: 1)
        with pytest.raises(UserError, match="must be HOST:PORT, got 'here'"), joined:
            pass


@pytest.mark.slow_cases("restore", "save")
@pytest.mark.parametrize("task", ["save", "restore"])
def test_a_peer_lost_at_a_checkpoint_is_not_an_error_of_the_storage(
    tmp_path: Path, task: str
) -> None:
    commands = process_runs.task_commands(task, tmp_path / "checkpoints")
    with process_runs.start(commands, tmp_path) as pair:
        pair.wait_for("going on")
        code = pair.processes[0].wait(4 * process_runs.HEARTBEAT_SECONDS)
        assert code not in (0, 2, 75), pair.everything()
        last_words = ("stops because a computation failed", "another task died")
        assert any(words in pair.error(0) for words in last_words), pair.everything()


@pytest.mark.slow
def test_a_training_is_preempted_and_killed_and_goes_on(tmp_path: Path) -> None:
    """SIGTERM to one process stops both after the same step, with a checkpoint."""
    workdir = tmp_path / "run"
    config = ["--config=configs/digits_lt.py:experts=1", "--config.mix.groups=2"]
    common = [sys.executable, "-m", "balpoe_jax.main", *config, f"--workdir={workdir}"]
    common += ["--distributed", "--num_processes=2", "--heartbeat_timeout_seconds=10"]
    common += ["--config.log_every_steps=13", "--config.checkpoint.every_epochs=100"]

    def commands() -> list[list[str]]:
        where = f"--coordinator_address=127.0.0.1:{process_runs.free_port()}"
        return [[*common, where, f"--process_id={i}"] for i in range(2)]

    quick = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # to compile
    with process_runs.start(commands(), tmp_path / "preempted", **quick) as pair:
        pair.wait_for("step 13/")
        pair.processes[1].send_signal(signal.SIGTERM)
        assert pair.wait() == [143, 143], pair.everything()
        saved = [int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*")]
        assert len(saved) == 1
        line = f"Preempted: step {saved[0]} is saved; start again to go on from there.\n"
        assert pair.error(0).endswith(line)  # after Orbax's own
        assert rows(workdir)[-1]["step"] == saved[0]
    with process_runs.start(commands(), tmp_path / "killed", **quick) as pair:
        pair.wait_for(f"Resumed from the checkpoint of step {saved[0]}")
        pair.wait_for("images/s")
        pair.processes[1].kill()
        start = time.monotonic()
        assert pair.wait()[0] not in (0, None), pair.everything()
        assert time.monotonic() - start < 30
        # Ours when a connection broke, JAX's when it was being made and no heartbeat came.
        last_words = ("stops because a computation failed", "another task died")
        assert any(words in pair.error(0) for words in last_words), pair.everything()


def test_hosts_need_groups_of_their_own(monkeypatch) -> None:
    monkeypatch.setattr(Parallel, "num_hosts", 2)
    with pytest.raises(UserError, match=r"multiple of the number of hosts, 2; got 1"):
        build(resolve(process_runs.digits_config(mix__groups=1)))
