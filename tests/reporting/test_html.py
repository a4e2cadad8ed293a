# SPDX-License-Identifier: Apache-2.0
"""The parts of a page: what is text is escaped, what is a part of ours is not."""

from pathlib import Path

import jinja2
import pytest
from markupsafe import Markup

from balpoe_jax.reporting import html
from balpoe_jax.reporting.tables import Column, Table

EVIL = """<b onclick='x'>&"it"</b>"""
ESCAPED = "&lt;b onclick=&#39;x&#39;&gt;&amp;&#34;it&#34;&lt;/b&gt;"


def test_every_text_is_escaped(tmp_path: Path) -> None:
    content = Table("name", EVIL, (Column(EVIL),), [(EVIL, [EVIL]), ("ensemble", [0.5])], EVIL)
    sections = [
        html.section(EVIL, html.table(content), html.absent(EVIL)),
        html.section("The run", html.definitions({EVIL: EVIL})),
        html.figures(html.figure("<svg ></svg>", EVIL, EVIL)),
    ]
    text = html.write(tmp_path / "page.html", EVIL, EVIL, sections).read_text()
    assert "onclick='" not in text
    # Of the page: two titles and a subtitle; of the table: title, label, column, row, cell, note.
    assert text.count(ESCAPED) == 3 + 1 + 6 + 1 + 2 + 2
    assert text.count("<svg role=") == 1
    assert text.startswith("<!DOCTYPE html>\n") and text.endswith("</html>\n")


def test_a_text_in_place_of_a_part_is_escaped() -> None:
    assert ESCAPED in html.section("heading", EVIL)  # type: ignore[arg-type]
    assert ESCAPED in html.figures(EVIL)  # type: ignore[arg-type]


def test_a_table_has_its_cells_in_order_and_the_strong_row_stands_out() -> None:
    columns = (Column("a"), Column("b", "decimal"))
    table = html.table(Table("t", "T", columns, [("x", [0.5, 1.0]), ("ensemble", [None, 2.0])]))
    assert table == (
        '<h3>T</h3>\n<div class="wide" tabindex="0" role="region" aria-label="T"><table><thead><tr>'
        '<th scope="col"></th><th scope="col">a</th><th scope="col">b</th></tr></thead><tbody>'
        '<tr><th scope="row">x</th><td>50.0</td><td>1.000</td></tr>'
        '<tr class="strong"><th scope="row">ensemble</th><td>-</td><td>2.000</td></tr>'
        "</tbody></table></div>"
    )
    assert isinstance(table, Markup)


def test_more_cells_than_columns_are_refused() -> None:
    with pytest.raises(jinja2.UndefinedError):
        html.table(Table("t", "T", (Column("a"),), [("x", [0.5, 1.0])]))


def test_parts_stand_one_below_the_other() -> None:
    assert html.section("H", html.absent("a"), html.absent("b")) == (
        '<section><h2>H</h2>\n<p class="soft">a</p>\n<p class="soft">b</p>\n</section>'
    )
    assert html.figures(Markup("x"), Markup("y"), broad=True) == (
        '<div class="figures broad">x\ny</div>'
    )
    assert html.figure("<svg ></svg>", "dots") == (
        '<figure><svg role="img" aria-label="dots" ></svg></figure>'
    )
