"""The notebooks run from top to bottom, each in a kernel of its own."""

import os

import pytest
from conftest import ROOT

nbformat = pytest.importorskip("nbformat", reason="notebooks need nbclient and ipykernel: pip install '.[test]'")
nbclient = pytest.importorskip("nbclient", reason="notebooks need nbclient and ipykernel: pip install '.[test]'")
pytest.importorskip("ipykernel", reason="notebooks need nbclient and ipykernel: pip install '.[test]'")

NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before you commit"
    place = {"metadata": {"path": str(path.parent)}}
    done = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    pictures = [cell for cell in done.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(pictures) >= 4


def test_notebooks_are_found():
    assert {path.stem for path in NOTEBOOKS} == {"train", "use"}
