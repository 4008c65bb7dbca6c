"""The compiled libraries need nothing of PyTorch but its stable ABI; what is not theirs is refused by name."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastgpt
from fastgpt import extension

ROOT = Path(__file__).parents[2]
PACKAGE = Path(fastgpt.__file__).parent

needs_cpp = pytest.mark.skipif(not extension.loaded(), reason="the C++ kernels are not built")

# What a library may ask of others: PyTorch's stable ABI, the C and C++ libraries, the loader.
STABLE = re.compile(
    r"(aoti_torch_\w+|torch_\w+)$"  # of libtorch_cpu and libtorch_cuda
    r"|.*@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$"
    r"|_ZN[KRO]*St\w+$"  # members of std, which libtorch exports too, without a version
    r"|(__gmon_start__|_ITM_\w+)$"
)


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def undefined(library):
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    return [line.split()[-1] for line in run("nm", "-D", "--undefined-only", library).splitlines()]


def needed(library):
    return set(re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", library)))


@needs_cpp
@pytest.mark.parametrize("variant", extension.VARIANTS)
def test_cpu_library_asks_for_nothing_but_the_stable_abi(variant):
    """Or it would not load under another PyTorch than the one it was built with."""
    library = PACKAGE / f"_cpu_{variant}.so"
    if not library.exists():
        pytest.skip(f"{library.name} is not part of this build")
    symbols = undefined(library)
    assert "torch_parallel_for" in symbols and "aoti_torch_empty_strided" in symbols
    assert not [symbol for symbol in symbols if not STABLE.match(symbol)]
    assert not [symbol for symbol in symbols if re.match(r"_Z\w*(2at|3c10|5torch)", symbol)]
    found = needed(library)
    assert "libtorch_cpu.so" in found
    assert not [name for name in found if re.match(r"lib(torch_python|torch\.|c10|python|gomp|omp)", name)]


@needs_cpp
def test_build_info_module_links_nothing_of_pytorch():
    assert not [name for name in needed(PACKAGE / "_C.so") if "torch" in name or "c10" in name]
    assert not [name for name in undefined(PACKAGE / "_C.so") if "torch" in name or "c10" in name]


def test_cuda_library_asks_for_nothing_but_the_stable_abi():
    """Or it would not load under another PyTorch than the one it was built with."""
    library = extension.CUDA_LIBRARY
    if not library.exists():
        pytest.skip("the CUDA kernels are not built (setup.py build_ext --cuda)")
    assert extension.cuda_architectures() == tuple(extension.build_info()["cuda_architectures"])
    symbols, found = undefined(library), needed(library)
    assert "aoti_torch_get_current_cuda_stream" in symbols
    assert not [symbol for symbol in symbols if not STABLE.match(symbol)]
    assert {"libtorch_cpu.so", "libtorch_cuda.so", "libc10.so"} <= found
    assert not [name for name in found if name.startswith(("libcudart", "libpython"))]


# ---- files that are not this build's ----

REFUSED = {
    "half of it": (lambda whole: whole[: len(whole) // 2], r"it is not whole: \d+ of at least \d+ bytes"),
    "all but a byte": (lambda whole: whole[:-1], r"it is not whole: \d+ of at least \d+ bytes"),
    "a few bytes": (lambda whole: whole[:40], "it is not whole"),
    "nothing": (lambda whole: b"", "it is no 64-bit ELF library"),
    "text": (lambda whole: b"<html>404</html>" * 10, "it is no 64-bit ELF library"),
    "another program": (
        lambda whole: Path(extension.__file__).with_name("_C.so").read_bytes(),
        "it is of another program or of an older fastgpt",
    ),
    "another version": (
        lambda whole: re.sub(rb"(fastgpt kernels: \w+; version: )[^;]", rb"\g<1>9", whole),
        r"it is of fastgpt 9[\d.]+, not [\d.]+",
    ),
}


@needs_cpp
@pytest.mark.parametrize("what", REFUSED)
def test_library_that_is_not_of_this_build_is_refused_by_name(what, tmp_path, monkeypatch):
    change, reason = REFUSED[what]
    name = f"_cpu_{extension.variant()}.so"
    (tmp_path / name).write_bytes(change((PACKAGE / name).read_bytes()))
    monkeypatch.setattr(extension, "__file__", str(tmp_path / "extension.py"))
    variant, problem = extension._load.__wrapped__()
    assert variant is None
    assert re.match(rf"{re.escape(name)} is refused \({reason}\); rebuild with: pip install", problem), (
        problem
    )


@needs_cpp
def test_half_of_the_build_info_module_is_refused_by_name(tmp_path, monkeypatch):
    whole = (PACKAGE / "_C.so").read_bytes()
    (tmp_path / "_C.so").write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(extension, "__file__", str(tmp_path / "extension.py"))
    assert "_C.so is refused (it is not whole" in extension._load.__wrapped__()[1]


@needs_cpp
def test_lesser_library_serves_with_a_warning_where_the_best_is_refused(tmp_path):
    if extension.variant() == "plain":
        pytest.skip("there is no lesser library for this CPU")
    package = tmp_path / "fastgpt"
    shutil.copytree(PACKAGE, package, symlinks=False, ignore=shutil.ignore_patterns("__pycache__"))
    best = package / f"_cpu_{extension.variant()}.so"
    best.write_bytes(best.read_bytes()[:5000])
    code = "import fastgpt, torch; fastgpt.ops.gelu(torch.ones(3)); print(fastgpt.extension.variant())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() in extension.VARIANTS[extension.VARIANTS.index(extension.variant()) + 1 :]
    assert f"RuntimeWarning: fastgpt: {best.name} is refused (it is not whole" in done.stderr
