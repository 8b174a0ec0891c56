"""Every notebook runs from top to bottom, as `make demo` runs it."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.single
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What the summary says, and how many pictures there are at least.
RESULTS = {
    "large_vocabulary": ("MB in blocks", 2),
    "many_probes": ("certified 100.0%", 3),
    "softmax_regression": ("held-out accuracy", 5),
}


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_writes_its_page(path: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    command = [sys.executable, "notebooks/execute.py", str(path), "--page", str(page)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    summary, pictures = RESULTS[path.stem]
    assert summary in run.stdout
    assert page.as_uri() in run.stdout
    html = page.read_text()
    assert html.count("data:image/png") >= pictures
    assert "<math" in html


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_the_outputs_of_one_clean_run_and_ends_in_an_assertion(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(output.get("data", {}).get("image/png") for c in cells for output in c.outputs)
    assert "assert " in cells[-1].source
