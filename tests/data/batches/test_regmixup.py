# SPDX-License-Identifier: Apache-2.0
"""RegMixup's batches: each image clean and mixed, in both pipelines, and what their loss is."""

from functools import partial

import jax
import numpy as np
import pytest

from balpoe_jax.data.device.batches import make_batch
from balpoe_jax.data.device.packing import pack_on_host
from balpoe_jax.data.device.plans import Planner
from balpoe_jax.data.pipeline import train_batches
from balpoe_jax.data.settings import NO_MIXING, AugmentSettings, Host, MixSettings
from balpoe_jax.data.types import TrainBatch
from balpoe_jax.losses import log_prior
from balpoe_jax.methods import Context
from balpoe_jax.methods.balpoe import BalPoE
from balpoe_jax.optim import make_optimizer
from tests.helpers import tiny_network
from tests.helpers.batches import assert_equal, join, make_settings, make_source

REGMIXUP = MixSettings(alpha=10.0, regmixup=True)
FLIP = AugmentSettings(flip=True)


def host_batches(mix: MixSettings, host: Host | None = None, **changes) -> list[TrainBatch]:
    settings = make_settings(mix=mix, augment=FLIP, views=(FLIP,), **changes)
    return list(train_batches(make_source(), settings, 0, 3, *([host] if host else [])))


def device_batches(mix: MixSettings) -> list[TrainBatch]:
    source, settings = make_source(), make_settings(mix=mix, augment=FLIP, views=(FLIP,))
    planner = Planner(source.labels, source.image_shape, settings)
    constants = {"images": pack_on_host(source.images), "tables": planner.tables()}
    make = jax.jit(partial(make_batch, planner=planner))
    return [jax.device_get(make(constants, planner.step(step))) for step in range(3)]


def pairs(clean: TrainBatch, mixed: TrainBatch) -> TrainBatch:
    """By hand: row by row the clean one and the mixed one."""

    def woven(first, second):
        return np.stack([row for both in zip(first, second, strict=True) for row in both])

    return TrainBatch(
        tuple(woven(a, b) for a, b in zip(clean.views, mixed.views, strict=True)),
        woven(clean.labels, mixed.labels),
        woven(clean.labels, mixed.other_labels),
        woven(np.ones_like(mixed.mix_weight), mixed.mix_weight),
    )


@pytest.mark.integration
@pytest.mark.parametrize(("batches", "rule"), [(host_batches, "cutmix"), (device_batches, "mixup")])
def test_each_image_is_there_clean_and_then_mixed(batches, rule: str) -> None:
    """The same images and the same mixture as without, whatever the rule; every view twice."""
    mix = {"alpha": 10.0, "rule": rule}
    found = batches(MixSettings(**mix, regmixup=True))
    clean, mixed = batches(NO_MIXING), batches(MixSettings(**mix))
    assert_equal(found, [pairs(*each) for each in zip(clean, mixed, strict=True)])
    assert found[0].labels.shape == (16,) and (found[0].mix_weight[::2] == 1).all()
    assert (found[0].mix_weight[1::2] < 1).all()


@pytest.mark.slow
@pytest.mark.integration
def test_hosts_and_devices_have_both_of_each_of_their_images() -> None:
    mix = MixSettings(alpha=10.0, regmixup=True, groups=2)
    parts = [host_batches(mix, Host(index, 2)) for index in range(2)]
    assert_equal(join(parts), host_batches(mix))
    assert all((batch.mix_weight[::2] == 1).all() for part in parts for batch in part)


@pytest.mark.integration
def test_images_of_the_networks_type() -> None:
    assert host_batches(REGMIXUP, dtype="bfloat16")[0].images.dtype.name == "bfloat16"


def test_the_loss_is_half_the_sum_of_the_papers_two() -> None:
    """A slow twin: means over the clean and over the mixed rows, two labels each."""
    clean, mixed = tiny_network.batch(6, 1, views=1), tiny_network.batch(6, 1, views=1)
    random = np.random.default_rng(0)
    clean = clean._replace(views=(random.normal(size=(6, 1, 5)),))
    mixed = mixed._replace(views=(random.normal(size=(6, 1, 5)),))
    both = pairs(clean, mixed)
    context = Context(tiny_network.COUNTS, (1.0,))
    losses = BalPoE().loss(tiny_network.logits_as_images, {}, both, context)
    prior = np.asarray(log_prior(tiny_network.COUNTS))

    def cross_entropy(logits: np.ndarray, label: int) -> float:
        adjusted = logits + prior
        return float(np.log(np.exp(adjusted).sum()) - adjusted[label])

    of_clean = [cross_entropy(x[0], y) for x, y in zip(clean.images, clean.labels, strict=True)]
    of_mixed = [
        share * cross_entropy(x[0], y) + (1 - share) * cross_entropy(x[0], z)
        for x, y, z, share in zip(mixed.images, *mixed[1:], strict=True)
    ]
    paper = np.mean(of_clean) + np.mean(of_mixed)
    np.testing.assert_allclose(losses.total, paper / 2, rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_twice_the_rate_and_half_the_decay_make_the_steps_of_twice_the_loss() -> None:
    random = np.random.default_rng(0)
    first = second = random.normal(size=4)
    papers, ours = (make_optimizer(r, 0.9, True, d) for r, d in ((0.1, 5e-4), (0.2, 2.5e-4)))
    states = papers.init(first), ours.init(second)
    for gradient in random.normal(size=(5, 4)):
        moved, of_papers = papers.update(2 * gradient, states[0], first)
        halved, of_ours = ours.update(gradient, states[1], second)
        first, second, states = first + moved, second + halved, (of_papers, of_ours)
    np.testing.assert_allclose(second, first, rtol=1e-12)


def test_without_mixing_nothing_is_doubled() -> None:
    """As in a second phase, which mixes no images."""
    unmixed = MixSettings(regmixup=True)
    assert (unmixed.rows_per_image, REGMIXUP.rows_per_image) == (1, 2)
    assert_equal(device_batches(unmixed), device_batches(NO_MIXING))
