# SPDX-License-Identifier: Apache-2.0
"""A folder for a hub of models: weights, config, results, program, and a card.

`balpoe_jax.load`, `balpoe_jax.predict` and `--mode=eval` read the folder as they read a workdir.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from balpoe_jax import files
from balpoe_jax.errors import UserError
from balpoe_jax.export import stablehlo, weights
from balpoe_jax.predictor import Predictor

CARD = "README.md"

# Classes that the card lists with their counts.
_LISTED = 20


def write(predictor: Predictor, folder: Path) -> Path:
    """Writes the folder's files.

    The record is without the command, versions and paths of the machine that trained.

    Args:
        predictor: Restored run.
        folder: Folder of the files.

    Raises:
        UserError (a `ValueError`): the run's own folder, a run that is not evaluated, safetensors
            is not installed, or files that cannot be written.
    """
    if folder.resolve() == predictor.path.resolve():
        raise UserError(
            f"The folder for a hub has a record of its own, and {folder} is the run's; choose "
            "another --output."
        )
    results = files.read_json(predictor.path / files.RESULTS)
    record = files.read_json(predictor.path / files.CONFIG) or {}
    if not results or "test" not in results:
        raise UserError(
            f"The run in {predictor.path} has no results to show on a card; evaluate it first, "
            "with --mode=eval."
        )
    weights.write(predictor, folder)
    stablehlo.write(predictor, folder)
    kept = {name: record[name] for name in ("config", "resolved", "data") if name in record}
    config = dict(kept["config"])
    config["data"] = {**config["data"], "data_dir": None, "lists": None, "class_names": None}
    files.write_atomically(
        folder / files.CONFIG, json.dumps({**kept, "config": config}, indent=2) + "\n"
    )
    files.write_atomically(folder / files.RESULTS, json.dumps(results, indent=2) + "\n")
    files.write_atomically(folder / CARD, card(predictor, results, config))
    return folder


def push(folder: Path, repository: str) -> str:
    """Uploads a folder to a repository of Hugging Face's hub; returns its address.

    Args:
        folder: Folder that `write` wrote.
        repository: Name of the repository, `OWNER/NAME`.

    Raises:
        UserError (a `ValueError`): huggingface_hub is not installed, or the upload fails.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            "--push needs the package huggingface_hub, which is not installed; install it with "
            "pip install 'balpoe_jax[hub]'."
        ) from error
    try:
        interface = huggingface_hub.HfApi()
        interface.create_repo(repository, exist_ok=True)
        return str(interface.upload_folder(folder_path=str(folder), repo_id=repository))
    except Exception as error:  # of its HTTP client, which is another one in each major version
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{folder} was not uploaded to {repository} ({first}); check the name, your login and "
            "the network, and call again."
        ) from error


def card(predictor: Predictor, results: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The card of a model in Markdown, with the head that Hugging Face's hub reads.

    Args:
        predictor: Restored run.
        results: Content of `results.json`.
        config: Fields of the run's config.
    """
    test, counts = results["test"], predictor.class_counts
    data, model = config["data"]["name"], config["model"]
    method = (config.get("method") or {}).get("name") or "balpoe"
    fitted = ((results.get("temperature") or {}).get("ensemble")) or {}
    rows = [
        ("accuracy", test["top1"]),
        ("balanced accuracy", test.get("balanced")),
        *((f"{group}-shot classes", test[group]) for group in ("many", "medium", "few")),
        ("ECE", test["ece"]),
        ("ECE after temperature", fitted.get("ece")),
    ]
    figures = [f"| {name} | {100 * value:.1f} |" for name, value in rows if value is not None]
    order = sorted(range(len(counts)), key=lambda i: -counts[i])
    shown = order if len(order) <= _LISTED else [*order[: _LISTED // 2], *order[-_LISTED // 2 :]]
    classes = [f"| {_cell(predictor.classes[i])} | {counts[i]:,} |" for i in shown]
    note = "" if len(shown) == len(order) else f" ({len(shown)} of {len(order)} are shown)"
    prior = "the same for all classes: probabilities assume that each is as frequent as any other"
    return "\n".join(
        [
            *_head(data, test),
            f"# {data}: {model['name']} with {model['num_experts']} experts, {method}",
            "",
            f"An image classifier for {len(counts)} classes, trained by "
            "`balpoe_jax` on "
            f"{counts.sum():,} images, {counts.max():,} to {counts.min():,} a class.",
            "",
            "## Figures on the test set, in percent",
            "",
            *("| | |", "| --- | ---: |", *figures),
            "",
            f"{results['num_parameters']:,} parameters; epoch {results['epoch']}, step "
            f"{results['step']:,}. All scores are in `results.json`.",
            "",
            "## Use",
            "",
            "```python",
            "import balpoe_jax",
            "",
            'found = balpoe_jax.load("FOLDER").predict(["image.jpg"])',
            "found.names, found.probabilities",
            "```",
            "",
            f"`model.stablehlo` runs with JAX alone, on uint8 images of {predictor.image_size} x "
            f"{predictor.image_size} pixels. The prior is {prior}. "
            + (
                f"Logits are divided by a temperature of {predictor.temperature:.3f}, fitted on "
                "held-out images."
                if predictor.is_calibrated
                else "No temperature was fitted."
            ),
            "",
            "## Limits",
            "",
            "It knows the classes below and no others: any image gets one of them. Classes with "
            "few training images are less reliable. Images that are unlike those of training get "
            "confident and wrong answers.",
            "",
            f"## Training images by class{note}",
            "",
            *("| class | images |", "| --- | ---: |", *classes),
            "",
        ]
    )


def _head(data: str, test: Mapping[str, Any]) -> list[str]:
    """YAML, whose strings are those of JSON."""
    metrics = [("accuracy", test["top1"]), ("ece", test["ece"])]
    return [
        "---",
        "library_name: balpoe_jax",
        "pipeline_tag: image-classification",
        "tags: [balpoe_jax, jax, flax, long-tailed-recognition, calibration]",
        "model-index:",
        "- name: balpoe_jax",
        "  results:",
        "  - task: {type: image-classification}",
        f"    dataset: {{name: {json.dumps(data)}, type: {json.dumps(data)}}}",
        "    metrics:",
        *(
            f"    - {{type: {name}, value: {value:.4f}}}"
            for name, value in metrics
            if value is not None
        ),
        "---",
        "",
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
