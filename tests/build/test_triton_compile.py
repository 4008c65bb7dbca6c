"""Compiles the Triton kernels ahead of time, as a GPU would get them, and reads what came out. Needs no GPU.

`bench.codegen.resources` does the work, in processes of their own: Triton's interpreter, in which all other tests run,
and its compiler exclude each other. What it found for every configuration stands in bench/results/resources.json.
"""

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench.__main__ import main
from bench.codegen.launches import configurations
from bench.codegen.occupancy import SHARED_PER_BLOCK
from bench.codegen.resources import PATH, in_order, table
from bench.codegen.sass import ARCHITECTURES, Instruction, instructions, loops, profile, streaming

pytestmark = pytest.mark.xdist_group("triton_compile")  # whose fixtures are made once

ROOT = Path(__file__).parents[2]
BOUNDS = {"overlapped", "serial", "bandwidth"}
COMPILE = """
import json, triton
from bench.codegen.launches import configurations
from bench.codegen.resources import resources
if __name__ == "__main__":
    chosen = [c for c in configurations() if {chosen}]
    records = [record for found in resources(chosen, {architectures}) for record in found]
    print(json.dumps([triton.__version__, records]))
"""


def compiled(chosen, architectures, tmp_path, root=ROOT):
    """The records of the configurations c for which an expression holds; compiled once for the same sources."""
    import triton

    sources = [*(root / "bench" / "codegen").glob("*.py")]
    kernels = root / ("kernels/triton" if root == ROOT else "fastgpt/kernels")
    parts = [triton.__version__, chosen, *architectures, *(p.read_text() for p in sources), *(
        path.read_text() for path in sorted(kernels.glob("*.py"))
    )]  # fmt: skip
    known = ROOT / "build" / "compiled" / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}.json"
    if not known.exists():
        _, records = compile_now(chosen, architectures, tmp_path, root)
        known.parent.mkdir(parents=True, exist_ok=True)
        written = known.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps(records))
        written.replace(known)
    return in_order(json.loads(known.read_text()))


def compile_now(chosen, architectures, tmp_path, root, *before):
    """The version of Triton and the records; packages in the folders `before` go first."""
    script = tmp_path / "compile.py"  # a file: the processes it starts import it again
    script.write_text(COMPILE.format(chosen=chosen, architectures=tuple(architectures)))
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": os.pathsep.join(map(str, (*before, root)))
    }
    done = subprocess.run(
        [sys.executable, script], env=env, cwd=root, capture_output=True, text=True, check=False, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def key(record):
    return record["kernel"], record["op"], record["config"], record["arch"]


@functools.cache
def committed():
    return {key(record): record for record in json.loads(PATH.read_text()) if record["source"] == "triton"}


def check_against_committed(records):
    assert records
    for record in records:
        known = committed().get(key(record))
        assert known, f"{key(record)} is not in {PATH.name}: python -m bench resources --write"
        assert record["spills"] == record["stack"] == 0, f"{key(record)} spills"
        assert record["shared"] <= SHARED_PER_BLOCK[record["arch"]], f"{key(record)} does not fit"
        for bound in BOUNDS & set(known["loop"] or ()):
            assert record["loop"][bound] >= known["loop"][bound], f"{key(record)}: {bound} bound fell"


def test_a_configuration_of_each_op_keeps_its_bounds_and_does_not_spill(tmp_path):
    first = "next(d.name for d in configurations() if d.op == c.op and d.quick)"
    records = compiled(f"c.quick and c.name == {first}", ["sm_90a"], tmp_path)
    check_against_committed(records)
    assert {record["op"] for record in records} == {op for _, op, *_ in committed()}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_configuration_keeps_its_bounds_and_does_not_spill(tmp_path, architecture):
    records = compiled("True", [architecture], tmp_path)
    check_against_committed(records)
    assert {key(record) for record in records} == {k for k in committed() if k[-1] == architecture}


def test_committed_file_has_every_configuration_and_kernel():
    found = {(op, config.split(";")[0], arch) for _, op, config, arch in committed()}
    assert found == {(c.op, c.name, arch) for c in configurations() for arch in ARCHITECTURES}
    assert len({kernel for kernel, *_ in committed()}) == 26


def test_no_committed_kernel_spills_or_exceeds_the_shared_memory():
    """What exceeds it cannot be launched: a block of a GeForce has 99 KiB, less than half of an H200's."""
    assert set(SHARED_PER_BLOCK) == set(ARCHITECTURES)
    for record in committed().values():
        assert record["spills"] == record["stack"] == 0, key(record)
        assert record["shared"] <= SHARED_PER_BLOCK[record["arch"]], key(record)


def test_committed_kernels_use_their_architectures_matrix_instruction():
    instruction = dict.fromkeys(ARCHITECTURES, "hmma") | {"sm_90a": "hgmma", "sm_100a": "utchmma"}
    checked = {"attention": 0, "linear_gelu": 0}
    for record in committed().values():
        kind = next((kind for kind in checked if record["kernel"].startswith(kind)), None)
        if kind and record["loop"] is not None and not record["exempt"]:
            assert record[instruction[record["arch"]]] > 0, key(record)
            checked[kind] += 1
    assert checked["attention"] > 50
    assert checked["linear_gelu"] >= 20


STREAMING = {
    "gelu_fwd", "gelu_bwd", "bias_gelu_fwd", "bias_gelu_bwd", "geglu_fwd", "geglu_bwd", "cross_entropy_fwd",
    "cross_entropy_bwd", "add_layer_norm_fwd", "add_layer_norm_bwd", "add_layer_norm_bwd_rows", "rms_norm_fwd",
    "rms_norm_bwd", "rms_norm_bwd_rows", "swiglu_fwd", "swiglu_bwd", "relu_squared_fwd", "relu_squared_bwd",
    "rope_fwd",
}  # fmt: skip
# Bytes an element of weight and bias, which stay in the caches; and what writes a few numbers a row.
PARAMETERS = {
    "add_layer_norm_fwd": 8,
    "add_layer_norm_bwd_rows": 4,
    "rms_norm_fwd": 4,
    "rms_norm_bwd_rows": 4,
}
WRITE_LITTLE = ("cross_entropy_fwd", "add_layer_norm_bwd_rows", "rms_norm_bwd_rows")


def test_streaming_kernels_move_16_bytes_at_a_time_and_nothing_twice():
    """Also where the rows have an odd length and start at odd addresses."""
    checked = set()
    for record in committed().values():
        kernel, moved = record["kernel"], record["bytes_per_element"]
        # Class weights are read beside the logits; a row of 128 bytes is less than 16 bytes a thread; the tile of a
        # partial rotation does not count the channels that are copied.
        if moved is None or any(part in record["config"] for part in ("smoothing", "D64;", "turned")):
            continue
        checked.add(kernel)
        assert record["wide_loads"] > 0, key(record)
        assert record["wide_stores"] > 0 or kernel in WRITE_LITTLE, key(record)
        most = 1.2 * moved["least"] + PARAMETERS.get(kernel, 0)
        assert moved["least"] <= moved["moved"] <= most, key(record)
    assert checked == STREAMING
    assert any("V50257" in record["config"] for record in committed().values())


def test_arithmetic_leaves_time_for_the_memory():
    """All but softcaps and short rows could run at nine tenths of the bandwidth of an A100 and an H200."""
    for record in committed().values():
        slow = (
            any(part in record["config"] for part in ("softcap", "D64;", " V1 "))
            or record["arch"] == "sm_100a"
        )
        if record["kernel"] in STREAMING and not slow:
            assert record["loop"]["bandwidth"] >= 0.9, key(record)


# (kernel, head size): the serial bound on the share of peak, and instructions a score of mufu, fp32, integer. The
# backward at 128 has 32 scores a thread and tile, for which the addresses of three descriptors alone take 0.38. Of fp32
# one to one and a half keep large scores exact (docs/perf_log.md).
BARS = {
    ("attention_fwd", 64): (0.36, 1.1, 6, 0.5),
    ("attention_fwd", 128): (0.52, 1.1, 6, 0.5),
    ("attention_bwd", 64): (0.58, 1.1, 6, 0.5),
    ("attention_bwd", 128): (0.71, 1.1, 6, 1.1),
}


def test_linear_gelu_has_two_programs_a_multiprocessor():
    """One's products hide the other's epilogue; where the operands have no tensor descriptors, there is one."""
    for record in committed().values():
        if record["kernel"] == "linear_gelu_fwd" and "K=770" not in record["config"]:
            assert record["blocks_per_sm"] >= 2, key(record)
            bounded = (
                record["loop"] is not None and "16 rows" not in record["config"]
            )  # few rows wait for weight
            assert not bounded or record["loop"]["overlapped"] >= 0.8, key(record)


@pytest.mark.parametrize(("kernel", "size"), BARS)
def test_inner_loop_on_hopper_stays_within_its_instructions(kernel, size):
    (record,) = [
        r
        for (name, op, config, arch), r in committed().items()
        if (name, op, arch) == (kernel, "attention", "sm_90a") and config.startswith(f"bf16 d{size} causal")
    ]
    serial, mufu, fp32, integer = BARS[kernel, size]
    assert record["loop"]["serial"] >= serial
    assert record["loop"]["mufu"] <= mufu
    assert record["loop"]["fp32"] <= fp32
    assert record["loop"]["int"] <= integer


def test_profile_is_of_the_loop_that_makes_the_scores():
    """On every architecture: an exponential for each, and products."""
    loops_of = [r["loop"] for r in committed().values() if r["loop"] and r["kernel"].startswith("attention")]
    assert len(loops_of) > 100
    assert all(loop["mufu"] >= 1 and loop["matrix"] > 0 for loop in loops_of)


@pytest.mark.slow
def test_comments_do_not_change_the_records(tmp_path):
    """What is committed changes with the kernels alone."""
    copy = tmp_path / "checkout"
    for folder in ("bench", "fastgpt"):
        shutil.copytree(
            ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("*.so", "results", "__pycache__")
        )
    shutil.copytree(ROOT / "kernels" / "triton", copy / "fastgpt" / "kernels", dirs_exist_ok=True)
    gelu = copy / "fastgpt" / "kernels" / "gelu.py"
    gelu.write_text(gelu.read_text().replace("\n    b_x = tl.load", "\n    # A remark.\n    b_x = tl.load"))
    assert "# A remark." in gelu.read_text()
    records = compiled("(c.op, c.name) == ('gelu', 'bf16 erf')", ARCHITECTURES, tmp_path, copy)
    assert records == [r for r in committed().values() if (r["op"], r["config"][:8]) == ("gelu", "bf16 erf")]


@pytest.mark.slow
def test_command_prints_the_committed_records_of_an_op():
    command = ["-m", "bench", "resources", "geglu", "--source", "triton", "--arch", "sm_90a", "--json"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [r for r in committed().values() if key(r)[1::2] == ("geglu", "sm_90a")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gellu",), "unknown op 'gellu'. Use one of: attention, attention_varlen, cross_entropy"),
        (("--arch", "sm_75"), f"unknown architecture 'sm_75'. Use one of: {', '.join(ARCHITECTURES)}"),
        (("gelu", "--write"), "--write needs all ops and architectures"),
    ],
)
def test_command_refuses_what_it_does_not_know(monkeypatch, capsys, arguments, message):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which the command takes away
    assert main(["resources", *arguments]) == 2
    assert message in capsys.readouterr().err


# ---- the reading of machine code ----

DISASSEMBLY = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;            /* 0x00000a00ff017624 */
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], !UPT ;
        /*0030*/               @P0 MUFU.EX2 R3, R4 ;
        /*0040*/                   FFMA.FTZ R3, R4, R5, R6 ;
        /*0050*/                   IADD3 R2, P1, R2, 0x10, RZ ;
        /*0060*/              @!P2 BRA 0x20 ;
        /*0070*/               @P3 BRA 0xa0 ;
        /*0080*/                   STG.E.128 [R2.64], R4 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], !UPT ;
        /*00b0*/                   BRA 0x80 ;
        /*00c0*/                   BRA 0xc0 ;
"""


def test_loop_is_found_and_its_instructions_counted():
    """And nothing that only jumps back, as the block at the end does."""
    code = instructions(DISASSEMBLY)
    assert [i.opcode for i in code][:3] == ["MOV", "LDG.E.128", "HGMMA.64x128x16.F32.BF16"]
    (body,) = loops(code, "matrix")
    assert [i.address for i in body] == [0x20, 0x30, 0x40, 0x50, 0x60]
    flops = 2 * 64 * 128 * 16 * 2
    found = profile(body, warps=8, elements=256, flops=flops, arch="sm_90a")
    assert (found["mufu"], found["fp32"], found["int"], found["memory"]) == (1, 1, 1, 0)
    matrix, others = flops / 4096, (256 / 16, 256 / 128, 256 / 64)
    assert found["overlapped"] == round(matrix / max(matrix, *others), 4)
    assert found["serial"] == round(matrix / (matrix + sum(others)), 4)


@pytest.mark.parametrize("jump", ["@P0 BRA 0x10", "@!UP0 BRA 0x10", "BRA.U UP0, 0x10", "BRA.U !UP0, 0x10"])
def test_what_follows_a_conditional_jump_backwards_is_no_loop(jump):
    """Blackwell's uniform jumps name their predicate among the operands."""
    lines = (
        "MOV R0, R1",
        "HMMA R0, R4, R8, R0",
        jump,
        "HMMA R0, R4, R8, R0",
        "@P1 BRA 0x60",
        "FFMA R0, R1, R2, R3",
    )
    lines += ("HMMA R0, R4, R8, R0", "EXIT")
    code = instructions("".join(f"/*{16 * n:04x}*/ {line} ;\n" for n, line in enumerate(lines)))
    assert [[i.address for i in body] for body in loops(code, "matrix")] == [[0x10, 0x20]]


@pytest.mark.parametrize(
    ("opcode", "pipe", "flops"),
    [
        ("HMMA.16816.F32.BF16", "matrix", 4096),
        ("HMMA.1688.F32.TF32", "matrix", 2048),
        ("HGMMA.64x64x16.F32", "matrix", 131072),
        ("UTCHMMA", "matrix", 0),
        ("FFMA2", "fp32", 0),
        ("FSETP.GT.AND", "fp32", 0),
        ("LOP3.LUT", "int", 0),
        ("LDSM.16.M88.4", "memory", 0),
        ("UIADD3", "other", 0),
        ("VOTEU.ANY", "other", 0),
        ("VOTE.ANY", "int", 0),
    ],
)
def test_instruction_goes_to_its_pipe(opcode, pipe, flops):
    instruction = Instruction(0, opcode, "")
    assert (instruction.pipe, instruction.flops) == (pipe, flops)


def test_streaming_is_bound_by_the_busiest_of_pipes_schedulers_and_memory():
    """Ten instructions of eight warps for 256 elements: nine of one pipe, where a packed instruction counts as two."""
    fp32 = [Instruction(16 * n, "FFMA", "") for n in range(7)] + [Instruction(112, "FFMA2", "")]
    body = [*fp32, Instruction(128, "LDG.E.128", ""), Instruction(144, "BRA", "")]
    found = streaming(body, warps=8, elements=256, moved=2, arch="sm_90a")
    assert (found["fp32"], found["issue"], found["memory"]) == (9, 10, 1)
    assert found["bandwidth"] == 1.0  # 10 / 128 cycles beside 2 / 19.9
    found = streaming(body, warps=8, elements=256, moved=1, arch="sm_90a")
    assert found["bandwidth"] == round((1 / 19.9) / (10 / 128), 4)
    found = streaming(body, warps=8, elements=256, moved=1, arch="sm_80")  # 64 results a cycle
    assert found["bandwidth"] == round((1 / 13.4) / (9 / 64), 4)


def test_table_has_a_line_for_every_record():
    assert table(list(committed().values())).count("\n") == len(committed())
