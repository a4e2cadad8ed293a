# SPDX-License-Identifier: Apache-2.0
"""What training changes, and how one step changes it: pure functions for a single device."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from balpoe_jax.averages import WeightAverage
from balpoe_jax.data.types import EvalBatch, TrainBatch
from balpoe_jax.methods.base import (
    Context,
    Losses,
    Method,
    Network,
    Phase,
    Prediction,
    map_by_path,
)
from balpoe_jax.models.layers import BATCH_NORM_MOMENTUM
from balpoe_jax.one_vector import join
from balpoe_jax.optim import followed_by

Metrics = dict[str, Any]

# Keeps a gradient of zeros from becoming none, as SAM's implementations do.
_TINY = 1e-12


class TrainState(flax.struct.PyTreeNode):
    """Everything that a checkpoint holds; nothing random, since randomness is indexed by step.

    Attributes:
        step: Number of updates made, int32 scalar.
        params: Parameters; those of the experts are stacked `[E, ...]`.
        batch_stats: Running averages of BatchNorm.
        opt_state: State of the optimizer.
        method_state: what a method keeps beside them, see `balpoe_jax.methods`; most keep nothing.
        averages: Averaged weights, see `balpoe_jax.averages`; None without any.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    method_state: Any = flax.struct.field(default_factory=dict)
    averages: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """What the model's `apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def create_state(
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    image_shape: Any,
    init_method_state: Callable[[Network, jax.Array], Any] | None = None,
    average: WeightAverage | None = None,
    begin_with: Callable[[Any], Any] | None = None,
) -> TrainState:
    """A fresh state; `image_shape` is `(H, W, 3)` and `init_method_state` a method's.

    With an `average` of the weights it holds one, which begins with them. A function `begin_with`
    makes the variables that are begun with of the random ones, such as pretrained ones.
    """
    variables = network.init(key, jnp.zeros((1, *image_shape)), train=False)
    if begin_with is not None:
        variables = begin_with(variables)
    params, batch_stats = variables["params"], variables["batch_stats"]
    method_state = {}
    if init_method_state is not None:
        method_state = init_method_state(
            Network(network, params, batch_stats), jax.random.fold_in(key, 1)
        )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        method_state=method_state,
        averages=None if average is None else average.start(params, batch_stats),
    )


def make_train_step(
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    method: Method,
    context: Context,
    phase: int = 0,
    accumulate: int = 1,
    skip_non_finite: bool = False,
    as_one_vector: bool = False,
    sam_radius: float = 0.0,
    average: WeightAverage | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The update of one device, which must run mapped over the axis `context.axis_name`.

    The returned function takes the replicated state, this device's part of a batch, and the
    constants of the run: a teacher's variables as "teacher", or nothing. It returns the new state
    and metrics, equal on all devices. With `context.sync_batch_norm=False` the model's statistics
    are each device's own: they are averaged.

    With `accumulate=k` the part is worked off in k microbatches of `b / k` rows, one after the
    other, in a k-th of the memory for activations. The gradient is the mean of theirs, the large
    batch's, and crosses the network once. BatchNorm alone sees a difference: it normalises by the
    statistics of a microbatch (of all devices, or of this one), and the running averages take the
    mean over the k microbatches as one update, so that they forget at the same pace for any k.

    With a `sam_radius` the gradient is SAM's (Foret et al., ICLR 2021): that of the same batch, but
    at the weights which lie that far from the current ones in the direction of the gradient there.
    Both gradients are the global batch's, over all devices and microbatches (no "m-sharpness"), and
    weight decay is in neither. As in the authors' code (google-research/sam) the first pass alone
    changes BatchNorm's running averages, and the method state; what is shown is its loss, too, and
    the norm of the second gradient.

    The metric `finite` tells whether the loss, the gradient and the new statistics are; of the rest
    of the new state, which an update may make overflow, `all_finite` tells, for it has to read all
    of it. With `skip_non_finite` the metric includes that, and a step that is not finite changes
    nothing but the counts of steps.

    Args:
        network: Module that `method.network` returned.
        optimizer: Optimizer of the config, which the phase may transform, see `phase_optimizer`.
        method: Method whose loss it is.
        context: Constants of the run and the phase.
        phase: Position in `method.phases()`.
        accumulate: Number of microbatches, see above; 1 for a method that wants the whole batch.
        skip_non_finite: Whether a step that is not finite is left out, see above.
        as_one_vector: whether the gradient's norm and `finite` are taken of all numbers at once,
            see `one_vector`; the optimizer has a setting of its own.
        sam_radius: Length of SAM's way in the space of the parameters; 0 for none.
        average: Average of the weights that the state keeps; it takes those after each step,
            whether the step was left out or not. None for none.
    """
    gathered = join if as_one_vector else lambda tree: tree
    described = method.phases()[phase]
    optimizer = phase_optimizer(optimizer, described)
    axis_name = str(context.axis_name)

    def train_step(
        state: TrainState, batch: TrainBatch, constants: Mapping[str, Any] | None = None
    ) -> tuple[TrainState, Metrics]:
        # Without the cast, shard_map's transpose would already sum the gradients over devices.
        vary = partial(jax.lax.pcast, axis_name=axis_name, to="varying")
        now = context.at(state.step, (constants or {}).get("teacher"))
        method_state = method.on_step_start(state.method_state, state.params, now)

        def gradients(params: Any, batch: TrainBatch) -> tuple[Any, Losses]:
            """Of a batch's loss, and beside them the rest of what the loss function returns."""

            def loss_fn(params: Any) -> tuple[jax.Array, Losses]:
                params = _freeze(params, described.trainable)
                losses = described.loss(
                    Network(network, params, state.batch_stats), method_state, batch, now
                )
                return losses.total, losses

            return jax.grad(loss_fn, has_aux=True)(vary(params))

        def gradients_at(params: Any) -> tuple[Any, Losses]:
            """Of this device's rows."""
            zeros = vary(optax.tree.zeros_like(params))
            return _mean_over_microbatches(partial(gradients, params), zeros, batch, accumulate)

        grads, losses = gradients_at(state.params)
        grads, shown = jax.lax.pmean(
            (grads, (losses.total, losses.by_expert, losses.terms)), axis_name
        )
        batch_stats = losses.batch_stats
        if not context.sync_batch_norm:
            batch_stats = jax.lax.pmean(batch_stats, axis_name)
        if sam_radius:
            length = sam_radius / (optax.tree.norm(gathered(grads)) + _TINY)
            perturbed = optax.tree.add_scale(state.params, length, grads)
            grads = jax.lax.pmean(gradients_at(perturbed)[0], axis_name)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
            method_state=losses.method_state,
            averages=state.averages,
        )
        grad_norm = optax.tree.norm(gathered(grads))
        finite = jnp.isfinite(grad_norm) & all_finite(gathered((shown, batch_stats)))
        if skip_non_finite:
            finite &= all_finite(gathered(new_state))
            new_state = _only_if(finite, new_state, state)
        if average is not None:
            averages = average.update(
                state.averages,
                new_state.params,
                new_state.batch_stats,
                new_state.step - context.first_step,
                context.steps_per_epoch,
            )
            new_state = new_state.replace(averages=averages)
        total, by_expert, terms = shown
        metrics = {
            "loss": total,
            "expert_losses": by_expert,
            "grad_norm": grad_norm,
            "finite": finite,
            **{f"loss_{name}": value for name, value in terms.items()},
        }
        return new_state, metrics

    return train_step


def phase_optimizer(
    optimizer: optax.GradientTransformation, phase: Phase
) -> optax.GradientTransformation:
    """The optimizer of a phase: transformed by it, and without updates of what it freezes.

    Args:
        optimizer: Optimizer that the config describes, whose state's structure is kept.
        phase: Phase of the method.
    """

    def transformed(params: Any) -> optax.GradientTransformation:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        return phase.transform(optimizer, shapes)

    def labels(params: Any) -> Any:
        return map_by_path(lambda path, _: "learns" if phase.trainable(path) else "frozen", params)

    freeze = optax.partition({"learns": optax.identity(), "frozen": optax.set_to_zero()}, labels)

    def init(params: Any) -> Any:
        return transformed(params).init(params)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return followed_by(transformed(params), freeze).update(grads, state, params)

    return optax.GradientTransformation(init, update)


def _freeze(params: Any, trainable: Callable[[str], bool]) -> Any:
    """The parameters, without a gradient for those that do not learn."""
    return map_by_path(
        lambda path, leaf: leaf if trainable(path) else jax.lax.stop_gradient(leaf), params
    )


def all_finite(tree: Any) -> jax.Array:
    """Whether no number of a tree is infinite or not a number, bool scalar."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _only_if(keep: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """The new state, or else the old one at the new one's step.

    What is a scalar integer counts steps, of the schedule too, whose rate must stay that of the
    step.
    """

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        counts_steps = jnp.issubdtype(new.dtype, jnp.integer) and not new.ndim
        return new if counts_steps else jnp.where(keep, new, old)

    return jax.tree.map(choose, new, old)


def _mean_over_microbatches(
    gradients: Callable[[TrainBatch], tuple[Any, Any]], zeros: Any, batch: TrainBatch, count: int
) -> tuple[Any, Any]:
    """The mean of what `gradients` returns, a large tree and a small one, over `count` cuts.

    `zeros` is like the large tree, which is summed up in place of being kept for each cut.
    """
    if count == 1:
        return gradients(batch)
    cuts = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)

    def add(total: Any, cut: TrainBatch) -> tuple[Any, Any]:
        grads, rest = gradients(cut)
        return jax.tree.map(jnp.add, total, grads), rest

    total, rest = jax.lax.scan(add, zeros, cuts)
    return jax.tree.map(lambda x: x / count, total), jax.tree.map(lambda x: x.mean(axis=0), rest)


def make_predict(
    network: nn.Module, method: Method, context: Context
) -> Callable[[dict[str, Any], Any], Prediction]:
    """The prediction for images, as a pure function on one device.

    The returned function takes the network's variables and normalised images, float
    `[B, H, W, 3]`.
    """

    def predict(variables: dict[str, Any], images: Any) -> Prediction:
        outputs, _ = Network(network, variables["params"], variables["batch_stats"])(
            images, train=False
        )
        return method.predict(outputs, variables["params"], context)

    return predict


def make_eval_step(
    network: nn.Module, method: Method, context: Context
) -> Callable[[dict[str, Any], EvalBatch], dict[str, jax.Array]]:
    """The prediction of one device, which must run mapped over the axis `context.axis_name`.

    The returned function takes the network's variables and this device's part of an `EvalBatch`.
    It returns the whole batch, on every device: `logits` `[E, B, C]`, `labels` `[B]` and `mask`
    `[B]`, and of a method that does not average its experts `ensemble` `[B, C]` and perhaps
    `experts_used` `[B]`.
    """
    axis_name, predict = str(context.axis_name), make_predict(network, method, context)

    def eval_step(variables: dict[str, Any], batch: EvalBatch) -> dict[str, jax.Array]:
        predicted = predict(variables, batch.images)
        gather = partial(jax.lax.all_gather, axis_name=axis_name, tiled=True, to="invarying")
        rows = {
            "labels": batch.labels,
            "mask": batch.mask,
            "ensemble": predicted.ensemble,
            "experts_used": predicted.experts_used,
        }
        return {
            "logits": gather(predicted.logits, axis=1),
            **{name: gather(x, axis=0) for name, x in rows.items() if x is not None},
        }

    return eval_step


def make_statistics_step(
    network: nn.Module, context: Context, batches: int
) -> Callable[[dict[str, Any], TrainBatch], dict[str, Any]]:
    """One batch's share in the statistics of BatchNorm that fit given parameters.

    The returned function must run mapped over the axis `context.axis_name`. It takes and returns
    `params` and the `batch_stats` so far, which begin with zeros: the mean over all batches of the
    statistics that BatchNorm normalises by in training.

    Args:
        network: what `method.network` returned.
        context: Constants of the run.
        batches: Number of batches.
    """

    def statistics_step(carried: dict[str, Any], batch: TrainBatch) -> dict[str, Any]:
        params, so_far = carried["params"], carried["batch_stats"]
        zeros = optax.tree.zeros_like(so_far)
        _, moved = Network(network, params, zeros)(batch.images)
        if not context.sync_batch_norm:
            moved = jax.lax.pmean(moved, str(context.axis_name))
        # From zeros a running average takes this share of the batch's own statistics.
        share = 1 / ((1 - BATCH_NORM_MOMENTUM) * batches)
        return {"params": params, "batch_stats": optax.tree.add_scale(so_far, share, moved)}

    return statistics_step
