# SPDX-License-Identifier: Apache-2.0
"""Functions that tf.data makes into graphs."""

from collections.abc import Callable
from typing import TypeVar

import tensorflow as tf

_Function = TypeVar("_Function", bound=Callable)


def no_autograph(function: _Function) -> _Function:
    """For `Dataset.map`: traced without AutoGraph.

    AutoGraph rewrites the source of whatever is called, so that `if` and `for` may depend on
    tensors. Nothing here does: such choices are a `tf.cond` or a `tf.switch_case`. What is spared
    are seconds of every start, and files of rewritten source, which a run that is killed leaves
    behind.
    """
    return tf.autograph.experimental.do_not_convert(function)
