"""The README's snippets run as they stand."""

import re
from pathlib import Path

import pytest

from tests.support.forked import python

README = (Path(__file__).parents[2] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_snippets():
    assert len(SNIPPETS) >= 3


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet_runs(snippet, tmp_path):
    run = python("-c", snippet, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
