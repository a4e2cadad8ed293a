# SPDX-License-Identifier: Apache-2.0
"""Refusals of hyper-parameters that a config may have changed."""

from collections.abc import Sequence

from balpoe_jax.errors import UserError


def check_choice(field: str, value: object, choices: Sequence[str]) -> None:
    """Refuses a value of `config.method.FIELD` that is none of the choices.

    Raises:
        UserError (a `ValueError`): naming the field, its value and the choices.
    """
    if value not in choices:
        raise UserError(
            f"Unknown config.method.{field} {value!r}; choose from {', '.join(choices)}."
        )


def check_range(field: str, value: float, least: float, most: float) -> None:
    """Refuses a number of `config.method.FIELD` outside of a range, both ends included.

    Raises:
        UserError (a `ValueError`): naming the field, its value and the range.
    """
    if not least <= value <= most:
        raise UserError(
            f"config.method.{field} must be from {least:g} to {most:.9g}, got {value:.9g}."
        )
