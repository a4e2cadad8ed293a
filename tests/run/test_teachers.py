# SPDX-License-Identifier: Apache-2.0
"""Runs to learn from: their configs, their variables, their place in the state."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balpoe_jax.config import Settings, resolve
from balpoe_jax.errors import UserError
from balpoe_jax.experiment.build import build_program
from balpoe_jax.files import to_json
from balpoe_jax.optim import make_optimizer
from balpoe_jax.parallel import make_parallel
from balpoe_jax.run import teachers
from balpoe_jax.run.checkpoint import Checkpoints
from balpoe_jax.step import create_state
from tests.helpers import tiny_network
from tests.helpers.config_files import get_config

COUNTS = np.array([130, 94, 68, 49, 35, 26, 18, 13, 9, 5])


def write_config(workdir: Path, arguments: str = "method=ride,experts=2") -> Path:
    """The record of a run on digits, without fields that came later."""
    config = get_config("digits_lt", arguments).to_dict()
    del config["compilation_cache_dir"], config["method"]["distill"]
    config["batch_size"] = 30
    workdir.mkdir(exist_ok=True)
    (workdir / "config.json").write_text(json.dumps({"config": to_json(config)}))
    return workdir


def student(workdir: Path) -> Settings:
    config = get_config("digits_lt", "method=ride_distill")
    config.method.teacher = str(workdir)
    return resolve(config)


def test_a_teachers_config_is_its_record_with_the_students_batches(tmp_path: Path) -> None:
    found = teachers.read_settings(str(write_config(tmp_path)), student(tmp_path))
    assert found == resolve(get_config("digits_lt", "method=ride,experts=2"))
    assert found.batch_size == 32 and isinstance(found.optim.decay_epochs, tuple)


def test_runs_that_cannot_teach_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no run \(there is no config.json\); train it"):
        teachers.read_settings(str(tmp_path), student(tmp_path))
    write_config(tmp_path)
    other = resolve(get_config("cifar100_lt", "method=ride_distill"))
    with pytest.raises(UserError, match="was trained on digits, not on cifar100; name another"):
        teachers.read_settings(str(tmp_path), other)
    for damaged in ("{", "[]", '{"config": 3}', '{"config": {"data": 1}}'):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(UserError, match=r"config.json cannot be read \("):
            teachers.read_settings(str(tmp_path), student(tmp_path))


def test_a_teachers_variables_are_those_of_its_newest_checkpoint(tmp_path: Path) -> None:
    network, optimizer = tiny_network.experts(2), make_optimizer(0.1)
    create = jax.jit(partial(create_state, network, optimizer, image_shape=tiny_network.SHAPE))
    state = make_parallel("pmap", jax.devices()[:1]).replicate(create(jax.random.key(0)))
    with pytest.raises(UserError, match="There is no checkpoint of the teacher in"):
        teachers.load(str(tmp_path), state)
    with Checkpoints(str(tmp_path / "checkpoints")) as checkpoints:
        checkpoints.save(state.replace(step=state.step + 7))
    blank = jax.tree.map(jnp.zeros_like, state)
    chex.assert_trees_all_equal(teachers.load(str(tmp_path), blank), state.variables)


@pytest.mark.integration
def test_the_teacher_is_a_constant_of_the_step_and_not_part_of_the_state(tmp_path: Path) -> None:
    write_config(tmp_path)
    devices = make_parallel("pmap", jax.devices()[:1])
    program = build_program(student(tmp_path), devices, COUNTS, (8, 8, 3))
    teacher = program.context.teacher
    assert program.teacher is not None and teacher is not None
    assert program.teacher.settings.model.num_experts == 2
    assert program.abstract_state().method_state == {}
    taught = program.teacher.init_state()
    with Checkpoints(str(tmp_path / "checkpoints")) as checkpoints:
        checkpoints.save(taught)
    constants = program.load_constants()
    chex.assert_trees_all_equal(constants, {"teacher": taught.variables})
    now = program.context.at(3, constants["teacher"])
    assert now.teacher is not None and now.step == 3
    chex.assert_trees_all_equal(now.teacher.params, taught.params)
    assert dataclasses.replace(program, teacher=None).load_constants() == {}


@pytest.mark.integration
def test_a_students_checkpoint_that_held_its_teacher_is_read_without_it(tmp_path: Path) -> None:
    network, optimizer = tiny_network.experts(2), make_optimizer(0.1)
    create = jax.jit(partial(create_state, network, optimizer, image_shape=tiny_network.SHAPE))
    state = make_parallel("pmap", jax.devices()[:1]).replicate(create(jax.random.key(0)))
    teacher = {"teacher": jax.tree.map(lambda x: x + 1, state.variables)}
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(state.replace(method_state=teacher))
        chex.assert_trees_all_equal(checkpoints.restore_latest(state), state)
        kept = state.replace(method_state={"teacher": jax.tree.map(jnp.zeros_like, state.params)})
        with pytest.raises(UserError, match="is of another model or optimizer"):
            checkpoints.restore_latest(kept)
