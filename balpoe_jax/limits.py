# SPDX-License-Identifier: Apache-2.0
"""The range of each number of a config: what is outside cannot be meant, and could not be run."""

_MANY, _SEED = 10**6, 2**31 - 1
_FINITE = (-1e9, 1e9)

# Least and most, both included.
LIMITS: dict[str, tuple[float, float]] = {
    "seed": (0, _SEED),
    "total_epochs": (1, _MANY),
    "batch_size": (1, 2**20),
    "log_every_steps": (1, 10**9),
    "data.imbalance_ratio": (1, 1e9),
    "data.selection_seed": (0, _SEED),
    "data.image_size": (0, 4096),
    "data.resize": (0, 8192),
    "data.threads": (0, 1024),
    "data.class_run": (1, 2**20),
    "augment.crop_padding": (0, 1024),
    "augment.cutout": (0, 8192),
    "augment.crop_area": (0, 1),
    "augment.hue": (0, 0.5),
    "augment.jitter_probability": (0, 1),
    "augment.grayscale": (0, 1),
    "augment.blur": (0, 1),
    "mixup.alpha": (0, 1e6),
    "mixup.groups": (1, 2**20),
    "mixup.probability": (0, 1),
    "mixup.first_epoch": (0, _MANY),
    "mixup.last_epoch": (0, _MANY),
    "mixup.kappa": (1, 1e9),
    "mixup.threshold": (0, 1),
    "mixup.exponent": (-10, 10),
    "model.num_experts": (1, 100),
    "model.scale": (1e-6, 1e6),
    "loss.tau_min": _FINITE,
    "loss.tau_max": _FINITE,
    "optim.learning_rate": (0, 1e30),
    "optim.momentum": (0, 1e9),
    "optim.weight_decay": (0, 1e9),
    "optim.factor": (0, 1e30),
    "optim.warmup_epochs": (0, _MANY),
    "optim.accumulate": (1, 2**20),
    "optim.skip_non_finite": (0, _MANY),
    "eval.batch_size": (1, 2**20),
    "eval.num_bins": (1, 10**4),
    "eval.every_epochs": (0, _MANY),
    "eval.held_out_per_class": (0, _MANY),
    "eval.prior_strength": (0, 1e9),
    "eval.prior_significance": (0, 1),
    "checkpoint.every_epochs": (1, _MANY),
    "checkpoint.keep": (1, _MANY),
}

# Of the members of tuples; any number of them where none is given.
MEMBERS: dict[str, tuple[int | None, float, float]] = {
    "data.mean": (3, *_FINITE),
    "data.std": (3, 1e-6, 1e9),
    "data.shot_thresholds": (2, 0, 1e9),
    "augment.color_jitter": (3, 0, 1),
    "loss.taus": (None, *_FINITE),
    "optim.boundaries": (None, 0, _MANY),
    "eval.shift_ratios": (None, 1 + 1e-9, 1e12),
    "profile.steps": (None, 1, 1e12),
}
