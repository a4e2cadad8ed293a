# SPDX-License-Identifier: Apache-2.0
"""The training step of a CIFAR ResNet with experts against the same step in PyTorch.

    python -m benchmarks.train_step [--cores=2] [--batch_size=128] [--output=FILE]

Both sides start from the same weights, and the losses of their first two steps must be equal: the
second checks the gradients. Needs the extra `torch`. `benchmarks/README.md` explains the figures.
"""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from balpoe_jax import cli
from balpoe_jax.data.types import TrainBatch
from balpoe_jax.errors import UserError
from balpoe_jax.reporting import tables
from benchmarks import measuring

# Of the second losses, after an update that rounds differently; the first are closer.
_TOLERANCE = 1e-3


def run(
    backbone: str, experts: int, batch_size: int, cores: int, repeats: int, seconds: float
) -> dict[str, Any]:
    """Measures both sides.

    Raises:
        UserError: losses that are not equal.
    """
    # Not above: JAX, TensorFlow and PyTorch count the cores when they are imported.
    import jax
    import torch

    from balpoe_jax import parallel
    from balpoe_jax.config import resolve
    from balpoe_jax.config.dataset_defaults import cifar_config
    from balpoe_jax.data.datasets import published
    from balpoe_jax.experiment.build import build_program
    from balpoe_jax.experiment.program import num_parameters
    from balpoe_jax.losses import log_prior
    from balpoe_jax.models import CIFAR_MODELS
    from balpoe_jax.torch_import import convert
    from benchmarks import torch_resnet

    torch.set_num_threads(cores)
    torch.manual_seed(0)
    config = cifar_config("cifar100", 0.4, f"backbone={backbone},experts={experts}")
    config.batch_size = batch_size
    counts, image_shape = published("cifar100", 100.0)
    devices = parallel.make_parallel(devices=jax.devices("cpu")[:1])
    program = build_program(resolve(config), devices, counts, image_shape)
    model = torch_resnet.Ensemble(CIFAR_MODELS[backbone].stage_sizes[0], experts, len(counts))
    trainer = torch_resnet.Trainer(
        model,
        np.array(log_prior(counts)),
        program.context.taus,
        program.learning_rate(1),
        config.optim.momentum,
        config.optim.weight_decay,
    )
    batch = _batch(batch_size, image_shape, len(counts))
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    state: Any = program.init_state()
    state = state.replace(**devices.replicate(convert(weights)))
    step = program.map_train_step()
    ours_batch, theirs_batch = devices.shard(batch), torch_resnet.to_torch(batch)

    def ours() -> float:
        nonlocal state
        state, metrics = step(state, ours_batch)
        return float(metrics["loss"])

    def theirs() -> float:
        return trainer.step(theirs_batch)

    losses = [(ours(), theirs()) for _ in range(2)]
    _check_equal(losses)
    samples = measuring.take_turns(
        {
            "ours": lambda: measuring.measure(ours, seconds),
            "theirs": lambda: measuring.measure(theirs, seconds),
        },
        repeats,
    )
    parameters = num_parameters(state.params), sum(p.numel() for p in model.parameters())
    if parameters[0] != parameters[1]:
        raise UserError(f"The networks have {parameters[0]} and {parameters[1]} parameters.")
    return {
        "num_parameters": parameters[0],
        "losses": losses,
        **measuring.compare(samples["ours"], samples["theirs"], cores=1),
    }


def _batch(batch_size: int, image_shape: tuple[int, ...], num_classes: int) -> TrainBatch:
    random = np.random.default_rng(0)
    images = random.standard_normal((batch_size, *image_shape), np.float32)
    labels, others = random.integers(0, num_classes, (2, batch_size)).astype(np.int32)
    return TrainBatch((images,), labels, others, np.full(batch_size, 0.7, np.float32))


def _check_equal(losses: Sequence[tuple[float, float]]) -> None:
    for number, (ours, theirs) in enumerate(losses, start=1):
        if not abs(ours - theirs) <= _TOLERANCE * abs(theirs):
            raise UserError(
                f"The losses of step {number} should be equal, but are {ours:.6f} with JAX and "
                f"{theirs:.6f} with PyTorch: the two do not do the same."
            )


def as_text(found: dict[str, Any]) -> str:
    """The figures for a terminal."""
    columns = (tables.Column("JAX"), tables.Column("PyTorch"), tables.Column("JAX/PyTorch"))

    def row(key: str, ratio: float) -> list[str]:
        times = [1000 / found[side][key] for side in ("ours", "theirs")]
        return [*(f"{milliseconds:,.0f}" for milliseconds in times), f"{1 / ratio:.2f}"]

    rows = [
        ("ms a step", row("per_second", found["ratio"])),
        ("ms of processor", row("per_cpu_second", found["cpu_ratio"])),
    ]
    low, high = (1 / ratio for ratio in reversed(found["ratio_range"]))
    return "\n".join(
        (
            measuring.machine_line(found["machine"]),
            f"{found['backbone']}, {found['experts']} experts, {found['num_parameters']:,} "
            f"parameters on both sides, batches of {found['batch_size']}, {found['cores']} core(s)",
            "Losses of the first steps: "
            + ", ".join(f"{a:.6f} and {b:.6f}" for a, b in found["losses"]),
            f"Medians of {found['repeats']} turns; the ratio by the clock was "
            f"{low:.2f} to {high:.2f}",
            "",
            tables.as_text(tables.Table("step", "", columns, rows)),
        )
    )


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("backbone", "resnet32", "Of the networks for small images.")
    flags.DEFINE_integer("experts", 3, "At least two.", lower_bound=2)
    flags.DEFINE_integer("batch_size", 128, "Images a step.", lower_bound=2)
    flags.DEFINE_integer("cores", 2, "For each side.", lower_bound=1)
    flags.DEFINE_integer("repeats", 5, "Turns of each side.", lower_bound=1)
    flags.DEFINE_float("seconds", 4.0, "Of a turn, which is at least one step.", lower_bound=0.0)
    flags.DEFINE_string("output", "", "File to write the figures to as JSON, beside printing them.")


def main(arguments: Sequence[str]) -> None:
    """Measures and prints as the flags say."""
    if len(arguments) > 1:
        raise UserError(f"Unexpected argument {arguments[1]!r}; every option starts with --.")
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            "This compares with PyTorch, which is not installed; install it with pip install "
            "'balpoe-jax[torch]' or, for a processor alone, torch from its CPU index."
        )
    values = flags.FLAGS
    measuring.pin(values.cores)
    options: dict[str, Any] = {
        name: values[name].value
        for name in ("backbone", "experts", "batch_size", "cores", "repeats", "seconds")
    }
    machine = measuring.describe_machine(("jax", "torch"))
    found = {"machine": machine, **options, **run(**options)}
    print(as_text(found))
    if values.output:
        Path(values.output).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run(define_flags, main)
