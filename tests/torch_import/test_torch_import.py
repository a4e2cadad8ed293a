# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the reference: names, layouts, files and refusals.

What needs torch is skipped without it; the rest covers the same paths with arrays.
"""

import collections
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balpoe_jax.config import resolve
from balpoe_jax.data import pipeline
from balpoe_jax.errors import UserError
from balpoe_jax.evaluate import evaluate
from balpoe_jax.experiment.build import build
from balpoe_jax.models import create_model
from balpoe_jax.models.weight_files import load_checkpoint, load_state_dict
from balpoe_jax.run.checkpoint import Checkpoints
from balpoe_jax.torch_import import check_against, convert
from balpoe_jax.torch_import.workdir import import_checkpoint
from tests.helpers import commands
from tests.helpers.config_files import get_config
from tests.helpers.reference_weights import DIGITS, reference_state, small_state

State = dict[str, np.ndarray]


def abstract_variables(**options: Any) -> Any:
    model = create_model("resnet32", **options)
    image = jnp.zeros((1, 8, 8, 3))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))


# Names and layouts.


@pytest.mark.integration
@pytest.mark.parametrize("num_experts", [1, 2, 3, 7])
@pytest.mark.parametrize("classifier", ["cosine", "linear"])
def test_gives_the_tree_of_the_model(num_experts: int, classifier: str) -> None:
    options: dict[str, Any] = {
        "num_classes": 100,
        "num_experts": num_experts,
        "classifier": classifier,
        "reduce_dimension": num_experts == 2,
        "stage_sizes": (1, 3, 2),
    }
    converted = convert(reference_state(**options))
    chex.assert_trees_all_equal_shapes_and_dtypes(converted, abstract_variables(**options))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(converted))


def test_one_expert_has_names_without_an_index() -> None:
    state = small_state(num_experts=1)
    assert "backbone.layer2.0.conv1.weight" in state and "backbone.linear.weight" in state
    kernel = convert(state)["params"]["expert"]["body"]["layer2"]["block0"]["conv1"]["kernel"]
    assert kernel.shape == (1, 3, 3, 16, 32)


def test_values_go_where_they_belong() -> None:
    state = small_state(classifier="linear")
    variables = convert(state)
    params, stats = variables["params"], variables["batch_stats"]
    row, column, fan_in, fan_out = 0, 2, 5, 30
    for e in range(3):
        torch_kernel = state[f"backbone.layer3s.{e}.0.conv2.weight"]
        ours = params["expert"]["body"]["layer3"]["block0"]["conv2"]["kernel"]
        assert ours[e, row, column, fan_in, fan_out] == torch_kernel[fan_out, fan_in, row, column]
        head = params["expert"]["head"]["dense"]
        assert head["kernel"][e, 7, 4] == state[f"backbone.linears.{e}.weight"][4, 7]
        np.testing.assert_array_equal(head["bias"][e], state[f"backbone.linears.{e}.bias"])
        np.testing.assert_array_equal(
            stats["expert"]["body"]["layer2"]["block0"]["bn2"]["var"][e],
            state[f"backbone.layer2s.{e}.0.bn2.running_var"],
        )
    trunk = params["trunk"]
    np.testing.assert_array_equal(trunk["bn1"]["scale"], state["backbone.bn1.weight"])
    np.testing.assert_array_equal(trunk["bn1"]["bias"], state["backbone.bn1.bias"])
    np.testing.assert_array_equal(stats["trunk"]["bn1"]["mean"], state["backbone.bn1.running_mean"])
    assert trunk["conv1"]["kernel"][0, 1, 2, 9] == state["backbone.conv1.weight"][9, 2, 0, 1]


def test_the_cosine_weight_keeps_its_layout() -> None:
    state = small_state(num_classes=64)  # square, so that a transposition would not show in shapes
    kernel = convert(state)["params"]["expert"]["head"]["kernel"]
    for e in range(3):
        np.testing.assert_array_equal(kernel[e], state[f"backbone.linears.{e}.weight"])


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_keeps_the_dtype(dtype: type) -> None:
    state = {name: value.astype(dtype) for name, value in small_state().items()}
    assert {leaf.dtype for leaf in jax.tree.leaves(convert(state))} == {np.dtype(dtype)}


def test_drops_the_prefix_of_data_parallel_and_copies() -> None:
    state = small_state()
    converted = convert({f"module.{name}": value for name, value in state.items()})
    chex.assert_trees_all_equal(converted, convert(state))
    expected = converted["params"]["trunk"]["bn1"]["scale"].copy()
    state["backbone.bn1.weight"][:] = 0
    np.testing.assert_array_equal(converted["params"]["trunk"]["bn1"]["scale"], expected)


def test_does_without_the_counters() -> None:
    state = small_state()
    without = {name: value for name, value in state.items() if "num_batches" not in name}
    assert len(without) < len(state)
    chex.assert_trees_all_equal(convert(without), convert(state))


# What does not fit.


def without(name: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if name not in key}


def replaced(name: str, value: np.ndarray) -> Callable[[State], State]:
    return lambda state: {**state, name: value}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without("layer2s.1.0.bn1.bias"), r": missing backbone\.layer2s\.1\.0\.bn1\.bias\.$"),
        (
            without("s.1."),  # the expert in the middle
            r": missing backbone\.layer2s\.1\.0\.bn1\.bias, .* and 11 more\.$",
        ),
        (without("linears"), r": missing backbone\.linears\.0\.weight, .*linears\.2\.weight\.$"),
        (
            replaced("backbone.layer1.0.conv3.weight", np.zeros((16, 16, 1, 1))),
            r": unexpected backbone\.layer1\.0\.conv3\.weight\.$",
        ),
        (
            replaced("backbone.layer4s.0.0.bn1.weight", np.zeros(64)),
            r": unexpected backbone\.layer4s\.0\.0\.bn1\.weight\.$",
        ),
        (
            replaced("backbone.linears.123.weight", np.zeros((64, 10))),
            r": unexpected backbone\.linears\.123\.weight\.$",
        ),
        (replaced("fc.bias", np.zeros(3)), r": unexpected fc\.bias\.$"),
        (
            replaced("backbone.layer3s.2.0.conv1.weight", np.zeros((64, 16, 3, 3))),
            r": misshapen backbone\.layer3s\.2\.0\.conv1\.weight \(64, 16, 3, 3\) "
            r"instead of \(64, 32, 3, 3\)\.$",
        ),
        (
            replaced("backbone.linears.1.weight", np.zeros((64, 11))),
            r"misshapen backbone\.linears\.1\.weight \(64, 11\) instead of \(64, 10\)",
        ),
        (
            replaced("backbone.linears.0.weight", np.zeros(())),
            r"misshapen backbone\.linears\.0\.weight \(\) instead of \(64, 10\)",
        ),
        (
            replaced("backbone.bn1.weight", np.zeros(16, np.int32)),
            r"floating-point numbers, got backbone\.bn1\.weight of int32\.$",
        ),
        (lambda _: {}, "holds no parameters"),
        (lambda _: {"fc.num_batches_tracked": np.zeros(())}, "holds no parameters"),
    ],
)
def test_lists_what_does_not_fit(change: Callable[[State], State], expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        convert(change(small_state()))
    assert "\n" not in str(caught.value)


def test_names_all_kinds_of_misfit_at_once() -> None:
    state = small_state()
    del state["backbone.bn1.bias"]
    state["backbone.bn9.bias"] = np.zeros(16)
    state["backbone.bn1.weight"] = np.zeros(17)
    pattern = (
        r"missing backbone\.bn1\.bias; unexpected backbone\.bn9\.bias; misshapen .*bn1\.weight"
    )
    with pytest.raises(UserError, match=pattern):
        convert(state)


def test_accepts_variables_of_the_same_model() -> None:
    check_against(convert(small_state()), abstract_variables(**DIGITS))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_experts": 2}, r"unexpected backbone\.layer2s\.2\.0\.bn1\.bias, "),
        (
            {"num_experts": 1},
            r"missing backbone\.layer2\.0\.bn1\.bias, .*unexpected .*layer2s\.0\.",
        ),
        ({"stage_sizes": (1, 1, 2)}, r"missing backbone\.layer3s\.0\.1\.bn1\.bias, "),
        ({"classifier": "linear"}, r"missing backbone\.linears\.0\.bias, "),
        ({"num_classes": 100}, r"linears\.0\.weight \(64, 10\) instead of \(64, 100\)"),
        ({"reduce_dimension": True}, r"layer2s\.0\.0\.bn1\.bias \(32,\) instead of \(24,\)"),
    ],
)
def test_refuses_variables_of_another_model(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        check_against(convert(small_state()), abstract_variables(**{**DIGITS, **changes}))


# Against an independent network.


def torch_logits(state: State, images: np.ndarray, scale: float) -> np.ndarray:
    """Logits float64 `[E, B, C]` of the reference's network in evaluation, for images NHWC."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    tensors = {name: torch.from_numpy(value) for name, value in state.items()}

    def norm(name: str, x: Any) -> Any:
        leaves = [tensors[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
        return functional.batch_norm(x, *leaves, training=False, eps=1e-5)

    def block(name: str, x: Any, stride: int) -> Any:
        y = functional.conv2d(x, tensors[f"{name}.conv1.weight"], stride=stride, padding=1)
        y = functional.relu(norm(f"{name}.bn1", y))
        y = norm(f"{name}.bn2", functional.conv2d(y, tensors[f"{name}.conv2.weight"], padding=1))
        added = y.shape[1] - x.shape[1]
        x = functional.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, added // 2, added // 2))
        return functional.relu(x + y)

    def stage(name: str, x: Any, stride: int) -> Any:
        blocks = {int(key.split(".")[name.count(".") + 1]) for key in tensors if f"{name}." in key}
        for i in sorted(blocks):
            x = block(f"{name}.{i}", x, stride if i == 0 else 1)
        return x

    def head(name: str, x: Any) -> Any:
        weight = tensors[f"{name}.weight"]
        if f"{name}.bias" in tensors:
            return functional.linear(x, weight, tensors[f"{name}.bias"])
        return scale * functional.normalize(x, dim=1) @ functional.normalize(weight, dim=0)

    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    x = functional.conv2d(x, tensors["backbone.conv1.weight"], padding=1)
    shared = stage("backbone.layer1", functional.relu(norm("backbone.bn1", x)), 1)
    experts = sorted({m[1] for m in (re.match(r".*layer2(s\.\d+)?\.", key) for key in state) if m})
    logits = []
    for expert in experts if experts != [None] else [""]:
        y = stage(f"backbone.layer2{expert}", shared, 2)
        y = stage(f"backbone.layer3{expert}", y, 2)
        logits.append(head(f"backbone.linear{expert}", y.mean(dim=(2, 3))))
    return torch.stack(logits).numpy()


@pytest.mark.parametrize("num_experts", [1, 3])
@pytest.mark.parametrize("classifier", ["cosine", "linear"])
def test_logits_are_those_of_pytorch(num_experts: int, classifier: str) -> None:
    options: dict[str, Any] = {
        "num_classes": 10,
        "num_experts": num_experts,
        "classifier": classifier,
        "stage_sizes": (1, 2, 1),
    }
    state = {k: v.astype(np.float64) for k, v in reference_state(**options).items()}
    images = np.random.default_rng(0).standard_normal((2, 14, 16, 3))
    expected = torch_logits(state, images, scale=30.0)
    model = create_model("resnet8", **options)
    with jax.enable_x64(True):
        logits = model.apply(convert(state), images, train=False).logits
    assert logits.dtype == np.float64
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-9)
    assert np.abs(expected).max() > 1


# Files.


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "pth", "pt"])
def test_reads_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    state, path = small_state(), tmp_path / f"file.{suffix}"
    if suffix == "npz":
        np.savez(path, **state)  # type: ignore[arg-type]
    elif suffix == "safetensors":
        pytest.importorskip("safetensors.numpy").save_file(state, path)
    else:
        torch = pytest.importorskip("torch")
        torch.save({name: torch.from_numpy(value) for name, value in state.items()}, path)
    loaded, epoch = load_checkpoint(path)
    assert epoch is None
    assert {k: v.dtype for k, v in loaded.items()} == {k: v.dtype for k, v in state.items()}
    chex.assert_trees_all_equal(loaded, state)


class ConfigParser:
    """Like the reference's, whose instances are in its checkpoints."""

    def __init__(self) -> None:
        self._config = collections.OrderedDict(name="run", arch={"type": "ResNet32Model"})
        self.resume = pathlib.PosixPath("saved/model_best.pth")
        self._save_dir = self._log_dir = pathlib.Path("saved") / "models"
        self.log_levels = {0: 30, 1: 20, 2: 10}


def genuine_checkpoint(torch: Any, state: State, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A dict of the reference's shape; its config is of a module that is gone after saving."""
    module = types.ModuleType("parse_config")
    vars(module)["ConfigParser"] = ConfigParser
    monkeypatch.setitem(sys.modules, "parse_config", module)
    monkeypatch.setattr(ConfigParser, "__module__", "parse_config")
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    tensors = ((f"module.{name}", torch.from_numpy(value)) for name, value in state.items())
    return {
        "arch": "DataParallel",
        "epoch": 7,
        "state_dict": collections.OrderedDict(tensors),
        "optimizer": optimizer.state_dict(),
        "monitor_best": np.float64(0.5),
        "config": ConfigParser(),
        "criterion": collections.OrderedDict(bias=torch.zeros(3, 10)),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_opens_a_genuine_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    torch = pytest.importorskip("torch")
    state, path = small_state(), tmp_path / "model_best.pth"
    with monkeypatch.context() as during_save:
        checkpoint = genuine_checkpoint(torch, state, during_save)
        torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    assert "parse_config" not in sys.modules
    loaded, epoch = load_checkpoint(path)
    assert epoch == 7
    chex.assert_trees_all_equal(convert(loaded), convert(state))
    assert "parse_config" not in str(torch.serialization.get_safe_globals())


class Malicious:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("place", ["beside", "config", "alone"])
def test_runs_nothing_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    torch = pytest.importorskip("torch")
    touched, path = tmp_path / "touched", tmp_path / "model.pth"
    malicious = Malicious(touched)
    content: Any = {"state_dict": {"a": torch.zeros(1)}, "more": malicious}
    with monkeypatch.context() as during_save:
        if place == "config":
            content = genuine_checkpoint(torch, small_state(), during_save)
            content["config"].resume = malicious
        torch.save(malicious if place == "alone" else content, path)
    with pytest.raises(UserError, match=r"refused because it asks for \w+\.system to be called"):
        load_state_dict(str(path))
    assert not touched.exists()
    torch.load(path, weights_only=False) if place != "config" else None
    assert touched.exists() == (place != "config")  # the file would have done harm


def test_refuses_a_pickled_module(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"torch\.nn\.modules\.linear\.Linear to be called"):
        load_state_dict(str(tmp_path / "model.pth"))


@pytest.mark.parametrize("content", [{"epoch": 3}, {"state_dict": 3}, {}, [1, 2]])
def test_refuses_a_torch_file_without_a_state_dict(tmp_path: Path, content: Any) -> None:
    torch = pytest.importorskip("torch")
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(UserError, match="to hold a state dict"):
        load_state_dict(str(tmp_path / "model.pth"))


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "pth"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_refuses_a_damaged_file(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"file.{suffix}"
    if suffix == "npz":
        np.savez(path, a=np.zeros(1000))
    elif suffix == "safetensors":
        pytest.importorskip("safetensors.numpy").save_file({"a": np.zeros(1000)}, path)
    else:
        torch = pytest.importorskip("torch")
        torch.save({"a": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:1000], "empty": b"", "text": b"Not Found\n" * 9}[damage])
    with pytest.raises(UserError, match=rf"file\.{suffix} cannot be read \(.+\); it is") as caught:
        load_state_dict(str(path))
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_refuses_pickles_in_an_npz(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    np.savez(tmp_path / "file.npz", a=np.array([Malicious(touched)], dtype=object))
    with pytest.raises(UserError, match="cannot be read"):
        load_state_dict(str(tmp_path / "file.npz"))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Malicious(touched)))
    with pytest.raises(UserError, match="cannot be read"):
        load_state_dict(str(tmp_path / "pickle.npz"))
    assert not touched.exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("absent.pth", r"There is no file .*absent\.pth"),
        ("folder.npz", r"There is no file .*folder\.npz"),
        ("file.onnx", r"ends in \.npz or \.safetensors or \.pth .*file\.onnx"),
    ],
)
def test_refuses_a_file_that_is_not_one(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(UserError, match=expected):
        load_state_dict(str(tmp_path / name))


@pytest.mark.parametrize(
    ("package", "suffix", "expected"),
    [
        ("torch", "pth", r"pip install torch, .*numpy\.savez\('.*file\.npz'"),
        ("safetensors.numpy", "safetensors", "pip install safetensors"),
    ],
)
def test_says_which_package_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, suffix: str, expected: str
) -> None:
    path = tmp_path / f"file.{suffix}"
    path.touch()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=expected):
        load_state_dict(str(path))


# Workdirs.


def digits_config(**changes: Any) -> Any:
    """Two steps an epoch, three epochs."""
    config = get_config("digits_lt")
    config.batch_size = 208
    config.total_epochs = 3
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


@pytest.fixture
def digits_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.npz"
    np.savez(path, **small_state())  # type: ignore[arg-type]
    return path


def restored(config: Any, workdir: Path) -> Any:
    with Checkpoints(str(workdir / "checkpoints")) as checkpoints:
        return checkpoints.restore_latest(build(resolve(config)).program.abstract_state())


@pytest.mark.slow
def test_evaluation_sees_the_imported_network(tmp_path: Path, digits_file: Path) -> None:
    config, workdir = digits_config(), tmp_path / "run"
    import_checkpoint(digits_file, resolve(config), str(workdir))
    results = evaluate(resolve(config), str(workdir))
    assert (results["step"], results["epoch"]) == (6, 3)  # the file tells no epoch: the last
    assert len(results["experts"]) == 3
    assert json.loads((workdir / "config.json").read_text())["data"]["num_train"] == 413

    test, variables = build(resolve(config)).data.test, convert(small_state())
    batch = next(iter(pipeline.eval_batches(test, len(test), config.data.mean, config.data.std)))
    expected = create_model("resnet8", num_classes=10, num_experts=3).apply(
        variables, batch.images, train=False
    )
    logits = np.load(workdir / "predictions" / "expert_logits.npy")
    np.testing.assert_allclose(logits, expected.logits, rtol=0, atol=2e-4)
    np.testing.assert_array_equal(np.load(workdir / "predictions" / "labels.npy"), batch.labels)


def test_the_epoch_of_a_checkpoint_becomes_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    path, workdir = tmp_path / "model_best.pth", tmp_path / "run"
    with monkeypatch.context() as during_save:
        torch.save(genuine_checkpoint(torch, small_state(), during_save), path)
    config = digits_config(total_epochs=9)
    import_checkpoint(path, resolve(config), str(workdir))
    state = restored(config, workdir)
    assert int(state.step) == 14
    counters = [x for x in jax.tree.leaves(state.opt_state) if jnp.issubdtype(x.dtype, jnp.integer)]
    assert [int(x) for x in counters] == [14]
    chex.assert_trees_all_equal(jax.device_get(state.variables), convert(small_state()))


@pytest.mark.integration
def test_refuses_a_workdir_with_a_run(tmp_path: Path, digits_file: Path) -> None:
    workdir = tmp_path / "run"
    (workdir / "checkpoints").mkdir(parents=True)
    (workdir / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"already holds a run \(config\.json, checkpoints\)"):
        import_checkpoint(digits_file, resolve(digits_config()), str(workdir))


def test_refuses_weights_that_are_not_finite(tmp_path: Path) -> None:
    state = small_state()
    name = next(name for name in state if name.endswith("conv1.weight"))
    state[name][0, 0, 0, 0] = np.nan
    np.savez(tmp_path / "weights.npz", **state)
    with pytest.raises(UserError, match=f"not finite in {re.escape(name)}; it is damaged"):
        import_checkpoint(tmp_path / "weights.npz", resolve(digits_config()), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.integration
def test_refuses_a_config_of_another_model(tmp_path: Path, digits_file: Path) -> None:
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match=r"the model of the config: unexpected .*layer2s\.2\.0\."):
        import_checkpoint(digits_file, resolve(digits_config(model__num_experts=2)), str(workdir))
    message = "The method mislas trains more than the reference's network; import into a config"
    with pytest.raises(UserError, match=message):
        import_checkpoint(
            digits_file, resolve(get_config("digits_lt", "method=mislas")), str(workdir)
        )
    import_checkpoint(
        digits_file, resolve(digits_config()), str(workdir)
    )  # the workdir is still free


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return commands.run("balpoe_jax.torch_import", *arguments)


@pytest.mark.integration
def test_the_command_makes_a_workdir(tmp_path: Path, digits_file: Path) -> None:
    workdir = tmp_path / "run"
    config = "--config=configs/digits_lt.py:method=balpoe"
    result = run_command(str(digits_file), config, f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    assert "evaluate with --mode=eval" in result.stdout
    assert {"config.json", "checkpoints"} <= {path.name for path in workdir.iterdir()}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{config}", "{workdir}"], "Expected one FILE next to --config and --workdir"),
        (["a.npz", "b.npz", "{config}", "{workdir}"], "got 2: a.npz, b.npz"),
        (["a.npz", "{config}"], "--workdir must have a value"),
        (["a.npz", "{config}", "{workdir}"], "There is no file a.npz"),
    ],
)
def test_the_command_refuses_with_one_sentence(
    tmp_path: Path, arguments: list[str], expected: str
) -> None:
    names = {"config": "--config=configs/digits_lt.py", "workdir": f"--workdir={tmp_path / 'run'}"}
    result = run_command(*(argument.format(**names) for argument in arguments))
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Error: ") and expected in line
