# SPDX-License-Identifier: Apache-2.0
"""Times the training steps of `step_cases` in PyTorch, in a process of its own.

`benchmarks.accelerator` runs this. It also writes weights, a batch and the first losses. The side
in JAX starts from them and has to get the same losses.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from balpoe_jax import cli
from balpoe_jax.data.types import TrainBatch
from balpoe_jax.experiment.program import Program
from balpoe_jax.losses import log_prior
from balpoe_jax.models import CIFAR_MODELS
from benchmarks import measuring, step_cases, torch_resnet, torch_resnet50
from benchmarks.sides import Job, Results, Row
from benchmarks.step_cases import EXPERTS, Sizes, TorchCase
from benchmarks.step_programs import make_config, make_program

# Number of steps before a graph is captured, and before a step is timed.
_WARM_UP = 4


class Step:
    """An update of a model on a batch on its device, which returns before it is done.

    Args:
        model: Network, moved to the device.
        program: Program of the same training in JAX, for its taus, prior and optimizer.
        batch: Batch of `step_cases.ready_batch`.
        device: "cuda" or "cpu".
        case: Case, for its precision and the way to run it.
        tf32: Whether products of float32 may be rounded to TF32.

    Attributes:
        loss: Loss of the newest step, on the device.
    """

    def __init__(
        self,
        model: nn.Module,
        program: Program,
        batch: TrainBatch,
        device: str,
        case: TorchCase,
        tf32: bool = True,
    ) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = True
        self._device, self._how, self._half = device, case.how, case.dtype == "bfloat16"
        last: Any = torch.channels_last
        self._model = model.to(device=device, memory_format=last).train()
        prior = torch.from_numpy(np.array(log_prior(program.context.class_counts))).to(device)
        taus = torch.tensor(program.context.taus, device=device)
        self._bias = taus[:, None, None] * prior
        options = program.settings.optim
        self._optimizer = torch.optim.SGD(
            model.parameters(),
            program.learning_rate(1),
            options.momentum,
            weight_decay=options.weight_decay,
            nesterov=options.nesterov,
            fused=device == "cuda",
        )
        placed = {name: x.to(device) for name, x in torch_resnet.to_torch(batch).items()}
        self._batch = placed | {"images": placed["images"].contiguous(memory_format=last)}
        self._forward: Callable[[], torch.Tensor] = self._loss
        self.loss = torch.zeros(())

    def prepare(self) -> None:
        """Makes the first steps, and compiles the step or captures its graph."""
        if self._how == "compile":
            self._forward = torch.compile(self._loss)
        if self._how != "graph":
            for _ in range(_WARM_UP):
                self.run()
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._update()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.loss = self._update()
        self._graph.replay()

    def run(self) -> None:
        """Begins one update."""
        if self._how == "graph":
            self._graph.replay()
        else:
            self.loss = self._update()

    def _update(self) -> torch.Tensor:
        self._optimizer.zero_grad(set_to_none=self._how != "graph")
        loss = self._forward()
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def _loss(self) -> torch.Tensor:
        batch = self._batch
        with torch.autocast(self._device, torch.bfloat16, enabled=self._half):
            logits = self._model(batch["images"])
        log_probabilities = functional.log_softmax(logits.float() + self._bias, dim=-1)

        def picked(labels: torch.Tensor) -> torch.Tensor:
            index = labels.expand(len(logits), -1)[..., None]
            return log_probabilities.gather(-1, index)[..., 0]

        weight = batch["weight"]
        mixed = weight * picked(batch["labels"]) + (1 - weight) * picked(batch["other_labels"])
        return -mixed.mean()


def make_model(case: TorchCase, program: Program, sizes: Sizes) -> nn.Module:
    """The network of a case, with weights that are the same each time."""
    torch.manual_seed(0)
    classes = len(program.context.class_counts)
    if case.network == "small":
        blocks = CIFAR_MODELS[sizes.small].stage_sizes[0]
        return torch_resnet.Ensemble(blocks, EXPERTS, classes)
    return torch_resnet50.Ensemble(case.network, EXPERTS, classes, sizes.photo_stages)


def first_losses(case: TorchCase, sizes: Sizes, device: str, path: Path) -> Row:
    """The losses of the first two steps; weights and batch are written to a file as well.

    Args:
        case: A case in float32.
        sizes: Sizes of networks and images.
        device: "cuda" or "cpu".
        path: Path of the `.npz` file to write.

    Returns:
        `losses` in full precision, and `losses_tf32` with the device's default precision.
    """
    program = make_program(make_config(case, sizes), sizes)
    counts, shape = program.context.class_counts, program.image_shape
    batch = step_cases.ready_batch(step_cases.batch_size(case, sizes), shape, counts)
    losses: dict[str, list[float]] = {}
    for name, tf32 in (("losses", False), ("losses_tf32", True)):
        model = make_model(case, program, sizes)
        weights = {name: x.detach().numpy().copy() for name, x in model.state_dict().items()}
        step = Step(model, program, batch, device, case, tf32)
        losses[name] = []
        for _ in range(2):
            step.run()
            losses[name].append(float(step.loss))
    arrays = {f"weight {name}": x for name, x in weights.items()}
    arrays |= {f"batch {name}": np.asarray(x) for name, x in batch._asdict().items()}
    np.savez(path, losses=losses["losses"], **arrays)
    return {"network": sizes.small if case.network == "small" else case.network, **losses}


def measure(case: TorchCase, sizes: Sizes, device: str) -> Row:
    """Times a case."""
    program = make_program(make_config(case, sizes), sizes)
    counts, shape = program.context.class_counts, program.image_shape
    size = step_cases.batch_size(case, sizes)
    batch = step_cases.ready_batch(size, shape, counts)
    step = Step(make_model(case, program, sizes), program, batch, device, case)
    gpu = device == "cuda"
    wait = torch.cuda.synchronize if gpu else lambda: None
    start = time.perf_counter()
    step.prepare()
    wait()
    prepared = time.perf_counter() - start
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    rounds = measuring.time_rounds(step.run, wait, sizes.seconds)
    return {
        **rounds.per_step(1, size),
        "prepare_s": prepared,
        "loss": float(step.loss),
        "peak_mb": torch.cuda.max_memory_allocated() / 1e6 if gpu else None,
    }


def main(arguments: Sequence[str]) -> None:
    """Runs the job."""
    job = Job.parse(arguments)
    jax.config.update("jax_platforms", "cpu")  # the accelerator's memory is PyTorch's
    results, sizes = Results(job), step_cases.sizes(job.options["toy"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    results.write(case="device", kind=name, torch=torch.__version__, cuda=torch.version.cuda)
    check = job.options.get("check")
    if check:
        first = TorchCase(job.options["network"], 64, "float32", "eager", 10)

        def losses() -> Row:
            return first_losses(first, sizes, device, Path(check))

        results.attempt({"case": "check"}, 10, losses)
    for values in job.options["cases"]:
        case = TorchCase(**values)
        label = {
            "case": "step",
            "network": sizes.small if case.network == "small" else case.network,
            "batch": step_cases.batch_size(case, sizes),
            "dtype": case.dtype,
            "how": case.how,
        }
        if device == "cpu" and case.how == "graph":
            results.write(**label, skipped="CUDA graphs need a GPU")
            continue

        def one(case: TorchCase = case) -> Row:
            return measure(case, sizes, device)

        results.attempt(label, case.estimate, one)


if __name__ == "__main__":
    cli.run(lambda: None, main)
