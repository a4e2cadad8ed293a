# SPDX-License-Identifier: Apache-2.0
"""The curves for TensorBoard: what TensorBoard reads of them, and what cannot stop a run."""

import logging
import sys
from pathlib import Path

import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from balpoe_jax.run import metric_writer
from balpoe_jax.run.events import EventFile

ROWS = [
    {"step": 3, "loss": 1.5, "expert_losses": [1.0, 2.0], "num": 7, "note": "text", "nan": None},
    {"step": 5, "loss": 0.25, "test_top1": 0.5},
]


def write_rows(workdir: Path) -> None:
    with metric_writer.MetricWriter(workdir, 0) as writer:
        for row in ROWS:
            writer.write(row)
        assert (workdir / "metrics.jsonl").read_text().count("\n") == len(ROWS)


def test_tensorboard_reads_each_number_of_a_row_at_its_step(tmp_path: Path) -> None:
    write_rows(tmp_path)
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    curves = {
        tag: [
            (event.step, tf.make_ndarray(event.tensor_proto).item()) for event in read.Tensors(tag)
        ]
        for tag in read.Tags()["tensors"]
    }
    assert curves == {"loss": [(3, 1.5), (5, 0.25)], "num": [(3, 7.0)], "test_top1": [(5, 0.5)]}
    assert read.PluginTagToContent("scalars").keys() == curves.keys()


def test_the_file_is_what_tensorflow_writes(tmp_path: Path) -> None:
    """But for the way in which the tensor's number is packed, and the writer's name."""
    events = tf.compat.v1.Event
    write_rows(tmp_path)
    with tf.summary.create_file_writer(str(tmp_path / "theirs")).as_default():
        tf.summary.scalar("loss", 1.5, step=3)
    (ours,), (theirs,) = ((tmp_path / f).glob("events.*") for f in ("tensorboard", "theirs"))

    def read(path: Path) -> list:
        return [events.FromString(r.numpy()) for r in tf.data.TFRecordDataset(str(path))]

    (version, mine, *_), (their_version, their) = read(ours), read(theirs)
    assert version.file_version == their_version.file_version
    value, their_value = (event.summary.value[0] for event in (mine, their))
    assert (mine.step, value.tag, value.metadata) == (their.step, "loss", their_value.metadata)
    assert (value.tensor.dtype, value.tensor.tensor_shape) == (
        their_value.tensor.dtype,
        their_value.tensor.tensor_shape,
    )
    assert abs(mine.wall_time - their.wall_time) < 60


def test_without_the_package_a_line_says_so(tmp_path: Path, monkeypatch, caplog) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with caplog.at_level(logging.INFO, logger="balpoe_jax"):
        write_rows(tmp_path)
    (line,) = caplog.messages
    assert line.startswith("No curves for TensorBoard are written: ")
    assert line.endswith("pip install tensorboard")
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("moment", ["start", "row"])
def test_a_full_disk_ends_the_curves_and_not_the_run(
    tmp_path: Path, monkeypatch, caplog, moment: str
) -> None:
    if moment == "start":
        (tmp_path / "tensorboard").write_text("a file in its place")
        write_rows(tmp_path)
    else:
        made = EventFile.__init__

        def on_full_disk(self: EventFile, folder: Path) -> None:
            made(self, folder)
            self._writer.close()
            self._writer._writer = open("/dev/full", "ab")  # noqa: SIM115

        monkeypatch.setattr(EventFile, "__init__", on_full_disk)
        write_rows(tmp_path)
    (line,) = caplog.messages
    reason = "File exists" if moment == "start" else "No space left on device"
    assert line == f"No more curves for TensorBoard are written ({reason})"
