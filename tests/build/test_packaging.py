"""What a user installs: the wheel, the sdist, and importing without the optional packages."""

import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch

from fastgpt import extension

pytestmark = pytest.mark.xdist_group("packaging")  # whose fixtures are made once

ROOT = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(
    ".*", "build", "dist", "runs", "*.egg-info", "*.so", "__pycache__", "shared", "results", "node_modules"
)


def run(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist) of a copy of the checkout; without PyTorch in sight, so that nothing is compiled."""
    if find_spec("build") is None:
        pytest.skip("the package `build` is not installed")
    folder = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, folder / "copy", ignore=LEFT_OUT)
    (folder / "stub").mkdir()
    (folder / "stub" / "torch.py").write_text("raise ImportError('hidden')\n")
    env = os.environ | {"PYTHONPATH": str(folder / "stub")}
    run(
        [sys.executable, "-m", "build", "--no-isolation", "--sdist", "--wheel", "-o", "dist"],
        cwd=folder / "copy",
        env=env,
    )
    (wheel,) = (folder / "copy" / "dist").glob("*.whl")
    (sdist,) = (folder / "copy" / "dist").glob("*.tar.gz")
    return wheel, sdist


def test_wheel_holds_the_package_and_nothing_else(built):
    wheel = zipfile.ZipFile(built[0])
    names = set(wheel.namelist())
    wanted = {"fastgpt/py.typed"}
    for folder, package in (("fastgpt", "fastgpt"), ("kernels/triton", "fastgpt/kernels")):
        base = ROOT / folder
        paths = (path for path in base.rglob("*") if path.suffix in (".py", ".toml"))
        wanted |= {f"{package}/{path.relative_to(base).as_posix()}" for path in paths}
    assert {"fastgpt/ops/gelu.py", "fastgpt/reference/gelu.py", "fastgpt/kernels/gelu.py"} <= wanted
    assert "fastgpt/evaluation/tasks/templates/code.toml" in wanted
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_top_level_of_the_wheel_is_fastgpt_alone(built):
    """A top-level `kernels` would shadow the Hugging Face package of that name."""
    wheel = zipfile.ZipFile(built[0])
    (top_level,) = (name for name in wheel.namelist() if name.endswith("top_level.txt"))
    assert wheel.read(top_level).split() == [b"fastgpt"]


def test_sdist_holds_all_that_a_build_needs(built):
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    needed = {"setup.py", "pyproject.toml", "README.md", "LICENSE", "fastgpt/py.typed"}
    for folder in ("csrc", "kernels", "fastgpt"):
        paths = (
            p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".toml", ".cpp", ".h", ".cu", ".cuh")
        )
        needed |= {path.relative_to(ROOT).as_posix() for path in paths}
    assert not needed - names


def test_wheel_installs_and_runs_on_the_reference(built, tmp_path):
    """Elsewhere, without the checkout on the path and without compiled kernels."""
    target = tmp_path / "site"
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-index",
            "--target",
            target,
            built[0],
        ]
    )
    script = (
        "import torch, fastgpt\n"
        "x = torch.randn(3, 5)\n"
        "torch.testing.assert_close(fastgpt.functional.gelu(x), torch.nn.functional.gelu(x))\n"
        "assert fastgpt.explain(fastgpt.ops.gelu, x).backend == 'reference'\n"
        "print(fastgpt.__file__)\n"
        "print(fastgpt.available_backends('gelu')['cpp'].reason)\n"
    )
    env = os.environ | {"PYTHONPATH": str(target)}
    where, reason = run([sys.executable, "-c", script], cwd=tmp_path, env=env).splitlines()
    assert Path(where).is_relative_to(target)
    assert "no-build-isolation" in reason


@pytest.mark.skipif(not extension.loaded(), reason="the C++ kernels are not built")
def test_compiled_libraries_lie_where_the_loader_looks():
    folder = Path(extension.__file__).parent
    assert (folder / f"_cpu_{extension.variant()}.so").exists()
    assert list(folder.glob("_C*.so"))


def test_transformers_imports_from_the_root_of_the_checkout():
    """It looks for a package `kernels` at import, and must not take the folder here for it."""
    if find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    run([sys.executable, "-c", "import transformers; transformers.GPT2Config"], cwd=ROOT)


WITHOUT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"triton", "transformers"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import torch, fastgpt
from fastgpt.model import GPT, GPTConfig
model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=16))
_, loss = model(torch.randint(0, 11, (2, 8)), torch.randint(0, 11, (2, 8)))
loss.backward()
assert all(p.grad.isfinite().all() for p in model.parameters())
"""


def test_a_model_trains_without_triton_and_transformers():
    run([sys.executable, "-c", WITHOUT])


def test_importing_fastgpt_imports_nothing_optional_and_not_dynamo():
    """Dynamo takes longer to import than all of fastgpt, and imports Triton."""
    script = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import fastgpt\n"
        "new = set(sys.modules) - before\n"
        "lazy = {'triton', 'transformers', 'matplotlib', 'tokenizers', 'tqdm', 'safetensors', 'torch._dynamo'}\n"
        "print(*sorted(new & lazy))"
    )
    assert run([sys.executable, "-c", script]).split() == []


# ---- what a build lacks ----

BUILD = """
import importlib.machinery, importlib.metadata, sys
HIDDEN = {hidden!r}

class Hide(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else super().find_spec(name, path, target)

sys.meta_path = [Hide if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
sys.argv = ["setup.py", "--quiet", "build", "--build-base", {base!r}, *{more}]
exec(open("setup.py").read())
"""


def build_without(base, hidden=(), more=(), **env):
    """Run setup.py where some modules cannot be found."""
    code = BUILD.format(hidden=set(hidden), base=str(base), more=list(more))
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("hidden", [("pybind11",), ("ninja",), ("ninja", "pybind11")])
def test_build_without_a_package_ends_at_once_with_the_command_to_get_it(tmp_path, hidden):
    done = build_without(
        tmp_path, hidden, ["build_ext", "--variants="], PATH=str(compilers(tmp_path / "bin"))
    )
    names = " ".join(sorted(hidden, reverse=True))
    assert done.returncode == 1
    assert done.stdout.strip() == (f"fastgpt: the C++ kernels need {names} to be built: pip install {names}")


def compilers(folder):
    """A folder with the compiler and nothing else."""
    folder.mkdir()
    for name in ("c++", "g++"):
        if path := shutil.which(name):
            (folder / name).symlink_to(path)
    return folder


@pytest.mark.parametrize("compiler", ["/none/c++", "false"])
def test_build_without_a_compiler_is_pure_python_and_says_so(tmp_path, compiler):
    """Where there is none, and where the one that CXX names does not compile C++20."""
    done = build_without(tmp_path, CXX=compiler)
    assert done.returncode == 0, done.stdout
    said = [line for line in done.stdout.splitlines() if "fastgpt:" in line]
    assert len(said) == 1 and said[0].startswith(
        "fastgpt: building without compiled kernels: missing a C++20 compiler (apt install g++"
    )
    assert not list(tmp_path.rglob("*.so")) and list(tmp_path.rglob("env_report.py"))


@pytest.mark.parametrize("found", [(), ("ninja", "a C++20 compiler")])
def test_info_names_what_a_build_lacks_and_a_command_that_works(monkeypatch, found):
    from fastgpt import build_tools, env_report

    monkeypatch.setattr(build_tools, "missing", lambda **_: list(found))
    build_tools.rebuild_hint.cache_clear()
    try:
        hint = build_tools.rebuild_hint()
        monkeypatch.setattr(extension, "problem", lambda: f"off; build it with: {hint}")
        report = env_report.report()
    finally:
        build_tools.rebuild_hint.cache_clear()
    command = f"pip install --no-build-isolation -e {ROOT}"
    if found:
        assert (
            f"build it with: pip install ninja && {command}, after installing a C++20 compiler (apt" in report
        )
        assert "missing       ninja (pip install ninja)" in report
        assert "missing       a C++20 compiler (apt install g++" in report
    else:
        assert f"build it with: {command}\n" in report and "missing  " not in report


def test_repair_of_an_installed_package_names_its_distribution(built, tmp_path, monkeypatch):
    from fastgpt import build_tools

    target = tmp_path / "site"
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-index",
            "--target",
            target,
            built[0],
        ]
    )
    monkeypatch.setattr(build_tools, "ROOT", target)
    command = build_tools.rebuild_hint.__wrapped__()
    (info,) = target.glob("*.dist-info")
    name = info.name.split("-")[0]
    pattern = (
        r"pip install --no-build-isolation --no-cache-dir --no-deps --force-reinstall (\S+?)(, after .*)?$"
    )
    assert re.search(pattern, command)[1].replace("-", "_") == name  # not the wheel, which has no kernels
    source = {"url": "https://host/fastgpt", "vcs_info": {"vcs": "git", "commit_id": "0"}}
    (info / "direct_url.json").write_text(json.dumps(source))
    assert re.search(pattern, build_tools.rebuild_hint.__wrapped__())[1] == "git+https://host/fastgpt"


# ---- building the CUDA kernels ----


@pytest.fixture
def setup_py(monkeypatch):
    """What setup.py defines."""
    monkeypatch.chdir(ROOT)
    with mock.patch("setuptools.setup"):
        return runpy.run_path("setup.py")


@pytest.fixture
def nvcc(tmp_path):
    """A compiler that knows compute_75 to compute_100."""
    path = tmp_path / "nvcc"
    path.write_text("#!/bin/sh\nfor n in 75 80 86 90 100; do echo compute_$n; done\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("asked", "names", "said"),
    [
        ("", "sm_80 sm_90a sm_100a compute_90", "no CUDA kernels for sm_120, which this nvcc does not know"),
        ("All", "sm_80 sm_90a sm_100a compute_90", ""),
        (
            "Ampere;Hopper",
            "sm_80 sm_86 sm_90 compute_90",
            "no CUDA kernels for compute_86: they need 8.0, as PTX 9.0",
        ),
        ("Turing+PTX Blackwell", "sm_100", "no CUDA kernels for sm_75: they need 8.0, as PTX 9.0"),
        ("Ada", "", "no CUDA kernels for sm_89, which this nvcc does not know"),
        (
            "Zen;8.0",
            "sm_80",
            "no CUDA kernels for 'Zen', which is no architecture; write 8.0, 9.0a or 9.0+PTX",
        ),
        ("7.5", "", "no CUDA kernels for sm_75: they need 8.0"),
        ("8.0;9.0a", "sm_80 sm_90a", ""),
        ("9.0a, 8.0 8.0", "sm_90a sm_80", ""),
        ("9.0+PTX", "sm_90 compute_90", ""),
        ("7.5 8.6 9.0 12.0+PTX", "sm_86 sm_90", "no CUDA kernels for sm_75: they need 8.0"),
        ("8.0+PTX", "sm_80", "no CUDA kernels for compute_80: they need 8.0, as PTX 9.0"),
        ("8.0 12.0", "sm_80", "no CUDA kernels for sm_120, which this nvcc does not know"),
    ],
)
def test_architectures_asked_for(setup_py, nvcc, capsys, asked, names, said):
    assert setup_py["cuda_architectures"](asked, nvcc) == names.split()
    assert said in capsys.readouterr().out


def test_best_variant_is_the_one_that_is_loaded(setup_py):
    best = setup_py["best_variant"]
    assert best({}) == "plain"
    if platform.machine() == "x86_64":
        from fastgpt import _C

        assert best(torch.cpu.get_capabilities()) == _C.cpu_variants()[-1]
        avx2 = dict.fromkeys(("avx2", "fma3", "f16c", "bmi2"), True)
        assert best(avx2) == best(avx2 | {"avx512_f": True, "avx512_bf16": True}) == "avx2"


def test_names_of_architectures_are_those_of_pytorch(setup_py):
    source = Path(find_spec("torch.utils.cpp_extension").origin).read_text()
    theirs = set(re.findall(r"\('([A-Z][a-z]\w*(?:\+Tegra)?)', '[\d.;+PTX]+'\)", source))
    assert "Hopper" in theirs
    assert theirs <= set(setup_py["NAMED_ARCHITECTURES"])


@pytest.mark.parametrize("asked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_failed_cuda_build_ends_the_build_only_where_it_was_asked_for(tmp_path, asked):
    """An nvcc that fails; the CPU's libraries are left out to save time."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        "#!/bin/sh\ncase $1 in --list-gpu-arch) echo compute_80 compute_90;; --version) echo release 13.0,;;\n"
        "*) echo no such header >&2; exit 1;; esac\n"
    )
    nvcc.chmod(0o755)
    script = "import sys, torch; torch.version.cuda = '13.0'; sys.argv[0] = 'setup.py'; exec(open('setup.py').read())"
    command = ["build", "--build-base", tmp_path / "build", "build_ext", "--variants", ""]
    done = subprocess.run(
        [sys.executable, "-c", script, *command, *(["--cuda"] if asked else [])],
        cwd=ROOT,
        env=os.environ | {"CUDA_HOME": str(tmp_path), "TORCH_CUDA_ARCH_LIST": "8.0"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert "no such header" in said
    assert (done.returncode != 0) is asked, said
    assert ("warning: the CUDA kernels could not be built" in said) is not asked
    assert any((tmp_path / "build").rglob("_C.so"))


def test_cuda_library_has_its_architectures_and_needs_pytorch_by_name(setup_py, tmp_path, monkeypatch):
    """Of a source of one kernel; all of them take minutes (`setup.py build_ext --cuda`)."""
    nvcc = setup_py["find_nvcc"]()
    if nvcc is None or shutil.which("readelf") is None:
        pytest.skip("nvcc or readelf is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAX_JOBS", "1")
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    source = 'extern "C" __attribute__((visibility("default"))) int one() { return 1; }\n__global__ void kernel() {}\n'
    (tmp_path / "csrc" / "cuda" / "one.cu").write_text(source)
    library = tmp_path / "lib" / "_cuda.so"
    torch_folder = Path(find_spec("torch").origin).parent
    setup_py["build_cuda"](library, Path("temp"), nvcc, ["sm_80", "compute_90"], torch_folder)
    monkeypatch.setattr(extension, "CUDA_LIBRARY", library)
    assert extension.cuda_architectures() == ("sm_80", "compute_90")
    assert ".".join(map(str, extension.cuda_toolkit())) == setup_py["toolkit_version"](nvcc)
    needed = run(["readelf", "-d", library])
    assert all(f"[{name}.so]" in needed for name in ("libtorch_cpu", "libtorch_cuda", "libc10"))
    assert "libcudart" not in needed
