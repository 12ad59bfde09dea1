"""The notebooks run from top to bottom, and the reference is made without a warning."""

import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "experiments" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_figures(path, tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    metadata = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=metadata).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_there_are_notebooks_and_none_is_large():
    assert len(NOTEBOOKS) >= 4
    assert max(path.stat().st_size for path in NOTEBOOKS) < 1_000_000


@pytest.mark.slow
def test_the_reference_is_made_without_a_warning(tmp_path):
    pytest.importorskip("pdoc")
    modules = ["jfed", "jfed.runs.study", "jfed.reports.tables"]
    command = [sys.executable, "-W", "error", "-m", "pdoc", "-d", "google", *modules]
    command += ["-o", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower()
    assert "The probabilities of each class" in (tmp_path / "jfed.html").read_text()
    assert (tmp_path / "jfed" / "runs" / "study.html").exists()
