# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from top to bottom, and show what they say."""

import base64
import io
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

from tests.helpers import ROOT

FOLDER = ROOT / "docs" / "notebooks"
# The first cell of a quick execution: the network of other whole runs here, see `tiny_experts`, and
# pages without drawings.
QUICK = """from balpoe_jax.experiment import build
from balpoe_jax.reporting import figures
from tests.helpers import tiny_network

build.create_model = tiny_network.create_model
figures._svg = lambda figure, name: '<svg></svg>'"""
NAMES = ["balpoe_in_two_minutes", "your_own_folder"]

pytestmark = pytest.mark.integration


def read(name: str) -> NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(book: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in book.cells if cell.cell_type == "code"]


def run(book: NotebookNode, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Executes all cells in a folder, and raises what a cell raises."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the checkout need not be installed
    metadata = {"metadata": {"path": str(folder)}}
    NotebookClient(book, timeout=900, kernel_name="python3", resources=metadata).execute()


def pictures(book: NotebookNode) -> list[int]:
    """The number of pictures of each cell; none is empty."""
    found = []
    for cell in code_cells(book):
        pngs = [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
        for png in pngs:
            image = Image.open(io.BytesIO(base64.b64decode(png))).convert("L")
            assert len(image.getcolors()) > 10
        found.append(len(pngs))
    return found


def text(book: NotebookNode) -> str:
    return "".join(o.text for cell in code_cells(book) for o in cell.outputs if "text" in o)


def test_the_notebooks_are_these() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_is_shown_is_of_one_execution_from_the_top(name: str) -> None:
    book = read(name)
    cells = code_cells(book)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(pictures(book)) >= 2
    kinds = {(o.output_type, o.get("name")) for cell in cells for o in cell.outputs}
    assert kinds == {("stream", "stdout"), ("display_data", None)}


@pytest.mark.slow_cases("balpoe_in_two_minutes")
@pytest.mark.parametrize("name", NAMES)
def test_all_cells_run_with_little_training(name: str, tmp_path: Path, monkeypatch) -> None:
    book, shown = read(name), pictures(read(name))
    [cell] = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ())]
    cell.source, replaced = re.subn(r"EPOCHS = \d+", "EPOCHS = 1", cell.source)
    assert replaced == 1
    book.cells.insert(0, nbformat.v4.new_code_cell(QUICK))
    run(book, tmp_path, monkeypatch)
    assert pictures(book)[1:] == shown


@pytest.mark.slow
def test_digits_are_learnt_and_calibrated(tmp_path: Path, monkeypatch) -> None:
    book = read("balpoe_in_two_minutes")
    run(book, tmp_path, monkeypatch)
    [accuracy] = re.findall(
        r"^ensemble +([\d.]+).* ([\d.]+) +[\d.]+\n\nCalibration", text(book), re.M
    )
    assert float(accuracy[0]) > 90
