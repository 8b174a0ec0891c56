"""What importing the package brings, and what it does not."""

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jaxsoftmax

pytestmark = pytest.mark.single

ROOT = Path(__file__).parent.parent
OPTIONAL = [
    "sklearn",
    "matplotlib",
    "tqdm",
    "scipy.optimize",
    "pandas",
    "polars",
    "pyarrow",
    "safetensors",
]


def test_the_import_brings_no_optional_dependency() -> None:
    code = (
        "import sys, jaxsoftmax, jaxsoftmax.training;"
        f"print([name for name in {OPTIONAL} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_public_name_is_there_and_has_a_docstring() -> None:
    assert sorted(jaxsoftmax.__all__) == jaxsoftmax.__all__
    for name in jaxsoftmax.__all__:
        assert getattr(jaxsoftmax, name).__doc__


@pytest.mark.parametrize(("progress", "fails"), [("None", False), ("True", True)])
def test_without_tqdm_a_progress_bar_is_an_error_where_it_is_wanted(
    progress: str, fails: bool
) -> None:
    code = (
        "import sys; sys.modules['tqdm'] = None\n"
        "import jax, numpy as np, optax\n"
        "from jaxsoftmax import training\n"
        "optimizer = optax.sgd(0.1)\n"
        "state = training.init(1, 2, optimizer=optimizer)\n"
        "training.train(state, np.ones((2, 1)), np.array([0, 1]), optimizer=optimizer,\n"
        f"               key=jax.random.key(0), epochs=1, batch_size=2, progress={progress})\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == int(fails)
    said = "pip install 'jaxsoftmax[train]', or pass progress=False" in run.stderr
    assert said == fails


def test_types_and_version_are_shipped() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (Path(jaxsoftmax.__file__).parent / "py.typed").exists()
    assert importlib.metadata.version("jaxsoftmax") == project["version"]
