"""The documentation site: its pages, links and formulas. `make docs` builds all of it, strictly."""

import importlib
import re
import runpy
from pathlib import Path

import pytest

import fastgpt
from tests.build.test_layering import PUBLIC

ROOT = Path(__file__).parents[2]
REPOSITORY = "https://github.com/fastgpt-kernels/fastgpt"


def documented():
    """Yield the names that the pages give to mkdocstrings: objects, and members of modules."""
    for folder in ("api", "ops"):
        for page in (ROOT / "docs" / folder).glob("*.md"):
            for block in page.read_text().split("\n::: ")[1:]:
                path = block.split()[0]
                yield path
                if members := re.search(r"^ +members: \[(.+)\]$", block, re.MULTILINE):
                    yield from (f"{path}.{member}" for member in members[1].split(", "))


DOCUMENTED = list(documented())


@pytest.fixture(scope="module")
def hooks():
    for package in ("mkdocs", "latex2mathml"):
        pytest.importorskip(package)
    return runpy.run_path(str(ROOT / "docs" / "hooks.py"))


@pytest.mark.parametrize(
    ("target", "source", "page", "expected"),
    [
        ("../fastgpt/x.py", "docs/design.md", "design.md", None),
        ("../fastgpt/ops/gelu.py", "docs/a.md", "a.md", f"{REPOSITORY}/blob/main/fastgpt/ops/gelu.py"),
        ("../../csrc/cpu", "docs/ops/gelu.md", "ops/gelu.md", f"{REPOSITORY}/tree/main/csrc/cpu"),
        ("../design.md", "docs/ops/gelu.md", "ops/gelu.md", "../design.md"),
        ("../../README.md", "docs/ops/gelu.md", "ops/gelu.md", "../index.md"),
        ("docs/ops/gelu.md", "README.md", "index.md", "ops/gelu.md"),
        ("LICENSE", "README.md", "index.md", f"{REPOSITORY}/blob/main/LICENSE"),
        ("nothing.md", "README.md", "index.md", None),
    ],
)
def test_link_leads_to_a_page_or_to_the_repository(hooks, target, source, page, expected):
    assert hooks["link"](target, source, page, REPOSITORY) == expected


def test_formulas_become_mathml(hooks):
    inline, block = r'<span class="arithmatex">\(a &lt; b\)</span>', r'<div class="arithmatex">\[x_1\]</div>'
    found = hooks["on_page_content"](f"<p>{inline}</p>\n{block}")
    assert found.count("<math") == found.count("</math>") == 2
    assert found.count('display="block"') == 1 and "arithmatex" not in found


def test_every_page_is_in_the_navigation(hooks):
    listed = re.findall(r"^ +- (?:\w+: )?(\S+\.md)", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert sorted(listed) == sorted({*pages, *hooks["PAGES"].values()})


def test_what_is_documented_exists():
    assert len(DOCUMENTED) > 50
    for path in DOCUMENTED:
        parent, _, name = path.rpartition(".")
        try:
            importlib.import_module(path)
        except ModuleNotFoundError:
            found = importlib.import_module(parent)
            assert hasattr(found, name), path


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_documented(module):
    found = {path.rpartition(".")[2] for path in DOCUMENTED}
    names = {*PUBLIC[module].split(), *(fastgpt.__all__ if module == "fastgpt" else [])}
    constants_and_modules = {"BACKENDS", "OPS", "functional", "ops"}
    assert not names - found - constants_and_modules
