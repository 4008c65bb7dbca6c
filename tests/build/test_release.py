"""What a release depends on: one version, workflows that are pinned and complete, and the scripts that they call.

`make lint` checks the workflows, the issue forms and CITATION.cff against their schemas.
"""

import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fastgpt

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")
}
JOBS = {
    f"{name}-{job}": body for name, workflow in WORKFLOWS.items() for job, body in workflow["jobs"].items()
}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def steps(job, key):
    """The values that the steps of a job have for a key, "uses" or "run"."""
    return [step[key] for step in job["steps"] if key in step]


def test_version_stands_in_one_place_and_is_cited():
    versions = runpy.run_path(str(ROOT / ".ci/check_tag"))["versions"]()
    assert versions["fastgpt/__init__.py"] == versions["CITATION.cff"] == fastgpt.__version__
    assert "version" not in PYPROJECT["project"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "fastgpt.__version__"}


def test_changelog_has_a_section_of_the_version_below_what_is_unreleased():
    sections = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert next(section for section in sections if section != "Unreleased") == fastgpt.__version__
    assert "Unreleased" not in sections[1:]


@pytest.mark.parametrize(
    ("tag", "wrong"),
    [
        ("v1.2.3", ""),
        ("v1.2.4", "fastgpt/__init__.py"),
        ("1.2.3", "CITATION.cff"),
        ("v1.2.3rc1", "CHANGELOG.md"),
    ],
)
def test_tag_must_be_the_version(tmp_path, tag, wrong):
    for folder in (".ci", "fastgpt"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / ".ci/check_tag", tmp_path / ".ci")
    (tmp_path / "fastgpt/__init__.py").write_text('"""Doc."""\n\n__version__ = "1.2.3"\n')
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.2.3\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.3 (2026-01-01)\n\n## 1.2.2\n")
    done = subprocess.run(
        [sys.executable, tmp_path / ".ci/check_tag", tag], capture_output=True, text=True, check=False
    )
    assert (done.returncode != 0) is bool(wrong) and wrong in done.stderr


def test_changes_without_a_release_cannot_be_tagged(tmp_path):
    """A version that is tagged while CHANGELOG.md still says Unreleased."""
    versions = runpy.run_path(str(ROOT / ".ci/check_tag"))["versions"]
    for name, text in (
        ("fastgpt/__init__.py", '__version__ = "1.2.3"\n'),
        ("CITATION.cff", "version: 1.2.3\n"),
        ("CHANGELOG.md", "## Unreleased\n\n## 1.2.3\n"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert versions(tmp_path)["CHANGELOG.md"] == "Unreleased"


@pytest.mark.parametrize("name", JOBS)
def test_job_is_pinned_and_bounded(name):
    job = JOBS[name]
    assert job["timeout-minutes"] <= 120
    assert not [
        action for action in steps(job, "uses") if not re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", action)
    ]
    assert all("${{" not in command for command in steps(job, "run")), "pass values as environment variables"
    scripts = [script for command in steps(job, "run") for script in re.findall(r"\.ci/\w+", command)]
    assert not [script for script in scripts if not (ROOT / script).stat().st_mode & 0o100]
    targets = [target for command in steps(job, "run") for target in re.findall(r"\bmake (\S+)", command)]
    assert not [target for target in targets if f"\n{target}:" not in (ROOT / "Makefile").read_text()]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow_may_only_read_unless_a_job_says_more(name):
    assert WORKFLOWS[name]["permissions"] == {"contents": "read"}


def test_one_commit_of_each_action():
    uses = {action for job in JOBS.values() for action in steps(job, "uses")}
    assert len(uses) == len({action.partition("@")[0] for action in uses})


def test_ci_runs_what_the_checkout_does():
    assert steps(JOBS["ci-run"], "run") == [".ci/run"]
    assert "make docs" in steps(JOBS["docs-build"], "run")


def test_oldest_and_newest_pytorch_are_tested():
    (oldest,) = (
        re.fullmatch(r"torch>=(.+)", d)[1] for d in PYPROJECT["project"]["dependencies"] if "torch" in d
    )
    for name in ("ci-pytorch", "release-test"):
        assert JOBS[name]["strategy"]["matrix"]["torch"] == [f"torch=={oldest}.0", "torch"]


def test_nothing_is_published_that_was_not_tested():
    publish = JOBS["release-publish"]
    assert publish["needs"] == ["sdist", "test"] and publish["if"] == "github.event_name == 'push'"
    assert publish["environment"]["name"] == "pypi" and publish["permissions"] == {"id-token": "write"}
    assert JOBS["release-test"]["needs"] == "wheels"
    assert {JOBS[f"release-{job}"]["needs"] for job in ("wheels", "sdist")} == {"version"}
    architectures = [row["arch"] for row in JOBS["release-wheels"]["strategy"]["matrix"]["include"]]
    assert JOBS["release-test"]["strategy"]["matrix"]["arch"] == architectures == ["x86_64", "aarch64"]


def test_name_of_the_distribution_is_the_same_everywhere():
    name = PYPROJECT["project"]["name"]
    assert JOBS["release-publish"]["environment"]["url"] == f"https://pypi.org/p/{name}"
    for file in (".ci/test_wheel", ".ci/lock", "CONTRIBUTING.md"):
        assert name in (ROOT / file).read_text()


def test_addresses_of_the_project_agree():
    urls = PYPROJECT["project"]["urls"]
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert urls["Repository"] == site["repo_url"] == citation["repository-code"]
    assert urls["Documentation"] == site["site_url"] == citation["url"]
    assert set(urls) == {"Homepage", "Documentation", "Repository", "Issues", "Changelog"}
