# SPDX-License-Identifier: Apache-2.0
"""Exports in their own runtimes against the run's own outputs, for each family of trunks."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import balpoe_jax
from balpoe_jax.errors import UserError
from balpoe_jax.export import __main__ as exporting
from balpoe_jax.predictor import Predictor
from tests.helpers import commands, flag_calls, untrained_runs

# Networks of real size run for longer than they are compiled.
pytestmark = [pytest.mark.integration, pytest.mark.optimised]

# Config, arguments and size of the images of each family.
FAMILIES = {
    "resnet32": ("digits_lt", "", None),
    "bbn": ("cifar100_lt", "backbone=resnet32_bbn,experts=2", None),
    "one expert": ("cifar100_lt", "backbone=resnet8,experts=1,method=cross_entropy", None),
    "bottleneck": ("imagenet_lt", "backbone=resnet50,experts=2", 32),
    "grouped": ("imagenet_lt", "backbone=resnext50,experts=2", 32),
    "router": ("cifar100_lt", "backbone=resnet8,method=ride_router", None),
    "evidence": ("cifar100_lt", "backbone=resnet8,method=tlc", None),
    "projections": ("cifar100_lt", "backbone=resnet8,method=bcl", None),
    "unequal depth": ("cifar100_lt", "backbone=resnet8,method=shike", None),
}
NUMBERS = (1, 3, 17)

# Of these `make test` exports one, to ONNX; `make test-all` all.
OTHERS = [name for name in FAMILIES if name != "resnet32"]

needs_onnx = pytest.mark.skipif(
    importlib.util.find_spec("onnx") is None or importlib.util.find_spec("onnxruntime") is None,
    reason="onnx and onnxruntime are not installed",
)


@pytest.fixture(scope="module", params=FAMILIES)
def predictor(request: pytest.FixtureRequest, tmp_path_factory) -> Predictor:
    config, arguments, size = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("run")
    return balpoe_jax.load(str(untrained_runs.make(folder, config, arguments, size)))


def images(predictor: Predictor, number: int) -> np.ndarray:
    side = predictor.image_size
    random = np.random.default_rng(number)
    return random.integers(0, 256, (number, side, side, 3)).astype(np.uint8)


def expected(predictor: Predictor, number: int) -> dict[str, np.ndarray]:
    """What the evaluation's way of predicting gives."""
    found = predictor.predict(images(predictor, number))
    experts = np.moveaxis(found.expert_logits, 0, 1)
    return {
        "expert_logits": experts, "logits": found.logits, "probabilities": found.probabilities,
    }  # fmt: skip


def assert_close(found: dict, wanted: dict[str, np.ndarray]) -> None:
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        scale = np.abs(array).max()
        np.testing.assert_allclose(np.asarray(found[name]), array, rtol=1e-4, atol=1e-5 * scale)
        assert np.asarray(found[name]).dtype == np.float32


@pytest.mark.slow  # the formats are compared with the evaluation, too
def test_the_function_is_the_evaluation(predictor: Predictor) -> None:
    for number in NUMBERS:
        assert_close(
            predictor.as_function()(images(predictor, number)), expected(predictor, number)
        )


@pytest.mark.slow_cases(*OTHERS)
def test_stablehlo_of_any_number_of_images(predictor: Predictor, tmp_path: Path) -> None:
    from balpoe_jax.export import stablehlo

    exported = jax.export.deserialize(bytearray(stablehlo.write(predictor, tmp_path).read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    for number in NUMBERS:
        assert_close(exported.call(images(predictor, number)), expected(predictor, number))


@needs_onnx
@pytest.mark.slow_cases(*(name for name in OTHERS if name != "unequal depth"))
def test_onnx_in_its_own_runtime(predictor: Predictor, tmp_path: Path) -> None:
    import onnxruntime

    from balpoe_jax.export import onnx_model

    path = onnx_model.write(predictor, tmp_path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    for number in NUMBERS:
        found = session.run(None, {"images": images(predictor, number)})
        assert_close(dict(zip(names, found, strict=True)), expected(predictor, number))


@pytest.mark.slow_cases(*OTHERS)
def test_saved_model_in_tensorflow(
    predictor: Predictor, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    import tensorflow as tf

    from balpoe_jax.export import saved_model

    if "router" in request.node.name:  # top_k is an operation that TensorFlow 2.21 does not know
        with pytest.raises(UserError, match=r"does not run this network: .* choose --format=stabl"):
            saved_model.write(predictor, tmp_path)
        assert not (tmp_path / saved_model.FOLDER).exists()
        return
    program = tf.saved_model.load(str(saved_model.write(predictor, tmp_path)))
    serve = program.signatures["serving_default"]
    for number in NUMBERS:
        found = serve(images=tf.constant(images(predictor, number)))
        assert_close(
            {name: value.numpy() for name, value in found.items()}, expected(predictor, number)
        )


ALONE = """
import sys, numpy, jax
from jax import export
exported = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
found = exported.call(numpy.load(sys.argv[2]))
numpy.savez(sys.argv[3], **found)
assert not {"balpoe_jax", "flax", "tensorflow"} & set(sys.modules)
"""


def test_the_command_writes_all_formats_and_jax_alone_runs_one(tmp_path: Path) -> None:
    run = untrained_runs.make(tmp_path / "run", "digits_lt", "")
    output = tmp_path / "out"
    given = f"--workdir={run}", "--format=stablehlo,safetensors", f"--output={output}"
    flag_calls.call(exporting, *given)
    predictor = balpoe_jax.load(str(run))
    about = json.loads((output / "model.json").read_text())
    assert about == json.loads(json.dumps(exporting.describe(predictor)))
    assert about["temperature"] == untrained_runs.TEMPERATURE and about["classes"][3] == "class 3"
    np.save(tmp_path / "images.npy", images(predictor, 17))
    paths = [output / "model.stablehlo", tmp_path / "images.npy", tmp_path / "o.npz"]
    environment = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", ALONE, *map(str, paths)], check=True, env=environment, cwd=tmp_path
    )
    assert_close(dict(np.load(tmp_path / "o.npz")), expected(predictor, 17))


def test_weights_are_the_variables(tmp_path: Path) -> None:
    from flax import traverse_util
    from safetensors.numpy import load_file

    from balpoe_jax.export import weights

    run = untrained_runs.make(tmp_path / "run", "digits_lt", "")
    predictor = balpoe_jax.load(str(run))
    stored = load_file(weights.write(predictor, tmp_path))
    flat = traverse_util.flatten_dict(predictor.variables, sep="/")
    assert set(stored) == set(flat)
    for name, value in flat.items():
        np.testing.assert_array_equal(stored[name], np.asarray(value))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Expected the workdir of a trained run; give it with --workdir=RUN"),
        (("--workdir=.", "--format=pickle"), "--format must be one or more of stablehlo, savedmo"),
        (("--workdir=/none",), "/none"),
        (("--workdir=.", "more"), "Unexpected argument 'more'"),
    ],
)
def test_mistakes_are_one_sentence(arguments: tuple[str, ...], message: str) -> None:
    result = commands.run("balpoe_jax.export", *arguments)
    assert result.returncode == 2 and message in result.stderr
    assert result.stderr.strip().count("\n") == 0


@needs_onnx
def test_an_operation_that_onnx_has_not_is_named() -> None:
    import jax.numpy as jnp

    from balpoe_jax.export.onnx_graph import NUMBER, Graph, Tensor, trace

    closed = jax.make_jaxpr(lambda x: jnp.sort(x, axis=1))(jnp.zeros((NUMBER, 4)))
    given = Tensor("images", (NUMBER, 4), (NUMBER, 4), np.dtype(np.float32))
    with pytest.raises(UserError, match=r"it has JAX's operation sort; choose --format=stablehlo"):
        trace(Graph(), closed, given)
