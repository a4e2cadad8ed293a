# SPDX-License-Identifier: Apache-2.0
"""The fields of an experiment and their defaults.

A file in `configs/` has a function `get_config(arguments)` that starts from `default_config`, sets
what its data set needs, and returns it; `--config=FILE:key=value,...` passes the arguments, and
`--config.field=value` overrides any field afterwards.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from balpoe_jax.errors import UserError
from balpoe_jax.losses import equidistant_taus
from balpoe_jax.methods import METHODS, settings
from balpoe_jax.renames import rename_fields

# In which a model's body may compute.
DTYPES = ("float32", "bfloat16")

# Of float32 convolutions and products, by what JAX calls them.
PRECISIONS = {"tf32": "tensorfloat32", "full": "highest"}

# Sections of further views of the training images, which not every config has.
VIEWS = ("view2", "view3")

# And of the views that test images have where weights of experts are learnt from them.
TEST_VIEW = "test_view"
# What happens to half of the images of the first view.
OTHER_AUGMENT = "other_augment"
# Sections that a config may have, with the fields of augment.
AUGMENTATIONS = (*VIEWS, TEST_VIEW, OTHER_AUGMENT)

BAD_IMAGE_POLICIES = ("fail", "skip")


def default_config() -> ConfigDict:
    """Every field of an experiment with its default: the CIFAR recipe, without a data set.

    Fields (sizes of batches are global; durations carry their unit in their name):
        seed: of initialisation, order, augmentation and mixup.
        total_epochs, batch_size.
        note: free text that results and report carry.
        log_every_steps: a progress line and a row of metrics.jsonl each time.
        compilation_cache_dir: folder in which the commands keep compiled programs for their next
            start; empty for none. None: `balpoe_jax/xla` in the user's caches (`~/.cache`), by kind
            of machine. Its files are run as code: it must be a folder of your own.
        data.name: see `balpoe_jax.data.datasets.DATASETS`.
        data.data_dir: place of the data set. A TFDS folder; for CIFAR also the binary archive, a
            `.npz` file or a folder that holds one, see `balpoe_jax.data.datasets.cifar`. Empty for
            the default of TFDS, and without TFDS for the archive in the user's cache.
        data.imbalance_ratio: largest over smallest class.
        data.selection_seed: of the kept images.
        data.verify_counts: refuse a data set whose class counts are not the published ones.
        data.check_archive: refuse an archive of CIFAR whose checksum is not the published one.
        data.shot_thresholds: few-shot below the first, many-shot above the second.
        data.mean, data.std: normalisation by channel.
        data.image_size: height and width in pixels of photographs; 0 where images have one size.
        data.eval_resize: short side in pixels of a test photograph before its central crop; 0 for
            8/7 of the image size, 256 for 224.
        data.threads: of the host's input pipeline; 0 for all cores.
        data.pipeline: Place where batches are made: "device" (the data set lies in device memory
            and the compiled step makes them) or "host" (tf.data); None for the device where the
            set fits and the platform is an accelerator, or where TensorFlow is not installed. A
            run goes on in the pipeline that it began in.
        data.steps_per_dispatch: Number of steps that the device pipeline makes in one call of a
            compiled program, which ends early at a checkpoint, an evaluation or a change of phase;
            None for an epoch on an accelerator and 1 on a CPU, where loops are slow.
        data.on_bad_image: what a photograph does that cannot be read in training: "fail" ends the
            run and names it, "skip" trains on the next one of its class, and records it. In
            testing it ends the evaluation, since the figures would be of another test set.
        data.sampler: "shuffle", "class_balanced" or "class_aware", see
            `balpoe_jax.data.batches.samplers`; data.samples_per_class: number of examples of a
            class that follow each other in "class_aware".
        augment.crop_padding, .flip, .rotation (degrees), .color_jitter (brightness, contrast,
            saturation), .policy, .cutout (side in pixels), .crop_area, .hue, .jitter_probability,
            .grayscale, .blur, .randaugment_layers, .randaugment_magnitude: see
            `balpoe_jax.data.settings.AugmentSettings`; photographs are cropped at random while they
            are decoded.
        method.name: the class of the method, see `balpoe_jax.methods`, and as method.* its
            hyper-parameters; a config file's argument `method=` sets them all.
        phase2.*: of a method with a second phase: `epochs` (0 for none), `batch_size` (0 for the
            first phase's) and what takes the place of fields of `optim` and `data`.
        other_augment.*: with this section, half of the images (of the first view), drawn one by
            one, are augmented by it instead, whose fields are those of augment.
        view2.*, view3.*: of a second and a third view of each training image, the fields of
            augment; only methods that need them have these sections.
        mix.alpha: 0 for none. mix.groups, .rule, .probability (share of the batches),
            .first_epoch and .last_epoch (counted from 0, without the last; 0 for the end),
            .remix_kappa, .remix_tau, .sampling_power, .partners: see
            `balpoe_jax.data.settings.MixSettings`.
        model.name, .num_experts, .classifier, .classifier_scale, .reduce_dimension, .shared_stages
            (-2 for the backbone's own number): see `balpoe_jax.models.create_model`;
            model.expert_map: "auto" is, for the networks for small images, "vmap" on TPUs and
            "stacked" on GPUs, and "loop" otherwise;
            model.dtype: of the body's computations and of the images, "float32" or "bfloat16"
            (parameters, statistics, heads and loss are float32 in both); model.precision: of the
            convolutions and products of a float32 body, "tf32" (10 bits behind the point) or "full"
            (all 23); None for the platform's default, which is TF32 on GPUs since Ampere, bfloat16
            products on TPUs, and full on CPUs, which always are. A TPU makes up "tf32" of three
            bfloat16 products and "full" of six; model.remat: compute
            activations anew for the gradient instead of keeping them, and with them the
            communication of BatchNorm's statistics.
        loss.taus: one for each expert; when empty, equidistant from loss.tau_min to loss.tau_max.
        optim.accumulation_steps: microbatches that a device cuts its part of a batch into, worked
            off one after the other to save memory; see `balpoe_jax.step.make_train_step`.
        optim.skip_non_finite: steps of a run whose loss, gradient or update may be not finite: so
            many are made without an update, the next one ends the run. 0: the first one does.
        optim.*: see `balpoe_jax.optim`.
        parallel.mode: "pmap" or "shard_map"; parallel.sync_batch_norm: statistics over the
            global batch instead of each device's part.
        eval.batch_size; eval.num_bins: of calibration errors and reliability diagrams.
        eval.every_epochs: also during training; 0 for the end only.
        eval.held_out_per_class: training images that the selection left out, on which temperatures
            and the correction before prior estimation are fitted; 0 for none.
        eval.shift_ratios: of the forward and backward test sets.
        eval.shift_lists: files or patterns of published lists, separated by commas, instead of
            the rule; see `balpoe_jax.data.datasets.test_distributions`.
        eval.prior_strength: weight of the uniform prior against the unlabelled examples when the
            target prior is estimated; eval.shift_test_level: the level at which predictions must
            show a shift for the estimate to be used; see `balpoe_jax.evaluation.scoring.score`.
        eval.expert_weights_epochs: passes over each target distribution's unlabelled images in
            which weights of the experts are learnt; 0 for none. eval.expert_weights_rate: of that
            learning, see `balpoe_jax.evaluation.expert_weights`. test_view.*: the random views that
            it needs, the fields of augment; without this section they are as in training.
        checkpoint.every_epochs, checkpoint.keep.
        profile.steps: the first and the last step of a profiler trace, written into the workdir's
            folder `profile`; empty for none.

    A field that is added later must have the default that does what was done before there was the
    field: the record of an older run, which lacks it, is read as if it had the default (see
    `with_defaults`).
    """
    config = ConfigDict()
    config.seed = 1
    config.total_epochs = 200
    config.batch_size = 128
    config.note = ""
    config.log_every_steps = 50
    config.compilation_cache_dir = placeholder(str)
    config.data = ConfigDict(
        {
            "name": "",
            "data_dir": "",
            "imbalance_ratio": 100.0,
            "selection_seed": 0,
            "verify_counts": True,
            "check_archive": True,
            "shot_thresholds": (20, 100),
            # The reference normalises CIFAR-100 with these constants of CIFAR-10 too.
            "mean": (0.4914, 0.4822, 0.4465),
            "std": (0.2023, 0.1994, 0.2010),
            "image_size": 0,
            "eval_resize": 0,
            "threads": 0,
            "pipeline": placeholder(str),
            "steps_per_dispatch": placeholder(int),
            "on_bad_image": "fail",
            "sampler": "shuffle",
            "samples_per_class": 1,
        }
    )
    config.augment = ConfigDict(
        {
            "crop_padding": 4,
            "flip": True,
            "rotation": 15.0,
            "color_jitter": (0.0, 0.0, 0.0),
            "policy": "none",
            "cutout": 0,
            "crop_area": 0.0,
            "hue": 0.0,
            "jitter_probability": 1.0,
            "grayscale": 0.0,
            "blur": 0.0,
            "randaugment_layers": 2,
            "randaugment_magnitude": 10.0,
        }
    )
    config.mix = ConfigDict(
        {
            "alpha": 0.4,
            "groups": 1,
            "rule": "mixup",
            "probability": 1.0,
            "first_epoch": 0,
            "last_epoch": 0,
            "remix_kappa": 3.0,
            "remix_tau": 0.5,
            "sampling_power": 0.0,
            "partners": "batch",
        }
    )
    config.method = ConfigDict({"name": "balpoe"})
    config.model = ConfigDict(
        {
            "name": "resnet32",
            "num_experts": 3,
            "classifier": "cosine",
            "classifier_scale": 30.0,
            "reduce_dimension": False,
            "shared_stages": -2,
            "expert_map": "auto",
            "dtype": "float32",
            "precision": placeholder(str),
            "remat": False,
        }
    )
    config.loss = ConfigDict({"taus": (), "tau_min": 0.0, "tau_max": 2.0})
    config.optim = ConfigDict(
        {
            "learning_rate": 0.1,
            "momentum": 0.9,
            "nesterov": True,
            "weight_decay": 5e-4,
            "schedule": "step",
            "decay_epochs": (160, 180),
            "decay_factor": 0.1,
            "warmup_epochs": 5,
            "warmup_start": 0.0,
            "accumulation_steps": 1,
            "skip_non_finite": 0,
        }
    )
    config.parallel = ConfigDict({"mode": "pmap", "sync_batch_norm": True})
    config.eval = ConfigDict(
        {
            "batch_size": 512,
            "num_bins": 15,
            "every_epochs": 0,
            "held_out_per_class": 20,
            "shift_ratios": (2.0, 5.0, 10.0, 25.0, 50.0),
            "shift_lists": "",
            "prior_strength": 0.3,
            "shift_test_level": 0.01,
            "expert_weights_epochs": 0,
            "expert_weights_rate": 0.1,
        }
    )
    config.checkpoint = ConfigDict({"every_epochs": 10, "keep": 2})
    config.profile = ConfigDict({"steps": ()})
    return config


def with_defaults(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded config's values, and the defaults of the fields that it was recorded before.

    Args:
        recorded: Nested dictionaries, fields perhaps under older names; lists, which tuples become
            in JSON, become tuples again.
    """
    recorded = rename_fields(recorded)
    defaults = default_config().to_dict()
    method = recorded.get("method")
    name = method.get("name") if isinstance(method, Mapping) else None
    if isinstance(name, str) and name in METHODS:
        defaults["method"] = settings(METHODS[name]())
    for section in AUGMENTATIONS:
        if section in recorded:
            defaults[section] = dict(defaults["augment"])
    return _merged(defaults, recorded)


def _merged(default: Any, recorded: Any) -> Any:
    """Recorded values over defaults, section by section."""
    if isinstance(recorded, Mapping):
        default = default if isinstance(default, Mapping) else {}
        merged = {name: _merged(default.get(name), value) for name, value in recorded.items()}
        return {**default, **merged}
    return tuple(_merged(None, x) for x in recorded) if isinstance(recorded, list) else recorded


def resolve_taus(config: ConfigDict) -> tuple[float, ...]:
    """The tau of each expert, from the list or from its two ends.

    Raises:
        UserError (a `ValueError`): a list whose length is not the number of experts.
    """
    experts = config.model.num_experts
    if not config.loss.taus:
        return equidistant_taus(config.loss.tau_min, config.loss.tau_max, experts)
    if len(config.loss.taus) != experts:
        raise UserError(
            f"loss.taus must have one value for each of the {experts} experts, got "
            f"{len(config.loss.taus)} ({config.loss.taus}); change the list or model.num_experts."
        )
    return tuple(float(tau) for tau in config.loss.taus)
