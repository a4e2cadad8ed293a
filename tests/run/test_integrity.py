# SPDX-License-Identifier: Apache-2.0
"""Damaged checkpoints: every changed bit is noticed, and no good copy is lost over it."""

import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from balpoe_jax.errors import TransientError, UserError
from balpoe_jax.run import checksums
from balpoe_jax.run.checkpoint import Checkpoints
from tests.helpers.states import abstract, make_state


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    with Checkpoints(str(folder), keep=3) as checkpoints:
        for step in (3, 6, 9):
            checkpoints.save(make_state(step))
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "checkpoints"))


def restore(folder: Path, read_only: bool = False) -> int | None:
    with Checkpoints(str(folder), keep=3, read_only=read_only) as checkpoints:
        state = checkpoints.restore_latest(abstract(make_state(0)))
    if state is None:
        return None
    jax.tree.map(np.testing.assert_array_equal, state, make_state(int(state.step)))
    return int(state.step)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    """To whole lines, where there are some."""
    content = path.read_bytes()
    path.write_bytes(content[: content.rfind(b"\n", 0, -1) + 1 or len(content) // 2])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.integration
@pytest.mark.parametrize("damage", [flip_a_bit, cut, Path.unlink])
def test_damage_to_any_file_is_noticed(folder: Path, damage: Callable[[Path], None]) -> None:
    checkpoint = folder / "9"
    assert len(files(checkpoint)) > 10
    assert checksums.damage(checkpoint) is None
    for path in files(checkpoint):
        before = path.read_bytes()
        damage(path)
        assert checksums.damage(checkpoint), path
        assert restore(folder, read_only=True) == 6
        path.write_bytes(before)
    assert checksums.damage(checkpoint) is None
    assert restore(folder) == 9


@pytest.mark.slow
@pytest.mark.integration
def test_every_bit_of_the_checksums_counts(folder: Path) -> None:
    path = folder / "9" / checksums.SUMS
    before = path.read_bytes()
    for position in range(0, len(before), 3):
        for bit in (1, 32):
            path.write_bytes(
                before[:position] + bytes([before[position] ^ bit]) + before[position + 1 :]
            )
            assert checksums.damage(folder / "9"), position


def test_checksums_are_read_by_the_usual_tool(folder: Path) -> None:
    subprocess.run(["sha256sum", "--quiet", "-c", checksums.SUMS], cwd=folder / "9", check=True)


@pytest.mark.integration
def test_a_damaged_checkpoint_is_moved_aside_and_the_next_one_taken(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "damaged-9").mkdir()
    flip_a_bit(files(folder / "9" / "state" / "d")[0])
    with caplog.at_level(logging.WARNING, "balpoe_jax"):
        assert restore(folder, read_only=True) == 6
        assert names(folder) == ["3", "6", "9", "damaged-9"]
        with Checkpoints(str(folder), keep=2) as checkpoints:
            assert checkpoints.restore_latest(abstract(make_state(0))) is not None
            checkpoints.save(make_state(9))  # made again
            checkpoints.save(make_state(12))
    assert names(folder) == ["12", "9", "damaged-9", "damaged-9-2"]
    assert restore(folder) == 12
    (line,) = {record.getMessage() for record in caplog.records if "is now" in record.getMessage()}
    assert line == "It is now damaged-9-2; going back to the checkpoint of step 6"


def test_with_no_intact_checkpoint_nothing_is_touched(folder: Path) -> None:
    for step in (3, 6, 9):
        flip_a_bit(folder / str(step) / "state" / "manifest.ocdbt")
    for read_only in (True, False):
        with pytest.raises(UserError, match=r"No checkpoint in .* is intact \(9: state/manifest"):
            restore(folder, read_only)
    assert names(folder) == ["3", "6", "9"]


def test_what_others_put_there_is_no_checkpoint(folder: Path) -> None:
    (folder / "12").mkdir()
    (folder / "12" / "notes.txt").touch()
    (folder / "15").write_text("a file")
    (folder / "notes.txt").touch()
    (folder / "012").mkdir()
    (folder / "9" / "notes.txt").touch()  # in one: it stays whole
    assert restore(folder, read_only=True) == 9
    assert restore(folder) == 9
    assert {"9", "012", "damaged-12", "damaged-15", "notes.txt"} <= set(names(folder))


def test_what_a_kill_leaves_half_written_is_cleared_away(folder: Path) -> None:
    for name in ("12.orbax-checkpoint-tmp", "12.summing.orbax-checkpoint-tmp"):
        shutil.copytree(folder / "9", folder / name)
    assert restore(folder) == 9
    assert names(folder) == ["3", "6", "9"]


def test_a_kill_while_an_old_checkpoint_is_deleted_does_no_harm(folder: Path) -> None:
    shutil.rmtree(folder / "3" / "state")
    (folder / "3" / "_CHECKPOINT_METADATA").unlink()
    with Checkpoints(str(folder), keep=2) as checkpoints:
        assert checkpoints.restore_latest(abstract(make_state(0))) is not None
        checkpoints.save(make_state(12))
    assert names(folder) == ["12", "9"]


def test_a_checksum_of_a_file_elsewhere_is_refused(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "x").write_text("x")
    (folder / "9" / "link").symlink_to(folder / "elsewhere")
    checksums.write_sums(folder / "elsewhere")
    digest = (folder / "elsewhere" / checksums.SUMS).read_text()[:64]
    line = f"{digest}  link/x"
    (folder / "9" / checksums.SUMS).write_text(checksums._ended([line]))
    assert checksums.damage(folder / "9") == "its SHA256SUMS is damaged"


def test_a_step_that_is_not_saved_is_an_error(folder: Path) -> None:
    with Checkpoints(str(folder)) as checkpoints, pytest.raises(UserError, match=r"checkpoint 9;"):
        checkpoints.save(make_state(7))


def test_the_clock_does_not_choose_the_checkpoint(folder: Path) -> None:
    for step, time in ((3, 4e9), (6, 2e9), (9, 1)):
        for path in (folder / str(step), *files(folder / str(step))):
            os.utime(path, (time, time))
    assert restore(folder) == 9


@pytest.fixture
def small_disk(tmp_path: Path):
    mounted = tmp_path / "disk"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mounted)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=10)
    except OSError as error:
        pytest.skip(f"nothing can be mounted here: {error}")
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr!r}")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


# Of what TensorStore goes on with after Orbax has given up.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_leaves_the_last_good_checkpoint(small_disk: Path) -> None:
    big = np.random.default_rng(0).normal(size=100_000).astype(np.float32)

    def state(step: int):
        return make_state(step).replace(params={"kernel": jax.numpy.asarray(big + step)})

    checkpoints = Checkpoints(str(small_disk / "checkpoints"), keep=1)

    def save_on() -> None:
        for step in (3, 6, 9, 12):
            (small_disk / f"fills-{step}").write_bytes(bytes(500_000))
            checkpoints.save(state(step))
            checkpoints.wait()

    with pytest.raises(TransientError, match=r"could not be written to .*; make room"):
        save_on()
    for path in small_disk.glob("fills-*"):
        path.unlink()
    with Checkpoints(str(small_disk / "checkpoints"), keep=1) as fresh:
        restored = fresh.restore_latest(abstract(state(0)))
        assert restored is not None
        assert int(restored.step) in (3, 6)
        jax.tree.map(np.testing.assert_array_equal, restored, state(int(restored.step)))
        fresh.save(state(12))
    assert names(small_disk / "checkpoints") == ["12"]
