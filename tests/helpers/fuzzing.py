# SPDX-License-Identifier: Apache-2.0
"""Tests with generated garbage: some dozens of cases, the same in each run, or a long campaign.

    FUZZ_CASES=20000 python -m pytest -m 'not slow' -k fuzz

tries 20,000 random cases in each test.
"""

import atexit
import collections
import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, settings

from balpoe_jax.errors import UserError

CASES = int(os.environ.get("FUZZ_CASES", "0"))
SECONDS = 20  # after which a case counts as hanging

# Number of cases by test and outcome, printed at the end of a campaign.
outcomes: collections.Counter[tuple[str, str]] = collections.Counter()


def fuzzed(cases: int, share: float = 1.0) -> Callable[[Any], Any]:
    """Settings of a test: its number of cases in a test run, and its share of a campaign's."""
    return settings(
        max_examples=int(CASES * share) or cases,
        derandomize=not CASES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def expire(*_: object) -> None:
        raise AssertionError(f"Not done after {SECONDS} seconds.")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def sentence_of(function: Callable[..., Any], *arguments: Any) -> str | None:
    """The message of the UserError that a call raises; None if it raises nothing."""
    with time_limit():
        try:
            function(*arguments)
        except UserError as error:
            count("refused")
            message = str(error)
            assert message.strip() and "Traceback" not in message, message
            assert len(message) < 5000, message
            return message
    count("succeeded")
    return None


def count(outcome: str) -> None:
    """Counts the outcome of a case of the running test."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "").split("::")[-1].split(" ")[0]
    outcomes[test, outcome] += 1


@atexit.register
def _print_outcomes() -> None:
    if CASES:
        for (test, outcome), number in sorted(outcomes.items()):
            print(f"{test}: {number} {outcome}")
