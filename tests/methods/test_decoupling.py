# SPDX-License-Identifier: Apache-2.0
"""Decoupled training: what the second phases of cRT and LWS train, on which features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balpoe_jax.methods import Context, Network
from balpoe_jax.methods.base import map_by_path
from balpoe_jax.methods.classifier import in_classifier
from balpoe_jax.methods.decoupling import CRT, LWS
from tests.helpers import tiny_network
from tests.helpers.config_files import get_config
from tests.helpers.method_steps import fresh, moved, parts, run
from tests.helpers.mixed_rows import COUNTS, log_probability, mixed_batch


@pytest.mark.parametrize("method", [CRT(), LWS()])
def test_the_loss_is_its_twin(method, x64) -> None:
    logits, batch = mixed_batch()
    found = method.expert_losses(jnp.asarray(logits), batch, Context(COUNTS))
    for e in range(2):
        for i in range(4):
            first, second = (
                log_probability(logits[e, i], y[i]) for y in (batch.labels, batch.other_labels)
            )
            weight = batch.mix_weight[i]
            expected = -weight * first - (1 - weight) * second
            np.testing.assert_allclose(found[e, i], expected, rtol=1e-12)


@pytest.mark.integration
def test_re_training_moves_the_classifier_alone() -> None:
    assert moved("crt") == {"expert/head/dense/kernel", "expert/head/dense/bias"}


@pytest.mark.integration
def test_scaling_moves_the_scales_alone() -> None:
    assert moved("lws") == {"class_scale"}
    first = run("lws", "pmap", 1, 0)[-1][0]
    np.testing.assert_array_equal(first.params["class_scale"], np.ones(5))


def test_re_training_begins_with_a_new_classifier_and_scaling_with_the_old_one() -> None:
    params, key = fresh("crt").params, jax.random.key(3)
    new = CRT().phases()[1].begin(params, key, Context(COUNTS))
    same = map_by_path(lambda path, _: path, params)
    for path, old, now in zip(*map(jax.tree.leaves, (same, params, new)), strict=True):
        assert np.array_equal(old, now) != in_classifier(path), path
    scaled = fresh("lws").params
    assert LWS().phases()[1].begin(scaled, key, Context(COUNTS)) is scaled


@pytest.mark.integration
@pytest.mark.parametrize("name", ["crt", "lws"])
def test_the_second_phase_sees_features_as_in_a_test(name: str) -> None:
    """Its loss is that of the averages, and no matter what else is in the batch."""
    method, context, network = parts(name, None)
    state, batch = fresh(name), tiny_network.batch()
    net = Network(network, state.params, state.batch_stats)
    found = method.phases()[1].loss(net, {}, batch, context)
    outputs, _ = net(batch.images, train=False)
    expected = method.expert_losses(outputs.logits, batch, context).mean()
    np.testing.assert_allclose(found.total, expected, rtol=1e-6)
    assert found.batch_stats is state.batch_stats


@pytest.mark.parametrize("name", ["crt", "lws"])
@pytest.mark.parametrize("data", ["cifar100_lt", "imagenet_lt"])
def test_the_second_phase_draws_classes_uniformly(name: str, data: str) -> None:
    config = get_config(data, f"method={name}")
    assert (config.data.sampler, config.phase2.sampler) == ("shuffle", "class_balanced")
    assert config.phase2.epochs == 10
