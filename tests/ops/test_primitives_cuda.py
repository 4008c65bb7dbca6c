"""The machine of csrc/cuda/device.cuh on a GPU: shared memory, barriers, copies, clusters and matrix units.

The kernels of simt/sound.cu, which are right in the emulator, give the same numbers there.
"""

import ctypes

import pytest
import torch

from bench.codegen import cubins
from tests.simt import nvcc
from tests.simt.test_simt import SOUND, run


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
    size, same = SOUND[name]
    x = torch.randn(size, device="cpu")
    with torch.device("cpu"):
        expected = same(x)
    torch.testing.assert_close(on_gpu(name, x, expected), expected, rtol=1e-5, atol=1e-5)


def on_gpu(name, x, like):
    """What a kernel of sound.cu makes of x."""
    library = nvcc.load()
    library.simt_sound.restype = ctypes.c_char_p
    out = torch.zeros_like(like, device="cuda")
    assert run(library.simt_sound, name, x.cuda(), out) == ""
    return out.cpu()


@pytest.mark.gpu
def test_tensor_cores_truncate_when_they_add(cuda):
    """As the emulator does: of sums of positive products none is rounded up."""
    x = (torch.rand(512, device="cpu") + 0.5).bfloat16().float()  # whose products float32 has exactly
    exact = (x[:256].view(16, 16).double() @ x[256:].view(16, 16).double()).flatten()
    for name in ("product bf16 by figures", "product tf32 by figures"):
        found = on_gpu(name, x, x[:256]).double()
        assert (found <= exact).all()
        assert (found < exact).any()
        assert ((exact - found) / exact).max() < 2.0**-20
