# SPDX-License-Identifier: Apache-2.0
"""Builds what a config describes: data, devices, model, optimizers."""

import dataclasses
import hashlib
import logging
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from ml_collections import ConfigDict

from balpoe_jax import config as config_lib
from balpoe_jax import metrics, optim, parallel
from balpoe_jax.data import datasets
from balpoe_jax.data.datasets import test_distributions
from balpoe_jax.data.datasets.types import LongTailed
from balpoe_jax.data.records.sources import ArraySource, Source
from balpoe_jax.data.settings import TrainSettings, steps_per_epoch
from balpoe_jax.errors import UserError
from balpoe_jax.experiment import phases
from balpoe_jax.experiment.inputs import DeviceInputs, HostInputs, Inputs, choose_pipeline
from balpoe_jax.experiment.phases import PhasePlan
from balpoe_jax.experiment.program import Program, saves_kernels
from balpoe_jax.experiment.settings import (
    check,
    learning_rates,
    phase_configs,
    phase_settings,
    test_view,
)
from balpoe_jax.methods import Context, Method, Network, make_method
from balpoe_jax.models import CIFAR_MODELS, ExpertEnsemble, create_model
from balpoe_jax.run import multihost, teachers

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Experiment(Program):
    """Everything a run works with that does not change while it runs.

    Attributes:
        data: the long-tailed training set and the test set.
        targets: the class distributions that the test set is scored on.
        settings: how training batches are made in each phase.
        inputs: where batches are made, of training and of evaluation.
    """

    data: LongTailed
    targets: list[test_distributions.TestDistribution]
    settings: tuple[TrainSettings, ...]
    inputs: Inputs

    @property
    def train_settings(self) -> TrainSettings:
        """How batches are made in the first phase."""
        return self.settings[0]

    def batch_indices(self, step: int) -> npt.NDArray[np.int64]:
        """Which training examples the update that leads to `step` is made from."""
        plan = phases.phase_of(self.phases, step)
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
            "verify_counts": self.config["data"]["verify_counts"],
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
    settings = phase_settings(config)
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
        UserError (a `ValueError`): as `check` does, or a method whose phases change the structure
            of the state.
    """
    check(config, devices)
    method = make_method(config.method.to_dict())
    taus = config_lib.resolve_taus(config)
    teacher = None
    if method.teacher_run:
        teacher_config = teachers.read_config(method.teacher_run, config)
        teacher = build_program(teacher_config, devices, class_counts, image_shape)
    one_vector = saves_kernels(config.model.name, devices.platform)
    plans = _plan_phases(config, method, taus, class_counts, teacher, one_vector)
    model = _make_model(config, len(class_counts), devices)
    program = Program(
        config=config.to_dict(),
        image_shape=image_shape,
        parallel=devices,
        method=method,
        model=model,
        network=method.network(model, plans[0].context),
        phases=plans,
        taus=method.expert_taus(taus),
        teacher=teacher,
    )
    program.check_phases()
    return program


def _plan_phases(
    config: ConfigDict,
    method: Method,
    taus: tuple[float, ...],
    class_counts: npt.NDArray[np.int64],
    teacher: Program | None,
    as_one_vector: bool,
) -> tuple[PhasePlan, ...]:
    known = None
    if teacher is not None:
        known = Network(teacher.network, **teacher.abstract_state().variables)
    plans: list[PhasePlan] = []
    first_step = first_epoch = 0
    for index, phase in enumerate(phase_configs(config)):
        rates = learning_rates(phase)
        per_epoch = steps_per_epoch(int(class_counts.sum()), phase.batch_size)
        context = Context(
            class_counts=class_counts,
            taus=taus,
            scale=1.0 if config.model.classifier == "linear" else config.model.classifier_scale,
            batch_size=phase.batch_size,
            steps_per_epoch=per_epoch,
            first_step=first_step,
            axis_name=parallel.AXIS_NAME,
            sync_batch_norm=config.parallel.sync_batch_norm,
            teacher=known,
        )
        optimizer = optim.make_optimizer(
            optim.rate_of_step(rates, per_epoch),
            phase.optim.momentum,
            phase.optim.nesterov,
            phase.optim.weight_decay,
            as_one_vector,
        )
        plan = PhasePlan(index, method.phases()[index].name, context, optimizer, rates, first_epoch)
        plans.append(plan)
        first_step, first_epoch = plan.last_step, plan.last_epoch
    return tuple(plans)


def _make_inputs(
    config: ConfigDict,
    pipeline: str | None,
    devices: parallel.Parallel,
    data: LongTailed,
    settings: tuple[TrainSettings, ...],
) -> Inputs:
    chosen = choose_pipeline(config.data.pipeline or pipeline, data, devices)
    arguments = (settings, test_view(config), config.seed)
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
        config.data.verify_counts,
        config.data.selection_seed,
        config.eval.held_out_per_class,
        config.data.image_size,
        config.data.eval_resize or round(config.data.image_size * 256 / 224),
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
    if not config.data.verify_counts:
        log.info(
            "Class counts are not checked (data.verify_counts=False): they are %sas published",
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
        scale=config.model.classifier_scale,
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
