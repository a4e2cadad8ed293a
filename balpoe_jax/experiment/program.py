# SPDX-License-Identifier: Apache-2.0
"""What is compiled for an experiment: network, phases, steps, and the state they begin with."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn

from balpoe_jax import parallel
from balpoe_jax.averages import WeightAverage
from balpoe_jax.config import PRECISIONS, Settings
from balpoe_jax.errors import UserError
from balpoe_jax.experiment import phases
from balpoe_jax.experiment.phases import PhasePlan
from balpoe_jax.flops import count_flops
from balpoe_jax.methods import Context, Method, Network, Phase
from balpoe_jax.models import CIFAR_MODELS, ExpertEnsemble, pretrained
from balpoe_jax.run import teachers
from balpoe_jax.step import (
    TrainState,
    create_state,
    make_eval_step,
    make_predict,
    make_statistics_step,
    make_train_step,
    phase_optimizer,
)

# On a CPU the drawing of initial values takes XLA 10 times as long to compile at its usual level,
# for the same bits (jaxlib 0.10.2, ResNet-8 with 3 experts: 25.5 s against 2.7).
_QUICK = {"xla_backend_optimization_level": 1}

# Folded into the seed's key with the number of a phase; 1 is the method state's.
_PHASE_KEYS = 1000


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled for an experiment, which takes its data set's counts but not its images.

    Attributes:
        settings: Settings of the experiment.
        image_shape: Shape of an image, `(H, W, 3)`.
        parallel: Devices that share a batch.
        method: Method by which the network is trained and predicts.
        model: Trunk and experts.
        network: Module that is trained, the model or more; for use within `parallel`'s steps.
        phases: Phases of the training.
        taus: Tau of each expert, None where the method's loss has none.
        teacher: Program of the method's `teacher_run`; None without one.
    """

    settings: Settings
    image_shape: tuple[int, int, int]
    parallel: parallel.Parallel
    method: Method
    model: ExpertEnsemble
    network: nn.Module
    phases: tuple[PhasePlan, ...]
    taus: tuple[float | None, ...]
    teacher: "Program | None"

    @property
    def context(self) -> Context:
        """What the method knows of the run in its first phase."""
        return self.phases[0].context

    @property
    def total_steps(self) -> int:
        """Updates of the whole training."""
        return self.phases[-1].last_step

    @property
    def average(self) -> WeightAverage | None:
        """The average of the weights that a state holds; None for none."""
        return self.settings.optim.average

    def read_pretrained(self) -> pretrained.Weights:
        """The weights that the config begins with; nothing for a training from scratch.

        Raises:
            UserError (a `ValueError`): a file that cannot be read, or of another network.
        """
        model, variables = self.settings.model, self.abstract_state().variables
        return pretrained.read(model.pretrained, model.name, variables) if model.pretrained else {}

    def init_state(self, weights: pretrained.Weights | None = None) -> TrainState:
        """A fresh state, a function of the seed and of pretrained weights, on every device.

        Args:
            weights: Weights of `read_pretrained`; None for random ones.
        """
        create = jax.jit(
            lambda seed, weights: self._create_state(jax.random.key(seed), weights),
            out_shardings=self.parallel.replicated,
            compiler_options=_quick(),
        )
        # A NumPy value: an array of one process's device could not be spread over all processes.
        state: TrainState = create(np.int32(self.settings.seed), weights or {})
        return state

    def load_constants(self) -> dict[str, Any]:
        """What the train step takes after the batch: a teacher's variables, or nothing.

        Raises:
            UserError (a `ValueError`): no checkpoint of the teacher, or one that does not fit.
        """
        if self.teacher is None:
            return {}
        return {"teacher": teachers.load(self.method.teacher_run, self.teacher.abstract_state())}

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and placement of the state, without computing one."""
        shapes = jax.eval_shape(lambda: self._create_state(jax.random.key(0)))
        placement = self.parallel.replicated
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement), shapes
        )

    def _create_state(
        self, key: jax.Array, weights: Mapping[str, jax.Array] | None = None
    ) -> TrainState:
        return create_state(
            self.network,
            self._optimizer(0),
            key,
            self.image_shape,
            lambda network, key: self.method.init_state(network, self.context, key),
            self.average,
            (lambda variables: pretrained.insert(variables, weights)) if weights else None,
        )

    def begin_phase(self, phase: int, state: TrainState) -> TrainState:
        """The state in which a later phase begins, of that in which the phase before ended.

        The optimizer starts afresh, with the parameters that the method's phase begins with; so
        does an average of the weights.
        """
        context, average = self.phases[phase].context, self.average

        def begin(params: Any, batch_stats: Any, seed: jax.Array) -> tuple[Any, Any, Any]:
            key = jax.random.fold_in(jax.random.key(seed), _PHASE_KEYS + phase)
            params = _begin(self.method.phases()[phase], context, params, key)
            averages = None if average is None else average.start(params, batch_stats)
            return params, self._optimizer(phase).init(params), averages

        begin = jax.jit(begin, out_shardings=self.parallel.replicated, compiler_options=_quick())
        params, opt_state, averages = begin(
            state.params, state.batch_stats, np.int32(self.settings.seed)
        )
        return state.replace(params=params, opt_state=opt_state, averages=averages)

    def _optimizer(self, phase: int) -> optax.GradientTransformation:
        return phase_optimizer(self.phases[phase].optimizer, self.method.phases()[phase])

    def check_phases(self) -> None:
        """Checks that all phases keep the structure of the state, on shapes alone.

        Raises:
            UserError (a `ValueError`): a phase whose `begin` or `transform` changes it.
        """
        if all(phase.is_plain for phase in self.method.phases()[: len(self.phases)]):
            return
        key = jax.eval_shape(lambda: jax.random.key(0))
        params = jax.eval_shape(
            lambda key: self.network.init(key, np.zeros((1, *self.image_shape)), train=False), key
        )["params"]
        for plan in self.phases:
            phase, optimizer = self.method.phases()[plan.index], self._optimizer(plan.index)
            state = jax.eval_shape(plan.optimizer.init, params)
            begun = jax.eval_shape(partial(_begin, phase, plan.context), params, key)
            _check_same(params, begun, phase.name, "begin", "the parameters")
            fresh = jax.eval_shape(optimizer.init, params)
            _check_same(state, fresh, phase.name, "transform", "the optimizer's state")
            _, after = jax.eval_shape(optimizer.update, params, state, params)
            _check_same(state, after, phase.name, "transform", "the optimizer's state")

    def train_step(self, phase: int = 0) -> Callable[..., Any]:
        """The update of one device."""
        plan = self.phases[phase]
        step = make_train_step(
            self.network,
            plan.optimizer,
            self.method,
            plan.context,
            plan.index,
            self.settings.optim.accumulation_steps,
            self.settings.optim.skip_non_finite > 0,
            saves_kernels(self.settings.model.name, self.parallel.platform),
            self.settings.optim.sam or 0.0,
            self.average,
        )
        return self._with_precision(step)

    def eval_step(self) -> Callable[..., Any]:
        """The prediction of one device, which takes the network's variables."""
        step = make_eval_step(self.network, self.method, self.phases[-1].context)
        return self._with_precision(step)

    def predict(self) -> Callable[..., Any]:
        """The prediction for images, see `step.make_predict`."""
        step = make_predict(self.network, self.method, self.phases[-1].context)
        return self._with_precision(step)

    def statistics_step(self) -> Callable[..., Any]:
        """One batch's share in BatchNorm's statistics, see `step.make_statistics_step`."""
        context = self.phases[-1].context
        step = make_statistics_step(self.network, context, context.steps_per_epoch)
        return self._with_precision(step)

    def map_train_step(self, phase: int = 0) -> Callable[..., Any]:
        """The update on all devices of a batch, which gives the state's memory to the new one.

        It takes `load_constants` as a third argument where there is a teacher.
        """
        constants = int(self.teacher is not None)
        return self.parallel.map_step(self.train_step(phase), donate=True, constants=constants)

    def map_eval_step(self) -> Callable[..., Any]:
        """The prediction on all devices of a batch."""
        return self.parallel.map_step(self.eval_step())

    def _with_precision(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The step with convolutions and products of the config's precision."""
        name = self.settings.model.precision
        if name is None:
            return step

        def precise(*arguments: Any) -> Any:
            with jax.default_matmul_precision(PRECISIONS[name]):
                return step(*arguments)

        return precise

    @cached_property
    def forward_flops(self) -> int:
        """Operations by which all experts predict one image; a multiply-add is two.

        Those of convolutions and matrix products, see `count_flops`. What only training needs, such
        as projections for contrast, does not count. Nothing is computed.
        """

        def predict(variables: Mapping[str, Any], images: jax.Array) -> Any:
            network = Network(self.network, variables["params"], variables.get("batch_stats", {}))
            outputs, _ = network(images, train=False)
            return self.method.predict(outputs, network.params, self.phases[-1].context)

        images = jax.ShapeDtypeStruct((1, *self.image_shape), np.float32)
        init = partial(self.network.init, train=False)
        variables = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)), images)
        return count_flops(predict, variables, images, only_used=True)

    @property
    def eval_batch_size(self) -> int:
        """The config's, rounded up to what the devices can share; what is too much is padding."""
        devices = self.parallel.num_devices
        return -(-self.settings.eval.batch_size // devices) * devices

    def learning_rate(self, step: int) -> float:
        """The learning rate of the update that leads to `step`."""
        return phases.phase_of(self.phases, step).learning_rate(step)

    def epoch_at(self, step: int) -> float:
        """How many epochs `step` updates are."""
        return phases.epoch_at(self.phases, step)

    @property
    def precision(self) -> str:
        """The precision of convolutions and products: "bfloat16", "tf32" or "full"."""
        model, platform = self.settings.model, self.parallel.platform
        if platform == "cpu" or model.dtype != "float32":
            return "full" if model.dtype == "float32" else model.dtype
        return model.precision or ("tf32" if platform == "gpu" else "bfloat16")

    def resolved(self) -> dict[str, Any]:
        """What the config leaves to its defaults and the devices, as it is in use."""
        return {
            "taus": self.taus,
            "expert_map": self.model.expert_map,
            "precision": self.precision,
            "steps_per_epoch": self.context.steps_per_epoch,
            "total_steps": self.total_steps,
        }


def _quick() -> dict[str, Any] | None:
    return _QUICK if jax.default_backend() == "cpu" else None


def _begin(phase: Phase, context: Context, params: Any, key: jax.Array) -> Any:
    """The parameters with which a phase begins."""
    return phase.begin(params, key, context.at(context.first_step))


def _check_same(expected: Any, found: Any, phase: str, function: str, what: str) -> None:
    shapes = [jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree) for tree in (expected, found)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"The {function} of the phase {phase!r} must keep the structure of {what}, which every "
            f"checkpoint holds: expected {_leaves(expected)}, got {_leaves(found)}; change values "
            "alone, or the updates by balpoe_jax.optim.followed_by."
        )


def _leaves(tree: Any) -> str:
    leaves = jax.tree.leaves(tree)
    return f"{len(leaves)} arrays of {sum(leaf.size for leaf in leaves)} numbers"


def saves_kernels(model: str, platform: str) -> bool:
    """Whether a step does better with fewer kernels, at the price of some more memory traffic.

    On a GPU the networks for small images do, by the counts in `benchmarks/README.md`: a kernel
    takes longer to start than to run. ResNet-50's step would move half as many bytes again. Not
    measured.
    """
    return platform == "gpu" and model in CIFAR_MODELS


def num_parameters(params: Any) -> int:
    """Trainable numbers in a tree of arrays, or of their abstract twins."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
