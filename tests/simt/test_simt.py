"""The emulator of the CUDA kernels is proved itself: it finds faults, in small kernels and planted in the real ones.

And what is right passes, with the right numbers, in every order of warps.
"""

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.simt import emulator

pytestmark = pytest.mark.skipif(bool(emulator.problem()), reason=emulator.problem())

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def small():
    """The library of the small kernels."""
    sources = [emulator.FOLDER / name for name in ("emulator.cpp", "faults.cu", "sound.cu")]
    library = ctypes.CDLL(str(emulator.build(ROOT / "build" / "simt-small", sources)))
    library.simt_fault.restype = library.simt_sound.restype = ctypes.c_char_p
    return library


def run(function, name, into, out):
    arguments = [(ctypes.c_void_p(t.data_ptr()), ctypes.c_int64(t.numel())) for t in (into, out)]
    return function(name.encode(), *arguments[0], *arguments[1]).decode()


# The small faulty kernels of simt/faults.cu and their messages. The order of warps decides which of several occurs.
FAULTS = {
    "past a tensor": "thread 31: an access of 4 bytes at byte 128 of a tensor of 128 bytes",
    "before a tensor": "thread 0: an access of 4 bytes at byte -4 of a tensor of 256 bytes",
    "past a tensor by half a vector": "thread 15: an access of 8 bytes at byte 120 of a tensor of 124 bytes",
    "no tensor": "of a tensor of 0 bytes",
    "past shared memory": "thread 31: an access of 4 bytes at byte 128 of 128 of shared memory",
    "before shared memory": "an access at address 0, before the block's shared memory, which begins at 1024",
    "misaligned in a tensor": "an access of 16 bytes of global memory that is not aligned",
    "misaligned in shared memory": "an access of 4 bytes of shared memory that is not aligned",
    "copy misaligned": "an access of 16 bytes of global memory that is not aligned",
    "copy past shared memory": "thread 31: an access of 16 bytes at byte 512 of 512 of shared memory",
    "copy past a tensor": "thread 8: an access of 16 bytes at byte 128 of a tensor of 128 bytes",
    "read before any write": "byte 0 of shared memory: a read before any write",
    "half of it never written": "byte 2 of shared memory: a read before any write",
    "read without a barrier": ("a read races with a write by thread", "a read before any write"),
    "overwritten without a barrier": (
        "a write races with a read by warp 0",
        "a read races with a write by thread",
    ),
    "written by two warps": "byte 0 of shared memory: a write races with a write by thread",
    "lanes without a barrier": "a read before any write",
    "a shuffle is no barrier": "a read races with a write by thread",
    "lanes overwrite": "a read races with a write by thread 0",
    "matrices overwritten": "a write races with a read by warp 0",
    "barrier of others": ("a read races with a write by thread", "a read before any write"),
    "copy read before its wait": "a read where an asynchronous copy is in flight",
    "copy of the last group read": "byte 512 of shared memory: a read where an asynchronous copy is in flight",
    "copy never committed": "a read where an asynchronous copy is in flight",
    "copy seen by others without a barrier": "a read races with a write by thread 0",
    "copy over what is read": ("a write races with a read by warp 0", "a read races with a write by thread"),
    "write over a copy": "a write where an asynchronous copy is in flight",
    "copy left in flight": "the thread ends while copies are in flight; wait for them",
    "barrier for some": (
        "deadlock: all threads wait or have ended; block (0, 0, 0) threads 0 to 31 wait for __syncthreads; "
        "block (0, 0, 0) threads 32 to 63 wait for named barrier 3 of 96 threads; "
        "block (0, 0, 0) threads 64 to 95 have ended"
    ),
    "one warp has ended": (
        "deadlock: all threads wait or have ended; block (0, 0, 0) threads 0 to 31 wait for __syncthreads; "
        "block (0, 0, 0) threads 32 to 63 have ended"
    ),
    "one lane has ended": "threads 0 to 6 wait for a shuffle; block (0, 0, 0) threads 7 to 7 have ended",
    "lanes at different operations": "lanes of one warp are at a shuffle and at __syncwarp at the same time",
    "lanes at different barriers": "lanes of one warp are at different barriers",
    "barrier of two counts": (
        "named barrier 1 of 96 threads, where others wait for 64",
        "named barrier 1 of 64 threads, where others wait for 96",
    ),
    "barrier out of range": "named barrier 16 of 64 threads is not valid in a block of 64 threads",
    "barrier of half a warp": "named barrier 1 of 48 threads",
    "shuffle from nowhere": "a shuffle from lane 32",
    "blocks write one place": "block (1, 0, 0) thread 0: global memory that another thread of this launch has written",
    "blocks write what others read": "block (1, 0, 0) thread 0: global memory that another thread of this launch has",
    "added and read": (
        "global memory to which another thread of this launch adds",
        "a write of global memory that another thread of this launch reads",
    ),
    "added and written": "global memory that another thread of this launch has written",
    "cluster reads too early": "a read before any write",
    "cluster ends too early": (
        "orders the accesses of warp",
        "an access of the shared memory of a block that has ended",
    ),
    "block of no cluster": "block 1 of a cluster of 1",
    "no block": "a grid of 0 × 1 × 1 blocks",
    "too many blocks": "a grid of 1 × 65536 × 1 blocks",
    "half a warp": "a block of 48 threads",
    "too many threads": "a block of 1056 threads",
    "a cluster that does not fit": "clusters of 3 blocks in a grid of 4",
    "more threads than its launch bounds": "a block of 64 threads, and its __launch_bounds__ are 32",
    "too much shared memory": "a block of 233472 bytes of shared memory",
}

OUT = {"past a tensor by half a vector": 31}  # numbers; 64 as a rule


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found_in_every_order_of_warps(small, name):
    sentences = FAULTS[name] if isinstance(FAULTS[name], tuple) else (FAULTS[name],)
    for seed in range(12):
        small.simt_seed(ctypes.c_uint64(seed))
        said = run(small.simt_fault, name, torch.randn(32), torch.zeros(OUT.get(name, 64)))
        assert said.startswith(f"simt: {name}: "), said or "nothing was found"
        assert any(sentence in said for sentence in sentences), said


def product(dtype):
    return lambda x: (
        (x[:256].view(16, 16).to(dtype).double() @ x[256:].view(16, 16).to(dtype).double()).float().flatten()
    )


def tf32_product(x):
    """Of which the unit sees the upper 19 bits."""
    return product(torch.float32)((x.view(torch.int32) & ~0x1FFF).view(torch.float32))


def pipeline(x):
    """The tiles' sums, of other threads' numbers; tile 3 is zeros instead."""
    tiles = x.view(6, 4, 64).clone()
    tiles[3] = 0
    return tiles.sum((0, 1))[torch.arange(64) ^ 35]


# The kernels of simt/sound.cu: numbers in, numbers out, and what computes the same.
SOUND = {
    "block sum": (3 * 128, lambda x: x.view(3, 128).sum(1, keepdim=True).expand(3, 128).flatten()),
    "lanes reversed": (64, lambda x: x.view(2, 32).flip(1).flatten()),
    "producers and consumers": (5 * 64, lambda x: x.view(5, 64).sum(0)[torch.arange(64) ^ 33]),
    "copies in two stages": (6 * 4 * 64, pipeline),
    "cluster sum": (8 * 64, lambda x: x.view(2, 256).sum(1, keepdim=True).expand(2, 256).flatten()),
    "everybody adds": (3 * 64, lambda x: x.view(-1, 4).sum(0)),
    "any": (96, lambda x: (x.view(3, 32) > 2).any(1, keepdim=True).expand(3, 32).float().flatten()),
    "product bf16": (512, product(torch.bfloat16)),
    "product bf16 down": (512, product(torch.bfloat16)),
    "product bf16 by figures": (512, product(torch.bfloat16)),
    "product fp16": (512, product(torch.float16)),
    "product fp16 down": (512, product(torch.float16)),
    "product fp16 by figures": (512, product(torch.float16)),
    "product tf32 by figures": (512, tf32_product),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_kernel_gives_right_numbers_in_every_order_of_warps(small, name):
    size, same = SOUND[name]
    for seed in range(25):
        small.simt_seed(ctypes.c_uint64(seed))
        x = torch.randn(size)
        expected = same(x)
        out = torch.zeros_like(expected)
        assert run(small.simt_sound, name, x, out) == ""
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_cluster_is_refused_where_the_gpu_has_none(small):
    small.simt_device(227 << 10, False)
    said = run(small.simt_sound, "cluster sum", torch.randn(8 * 64), torch.zeros(8 * 64))
    small.simt_device(227 << 10, True)
    assert said == "simt: cluster sum: clusters of 4 blocks on a GPU without clusters"


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("kind", ["bf16", "fp16", "tf32"])
def test_matrix_units_truncate_when_they_add(small, kind, sign):
    """Of 1 and three times 1.5 · 2^-24 a sum that is rounded once has 2^-22, a truncated one 2^-23."""
    a, b = torch.zeros(16, 16), torch.zeros(16, 16)
    a[0, :4] = torch.tensor([1, 2**-12, 2**-12, 2**-12])
    b[:4, 0] = sign * torch.tensor([1, *[1.5 * 2**-12] * 3])
    out = torch.zeros(256)
    assert run(small.simt_sound, f"product {kind} by figures", torch.cat((a, b)).flatten(), out) == ""
    assert out[0] == sign * (1 + 2**-23)


def test_the_seed_is_the_order_of_the_warps(small):
    orders = []
    for seed in (*range(10), *range(10)):
        small.simt_seed(ctypes.c_uint64(seed))
        out = torch.zeros(16)
        assert run(small.simt_sound, "order", torch.zeros(1), out) == ""
        assert out.sort().values.tolist() == list(range(16))
        orders.append(tuple(out.tolist()))
    assert orders[:10] == orders[10:]
    assert len(set(orders)) == 10


# ---- faults in the real kernels ----

# Runs a case of tests/support/every_op.py on a library of kernels, as the tests of the op do.
CASE = """
import sys
from unittest import mock
import torch, fastgpt
from tests.support import every_op
from fastgpt.testing import check_error_rule
from tests.simt import emulator

library, name, *size = sys.argv[1:]
torch.manual_seed(0)
torch.ops.load_library(library)
with mock.patch.object(emulator, "library"), emulator.running(), fastgpt.use_backend("cuda"):
    if name == "cross_entropy" and size == ["cluster"]:
        logits, target = torch.randn(3, 1031), torch.tensor([5, 1030, 700])
        options = (None, -100, 0.1, 0.0, 0.0, 1.0, 2048)
        torch.ops.fastgpt.cross_entropy_with_grad_inplace_cuda(logits, target, *options)
    else:
        for sizes in [map(int, size)] if size else [(37, 67), (131, 64)]:
            rows, columns = sizes
            check_error_rule(*every_op.case(name, torch.float32, rows, columns))
            check_error_rule(*every_op.case(name, torch.bfloat16, rows, columns))
"""


def run_case_with(folder, case, file=None, text="", planted=""):
    """What a case ends in on a copy of csrc/cuda in which a text, which is there once, is another."""
    shutil.copytree(ROOT / "csrc" / "cuda", folder / "csrc" / "cuda")
    shutil.copy(ROOT / "csrc" / "formulas.h", folder / "csrc")
    if file:
        path = folder / "csrc" / "cuda" / file
        source = path.read_text()
        assert source.count(text) == 1, (
            f"{file} has {text!r} {source.count(text)} times: plant the fault elsewhere"
        )
        path.write_text(source.replace(text, planted))
    op = case.partition(" ")[0].replace("bias_", "")
    sources = [emulator.FOLDER / "emulator.cpp", folder / "csrc" / "cuda" / f"{op}.cu"]
    sources += (folder / "csrc" / "cuda").glob(f"{op}_bwd.cu")
    library = emulator.build(folder / "build", sources)
    return subprocess.run(
        [sys.executable, "-c", CASE, library, *case.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


RACE = r"races with a (read|write)"
OUTSIDE = r"an access of \d+ bytes at byte -?\d+ of a tensor of"
WRONG = r"AssertionError"
UNWRITTEN = r"a read before any write"

# (case of an op with its rows and columns, file, what stands there, what is planted, what is said of it)
PLANTED = [
    ("bias_gelu", "gelu.cu", "  sync_block();\n", "", f"{RACE}|{UNWRITTEN}"),
    ("gelu", "elementwise.cuh", "if (i + N <= numel)", "if (i < numel)", OUTSIDE),
    ("gelu", "elementwise.cuh", "j = i; j < numel;", "j = i; j <= numel;", OUTSIDE),
    ("bias_gelu", "gelu.cu", "if (column < columns) store(partial", "store(partial", f"{OUTSIDE}|another thread"),
    ("bias_gelu", "gelu.cu", "(w * WARP + l + k * THREADS)", "(w * WARP + l + k * WARP)", WRONG),
    ("swiglu", "swiglu.cu", "store_vector(db + i, gated)", "store_vector(da + i, gated)", f"{WRONG}|another thread"),
    ("swiglu", "swiglu.cu", "(1.0f - s)", "(1.0f - y)", WRONG),
    ("relu_squared", "relu_squared.cu", "store_vector(dx + i, v)", "store_vector(dx + i + 1, v)", f"{OUTSIDE}|aligned"),
    ("add_layer_norm 9 700", "row_threads.cuh", "sync_named(barrier, threads);", ";", f"{RACE}|{UNWRITTEN}"),
    ("add_layer_norm 3100 290", "add_layer_norm.cuh", ", turn ^= 1)", ")", RACE),
    ("add_layer_norm", "add_layer_norm.cuh", "if (column < columns) store(to", "store(to", f"{OUTSIDE}|another thread"),
    ("rms_norm 3100 290", "rms_norm.cuh", ", turn ^= 1)", ")", RACE),
    ("rms_norm", "rms_norm.cuh", "if (column < columns) store(", "store(", f"{OUTSIDE}|another thread"),
    ("rms_norm 9 700", "rms_norm.cuh", "    sync_block();\n    for (int i = thread()", "    for (int i = thread()",
     f"{RACE}|{UNWRITTEN}"),
    ("rms_norm 9 700", "rms_norm.cuh", "products[0] /= static_cast<float>(columns);", "", WRONG),
    ("rope", "rope.cu", "if (position >= s.positions) break;", "", OUTSIDE),
    ("rope", "rope.cu", "store_vector(to + second, high)", "store_vector(to + first, high)", f"{WRONG}|another thread"),
    ("rope", "rope.cu", "t * cos.row_stride + pair", "t * sin.row_stride + unit", f"{WRONG}|aligned"),
    ("cross_entropy cluster", "cross_entropy.cu", "    wait_copies<later>();\n", "", "copy is in flight"),
    ("cross_entropy cluster", "cross_entropy.cu", "    sync_row(blocks);", "", RACE),
    (
        "cross_entropy cluster", "cross_entropy.cu", "  if (blocks > 1) sync_cluster();  // before", "  // before",
        "orders the accesses of warp|a block that has ended",
    ),
    ("cross_entropy", "cross_entropy.cuh", "(columns - head) / N;", "(columns - head) / N + 1;", OUTSIDE),
    ("attention", "attention.cu", "wait_copies<0>();\n    sync_block();", "wait_copies<0>();", f"{RACE}|{UNWRITTEN}"),
    ("attention", "attention.cu", "wait_copies<0>();\n    sync", "wait_copies<1>();\n    sync", "copy is in flight"),
    ("attention", "attention.cuh", "x >= low && x <= high", "x >= low && x < high", WRONG),
    ("attention", "tiles.cuh", "pass * STEP < rows", "pass * STEP <= rows", OUTSIDE),
    ("attention", "tiles.cuh", "+ pass * STEP, chunk() + right)", "+ pass * STEP, (chunk() ^ 1) + right)", WRONG),
    ("attention", "attention_bwd.cu", "sync_block();\n\n        const SharedAddress grad_lane",
     "const SharedAddress grad_lane", f"{RACE}|{UNWRITTEN}"),
    ("attention", "attention_bwd.cuh", "if (!EDGE || start + y + 8 * h < Lq) {", "{", OUTSIDE),
    ("attention 300 64", "attention_bwd.cu", "stage, start);\n          wait_for_tile();",
     "stage, start);\n          wait_copies<0>();", RACE),
    ("attention 400 64", "tiles.cuh", "to + i * STEP * Shape::PITCH", "to + i * Shape::PITCH",
     f"{RACE}|{UNWRITTEN}|flight"),
    ("attention 400 64", "tiles.cuh", "advance(piece, pitch_, STEP * 16)", "advance(piece, pitch_, STEP * 8)", WRONG),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("planted", [pytest.param(p, id=f"{p[1]}: {p[2].strip()}") for p in PLANTED])
def test_planted_fault_is_found(planted, tmp_path):
    case, file, text, other, sentence = planted
    done = run_case_with(tmp_path, case, file, text, other)
    assert done.returncode != 0, f"nothing is found wrong with {file} without its {text!r}"
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(sentence, done.stderr.strip()[-600:]), last


@pytest.mark.slow
@pytest.mark.parametrize("case", dict.fromkeys(case for case, *_ in PLANTED))
def test_nothing_is_found_where_nothing_is_planted(case, tmp_path):
    done = run_case_with(tmp_path, case)
    assert done.returncode == 0, done.stderr
