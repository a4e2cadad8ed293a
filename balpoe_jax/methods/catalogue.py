# SPDX-License-Identifier: Apache-2.0
"""The catalogue of the methods, and the short table of the README, made of the methods' files."""

import inspect
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from balpoe_jax.methods.preset import Preset, PublishedResult

PAGE = Path("docs") / "methods" / "index.md"
README = Path("README.md")

# Between these lines of the README stands the table.
BEGIN = "<!-- Written by `python -m balpoe_jax.methods catalogue`. -->"
END = "<!-- End of the table of methods. -->"

_DATASETS = {
    "cifar10_lt": "CIFAR-10-LT",
    "cifar100_lt": "CIFAR-100-LT",
    "imagenet_lt": "ImageNet-LT",
    "inaturalist2018": "iNaturalist 2018",
}

_HEAD = """# The methods

<!-- Written by `python -m balpoe_jax.methods catalogue`. -->

Each section is a file of `balpoe_jax/methods/`, and begins with what the file says of itself.
A preset is what `method=` of a config file may be. Published figures are accuracies in percent on
the balanced test set, with what else stands after the config file's colon, the expected calibration
error (ECE) where it is known, who reports them, and perhaps the network. They are not ours.
"""


def page(modules: Iterable[ModuleType]) -> str:
    """The text of `PAGE`.

    Args:
        modules: Files of methods, with a docstring and `PRESETS`.
    """
    return "\n".join([_HEAD, *(_section(module) for module in modules)])


def table(modules: Iterable[ModuleType]) -> str:
    """The table of the README: a row for each file, with its presets and its first sentence."""
    rows = [
        f"| {', '.join(f'`{name}`' for name in module.PRESETS)} | {summary(module)} |"
        for module in modules
    ]
    return "\n".join([BEGIN, "", "| `method=` | |", "| --- | --- |", *rows, "", END])


def summary(module: ModuleType) -> str:
    """The first sentence of a file's docstring, in one line without its full stop."""
    return " ".join(_paragraphs(module)[0].split()).removesuffix(".")


def with_table(readme: str, modules: Iterable[ModuleType]) -> str:
    """The README with the table as it should be.

    Raises:
        ValueError: a README without the lines `BEGIN` and `END`.
    """
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return before + table(modules) + after


def _section(module: ModuleType) -> str:
    file = f"{module.__name__.rpartition('.')[2]}.py"
    rows = [_row(name, preset) for name, preset in module.PRESETS.items()]
    return "\n".join(
        [
            f"## {summary(module)}",
            "",
            f"[`balpoe_jax/methods/{file}`](../../balpoe_jax/methods/{file})",
            "",
            *(f"{paragraph}\n" for paragraph in _paragraphs(module)[1:]),
            "| `method=` | | published |",
            "| --- | --- | --- |",
            *rows,
            "",
        ]
    )


def _paragraphs(module: ModuleType) -> list[str]:
    return inspect.cleandoc(module.__doc__ or "").split("\n\n")


def _row(name: str, preset: Preset) -> str:
    figures = "<br>".join(_figure(published) for published in preset.published)
    return f"| `{name}` | {preset.about} | {figures or '-'} |"


def _figure(published: PublishedResult) -> str:
    arguments = f" `{published.arguments}`" if published.arguments else ""
    error = "" if published.ece is None else f", ECE {published.ece:g}"
    data = _DATASETS.get(published.dataset, published.dataset)
    network = f"; network: {published.network}" if published.network else ""
    return f"{data}{arguments}: {published.accuracy:g}{error} ({published.source}{network})"
