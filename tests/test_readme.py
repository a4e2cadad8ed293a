# SPDX-License-Identifier: Apache-2.0
"""What the README shows runs, and its table of methods is that of the code."""

import re
from pathlib import Path

import numpy as np

from balpoe_jax.methods import PRESETS, Preset

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_library_example_runs(request) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    if not request.config.getoption("--all"):
        assert code.count('"resnet32"') == 1
        code = code.replace("resnet32", "resnet8")
    names: dict = {}
    exec(code, names)
    assert names["logits"].shape == (8, 4)
    assert np.isfinite(names["loss"])


def published(recipe: Preset, dataset: str, arguments: str) -> str:
    """The accuracy that is published under the method's own training, or a dash."""
    found = []
    for p in recipe.published:
        rest = p.arguments.removeprefix(arguments).removeprefix(",")
        is_own = p.dataset == dataset and p.arguments.startswith(arguments)
        if is_own and (not rest or (rest.startswith("backbone=") and "recipe=" not in rest)):
            found.append(f"{p.accuracy:g} ({rest.partition('=')[2]})".removesuffix(" ()"))
    return ", ".join(found) or "-"


def table_of_methods() -> str:
    lines = [
        "| `method=` | | CIFAR-100-LT, ratio 10 / 50 / 100 | ImageNet-LT | iNaturalist |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, recipe in PRESETS.items():
        ratios = [published(recipe, "cifar100_lt", f"ir={ratio}") for ratio in (10, 50, 100)]
        photos = [published(recipe, data, "") for data in ("imagenet_lt", "inaturalist2018")]
        cells = [f"`{name}`", recipe.about, " / ".join(ratios), *photos]
        lines.append(f"| {' | '.join(cells)} |".replace("- / - / -", "-"))
    return "\n".join(lines) + "\n"


def test_the_table_of_methods_is_that_of_the_code() -> None:
    """Print `table_of_methods()` to write it anew."""
    assert table_of_methods() in README
