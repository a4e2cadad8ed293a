# SPDX-License-Identifier: Apache-2.0
"""A self-contained page of tables and figures: no other files, no network.

Its one script sorts the table of all classes; without scripts the page shows all there is.

The HTML is in `templates/`. Every text is escaped there, unless a function of this module made it.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from balpoe_jax import files
from balpoe_jax.files import reports_write_errors
from balpoe_jax.reporting.tables import Table


def write(path: Path, title: str, subtitle: str, sections: Sequence[Markup]) -> Path:
    """Writes a page as a whole and returns its path; title and subtitle are plain text.

    Raises:
        UserError (a `ValueError`): the page cannot be written.
    """
    with reports_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    page = _templates().get_template("page.html")
    text = page.render(title=title, subtitle=subtitle, sections=sections)
    files.write_atomically(path, text)
    return path


def section(heading: str, *bodies: Markup) -> Markup:
    """A part of the page under a heading."""
    return _part("section", heading, bodies)


def table(content: Table, strong: str = "ensemble", heading: bool = True) -> Markup:
    """A table with its title and note; the row labelled `strong` stands out."""
    return _part("table", content, strong, heading)


def sortable(content: Table) -> Markup:
    """A table that a click on a heading sorts, folded away where it is long."""
    return _part("sortable", content, len(content.rows) > 40)


def definitions(rows: Mapping[str, object]) -> Markup:
    """Names and their values, one below the other."""
    return _part("definitions", rows)


def figures(*content: Markup, broad: bool = False) -> Markup:
    """Figures side by side, as many as the page has room for."""
    return _part("figures", content, broad)


def figure(svg: str, alternative: str, caption: str = "") -> Markup:
    """A figure with a text for those who do not see it.

    Args:
        svg: Element of a drawing of ours, which is not escaped.
        alternative: Text that says what the figure shows.
        caption: Text below the figure; empty for none.
    """
    label = Markup('<svg role="img" aria-label="{}" ').format(alternative)
    return _part("figure", Markup(svg.replace("<svg ", label, 1)), caption)


def pictures(title: str, note: str, items: Sequence[Mapping[str, str]]) -> Markup:
    """Small pictures with captions, as many side by side as the page has room for.

    Args:
        title: Heading.
        note: Help to read them.
        items: Address (`uri`), alternative text (`alternative`), file (`name`), and the two lines
            of the caption (`label` and `predicted`) of each picture.
    """
    return _part("pictures", title, note, items)


def absent(sentence: str) -> Markup:
    """A sentence in place of something that is missing."""
    return _part("absent", sentence)


def _part(macro: str, *arguments: Any) -> Markup:
    return Markup(getattr(_templates().get_template("parts.html").module, macro)(*arguments))


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("balpoe_jax.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
