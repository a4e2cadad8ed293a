# SPDX-License-Identifier: Apache-2.0
"""Builds what a config describes: data, devices, model, optimizers."""

import dataclasses
import hashlib
import logging
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from balpoe_jax import metrics, optim, parallel
from balpoe_jax.config import Settings
from balpoe_jax.config.settings import DataSettings
from balpoe_jax.data import datasets
from balpoe_jax.data.datasets import test_distributions, tfds_sets
from balpoe_jax.data.datasets.held_out import hold_out_of_training
from balpoe_jax.data.datasets.image_files import Place, load_files, parse_lists
from balpoe_jax.data.datasets.types import LongTailed
from balpoe_jax.data.records.sources import ArraySource, Source
from balpoe_jax.data.settings import steps_per_epoch
from balpoe_jax.errors import UserError
from balpoe_jax.experiment import phases
from balpoe_jax.experiment.inputs import (
    DeviceInputs,
    HostInputs,
    Inputs,
    choose_pipeline,
    in_memory,
)
from balpoe_jax.experiment.phases import PhasePlan
from balpoe_jax.experiment.program import Program, saves_kernels
from balpoe_jax.experiment.settings import check, learning_rates, train_settings
from balpoe_jax.methods import Context, Network
from balpoe_jax.models import CIFAR_MODELS, ExpertEnsemble, create_model
from balpoe_jax.run import multihost, teachers

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything a run works with that does not change while it runs.

    Attributes:
        program: Functions that are compiled.
        data: Long-tailed training set, and test set.
        targets: Class distributions that the test set is scored on.
        inputs: Source of the batches of training and evaluation.
    """

    program: Program
    data: LongTailed
    targets: list[test_distributions.TestDistribution]
    inputs: Inputs

    @property
    def settings(self) -> Settings:
        """All settings."""
        return self.program.settings

    def batch_indices(self, step: int) -> npt.NDArray[np.int64]:
        """Positions of the training examples of the update that leads to `step`, int64 `[B]`."""
        plan = phases.phase_of(self.program.phases, step)
        return self.inputs.positions(plan.index, step - 1 - plan.first_step)

    def resolved(self) -> dict[str, Any]:
        """What the config leaves open, as it is in use: the program's choices and the inputs'."""
        return {
            **self.program.resolved(),
            "pipeline": self.inputs.pipeline,
            "steps_per_dispatch": self.inputs.steps_per_dispatch(0),
        }

    def data_record(self) -> dict[str, Any]:
        """Class counts, names, shot groups and sizes of the data set that was loaded."""
        groups = metrics.shot_groups(self.data.class_counts, self.settings.data.shot_thresholds)
        return {
            "class_counts": self.data.class_counts,
            "counts_as_published": self.data.counts_as_published,
            "verify_counts": self.settings.data.verify_counts,
            "groups": {name: int(group.sum()) for name, group in groups._asdict().items()},
            "num_train": len(self.data.train),
            "num_test": len(self.data.test),
            "image_shape": self.data.train.image_shape,
            **self._own_images(),
        }

    def _own_images(self) -> dict[str, Any]:
        """Class names and a digest of the training images, where these are the user's own."""
        if not self.data.class_names:
            return {}
        return {"class_names": self.data.class_names, "digest": _digest(self.data.train)[:32]}

    def shared_data(self) -> dict[str, Any]:
        """What must be the same in all processes, since each reads the data by itself."""
        data = self.data
        sources = {"train": data.train, "test": data.test, "held_out": data.held_out}
        return {
            "class_counts": data.class_counts.tolist(),
            "total_steps": self.program.total_steps,
            **{name: source and _digest(source) for name, source in sources.items()},
        }


def _digest(source: Source) -> str:
    """A digest of the examples, their order and their labels; not of their pixels."""
    which = source.keys if isinstance(source, ArraySource) else source.names
    digest = hashlib.sha256(source.labels.tobytes())
    digest.update(which.tobytes())
    return digest.hexdigest()


def build_together(settings: Settings, pipeline: str | None = None) -> Experiment:
    """Builds an experiment in every process, as `build` does.

    Args:
        settings: Settings of the experiment.
        pipeline: Pipeline of a run that was begun before, see `build`.

    Raises:
        UserError (a `ValueError`): as `build` does, or data that are not the same in all processes.
    """
    experiment = build(settings, pipeline)
    if multihost.count() > 1:
        multihost.check_same(
            experiment.shared_data(), "data set", "prepare the same one, in one way, on every host"
        )
    return experiment


def build(settings: Settings, pipeline: str | None = None) -> Experiment:
    """Builds the parts of an experiment and announces its data.

    Args:
        settings: Settings of the experiment.
        pipeline: Pipeline of a run that was begun before, for settings that leave it open; None for
            a new run.

    Raises:
        UserError (a `ValueError`): data that are missing or not as they should be, or a batch that
            the devices cannot share.
    """
    devices = parallel.make_parallel(settings.parallel.mode)
    check(settings, devices)  # before the data, which may take its time
    data = _load_data(settings)
    program = build_program(settings, devices, data.class_counts, data.train.image_shape)
    log.info(
        "Precision of convolutions: %s; experts: %s", program.precision, program.model.expert_map
    )
    targets = _make_targets(settings, data)
    chosen = choose_pipeline(settings.data.pipeline or pipeline, data, devices)
    if chosen == "device":
        data = in_memory(data)
    inputs = _make_inputs(settings, chosen, devices, data)
    return Experiment(program, data, targets, inputs)


def _make_targets(
    settings: Settings, data: LongTailed
) -> list[test_distributions.TestDistribution]:
    """The target distributions; none for test images that are of no known distribution."""
    if data.class_names and not settings.eval.shift_ratios:
        return []
    return test_distributions.make_targets(
        data.test.labels,
        data.class_counts,
        settings.eval.shift_ratios,
        data.test_names,
        settings.eval.shift_lists or "",
    )


def build_program(
    settings: Settings,
    devices: parallel.Parallel,
    class_counts: npt.NDArray[np.int64],
    image_shape: tuple[int, int, int],
) -> Program:
    """Builds what is compiled for an experiment.

    Args:
        settings: Settings of the experiment.
        devices: Devices that share a batch; they need not be this host's.
        class_counts: Numbers of training images by class, int `[C]`.
        image_shape: Shape of the images that the model gets, `(H, W, 3)`.

    Raises:
        UserError (a `ValueError`): as `check` does, or a method whose phases change the structure
            of the state.
    """
    check(settings, devices)
    method = settings.method
    teacher = None
    if method.teacher_run:
        of_teacher = teachers.read_settings(method.teacher_run, settings)
        teacher = build_program(of_teacher, devices, class_counts, image_shape)
    one_vector = saves_kernels(settings.model.name, devices.platform)
    plans = _plan_phases(settings, class_counts, teacher, one_vector)
    model = _make_model(settings, len(class_counts), devices)
    program = Program(
        settings=settings,
        image_shape=image_shape,
        parallel=devices,
        method=method,
        model=model,
        network=method.network(model, plans[0].context),
        phases=plans,
        taus=method.expert_taus(settings.taus),
        teacher=teacher,
    )
    program.check_phases()
    return program


def _plan_phases(
    settings: Settings,
    class_counts: npt.NDArray[np.int64],
    teacher: Program | None,
    as_one_vector: bool,
) -> tuple[PhasePlan, ...]:
    known = None
    if teacher is not None:
        known = Network(teacher.network, **teacher.abstract_state().variables)
    plans: list[PhasePlan] = []
    first_step = first_epoch = 0
    for index, phase in enumerate(settings.phases):
        rates = learning_rates(phase)
        per_epoch = steps_per_epoch(int(class_counts.sum()), phase.batch_size)
        context = Context(
            class_counts=class_counts,
            taus=settings.taus,
            scale=1.0 if phase.model.classifier == "linear" else phase.model.classifier_scale,
            batch_size=phase.batch_size * phase.mix.rows_per_image,
            steps_per_epoch=per_epoch,
            first_step=first_step,
            axis_name=parallel.AXIS_NAME,
            sync_batch_norm=phase.parallel.sync_batch_norm,
            teacher=known,
        )
        optimizer = optim.make_optimizer(
            optim.rate_of_step(rates, per_epoch),
            phase.optim.momentum,
            phase.optim.nesterov,
            phase.optim.weight_decay,
            as_one_vector,
        )
        name = settings.method.phases()[index].name
        plan = PhasePlan(index, name, context, optimizer, rates, first_epoch)
        plans.append(plan)
        first_step, first_epoch = plan.last_step, plan.last_epoch
    return tuple(plans)


def _make_inputs(
    settings: Settings, chosen: str, devices: parallel.Parallel, data: LongTailed
) -> Inputs:
    test_view = settings.test_view or settings.augment
    arguments = (train_settings(settings), test_view, settings.seed)
    steps = settings.data.steps_per_dispatch
    if chosen == "device":
        assert isinstance(data.train, ArraySource)
        return DeviceInputs(devices, data.train, *arguments, steps)
    if steps not in (None, 1):
        raise UserError(
            f"config.data.steps_per_dispatch={steps} needs the device pipeline, and batches are "
            "made on the host; set config.data.pipeline=device or leave it out."
        )
    policy = settings.data.on_bad_image
    return HostInputs(devices, data, *arguments, settings.data.threads, policy)


def describe_data(settings: Settings) -> tuple[npt.NDArray[np.int64], tuple[int, int, int]]:
    """Class counts, int64 `[C]`, and the image shape: published ones, or of images of one's own.

    Raises:
        UserError (a `ValueError`): counts that no publication has, or images that are not there.
    """
    section = settings.data
    if _is_own(section):
        data = _load_own(section)
        return data.class_counts, data.train.image_shape
    return datasets.published(section.name, section.imbalance_ratio, section.image_size or 0)


def _is_own(section: DataSettings) -> bool:
    return section.name == datasets.FOLDER or section.name.startswith(tfds_sets.PREFIX)


def _load_data(settings: Settings) -> LongTailed:
    section = settings.data
    of_own = _is_own(section)
    data = _load_own(section) if of_own else _load_published(settings)
    counts = data.class_counts
    low, high = section.shot_thresholds
    groups = metrics.shot_groups(counts, (low, high))
    log.info(
        "%s: %d training images in %d classes, max %d, min %d, ratio %.1f; "
        "classes: %d many (> %d), %d medium, %d few (< %d); %d test images",
        section.name,
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
    if not (section.verify_counts or of_own):
        log.info(
            "Class counts are not checked (data.verify_counts=False): they are %sas published",
            "" if data.counts_as_published else "not ",
        )
    return data


def _load_published(settings: Settings) -> LongTailed:
    section = settings.data
    size = section.image_size or 0
    data = datasets.load(
        section.name,
        section.imbalance_ratio,
        section.data_dir or "",
        section.verify_counts,
        section.selection_seed,
        settings.eval.held_out_per_class,
        size,
        section.eval_resize or round(size * 256 / 224),
        check_archive=section.check_archive,
    )
    if section.held_out_share:
        data = hold_out_of_training(data, section.held_out_share)
    return data


def _load_own(section: DataSettings) -> LongTailed:
    """Images of the user's own, in files or as TFDS prepared them."""
    if section.chosen:
        log.info("Chosen for these images: %s", section.chosen)
    size = section.image_size or 0
    sizes = size, section.eval_resize or round(size * 256 / 224)
    shares = section.test_share, section.held_out_share
    folder = section.data_dir or ""
    if section.name.startswith(tfds_sets.PREFIX):
        name = section.name.removeprefix(tfds_sets.PREFIX)
        return tfds_sets.load_set(name, folder, *sizes, *shares)
    lists = parse_lists(section.lists or "")
    place = Place(folder, lists, section.class_names or "", *shares)
    return load_files(place, *sizes, section.verify_counts, section.threads)


def _make_model(settings: Settings, num_classes: int, devices: parallel.Parallel) -> ExpertEnsemble:
    model = settings.model
    return create_model(
        model.name,
        num_classes=num_classes,
        num_experts=model.num_experts,
        axis_name=parallel.AXIS_NAME if settings.parallel.sync_batch_norm else None,
        expert_map=model.expert_map or default_expert_map(model.name, devices.platform),
        classifier=model.classifier,
        scale=model.classifier_scale,
        classifier_init=model.classifier_init,
        reduce_dimension=model.reduce_dimension,
        width=model.width,
        shared_stages=model.shared_stages,
        dtype=jnp.dtype(model.dtype),
        remat=model.remat,
        norm_in_parts=saves_kernels(model.name, devices.platform),
    )


def default_expert_map(model: str, platform: str) -> str:
    """The faster of `models.ensemble.EXPERT_MAPS`; the numbers are the same.

    vmap turns the experts' convolutions into grouped ones. They fill a TPU's matrix units where one
    expert has too few channels (ResNet-32: 13 to 16% fewer estimated cycles on v5e). Experts of
    ResNet-50 fill them alone, and lose by it (`benchmarks/README.md`). Grouped convolutions are
    slow on a CPU, and so are their gradients on a GPU (jax#13800, jax#26266): there "stacked"
    computes them one by one. On a GPU nothing was measured; only the kernels were counted.
    """
    if saves_kernels(model, platform):
        return "stacked"
    return "vmap" if platform == "tpu" and model in CIFAR_MODELS else "loop"
