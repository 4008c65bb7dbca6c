"""The tables that choose tests: paths to tests, and mutations to plant."""

import fnmatch
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import affected, mutations

ROOT = Path(__file__).parents[2]
FILES = [
    p.relative_to(ROOT).as_posix()
    for d in ("csrc", "kernels", "fastgpt", "bench", "examples")
    for p in (ROOT / d).rglob("*")
]

ALL = [*FILES, "tests/simt/machine.h", "setup.py", "pyproject.toml"]


@pytest.mark.parametrize("row", affected.TABLE, ids=lambda row: row[0])
def test_row_of_the_table_names_files_and_tests_that_exist(row):
    pattern, names, _ = row
    assert fnmatch.filter(ALL, pattern)
    assert not [name for name in names.split() if not (ROOT / affected.file_of(name)).exists()]


def test_every_source_has_tests():
    kinds = (".py", ".cpp", ".h", ".cu", ".cuh")
    assert not [f for f in FILES if f.endswith(kinds) and not affected.tests_of(f)[0]]


def test_every_kernel_is_compiled_and_copied_when_it_changes():
    """Ahead of time, for every configuration, and for the Hub's repository."""
    for file in fnmatch.filter(FILES, "kernels/triton/*.py"):
        assert {"tests/build/test_triton_compile.py", "tests/build/test_hub.py"} <= set(
            affected.tests_of(file)[0]
        ), file
    for file in fnmatch.filter(FILES, "csrc/cuda/*.cu*"):
        assert "tests/build/test_cuda_compile.py" in affected.tests_of(file)[0], file


def test_first_row_that_fits_is_taken():
    files, keywords = affected.tests_of("csrc/cpu/gelu.cpp")
    assert (
        "tests/ops/test_geglu.py" in files
        and "tests/ops/test_attention.py" not in files
        and "not triton" in keywords
    )
    assert (
        "tests/integrations/test_accelerate_torch.py"
        in affected.tests_of("fastgpt/integrations/torch_modules.py")[0]
    )
    assert affected.tests_of("LICENSE") == ([], "")


def test_every_row_of_the_table_is_the_first_for_some_file():
    first = {
        next(p for p, *_ in affected.TABLE if fnmatch.fnmatch(f, p)) for f in ALL if affected.tests_of(f)[0]
    }
    assert first == {pattern for pattern, *_ in affected.TABLE}


def git(folder, *arguments, date="2026-01-01T00:00:00Z"):
    options = ["-c", "user.name=a", "-c", "user.email=a@b"]
    env = {"GIT_COMMITTER_DATE": date, "GIT_AUTHOR_DATE": date, "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    subprocess.run(["git", *options, *arguments], cwd=folder, env=env, check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_change_without_a_base_is_that_of_the_last_hours(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(affected, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["affected.py"])
    git(tmp_path, "init", "-b", "main")
    for day, name in ((1, "fastgpt/old.py"), (8, "csrc/cpu/gelu.cpp"), (8, "setup.py")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "-m", name, date=f"2026-01-0{day}T00:00:00Z")
        if day == 1:
            assert affected.main() == 0
            out, err = capsys.readouterr()
            assert out == "" and "too short to tell" in err
    (tmp_path / "bench" / "codegen").mkdir(parents=True)
    (tmp_path / "bench" / "codegen" / "tune.py").touch()  # not committed
    assert affected.main() == 0
    tests = capsys.readouterr().out.split()
    assert {"tests/ops/test_gelu.py", "tests/build/test_packaging.py", "tests/bench/test_tune.py"} <= set(
        tests
    )
    assert "tests/training/test_train.py" not in tests


def test_tests_are_collected_without_pytest_xdist():
    """As on a GPU machine with a PyTorch and pytest of its own."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:xdist",
        "--collect-only",
        "tests/generation/test_generate.py",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_mutations_fit_the_sources():
    names = [name for name, *_ in mutations.MUTATIONS]
    assert len(names) == len(set(names)) >= 60
    for name, file, old, new in mutations.MUTATIONS:
        assert (ROOT / file).read_text().count(old) == 1 and old != new and "\n" not in old + new, name
        assert affected.tests_of(file)[0], name
