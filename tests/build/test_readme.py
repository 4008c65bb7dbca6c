"""The Python snippets of README and docs run as they stand."""

import re
from pathlib import Path

import pytest

from tests.support.forked import python

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = {
    f"{page.stem}-{number}": snippet
    for page in PAGES
    for number, snippet in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL), 1)
    if page.stem not in ("hub", "perf_log")  # the export's test runs hub's
}


def test_there_are_snippets():
    assert len(SNIPPETS) >= 5


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet_runs(name, tmp_path):
    run = python("-c", SNIPPETS[name], cwd=tmp_path)
    assert run.returncode == 0, run.stderr


def test_readme_is_short_and_its_links_lead_somewhere():
    assert len(PAGES[0].read_text().splitlines()) <= 200
    for page in PAGES:
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
        assert not [link for link in links if not (page.parent / link).exists()], page
