"""The machine of csrc/cuda/device.cuh on a GPU: shared memory, barriers, copies, clusters and matrix units.

The kernels of simt/sound.cu, which are right in the emulator, give the same numbers there.
"""

import ctypes

import pytest
import torch
from simt import nvcc
from test_simt import SOUND, run

from bench import cubins


@pytest.mark.slow
@pytest.mark.skipif(bool(cubins.problem()), reason=cubins.problem())
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_nvcc_compiles_the_small_kernels(tmp_path, architecture):
    nvcc.build(tmp_path / "primitives.so", architecture)
    assert b"simt_sound" in (tmp_path / "primitives.so").read_bytes()


@pytest.mark.gpu
@pytest.mark.parametrize("name", SOUND)
def test_a_gpu_gives_the_numbers_that_the_emulator_gives(cuda, name):
    if "cluster" in name and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters begin with compute capability 9.0")
    library = nvcc.load()
    library.simt_sound.restype = ctypes.c_char_p
    size, same = SOUND[name]
    x = torch.randn(size, device="cpu")
    with torch.device("cpu"):
        expected = same(x)
    out = torch.zeros_like(expected, device="cuda")
    assert run(library.simt_sound, name, x.cuda(), out) == ""
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=1e-5)
