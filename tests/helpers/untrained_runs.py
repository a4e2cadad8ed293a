# SPDX-License-Identifier: Apache-2.0
"""Workdirs with a checkpoint of a network that was never trained, to restore and export."""

import json
from pathlib import Path

import jax
import numpy as np

from balpoe_jax.config import resolve
from balpoe_jax.data.datasets import published
from balpoe_jax.experiment.build import build_program
from balpoe_jax.parallel import make_parallel
from balpoe_jax.run import record
from balpoe_jax.run.checkpoint import Checkpoints
from tests.helpers.config_files import get_config

TEMPERATURE = 1.7


def make(folder: Path, config: str, arguments: str, image_size: int | None = None) -> Path:
    """Writes such a workdir, with statistics of BatchNorm that are not the initial ones."""
    fields = get_config(config, arguments)
    if image_size:
        fields.data.image_size = image_size
    fields.eval.batch_size = 8
    settings = resolve(fields)
    data = settings.data
    counts, shape = published(data.name, data.imbalance_ratio, data.image_size or 0)
    program = build_program(settings, make_parallel("pmap"), counts, shape)
    state = program.init_state()
    random = np.random.default_rng(0)
    statistics = jax.tree.map(
        lambda x: random.uniform(0.5, 1.5, x.shape).astype(np.float32), state.batch_stats
    )
    with Checkpoints(str(folder / "checkpoints")) as checkpoints:
        checkpoints.save(state.replace(batch_stats=program.parallel.replicate(statistics)))
    names = [f"class {i}" for i in range(len(counts))]
    about = {"class_counts": counts.tolist(), "image_shape": shape, "class_names": names}
    record.write_config(folder, settings, {}, about)
    fitted = {"temperature": {"ensemble": {"value": TEMPERATURE}}}
    (folder / "results.json").write_text(json.dumps(fitted))
    return folder
