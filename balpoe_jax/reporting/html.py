# SPDX-License-Identifier: Apache-2.0
"""A self-contained page of tables and figures: no scripts, no other files, no network."""

import html
from collections.abc import Sequence
from pathlib import Path

from balpoe_jax import files
from balpoe_jax.files import reports_write_errors
from balpoe_jax.reporting.tables import Table

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --ground: #ffffff;
  --line: #d9dee5; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6e9ee; --soft: #a0aab8; --ground: #14181e; --line: #333b47; }} }}
body {{ margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: var(--ink);
  background: var(--ground); font: 16px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.5rem; margin-bottom: 0; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.15rem; margin: 2.4rem 0 0.6rem; }}
h3 {{ font-size: 1rem; margin: 1.6rem 0 0.3rem; }}
p.soft, figcaption, p.note {{ color: var(--soft); font-size: 0.9rem; }}
p.note {{ margin: 0.4rem 0 0; max-width: 46rem; }}
div.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }}
th:first-child, td.text {{ text-align: left; padding-left: 0; }}
td.text {{ white-space: normal; }}
tr.strong td, tr.strong th {{ font-weight: 600; }}
th {{ font-weight: 500; }}
div.figures {{ display: grid; gap: 1.2rem 1.6rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); }}
div.figures.broad {{ grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }}
figure {{ margin: 0; break-inside: avoid; }}
svg {{ width: 100%; max-width: 34rem; height: auto; }}
code {{ font-size: 0.85em; overflow-wrap: anywhere; }}
@media (max-width: 30rem) {{ th, td {{ padding: 0.25rem 0.4rem; font-size: 0.85rem; }} }}
@media print {{
  :root {{ color-scheme: light; --ink: #000000; --soft: #444444; --ground: #ffffff;
    --line: #bbbbbb; }}
  body {{ margin: 0; max-width: none; font-size: 11px; }}
  th, td {{ padding: 0.15rem 0.4rem; }}
  div.wide {{ overflow: visible; }}
  div.figures {{ grid-template-columns: repeat(3, 1fr); }}
  div.figures.broad {{ grid-template-columns: repeat(2, 1fr); }}
  tr, p.note {{ break-inside: avoid; }}
  h2, h3 {{ break-after: avoid; }} }}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="soft">{subtitle}</p>
{sections}
</main>
</body>
</html>
"""


def write(path: Path, title: str, subtitle: str, sections: Sequence[str]) -> Path:
    """Writes a page as a whole and returns its path; title and subtitle are plain text.

    Raises:
        UserError (a `ValueError`): the page cannot be written.
    """
    with reports_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    text = _PAGE.format(
        title=html.escape(title), subtitle=html.escape(subtitle), sections="\n".join(sections)
    )
    files.write_atomically(path, text)
    return path


def section(heading: str, *bodies: str) -> str:
    """A part of the page under a heading."""
    return f"<section><h2>{html.escape(heading)}</h2>\n" + "\n".join(bodies) + "\n</section>"


def table(content: Table, strong: str = "ensemble", heading: bool = True) -> str:
    """A table with its title and note; the row labelled `strong` stands out."""
    emphasis = {strong: ' class="strong"'}
    columns = "".join(f'<th scope="col">{html.escape(c.name)}</th>' for c in content.columns)
    rows = [
        f'<tr{emphasis.get(name, "")}><th scope="row">{html.escape(name)}</th>'
        + "".join(
            f"<td>{html.escape(column.show(value))}</td>"
            for column, value in zip(content.columns, values, strict=True)
        )
        + "</tr>"
        for name, values in content.rows
    ]
    title = html.escape(content.title, quote=True)
    above = f"<h3>{title}</h3>\n" if heading else ""
    note = f'<p class="note">{html.escape(content.note)}</p>' if content.note else ""
    return (
        f'{above}<div class="wide" tabindex="0" role="region" aria-label="{title}"><table><thead>'
        f'<tr><th scope="col"></th>{columns}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        f"</div>{note}"
    )


def definitions(rows: dict[str, object]) -> str:
    """Names and what they are, one below the other."""
    body = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>'
        f'<td class="text"><code>{html.escape(str(value))}</code></td></tr>'
        for name, value in rows.items()
    )
    return f'<div class="wide"><table><tbody>{body}</tbody></table></div>'


def figures(*content: str, broad: bool = False) -> str:
    """Figures beside each other as far as the page is wide."""
    kind = "figures broad" if broad else "figures"
    return f'<div class="{kind}">' + "\n".join(content) + "</div>"


def figure(svg: str, alternative: str, caption: str = "") -> str:
    """A figure with a text that says what it shows to those who do not see it."""
    label = html.escape(alternative, quote=True)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{svg}{below}</figure>"


def absent(sentence: str) -> str:
    """Says what is not there."""
    return f'<p class="soft">{html.escape(sentence)}</p>'
