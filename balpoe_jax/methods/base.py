# SPDX-License-Identifier: Apache-2.0
"""The seam between a method and the rest of a training; `docs/methods.md` is its page.

A method is a frozen dataclass whose fields are its hyper-parameters. Its functions return the
network to train, the state that it keeps next to the parameters, the losses of its phases, and its
predictions. All are pure functions for one device. `step.py` makes the step of them, and nothing
else in the package depends on which method it is.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
import numpy.typing as npt
import optax
from flax import linen as nn

from balpoe_jax.data.types import TrainBatch
from balpoe_jax.models import ExpertEnsemble, Outputs
from balpoe_jax.setting import Section, described, setting


def epochs(default: int, about: str, least: float = 0, most: float = 1e6) -> Any:
    """A hyper-parameter that counts epochs, and scales with the length of the training.

    Args:
        default: Number of epochs in a training of the preset's own length; 0 stays 0.
        about: Sentence that begins with a noun, as for `setting`.
        least: Least valid value.
        most: Greatest valid value.
    """
    return setting(default, about, least, most, scales=True)


def scaled_fields(method: "type[Method]") -> tuple[str, ...]:
    """The names of a method's hyper-parameters that `epochs` has made."""
    return tuple(field.name for field, about in described(method) if about.scales)


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """All that a method knows of its run: constants of the compiled step, and the step itself.

    Attributes:
        class_counts: Training images of each class, int64 `[C]`.
        taus: Taus of the experts, for methods whose experts have any.
        scale: Scale of the cosine classifier; 1 for a linear one.
        batch_size: Size of the global batch, in rows.
        steps_per_epoch: Number of updates in an epoch of this phase.
        first_step: Number of updates made before this phase.
        axis_name: Mapped axis over which a batch is shared; None outside of one.
        sync_batch_norm: Whether BatchNorm takes its statistics over that axis.
        teacher: Network of `Method.teacher_run`, with its variables within a step and their shapes
            outside of one; None without a teacher.
        step: Number of updates made so far, a traced int32 scalar within a step, see `at`; 0
            outside of one.
    """

    class_counts: npt.NDArray[np.int64]
    taus: tuple[float, ...] = ()
    scale: float = 1.0
    batch_size: int = 1
    steps_per_epoch: int = 1
    first_step: int = 0
    axis_name: str | None = None
    sync_batch_norm: bool = True
    teacher: "Network | None" = None
    step: jax.Array | int = 0

    @property
    def num_classes(self) -> int:
        """Number of classes, `C`."""
        return len(self.class_counts)

    def at(self, step: jax.Array | int, teacher: Mapping[str, Any] | None = None) -> "Context":
        """The context of the update that follows `step` updates.

        Args:
            step: Number of updates made so far.
            teacher: Variables of the teacher, `params` and `batch_stats`, where there is one.
        """
        network = self.teacher
        if network is not None and teacher is not None:
            network = dataclasses.replace(network, **teacher)
        return dataclasses.replace(self, step=step, teacher=network)

    @property
    def epoch(self) -> Any:
        """The epoch of this phase, counted from 0; traced if the step is."""
        return (self.step - self.first_step) // self.steps_per_epoch

    @property
    def is_first_step_of_epoch(self) -> Any:
        """Whether an epoch of this phase begins with the step; traced if the step is."""
        return (self.step - self.first_step) % self.steps_per_epoch == 0

    @property
    def batch_norm_axis(self) -> str | None:
        """The mapped axis over which BatchNorm takes its statistics; None for a device's own."""
        return self.axis_name if self.sync_batch_norm else None

    def gather(self, rows: jax.Array) -> jax.Array:
        """The rows of all devices in the order of the global batch, differentiable.

        A loss of the whole batch is computed from gathered rows, with equal results on all devices.
        The step takes the mean of gradients over devices, which is then the gradient of the whole
        batch. Do not differentiate sums over devices (`psum`): pmap and shard_map give different
        gradients.
        """
        if self.axis_name is None:
            return rows
        return jax.lax.all_gather(rows, self.axis_name, tiled=True)

    def gather_state(self, rows: jax.Array) -> jax.Array:
        """Like `gather`, for the method state: no gradient, and marked as equal on all devices."""
        rows = jax.lax.stop_gradient(rows)
        if self.axis_name is None:
            return rows
        return jax.lax.all_gather(rows, self.axis_name, tiled=True, to="invarying")

    def mean_over_devices(self, tree: Any) -> Any:
        """The mean over devices of a tree without gradients, such as each device's statistics."""
        return tree if self.axis_name is None else jax.lax.pmean(tree, self.axis_name)


@dataclasses.dataclass(frozen=True)
class Network:
    """A module and the variables to apply it with.

    Attributes:
        module: Module that `Method.network` returned.
        params: Parameters of the module.
        batch_stats: Running averages of BatchNorm.
    """

    module: nn.Module
    params: Any
    batch_stats: Any

    def __call__(self, images: jax.Array, train: bool = True) -> tuple[Any, Any]:
        """Outputs for images `[b, H, W, 3]`, and BatchNorm's averages, updated if `train`."""
        variables = {"params": self.params, "batch_stats": self.batch_stats}
        if not train:
            return self.module.apply(variables, images, train=False), self.batch_stats
        outputs, updated = self.module.apply(variables, images, train=True, mutable=["batch_stats"])
        return outputs, updated["batch_stats"]


class Losses(NamedTuple):
    """The result of a loss function.

    Attributes:
        total: Scalar to minimise: the mean over this device's rows, or the loss of the whole batch
            (from `Context.gather`), equal on all devices.
        by_expert: Loss of each expert for the log, float `[E]`.
        batch_stats: Running averages of BatchNorm after the step.
        method_state: Method state after the step, equal on all devices.
        terms: Further scalars for the log, by name.
    """

    total: jax.Array
    by_expert: jax.Array
    batch_stats: Any
    method_state: Any
    terms: Mapping[str, jax.Array] = {}


class Prediction(NamedTuple):
    """The prediction for a batch.

    Attributes:
        logits: Logits of each expert, float `[E, B, C]`.
        ensemble: Logits of the ensemble, float `[B, C]`; None for the mean of `logits`.
        experts_used: Number of experts that the ensemble used, float `[B]`; None for all.
    """

    logits: jax.Array
    ensemble: jax.Array | None = None
    experts_used: jax.Array | None = None


LossFunction = Callable[[Network, Any, TrainBatch, Context], Losses]


def _everything(path: str) -> bool:
    return True


def _as_it_is(optimizer: optax.GradientTransformation, params: Any) -> optax.GradientTransformation:
    return optimizer


def _as_they_are(params: Any, key: jax.Array, context: Context) -> Any:
    return params


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a training with its own loss.

    Attributes:
        name: Name for the log.
        loss: Function of the network, the method state, this device's rows of the batch and the
            context of the step.
        trainable: Function of the path of a parameter, such as `expert/head/kernel`, that returns
            whether it learns. The others are frozen: no gradient, no weight decay, the same bits.
        transform: Function of the config's optimizer and the shapes of the parameters that returns
            the optimizer of this phase. Its state must have the same structure, which is that of
            all phases and of every checkpoint; `optim.followed_by` keeps it. Frozen parameters stay
            frozen, whatever it does.
        begin: Function of the parameters, a random key and the context that returns the parameters
            with which this phase begins, where it is not the first one. The key depends on the
            seed and the phase alone.
    """

    name: str
    loss: LossFunction
    trainable: Callable[[str], bool] = _everything
    transform: Callable[[optax.GradientTransformation, Any], optax.GradientTransformation] = (
        _as_it_is
    )
    begin: Callable[[Any, jax.Array, Context], Any] = _as_they_are

    @property
    def is_plain(self) -> bool:
        """Whether it keeps the parameters and the config's own optimizer."""
        return self.transform is _as_it_is and self.begin is _as_they_are


class Method(Section):
    """The base class of methods, with defaults for what most of them do.

    Attributes:
        views: Number of differently augmented views of an image in a batch.
        supports_mixing: Whether its loss uses the second label of a mixed image.
        mixed_views: Number of the views that are mixed, if any is.
        needs_global_batch: Whether the loss is no mean over rows, or the method keeps a state, so
            that a batch cannot be split into microbatches.

    Raises:
        UserError (a `ValueError`): a hyper-parameter out of its range.
    """

    path = "method."

    @property
    def name(self) -> str:
        """The value of `config.method.name` for this class."""
        return type(self).__name__.lower()

    views: ClassVar[int] = 1
    supports_mixing: ClassVar[bool] = True
    mixed_views: ClassVar[int] = 1
    needs_global_batch: ClassVar[bool] = False

    @property
    def teacher_run(self) -> str:
        """Workdir of the trained run that is `Context.teacher`; empty for none."""
        return ""

    def expert_taus(self, taus: tuple[float, ...]) -> tuple[float | None, ...]:
        """The tau of each expert's loss, for reports; None for a loss without one.

        Args:
            taus: Taus of the config, one for each expert.
        """
        return (None,) * len(taus)

    def network(self, ensemble: ExpertEnsemble, context: Context) -> nn.Module:
        """The module to train: the ensemble, or a module around it that returns more."""
        return ensemble

    def init_state(self, network: Network, context: Context, key: jax.Array) -> Any:
        """The method state before the first step: a tree of arrays without gradients."""
        return {}

    def on_step_start(self, method_state: Any, params: Any, context: Context) -> Any:
        """The method state at the start of a step, such as a moving average of parameters."""
        return method_state

    def loss(
        self, network: Network, method_state: Any, batch: TrainBatch, context: Context
    ) -> Losses:
        """The loss of the first phase; arguments as `Phase.loss` has them."""
        raise NotImplementedError

    def phases(self) -> tuple[Phase, ...]:
        """All phases that a config may ask for, in order."""
        return (Phase("training", self.loss),)

    def predict(self, outputs: Outputs, params: Any, context: Context) -> Prediction:
        """The prediction from the network's outputs; by default their mean logits."""
        return Prediction(outputs.logits)


class ExpertLosses(Method):
    """The base class of methods that are only a loss for each expert and row.

    They write `expert_losses`; the total is the mean over experts of the means over rows.

    Attributes:
        total: "mean" over experts, or their "sum".
    """

    total: ClassVar[str] = "mean"

    def expert_losses(self, logits: jax.Array, batch: TrainBatch, context: Context) -> jax.Array:
        """The losses of the first phase, float `[E, b]`.

        Args:
            logits: Logits of this device's rows, float `[E, b, C]`.
            batch: Rows of this device.
            context: Context of the step.
        """
        raise NotImplementedError

    def expert_means(self, losses: jax.Array, batch: TrainBatch, context: Context) -> jax.Array:
        """Each expert's loss float `[E]` from those of this device's rows, float `[E, b]`."""
        return losses.mean(axis=1)

    def loss(
        self, network: Network, method_state: Any, batch: TrainBatch, context: Context
    ) -> Losses:
        """The mean or the sum over experts of `expert_means`."""
        return self.loss_of(self.expert_losses, network, method_state, batch, context)

    def loss_of(
        self,
        expert_losses: Callable[[jax.Array, TrainBatch, Context], jax.Array],
        network: Network,
        method_state: Any,
        batch: TrainBatch,
        context: Context,
        train: bool = True,
    ) -> Losses:
        """The loss of a phase with other losses for each expert and row.

        Args:
            expert_losses: Function like the method of that name.
            network: Network to apply.
            method_state: State, which does not change.
            batch: Rows of this device.
            context: Context of the step.
            train: Whether BatchNorm uses the batch's statistics, or its averages as in a test.
        """
        outputs, batch_stats = network(batch.images, train)
        losses = expert_losses(outputs.logits, batch, context)
        by_expert = self.expert_means(losses, batch, context)
        total = by_expert.mean() if self.total == "mean" else by_expert.sum()
        return Losses(total, by_expert, batch_stats, method_state)


def map_by_path(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """A tree of `function(path, leaf)` for each leaf, with paths such as `expert/head/kernel`."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: function("/".join(key.key for key in keys), leaf), tree
    )


def mix_losses(batch: TrainBatch, loss: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The losses of a mixed batch, each row's two labels weighted by their shares.

    It is for losses that are not linear in the label, for which `soft_labels` give another result.

    Args:
        batch: Batch, whose labels and shares are used.
        loss: Function from labels `[B]` to losses `[..., B]`.
    """
    first, second = loss(batch.labels), loss(batch.other_labels)
    weight = batch.mix_weight.reshape((1,) * (first.ndim - 1) + batch.mix_weight.shape)
    return weight * first + (1 - weight) * second


def soft_labels(batch: TrainBatch, num_classes: int) -> jax.Array:
    """Label distributions float32 `[B, C]` of a mixed batch, from each row's two labels."""
    one_hot = partial(jax.nn.one_hot, num_classes=num_classes)
    weight = batch.mix_weight[:, None]
    return weight * one_hot(batch.labels) + (1 - weight) * one_hot(batch.other_labels)
