# SPDX-License-Identifier: Apache-2.0
"""The parts of BalPoE+ one by one, as rows: `python -m balpoe_jax.reproduce --table=ablation`.

Parts are chosen by the balanced accuracy on held-out training images, never on test images. The
table `ablation` holds out 50 images of each class that the long-tailed selection leaves out, so
that a choice by it uses labels which the training set does not have. In `ablation-alone` a fifth of
the training images is held out instead: its choice needs no label but theirs. Nothing here has been
published.
"""

from balpoe_jax.reproduce.paper import Fields, PaperFigure, PaperRow, PaperRun, PaperTable

_HELD_OUT = "held-out"

_SCORES = (
    PaperFigure(_HELD_OUT, ("held_out", "balanced")),
    PaperFigure("ACC", ("test", "top1")),
    *(PaperFigure(name, ("test", name)) for name in ("many", "medium", "few")),
    PaperFigure("ECE", ("test", "ece")),
    PaperFigure("MCE", ("test", "mce")),
)

_NO_HEADS: Fields = (("phase2.epochs", 0),)

# Name and folder of a part, arguments, fields at full length, and those that a training of 15
# epochs has in their place: averages over as large a share of the training.
_PARTS: tuple[tuple[str, str, str, Fields, Fields], ...] = (
    ("BalPoE", "balpoe", "", (), ()),
    ("+ head training", "heads", "method=balpoe_plus", (), ()),
    (
        "+ spread of taus 0.5",
        "spread_half",
        "method=balpoe_plus",
        (*_NO_HEADS, ("method.tail_spread", 0.5)),
        (),
    ),
    (
        "+ spread of taus 1.5",
        "spread_more",
        "method=balpoe_plus",
        (*_NO_HEADS, ("method.tail_spread", 1.5)),
        (),
    ),
    ("+ EMA", "ema", "", (("optim.ema", 0.999),), (("optim.ema", 0.99),)),
    ("+ SWA", "swa", "", (("optim.swa", 160),), (("optim.swa", 12),)),
    ("+ AutoAugment", "autoaugment", "recipe=strong", (), ()),
    ("+ AutoAugment, consistency", "consistency", "method=balpoe_cs", (), ()),
    (
        "5 experts of reduced widths",
        "5_experts",
        "experts=5",
        (("model.reduce_dimension", True),),
        (),
    ),
)


def _table(title: str, prefix: str, held_out: Fields) -> PaperTable:
    rows = []
    for about, name, arguments, fields, short in _PARTS:
        run = PaperRun(
            f"{prefix}_{name}",
            "cifar100_lt.py",
            ",".join(filter(None, ["ir=100", arguments])),
            fields=(*held_out, *fields),
            short_fields=short,
        )
        rows.append(PaperRow(about, run, _SCORES))
    return PaperTable(title, tuple(rows))


TABLES = {
    "ablation": _table(
        "Parts of BalPoE+, CIFAR-100-LT, imbalance ratio 100, chosen on 50 unused images a class",
        "ablation",
        (("eval.held_out_per_class", 50),),
    ),
    "ablation-alone": _table(
        "Parts of BalPoE+, CIFAR-100-LT, imbalance ratio 100, chosen on a fifth of the training "
        "images",
        "ablation_alone",
        (("data.held_out_share", 0.2),),
    ),
}
