# SPDX-License-Identifier: Apache-2.0
"""Generated garbage in files and profiles: success, or one sentence."""

import copy
import io
import json
import pathlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from balpoe_jax.data import long_tail
from balpoe_jax.data.datasets import test_distributions
from balpoe_jax.losses import log_prior
from balpoe_jax.metrics import shot_groups
from balpoe_jax.models.weight_files import load_checkpoint
from balpoe_jax.reporting.report import result_text
from balpoe_jax.reporting.schema import load_config, load_results
from balpoe_jax.torch_import import convert
from tests.helpers.fake_runs import make_run
from tests.helpers.fuzzing import fuzzed, sentence_of
from tests.helpers.reference_weights import small_state

pytestmark = pytest.mark.integration

LABELS = np.repeat(np.arange(4), 10)
TRAIN = np.array([300, 120, 50, 8])
NAMES = np.array([f"val_{i:03d}.JPEG" for i in range(40)])

# Lists of files.

PATHS = st.one_of(
    st.integers(-5, 45).map(lambda i: f"val_{i:03d}.JPEG"),
    st.sampled_from(
        ["../../val_001.JPEG", "/etc/passwd", "/val_002.JPEG", "a/../val_003.JPEG", ""]
    ),
    st.text(max_size=12),
)
CLASSES = st.one_of(
    st.integers(-1, 4).map(str),
    st.sampled_from(["", "٣", "²", "1.0", "9" * 5000]),
    st.text(max_size=3),
)
LINES = st.tuples(PATHS, st.sampled_from([" ", " ", "  ", "\t", ""]), CLASSES).map("".join)
TRUE_LINES = st.integers(0, 39).map(lambda i: f"x/val_{i:03d}.JPEG {i // 10}")
LISTS = st.one_of(
    st.lists(TRUE_LINES, max_size=6, unique=True).map(lambda lines: "\n".join(lines).encode()),
    st.lists(LINES, max_size=6).map(lambda lines: "\n".join(lines).encode(errors="replace")),
    st.binary(max_size=60),
)


@fuzzed(150)
@given(content=LISTS)
@example(content=b"val_001.JPEG " + b"9" * 5000)
def test_lists(tmp_path_factory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "list_forward5.txt"
    path.write_bytes(content)
    sentence_of(test_distributions.make_targets, LABELS, TRAIN, (5,), NAMES, str(path))


@fuzzed(100)
@given(
    pattern=st.one_of(
        st.text(max_size=30),
        st.sampled_from(
            ["~nobody/x_forward5.txt", "\x00", "[", "/dev/zero", "/dev/stdin", "/", "**"]
        ),
        st.text("*?[]!.~,\x00a5", max_size=12).map(lambda text: f"{text}forward5.txt"),
    )
)
@example(pattern="~nobody/x_forward5.txt")
@example(pattern="\x00_forward5.txt")
@example(pattern="/dev/zero")
def test_names_of_lists(pattern: str) -> None:
    sentence_of(test_distributions.make_targets, LABELS, TRAIN, (5,), NAMES, pattern)


def test_a_list_that_never_ends_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x_forward5.txt").symlink_to("/dev/zero")
    (tmp_path / "y_forward5.txt").mkdir()
    for name in ("x", "y"):
        path = str(tmp_path / f"{name}_forward5.txt")
        message = sentence_of(test_distributions.make_targets, LABELS, TRAIN, (5,), NAMES, path)
        assert message is not None and f"{name}_forward5.txt is no file" in message


# Class-count profiles.

COUNTS = st.one_of(
    st.lists(st.integers(0, 50), min_size=1, max_size=6),
    st.lists(st.one_of(st.integers(), st.floats(), st.none(), st.text(max_size=3)), max_size=5),
    st.sampled_from([10**400, "x", None, [[1, 2], [3]], [[1]], [10**30, 1], {}, [True, False], 5]),
)
NUMBERS = st.one_of(
    st.integers(-2, 200), st.integers(), st.floats(), st.sampled_from([10**400, "3"])
)


@fuzzed(200)
@given(counts=COUNTS, others=COUNTS, ratio=NUMBERS, allow=st.booleans())
@example(counts=["x"], others=[1], ratio=2, allow=True)
@example(counts=[10**400], others=[10**30], ratio=10**400, allow=True)
def test_profiles(counts: Any, others: Any, ratio: Any, allow: bool) -> None:
    sentence_of(log_prior, counts, allow)
    sentence_of(long_tail.select_indices, LABELS, counts)
    sentence_of(long_tail.select_indices, counts, others)
    sentence_of(long_tail.class_counts, counts, 4)
    sentence_of(test_distributions.shifted_counts, counts, others, ratio, allow)
    sentence_of(shot_groups, counts, (20, 100))


@fuzzed(150)
@given(classes=st.integers(-2, 300), largest=NUMBERS, ratio=NUMBERS, reverse=st.booleans())
@example(classes=3, largest=10**400, ratio=2.0, reverse=False)
@example(classes=3, largest=5, ratio=10**400, reverse=False)
@example(classes=3, largest=float("inf"), ratio=1.0, reverse=False)
def test_the_exponential_profile(classes: Any, largest: Any, ratio: Any, reverse: bool) -> None:
    sentence_of(long_tail.exponential_counts, classes, largest, ratio, reverse)


# The record of a run.

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just(10**400)
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("fuzzed") / "seed1"
    make_run(workdir, seed=1)
    (workdir / "intact").mkdir()
    for name in ("results.json", "config.json"):
        (workdir / "intact" / name).write_bytes((workdir / name).read_bytes())
    return workdir


def places(node: Any, path: tuple = ()) -> list[tuple]:
    """Where something is in nested lists and objects."""
    found = [path] if path else []
    items = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    for key, value in items:
        found += places(value, (*path, key))
    return found


def read_run(workdir: Path) -> None:
    results = load_results(workdir)
    load_config(workdir)
    if results is not None:
        result_text(results)


@fuzzed(200)
@given(data=st.data(), name=st.sampled_from(["results.json", "config.json"]), value=JSON)
def test_records_with_another_value_somewhere(run: Path, data, name: str, value: Any) -> None:
    content = json.loads((run / "intact" / name).read_text())
    *path, last = data.draw(st.sampled_from(places(content)))
    node = content
    for key in path:
        node = node[key]
    if data.draw(st.integers(0, 4)):
        node[last] = copy.deepcopy(value)
    else:
        del node[last]
    (run / name).write_text(json.dumps(content))
    sentence_of(read_run, run)
    (run / name).write_bytes((run / "intact" / name).read_bytes())


@fuzzed(100)
@given(data=st.data(), name=st.sampled_from(["results.json", "config.json"]))
def test_records_with_other_bytes(run: Path, data, name: str) -> None:
    (run / name).write_bytes(mutate(data, (run / "intact" / name).read_bytes()))
    sentence_of(read_run, run)
    (run / name).write_bytes((run / "intact" / name).read_bytes())


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"step": ' * 100_000, '{"step": 1e999}', "9" * 9999]
)
def test_records_that_no_parser_likes(run: Path, text: str) -> None:
    (run / "results.json").write_text(text)
    assert sentence_of(read_run, run) is not None
    (run / "results.json").write_bytes((run / "intact" / "results.json").read_bytes())


# Checkpoints of other frameworks.


def mutate(data: st.DataObject, intact: bytes) -> bytes:
    """Bytes flipped, cut off, left out, put in or repeated."""
    content = bytearray(intact)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        match data.draw(st.integers(0, 4)):
            case 0:
                content[at : at + 1] = bytes([data.draw(st.integers(0, 255))])
            case 1:
                del content[at:]
            case 2:
                del content[at : at + data.draw(st.integers(1, 40))]
            case 3:
                content[at:at] = data.draw(st.binary(max_size=20))
            case 4:  # near the ends, where headers and directories are
                near = data.draw(st.integers(-200, 200))
                if content:
                    content[near % len(content)] = data.draw(st.integers(0, 255))
    return bytes(content)


def files_of(kind: str) -> bytes:
    """A small checkpoint as a file of a kind."""
    state = small_state(num_experts=1)
    buffer = io.BytesIO()
    if kind == "npz":
        np.savez(buffer, **state)
    elif kind == "safetensors":
        return pytest.importorskip("safetensors.numpy").save(state)
    else:
        torch = pytest.importorskip("torch")
        tensors = {name: torch.from_numpy(value) for name, value in state.items()}
        content = {"state_dict": tensors, "epoch": 3, "save_dir": pathlib.PurePosixPath("x")}
        torch.save(content, buffer, _use_new_zipfile_serialization=kind == "pth")
    return buffer.getvalue()


def read_weights(path: Path) -> None:
    convert(load_checkpoint(path)[0])


@pytest.mark.parametrize("kind", ["npz", "safetensors", "pth", "pt"])
@fuzzed(60, share=0.2)
@given(data=st.data())
def test_damaged_weights(tmp_path_factory, kind: str, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / f"weights.{kind}"
    if kind not in _INTACT:
        _INTACT[kind] = files_of(kind)
    path.write_bytes(mutate(data, _INTACT[kind]))
    before = sorted(path.parent.iterdir())
    sentence_of(read_weights, path)
    assert sorted(path.parent.iterdir()) == before


_INTACT: dict[str, bytes] = {}


@fuzzed(60)
@given(data=st.data())
def test_arrays_of_any_names_shapes_and_types(tmp_path_factory, data: st.DataObject) -> None:
    names = [*small_state(num_experts=2)]
    arrays = {}
    for _ in range(data.draw(st.integers(0, 6))):
        name = data.draw(
            st.sampled_from(names) | st.text("backbone.linears0123456789", max_size=30)
        )
        shape = data.draw(st.lists(st.integers(0, 4), max_size=5))
        kind = data.draw(
            st.sampled_from(["float32", "float64", "int32", "S3", "bool", "complex64"])
        )
        arrays[name.replace("/", "") or "x"] = np.zeros(shape, kind)
    path = tmp_path_factory.getbasetemp() / "arrays.npz"
    np.savez(path, **arrays)
    sentence_of(read_weights, path)


def test_members_of_archives_are_never_files(tmp_path: Path) -> None:
    """An archive is read in memory, whatever its members are called."""
    inside = tmp_path / "inside"
    inside.mkdir()
    array = io.BytesIO()
    np.save(array, np.ones(3, np.float32))
    names = ["../evil.npy", "/tmp/evil.npy", "..\\evil.npy", "a/../../evil.npy"]
    with zipfile.ZipFile(inside / "x.npz", "w") as archive:
        for name in names:
            archive.writestr(name, array.getvalue())
    assert sentence_of(read_weights, inside / "x.npz") is not None
    assert [path.name for path in tmp_path.rglob("*")] == ["inside", "x.npz"]
    assert not Path("/tmp/evil.npy").exists()
