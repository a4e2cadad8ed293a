# SPDX-License-Identifier: Apache-2.0
"""The report in a real browser: nothing on its console, nothing wider than the window.

Skipped where no Chromium is installed (`apt install chromium`).
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from balpoe_jax.reporting.report import write_report
from tests.helpers.fake_runs import make_run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
BROWSER = BROWSER or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed"),
]

# Shows a page in a frame of some width and writes into its own title how wide it became.
FRAME = """<!DOCTYPE html><meta charset="utf-8"><title>waiting</title>
<iframe src="{page}" style="width: {width}px; height: 800px; border: 0"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const page = frame.contentDocument.documentElement;
  const figures = [...frame.contentDocument.querySelectorAll("svg text")];
  const smallest = Math.min(...figures.map((text) => text.getBoundingClientRect().height));
  document.title = `width ${{page.scrollWidth}} text ${{smallest.toFixed(1)}}`;
}};
</script>"""


def open_page(page: Path) -> tuple[str, list[str]]:
    """The document after loading, and what the browser wrote on its console."""
    assert BROWSER is not None
    result = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu"),
            *("--allow-file-access-from-files", "--enable-logging=stderr", "--log-level=0"),
            *(f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=5000"),
            *("--dump-dom", page.as_uri()),
        ],
        env={**os.environ, "DBUS_SESSION_BUS_ADDRESS": "/dev/null"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    console = [line for line in result.stderr.splitlines() if ":CONSOLE" in line]
    return result.stdout, console


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_run(folder, num_experts=3)
    return write_report(str(folder))


def test_the_page_opens_without_a_console_message(page: Path) -> None:
    document, console = open_page(page)
    assert document.count("<svg") == page.read_text().count("<svg")
    assert console == []


def test_a_console_message_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "broken.html").write_text("<script>undefinedName()</script>")
    assert "undefinedName is not defined" in open_page(tmp_path / "broken.html")[1][0]


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_fits_phone_tablet_and_desktop(page: Path, width: int) -> None:
    frame = page.with_name(f"frame{width}.html")
    frame.write_text(FRAME.format(page=page.name, width=width))
    document, console = open_page(frame)
    assert console == []
    found = re.search(r"<title>width (\d+) text ([\d.]+)</title>", document)
    assert found, document[:500]
    assert int(found[1]) <= width
    assert float(found[2]) >= 8  # pixels: the smallest text of a figure can be read
