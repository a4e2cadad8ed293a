# SPDX-License-Identifier: Apache-2.0
"""Checkpoints by themselves: what is saved is what was there, kept as asked, read as a tree."""

import errno
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balpoe_jax.errors import TransientError, UserError
from balpoe_jax.run.checkpoint import Checkpoints
from tests.helpers.states import abstract, make_state


@pytest.mark.integration
def test_a_state_that_the_next_step_overwrites_is_saved_as_it_was(tmp_path: Path) -> None:
    """The write goes on in the background while the donated memory is used again."""
    state = make_state(1, size=20_000_000)
    update = jax.jit(lambda s: jax.tree.map(lambda x: x - 5, s), donate_argnums=0)
    update = update.lower(state).compile()
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(state)
        for _ in range(5):
            state = update(state)
        jax.block_until_ready(state)
    with Checkpoints(str(tmp_path)) as checkpoints:
        restored = checkpoints.restore_latest(abstract(make_state(1, size=20_000_000)))
    assert restored is not None
    assert int(restored.step) == 1
    assert np.asarray(restored.params["kernel"]).min() == 1


def test_the_latest_are_kept_and_restored(tmp_path: Path) -> None:
    with Checkpoints(str(tmp_path), keep=2) as checkpoints:
        for step in (3, 6, 9):
            checkpoints.save(make_state(step))
        checkpoints.save(make_state(9))  # again: nothing to do
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["6", "9"]
    with Checkpoints(str(tmp_path)) as checkpoints:
        assert checkpoints.latest_step() == 9
        restored = checkpoints.restore_latest(abstract(make_state(0)))
    assert jax.tree.structure(restored) == jax.tree.structure(make_state(9))
    jax.tree.map(np.testing.assert_array_equal, restored, make_state(9))


def test_an_unfinished_checkpoint_is_not_taken_for_one(tmp_path: Path) -> None:
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(make_state(3))
    (tmp_path / "6.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(str(tmp_path)) as checkpoints:
        assert checkpoints.latest_step() == 3


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    for read_only in (True, False):
        with Checkpoints(str(tmp_path / "none"), read_only=read_only) as checkpoints:
            assert checkpoints.restore_latest(abstract(make_state(0))) is None


def test_another_tree_is_refused_by_name(tmp_path: Path) -> None:
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(make_state(3))
        other = make_state(0).replace(params={"kernel": jnp.zeros(9), "bias": jnp.zeros(2)})
        with pytest.raises(UserError, match=r"params/bias absent instead of \(2,\), params/kernel"):
            checkpoints.restore_latest(abstract(other))


def test_a_failed_write_is_one_sentence(tmp_path: Path, monkeypatch) -> None:
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with Checkpoints(str(tmp_path)) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", fail)
        with pytest.raises(
            TransientError, match=r"could not be written to .*No space left on device"
        ):
            checkpoints.save(make_state(3))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("UNKNOWN: Failed to read [os_error_code='5']"), TransientError),  # EIO
        (OSError(errno.ESTALE, "Stale file handle"), TransientError),
        (ValueError("UNKNOWN: Failed to open [os_error_code='40']"), UserError),  # ELOOP
        (ValueError("DATA_LOSS: Invalid manifest"), UserError),
    ],
)
def test_storage_that_does_not_answer_is_not_a_damaged_checkpoint(
    tmp_path: Path, monkeypatch, error: Exception, kind: type[UserError]
) -> None:
    def fail(*_, **__):
        raise error

    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(make_state(3))
        checkpoints.wait()
        monkeypatch.setattr(checkpoints._manager, "restore", fail)
        with pytest.raises(UserError) as caught:
            checkpoints.restore_latest(abstract(make_state(0)))
    assert type(caught.value) is kind


def test_a_lost_connection_is_not_an_error_of_the_storage(tmp_path: Path, monkeypatch) -> None:
    def fail(*_, **__):
        try:
            raise jax.errors.JaxRuntimeError("Connection closed by peer")
        except jax.errors.JaxRuntimeError as error:
            raise ValueError("No barrier") from error

    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(make_state(3))
        checkpoints.wait()
        for name, verb in (
            ("save", partial(checkpoints.save, make_state(4))),
            ("restore", partial(checkpoints.restore_latest, abstract(make_state(0)))),
            ("wait_until_finished", checkpoints.wait),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(checkpoints._manager, name, fail)
                with pytest.raises(ValueError, match="No barrier") as caught:
                    verb()
            assert not isinstance(caught.value, UserError)


def test_extra_state_is_saved_where_there_is_any(tmp_path: Path) -> None:
    """And leaves no trace elsewhere: checkpoints from before there was any are restored."""
    kept = {"queue": jnp.arange(6.0).reshape(3, 2), "labels": jnp.array([-1, 2, 0])}
    for method_state, name in (({}, "none"), (kept, "some")):
        state = make_state(4).replace(method_state=method_state)
        with Checkpoints(str(tmp_path / name)) as checkpoints:
            checkpoints.save(state)
            restored = checkpoints.restore_latest(abstract(state))
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        metadata = (tmp_path / name / "4" / "state" / "_METADATA").read_text()
        assert ("queue" in metadata, "extra" in metadata) == (name == "some",) * 2
    with (
        Checkpoints(str(tmp_path / "some")) as checkpoints,
        pytest.raises(UserError, match=r"of another model or optimizer: extra/labels .* absent"),
    ):
        checkpoints.restore_latest(abstract(make_state(0)))
