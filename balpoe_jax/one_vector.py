# SPDX-License-Identifier: Apache-2.0
"""Trees of arrays as one vector, so that a GPU works on all of them in a few kernels.

A kernel for each of a hundred small parameters costs more time than the work in it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def join(tree: Any) -> jax.Array:
    """All numbers of a tree as one vector, leaf after leaf, in the widest of their dtypes."""
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def cut(vector: jax.Array, like: Any) -> Any:
    """The tree whose `join` is a vector, of the shapes and dtypes of `like`."""
    leaves, structure = jax.tree.flatten(like)
    starts = [0]
    for leaf in leaves:
        starts.append(starts[-1] + leaf.size)
    pieces = [
        # Not `split`, which would leave a kernel for each piece.
        jax.lax.slice(vector, (start,), (start + leaf.size,)).reshape(leaf.shape)
        for start, leaf in zip(starts, leaves, strict=False)
    ]
    cast = [piece.astype(leaf.dtype) for piece, leaf in zip(pieces, leaves, strict=True)]
    return jax.tree.unflatten(structure, cast)


def over_one_vector(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer whose update works on one vector; the state's tree stays `inner`'s.

    Args:
        inner: Optimizer that treats every number by itself, and whose state consists of scalars
            and of trees like the parameters.
    """

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        structure: Any = jax.tree.structure(grads)

        def is_tree(node: Any) -> bool:
            return jax.tree.structure(node) == structure

        def joined(node: Any) -> Any:
            # An operation that fuses with the join would be computed part by part.
            return jax.lax.optimization_barrier(join(node)) if is_tree(node) else node

        vectors = jax.tree.map(joined, state, is_leaf=is_tree)
        updates, new = inner.update(joined(grads), vectors, joined(params))
        # Vectors stand in the new state where trees stood in the old one.
        new_state = jax.tree.map(
            lambda old, new: cut(new, old) if is_tree(old) else new, state, new, is_leaf=is_tree
        )
        return cut(updates, grads), new_state

    return optax.GradientTransformation(inner.init, update)
