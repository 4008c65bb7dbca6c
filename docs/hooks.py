"""Hooks of the documentation site (mkdocs.yml).

The pages are Markdown that reads on GitHub as well. These hooks do the rest: files of the repository's root become
pages, links to sources become links to the repository, and formulas become MathML, which needs no script.
"""

import html
import logging
import re
from pathlib import Path
from posixpath import dirname, normpath, relpath
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# Files outside of docs/ that are pages of the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security_policy.md",
}
BRANCH = "main"

FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r'(?P<before>\]\(|<img src=")(?P<path>[^)\s"#:]+)(?=[)#"])')
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)

log = logging.getLogger("mkdocs.hooks.fastgpt")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the repository's root and the plots that they show."""
    plots = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("bench/results/*/*.svg")}
    for source, page in (PAGES | {plot: plot for plot in plots}).items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def link(target: str, source: str, page: str, repository: str) -> str | None:
    """Rewrite one link.

    Args:
        target: the relative link.
        source: the file that it stands in, relative to the repository's root.
        page: the file's path in the site.
        repository: the address of the repository.

    Returns:
        The link as the site needs it; None if there is no such file.
    """
    path = normpath(f"{dirname(source)}/{target}".lstrip("/"))
    if not (ROOT / path).exists():
        return None
    if path.startswith("docs/") or path in PAGES or path.endswith(".svg"):
        return relpath(PAGES.get(path, path.removeprefix("docs/")), dirname(page) or ".")
    return f"{repository}/{'tree' if (ROOT / path).is_dir() else 'blob'}/{BRANCH}/{path}"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the relative links of a page, those in code blocks excepted."""
    source = Path(page.file.abs_src_path).relative_to(ROOT).as_posix()

    def rewrite(match: re.Match[str]) -> str:
        found = link(match["path"], source, page.file.src_uri, config.repo_url.rstrip("/"))
        if found is None:
            log.warning("%s links to %s, which does not exist", source, match["path"])
        return match["before"] + (found or match["path"])

    parts = FENCED.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(rewrite, part) for part in parts)


def on_page_content(content: str, **_: Any) -> str:
    """Convert the formulas of a page to MathML."""

    def mathml(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]).strip(), display=display)

    return FORMULA.sub(mathml, content)
