# SPDX-License-Identifier: Apache-2.0
"""Batches are a function of (seed, step), whatever the hosts, the threads or the restart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf

from balpoe_jax.data.pipeline import eval_batches, train_batches
from balpoe_jax.data.randomness import stream_seed
from balpoe_jax.data.records.sources import ArraySource
from balpoe_jax.data.settings import (
    AugmentSettings,
    Host,
    MixSettings,
    steps_per_epoch,
)
from balpoe_jax.data.types import TrainBatch
from balpoe_jax.errors import UserError
from tests.helpers.batches import (
    BATCH,
    NUM_EXAMPLES,
    PLAIN,
    assert_equal,
    join,
    make_settings,
    make_source,
    numbered_source,
    positions_of,
)

ONE_HOST = Host()


def collect(first: int, last: int, host: Host = ONE_HOST, **changes) -> list[TrainBatch]:
    return list(train_batches(make_source(), make_settings(**changes), first, last, host))


@pytest.mark.integration
def test_a_resumed_run_reads_the_same_batches() -> None:
    assert_equal(collect(0, 7)[4:], collect(4, 7))


@pytest.mark.integration
@pytest.mark.slow_cases("1", "2")
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_threads_change_nothing(threads: int) -> None:
    assert_equal(collect(0, 5, Host(threads=threads)), collect(0, 5))


@pytest.mark.integration
@pytest.mark.slow_cases("autoaugment_cifar")
@pytest.mark.parametrize("policy", ["none", "autoaugment_cifar"])
def test_hosts_make_the_same_global_batches(policy: str) -> None:
    augment = AugmentSettings(crop_padding=1, flip=True, rotation=15.0, policy=policy)
    changes = {"augment": augment, "mix": MixSettings(alpha=0.4, groups=2)}
    whole = collect(0, 4, **changes)
    parts = [collect(0, 4, Host(index, 2), **changes) for index in range(2)]
    assert_equal(whole, join(parts))


@pytest.mark.integration
def test_seeds_and_steps_differ() -> None:
    first, second = collect(0, 2)
    assert not np.array_equal(first.images, second.images)
    assert not np.array_equal(collect(0, 1, seed=4)[0].images, first.images)


def test_every_bit_of_a_seed_counts() -> None:
    """Of 62, also where a generator takes 31."""
    seeds = [0, *(1 << bit for bit in range(62))]
    found = {tuple(stream_seed(seed, "order", 0).numpy().tolist()) for seed in seeds}
    assert len(found) == len(seeds)


def test_an_epoch_is_a_permutation_that_wraps_to_its_own_start() -> None:
    source, settings = numbered_source(NUM_EXAMPLES), make_settings(**PLAIN)
    batches = list(train_batches(source, settings, 0, 6))
    epochs = [np.concatenate([positions_of(b) for b in batches[e : e + 3]]) for e in (0, 3)]
    for order in epochs:
        np.testing.assert_array_equal(np.sort(order[:NUM_EXAMPLES]), np.arange(NUM_EXAMPLES))
        np.testing.assert_array_equal(order[NUM_EXAMPLES:], order[: len(order) - NUM_EXAMPLES])
    assert not np.array_equal(*epochs)
    for batch in batches:
        np.testing.assert_array_equal(batch.labels, positions_of(batch) % 3)


def test_a_batch_larger_than_the_data_set_wraps() -> None:
    batch = next(train_batches(numbered_source(3), make_settings(**PLAIN), 0, 1))
    np.testing.assert_array_equal(positions_of(batch)[:3], positions_of(batch)[3:6])


def test_order_is_uniform() -> None:
    """Every example is as likely as any other to come first: chi-squared over 600 epochs."""
    settings = make_settings(**{**PLAIN, "batch_size": 6})
    batches = train_batches(numbered_source(6), settings, 0, 600)
    counts = np.bincount([positions_of(batch)[0] for batch in batches], minlength=6)
    assert ((counts - 100) ** 2 / 100).sum() < 20.5  # 99.9 % of chi-squared with 5 degrees


@pytest.mark.integration
def test_mixup_is_one_weight_and_one_permutation_of_the_unmixed_batch() -> None:
    plain, mixed = collect(0, 3, mix=MixSettings()), collect(0, 3)
    for before, after in zip(plain, mixed, strict=True):
        weight = after.mix_weight[0]
        assert (after.mix_weight == weight).all() and 0 <= weight <= 1
        np.testing.assert_array_equal(after.labels, before.labels)
        np.testing.assert_array_equal(np.sort(after.other_labels), np.sort(before.labels))
        # The partner of each row is the one example that explains its image.
        residual = after.images - weight * before.images
        others = (1 - weight) * before.images
        distance = np.abs(residual[:, None] - others[None]).max(axis=(2, 3, 4))
        partners = distance.argmin(axis=1)
        assert distance.min(axis=1).max() < 1e-5
        np.testing.assert_array_equal(after.other_labels, before.labels[partners])
        if weight < 0.99:
            np.testing.assert_array_equal(np.sort(partners), np.arange(BATCH))
    assert len({batch.mix_weight[0] for batch in mixed}) == 3


@pytest.mark.integration
def test_mixup_weights_follow_the_beta_distribution() -> None:
    alpha = 0.4
    settings = make_settings(**{**PLAIN, "mix": MixSettings(alpha=alpha), "batch_size": 2})
    weights = np.array([b.mix_weight[0] for b in train_batches(make_source(2), settings, 0, 2000)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(weights.mean() - 0.5) < 4 * np.sqrt(variance / 2000)
    assert abs(weights.var() - variance) < 0.01
    # P(weight < 0.01), by the Beta distribution's function: a tail that a Gaussian has not.
    assert abs((weights < 0.01).mean() - 0.0939) < 0.03


def test_mixup_groups_keep_partners_together() -> None:
    settings = make_settings(**{**PLAIN, "mix": MixSettings(alpha=5.0, groups=4)})
    source = ArraySource(
        np.zeros((NUM_EXAMPLES, 2, 2, 3), np.uint8), np.arange(NUM_EXAMPLES), np.arange(21)
    )
    for batch in train_batches(source, settings, 0, 3):
        pairs = batch.labels.reshape(4, 2), batch.other_labels.reshape(4, 2)
        np.testing.assert_array_equal(*(np.sort(pair, axis=1) for pair in pairs))


@pytest.mark.parametrize(
    ("host", "changes", "expected"),
    [
        (Host(0, 3), {}, "multiple of the 3 hosts, got 8"),
        (
            Host(0, 2),
            {"mix": MixSettings(alpha=0.4, groups=1)},
            "multiple of the number of hosts, 2; got 1",
        ),
        (Host(), {"mix": MixSettings(alpha=0.4, groups=3)}, "divide the batch size 8"),
    ],
)
def test_batches_that_hosts_cannot_share(host: Host, changes, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        collect(0, 1, host, **changes)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 21, 50])
def test_evaluation_sees_every_example_once_in_order(batch_size: int) -> None:
    source = numbered_source(NUM_EXAMPLES)
    batches = list(eval_batches(source, batch_size, (0, 0, 0), (1, 1, 1)))
    assert all(len(batch.images) == batch_size for batch in batches)
    seen = np.concatenate([positions_of(batch)[batch.mask] for batch in batches])
    np.testing.assert_array_equal(seen, np.arange(NUM_EXAMPLES))
    assert len(batches) == steps_per_epoch(NUM_EXAMPLES, batch_size)


def test_steps_of_the_published_sets() -> None:
    assert steps_per_epoch(10847, 128) == 85
    assert 85 * 128 - 10847 == 33


def test_normalisation_is_by_channel() -> None:
    source = make_source()
    batch = next(eval_batches(source, NUM_EXAMPLES, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    expected = (source.images / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.3, 0.4])
    np.testing.assert_allclose(batch.images, expected, atol=1e-5)


@pytest.mark.integration
def test_images_are_rounded_at_the_very_end() -> None:
    """As the network itself would, from the same augmented and mixed images."""
    source, normalisation = make_source(), ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    exact, rounded = collect(2, 4), collect(2, 4, dtype="bfloat16")
    exact += eval_batches(source, 4, *normalisation)
    rounded += eval_batches(source, 4, *normalisation, dtype="bfloat16")
    assert exact[0].images.dtype == np.float32
    by_hand = lambda x: x.astype(jnp.bfloat16) if x.ndim == 4 else x  # noqa: E731
    assert_equal(rounded, [jax.tree.map(by_hand, batch) for batch in exact])
    assert rounded[0].images.dtype == rounded[-1].images.dtype == jnp.bfloat16


@pytest.mark.integration
def test_nothing_is_tuned_while_it_runs(monkeypatch) -> None:
    """An iterator that tunes itself may keep a training waiting for a minute at its end."""
    given = []
    real = tf.data.Dataset.with_options

    def noting(dataset: tf.data.Dataset, options: tf.data.Options) -> tf.data.Dataset:
        given.append(options)
        return real(dataset, options)

    monkeypatch.setattr(tf.data.Dataset, "with_options", noting)
    collect(0, 1)
    (options,) = given
    assert options.autotune.enabled is False and options.deterministic is True
