"""Both notebooks run from first to last cell, on the embedded model with small limits from the environment."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALL = {
    "quantized_inference": {"NOTEBOOK_METHODS": "none,nf4", "NOTEBOOK_FIDELITY": "nf4", "NOTEBOOK_TOKENS": "6"},
    "fine_tuning": {"NOTEBOOK_STEPS": "4"},
}
# What an executed notebook must have said.
SAID = {
    "quantized_inference": ["2 jobs: 2 ok", "<td>nf4</td><td>ok</td>", "--- nf4", "1 jobs: 1 ok"],
    "fine_tuning": ["3 jobs: 3 ok", "4 jobs: 4 ok", "adalora    exact match", "lokr       exact match", "> "],
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


def test_the_readme_has_a_badge_for_each():
    text = (ROOT / "README.md").read_text()
    for path in NOTEBOOKS:
        assert f"colab.research.google.com/github/OWNER/llm-at-home/blob/main/notebooks/{path.name}" in text


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    # A copy of the tree, so that its runs and its MLflow file are not the developer's.
    for name in ("conf", "src", "docs/tutorial", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("train.py", "infer.py", "evaluate.py"):
        shutil.copy(ROOT / name, tmp_path)
    settings = {"NOTEBOOK_LIMIT": "1", "PYTHONPATH": str(tmp_path / "src"), "CUDA_VISIBLE_DEVICES": ""}
    settings |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **SMALL[path.stem]}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(tmp_path / "notebooks" / path.name, as_version=4)
    where = {"metadata": {"path": str(tmp_path / "notebooks")}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    said = "".join(
        output.get("text", "") + output.get("data", {}).get("text/html", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )
    for expected in SAID[path.stem]:
        assert expected in said, said
