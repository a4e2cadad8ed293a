# SPDX-License-Identifier: Apache-2.0
"""The results of a run as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from balpoe_jax.reporting.tables import Column, Table


def result_tables(results: Mapping[str, Any]) -> list[Table]:
    """The tables of one run, as far as its `results.json` has the figures.

    Args:
        results: Content of `results.json`.
    """
    tables = [_result(results), _calibration(results)]
    if results.get("posthoc"):
        tables += [_variants(results), _thresholds(results)]
    if results.get("calibration_groups"):
        tables.append(_calibration_by_group(results))
    if results.get("shift"):
        tables.append(_shift(results))
    if results.get("shift_sets"):
        tables += [_prior_estimates(results), _estimate_accuracies(results)]
        if all(scores.get("ece") for scores in results["shift_sets"].values()):
            tables.append(_shift_calibration(results))
    if results.get("aggregation"):
        tables.append(_aggregation(results))
    if results.get("bias") and results.get("ensemble"):
        tables += [_bias(results), _experts(results)]
    return tables


def named_rows(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Every expert and the ensemble with its scores."""
    experts = [(f"expert {i}", scores) for i, scores in enumerate(results["experts"], start=1)]
    return [*experts, ("ensemble", {"tau": "", **results["test"]})]


_GROUPS = ("many", "medium", "few")


def _result(results: Mapping[str, Any]) -> Table:
    mean = ("balanced",) if _is_unequal(results) else ()
    keys = ("tau", "top1", *mean, *_GROUPS, "ece", "mce", "nll", "brier", "adaptive_ece")
    on = "on the balanced test set"
    if mean:
        on = "on the test set, whose classes differ in size: all is over images, balanced over "
        on += "classes"
    used = ""
    trained = (
        "Each expert is trained with the prior weighted by its tau, if it has one; the ensemble is "
        "the mean of their logits, unless the method combines them otherwise."
    )
    if results.get("posthoc"):
        trained = (
            "Logits are adjusted, without a temperature; an expert is a model, and the ensemble "
            "the mean of their logits."
        )
    if results.get("experts_used") is not None:
        used = f" It took {results['experts_used']:.2f} experts an example, on average."
    return Table(
        "result",
        "Accuracy and calibration",
        (
            Column("tau", "number"),
            Column("all"),
            *(Column(name) for name in (*mean, *_GROUPS)),
            Column("ECE"),
            Column("MCE"),
            Column("NLL", "decimal", wide=True),
            Column("Brier", "decimal", wide=True),
            Column("aECE", wide=True),
        ),
        [(name, [scores.get(key) for key in keys]) for name, scores in named_rows(results)],
        f"Percent {on}; tau, NLL (nats) and Brier score as they are. The figure "
        f"of a shot group is the mean over its classes. {trained}{used}",
    )


def _variants(results: Mapping[str, Any]) -> Table:
    keys = ("tau", "temperature", "top1", "balanced", *_GROUPS, "ece", "nll")
    columns = (
        *(Column("tau", "short"), Column("T", "short"), Column("all"), Column("balanced")),
        *(Column(group) for group in _GROUPS),
        *(Column("ECE"), Column("NLL", "decimal")),
    )
    rows = [
        (variant["name"], [variant.get(key) for key in keys])
        for variant in results["posthoc"]["variants"]
    ]
    return Table(
        "variants",
        "What adjustment and calibration gain",
        columns,
        rows,
        "Percent on the test rows. Adjusted logits are less tau times the log-frequency of each "
        "class in training. Tau is chosen by balanced accuracy and T by the likelihood, both on "
        "held-out rows. The estimated prior is that of the test rows, without their labels.",
    )


def _thresholds(results: Mapping[str, Any]) -> Table:
    keys = (
        *("confidence", "held_out_precision", "held_out_low", "held_out_coverage"),
        *("test_precision", "test_coverage"),
    )
    columns = (
        Column("confidence", "decimal"),
        *(Column(name) for name in ("held-out", "at least", "coverage", "test", "coverage/test")),
    )
    rows = [
        (f"{100 * row['precision']:g}%", [row.get(key) for key in keys])
        for row in results["posthoc"]["thresholds"]
    ]
    return Table(
        "thresholds",
        "Confidence for a precision",
        columns,
        rows,
        "Naming a class only above a confidence, after adjustment and temperature. The confidence "
        "is the least that reaches the precision on held-out rows; at least is the lower end of "
        "its 95% interval there. A dash: no confidence reaches it.",
    )


def _is_unequal(results: Mapping[str, Any]) -> bool:
    """Whether the accuracy over images differs from the mean of the classes' somewhere."""
    pairs = [(scores["top1"], scores.get("balanced")) for _, scores in named_rows(results)]
    return any(
        all_images is not None and balanced is not None and abs(all_images - balanced) > 1e-6
        for all_images, balanced in pairs
    )


def _calibration(results: Mapping[str, Any]) -> Table:
    keys = ("ece", "mce", "adaptive_ece", "nll", "brier")
    temperature = results.get("temperature")
    after = [*temperature["experts"], temperature["ensemble"]] if temperature else []
    columns = [Column("ECE"), Column("MCE"), Column("aECE"), Column("NLL", "decimal")]
    columns.append(Column("Brier", "decimal"))
    if after:
        columns += [Column("T", "short"), Column("ECE/T"), Column("NLL/T", "decimal")]
    rows = []
    for i, (name, scores) in enumerate(named_rows(results)):
        values = [scores.get(key) for key in keys]
        if after:
            values += [after[i]["value"], after[i]["ece"], after[i]["nll"]]
        rows.append((name, values))
    note = (
        f"ECE and MCE over {results.get('num_bins') or 15} bins of equal width, aECE over as many "
        "of equal size, in percent."
    )
    if temperature:
        note += (
            " T is the temperature that fits best on held-out examples, and /T what it makes of "
            f"the test set; held out are {temperature['fitted_on']}. No test label is used to fit."
        )
    return Table("calibration", "Calibration", tuple(columns), rows, note)


def _calibration_by_group(results: Mapping[str, Any]) -> Table:
    keys = ("ece", "mce", "adaptive_ece", "nll", "brier")
    temperature = results.get("temperature")
    columns = [Column("ECE"), Column("MCE"), Column("aECE"), Column("NLL", "decimal")]
    columns.append(Column("Brier", "decimal"))
    if temperature:
        columns += [Column("ECE/T"), Column("NLL/T", "decimal")]
    before = {"all": results["test"], **results["calibration_groups"]["ensemble"]}
    after = {}
    if temperature:
        after = {"all": temperature["ensemble"], **(temperature["ensemble"].get("groups") or {})}
    rows = []
    for group, scores in before.items():
        values = [scores.get(key) for key in keys]
        scaled = after.get(group, {})
        rows.append((group, values + [scaled.get(key) for key in ("ece", "nll") if after]))
    return Table(
        "calibration_groups",
        "Calibration of the ensemble by shot group",
        tuple(columns),
        rows,
        "Over the test examples whose label is in the group.",
    )


_PRIORS = {"none": "no prior", "prior": "known", "estimated": "estimated"}
_ESTIMATES = {"map": "MAP", "ml": "ML", "map_uncorrected": "MAP, raw"}


def _shift(results: Mapping[str, Any]) -> Table:
    shift, sets = results["shift"], results.get("shift_sets") or {}
    listed = sorted({s["origin"] for s in sets.values()} - {"rule", "whole test set"})
    taus = [expert["tau"] for expert in results["experts"] if expert["tau"] is not None]
    caution = ""
    known = len(taus) == len(results["experts"])
    if known and abs((mean_tau := float(np.mean(taus))) - 1) > 0.01:
        caution = (
            f" The mean tau of this run is {mean_tau:.4g}, not 1: its logits are biased, so that a "
            "prior added to them is not what theory asks for."
        )
    origin = f" Published lists: {', '.join(listed)}; the others by" if listed else " Test sets by"
    return Table(
        "shift",
        "Accuracy by target distribution",
        tuple(Column(short_name(name)) for name in shift),
        [(label, [shift[name][kind] for name in shift]) for kind, label in _PRIORS.items()],
        "Percent of the examples. F: forward, most examples where the training set has most; B: "
        "backward; the number is the largest class over the smallest. The prior is that of the "
        "test set: not used, known and added to the mean logits, or estimated from the unlabelled "
        f"examples.{origin} the exponential rule (for CIFAR the paper's)."
        f"{_cost_of_estimating(results)}{caution}",
    )


def _cost_of_estimating(results: Mapping[str, Any]) -> str:
    """Sentences on where no estimate was used, and on its effect on the uniform set."""
    sentences = ""
    unused = [
        short_name(name)
        for name, scores in (results.get("shift_sets") or {}).items()
        if not scores.get("estimate_used", True)
    ]
    if unused:
        sentences += (
            f" No estimate was used on {', '.join(unused)}, where predictions do not differ "
            "significantly from those on held-out examples with a uniform prior."
        )
    uniform = results["shift"].get("uniform")
    if uniform and None not in uniform.values():
        change = 100 * (uniform["estimated"] - uniform["none"])
        sentences += f" On the uniform set estimating changes the accuracy by {change:+.1f} points."
    return sentences


def _prior_estimates(results: Mapping[str, Any]) -> Table:
    sets = results["shift_sets"]
    rows = [("uniform", [scores["l1_of_uniform"] for scores in sets.values()])]
    rows += _by_estimate(sets, "l1")
    return Table(
        "prior_estimates",
        "L1 distance of estimated priors from the truth",
        tuple(Column(short_name(name), "short") for name in sets),
        rows,
        "0 is exact, 2 the largest. MAP leans to the uniform prior; the accuracies with an "
        "estimated prior are from it, where one is used; ML is maximum likelihood; raw: without "
        "the correction fitted on held-out examples. The first row is what assuming a uniform "
        f"prior costs.{_unfinished(sets)}",
    )


def _unfinished(sets: Mapping[str, Mapping[str, Any]]) -> str:
    """Sentences on estimates that still changed when their rounds ran out."""
    sentences = ""
    for kind, label in _ESTIMATES.items():
        names = [
            short_name(name)
            for name, scores in sets.items()
            if not scores["estimates"].get(kind, {}).get("converged", True)
        ]
        if names:
            sentences += (
                f" {label} still changed on {', '.join(names)} when its rounds ran out, and is not "
                "the maximum."
            )
    return sentences


def _by_estimate(
    sets: Mapping[str, Mapping[str, Any]], key: str
) -> list[tuple[str, list[float | None]]]:
    """A row for each kind of estimate that all distributions have."""
    return [
        (label, [scores["estimates"][kind][key] for scores in sets.values()])
        for kind, label in _ESTIMATES.items()
        if all(kind in scores["estimates"] for scores in sets.values())
    ]


def _estimate_accuracies(results: Mapping[str, Any]) -> Table:
    sets, shift = results["shift_sets"], results["shift"]
    rows = [
        ("no prior", [shift[name]["none"] for name in sets]),
        *_by_estimate(sets, "top1"),
        ("known", [shift[name]["prior"] for name in sets]),
    ]
    return Table(
        "estimate_accuracies",
        "Accuracy with each kind of estimated prior",
        tuple(Column(short_name(name)) for name in sets),
        rows,
        "Percent of the examples, with the estimate used whether or not the predictions show a "
        "shift. MAP, ML and raw as above.",
    )


def _shift_calibration(results: Mapping[str, Any]) -> Table:
    sets = results["shift_sets"]
    return Table(
        "shift_calibration",
        "ECE by target distribution",
        tuple(Column(short_name(name)) for name in sets),
        [(label, [s["ece"][kind] for s in sets.values()]) for kind, label in _PRIORS.items()],
        "Percent, of the ensemble with each kind of prior.",
    )


def _aggregation(results: Mapping[str, Any]) -> Table:
    found = results["aggregation"]
    labels = {"equal": "equal weights", "learnt": "learnt ones", "used": "used"}
    rows: list[tuple[str, list[Any]]] = [
        (label, [scores["top1"][kind] for scores in found.values()])
        for kind, label in labels.items()
    ]
    for i in range(len(results["experts"])):
        weights = [f"{scores['weights'][i]:.2f}" for scores in found.values()]
        rows.append((f"  weight of {i + 1}", weights))
    return Table(
        "aggregation",
        "Accuracy with weights of the experts learnt at test time",
        tuple(Column(short_name(name)) for name in found),
        rows,
        "Percent of the examples. The weights are learnt from random views of the very images that "
        "are scored, without their labels; where they collapse onto a part of the experts, equal "
        "ones are used.",
    )


def _bias(results: Mapping[str, Any]) -> Table:
    bias, ensemble = results["bias"], results["ensemble"]
    rows: list[tuple[str, list[Any]]] = []
    for i, (expert, scores) in enumerate(zip(bias["experts"], results["experts"], strict=True)):
        others = [value for j, value in enumerate(ensemble["disagreement"][i]) if j != i]
        disagreement = float(np.mean(others)) if others else None
        rows.append(
            (
                f"expert {i + 1}",
                [scores["tau"], expert["lambda"], expert_divergence(expert), disagreement],
            )
        )
    kl = divergence(bias["ensemble"]["kl"])
    rows.append(("ensemble", ["", "", kl, ensemble["mean_disagreement"]]))
    return Table(
        "bias",
        "Bias",
        (
            Column("tau", "number"),
            Column("lambda", "number"),
            Column("KL", "decimal"),
            Column("disagree"),
        ),
        rows,
        "KL divergence, in nats, of the target prior (training frequencies to the power of "
        "lambda) from the expected marginal, the mean prediction over the test set; for the "
        "ensemble, of the uniform prior. Disagreement: percent of test examples on which an expert "
        "and another one differ, on average. The ensemble's accuracy exceeds the mean expert's by "
        f"{100 * ensemble['gain']:.1f} points.",
    )


def _experts(results: Mapping[str, Any]) -> Table:
    rows: list[tuple[str, list[Any]]] = []
    for size, subsets in subsets_by_size(results).items():
        means = [_mean([subset[key] for subset in subsets]) for key in ("top1", *_GROUPS)]
        best = max(subsets, key=lambda subset: subset["top1"])
        which = "+".join(str(expert) for expert in best["experts"])
        rows.append((f"{size} of {len(results['experts'])}", [*means, best["top1"], which]))
    routed = ""
    if results.get("experts_used"):
        scores = [results["test"][key] for key in ("top1", *_GROUPS)]
        rows.append((f"{results['experts_used']:.2f} asked", [*scores, None, ""]))
        routed = (
            " The last row is the method's own ensemble: as many experts for each image as it "
            "needs, this number on average."
        )
    return Table(
        "experts",
        "Accuracy by number of experts used",
        (
            Column("all"),
            *(Column(group) for group in _GROUPS),
            Column("best"),
            Column("which"),
        ),
        rows,
        "Means over all subsets of that many of this run's experts, without further training; a "
        "subset whose mean tau is not 1 is biased. Best: the subset of the highest accuracy."
        f"{routed}",
    )


def subsets_by_size(results: Mapping[str, Any]) -> dict[int, list[Mapping[str, Any]]]:
    """The scored subsets of experts by their number."""
    by_size: dict[int, list[Mapping[str, Any]]] = {}
    for subset in results["ensemble"]["subsets"]:
        by_size.setdefault(len(subset["experts"]), []).append(subset)
    return by_size


def divergence(kl: float | None) -> float | str:
    """A KL divergence as a cell: infinite where a class is never predicted, which JSON cannot say.

    Args:
        kl: Divergence in `results.json`, in nats; None for an infinite one.
    """
    return "infinite" if kl is None else kl


def expert_divergence(bias: Mapping[str, Any]) -> float | str | None:
    """The KL divergence of an expert as a cell; None if it has no tau, and so no target prior.

    Args:
        bias: Entry of an expert in `results.json`, with `lambda` and `kl`.
    """
    return None if bias["lambda"] is None else divergence(bias["kl"])


def short_name(target: str) -> str:
    """A short name of a target distribution, such as F50, uni or B50."""
    return target.replace("forward", "F").replace("backward", "B").replace("uniform", "uni")


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None
