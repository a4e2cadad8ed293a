# SPDX-License-Identifier: Apache-2.0
"""Writes `docs/configuration.md`, the page of all settings: `python -m balpoe_jax.config`.

It works on the checkout that the package stands in.
"""

from collections.abc import Sequence
from pathlib import Path

from balpoe_jax import cli
from balpoe_jax.errors import UserError


def define_flags() -> None:
    """Defines none."""


def main(arguments: Sequence[str]) -> None:
    """Writes the page.

    Raises:
        UserError (a `ValueError`): an argument, or a package that stands in no checkout.
    """
    # Here and not above, so that a wrong argument is told at once.
    from balpoe_jax.config import reference

    if len(arguments) > 1:
        raise UserError(f"Expected no arguments, got {arguments[1]!r}; leave it out.")
    path = Path(__file__).parents[2] / reference.PAGE
    if not path.parent.is_dir():
        raise UserError(f"Expected a checkout with {path.parent}, got none; run this in one.")
    path.write_text(reference.page())
    print(f"Wrote {path}.")


if __name__ == "__main__":
    cli.run(define_flags, main)
