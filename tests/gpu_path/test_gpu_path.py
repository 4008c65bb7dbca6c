"""The Python path of every op on a GPU, from the public functions down to Triton's launch, without a GPU.

One process (program.py) calls everything on GPUs that do not exist, of seven compute capabilities: their tensors hold
no data, and where the launch would be, kernel, grid, tile and the key of Triton's cache are recorded. Whether the
kernels compute the right numbers is proved elsewhere.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench.codegen.occupancy import SHARED_PER_BLOCK
from bench.codegen.resources import PATH

pytestmark = pytest.mark.xdist_group("gpu_path")  # whose program runs once

ROOT = Path(__file__).parents[2]
ARCHITECTURES = {
    "8.0": "sm_80", "8.6": "sm_86", "8.9": "sm_89", "9.0": "sm_90a", "10.0": "sm_100a", "12.0": "sm_120",
}  # fmt: skip
WITH_DESCRIPTORS = ("9.0", "10.0")
MAIN = ("attention_fwd", "attention_bwd")


@pytest.fixture(scope="module")
def found():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu_path.program"],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(params=ARCHITECTURES)
def capability(request):
    return request.param


def launches(found, capability):
    """(name of the call, launch) of a GPU."""
    for name, call in found["calls"][capability].items():
        yield from ((name, launch) for launch in call["launches"])


def test_triton_serves_every_op_from_compute_capability_8_0_on(found, capability):
    for name, call in found["calls"][capability].items():
        assert not call["error"], f"{name}: {call['error']}"
        assert call["decisions"], name
        assert {backend for _, backend, _ in call["decisions"]} == {"triton"}, name
        assert call["launches"] or name.startswith("linear "), name


def test_other_backends_are_refused_with_their_reasons(found, capability):
    for name, call in found["calls"][capability].items():
        for op, _, reasons in call["decisions"]:
            assert reasons["cpp"] == "the tensors are on cuda and cpp serves the CPU", (name, op)
            assert reasons["reference"] == "triton is preferred on cuda", (name, op)
            assert reasons["cuda"], (name, op)


def test_compute_capability_7_5_gets_pytorch_or_the_reference(found):
    for name, call in found["calls"]["7.5"].items():
        drop_in = name.startswith(("functional", "registered"))
        assert not call["launches"], name
        assert call["decisions"], name
        for _, backend, reasons in call["decisions"]:
            assert backend == ("pytorch" if drop_in else "reference"), name
            assert reasons["triton"] == "Triton needs compute capability 8.0, and this GPU has 7.5", name


def test_grids_stay_within_the_limits_of_cuda(found, capability):
    for name, launch in launches(found, capability):
        first, *others = launch["grid"]
        assert 1 <= first <= 2**31 - 1, (name, launch)
        assert all(1 <= n <= 65_535 for n in others), (name, launch)


def test_batches_and_heads_beyond_65535_have_a_program_each(found, capability):
    calls = [name for name in found["calls"][capability] if " many " in name]
    assert len(calls) == 4
    for name in calls:
        main = [x for x in found["calls"][capability][name]["launches"] if x["kernel"] in MAIN]
        assert main, name
        for launch in main:
            assert launch["grid"][0] % 70_000 == 0, (name, launch)


def test_every_launch_fits_the_shared_memory_of_a_block(found, capability):
    """By what was compiled ahead of time for the same kernel, type and tile; of every launch there is some."""
    arch = ARCHITECTURES[capability]
    shared = {}
    for record in json.loads(PATH.read_text()):
        if (record["source"], record["arch"]) == ("triton", arch):
            name, sizes, rest = record["config"].split("; ")
            itemsize = 4 if name.startswith(("fp32", "tf32")) else 2
            key = record["kernel"], itemsize, frozenset(sizes.split()), rest
            shared[key] = max(record["shared"], shared.get(key, 0))
    checked = set()
    for name, launch in launches(found, capability):
        tile = launch["tile"]
        sizes = frozenset(f"{k}={v}" for k, v in tile.items() if k.startswith("BLOCK"))
        rest = f"{tile.get('num_warps', 4)} warps, {tile.get('num_stages', 3)} stages"
        # The parts of a split decoding are joined in fp32 whatever the tensors are.
        itemsize = 2 if launch["kernel"] == "attention_combine_fwd" else launch["itemsize"]
        key = launch["kernel"], itemsize, sizes, rest
        assert key in shared, (name, key)
        assert shared[key] <= SHARED_PER_BLOCK[arch], (name, key)
        checked.add(launch["kernel"])
    assert len(checked) > 14


def test_tensor_descriptors_are_for_large_problems_on_sm90_and_sm100(found, capability):
    described = {}
    for name, launch in launches(found, capability):
        for box, strides in launch["descriptors"]:
            described[name] = launch
            assert max(box) <= 256, (name, launch)
            assert all(s % 16 == 0 and 0 < s < 2**40 for s in strides[:-1]), (name, launch)
    if capability not in WITH_DESCRIPTORS:
        assert not described
        return
    assert {"attention bf16 d64", "attention bf16 d128", "linear_gelu bf16", "functional attention"} <= set(
        described
    )
    small = {"attention small", "linear_gelu 16 rows", "attention decoding 8192", "attention_varlen"}
    assert not small & set(described)


def test_training_compiles_each_kernel_once_or_twice(found):
    """Of GPT-2 124M: 100 steps, 100 lengths from 1 to 1,024, 8 batch sizes."""
    counts = found["compilations"]
    assert sum(counts["first step"].values()) <= 12
    assert sum(counts["99 steps of other lengths"].values()) <= 6


def test_generation_after_training_compiles_four_kernels_at_most(found):
    """A prompt of 100 tokens, then 60 tokens by a key-value cache."""
    assert sum(found["compilations"]["generation"].values()) <= 4


def test_decoding_from_1_to_8192_columns_compiles_three_kernels_at_most(found):
    """The parts of a row are joined by one kernel, however many they are."""
    assert sum(found["compilations"]["decoding"].values()) <= 3


def test_every_rate_of_dropout_has_the_same_kernels(found):
    assert set(found["compilations"]["dropout"].values()) == {1}


def test_reading_a_number_from_the_gpu_would_be_seen(found):
    """No call above does: it would be its error."""
    assert found["reading"] == "DataDependentOutputException"


@pytest.mark.slow
def test_the_cache_can_be_filled_for_a_gpu_that_is_not_there(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.gpu_path.fill_cache", "9.0", "gelu bf16"]

    def files():
        subprocess.run(command, cwd=ROOT, env=env | {"TRITON_CACHE_DIR": str(tmp_path)}, check=True)
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")}

    first = files()
    assert sorted(path.stem for path in first) == ["_gelu_bwd", "_gelu_fwd"]
    assert files() == first  # a second process finds them
