# SPDX-License-Identifier: Apache-2.0
"""All settings of an experiment, one dataclass a section; the defaults are the CIFAR recipe.

Sizes of batches are global; durations carry their unit in their name. A setting that is added later
must have the default that does what was done before there was the setting: the record of an older
run, which lacks it, is read as if it had the default.
"""

import dataclasses

from balpoe_jax.averages import EpochAverage, MovingAverage, WeightAverage
from balpoe_jax.data.settings import SAMPLERS, AugmentSettings, MixSettings
from balpoe_jax.errors import UserError
from balpoe_jax.losses import equidistant_taus
from balpoe_jax.methods import Method
from balpoe_jax.methods.balpoe import BalPoE
from balpoe_jax.models import MODELS
from balpoe_jax.models.ensemble import EXPERT_MAPS
from balpoe_jax.models.heads import CLASSIFIERS, INITIALISERS
from balpoe_jax.optim import SCHEDULES
from balpoe_jax.parallel import MODES
from balpoe_jax.setting import Section, setting

# Precisions of float32 convolutions and products, by what JAX calls them.
PRECISIONS = {"tf32": "tensorfloat32", "full": "highest"}

_COUNT, _SEED = 1e6, 2**31 - 1


@dataclasses.dataclass(frozen=True)
class DataSettings(Section):
    """The data set, and how it is read."""

    path = "data."

    name: str = setting("", "Name of the data set, see `balpoe_jax.data.datasets.DATASETS`.")
    data_dir: str | None = setting(
        None,
        "Place of the data set: a TFDS folder; for CIFAR also the binary archive, a `.npz` file or "
        "a folder that holds one. None: TFDS's own folder, and without TFDS the archive in the "
        "user's cache.",
    )
    lists: str | None = setting(
        None,
        "Lists of the images of the data set `folder`, as FILE or train=FILE;val=FILE;test=FILE; "
        "None for class folders. See `balpoe_jax.data.datasets.listing`.",
    )
    class_names: str | None = setting(
        None,
        "File with the names of the classes of the data set `folder`, one a line; None for the "
        "names of folders and lists.",
    )
    test_share: float = setting(
        0.2,
        "Share of the images of the data set `folder` that becomes its test set, if it has none.",
        0,
        0.9,
    )
    imbalance_ratio: float = setting(100.0, "Count of the largest class over the smallest's.", 1)
    selection_seed: int = setting(0, "Seed of the images that are kept.", 0, _SEED)
    held_out_share: float = setting(
        0.0,
        "Share of each class's training images that training does without: temperatures are fitted "
        "and choices made on them, in place of unused images (`eval.held_out_per_class`); 0 for "
        "none. Of the data set `folder` it is a share by a hash of the names.",
        0,
        0.9,
    )
    verify_counts: bool = setting(
        True, "Whether a data set is refused whose class counts are not the published ones."
    )
    check_archive: bool = setting(
        True, "Whether an archive of CIFAR is refused whose checksum is not the published one."
    )
    shot_thresholds: tuple[int, int] = setting(
        (20, 100),
        "Class counts below which a class is few-shot, and above which many-shot.",
        0,
        length=2,
    )
    # The reference normalises CIFAR-100 with these constants of CIFAR-10 too.
    mean: tuple[float, float, float] = setting(
        (0.4914, 0.4822, 0.4465), "Mean that normalisation subtracts, by channel.", length=3
    )
    std: tuple[float, float, float] = setting(
        (0.2023, 0.1994, 0.2010),
        "Deviation that normalisation divides by, by channel.",
        1e-6,
        length=3,
    )
    image_size: int | None = setting(
        None, "Height and width in pixels of photographs; None where images have one size.", 1, 4096
    )
    eval_resize: int | None = setting(
        None,
        "Short side in pixels of a test photograph before its central crop; None for 8/7 of the "
        "image size, 256 for 224.",
        1,
        8192,
    )
    threads: int | None = setting(
        None, "Number of the host's threads for its input pipeline; None for all cores.", 1, 1024
    )
    pipeline: str | None = setting(
        None,
        "Place where batches are made: the device (the data set lies in its memory, and the "
        "compiled step makes them) or the host (tf.data). None: the device where the set fits and "
        "the platform is an accelerator, or where TensorFlow is not installed. A run continues in "
        "the pipeline that it began in.",
        choices=("host", "device"),
    )
    steps_per_dispatch: int | None = setting(
        None,
        "Number of steps that the device pipeline makes in one call of a compiled program, which "
        "ends early at a checkpoint, an evaluation or a change of phase. None: an epoch on an "
        "accelerator and 1 on a CPU, where loops are slow.",
        1,
        10_000,
    )
    on_bad_image: str = setting(
        "fail",
        "Consequence of a photograph that cannot be read in training: the run ends and names it, "
        "or trains on the next one of its class and records it. In a test it ends the evaluation, "
        "since the figures would be of another test set.",
        choices=("fail", "skip"),
    )
    chosen: str | None = setting(
        None, "Reasons of the defaults that a config file chose for this data set, for the log."
    )
    sampler: str = setting(
        "shuffle", "Order of the examples, see `balpoe_jax.data.settings`.", choices=SAMPLERS
    )
    samples_per_class: int = setting(
        1, "Number of examples of a class in a row under the sampler class_aware.", 1, 2**20
    )


@dataclasses.dataclass(frozen=True)
class ModelSettings(Section):
    """The network; see `balpoe_jax.models.create_model`."""

    path = "model."

    name: str = setting("resnet32", "Name of the trunk.", choices=tuple(MODELS))
    num_experts: int = setting(3, "Number of experts.", 1, 100)
    classifier: str = setting("cosine", "Kind of the experts' classifiers.", choices=CLASSIFIERS)
    classifier_scale: float = setting(30.0, "Factor of a cosine classifier's logits.", 1e-6, 1e6)
    classifier_init: str | None = setting(
        None,
        "Initial values of linear classifiers: He's or PyTorch's own. None: He's in the networks "
        "for small images, PyTorch's in those for photographs.",
        choices=tuple(INITIALISERS),
    )
    reduce_dimension: bool = setting(
        False, "Whether an expert's last stages have fewer channels than a plain network's."
    )
    width: int = setting(
        1, "Factor of the channels of all stages, 1 for the networks for photographs.", 1, 64
    )
    shared_stages: int | None = setting(
        None,
        "Number of stages that the experts share; -1 if not even the stem is shared, None for the "
        "trunk's own number.",
        -1,
        8,
    )
    pretrained: str | None = setting(
        None,
        "File of published weights with which trunk and bodies begin, .safetensors, .npz or .pth; "
        "None for a training from scratch. A run that is resumed does not read it.",
    )
    expert_map: str | None = setting(
        None,
        "Way in which the experts are computed; the numbers are the same. None, for the networks "
        "for small images: vmap on TPUs, stacked on GPUs; loop otherwise.",
        choices=EXPERT_MAPS,
    )
    dtype: str = setting(
        "float32",
        "Type of the body's computations and of the images; parameters, statistics, heads and loss "
        "are float32.",
        choices=("float32", "bfloat16"),
    )
    precision: str | None = setting(
        None,
        "Precision of a float32 body's convolutions and products: tf32 has 10 bits behind the "
        "point, full all 23; a TPU makes them of three and of six bfloat16 products. None: TF32 on "
        "GPUs since Ampere, bfloat16 products on TPUs, full on CPUs, which always are.",
        choices=tuple(PRECISIONS),
    )
    remat: bool = setting(
        False,
        "Whether activations are computed twice instead of kept for the gradient, and with them "
        "the communication of BatchNorm's statistics.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision is not None and self.dtype != "float32":
            raise UserError(
                "config.model.precision needs config.model.dtype=float32, or must be None, got "
                f"{self.precision!r} with {self.dtype}."
            )


@dataclasses.dataclass(frozen=True)
class LossSettings(Section):
    """The targets of BalPoE's experts and their kin."""

    path = "loss."

    taus: tuple[float, ...] = setting(
        (0.0, 2.0),
        "Factors of the log prior, one for each expert; two values are the ends of an equidistant "
        "range for any number of experts.",
    )

    def of_experts(self, num_experts: int) -> tuple[float, ...]:
        """The tau of each expert.

        Raises:
            UserError (a `ValueError`): neither two ends nor one value for each expert.
        """
        taus = tuple(float(tau) for tau in self.taus)
        if len(taus) == num_experts:
            return taus
        if len(taus) == 2:
            return equidistant_taus(*taus, num_experts)
        raise UserError(
            f"config.loss.taus must be two ends or one value for each of the {num_experts} "
            f"experts, got {taus}; change the list or config.model.num_experts."
        )


@dataclasses.dataclass(frozen=True)
class SgdSettings(Section):
    """SGD as PyTorch does it, with the rates of `balpoe_jax.optim.learning_rates`."""

    learning_rate: float = setting(0.1, "Learning rate before any factor.", 0, 1e30)
    momentum: float = setting(0.9, "Momentum of the optimizer.", 0)
    nesterov: bool = setting(False, "Whether the momentum is Nesterov's.")
    weight_decay: float = setting(5e-4, "Factor of the parameters in the gradient.", 0)
    schedule: str = setting("cosine", "Course of the rates by epoch.", choices=SCHEDULES)
    decay_epochs: tuple[int, ...] = setting(
        (), "Epochs from which the schedule step multiplies the rate once more.", 0, _COUNT
    )
    decay_factor: float = setting(0.1, "Factor of each such decay.", 0, 1e30)
    warmup_epochs: int = setting(0, "Number of epochs in which the rate rises; 0 for none.", 0)
    warmup_start: float = setting(
        0.0, "Factor from which it rises, that of an epoch before the first.", 0, 1
    )


@dataclasses.dataclass(frozen=True)
class OptimSettings(SgdSettings):
    """The optimizer: SGD as PyTorch does it, see `balpoe_jax.optim`."""

    path = "optim."

    accumulation_steps: int = setting(
        1,
        "Number of microbatches that a device cuts its part of a batch into, worked off one after "
        "the other to save memory.",
        1,
        2**20,
    )
    skip_non_finite: int = setting(
        0,
        "Number of steps of a run whose loss, gradient or update may be not finite and is left "
        "out; the next one ends the run.",
        0,
        _COUNT,
    )
    sam: float | None = setting(
        None,
        "Radius of sharpness-aware minimisation (SAM): the gradient is that at the weights this "
        "far up the gradient of the same batch, which takes twice the time. None or 0 for none.",
        0,
        1e3,
    )
    ema: float | None = setting(
        None,
        "Decay, a step, of an exponential moving average of the weights, which is evaluated in "
        "their place; None for none.",
        1e-6,
        1 - 1e-9,
    )
    swa: int | None = setting(
        None,
        "Number of epochs after which stochastic weight averaging (SWA) begins: what is evaluated "
        "is the mean of the weights at the end of each later epoch. None for none.",
        0,
        _COUNT,
    )
    swa_learning_rate: float | None = setting(
        None,
        "Learning rate that the first averaged epochs lead to; None for the schedule's.",
        0,
        1e30,
    )
    swa_anneal_epochs: int = setting(
        10, "Number of epochs in which a half cosine leads to that rate.", 0, _COUNT
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ema is not None and self.swa is not None:
            raise UserError(
                "config.optim.ema and config.optim.swa each say which average of the weights is "
                f"evaluated, got {self.ema:g} and {self.swa}; set one of them to None."
            )

    @property
    def average(self) -> WeightAverage | None:
        """The average of the weights that is evaluated in their place; None for none."""
        if self.ema is not None:
            return MovingAverage(self.ema)
        return None if self.swa is None else EpochAverage(self.swa)


@dataclasses.dataclass(frozen=True)
class Phase2Settings(SgdSettings):
    """The second phase of a method that has one; what is not here is as in the first."""

    path = "phase2."

    epochs: int = setting(0, "Number of epochs; 0 for no second phase.", 0, _COUNT)
    batch_size: int | None = setting(
        None, "Number of images in a batch; None for the first phase's.", 1, 2**20
    )
    sampler: str = setting("shuffle", "Order of the examples.", choices=SAMPLERS)
    samples_per_class: int = setting(
        1, "Number of examples of a class in a row under the sampler class_aware.", 1, 2**20
    )


@dataclasses.dataclass(frozen=True)
class ParallelSettings(Section):
    """The devices of a run."""

    path = "parallel."

    mode: str = setting("pmap", "JAX's way of sharing a batch among devices.", choices=MODES)
    sync_batch_norm: bool = setting(
        True, "Whether statistics are the global batch's, instead of each device's own."
    )


@dataclasses.dataclass(frozen=True)
class EvalSettings(Section):
    """What is evaluated, when and how."""

    path = "eval."

    batch_size: int = setting(512, "Number of images in a batch.", 1, 2**20)
    num_bins: int = setting(
        15, "Number of bins of calibration errors and reliability diagrams.", 1, 10**4
    )
    every_epochs: int | None = setting(
        None, "Number of epochs between evaluations in training; None for the end only.", 1, _COUNT
    )
    held_out_per_class: int = setting(
        20,
        "Number of training images of each class, which the selection left out, to fit "
        "temperatures and the correction before prior estimation; 0 for none.",
        0,
        _COUNT,
    )
    shift_ratios: tuple[float, ...] = setting(
        (2.0, 5.0, 10.0, 25.0, 50.0),
        "Imbalance ratios of the forward and backward test sets.",
        1 + 1e-9,
        1e12,
    )
    shift_lists: str | None = setting(
        None,
        "Files or patterns of published lists in place of the rule, separated by commas; see "
        "`balpoe_jax.data.datasets.test_distributions`.",
    )
    prior_strength: float = setting(
        0.3, "Weight of the uniform prior against the unlabelled examples in prior estimation.", 0
    )
    shift_test_level: float = setting(
        0.01,
        "Level at which predictions must show a shift for the estimated prior to be used.",
        0,
        1,
    )
    expert_weights_epochs: int = setting(
        0,
        "Number of passes over each target distribution's unlabelled images in which weights of "
        "the experts are learnt; 0 for none.",
        0,
        _COUNT,
    )
    expert_weights_rate: float = setting(0.1, "Learning rate of these weights.", 0)


@dataclasses.dataclass(frozen=True)
class CheckpointSettings(Section):
    """The checkpoints of a run."""

    path = "checkpoint."

    every_epochs: int = setting(10, "Number of epochs between checkpoints.", 1, _COUNT)
    keep: int = setting(2, "Number of newest checkpoints that are kept.", 1, _COUNT)


@dataclasses.dataclass(frozen=True)
class ProfileSettings(Section):
    """A trace of the profiler."""

    path = "profile."

    steps: tuple[int, ...] = setting(
        (),
        "First and last step of a trace in the workdir's folder `profile`, counted from 1; empty "
        "for none.",
        1,
        1e12,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        steps = self.steps
        if steps and not (len(steps) == 2 and steps[0] <= steps[1]):
            raise UserError(
                "config.profile.steps must be the first and the last step to trace, counted from "
                f"1, such as (11,13); got {steps}."
            )


@dataclasses.dataclass(frozen=True)
class Settings(Section):
    """An experiment.

    Attributes:
        data, model, loss, optim, parallel, eval, checkpoint, profile: Sections.
        augment: Augmentation of a training image.
        other_augment: Augmentation of half of the images of the first view, drawn one by one, in
            place of `augment`; None for none.
        view2, view3: Augmentations of further views of each training image, which some methods
            need.
        test_view: Augmentation of the random views from which weights of experts are learnt; None
            for that of training.
        mix: Mixing of a training batch.
        method: Method with its hyper-parameters.
        phase2: Second phase; None where the method has none.

    Raises:
        UserError (a `ValueError`): a value that is not valid, or does not go with another.
    """

    seed: int = setting(1, "Seed of initialisation, order, augmentation and mixing.", 0, _SEED)
    total_epochs: int = setting(200, "Number of epochs of the first phase.", 1, _COUNT)
    batch_size: int = setting(128, "Number of images in a batch.", 1, 2**20)
    note: str = setting("", "Text that results and report carry.")
    log_every_steps: int = setting(
        50, "Number of steps between progress lines and rows of metrics.jsonl.", 1
    )
    compilation_cache_dir: str | None = setting(
        None,
        "Folder in which the commands keep compiled programs for their next start; empty for none. "
        "None: `balpoe_jax/xla` in the user's caches (`~/.cache`), by kind of machine. Its files "
        "are run as code: it must be a folder of your own.",
    )
    data: DataSettings = DataSettings()
    augment: AugmentSettings = AugmentSettings(crop_padding=4, flip=True, rotation=15.0)
    other_augment: AugmentSettings | None = None
    view2: AugmentSettings | None = None
    view3: AugmentSettings | None = None
    test_view: AugmentSettings | None = None
    mix: MixSettings = MixSettings(alpha=0.4)
    method: Method = BalPoE()
    phase2: Phase2Settings | None = None
    model: ModelSettings = ModelSettings()
    loss: LossSettings = LossSettings()
    optim: OptimSettings = OptimSettings(
        nesterov=True, schedule="step", decay_epochs=(160, 180), warmup_epochs=5
    )
    parallel: ParallelSettings = ParallelSettings()
    eval: EvalSettings = EvalSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    profile: ProfileSettings = ProfileSettings()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_swa()
        name, method = self.method.name, self.method
        views = 1 + len(self.views)
        if views != method.views:
            raise UserError(
                f"The method {name} takes {method.views} views of an image, and the config "
                f"describes {views}; choose a method by the config file's argument method=..."
            )
        if self.mix.alpha > 0 and not method.supports_mixing:
            raise UserError(
                f"The method {name} knows no mixed labels: config.mix.alpha must be 0, got "
                f"{self.mix.alpha:g}."
            )
        if self.mix.alpha > 0 and self.mix.of_two_views != (method.mixed_views == 2):
            raise UserError(
                f"The method {name} mixes {method.mixed_views} of its views: config.mix.rule must "
                f"{'' if method.mixed_views == 2 else 'not '}be mixup_and_cutmix, got "
                f"{self.mix.rule}."
            )
        if method.needs_global_batch and self.optim.accumulation_steps > 1:
            raise UserError(
                f"config.optim.accumulation_steps must be 1 for the method {name}, whose loss is "
                f"one of the whole batch, got {self.optim.accumulation_steps}."
            )
        if len(self.phases) > len(method.phases()):
            raise UserError(
                f"config.phase2.epochs asks for a second phase, which the method {name} does not "
                "have as it is set; set it to 0 or choose another method."
            )
        self.taus  # noqa: B018  whose number it checks

    def _check_swa(self) -> None:
        swa = self.optim.swa
        if swa is not None and swa >= self.total_epochs:
            raise UserError(
                "config.optim.swa must be less than config.total_epochs, so that there are weights "
                f"to average, got {swa} of {self.total_epochs}."
            )
        if swa is not None and self.phase2 is not None and self.phase2.epochs:
            raise UserError(
                "config.optim.swa averages the end of a training of one phase, and "
                f"config.phase2.epochs asks for a second one, got {self.phase2.epochs}; set "
                "config.optim.swa to None, or use config.optim.ema."
            )

    @property
    def views(self) -> tuple[AugmentSettings, ...]:
        """Augmentations of the views after the first."""
        return tuple(view for view in (self.view2, self.view3) if view is not None)

    @property
    def taus(self) -> tuple[float, ...]:
        """The tau of each expert."""
        return self.loss.of_experts(self.model.num_experts)

    @property
    def phases(self) -> "tuple[Settings, ...]":
        """The settings of each phase; the second one's are over the first one's, unmixed."""
        second = self.phase2
        if second is None or not second.epochs:
            return (self,)
        sgd = {field.name: getattr(second, field.name) for field in dataclasses.fields(SgdSettings)}
        changed = dataclasses.replace(
            self,
            total_epochs=second.epochs,
            batch_size=second.batch_size or self.batch_size,
            optim=dataclasses.replace(self.optim, **sgd),
            data=dataclasses.replace(
                self.data, sampler=second.sampler, samples_per_class=second.samples_per_class
            ),
            mix=dataclasses.replace(self.mix, alpha=0.0),
            phase2=None,
        )
        return self, changed
