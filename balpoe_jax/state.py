# SPDX-License-Identifier: Apache-2.0
"""What training changes, and how one step changes it: pure functions for a single device."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from balpoe_jax.losses import expert_losses
from balpoe_jax.models import ExpertEnsemble

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint holds; nothing random, since randomness is indexed by step.

    Attributes:
        step: int32 scalar, updates made.
        params: parameters; those of the experts are stacked `[E, ...]`.
        batch_stats: running averages of BatchNorm.
        opt_state: of the optimizer.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What the model's `apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def create_state(
    model: ExpertEnsemble, optimizer: optax.GradientTransformation, key: jax.Array, image_shape: Any
) -> TrainState:
    """A fresh state; `image_shape` is `(H, W, 3)`."""
    variables = model.init(key, jnp.zeros((1, *image_shape)), train=False)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(variables["params"]),
    )


def mixed_targets(batch: Batch, num_classes: int) -> jax.Array:
    """Label distributions float32 `[B, C]` of a batch that mixup made from pairs of examples."""
    one_hot = partial(jax.nn.one_hot, num_classes=num_classes)
    weight = batch["weight"][:, None]
    return weight * one_hot(batch["labels"]) + (1 - weight) * one_hot(batch["other_labels"])


def make_train_step(
    model: ExpertEnsemble,
    optimizer: optax.GradientTransformation,
    log_prior: jax.Array,
    taus: jax.Array,
    axis_name: str,
    sync_batch_norm: bool = True,
    accumulate: int = 1,
    skip_non_finite: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The update of one device, which must run mapped over the axis `axis_name`.

    The returned function takes the replicated state and this device's part of the batch:
    `images` float `[b, H, W, 3]`, `labels` and `other_labels` int `[b]`, `weight` float `[b]`, the
    share of `labels`. It returns the new state and metrics, equal on all devices. Pass
    `sync_batch_norm=False` for a model whose statistics are each device's own: they are averaged.

    With `accumulate=k` the part is worked off in k microbatches of `b / k` rows, one after the
    other, in a k-th of the memory for activations. The gradient is the mean of theirs, the large
    batch's, and crosses the network once. BatchNorm alone sees a difference: it normalises by the
    statistics of a microbatch (of all devices, or of this one), and the running averages take the
    mean over the k microbatches as one update, so that they forget at the same pace for any k.

    The metric `finite` tells whether the loss, the gradient and the new statistics are; of the rest
    of the new state, which an update may make overflow, `all_finite` tells, for it has to read all
    of it. With `skip_non_finite` the metric includes that, and a step that is not finite changes
    nothing but the counts of steps.
    """

    def gradients(params: Any, batch_stats: Any, batch: Batch) -> tuple[Any, tuple[jax.Array, Any]]:
        """Of a batch's mean loss; beside them the loss of each expert `[E]` and new statistics."""
        targets = mixed_targets(batch, log_prior.shape[0])

        def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            outputs, updated = model.apply(
                {"params": params, "batch_stats": batch_stats},
                batch["images"],
                train=True,
                mutable=["batch_stats"],
            )
            by_expert = expert_losses(outputs.logits, targets, log_prior, taus).mean(axis=1)
            return by_expert.mean(), (by_expert, updated["batch_stats"])

        return jax.grad(loss_fn, has_aux=True)(params)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # Without the cast, shard_map's transpose would already sum the gradients over devices.
        vary = partial(jax.lax.pcast, axis_name=axis_name, to="varying")
        grads, (by_expert, batch_stats) = _mean_over_microbatches(
            partial(gradients, vary(state.params), state.batch_stats),
            vary(optax.tree.zeros_like(state.params)),
            batch,
            accumulate,
        )
        grads, by_expert = jax.lax.pmean((grads, by_expert), axis_name)
        if not sync_batch_norm:
            batch_stats = jax.lax.pmean(batch_stats, axis_name)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(grad_norm) & all_finite((by_expert, batch_stats))
        if skip_non_finite:
            finite &= all_finite(new_state)
            new_state = _only_if(finite, new_state, state)
        metrics = {
            "loss": by_expert.mean(),
            "expert_losses": by_expert,
            "grad_norm": grad_norm,
            "finite": finite,
        }
        return new_state, metrics

    return train_step


def all_finite(tree: Any) -> jax.Array:
    """Whether no number of a tree is infinite or not a number, bool scalar."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _only_if(keep: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """The new state, or else the old one at the new one's step.

    What is an integer counts steps, of the schedule too, whose rate must stay that of the step.
    """

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(keep, new, old) if jnp.issubdtype(new.dtype, jnp.floating) else new

    return jax.tree.map(choose, new, old)


def _mean_over_microbatches(
    gradients: Callable[[Batch], tuple[Any, Any]], zeros: Any, batch: Batch, count: int
) -> tuple[Any, Any]:
    """The mean of what `gradients` returns, a large tree and a small one, over `count` cuts.

    `zeros` is like the large tree, which is summed up in place of being kept for each cut.
    """
    if count == 1:
        return gradients(batch)
    cuts = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)

    def add(total: Any, cut: Batch) -> tuple[Any, Any]:
        grads, rest = gradients(cut)
        return jax.tree.map(jnp.add, total, grads), rest

    total, rest = jax.lax.scan(add, zeros, cuts)
    return jax.tree.map(lambda x: x / count, total), jax.tree.map(lambda x: x.mean(axis=0), rest)


def make_eval_step(
    model: ExpertEnsemble, axis_name: str
) -> Callable[[dict[str, Any], Batch], dict[str, jax.Array]]:
    """The prediction of one device, which must run mapped over the axis `axis_name`.

    The returned function takes the model's variables and this device's part of the batch:
    `images`, `labels` and `mask` (False for padding). It returns the whole batch, on every
    device: `logits` `[E, B, C]`, `labels` `[B]` and `mask` `[B]`.
    """

    def eval_step(variables: dict[str, Any], batch: Batch) -> dict[str, jax.Array]:
        outputs: Any = model.apply(variables, batch["images"], train=False)
        logits = outputs.logits
        gather = partial(jax.lax.all_gather, axis_name=axis_name, tiled=True, to="invarying")
        return {
            "logits": gather(logits, axis=1),
            "labels": gather(batch["labels"], axis=0),
            "mask": gather(batch["mask"], axis=0),
        }

    return eval_step
