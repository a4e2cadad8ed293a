# SPDX-License-Identifier: Apache-2.0
"""What a phase freezes, how it transforms the optimizer, and what it begins with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from balpoe_jax import methods
from balpoe_jax.config import resolve
from balpoe_jax.errors import UserError
from balpoe_jax.experiment import build
from balpoe_jax.experiment.phases import PhasePlan, epoch_at, phase_of, step_at
from balpoe_jax.methods import Context, Phase
from balpoe_jax.methods.balpoe import BalPoE
from balpoe_jax.methods.classifier import in_classifier, new_classifier
from balpoe_jax.methods.mislas import Mislas
from balpoe_jax.optim import followed_by, make_optimizer
from balpoe_jax.parallel import make_parallel
from balpoe_jax.step import phase_optimizer
from tests.helpers import tiny_network
from tests.helpers.config_files import get_config

PARAMS = {
    "body": {"w": np.array([1.0, 2.0], np.float32)},
    "head": {"w": np.array([3.0, -4.0], np.float32)},
}


def test_what_is_frozen_has_no_update_and_the_state_keeps_its_structure() -> None:
    base = make_optimizer(0.1)
    phase = Phase(
        "p", BalPoE().loss, in_classifier, lambda tx, params: followed_by(tx, optax.scale(3.0))
    )
    optimizer = phase_optimizer(base, phase)
    grads = {
        "body": {"w": np.array([np.nan, 1.0], np.float32)},
        "head": {"w": np.array([0.5, 0.25], np.float32)},
    }
    plain, state = base.update(grads, base.init(PARAMS), PARAMS)
    found, new_state = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    assert jax.tree.structure(optimizer.init(PARAMS)) == jax.tree.structure(base.init(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, new_state, state)
    np.testing.assert_array_equal(found["body"]["w"], [0, 0])
    np.testing.assert_array_equal(found["head"]["w"], 3.0 * plain["head"]["w"])


def test_a_transform_gets_the_shapes_of_the_parameters() -> None:
    seen = []
    phase = Phase("p", BalPoE().loss, transform=lambda tx, params: seen.append(params) or tx)
    phase_optimizer(optax.sgd(1.0), phase).init(PARAMS)
    assert seen[0]["body"]["w"] == jax.ShapeDtypeStruct((2,), np.float32)


@pytest.mark.integration
@pytest.mark.parametrize("classifier", ["cosine", "linear"])
def test_a_new_classifier_is_as_one_before_a_training(classifier: str) -> None:
    network = Mislas().network(tiny_network.experts(3, classifier=classifier), None)
    params = tiny_network.init(network)["params"]
    new, again, other = (new_classifier(params, jax.random.key(i)) for i in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, new, again)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, params)
    heads = [tree["ensemble"]["expert"].pop("head") for tree in (new, params, other)]
    jax.tree.map(np.testing.assert_array_equal, new, params)
    kernels = [head.get("dense", head)["kernel"] for head in heads]
    assert not np.any(kernels[0] == kernels[1]) and not np.any(kernels[0] == kernels[2])
    assert not np.any(kernels[0][0] == kernels[0][1])
    if classifier == "cosine":
        np.testing.assert_allclose(jnp.linalg.norm(kernels[0], axis=1), 1.0, rtol=1e-6)
    else:
        bias = heads[0]["dense"]["bias"]
        assert np.all(np.abs(bias) <= 8**-0.5) and len(np.unique(bias)) == bias.size


@dataclasses.dataclass(frozen=True)
class Renewed(Mislas):
    """Its second phase begins with a new classifier, or does what a phase must not do."""

    fault: str = ""

    def phases(self) -> tuple[Phase, ...]:
        first, second = super().phases()

        def begin(params, key, context):
            params = new_classifier(params, key)
            if self.fault == "begin":
                params["more"] = jnp.zeros(2)
            return {**params, "class_scale": params["class_scale"] + context.step}

        def transform(optimizer, params):
            return optax.chain(optimizer, optax.trace(0.5)) if self.fault else optimizer

        return first, dataclasses.replace(second, begin=begin, transform=transform)


@pytest.fixture
def program_of(monkeypatch):
    """Builds the program of a digits config, with a tiny network."""
    monkeypatch.setattr(build, "create_model", tiny_network.create_model)
    monkeypatch.setitem(methods.METHODS, "renewed", Renewed)
    preset = dataclasses.replace(methods.PRESETS["mislas"], method=Renewed())
    monkeypatch.setitem(methods.PRESETS, "renewed", preset)

    def make(**fields):
        config = get_config("digits_lt", "method=renewed,epochs=2")
        config.unlock()
        config.seed = fields.pop("seed", 1)
        config.method.update(fields)
        counts, shape = np.arange(50, 0, -5), (8, 8, 3)
        return build.build_program(resolve(config), make_parallel("pmap"), counts, shape)

    return make


@pytest.mark.integration
def test_a_phase_begins_with_parameters_of_seed_and_phase_alone(program_of) -> None:
    program, other = program_of(), program_of(seed=2)
    state = program.init_state()
    on_devices = program.begin_phase(1, state)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(on_devices))
    begun, again, unlike = jax.device_get(
        (on_devices, program.begin_phase(1, state), other.begin_phase(1, state))
    )
    jax.tree.map(np.testing.assert_array_equal, begun, again)
    assert jax.tree.structure(begun) == jax.tree.structure(state)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(begun.opt_state))
    steps = program.phases[1].first_step
    assert steps > 0 and np.all(begun.params["class_scale"] == 1 + steps)
    before = jax.device_get(state).params
    heads = [
        params["ensemble"]["expert"].pop("head")["dense"]["kernel"]
        for params in (begun.params, unlike.params, before)
    ]
    assert all(not np.any(heads[a] == heads[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    jax.tree.map(np.testing.assert_array_equal, begun.params["ensemble"], before["ensemble"])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("begin", r"begin of the phase 'classifier tuning' must keep the structure of the param"),
        ("transform", r"transform of the phase 'classifier tuning' must keep the structure of the"),
    ],
)
def test_a_phase_that_changes_the_structure_is_refused(program_of, fault, message) -> None:
    with pytest.raises(UserError, match=message):
        program_of(fault=fault)


def test_steps_belong_to_the_phases_that_they_are_updates_of() -> None:
    """Two epochs of three steps, and three epochs of two."""
    counts, optimizer = np.array([5, 1]), make_optimizer(0.1)
    first, second = Context(counts, steps_per_epoch=3), Context(counts, steps_per_epoch=2)
    second = dataclasses.replace(second, first_step=6)
    plans = [
        PhasePlan(0, "one", first, optimizer, np.array([0.1, 0.2]), 0),
        PhasePlan(1, "two", second, optimizer, np.array([0.3, 0.4, 0.5]), 2),
    ]
    assert [phase_of(plans, step).index for step in range(14)] == [0] * 7 + [1] * 7
    rates = [phase_of(plans, step).learning_rate(step) for step in range(1, 13)]
    assert rates == [0.1] * 3 + [0.2] * 3 + [0.3] * 2 + [0.4] * 2 + [0.5] * 2
    assert [step_at(plans, epoch) for epoch in range(6)] == [0, 3, 6, 8, 10, 12]
    assert [epoch_at(plans, step) for step in (0, 3, 6, 7, 12)] == [0, 1, 2, 2.5, 5]
