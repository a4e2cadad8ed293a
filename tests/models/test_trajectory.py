# SPDX-License-Identifier: Apache-2.0
"""Twelve updates of the whole method against the reference's: model, mixup, loss, SGD together."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from balpoe_jax.losses import expert_losses
from balpoe_jax.models import create_model
from balpoe_jax.optim import make_optimizer
from balpoe_jax.torch_import import convert
from tests.helpers.golden import golden
from tests.helpers.reference_weights import reference_state, to_reference, unbiased_statistics

# Networks of the reference's size run for longer than they are compiled.
pytestmark = pytest.mark.optimised


def batches(case: dict[str, np.ndarray]):
    """Images [12, 16, 32, 32, 3], labels [12, 16] and probes, drawn again from their seed."""
    random = np.random.default_rng(int(case["seed"]))
    templates = random.standard_normal((10, 32, 32, 3))
    counts = case["class_counts"]
    labels = random.choice(10, (12, 16), p=counts / counts.sum())
    noise = random.standard_normal((12, 16, 32, 32, 3))
    images = np.round((0.6 * templates[labels] + 0.8 * noise) * 16) / 16
    assert zlib.crc32(images.astype(np.float32).tobytes()) == case["x_crc32"]
    random.beta(0.8, 0.8, 12)  # the stored coefficients and permutations come from here
    for _ in range(12):
        random.permutation(16)
    noise = random.standard_normal((12, 32, 32, 3))
    probes = np.round((0.6 * templates[np.arange(12) % 10] + 0.8 * noise) * 16) / 16
    return images, labels, probes


@pytest.mark.slow  # `make test` compares logits, losses and updates one by one
@pytest.mark.usefixtures("optimised_programs")
def test_twelve_updates_are_the_references(x64) -> None:
    case = golden("trajectory")
    images, labels, probes = batches(case)
    state = reference_state(num_classes=10, num_experts=3, stage_sizes=(1, 1, 1))
    model = create_model("resnet8", num_classes=10, num_experts=3)
    variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), convert(state))
    params, stats = variables["params"], variables["batch_stats"]
    optimizer = make_optimizer(
        float(case["lr"]), float(case["momentum"]), True, float(case["weight_decay"])
    )
    opt_state = optimizer.init(params)
    prior = jnp.log(case["class_counts"] / case["class_counts"].sum() + 1e-9)

    @jax.jit
    def update(params, stats, opt_state, images, targets):
        def loss_fn(params):
            outputs, updated = model.apply(
                {"params": params, "batch_stats": stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            losses = expert_losses(outputs.logits, targets, prior, case["taus"]).mean(axis=1)
            return losses.mean(), (losses, updated["batch_stats"])

        (_, (losses, new_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        norms = optax.tree.norm(grads), optax.tree.norm(params)
        return params, new_stats, opt_state, losses, norms

    for i in range(12):
        share, partners = case["lam"][i], case["perm"][i]
        one_hot = np.eye(10)[labels[i]]
        mixed = share * images[i] + (1 - share) * images[i][partners]
        targets = share * one_hot + (1 - share) * one_hot[partners]
        old = to_reference(stats)
        params, stats, opt_state, losses, norms = update(
            params, stats, opt_state, jnp.asarray(mixed), jnp.asarray(targets)
        )
        # PyTorch's running variances are larger by n / (n - 1); they reach only the evaluation.
        unbiased = unbiased_statistics(old, to_reference(stats), images[i].shape)
        state_now = {**state, **to_reference(params), **unbiased}
        stats = jax.tree.map(jnp.asarray, convert(state_now)["batch_stats"])
        np.testing.assert_allclose(losses, case["expert_losses_f64"][i], atol=1e-7)
        np.testing.assert_allclose(losses.mean(), case["losses_f64"][i], atol=1e-7)
        np.testing.assert_allclose(norms[0], case["grad_norms_f64"][i], rtol=1e-7)
        np.testing.assert_allclose(norms[1], case["param_norms_f64"][i], rtol=1e-7)

    final = {**to_reference(params), **to_reference(stats)}
    for name, expected in golden("trajectory/final").items():
        np.testing.assert_allclose(final[name.removesuffix("_f64")], expected, atol=1e-6)
    logits = model.apply({"params": params, "batch_stats": stats}, jnp.asarray(probes), train=False)
    np.testing.assert_allclose(logits.logits, case["probe_logits_final_f64"], atol=1e-6)
