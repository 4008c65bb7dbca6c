"""The Python snippets of README and docs run as they stand, their commands parse, and their links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from bench import cli as benchmarks
from fastgpt.cli_parser import make_parser
from tests.support.forked import python

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "tests" / "README.md")
}
SNIPPETS = {
    f"{page.removesuffix('.md')}-{number}": snippet
    for page, text in PAGES.items()
    for number, snippet in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL), 1)
    if page not in ("docs/hub.md", "docs/perf_log.md")  # the export's test runs hub's
}
PROGRAM = re.compile(r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?((?:fastgpt|make|python|torchrun) .*)")
COMMANDS = {
    f"{page.removesuffix('.md')}-{number}": match[1]
    for page, text in PAGES.items()
    if page != "CHANGELOG.md"
    for number, match in enumerate(
        (
            match
            for block in re.findall(r"^```(?:sh|bash)?\n(.*?)```", text, re.DOTALL | re.MULTILINE)
            for match in map(PROGRAM.fullmatch, block.splitlines())
            if match
        ),
        1,
    )
}


def test_there_are_snippets_and_commands():
    assert len(SNIPPETS) >= 17
    assert len(COMMANDS) >= 20


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet_runs(name, tmp_path):
    run = python("-c", SNIPPETS[name], cwd=tmp_path)
    assert run.returncode == 0, run.stderr


def parse(command):
    """Parse a command's options; raise AssertionError or SystemExit where it could not run."""
    program, *arguments = shlex.split(command, comments=True)
    if program == "torchrun":
        arguments = arguments[arguments.index("-m") :]
        program = "python"
    if program == "make":
        target = next(word for word in arguments if "=" not in word)
        assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "fastgpt" or arguments[:2] == ["-m", "fastgpt"]:
        make_parser().parse_args(arguments[2 * (program == "python") :])
    elif arguments[:2] == ["-m", "bench"]:
        benchmarks.parser().parse_args(arguments[2:])
    elif arguments[:2] == ["-m", "pytest"]:
        assert (ROOT / arguments[2]).is_file()
    elif arguments[0] == "-m":
        module = ROOT / arguments[1].replace(".", "/")
        assert module.is_dir() or module.with_suffix(".py").is_file()
    else:
        assert (ROOT / arguments[0]).is_file()


@pytest.mark.parametrize("name", COMMANDS)
def test_command_parses(name):
    try:
        parse(COMMANDS[name])
    except SystemExit as end:
        assert end.code == 0, COMMANDS[name]


@pytest.mark.parametrize(
    "command", ["make nothing", "fastgpt train --dropuot 1", "python -m bench nothing", "python nothing.py"]
)
def test_wrong_command_is_caught(command, capsys):
    with pytest.raises((AssertionError, SystemExit)):
        parse(command)


def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", PAGES[page])
    assert not [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
