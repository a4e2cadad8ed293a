# SPDX-License-Identifier: Apache-2.0
"""Predictions on disk: streamed whole or not at all, read back, refused."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from balpoe_jax.errors import UserError
from balpoe_jax.evaluation import predictions
from balpoe_jax.evaluation.scoring import score
from balpoe_jax.metrics import summarize
from balpoe_jax.metrics import summary as blocks

LOGITS = np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3)
LABELS = np.array([0, 1, 2, 1, 0], np.int32)


def batches(mask_last: bool = True) -> Iterator[dict[str, np.ndarray]]:
    """Two batches of three, the last example of which is padding."""
    padded = np.concatenate([LOGITS, LOGITS[:, :1]], axis=1), np.append(LABELS, 9)
    for part in (slice(0, 3), slice(3, 6)):
        mask = np.arange(6)[part] < (5 if mask_last else 6)
        yield {"logits": padded[0][:, part], "labels": padded[1][part], "mask": mask}


def test_what_is_streamed_is_read_back(tmp_path: Path) -> None:
    found = predictions.stream(tmp_path / "new", predictions.TEST, LOGITS.shape, batches())
    np.testing.assert_array_equal(found.expert_logits, LOGITS)
    np.testing.assert_array_equal(found.labels, LABELS)
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"expert_logits.npy", "labels.npy"}


def test_an_ensemble_that_is_no_mean_is_kept_too(tmp_path: Path) -> None:
    combined, used = LOGITS[0] * 3, np.array([1, 2, 1, 2, 2], np.float32)

    def outputs() -> Iterator[dict[str, np.ndarray]]:
        for part, batch in zip((slice(0, 3), slice(3, 5)), batches(), strict=True):
            pad = 3 - len(used[part])
            rows = {"ensemble": combined[part], "experts_used": used[part]}
            yield batch | {
                name: np.pad(x, [(0, pad), *[(0, 0)] * (x.ndim - 1)], constant_values=np.nan)
                for name, x in rows.items()
            }

    found = predictions.stream(tmp_path, predictions.TEST, LOGITS.shape, outputs())
    np.testing.assert_array_equal(found.ensemble, combined)
    np.testing.assert_array_equal(found.experts_used, used)
    scores = score(found, np.array([3, 2, 1]), (None, None))
    assert scores["experts_used"] == pytest.approx(1.6)
    predicted = combined.argmax(axis=1)
    assert scores["test"]["top1"] == (predicted == LABELS).mean()
    assert scores["ensemble"]["subsets"][-1]["mean_tau"] is None
    assert scores["bias"]["experts"][0] == {"lambda": None, "kl": None}
    # Another method's evaluation into the same folder leaves none of it.
    assert predictions.stream(tmp_path, predictions.TEST, LOGITS.shape, batches()).combined is None
    predictions.remove(tmp_path, predictions.TEST)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_evaluation_leaves_nothing_behind(tmp_path: Path, error) -> None:
    def outputs() -> Iterator[dict[str, np.ndarray]]:
        yield next(batches())
        raise error

    with pytest.raises(error):
        predictions.stream(tmp_path, predictions.TEST, LOGITS.shape, outputs())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "predictions").touch()
    with pytest.raises(UserError, match=r"predictions cannot be written \(.*; move away"):
        predictions.stream(tmp_path / "predictions", "", LOGITS.shape, batches())
    (tmp_path / "expert_logits.npy").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        predictions.stream(tmp_path, "", LOGITS.shape, batches())
    assert not list(tmp_path.glob(".*"))


def test_examples_that_are_not_finite_are_counted_over_all_blocks(monkeypatch) -> None:
    monkeypatch.setattr(blocks, "_NUMBERS_A_BLOCK", 6)
    logits = np.zeros((2000, 3), np.float32)
    logits[[3, 700, 701], [0, 1, 2]] = np.nan, np.inf, -np.inf
    with pytest.raises(UserError, match="logits of 3 of 2,000 examples are not finite"):
        summarize(logits, np.zeros(2000, int))
    with pytest.raises(UserError, match="logits of 1 of 1,000 examples are not finite"):
        summarize(logits, np.zeros(2000, int), np.arange(0, 2000, 2))


def test_the_data_that_are_not_finite_are_named() -> None:
    test = predictions.Predictions(LOGITS, LABELS)
    held_out = predictions.Predictions(LOGITS.copy(), LABELS)
    held_out.expert_logits[1, 4, 0] = np.inf
    with pytest.raises(UserError, match="logits of 1 of 5 held-out examples are not finite"):
        score(test, np.array([3, 2, 1]), (0.0, 2.0), held_out=held_out)
