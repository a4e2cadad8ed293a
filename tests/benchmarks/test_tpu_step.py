# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the step compiled for a TPU; without the TPU compiler, what it compiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balpoe_jax.aot import examine
from balpoe_jax.config import resolve
from balpoe_jax.data.datasets import published
from balpoe_jax.experiment.build import build_program
from balpoe_jax.flops import count_flops
from balpoe_jax.parallel import make_parallel
from benchmarks import flax_imagenet, tpu_step
from tests.helpers.compilers import needs_libtpu
from tests.helpers.config_files import get_config

pytestmark = pytest.mark.integration


@pytest.mark.slow
def test_both_steps_do_the_same_work() -> None:
    """One expert is a ResNet-50, to the operation, on the same batch."""
    step, arguments = flax_imagenet.abstract_step(jax.devices()[:4], 8)
    assert sum(x.size for x in jax.tree.leaves(arguments[0].params)) == 25_557_032
    config = tpu_step.our_config(num_experts=1, batch_size=8)
    assert config == _with_benchmark_settings(get_config("imagenet_lt", "experts=1,batch_size=8"))
    counts, image_shape = published("imagenet_lt", config.data.imbalance_ratio, 224)
    parallel = make_parallel("shard_map", jax.devices()[:4])
    program = build_program(resolve(config), parallel, counts, image_shape)
    batch, _ = examine.abstract_batches(program)
    ours = count_flops(program.map_train_step(), program.abstract_state(), batch)
    assert ours == count_flops(step, *arguments)
    assert ours / 2 == pytest.approx(3 * 2 * 4.09e9, rel=0.01)  # two images a device


def _with_benchmark_settings(config):
    config.model.dtype = "bfloat16"
    config.parallel.sync_batch_norm = False
    return config


@pytest.mark.slow
def test_the_example_learns() -> None:
    """A step that were not one would be nothing to compare with."""
    step, arguments = flax_imagenet.abstract_step(jax.devices()[:2], 4, 16, (1,))
    # Its schedule counts steps by itself, and is at its largest rate after a thousand.
    state, batch = jax.tree.map(
        lambda x: jnp.full(x.shape, 1000 if x.dtype == jnp.int32 else 0.01, x.dtype), arguments
    )
    batch["labels"] = jnp.full(4, 7)
    losses = []
    for _ in range(4):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(1000), abs=0.05)
    assert losses[-1] < losses[0] - 0.1
    assert (int(state.step), float(metrics["accuracy"])) == (1004, 1.0)


@needs_libtpu
def test_steps_side_by_side() -> None:
    """Tiny networks, for a slice of four chips."""
    config = get_config("digits_lt", "method=cross_entropy")
    config.parallel.sync_batch_norm = False
    found = dict(tpu_step.compare({"ours": config}, "v5e:2x2", image_size=8, stage_sizes=(1,)))
    theirs, ours = found.values()
    assert ours["cycles_ratio"] == ours["cycles"] / theirs["cycles"] > 0
    assert theirs["memory"]["arguments"] > 0
    (reduced,) = ours["collectives"]
    assert (reduced["kind"], reduced["count"]) == ("all-reduce", 1)
    header, *rows = tpu_step.tables.as_text(tpu_step.table(found), 110).splitlines()
    assert header.split()[0] == "Mcycles"
    assert [row.split()[-1] for row in rows] == ["-", f"{ours['flops_ratio']:.4g}"]
