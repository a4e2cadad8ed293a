# SPDX-License-Identifier: Apache-2.0
"""Compiling for devices that are not there; where there is no TPU compiler, for CPUs."""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental import topologies as jax_topologies

from balpoe_jax.aot import examine, topologies
from balpoe_jax.aot.topologies import CHIPS, TOPOLOGIES, Chip, chip_of, compile_only_devices
from balpoe_jax.config import resolve
from balpoe_jax.data import datasets, pipeline
from balpoe_jax.errors import UserError
from balpoe_jax.experiment.build import build, default_expert_map
from balpoe_jax.experiment.settings import train_settings
from tests.helpers import ROOT
from tests.helpers.compilers import needs_libtpu
from tests.helpers.config_files import get_config

pytestmark = pytest.mark.integration


def tiny_config():
    config = get_config("digits_lt", "method=cross_entropy")
    config.optim.accumulation_steps = 2
    config.eval.batch_size = 30
    return config


@pytest.fixture(scope="module")
def found() -> dict:
    """Both steps of a tiny experiment on four CPUs that are taken for chips of 1 MB."""
    chip = Chip(hbm_bytes=10**6, peak_flops=1e12, flops_per_cycle=1000, slices=())
    return examine.examine_on(resolve(tiny_config()), jax.devices()[:4], chip)


def test_figures_of_both_steps(found: dict) -> None:
    assert found["num_parameters"] == sum(
        np.prod(leaf.shape)
        for leaf in jax.tree.leaves(build(resolve(tiny_config())).program.abstract_state().params)
    )
    assert (found["train"]["batch_size"], found["eval"]["batch_size"]) == (32, 32)
    train, evaluation = found["train"]["flops"], found["eval"]["flops"]
    first_convolution = 2 * 8 * 8 * 8 * 9 * 3 * 16  # of eight images; has no gradient of its input
    assert train["needed"] == 3 * evaluation["needed"] - first_convolution
    # The compiler leaves out padding, much of the work at 2x2, and counts the microbatch once.
    for flops, times in ((train, 2), (evaluation, 1)):
        assert 0.6 < times * flops["compiler"] / flops["needed"] < 1
    memory = found["train"]["memory"]
    assert memory["arguments"] > 2 * 4 * found["num_parameters"]  # and momentum
    parts = ("arguments", "outputs", "temporaries", "code")
    assert memory["total"] == sum(memory[part] for part in parts) - memory["aliased"]
    assert memory["fraction"] == memory["total"] / 10**6
    assert {each["kind"] for each in found["train"]["collectives"]} == {"all-reduce"}
    (gathered,) = (e for e in found["eval"]["collectives"] if e["kind"] == "all-gather")
    assert gathered["bytes"] == 32 * (10 * 4 + 4 + 1)  # logits, labels, mask
    assert found["train"]["cycles"] is None  # which only a TPU's compiler estimates


def test_text_and_json_of_the_figures(found: dict) -> None:
    json.dumps(found, allow_nan=False)
    text = examine.as_text(found)
    assert "resnet8, experts: 1 (loop), float32, 75,280 parameters, images of 8x8x3" in text
    assert "train: 32 (8 a device in 2 microbatches), to evaluate: 32 (8 a device)" in text
    rows = {line[:31].strip(): line[31:].split() for line in text.splitlines()}
    assert rows["utilisation, %"] == ["-", "-"]
    assert len(rows["memory in all, MB"]) == 2
    assert rows["all-gather"][0] == "0"


@pytest.mark.slow_cases("balpoe-float32")
@pytest.mark.parametrize(
    ("method", "dtype"), [("balpoe", "float32"), ("balpoe", "bfloat16"), ("bcl", "float32")]
)
def test_abstract_batches_are_those_of_the_pipeline(method: str, dtype: str) -> None:
    """Otherwise another step would be compiled than the one that runs."""
    config = get_config("digits_lt", f"method={method}")
    config.model.dtype = dtype
    experiment = build(resolve(config))
    train, evaluation = examine.abstract_batches(experiment.program)
    settings = train_settings(experiment.settings)[0]
    made = next(pipeline.train_batches(experiment.data.train, settings, 0, 1))
    size = experiment.program.eval_batch_size
    made_eval = next(
        pipeline.eval_batches(
            experiment.data.test, size, settings.mean, settings.std, dtype=settings.dtype
        )
    )
    for abstract, concrete in ((train, made), (evaluation, made_eval)):
        assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
        assert shapes(abstract) == shapes(concrete)


def test_an_abstract_plan_is_that_of_the_device_pipeline() -> None:
    config = get_config("digits_lt")
    config.augment.policy = "autoaugment_cifar"
    config.data.pipeline, config.parallel.mode = "device", "shard_map"
    experiment = build(resolve(config))
    step, plan, of_batches, constants = examine._planned_step(
        experiment.settings, experiment.program, experiment.data.class_counts
    )
    made = next(experiment.inputs.train(0, [(0, 1)]))
    placed = experiment.inputs._images(experiment.data.train)
    for abstract, concrete in ((plan, made), (of_batches["images"], placed)):
        assert shapes(abstract) == shapes(concrete)
    state = experiment.program.abstract_state()
    after, metrics = jax.eval_shape(step, state, plan, of_batches, constants)
    assert shapes(after) == shapes(state) and "loss" in metrics


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize(
    ("model", "platform", "expected"),
    [
        ("resnet32", "tpu", "vmap"),
        ("resnet50", "tpu", "loop"),
        ("resnext50", "tpu", "loop"),
        ("resnet32", "cpu", "loop"),
        ("resnet32", "gpu", "stacked"),
        ("resnet50", "gpu", "loop"),
    ],
)
def test_experts_are_mapped_as_suits_model_and_platform(model, platform, expected) -> None:
    assert default_expert_map(model, platform) == expected


def test_published_counts_need_no_data() -> None:
    counts, shape = datasets.published("cifar100", 100)
    assert (len(counts), counts.sum(), counts[0], counts[-1]) == (100, 10847, 500, 5)
    assert shape == (32, 32, 3)
    experiment = build(resolve(tiny_config()))
    counts, shape = datasets.published("digits", 26)
    np.testing.assert_array_equal(counts, experiment.data.class_counts)
    assert shape == experiment.program.image_shape
    with pytest.raises(UserError, match="Unknown data set 'mnist'; choose from digits"):
        datasets.published("mnist", 100)


def test_unknown_topologies_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"Unknown topology 'v5e:3x3'; choose one of v4: .*v5e:4x4"):
        chip_of("v5e:3x3")
    assert len(TOPOLOGIES) == len(set(TOPOLOGIES)) > 30


def test_clocks_are_plausible() -> None:
    for chip in CHIPS.values():
        assert 1.0e9 < chip.clock_hertz < 1.8e9


def test_jax_names_its_compiler() -> None:
    """Otherwise no version of libtpu would be refused."""
    assert any(re.match(r"libtpu==\d", line) for line in importlib.metadata.requires("jax"))


@pytest.mark.parametrize(
    ("extra", "package"),
    [
        (['libtpu==0.7.1.*; extra == "tpu"'], "libtpu==0.7.1.*"),
        ([], f"jax[tpu]=={jax.__version__}"),
    ],
)
def test_without_the_compiler_one_sentence_says_what_to_install(
    monkeypatch, extra: list[str], package: str
) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["numpy>=2.0", *extra])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = rf'libtpu, which is not installed; .* pip install "{re.escape(package)}" '
    with pytest.raises(UserError, match=message):
        compile_only_devices("v5e:2x2")


@pytest.fixture(params=["0.7.1", "0.7.1.2", None, "0.7.10", "0.7.2.1"])
def version(request, monkeypatch) -> str | None:
    """That of a libtpu for which nothing is compiled; of None there is no package."""

    def of_package(name: str) -> str:
        if request.param is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return request.param

    requirements = ["numpy>=2.0", 'libtpu==0.7.1.*; extra == "tpu"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requirements)
    monkeypatch.setattr(importlib.metadata, "version", of_package)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found")
    loaded = SimpleNamespace(devices=["one"])
    monkeypatch.setattr(jax_topologies, "get_topology_desc", lambda *args, **options: loaded)
    for name in topologies._NO_HOST:
        monkeypatch.setenv(name, os.environ.get(name, ""))  # taken back afterwards
    return request.param


def test_the_compiler_of_another_jax_is_refused_before_it_is_loaded(version: str | None) -> None:
    if version in ("0.7.1", "0.7.1.2", None):
        assert compile_only_devices("v5e:2x2") == ["one"]
        return
    message = rf"compiles for a TPU with libtpu 0\.7\.1\.\*, and libtpu {version} is installed; "
    with pytest.raises(UserError, match=rf'{message}.* pip install "libtpu==0\.7\.1\.\*"\.$'):
        compile_only_devices("v5e:2x2")


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "balpoe_jax.aot", "--config=configs/digits_lt.py", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command_ends_with_one_line_and_code_2() -> None:
    result = command("--topology=v9:1x1")
    assert result.returncode == 2
    assert result.stderr.startswith("Error: Unknown topology 'v9:1x1'")
    assert result.stderr.count("\n") == 1


@needs_libtpu
def test_every_topology_that_is_offered_is_known_to_the_compiler() -> None:
    for topology in TOPOLOGIES:
        devices = compile_only_devices(topology)
        sides = [int(side) for side in topology.partition(":")[2].split("x")]
        cores = 2 if topology.startswith("v4:") else 1
        assert len(devices) == cores * np.prod(sides), topology


_LOAD = """
from balpoe_jax.aot.topologies import compile_only_devices

print(len(compile_only_devices("v5e:2x2")), flush=True)
input()
"""


@needs_libtpu
def test_processes_compile_beside_each_other_and_one_that_must_not_says_so() -> None:
    exclusive = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "0"}

    def load(**environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", _LOAD],
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if k not in exclusive} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    holder = load(**exclusive)
    try:
        assert holder.stdout.readline() == "4\n"
        assert load().communicate("\n", timeout=300)[0] == "4\n"
        refused = command("--topology=v5e:2x2", **exclusive)
    finally:
        holder.communicate("\n", timeout=300)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("Error: Another process has the TPU compiler")


@needs_libtpu
@pytest.mark.parametrize(("sync", "accumulate", "count"), [(False, 1, 1), (True, 2, 2 * 2 * 7 + 1)])
def test_a_tpu_gets_cycles_and_one_all_reduce_of_all_gradients(
    sync: bool, accumulate: int, count: int
) -> None:
    """The smallest network, of seven BatchNorms, and a slice of four chips."""
    config = tiny_config()
    config.parallel.sync_batch_norm = sync
    config.optim.accumulation_steps = accumulate
    found = examine.examine(resolve(config), "v5e:2x2")
    (reduced,) = found["train"]["collectives"]
    assert (reduced["kind"], reduced["count"]) == ("all-reduce", count)
    assert reduced["bytes"] > 4 * found["num_parameters"]
    for step in (found["train"], found["eval"]):
        assert step["cycles"] > 1000
        assert 0 < step["utilisation"] < 1
