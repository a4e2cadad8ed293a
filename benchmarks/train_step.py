# SPDX-License-Identifier: Apache-2.0
"""Compares the training step of a CIFAR ResNet with experts with the same step in PyTorch.

    python -m benchmarks.train_step [--cores=2] [--batch_size=128] [--output=FILE]

Both sides start from the same weights, and the losses of their first two steps must be equal: the
second checks the gradients. Needs the extra `torch`. `benchmarks/README.md` explains the figures.
"""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from balpoe_jax import cli
from balpoe_jax.data.types import TrainBatch
from balpoe_jax.errors import UserError
from balpoe_jax.reporting import tables
from benchmarks import measuring

# Largest relative difference of second losses, after updates that round differently.
_TOLERANCE = 1e-3


def run(
    backbone: str, experts: int, batch_size: int, cores: int, repeats: int, seconds: float
) -> dict[str, Any]:
    """Measures both sides.

    Raises:
        UserError: losses or numbers of parameters that are not equal.
    """
    # Not above: JAX, TensorFlow and PyTorch count the cores when they are imported.
    import torch

    from balpoe_jax.models import CIFAR_MODELS
    from benchmarks import torch_resnet

    torch.set_num_threads(cores)
    torch.manual_seed(0)
    program = _make_program(backbone, experts, batch_size)
    classes = len(program.context.class_counts)
    model = torch_resnet.Ensemble(CIFAR_MODELS[backbone].stage_sizes[0], experts, classes)
    batch = _batch(batch_size, program.image_shape, classes)
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    ours, num_parameters = _make_our_step(program, weights, batch)
    theirs = _make_their_step(program, model, batch)
    their_parameters = sum(p.numel() for p in model.parameters())
    if num_parameters != their_parameters:
        raise UserError(f"The networks have {num_parameters} and {their_parameters} parameters.")
    losses = [(ours(), theirs()) for _ in range(2)]
    _check_equal(losses)
    samples = measuring.take_turns(
        {
            "ours": lambda: measuring.measure(ours, seconds),
            "theirs": lambda: measuring.measure(theirs, seconds),
        },
        repeats,
    )
    return {
        "num_parameters": num_parameters,
        "losses": losses,
        **measuring.compare(samples["ours"], samples["theirs"], cores=1),
    }


def _make_program(backbone: str, experts: int, batch_size: int) -> Any:
    """The program of BalPoE on CIFAR-100-LT, on one CPU device."""
    import jax

    from balpoe_jax import parallel
    from balpoe_jax.config import resolve
    from balpoe_jax.config.dataset_defaults import cifar_config
    from balpoe_jax.data.datasets import published
    from balpoe_jax.experiment.build import build_program

    config = cifar_config("cifar100", 0.4, f"backbone={backbone},experts={experts}")
    config.batch_size = batch_size
    counts, image_shape = published("cifar100", 100.0)
    devices = parallel.make_parallel(devices=jax.devices("cpu")[:1])
    return build_program(resolve(config), devices, counts, image_shape)


def _make_our_step(
    program: Any, weights: dict[str, Any], batch: TrainBatch
) -> tuple[Callable[[], float], int]:
    """Our update on a fixed batch, which returns its loss, and the number of parameters.

    It starts from PyTorch's weights.
    """
    from balpoe_jax.experiment.program import num_parameters
    from balpoe_jax.torch_import import convert

    state: Any = program.init_state()
    state = state.replace(**program.parallel.replicate(convert(weights)))
    step, placed = program.map_train_step(), program.parallel.shard(batch)

    def update() -> float:
        nonlocal state
        state, metrics = step(state, placed)
        return float(metrics["loss"])

    return update, num_parameters(state.params)


def _make_their_step(program: Any, model: Any, batch: TrainBatch) -> Callable[[], float]:
    """PyTorch's update on a fixed batch, which returns its loss."""
    from balpoe_jax.losses import log_prior
    from benchmarks import torch_resnet

    trainer = torch_resnet.Trainer(
        model,
        np.array(log_prior(program.context.class_counts)),
        program.context.taus,
        program.learning_rate(1),
        program.settings.optim.momentum,
        program.settings.optim.weight_decay,
    )
    placed = torch_resnet.to_torch(batch)
    return lambda: trainer.step(placed)


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
    flags.DEFINE_string("backbone", "resnet32", "Network for small images.")
    flags.DEFINE_integer("experts", 3, "Number of experts, at least two.", lower_bound=2)
    flags.DEFINE_integer("batch_size", 128, "Number of images in a step.", lower_bound=2)
    flags.DEFINE_integer("cores", 2, "Number of cores for each side.", lower_bound=1)
    flags.DEFINE_integer("repeats", 5, "Number of turns of each side.", lower_bound=1)
    flags.DEFINE_float(
        "seconds", 4.0, "Seconds of a turn, which is at least one step.", lower_bound=0.0
    )
    flags.DEFINE_string("output", "", "JSON file for the figures, which are printed as well.")


def main(arguments: Sequence[str]) -> None:
    """Measures and prints, following the flags."""
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
