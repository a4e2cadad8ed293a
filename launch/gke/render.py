# SPDX-License-Identifier: Apache-2.0
"""Fills a manifest: render.py FOLDER NAME=VALUE ... -- FLAG ...; for submit.sh."""

import json
import re
import string
import sys
from pathlib import Path

WANTED = {
    "tpu.yaml": ("name", "image", "hosts", "claim", "tpu", "topology", "chips"),
    "gpu.yaml": ("name", "image", "hosts", "claim", "gpu", "gpus"),
}


# Beside what JSON escapes: controls, other line ends, and what is no character.
_UNPRINTABLE = "[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]"


def fail(message: str) -> None:
    """Ends with one line."""
    print(f"Error: {message}", file=sys.stderr)
    sys.exit(2)


def quote(value: str | int) -> str:
    """As JSON, but with escapes only of what YAML does not take as it is.

    Of rare characters JSON has pairs of escapes, which YAML does not put together.
    """
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(_UNPRINTABLE, lambda found: f"\\u{ord(found[0]):04x}", text)


def render(folder: Path, values: dict[str, str], arguments: list[str]) -> str:
    """The manifest with each placeholder as a JSON value, which YAML reads as it is."""
    file = "tpu.yaml" if "tpu" in values else "gpu.yaml"
    missing = [f"--{name}" for name in WANTED[file] if not values.get(name)]
    if missing:
        fail(f"missing {', '.join(missing)}; see the head of launch/gke/submit.sh")
    foreign = [f"--{name}" for name in values if name not in WANTED[file]]
    if foreign:
        fail(f"{', '.join(foreign)} does not belong to {file}; choose either --tpu or --gpu")
    for name in ("hosts", "chips", "gpus"):
        if not re.fullmatch("[1-9][0-9]*", values.get(name, "1")):
            fail(f"--{name} must be a positive number, got {values[name]}")
    if not re.fullmatch("[a-z]([-a-z0-9]{0,38}[a-z0-9])?", values["name"]):
        fail(f"--name must be lower-case letters, digits and dashes, got {values['name']}")
    # Kubernetes replaces $(NAME) in arguments, and $$ by $.
    flags = [quote(argument.replace("$", "$$")) for argument in arguments]
    numbers = {name: int(values[name]) for name in ("hosts", "chips", "gpus") if name in values}
    placeholders = {
        **{name: quote(value) for name, value in {**values, **numbers}.items()},
        "coordinator": quote(
            f"--coordinator_address={values['name']}-hosts-0-0.{values['name']}:8476"
        ),
        "num_processes": quote(f"--num_processes={values['hosts']}"),
        "flags": ", ".join(flags),
    }
    return string.Template((folder / file).read_text()).substitute(placeholders)


def main() -> None:
    """Prints the manifest."""
    folder, *rest = sys.argv[1:]
    split = rest.index("--")
    values = dict(value.split("=", 1) for value in rest[:split])
    print(render(Path(folder), values, rest[split + 1 :]), end="")


if __name__ == "__main__":
    main()
