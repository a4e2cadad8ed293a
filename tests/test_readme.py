# SPDX-License-Identifier: Apache-2.0
"""What the README shows runs."""

import re

import numpy as np
import pytest

from tests.helpers import ROOT

README = (ROOT / "README.md").read_text()


@pytest.mark.integration
def test_the_library_example_runs(request) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    if not request.config.getoption("--all"):
        assert code.count('"resnet32"') == 1
        code = code.replace("resnet32", "resnet8")
    names: dict = {}
    exec(code, names)
    assert names["logits"].shape == (8, 4)
    assert np.isfinite(names["loss"])
