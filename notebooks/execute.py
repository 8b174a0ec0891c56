"""Run a notebook from top to bottom and print what its cells tagged "summary" say.

    python notebooks/execute.py notebooks/softmax_regression.ipynb --page build/page.html

An error in a cell ends it. `--page` also writes the result as a page with its pictures, and
`--save` stores the outputs in the notebook itself.
"""

import argparse
import copy
import os
import re
import time
from pathlib import Path
from typing import Any

os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # this environment's kernel before the user's own

import latex2mathml.converter
import nbclient
import nbconvert
import nbformat


def execute(path: Path) -> Any:
    """The notebook with the outputs of one clean run."""
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=40"],
    )
    client.execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def summary(notebook: Any) -> str:
    """The printed text of the cells tagged "summary"."""
    return "".join(
        output.text
        for cell in notebook.cells
        if "summary" in cell.metadata.get("tags", ())
        for output in cell.outputs
        if output.output_type == "stream"
    )


def page(notebook: Any) -> str:
    """The notebook as one HTML page that needs no network: formulas become MathML."""

    def mathml(match: re.Match[str]) -> str:
        display = "block" if match[1] == "$$" else "inline"
        return str(latex2mathml.converter.convert(match[2], display=display))

    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"(\$\$?)(.+?)\1", mathml, cell.source, flags=re.DOTALL)
    return str(nbconvert.HTMLExporter().from_notebook_node(notebook)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--page", type=Path, help="write an HTML page to this path")
    parser.add_argument("--save", action="store_true", help="store the outputs in the notebook")
    arguments = parser.parse_args()
    print(f"Running {arguments.notebook} ...", flush=True)
    start = time.perf_counter()
    notebook = execute(arguments.notebook)
    seconds = time.perf_counter() - start
    print(summary(notebook), end="")
    print(f"The whole notebook took {seconds:.0f} s.")
    if arguments.page:
        arguments.page.parent.mkdir(parents=True, exist_ok=True)
        arguments.page.write_text(page(notebook))
        print(f"The page with the pictures: {arguments.page.resolve().as_uri()}")
    if arguments.save:
        nbformat.write(notebook, arguments.notebook)


if __name__ == "__main__":
    main()
