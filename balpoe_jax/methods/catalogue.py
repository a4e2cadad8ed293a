# SPDX-License-Identifier: Apache-2.0
"""The catalogue of methods and the README's short table, written from the methods' files."""

import inspect
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from balpoe_jax.methods.preset import Preset, PublishedResult

PAGE = Path("docs") / "methods" / "index.md"
README = Path("README.md")

# The lines of the README around the table.
BEGIN = "<!-- Written by `python -m balpoe_jax.methods catalogue`. -->"
END = "<!-- End of the table of methods. -->"

_DATASETS = {
    "cifar10_lt": "CIFAR-10-LT",
    "cifar100_lt": "CIFAR-100-LT",
    "imagenet_lt": "ImageNet-LT",
    "inaturalist2018": "iNaturalist 2018",
}


class Cost(NamedTuple):
    """What a network costs.

    Attributes:
        network: Name of it.
        dataset: Name of the data set, which says how large images are and how many classes there
            are.
        parameters: Number of parameters in millions.
        gflop: Number of operations of one image's prediction, in billions.
    """

    network: str
    dataset: str
    parameters: float
    gflop: float


# `tests/methods/test_catalogue.py` counts them, but for ResNet-34, which is no network of ours: it
# is that of LOS's code, counted with PyTorch.
COSTS = (
    Cost("ResNet-32", "cifar100_lt", 0.47, 0.138),
    Cost("ResNet-32, 3 experts", "cifar100_lt", 1.36, 0.317),
    Cost("ResNet-32, 3 experts, reduced width", "cifar100_lt", 0.784, 0.201),
    Cost("ResNet-32 of BBN", "cifar100_lt", 0.55, 0.147),
    Cost("ResNet-32 x4", "cifar100_lt", 7.41, 2.19),
    Cost("ResNet-34", "cifar100_lt", 21.3, 2.32),
    Cost("ResNet-50", "imagenet_lt", 25.6, 8.18),
    Cost("ResNet-50, 3 experts", "imagenet_lt", 73.8, 17.3),
    Cost("ResNet-50, 3 experts, reduced width", "imagenet_lt", 43.7, 11.5),
    Cost("ResNeXt-50", "imagenet_lt", 25, 8.46),
    Cost("ResNeXt-50, 3 experts", "imagenet_lt", 72.3, 18),
    Cost("ResNeXt-50, 3 experts, reduced width", "imagenet_lt", 42.9, 12.1),
    Cost("ResNet-50", "inaturalist2018", 40.2, 8.21),
    Cost("ResNet-50, 3 experts", "inaturalist2018", 118, 17.4),
    Cost("ResNet-50, 3 experts, reduced width", "inaturalist2018", 76.6, 11.6),
)

_HEAD = """# The methods

<!-- Written by `python -m balpoe_jax.methods catalogue`. -->

Each section is a file of `balpoe_jax/methods/` and begins with the file's own description. The
table lists its presets, the values of `method=` of a config file. Published figures are accuracies
in percent on the balanced test set, not ours. They come with the other arguments of the config
file, the network that they were measured on, the expected calibration error (ECE) where it is
known, and their source.

The next table has the cost of these networks, with one linear classifier for each expert.
Parameters are in millions. GFLOP are billions of operations by which all experts predict one
image: convolutions and matrix products, a multiply-add being two. `reproduce`, `compare` and
`results.json` have both figures of each run.

"""


def page(modules: Iterable[ModuleType]) -> str:
    """The text of `PAGE`.

    Args:
        modules: Files of methods, with a docstring and `PRESETS`.
    """
    return "\n".join([_HEAD + _costs(), *(_section(module) for module in modules)])


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
    """The README with an up-to-date table.

    Raises:
        ValueError: a README without the lines `BEGIN` and `END`.
    """
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return before + table(modules) + after


def _costs() -> str:
    head = "| network | data | parameters, M | GFLOP an image |\n| --- | --- | --- | --- |\n"
    rows = (
        f"| {cost.network} | {_DATASETS[cost.dataset]} | {cost.parameters:g} | {cost.gflop:g} |\n"
        for cost in COSTS
    )
    return head + "".join(rows)


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
    figures = "<br>".join(_figure(preset, published) for published in preset.published)
    return f"| `{name}` | {preset.about} | {figures or '-'} |"


def _figure(preset: Preset, published: PublishedResult) -> str:
    arguments = f" `{published.arguments}`" if published.arguments else ""
    error = "" if published.ece is None else f", ECE {published.ece:g}"
    data = _DATASETS.get(published.dataset, published.dataset)
    network = published.measured_on(preset)
    return f"{data}{arguments}, {network}: {published.accuracy:g}{error} ({published.source})"
