"""Benchmarks are run by hand; here they are imported, so that what they call is still there."""

import runpy
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).resolve().parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_finds_what_it_imports(path, monkeypatch):
    monkeypatch.syspath_prepend(path.parent)  # as for a script: they import from each other
    try:
        assert callable(runpy.run_path(str(path), run_name="imported")["main"])
    except ImportError as error:
        if str(error.name or "flowsr").split(".")[0] == "flowsr":
            raise
        pytest.skip(f"needs {error.name}")
