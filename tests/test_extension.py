"""The compiled libraries: one per instruction set, each right, none with instructions of another."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastgpt
from fastgpt import extension

ROOT = Path(__file__).parent.parent
PACKAGE = Path(fastgpt.__file__).parent

pytestmark = pytest.mark.skipif(not extension.loaded(), reason="the C++ kernels are not built")

# ATEN_CPU_CAPABILITY and the variants it allows, the best first.
CAPS = {"default": ("plain",), "avx2": ("avx2", "plain"), "avx512": extension.VARIANTS}

EVERY_OP = """
import sys
sys.path.insert(0, "tests")
import torch, fastgpt
import every_op
from dropin import NAMES, check_same, example, leaf
from fastgpt import extension
from fastgpt.testing import check_error_rule
torch.set_num_threads(2)
with fastgpt.use_backend("cpp"):
    for name in NAMES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            arguments, options = example(name, dtype)
            check_same(name, *arguments, **options)
    # Longer than a vector and a tile, with tails.
    check_same("gelu", leaf(7, 67))
    check_same("layer_norm", leaf(5, 131), [131], leaf(131), leaf(131))
    check_same("cross_entropy", leaf(5, 1031), torch.arange(5), reduction="none")
    check_same("linear_cross_entropy", leaf(70, 67), leaf(131, 67), torch.arange(70), reduction="none")
    for dtype in (torch.float32, torch.bfloat16):
        check_same("scaled_dot_product_attention", *(leaf(1, 2, 131, 67, dtype=dtype) for _ in "qkv"), is_causal=True)
    for name in every_op.NAMES:
        check_error_rule(*every_op.case(name, torch.float32))
        if not name.startswith("attention"):  # in 16 bits rows that see few keys have a rounding more
            check_error_rule(*every_op.case(name, torch.bfloat16))
loaded = {line.split("/")[-1].strip() for line in open("/proc/self/maps") if "_cpu_" in line}
print(extension.variant(), *loaded)
"""


@pytest.mark.parametrize("cap", CAPS)
def test_every_op_is_right_on_the_variant_and_no_other_is_loaded(cap):
    from fastgpt import _C

    best = next(v for v in CAPS[cap] if v in _C.cpu_variants() and (PACKAGE / f"_cpu_{v}.so").exists())
    env = os.environ | {"ATEN_CPU_CAPABILITY": cap}
    done = subprocess.run(
        [sys.executable, "-c", EVERY_OP], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [best, f"_cpu_{best}.so"]


def test_every_variant_in_the_build_is_there():
    """A variant that this CPU cannot run is built all the same."""
    named = extension.build_info()["variants"].split()
    assert set(named) <= set(extension.VARIANTS)
    assert "plain" in named
    assert {path.name for path in PACKAGE.glob("_cpu_*.so")} == {f"_cpu_{name}.so" for name in named}


# Instructions (and registers) that a CPU of the variant's kind does not have.
FORBIDDEN = {
    "plain": r"%[yz]mm\d|\bv(fmadd|cvtph2ps|add[ps]s)",
    "avx2": r"%zmm\d|%k[1-7]\b|\{z\}|vdpbf16ps|vcvtne2?ps2?bf16",
    "avx512": r"vdpbf16ps|vcvtne2?ps2?bf16",
}


@pytest.mark.parametrize("variant", FORBIDDEN)
def test_library_holds_no_instruction_of_a_better_variant(variant):
    library = PACKAGE / f"_cpu_{variant}.so"
    if shutil.which("objdump") is None:
        pytest.skip("objdump (binutils) is not installed")
    if not library.exists():
        pytest.skip(f"{library.name} is not part of this build")
    code = subprocess.run(["objdump", "-d", library], capture_output=True, text=True, check=True).stdout
    assert code.count("\n") > 1000
    found = [line for line in code.splitlines() if re.search(FORBIDDEN[variant], line)]
    assert not found, f"{len(found)} lines, such as {found[0]}"


@pytest.mark.parametrize(
    ("variant", "own"),
    [("avx2", r"%ymm\d"), ("avx512", r"%zmm\d"), ("avx512_bf16", r"%zmm\d")],
)
def test_library_does_use_its_own_instructions(variant, own):
    """Or the variants would all be the plain one, and the test above would pass for nothing."""
    library = PACKAGE / f"_cpu_{variant}.so"
    if shutil.which("objdump") is None or not library.exists():
        pytest.skip(f"objdump is not installed, or {library.name} is not part of this build")
    code = subprocess.run(["objdump", "-d", library], capture_output=True, text=True, check=True).stdout
    assert re.search(own, code)


def test_nothing_is_compiled_for_the_build_machine_or_with_fast_math():
    sources = [ROOT / "setup.py", *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    assert len(sources) > 5
    flag = re.compile(r"-(march=native|mtune=native|ffast-math|Ofast|funsafe-math)|--use_fast_math|native")
    for path in sources:
        comment = "#" if path.suffix == ".py" else "//"
        code = [line.partition(comment)[0] for line in path.read_text().splitlines()]
        if path.suffix == ".py":
            code = [line for line in code if line.startswith(" ") or "=" in line]  # not the docstring's prose
        assert not [line for line in code if flag.search(line)], path
