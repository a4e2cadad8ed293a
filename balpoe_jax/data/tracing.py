# SPDX-License-Identifier: Apache-2.0
"""How tf.data traces functions into graphs."""

from collections.abc import Callable
from typing import TypeVar

import tensorflow as tf

_Function = TypeVar("_Function", bound=Callable)


def no_autograph(function: _Function) -> _Function:
    """Makes `Dataset.map` trace a function without AutoGraph.

    AutoGraph rewrites the source of every function it meets, so that `if` and `for` may depend on
    tensors. Nothing here needs that: such choices are a `tf.cond` or a `tf.switch_case`. Skipping
    it saves seconds of every start, and the files of rewritten source that a killed run leaves.
    """
    return tf.autograph.experimental.do_not_convert(function)
