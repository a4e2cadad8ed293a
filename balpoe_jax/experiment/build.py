# SPDX-License-Identifier: Apache-2.0
"""What a config describes, built: data, devices, model, optimizer."""

import dataclasses
import hashlib
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import linen as nn
from ml_collections import ConfigDict

from balpoe_jax import config as config_lib
from balpoe_jax import metrics, optim, parallel
from balpoe_jax.data import datasets
from balpoe_jax.data.datasets import test_distributions
from balpoe_jax.data.datasets.types import LongTailed
from balpoe_jax.data.records.sources import ArraySource, Source
from balpoe_jax.data.settings import (
    AugmentSettings,
    MixSettings,
    TrainSettings,
    steps_per_epoch,
)
from balpoe_jax.errors import UserError
from balpoe_jax.experiment import phases
from balpoe_jax.experiment.inputs import DeviceInputs, HostInputs, Inputs, choose_pipeline
from balpoe_jax.experiment.phases import StagePlan
from balpoe_jax.methods import Facts, Method, Network, make_method
from balpoe_jax.models import CIFAR_MODELS, ExpertEnsemble, create_model
from balpoe_jax.run import multihost, teachers
from balpoe_jax.step import TrainState, create_state, make_eval_step, make_train_step

log = logging.getLogger(__name__)

# Beyond all seeds of configs.
_STAGE_SEED = 2**31

# On a CPU the drawing of initial values takes XLA 10 times as long to compile at its usual level,
# for the same bits (jaxlib 0.10.2, ResNet-8 with 3 experts: 25.5 s against 2.7).
_QUICK = {"xla_backend_optimization_level": 1}


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled for an experiment, which takes its data set's counts but not its images.

    Attributes:
        config: the resolved values, plain and immutable by convention; for the record only.
        image_shape: `(H, W, 3)`.
        parallel: the devices.
        method: how it is trained, and what it predicts.
        model: the experts.
        network: what is trained, the model or more; to be applied within `parallel`'s mapped steps.
        stages: of the training.
        taus: one for each expert, None where the method's loss has none.
        teacher: of the method's `teacher_run`; None without one.
    """

    config: dict[str, Any]
    image_shape: tuple[int, int, int]
    parallel: parallel.Parallel
    method: Method
    model: ExpertEnsemble
    network: nn.Module
    stages: tuple[StagePlan, ...]
    taus: tuple[float | None, ...]
    teacher: "Program | None"

    @property
    def facts(self) -> Facts:
        """What the method knows of the run in its first stage."""
        return self.stages[0].facts

    @property
    def total_steps(self) -> int:
        """Updates of the whole training."""
        return self.stages[-1].last_step

    def init_state(self) -> TrainState:
        """A fresh state, a function of the seed alone, on every device."""
        create = jax.jit(
            lambda seed: self._create_state(jax.random.key(seed)),
            out_shardings=self.parallel.replicated,
            compiler_options=_QUICK if jax.default_backend() == "cpu" else None,
        )
        # A NumPy value: an array of one process's device could not be spread over all processes.
        state = create(np.int32(self.config["seed"]))
        if self.teacher is None:
            return state
        variables = teachers.load(self.method.teacher_run, self.teacher.abstract_state())
        return state.replace(extra={**state.extra, "teacher": variables})

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and placement of the state, without computing one."""
        shapes = jax.eval_shape(lambda: self._create_state(jax.random.key(0)))
        placement = self.parallel.replicated
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement), shapes
        )

    def _create_state(self, key: jax.Array) -> TrainState:
        return create_state(
            self.network,
            self.stages[0].optimizer,
            key,
            self.image_shape,
            lambda network, key: self.method.init_extra(network, self.facts, key),
        )

    def begin_stage(self, stage: int, state: TrainState) -> TrainState:
        """The state at which the stage before ended, with an optimizer that starts anew."""
        init = jax.jit(self.stages[stage].optimizer.init, out_shardings=self.parallel.replicated)
        return state.replace(opt_state=init(state.params))

    def train_step(self, stage: int = 0) -> Callable[..., Any]:
        """The update of one device."""
        plan = self.stages[stage]
        step = make_train_step(
            self.network,
            plan.optimizer,
            self.method,
            plan.facts,
            plan.index,
            self.config["optim"]["accumulate"],
            self.config["optim"]["skip_non_finite"] > 0,
            saves_kernels(self.config["model"]["name"], self.parallel.platform),
        )
        return self._with_precision(step)

    def eval_step(self) -> Callable[..., Any]:
        """The prediction of one device, which takes the network's variables."""
        step = make_eval_step(self.network, self.method, self.stages[-1].facts)
        return self._with_precision(step)

    def map_train_step(self, stage: int = 0) -> Callable[..., Any]:
        """The update on all devices of a batch, which gives the state's memory to the new one."""
        return self.parallel.map_step(self.train_step(stage), donate=True)

    def map_eval_step(self) -> Callable[..., Any]:
        """The prediction on all devices of a batch."""
        return self.parallel.map_step(self.eval_step())

    def _with_precision(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The step with convolutions and products of the config's precision."""
        name = self.config["model"]["precision"]
        if name is None:
            return step

        def precise(*arguments: Any) -> Any:
            with jax.default_matmul_precision(config_lib.PRECISIONS[name]):
                return step(*arguments)

        return precise

    @property
    def eval_batch_size(self) -> int:
        """The config's, rounded up to what the devices can share; what is too much is padding."""
        devices = self.parallel.num_devices
        return -(-self.config["eval"]["batch_size"] // devices) * devices

    def rate_before(self, step: int) -> float:
        """The learning rate of the update that leads to `step`."""
        return phases.before(self.stages, step).rate_before(step)

    def epoch_at(self, step: int) -> float:
        """How many epochs `step` updates are."""
        return phases.epoch_at(self.stages, step)

    @property
    def precision(self) -> str:
        """The precision of convolutions and products: "bfloat16", "tf32" or "full"."""
        model, platform = self.config["model"], self.parallel.platform
        if platform == "cpu" or model["dtype"] != "float32":
            return "full" if model["dtype"] == "float32" else model["dtype"]
        return model["precision"] or ("tf32" if platform == "gpu" else "bfloat16")

    def resolved(self) -> dict[str, Any]:
        """What the config leaves to its defaults and the devices, as it is in use."""
        return {
            "taus": self.taus,
            "expert_map": self.model.expert_map,
            "precision": self.precision,
            "steps_per_epoch": self.facts.steps_per_epoch,
            "total_steps": self.total_steps,
        }


@dataclasses.dataclass(frozen=True)
class Experiment(Program):
    """Everything a run works with that does not change while it runs.

    Attributes:
        data: the long-tailed training set and the test set.
        targets: the class distributions that the test set is scored on.
        settings: how training batches are made in each stage.
        inputs: where batches are made, of training and of evaluation.
    """

    data: LongTailed
    targets: list[test_distributions.Target]
    settings: tuple[TrainSettings, ...]
    inputs: Inputs

    @property
    def train_settings(self) -> TrainSettings:
        """How batches are made in the first stage."""
        return self.settings[0]

    def batch_before(self, step: int) -> npt.NDArray[np.int64]:
        """Which training examples the update that leads to `step` is made from."""
        plan = phases.before(self.stages, step)
        return self.inputs.positions(plan.index, step - 1 - plan.first_step)

    def resolved(self) -> dict[str, Any]:
        """As of the program, and where batches are made."""
        return {
            **super().resolved(),
            "pipeline": self.inputs.pipeline,
            "steps_per_dispatch": self.inputs.steps_per_dispatch(0),
        }

    def data_record(self) -> dict[str, Any]:
        """What the data set turned out to be."""
        groups = metrics.shot_groups(self.data.class_counts, self.config["data"]["shot_thresholds"])
        return {
            "class_counts": self.data.class_counts,
            "counts_as_published": self.data.counts_as_published,
            "check_counts": self.config["data"]["check_counts"],
            "groups": {name: int(group.sum()) for name, group in groups._asdict().items()},
            "num_train": len(self.data.train),
            "num_test": len(self.data.test),
        }

    def shared_data(self) -> dict[str, Any]:
        """What must be the same in all processes, each of which reads data of its own."""
        data = self.data
        sources = {"train": data.train, "test": data.test, "held_out": data.held_out}
        return {
            "class_counts": data.class_counts.tolist(),
            "total_steps": self.total_steps,
            **{name: source and _digest(source) for name, source in sources.items()},
        }


def _digest(source: Source) -> str:
    """Of which examples there are, in which order, with which labels; not of their pixels."""
    which = source.keys if isinstance(source, ArraySource) else source.index.names
    digest = hashlib.sha256(source.labels.tobytes())
    digest.update(which.tobytes())
    return digest.hexdigest()


def build_together(config: ConfigDict, pipeline: str | None = None) -> Experiment:
    """Builds an experiment in every process, as `build` does.

    Args:
        config: of the experiment.
        pipeline: as for `build`.

    Raises:
        UserError (a `ValueError`): as `build` does, or data that are not the same in all processes.
    """
    experiment = build(config, pipeline)
    if multihost.count() > 1:
        multihost.check_same(
            experiment.shared_data(), "data set", "prepare the same one, in one way, on every host"
        )
    return experiment


def build(config: ConfigDict, pipeline: str | None = None) -> Experiment:
    """Builds the parts of an experiment and announces its data.

    Args:
        config: of the experiment.
        pipeline: The one in which a run's batches are made already, where the config leaves it
            open; None for a new run.

    Raises:
        UserError (a `ValueError`): a value of the config that is not valid, data that is not there
            or not as it should be, a batch that the devices cannot share.
    """
    devices = parallel.make_parallel(config.parallel.mode)
    check(config, devices)  # before the data, which may take its time
    settings = stage_settings(config)
    data = _load_data(config)
    program = build_program(config, devices, data.class_counts, data.train.image_shape)
    log.info(
        "Precision of convolutions: %s; experts: %s", program.precision, program.model.expert_map
    )
    return Experiment(
        **vars(program),
        data=data,
        targets=test_distributions.make_targets(
            data.test.labels,
            data.class_counts,
            config.eval.shift_ratios,
            data.test_names,
            config.eval.shift_lists,
        ),
        settings=settings,
        inputs=_make_inputs(config, pipeline, devices, data, settings),
    )


def build_program(
    config: ConfigDict,
    devices: parallel.Parallel,
    class_counts: npt.NDArray[np.int64],
    image_shape: tuple[int, int, int],
) -> Program:
    """Builds what is compiled for an experiment.

    Args:
        config: of the experiment.
        devices: that share a batch; they need not be this host's.
        class_counts: int `[C]`, training images of each class.
        image_shape: `(H, W, 3)` of the images that the model gets.

    Raises:
        UserError (a `ValueError`): as `check` does.
    """
    check(config, devices)
    method = make_method(config.method.to_dict())
    taus = config_lib.resolve_taus(config)
    teacher = None
    if method.teacher_run:
        teacher_config = teachers.read_config(method.teacher_run, config)
        teacher = build_program(teacher_config, devices, class_counts, image_shape)
    one_vector = saves_kernels(config.model.name, devices.platform)
    plans = _plan_stages(config, method, taus, class_counts, teacher, one_vector)
    model = _make_model(config, len(class_counts), devices)
    return Program(
        config=config.to_dict(),
        image_shape=image_shape,
        parallel=devices,
        method=method,
        model=model,
        network=method.network(model, plans[0].facts),
        stages=plans,
        taus=method.target_taus(taus),
        teacher=teacher,
    )


def _plan_stages(
    config: ConfigDict,
    method: Method,
    taus: tuple[float, ...],
    class_counts: npt.NDArray[np.int64],
    teacher: Program | None,
    as_one_vector: bool,
) -> tuple[StagePlan, ...]:
    known = None
    if teacher is not None:
        known = Network(teacher.network, **teacher.abstract_state().variables)
    plans: list[StagePlan] = []
    first_step = first_epoch = 0
    for index, stage in enumerate(_stage_configs(config)):
        rates = _learning_rates(stage)
        per_epoch = steps_per_epoch(int(class_counts.sum()), stage.batch_size)
        facts = Facts(
            class_counts=class_counts,
            taus=taus,
            scale=1.0 if config.model.classifier == "linear" else config.model.scale,
            batch_size=stage.batch_size,
            steps_per_epoch=per_epoch,
            first_step=first_step,
            axis_name=parallel.AXIS_NAME,
            sync_batch_norm=config.parallel.sync_batch_norm,
            teacher=known,
        )
        optimizer = optim.make_optimizer(
            optim.rate_of_step(rates, per_epoch),
            stage.optim.momentum,
            stage.optim.nesterov,
            stage.optim.weight_decay,
            as_one_vector,
        )
        plan = StagePlan(index, method.stages()[index].name, facts, optimizer, rates, first_epoch)
        plans.append(plan)
        first_step, first_epoch = plan.last_step, plan.last_epoch
    return tuple(plans)


def _stage_configs(config: ConfigDict) -> tuple[ConfigDict, ...]:
    """The config of each stage: the second one's section over the first one's fields, unmixed."""
    second = config.get("stage2")
    if not second or not second.epochs:
        return (config,)
    changed = config.copy_and_resolve_references()
    changed.total_epochs = second.epochs
    changed.batch_size = second.batch_size or config.batch_size
    changed.optim.update({name: second[name] for name in second if name in changed.optim})
    changed.data.update({name: second[name] for name in second if name in changed.data})
    changed.mixup.alpha = 0.0
    return config, changed


def check(config: ConfigDict, devices: parallel.Parallel) -> None:
    """Refuses what cannot be built of a config on these devices, whatever the data.

    Raises:
        UserError (a `ValueError`): a value that is not valid, or a batch that the devices cannot
            share.
    """
    config_lib.check_config(config)
    method = make_method(config.method.to_dict())
    views = 1 + sum(name in config for name in config_lib.VIEWS)
    if views != method.views:
        raise UserError(
            f"The method {config.method.name} takes {method.views} views of an image, and the "
            f"config describes {views}; choose a method by the config file's argument method=..."
        )
    if config.mixup.alpha > 0 and not method.mixes:
        raise UserError(
            f"The method {config.method.name} knows no mixed labels: config.mixup.alpha must be 0, "
            f"got {config.mixup.alpha:g}."
        )
    if method.whole_batch and config.optim.accumulate > 1:
        raise UserError(
            f"config.optim.accumulate must be 1 for the method {config.method.name}, whose loss is "
            f"one of the whole batch, got {config.optim.accumulate}."
        )
    _test_view(config)
    configs = _stage_configs(config)
    if len(configs) > len(method.stages()):
        raise UserError(
            f"config.stage2.epochs asks for a second stage, which the method {config.method.name} "
            "does not have as it is set; set it to 0 or choose another method."
        )
    for stage in configs:
        devices.check_batch_size(stage.batch_size, "batch_size", config.optim.accumulate)
        settings = _train_settings(stage, 0)
        settings.mix.check_groups(stage.batch_size, devices.num_hosts)
        _learning_rates(stage)


def _learning_rates(config: ConfigDict) -> npt.NDArray[np.float64]:
    return optim.learning_rates(
        config.total_epochs,
        config.optim.learning_rate,
        config.optim.schedule,
        config.optim.boundaries,
        config.optim.factor,
        config.optim.warmup_epochs,
        config.optim.warmup_start,
    )


def stage_settings(config: ConfigDict) -> tuple[TrainSettings, ...]:
    """How training batches are made in each stage of an experiment."""
    return tuple(_train_settings(stage, i) for i, stage in enumerate(_stage_configs(config)))


def _train_settings(config: ConfigDict, stage: int) -> TrainSettings:
    return TrainSettings(
        batch_size=config.batch_size,
        # Another stage is not to begin with the batches that the first one began with.
        seed=config.seed + stage * _STAGE_SEED,
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        augment=_augmentation(config, "augment"),
        mix=MixSettings(**config.mixup.to_dict()),
        # The network would round them first of all; here that halves what is copied and sent.
        dtype=config.model.dtype,
        views=tuple(_augmentation(config, name) for name in config_lib.VIEWS if name in config),
        sampler=config.data.sampler,
        class_run=config.data.class_run,
        other_augment=(
            _augmentation(config, config_lib.OTHER_AUGMENT)
            if config_lib.OTHER_AUGMENT in config
            else None
        ),
    )


def _augmentation(config: ConfigDict, section: str) -> AugmentSettings:
    try:
        return AugmentSettings(**config[section].to_dict())
    except UserError as error:
        raise UserError(str(error).replace("augment.", f"config.{section}.", 1)) from error


def _test_view(config: ConfigDict) -> AugmentSettings:
    name = config_lib.TEST_VIEW
    return _augmentation(config, name if name in config else "augment")


def _make_inputs(
    config: ConfigDict,
    pipeline: str | None,
    devices: parallel.Parallel,
    data: LongTailed,
    settings: tuple[TrainSettings, ...],
) -> Inputs:
    chosen = choose_pipeline(config.data.pipeline or pipeline, data, devices)
    arguments = (settings, _test_view(config), config.seed)
    steps = config.data.steps_per_dispatch
    if chosen == "device":
        assert isinstance(data.train, ArraySource)
        return DeviceInputs(devices, data.train, *arguments, steps)
    if steps not in (None, 1):
        raise UserError(
            f"config.data.steps_per_dispatch={steps} needs the device pipeline, and batches are "
            "made on the host; set config.data.pipeline=device or leave it out."
        )
    return HostInputs(devices, data, *arguments, config.data.threads)


def _load_data(config: ConfigDict) -> LongTailed:
    data = datasets.load(
        config.data.name,
        config.data.imbalance_ratio,
        config.data.data_dir,
        config.data.check_counts,
        config.data.selection_seed,
        config.eval.held_out_per_class,
        config.data.image_size,
        config.data.resize or round(config.data.image_size * 256 / 224),
        check_archive=config.data.check_archive,
    )
    counts = data.class_counts
    low, high = config.data.shot_thresholds
    groups = metrics.shot_groups(counts, (low, high))
    log.info(
        "%s: %d training images in %d classes, max %d, min %d, ratio %.1f; "
        "classes: %d many (> %d), %d medium, %d few (< %d); %d test images",
        config.data.name,
        counts.sum(),
        len(counts),
        counts.max(),
        counts.min(),
        counts.max() / counts.min(),
        groups.many.sum(),
        high,
        groups.medium.sum(),
        groups.few.sum(),
        low,
        len(data.test),
    )
    if not config.data.check_counts:
        log.info(
            "Class counts are not checked (data.check_counts=False): they are %sas published",
            "" if data.counts_as_published else "not ",
        )
    return data


def _make_model(config: ConfigDict, num_classes: int, devices: parallel.Parallel) -> ExpertEnsemble:
    expert_map = config.model.expert_map
    if expert_map == "auto":
        expert_map = auto_expert_map(config.model.name, devices.platform)
    return create_model(
        config.model.name,
        num_classes=num_classes,
        num_experts=config.model.num_experts,
        axis_name=parallel.AXIS_NAME if config.parallel.sync_batch_norm else None,
        expert_map=expert_map,
        classifier=config.model.classifier,
        scale=config.model.scale,
        reduce_dimension=config.model.reduce_dimension,
        shared_stages=None if config.model.shared_stages == -2 else config.model.shared_stages,
        dtype=jnp.dtype(config.model.dtype),
        remat=config.model.remat,
        norm_in_parts=saves_kernels(config.model.name, devices.platform),
    )


def auto_expert_map(model: str, platform: str) -> str:
    """The faster of `models.ensemble.EXPERT_MAPS`; the numbers are the same.

    Grouped convolutions, which vmap makes of the experts', fill a TPU's matrix units where one
    expert has too few channels to (ResNet-32: 13 to 16% fewer estimated cycles on v5e). Experts of
    ResNet-50 fill them alone, and lose by it (`benchmarks/README.md`). On a CPU they are slow, and
    on a GPU their gradients are (jax#13800, jax#26266): there "stacked" has them one by one. That
    was not measured on a GPU, only its kernels were counted.
    """
    if saves_kernels(model, platform):
        return "stacked"
    return "vmap" if platform == "tpu" and model in CIFAR_MODELS else "loop"


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
