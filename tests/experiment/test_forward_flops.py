# SPDX-License-Identifier: Apache-2.0
"""What a prediction of one image costs, by hand and for methods that train more than experts."""

import jax
import pytest

from balpoe_jax.config import resolve
from balpoe_jax.data.datasets import published
from balpoe_jax.experiment.build import build_program
from balpoe_jax.parallel import make_parallel
from tests.helpers.config_files import get_config

pytestmark = pytest.mark.integration


def forward_flops(arguments: str, **model: str) -> int:
    config = get_config("digits_lt", arguments)
    config.model.update(**model)
    parallel = make_parallel("shard_map", jax.devices()[:1])
    return build_program(resolve(config), parallel, *published("digits", 26.0)).forward_flops


@pytest.mark.parametrize("expert_map", ["loop", "vmap"])
def test_every_expert_counts_and_the_trunk_once(expert_map: str) -> None:
    """ResNet-8 on 8 x 8 images: a shared stage, then two stages and a head an expert."""
    trunk = 8 * 8 * 9 * (3 * 16 + 2 * 16 * 16)
    layer2 = 4 * 4 * 9 * (16 * 32 + 32 * 32)
    layer3 = 2 * 2 * 9 * (32 * 64 + 64 * 64)
    found = forward_flops("experts=3", expert_map=expert_map)
    assert found == 2 * (trunk + 3 * (layer2 + layer3 + 64 * 10))


def test_projections_that_no_prediction_needs_are_free() -> None:
    assert forward_flops("method=paco") == forward_flops(
        "method=cross_entropy", classifier="linear"
    )
