"""The notebooks: run from a clean kernel, with their assertions and their exercises' solutions.

Each runs where it lies, without a network beyond this machine. What is committed shows what it
prints; nothing on disk changes.
"""

import base64
import copy
import pathlib
import re

import nbclient
import nbformat
import pytest

DIRECTORY = pathlib.Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(DIRECTORY.glob("0*.ipynb"))
OFFLINE = """
import socket
def refuse(self, address, connect=socket.socket.connect):
    assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1"), address
    return connect(self, address)
socket.socket.connect = refuse
"""


def read(path):
    return nbformat.read(path, as_version=4)


def cells_of(path, kind):
    return [cell for cell in read(path).cells if cell.cell_type == kind]


def solutions_of(path):
    """The Python code of the folded solutions, one text each."""
    folded = re.findall(r"<details>.*?<summary>Solution</summary>(.*?)</details>",
                        "\n".join(cell.source for cell in cells_of(path, "markdown")), re.DOTALL)
    return ["\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)) for text in folded]


@pytest.fixture(params=NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def path(request):
    return request.param


def test_it_runs(path):
    """Every cell, then every solution, from a clean kernel; cells assert their key results."""
    before = path.read_bytes()
    notebook = copy.deepcopy(read(path))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(OFFLINE))
    notebook.cells += [nbformat.v4.new_code_cell(code) for code in solutions_of(path)]
    nbclient.NotebookClient(notebook, timeout=180, kernel_name="python3",
                            resources={"metadata": {"path": str(DIRECTORY)}}).execute()
    assert path.read_bytes() == before


def test_it_shows_what_it_prints(path):
    """Committed outputs come from one run in order, without errors, and hold pictures."""
    code = cells_of(path, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    data = [output.get("data", {}) for output in outputs]
    pictures = [shown["image/png"] for shown in data if "image/png" in shown]
    assert len(pictures) >= 3
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert "assert" in "".join(cell.source for cell in code)
    text = re.sub(r'"image/png": "[^"]*"', "", path.read_text("utf-8"))
    assert not re.findall(r"/(?:home|root|tmp)/", text)
    assert path.stat().st_size < 1.5e6


def test_exercises(path):
    """Three, each with a solution folded away that has code."""
    solutions = solutions_of(path)
    assert len(solutions) == 3 and all(solutions)


def test_they_share_one_style():
    """The second cell, which sets the figures' style, is the same in all of them."""
    assert len({read(path).cells[1].source for path in NOTEBOOKS}) == 1
