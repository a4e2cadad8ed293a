# SPDX-License-Identifier: Apache-2.0
"""Curves for TensorBoard: one event file a start, written without TensorFlow.

The curves repeat `metrics.jsonl`, so no trouble with them ends a run: where the package
`tensorboard` is missing, or the file cannot be written, one log line says so.
"""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class EventFile:
    """An event file of scalars.

    The package's own writer is not used: it imports TensorFlow where that is installed, and writes
    in a thread, whose errors come late or never.

    Args:
        folder: Folder of the files of all starts, created when missing.
    """

    def __init__(self, folder: Path) -> None:
        self._writer: Any = None
        try:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            log.info("No curves for TensorBoard are written: %s; pip install tensorboard", error)
            return
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        with self._giving_up():
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = RecordWriter((folder / name).open("ab"))
            self._write(Event(file_version="brain.Event:2"))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends the scalars of a step, each a point of the curve that its tag names."""
        if self._writer is None:
            return
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
        from tensorboard.compat.proto.types_pb2 import DT_FLOAT

        plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="scalars"))

        def value(tag: str, number: float) -> Any:
            tensor = TensorProto(
                dtype=DT_FLOAT, tensor_shape=TensorShapeProto(), float_val=[float(number)]
            )
            return Summary.Value(tag=tag, tensor=tensor, metadata=plugin)

        values = [value(tag, number) for tag, number in scalars.items()]
        with self._giving_up():
            self._write(Event(step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Closes the file, if one is open."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())
        self._writer.flush()

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        """Logs an error and closes the file, since readers lose what follows a torn record."""
        try:
            yield
        except OSError as error:
            log.warning("No more curves for TensorBoard are written (%s)", error.strerror or error)
            self.close()
