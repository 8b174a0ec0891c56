"""The README's snippets do what they say."""

import re
from pathlib import Path

import jax
import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```\n+(?:```text\n(.*?)```)?", README, re.DOTALL)


@pytest.mark.single
@pytest.mark.slow
def test_the_snippets_print_what_stands_below_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert SNIPPETS
    names = {"__name__": "__main__"}  # a reader runs one after the other
    with jax.numpy_dtype_promotion("standard"):
        for code, expected in SNIPPETS:
            exec(compile(code, "README.md", "exec"), names)
            assert capsys.readouterr().out == expected
