# SPDX-License-Identifier: Apache-2.0
"""Templates of a new method's file and of its test."""

import keyword
import re

from balpoe_jax.errors import UserError

_LONGEST = 24  # characters of a name; longer ones make lines of the templates too long

_METHOD = '''# SPDX-License-Identifier: Apache-2.0
"""@CLASS@: say in one sentence what it does (and whose paper it is from).

Say here which formulas it follows, and where it differs on purpose.
"""

import dataclasses

import jax
import jax.numpy as jnp

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.losses import expert_losses, log_prior
from balpoe_jax.methods.base import Context, ExpertLosses, soft_labels
from balpoe_jax.methods.preset import Preset
from balpoe_jax.setting import setting


@dataclasses.dataclass(frozen=True)
class @CLASS@(ExpertLosses):
    """See the module."""

    strength: float = setting(
        1.0, "Factor of the log prior that is added to the logits in training.", 0, 100
    )

    def expert_losses(self, logits: jax.Array, batch: TrainBatch, context: Context) -> jax.Array:
        """Cross-entropies of adjusted logits."""
        targets = soft_labels(batch, context.num_classes)
        taus = jnp.full(len(logits), self.strength)
        return expert_losses(logits, targets, log_prior(context.class_counts), taus)


PRESETS = {"@NAME@": Preset(@CLASS@(), "a method of ours")}
'''

_TEST = '''# SPDX-License-Identifier: Apache-2.0
"""@CLASS@: its loss is a slow twin of its formula."""

import numpy as np
import pytest

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.errors import UserError
from balpoe_jax.methods import PRESETS, Context
from balpoe_jax.methods.@NAME@ import @CLASS@

COUNTS = np.array([50, 10, 2])


def test_the_loss_is_its_twin() -> None:
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(2, 6, 3)), np.arange(6) % 3
    batch = TrainBatch((), labels, labels, np.ones(6))
    found = @CLASS@(strength=0.5).expert_losses(logits, batch, Context(COUNTS))
    for expert in range(2):
        for row, label in enumerate(labels):
            adjusted = logits[expert, row] + 0.5 * np.log(COUNTS / COUNTS.sum())
            expected = np.log(np.exp(adjusted).sum()) - adjusted[label]
            np.testing.assert_allclose(found[expert, row], expected, rtol=1e-5)


def test_it_is_a_method_by_its_name() -> None:
    assert PRESETS["@NAME@"].method == @CLASS@()


def test_a_strength_that_is_not_valid() -> None:
    with pytest.raises(UserError, match=r"config.method.strength must be from 0 to 100, got -1"):
        @CLASS@(strength=-1.0)
'''


def class_name(name: str) -> str:
    """The name of a method's class: `my_method` -> `MyMethod`."""
    return "".join(part.capitalize() for part in name.split("_"))


def check_name(name: str) -> None:
    """Raises an error unless a name can be that of a method's file.

    Raises:
        UserError (a `ValueError`): a name that is no lower-case identifier, or too long.
    """
    valid = re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) and not keyword.iskeyword(name)
    if not valid or len(name) > _LONGEST:
        raise UserError(
            f"Expected a name of at most {_LONGEST} lower-case letters, digits and underscores "
            f"that begins with a letter and is no word of Python, got {name!r}; choose such a name."
        )


def text_of_method(name: str) -> str:
    """The text of `balpoe_jax/methods/NAME.py`."""
    return _fill(_METHOD, name)


def text_of_test(name: str) -> str:
    """The text of `tests/methods/test_NAME.py`."""
    return _fill(_TEST, name)


def _fill(template: str, name: str) -> str:
    return template.replace("@NAME@", name).replace("@CLASS@", class_name(name))
