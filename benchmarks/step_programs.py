# SPDX-License-Identifier: Apache-2.0
"""The package's own programs for the cases of `step_cases`."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from balpoe_jax import parallel
from balpoe_jax.config import resolve
from balpoe_jax.config.dataset_defaults import IMAGENET_LT, cifar_config, photo_config
from balpoe_jax.data.datasets import published
from balpoe_jax.experiment.build import build_program
from balpoe_jax.experiment.program import Program
from balpoe_jax.models import create_model
from benchmarks.step_cases import EXPERTS, Case, Sizes, TorchCase, batch_size


def make_config(case: Case | TorchCase, sizes: Sizes) -> ConfigDict:
    """The config of a case: BalPoE with mixup on CIFAR-100-LT or ImageNet-LT."""
    batch = batch_size(case, sizes)
    if case.network == "small":
        arguments = f"ir={sizes.ratio},backbone={sizes.small},experts={EXPERTS}"
        config = cifar_config("cifar100", 0.4, arguments)
        config.batch_size = batch
    else:
        arguments = f"backbone={case.network},batch_size={batch},experts={EXPERTS}"
        config = photo_config(IMAGENET_LT, arguments)
        config.data.image_size = sizes.photo_size
    config.model.dtype = case.dtype
    if isinstance(case, Case):
        config.model.expert_map, config.parallel.mode = case.expert_map, case.mode
    return config


def make_program(config: ConfigDict, sizes: Sizes) -> Program:
    """The program of a config on one device; no data are loaded."""
    devices = parallel.make_parallel(config.parallel.mode, jax.devices()[:1])
    if config.data.name == "cifar100":
        counts, shape = published("cifar100", config.data.imbalance_ratio)
    else:
        counts = np.full(sizes.photo_classes, 116, np.int64)
        shape = (sizes.photo_size, sizes.photo_size, 3)
    return build_program(resolve(config), devices, counts, shape)


def with_stages(program: Program, stage_sizes: Sequence[int]) -> Program:
    """The program with another number of blocks in each stage of its network."""
    model = create_model(
        program.settings.model.name,
        num_classes=len(program.context.class_counts),
        num_experts=EXPERTS,
        axis_name=parallel.AXIS_NAME,
        expert_map=program.model.expert_map,
        stage_sizes=stage_sizes,
        dtype=jnp.dtype(program.settings.model.dtype),
    )
    network = program.method.network(model, program.context)
    return dataclasses.replace(program, model=model, network=network)
