"""The notebooks: run from a clean kernel, with their assertions and their exercises' solutions.

Each runs without a network beyond this machine. What is committed shows what it
prints; nothing on disk changes.
"""

import base64
import copy
import itertools
import pathlib
import re

import nbclient
import nbformat
import pytest

DIRECTORY = pathlib.Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(DIRECTORY.glob("[0-9]*.ipynb"))
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
    """By exercise ("1.2"): the Python code of its folded solution, which sets `answer`."""
    text = "\n".join(cell.source for cell in cells_of(path, "markdown"))
    solutions = {}
    for part in re.split(r"^### Exercise ", text, flags=re.MULTILINE)[1:]:
        folded = dict(re.findall(
            r"<details><summary>(\w+)</summary>(.*?)</details>", part, re.DOTALL))
        assert set(folded) == {"Hint", "Solution"}, part[:80]
        code = re.findall(r"```python\n(.*?)```", folded["Solution"], re.DOTALL)
        solutions[part.split()[0]] = "\n".join(code)
    return solutions


def text_of(cell):
    """What a code cell has printed or shown as text."""
    outputs = cell.get("outputs", [])
    return "".join(output.get("text", "") + output.get("data", {}).get("text/markdown", "")
                   for output in outputs)


@pytest.fixture(params=NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def path(request):
    return request.param


def test_it_runs(path):
    """Every cell, then every solution, which its judge calls right; cells assert their claims.

    It starts in a directory from which only the first cell's search finds the modules. Functions
    that it prints are committed as they are now.
    """
    before = path.read_bytes()
    notebook = copy.deepcopy(read(path))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(OFFLINE))
    notebook.cells += [
        nbformat.v4.new_code_cell(
            f"answer = None\n{code}\nassert course.check({exercise!r}, answer)")
        for exercise, code in solutions_of(path).items()]
    client = nbclient.NotebookClient(notebook, timeout=180, kernel_name="python3",
                                     resources={"metadata": {"path": str(DIRECTORY / "presets")}})
    # nbclient 0.11.0 plays the browser for sliders, and sends their pictures to the kernel: with
    # more than 64 kB it waits now and then for ever. Without, pictures are outputs as all others.
    client.comm_open_handlers = {"jupyter.widget": lambda message: None}
    client.execute()
    assert path.read_bytes() == before
    for committed, executed in zip(read(path).cells, notebook.cells[1:], strict=False):
        if re.search(r"^ *def ", text_of(committed), re.MULTILINE):
            assert text_of(committed) == text_of(executed)


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
    """Three or more, each with a solution folded away, and a cell that checks the answer."""
    code = "\n".join(cell.source for cell in cells_of(path, "code"))
    checked = re.findall(r'^course\.check\("(\d+\.\d)", answer\);$', code, re.MULTILINE)
    solutions = solutions_of(path)
    assert checked == list(solutions) and len(checked) >= 3 and all(solutions.values())
    assert {name.split(".")[0] for name in checked} == {str(int(path.stem[:2]))}


def test_they_begin_alike_and_lead_on():
    """The first code cell is the same in all, the map follows; each leads to the next by a link."""
    assert len({cells_of(path, "code")[0].source for path in NOTEBOOKS}) == 1
    assert all("course.you_are_here(" in cells_of(path, "code")[1].source for path in NOTEBOOKS)
    for path, following in itertools.pairwise(NOTEBOOKS):
        assert f"]({following.name})" in read(path).cells[-1].source


def test_links_lead_somewhere(path):
    """Every link to a file names one that is there; the start page has all notebooks."""
    text = "\n".join(cell.source for cell in cells_of(path, "markdown"))
    links = set(re.findall(r"\]\(([^):#]+)\)", text))
    assert not [link for link in links if not (DIRECTORY / link).exists()]
    if path == NOTEBOOKS[0]:
        assert {other.name for other in NOTEBOOKS[1:]} <= links
