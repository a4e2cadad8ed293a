# SPDX-License-Identifier: Apache-2.0
"""Replacements of photographs that cannot be read or decoded."""

import dataclasses
import logging
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from balpoe_jax.data.records.sources import StoredSource
from balpoe_jax.errors import UserError

log = logging.getLogger(__name__)

# How many images of a training set may be replaced: more mean a damaged disk or data set.
_LEAST_LIMIT, _LIMIT_SHARE = 10, 0.01


@dataclasses.dataclass(frozen=True)
class BadImage:
    """An image that cannot be used.

    Attributes:
        step: Step after the first update that needed it, itself or as a replacement.
        index: Position in the training set.
        id: Name of the image in its source.
        where: Record and file of the image.
        reason: Reason why it cannot be read.
    """

    step: int
    index: int
    id: str
    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.id} (example {self.index}, {self.where}) cannot be read: {self.reason}"


class Replacements:
    """Images in place of those that cannot be used: a function of the data alone.

    A bad image is replaced by the next image of its class that can be read, in the order of the
    training set and round its end. So class counts and shapes of batches stay the same, and another
    order or number of hosts finds the same replacement.

    Args:
        source: The training set.
        known: Bad images that an earlier start of the run found.
        report: Function of all bad images so far, called each time that there are more.

    Attributes:
        table: Position of the image that is used for each, int64 `[N]`.
    """

    def __init__(
        self,
        source: StoredSource,
        known: Iterable[BadImage] = (),
        report: Callable[[list[BadImage]], None] = lambda found: None,
    ) -> None:
        self._source = source
        self._report = report
        self._found = {bad.index: bad for bad in known}
        self.table: npt.NDArray[np.int64] = np.arange(len(source))
        self._replace(0)

    def find(self, indices: Iterable[int], step: int) -> bool:
        """Whether any of the images cannot be used; from now on others take their places.

        Args:
            indices: Positions in the training set, before replacement.
            step: Step after the update that needs the images.

        Raises:
            UserError (a `ValueError`): a class without any image that can be read; or more bad
                images than ten and a hundredth of the training set.
        """
        before = len(self._found)
        for index in self.table[list(indices)]:
            self._examine(int(index), step)
        self._replace(step)
        if len(self._found) == before:
            return False
        self._report(list(self._found.values()))
        return True

    def _examine(self, index: int, step: int) -> bool:
        """Whether an image can be used."""
        if index not in self._found:
            # Not above: it imports TensorFlow, which is only needed to decode.
            from balpoe_jax.data.batches import unreadable

            bad = unreadable.examine(self._source, index, step)
            if bad is None:
                return True
            self._found[index] = bad
            log.warning("The training image %s", bad)
            limit = max(_LEAST_LIMIT, int(_LIMIT_SHARE * len(self._source)))
            if len(self._found) > limit:
                raise UserError(
                    f"More than {limit} of the {len(self._source)} training images cannot be read; "
                    f"prepare the data set again (the last one: {bad})."
                )
        return False

    def _replace(self, step: int) -> None:
        """Finds the replacements that are missing; a replacement may turn out to be bad, too."""
        while waiting := [i for i in self._found if self.table[i] in self._found]:
            for index in waiting:
                self.table[index] = self._next(index, step)

    def _next(self, index: int, step: int) -> int:
        labels = self._source.labels
        members = np.flatnonzero(labels == labels[index])
        after = np.searchsorted(members, index)
        for candidate in np.roll(members, -after)[1:]:
            if self._examine(int(candidate), step):
                return int(candidate)
        raise UserError(
            f"No training image of class {labels[index]} can be read (one of them: "
            f"{self._found[index]}); prepare the data set again."
        )
