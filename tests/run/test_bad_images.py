# SPDX-License-Identifier: Apache-2.0
"""The record of replaced photographs: what a start counts, keeps and discards."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from balpoe_jax.data.batches.replacements import BadImage
from balpoe_jax.data.records import tfrecords
from balpoe_jax.data.records.sources import RecordSource
from balpoe_jax.errors import UserError
from balpoe_jax.run import bad_images
from tests.helpers.records import write
from tests.helpers.small_photos import jpeg

FOUND = [
    BadImage(step, index, f"photo{index}", "record 1 of part0", "empty")
    for step, index in ((2, 1), (5, 3), (5, 0))
]


@pytest.fixture
def source(tmp_path: Path) -> RecordSource:
    """Six photographs of two classes."""
    (tmp_path / "data").mkdir()
    images = [
        {"image": jpeg(i), "label": i % 2, "file_name": f"photo{i}".encode()} for i in range(6)
    ]
    paths = (write(tmp_path / "data" / "part0", images),)
    return RecordSource(tfrecords.scan(paths, "file_name"), 16, 18, paths=paths)


def record(workdir: Path, found: list[BadImage], name: str = "bad_images.jsonl") -> None:
    lines = [json.dumps(dataclasses.asdict(bad)) for bad in found]
    (workdir / name).write_text("".join(f"{line}\n" for line in lines))


def test_images_are_counted_up_to_a_step_over_all_processes(tmp_path: Path) -> None:
    assert bad_images.count("fail", tmp_path, 9) == {}
    assert bad_images.count("skip", tmp_path, 9) == {"bad_images": 0}
    record(tmp_path, FOUND[:2])
    record(tmp_path, FOUND[1:], "bad_images.1.jsonl")
    counts = [bad_images.count("skip", tmp_path, step)["bad_images"] for step in (1, 2, 4, 5)]
    assert counts == [0, 1, 1, 3]
    assert bad_images.count("fail", tmp_path, 5) == {"bad_images": 3}


def test_a_start_keeps_the_images_of_earlier_steps(tmp_path: Path, source: RecordSource) -> None:
    record(tmp_path, FOUND)
    replacements = bad_images.make_replacements("skip", source, tmp_path, 4)
    assert replacements is not None
    np.testing.assert_array_equal(replacements.table, [0, 3, 2, 3, 4, 5])
    assert bad_images.count("skip", tmp_path, 9) == {"bad_images": 1}


def test_images_that_fail_are_not_replaced(tmp_path: Path, source: RecordSource) -> None:
    record(tmp_path, FOUND)
    assert bad_images.make_replacements("fail", source, tmp_path, 0) is None
    assert bad_images.count("fail", tmp_path, 9) == {"bad_images": 3}


@pytest.mark.parametrize("text", ['{"step": 1}\n', "[]\n", "{", '{"step": "a"}'])
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad_images.jsonl").write_text(text)
    with pytest.raises(UserError, match="is damaged; remove it"):
        bad_images.count("skip", tmp_path, 5)
