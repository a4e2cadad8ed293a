# SPDX-License-Identifier: Apache-2.0
"""The precision of convolutions, as compiled and as recorded."""

import re

import jax
import pytest

from balpoe_jax.aot import examine
from balpoe_jax.config import resolve
from balpoe_jax.data.datasets import published
from balpoe_jax.errors import UserError
from balpoe_jax.experiment.build import build_program
from balpoe_jax.parallel import make_parallel
from tests.helpers.config_files import get_config


def lowered(precision: str | None, **model: str) -> tuple[str, str]:
    """What is in use, and the train step's text."""
    config = get_config("digits_lt", "method=cross_entropy")
    config.model.update(precision=precision, **model)
    parallel = make_parallel("shard_map", jax.devices()[:1])
    program = build_program(resolve(config), parallel, *published("digits", 26.0))
    batch, _ = examine.abstract_batches(program)
    return program.precision, program.map_train_step().lower(
        program.abstract_state(), batch
    ).as_text()


@pytest.mark.integration
@pytest.mark.parametrize(
    ("precision", "expected"), [(None, {"DEFAULT"}), ("tf32", {"HIGH"}), ("full", {"HIGHEST"})]
)
def test_the_step_has_the_configs_precision(precision: str | None, expected: set[str]) -> None:
    in_use, text = lowered(precision)
    assert in_use == "full"  # as ever on a CPU
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert len(convolutions) > 3 * 7 - 2  # gradients included
    found = {name for line in convolutions for name in re.findall(r"precision (\w+)>", line)}
    assert (found or {"DEFAULT"}) == expected


@pytest.mark.integration
def test_a_body_in_bfloat16_has_no_other_precision() -> None:
    assert lowered(None, dtype="bfloat16")[0] == "bfloat16"
    config = get_config("digits_lt", "")
    config.model.update(precision="full", dtype="bfloat16")
    with pytest.raises(
        UserError, match=r"needs config\.model\.dtype=float32, or must be None, got 'full'"
    ):
        resolve(config)
