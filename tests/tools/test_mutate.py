# SPDX-License-Identifier: Apache-2.0
"""The mutations fit the current code; `mutate.py` itself tries them."""

import pytest

from tests.helpers import ROOT
from tests.tools import mutate

PAGE = (ROOT / "tests" / "tools" / "mutations.md").read_text()


@pytest.mark.parametrize("mutation", mutate.MUTATIONS, ids=lambda mutation: mutation.mistake)
def test_a_mutation_can_be_made_and_was_tried(mutation: mutate.Mutation) -> None:
    text = (ROOT / "balpoe_jax" / mutation.file).read_text()
    assert text.count(mutation.old) == 1
    assert (ROOT / "tests" / mutation.tests.partition("::")[0]).is_file()
    assert mutation.mistake in PAGE
