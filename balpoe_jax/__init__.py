# SPDX-License-Identifier: Apache-2.0
"""Balanced Product of Calibrated Experts, and long-tailed recognition, in JAX.

The parts for your own training loop are attributes, which are imported on first use:
`balpoe_jax.losses`, `balpoe_jax.models` and `balpoe_jax.metrics`. None of them needs TensorFlow.
`balpoe_jax.load(workdir)` restores a run that predicts images.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = ("losses", "metrics", "models")

if TYPE_CHECKING:
    from balpoe_jax import losses as losses
    from balpoe_jax import metrics as metrics
    from balpoe_jax import models as models
    from balpoe_jax.predictor import load as load
else:  # not for type checkers, which would believe in any attribute

    def __getattr__(name: str) -> ModuleType | Any:
        """A part of the library, imported on first use."""
        if name == "load":
            return importlib.import_module(f"{__name__}.predictor").load
        if name in _LAZY:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """All names, those of parts that are not imported yet among them."""
    return sorted({*globals(), *_LAZY, "load"})
