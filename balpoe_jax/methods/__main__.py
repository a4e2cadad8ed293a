# SPDX-License-Identifier: Apache-2.0
"""Writes the catalogue of the methods, or the first version of a new one.

    python -m balpoe_jax.methods catalogue      docs/methods/index.md, and the README's table
    python -m balpoe_jax.methods new NAME       the file of a method, and its test

Both work on the checkout that holds the package.
"""

from collections.abc import Sequence
from pathlib import Path

from balpoe_jax import cli
from balpoe_jax.errors import UserError

_USAGE = "call python -m balpoe_jax.methods catalogue, or new NAME"


def define_flags() -> None:
    """Defines no flags: the command takes plain arguments."""


def main(arguments: Sequence[str]) -> None:
    """Runs the command that the first argument names.

    Raises:
        UserError (a `ValueError`): other arguments, a name that is not valid or that is taken, or a
            package that is not in a checkout.
    """
    root = Path(__file__).parents[2]
    if list(arguments[1:]) == ["catalogue"]:
        write_catalogue(root)
    elif len(arguments) == 3 and arguments[1] == "new":
        write_new(root, arguments[2])
    else:
        given = " ".join(arguments[1:]) or "nothing"
        raise UserError(f"Expected what to write, got {given}; {_USAGE}.")


def write_catalogue(root: Path) -> None:
    """Writes the page and the README's table of a checkout."""
    # Not above, so that wrong arguments are reported at once.
    from balpoe_jax.methods import MODULES, catalogue

    _check_checkout(root)
    page, readme = root / catalogue.PAGE, root / catalogue.README
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(catalogue.page(MODULES))
    readme.write_text(catalogue.with_table(readme.read_text(), MODULES))
    print(f"Wrote {page} and the table in {readme}.")


def write_new(root: Path, name: str) -> None:
    """Writes the file and the test of a new method into a checkout."""
    from balpoe_jax.methods import METHODS, PRESETS, scaffold

    _check_checkout(root)
    scaffold.check_name(name)
    files = {
        root / "balpoe_jax" / "methods" / f"{name}.py": scaffold.text_of_method(name),
        root / "tests" / "methods" / f"test_{name}.py": scaffold.text_of_test(name),
    }
    taken = [str(file.relative_to(root)) for file in files if file.exists()]
    if taken or name in PRESETS or scaffold.class_name(name).lower() in METHODS:
        raise UserError(
            f"Expected the name of a method that is not there yet, got {name!r}, which "
            f"{taken[0] if taken else 'a preset or a class'} has already; choose another name."
        )
    for file, text in files.items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    test, module = (str(file.relative_to(root)) for file in reversed(files))
    print(
        f"Wrote {module} and {test}.\n"
        f"Try it:    python -m balpoe_jax.main --config=configs/digits_lt.py:method={name} "
        f"--workdir=runs/{name}\n"
        f"Test it:   python -m pytest -m 'not slow' {test} tests/methods/test_methods.py "
        "tests/methods/test_method_runs.py\n"
        "Then:      python -m balpoe_jax.methods catalogue"
    )


def _check_checkout(root: Path) -> None:
    if not (root / "tests").is_dir() or not (root / "README.md").is_file():
        raise UserError(
            f"Expected a checkout of the project around the package, got {root}, where there is no "
            "tests folder and README.md; run this in a clone that is installed with pip install -e."
        )


if __name__ == "__main__":
    cli.run(define_flags, main)
