# SPDX-License-Identifier: Apache-2.0
"""The published rows that this code can run, as data.

Figures are those of Sanchez Aimar et al., Balanced Product of Calibrated Experts for Long-Tailed
Recognition, CVPR 2023, in percent. Those of other methods stand in their presets, in
`balpoe_jax.methods`, from which the tables `methods...` are made.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from balpoe_jax.methods import PRESETS, PublishedResult

# Values of fields of the config, by dotted name.
Fields = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class PaperRun:
    """An experiment of the paper, for any number of seeds.

    Attributes:
        name: Name of its folder.
        config: File in `configs/`.
        arguments: Arguments after the colon.
        teacher: Experiment whose run of the same seed it learns from; None for none.
        fields: Fields of the config that are set after the arguments, by dotted name.
        short_fields: Fields that are set after those in a training of fewer epochs.
    """

    name: str
    config: str
    arguments: str
    teacher: "PaperRun | None" = None
    fields: Fields = ()
    short_fields: Fields = ()

    def with_teacher(self) -> tuple["PaperRun", ...]:
        """The experiments to train for it, in this order."""
        return (*self.teacher.with_teacher(), self) if self.teacher else (self,)

    def fields_at(self, scale: "Scale") -> Fields:
        """The fields to set at a scale, each once."""
        short = self.short_fields if scale.arguments else ()
        return tuple({**dict(self.fields), **dict(short)}.items())


@dataclasses.dataclass(frozen=True)
class PaperFigure:
    """A published figure, and the place of ours.

    Attributes:
        name: Column in the paper.
        keys: Keys of ours in `results.json`.
        paper: Mean in percent; None if none is published.
        paper_std: Standard deviation in percent, where the paper prints one.
    """

    name: str
    keys: tuple[Any, ...]
    paper: float | None = None
    paper_std: float | None = None


@dataclasses.dataclass(frozen=True)
class PaperRow:
    """A row of a table of the paper.

    Attributes:
        method: Name in the table.
        experiment: Experiment that is trained for it.
        scores: Figures of the row.
        network: Network that the published figures were measured on; None for that of the
            experiment at the paper's own scale.
    """

    method: str
    experiment: PaperRun
    scores: tuple[PaperFigure, ...]
    network: str | None = None

    @property
    def paper_network(self) -> str:
        """The network of the published figures, in words."""
        arguments = self.experiment.arguments
        given = dict(part.split("=", 1) for part in arguments.split(",") if "=" in part)
        preset = PRESETS[given.get("method", "balpoe")]
        dataset = self.experiment.config.removesuffix(".py")
        return self.network or preset.trained_network(dataset, arguments)


@dataclasses.dataclass(frozen=True)
class PaperTable:
    """A table of the paper, or what a figure of it plots."""

    title: str
    rows: tuple[PaperRow, ...]


@dataclasses.dataclass(frozen=True)
class Scale:
    """A size at which experiments are run.

    Attributes:
        arguments: Arguments that are added to an experiment's, or replace them, by config file;
            None leaves all as they are. Experiments of other files have no such size.
        note: Note on every output; empty for the paper's own setting.
    """

    arguments: dict[str, str] | None
    note: str


SCALES = {
    "full": Scale(None, ""),
    "cpu": Scale(
        {"cifar100_lt.py": "backbone=resnet8,width=1,epochs=15"},
        "scale cpu: ResNet-8 for 15 epochs with the schedule scaled, not the paper's setting",
    ),
}


def _cifar100(name: str, arguments: str) -> PaperRun:
    return PaperRun(f"cifar100_lt_{name}", "cifar100_lt.py", arguments)


_CE = _cifar100("ir100_cross_entropy", "ir=100,method=cross_entropy,mixup=false")
_MIXUP = _cifar100("ir100_mixup", "ir=100,method=cross_entropy")
_BALANCED_SOFTMAX = _cifar100(
    "ir100_balanced_softmax", "ir=100,method=balanced_softmax,mixup=false"
)
_WITHOUT_MIXUP = _cifar100("ir100_balpoe_no_mixup", "ir=100,mixup=false")
_BALPOE = _cifar100("ir100_balpoe", "ir=100")

_ACCURACY = ("test", "top1")
_RECIPES = {"strong": "stronger augmentation", "long": "longer training"}


def _imagenet(name: str, arguments: str) -> PaperRun:
    return PaperRun(f"imagenet_lt_{name}", "imagenet_lt.py", arguments)


_BALPOE_RESNEXT = _imagenet("resnext50_balpoe", "backbone=resnext50")
_CE_RESNEXT = _imagenet(
    "resnext50_cross_entropy", "backbone=resnext50,method=cross_entropy,mixup=false"
)


def _table_1() -> tuple[PaperRow, ...]:
    published = {
        ("strong", 10): 66.3, ("strong", 50): 58.7, ("strong", 100): 54.7,
        ("long", 10): 68.1, ("long", 50): 60.1, ("long", 100): 55.9,
    }  # fmt: skip
    ours = [
        PaperRow(
            f"BalPoE, {_RECIPES[recipe]}, IR {ratio}",
            _cifar100(f"ir{ratio}_{recipe}_balpoe", f"ir={ratio},recipe={recipe}"),
            (PaperFigure("ACC", _ACCURACY, accuracy),),
        )
        for (recipe, ratio), accuracy in published.items()
    ]
    return (*ours, *_others_in_table_1("cifar100_lt"))


def _table_1_photos() -> tuple[PaperRow, ...]:
    published = {
        ("strong", "resnet50"): 59.7, ("strong", "resnext50"): 61.6,
        ("long", "resnet50"): 60.8, ("long", "resnext50"): 62.0,
    }  # fmt: skip
    imagenet = [
        PaperRow(
            f"BalPoE, {_RECIPES[recipe]}, ImageNet-LT, {backbone}",
            _imagenet(f"{backbone}_{recipe}_balpoe", f"backbone={backbone},recipe={recipe}"),
            (PaperFigure("ACC", _ACCURACY, accuracy),),
        )
        for (recipe, backbone), accuracy in published.items()
    ]
    inaturalist = [
        PaperRow(
            f"BalPoE, {_RECIPES[recipe]}, iNaturalist, resnet50",
            PaperRun(
                f"inaturalist2018_resnet50_{recipe}_balpoe",
                "inaturalist2018.py",
                f"recipe={recipe}",
            ),
            (PaperFigure("ACC", _ACCURACY, accuracy),),
        )
        for recipe, accuracy in {"strong": 73.5, "long": 76.9}.items()
    ]
    others = [*_others_in_table_1("imagenet_lt"), *_others_in_table_1("inaturalist2018")]
    return (*imagenet, *inaturalist, *others)


def _others_in_table_1(dataset: str) -> list[PaperRow]:
    """The rows of other methods, whose figures are in their presets."""
    return [
        PaperRow(
            ", ".join(filter(None, [preset.about, _DATASETS[dataset][1], published.arguments])),
            _of_method(name, dataset, published.arguments),
            (PaperFigure("ACC", _ACCURACY, published.accuracy),),
            published.network,
        )
        for name, preset in _OTHERS.items()
        for published in preset.published
        if published.dataset == dataset and published.source == "BalPoE's Table 1"
    ]


def _calibration(*published: tuple[float | None, ...]) -> tuple[PaperFigure, ...]:
    keys = {"ECE": ("test", "ece"), "MCE": ("test", "mce"), "ACC": _ACCURACY}
    figures = published or ((None,),) * len(keys)
    return tuple(
        PaperFigure(name, path, *figure)
        for (name, path), figure in zip(keys.items(), figures, strict=True)
    )


def _shift(kind: str, *published: float) -> tuple[PaperFigure, ...]:
    targets = {
        "F50": "forward50", "F5": "forward5", "Uni": "uniform", "B5": "backward5",
        "B50": "backward50",
    }  # fmt: skip
    figures = published or (None,) * len(targets)
    return tuple(
        PaperFigure(name, ("shift", target, kind), figure)
        for (name, target), figure in zip(targets.items(), figures, strict=True)
    )


def _learnt(*published: float) -> tuple[PaperFigure, ...]:
    """With weights of the experts that were learnt from the unlabelled test images."""
    return tuple(
        dataclasses.replace(score, keys=("aggregation", score.keys[1], "top1", "used"))
        for score in _shift("none", *published)
    )


def _by_group() -> tuple[PaperFigure, ...]:
    groups = {"all": "top1", "many": "many", "medium": "medium", "few": "few"}
    return tuple(PaperFigure(name, ("test", key)) for name, key in groups.items())


# The presets that have no rows of their own in the paper's tables.
_OTHERS = {
    name: preset
    for name, preset in PRESETS.items()
    if name not in ("balpoe", "balanced_softmax", "cross_entropy")
}

_DATASETS = {
    "cifar100_lt": ("cifar100_lt.py", "CIFAR-100-LT"),
    "cifar10_lt": ("cifar10_lt.py", "CIFAR-10-LT"),
    "imagenet_lt": ("imagenet_lt.py", "ImageNet-LT"),
    "inaturalist2018": ("inaturalist2018.py", "iNaturalist 2018"),
}


def _of_method(name: str, dataset: str, arguments: str) -> PaperRun:
    """The experiment of a preset on a data set, with that of its teacher."""
    parts = [part for part in arguments.split(",") if part]
    label = "_".join([dataset, *(part.replace("=", "") for part in parts), name])
    preset, teacher = PRESETS[name], None
    if preset.teacher:
        other, own = preset.teacher
        shared = [part for part in parts if not part.startswith("experts=")]
        teacher = _of_method(other, dataset, ",".join([*shared, own]))
    return PaperRun(label, _DATASETS[dataset][0], ",".join([*parts, f"method={name}"]), teacher)


def _method_scores(published: PublishedResult | None) -> tuple[PaperFigure, ...]:
    accuracy, ece = (published.accuracy, published.ece) if published else (None, None)
    groups = [PaperFigure(name, ("test", name)) for name in ("many", "medium", "few")]
    errors = (PaperFigure("ECE", ("test", "ece"), ece), PaperFigure("MCE", ("test", "mce")))
    return (PaperFigure("ACC", _ACCURACY, accuracy), *groups, *errors)


def _all_methods() -> tuple[PaperRow, ...]:
    """Every method on CIFAR-100-LT at ratio 100, published there or not."""
    ours = {
        "CE": (_CE, PublishedResult("", "", 38.8, "", 32.0)),
        "Mixup": (_MIXUP, PublishedResult("", "", 40.8, "", 9.6)),
        "balanced softmax": (_BALANCED_SOFTMAX, None),
        "BalPoE, no mixup": (_WITHOUT_MIXUP, PublishedResult("", "", 49.2, "", 17.6)),
        "BalPoE": (_BALPOE, PublishedResult("", "", 52.0, "", 4.9)),
    }
    rows = [PaperRow(name, run, _method_scores(scores)) for name, (run, scores) in ours.items()]
    for name, preset in _OTHERS.items():
        known = {(p.dataset, p.arguments): p for p in preset.published}
        published = known.get(("cifar100_lt", "ir=100"))
        scores, network = _method_scores(published), published.network if published else None
        run = _of_method(name, "cifar100_lt", "ir=100")
        rows.append(PaperRow(preset.about, run, scores, network))
    return tuple(rows)


def _on_cifar100(name: str) -> PaperRun:
    return _of_method(name, "cifar100_lt", "ir=100")


def _with_resnext(name: str) -> PaperRun:
    return _of_method(name, "imagenet_lt", "backbone=resnext50")


def _others_in_table_3(
    experiment: Callable[[str], PaperRun],
    without_prior: Mapping[str, tuple[float, ...]],
    lade_known: tuple[float, ...],
    sade_learnt: tuple[float, ...],
) -> list[PaperRow]:
    """The rows of other methods: from F50 to B50, what is published."""
    rows = [
        PaperRow(f"{PRESETS[name].about}, no prior", experiment(name), _shift("none", *figures))
        for name, figures in without_prior.items()
    ]
    known = PaperRow("LADE, known prior", experiment("lade"), _shift("prior", *lade_known))
    learnt = PaperRow("SADE, weights learnt", experiment("sade"), _learnt(*sade_learnt))
    return [*rows, known, learnt]


def _published_methods() -> dict[str, PaperTable]:
    """A table for each data set, and each ratio, of what is published there."""
    rows: dict[tuple[str, str], list[PaperRow]] = {}
    for name, preset in _OTHERS.items():
        for published in preset.published:
            first, _, rest = published.arguments.partition(",")
            ratio = first.removeprefix("ir=") if first.startswith("ir=") else ""
            others = rest if ratio else published.arguments
            about = ", ".join(filter(None, [preset.about, others]))
            run = _of_method(name, published.dataset, published.arguments)
            rows.setdefault((published.dataset, ratio), []).append(
                PaperRow(about, run, _method_scores(published), published.network)
            )
    return {
        f"methods-{dataset}{f'-{ratio}' if ratio else ''}": PaperTable(
            f"Methods: {_DATASETS[dataset][1]}{f', imbalance ratio {ratio}' if ratio else ''}",
            tuple(of_dataset),
        )
        for (dataset, ratio), of_dataset in sorted(rows.items())
    }


TABLES = {
    "methods": PaperTable("Methods: CIFAR-100-LT, imbalance ratio 100", _all_methods()),
    **_published_methods(),
    "1": PaperTable("Table 1: CIFAR-100-LT, state of the art", _table_1()),
    "1-photos": PaperTable(
        "Table 1: ImageNet-LT and iNaturalist 2018, state of the art", _table_1_photos()
    ),
    "2": PaperTable(
        "Table 2: calibration, CIFAR-100-LT, imbalance ratio 100",
        (
            PaperRow("CE", _CE, _calibration((32.0, 0.4), (47.3, 1.8), (38.8, 0.6))),
            PaperRow("Mixup", _MIXUP, _calibration((9.6, 0.8), (15.9, 1.5), (40.8, 0.7))),
            PaperRow("balanced softmax", _BALANCED_SOFTMAX, _calibration()),
            PaperRow(
                "BalPoE, no mixup",
                _WITHOUT_MIXUP,
                _calibration((17.6, 0.4), (28.9, 0.9), (49.2, 0.5)),
            ),
            PaperRow("BalPoE", _BALPOE, _calibration((4.9, 1.0), (11.3, 1.6), (52.0, 0.5))),
            PaperRow("Bayias", _on_cifar100("bayias"), _calibration((24.3,), (39.7,), (43.5,))),
            PaperRow("TLC", _on_cifar100("tlc"), _calibration((22.8,), (None,), (49.0,))),
            PaperRow("Remix", _on_cifar100("remix"), _calibration((33.6,), (51.0,), (41.9,))),
            PaperRow(
                "UniMix + Bayias",
                _on_cifar100("unimix_bayias"),
                _calibration((23.0,), (37.4,), (45.5,)),
            ),
            PaperRow("MiSLAS", _on_cifar100("mislas"), _calibration((4.8,), (None,), (47.0,))),
        ),
    ),
    "3": PaperTable(
        "Table 3: target distributions, CIFAR-100-LT, imbalance ratio 100",
        (
            PaperRow("Softmax, no prior", _CE, _shift("none", 63.3, 52.5, 41.4, 30.5, 17.5)),
            PaperRow("Mixup, no prior", _MIXUP, _shift("none")),
            PaperRow("bal. softmax, no prior", _BALANCED_SOFTMAX, _shift("none")),
            PaperRow("bal. softmax, known", _BALANCED_SOFTMAX, _shift("prior")),
            PaperRow("BalPoE no mixup, none", _WITHOUT_MIXUP, _shift("none")),
            PaperRow("BalPoE no mixup, known", _WITHOUT_MIXUP, _shift("prior")),
            PaperRow("BalPoE no mixup, est.", _WITHOUT_MIXUP, _shift("estimated")),
            PaperRow("BalPoE, no prior", _BALPOE, _shift("none", 65.1, 54.8, 52.0, 44.6, 36.1)),
            PaperRow("BalPoE, known prior", _BALPOE, _shift("prior", 70.3, 59.3, 52.0, 46.9, 46.1)),
            PaperRow("BalPoE, estimated", _BALPOE, _shift("estimated")),
            *_others_in_table_3(
                _on_cifar100,
                {
                    "mislas": (58.8, 53.0, 46.8, 40.1, 32.1),
                    "lade": (56.0, 51.0, 45.6, 40.0, 34.0),
                    "ride": (63.0, 53.6, 48.0, 38.1, 29.2),
                    "sade": (58.4, 53.1, 49.4, 42.6, 35.0),
                },
                lade_known=(62.6, 52.7, 45.6, 41.1, 41.6),
                sade_learnt=(65.9, 54.8, 49.8, 44.7, 42.4),
            ),
        ),
    ),
    "3-photos": PaperTable(
        "Table 3: target distributions, ImageNet-LT, ResNeXt-50",
        (
            PaperRow(
                "Softmax, no prior", _CE_RESNEXT, _shift("none", 66.1, 56.6, 48.0, 38.6, 27.6)
            ),
            PaperRow(
                "BalPoE, no prior", _BALPOE_RESNEXT, _shift("none", 67.6, 63.3, 59.8, 55.7, 50.8)
            ),
            PaperRow(
                "BalPoE, known prior",
                _BALPOE_RESNEXT,
                _shift("prior", 72.5, 64.6, 59.8, 57.2, 56.9),
            ),
            PaperRow("BalPoE, estimated", _BALPOE_RESNEXT, _shift("estimated")),
            *_others_in_table_3(
                _with_resnext,
                {
                    "mislas": (61.6, 56.3, 51.4, 46.1, 39.5),
                    "lade": (63.4, 57.4, 52.3, 46.8, 40.7),
                    "ride": (67.6, 61.7, 56.3, 51.0, 44.0),
                    "sade": (65.5, 62.0, 58.8, 54.7, 49.8),
                },
                lade_known=(65.8, 57.5, 52.3, 48.8, 49.2),
                sade_learnt=(69.4, 63.0, 58.8, 55.5, 53.1),
            ),
        ),
    ),
    "fig5": PaperTable(
        "Figure 5: number of experts, CIFAR-100-LT, imbalance ratio 100",
        tuple(
            PaperRow(
                f"{number} expert{'s' if number > 1 else ''}",
                _BALPOE
                if number == 3
                else _cifar100(f"ir100_balpoe_{number}_experts", f"ir=100,experts={number}"),
                _by_group(),
            )
            for number in (1, 2, 3, 5, 7)
        ),
    ),
}
