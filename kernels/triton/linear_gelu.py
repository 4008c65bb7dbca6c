"""GELU of a linear layer's output: one matrix product with the activation in its epilogue.

    z = x weight^T + bias,   y = gelu(z)                                    forward: one kernel
    dz = dy gelu'(z),   dbias = sum_i dz_i                                  backward: `gelu.bias_gelu_bwd`, then
    dx = dz weight,   dweight = dz^T x                                      PyTorch's products

Shapes: x (M, K), weight (N, K) of any strides, bias (N,), y, z (M, N) contiguous. Sums and activation are fp32, y and
z are rounded once, from the same sum. z is written only where a gradient will be wanted.

Bytes: beside x and weight the forward writes y and z. A product and then a pass would write z, read it and write y,
half as much again, in two kernels. Could the backward's dx = dz weight make dz in its prologue instead of a pass? A
tile of 128 columns of dx has 256 FLOPs for an element of dz, 0.06 cycles of a Hopper multiprocessor, and makes it again
as every tile beside it does: 17 fp32 instructions, 0.13 cycles, and two exponentials and roots as long. The product
would run at less than half its speed. dweight needs dz as well, so that it is written in any case: what there is to
save is one of five reads and writes of (M, N), 0.1 cycles an element, where the products take K / 1024. Hence a pass,
which sums dbias too, in a fixed order and without atomics, and products of the library's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgpt.kernels.checks import contiguous
from fastgpt.kernels.common import capability, cdiv, is_tf32, on_device_of
from fastgpt.kernels.gelu import _gelu, bias_gelu_bwd
from fastgpt.kernels.tuned import chosen

# (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages): first for many rows, then for at most FEW, where weight is all there is
# to read, and narrow tiles make enough programs to read it. `python -m bench resources` shows what each takes.
Tile = tuple[int, int, int, int, int]
FEW = 64
# Two programs fit into a multiprocessor: the tensor cores have the products of one while the other is in its epilogue,
# which at K = 768 takes as long. 128 × 256 (194 registers, 147 KiB) would leave room for one.
HOPPER = ((128, 128, 64, 8, 3), (64, 32, 64, 4, 4))
BLACKWELL = HOPPER  # likewise; the sums of two programs are half of the tensor memory
AMPERE = ((128, 128, 32, 8, 4), (64, 32, 64, 4, 4))  # and every other part: 48 KiB, two fit into 99
SM120 = ((128, 64, 32, 8, 4), (64, 32, 64, 4, 4))  # where the epilogue of AMPERE's tile takes 142 registers
TF32 = ((128, 64, 32, 8, 3), (64, 32, 32, 4, 3))  # elements of twice the size: half the columns
FP32 = ((64, 64, 16, 8, 2), (64, 64, 16, 8, 2))  # no tensor core has IEEE fp32: operands stand in registers
INTERPRETED: Tile = (32, 16, 16, 4, 1)  # the interpreter's use is in testing the edges of tiles
GROUP_M = tl.constexpr(8)  # rows of tiles that share their columns of weight while both are in the L2 cache


@triton.jit
def _tile_of(i, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row and column of tile i: down a group of GROUP_M rows, then on to the next column."""
    columns = tl.cdiv(N, BLOCK_N)
    first = i // (GROUP_M * columns) * GROUP_M
    rows = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP_M)
    i = i % (GROUP_M * columns)
    return first + i % rows, i // rows


@triton.jit
def _epilogue(b_z, p_bias, p_y, p_z, o_m, o_n, M, N, TANH: tl.constexpr):
    """Adds the bias to z, stores it, and gelu of it."""
    if p_bias is not None:
        b_z += tl.load(p_bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    o = o_m[:, None] * N + o_n[None, :]
    m = (o_m < M)[:, None] & (o_n < N)[None, :]
    if p_z is not None:
        tl.store(p_z + o, b_z.to(p_z.dtype.element_ty), mask=m)
    tl.store(p_y + o, _gelu(b_z, TANH).to(p_y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["M"])
def _linear_gelu_fwd(
    p_x,  # a tensor descriptor if DESCRIPTORS, as p_weight
    p_weight,
    p_bias,
    p_y,
    p_z,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    TANH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WHOLE: tl.constexpr,  # K is a multiple of BLOCK_K
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_m, i_n = _tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DESCRIPTORS:
        for k in range(0, K, BLOCK_K):
            b_x = p_x.load([i_m * BLOCK_M, k])  # [BLOCK_M, BLOCK_K]
            b_w = p_weight.load([i_n * BLOCK_N, k])  # [BLOCK_N, BLOCK_K]
            b_z = tl.dot(b_x, b_w.T, b_z, input_precision=PRECISION)
    else:
        # Rows beyond the edge are others again, which costs no mask; what they give is not stored.
        o_k = tl.arange(0, BLOCK_K)
        o_k_x = o_k * tl.cast(stride_xk, tl.int64)
        o_k_w = o_k * tl.cast(stride_wk, tl.int64)
        p_block_x = p_x + (o_m % M)[:, None] * stride_xm + o_k_x[None, :]
        p_block_w = p_weight + (o_n % N).to(tl.int64)[None, :] * stride_wn + o_k_w[:, None]
        for k in range(0, K, BLOCK_K):
            if WHOLE:
                b_x = tl.load(p_block_x)  # [BLOCK_M, BLOCK_K]
                b_w = tl.load(p_block_w)  # [BLOCK_K, BLOCK_N]
            else:
                b_x = tl.load(p_block_x, mask=o_k[None, :] < K - k, other=0.0)
                b_w = tl.load(p_block_w, mask=o_k[:, None] < K - k, other=0.0)
            b_z = tl.dot(b_x, b_w, b_z, input_precision=PRECISION)
            p_block_x += BLOCK_K * tl.cast(stride_xk, tl.int64)
            p_block_w += BLOCK_K * tl.cast(stride_wk, tl.int64)
    # In halves: what is on the way from z to y then takes half the registers, and two programs fit.
    b_left, b_right = tl.split(b_z.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1))
    o_half = i_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    _epilogue(b_left, p_bias, p_y, p_z, o_m, o_half, M, N, TANH)
    _epilogue(b_right, p_bias, p_y, p_z, o_m, o_half + BLOCK_N // 2, M, N, TANH)


def linear_gelu_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, tanh: bool, with_z: bool
) -> tuple[Tensor, Tensor]:
    """y and, `with_z`, the pre-activation."""
    contiguous("linear_gelu_fwd_triton", bias=bias)
    (M, K), N = x.shape, weight.shape[0]
    y, z = x.new_empty(M, N), x.new_empty((M, N) if with_z else 0)
    if not y.numel():
        return y, z
    tf32 = is_tf32(x)
    few = M <= FEW
    row = chosen("linear_gelu_fwd", x, (N, K, int(few), int(tf32)), _tile(x, tf32, few))
    block_m, block_n, block_k, warps, stages = row
    # Few rows take microseconds, which the host needs for the descriptors.
    descriptors = not few and _has_descriptors(x) and _is_describable(x) and _is_describable(weight)
    with on_device_of(x):
        _linear_gelu_fwd[(cdiv(M, block_m) * cdiv(N, block_n),)](
            TensorDescriptor(x, x.shape, x.stride(), [block_m, block_k]) if descriptors else x,
            TensorDescriptor(weight, weight.shape, weight.stride(), [block_n, block_k])
            if descriptors
            else weight,
            bias,
            y,
            z if with_z else None,
            M,
            N,
            K,
            *x.stride(),
            *weight.stride(),
            tanh,
            descriptors,
            K % block_k == 0,
            "tf32" if tf32 else "ieee",
            block_m,
            block_n,
            block_k,
            num_warps=warps,
            num_stages=stages,
        )
    return y, z


def linear_gelu_bwd(grad: Tensor, z: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    """dz and dbias."""
    return bias_gelu_bwd(grad, z, None, tanh)


def _tile(x: Tensor, tf32: bool, few: bool) -> Tile:
    device = capability(x)
    if device is None:
        return INTERPRETED
    if x.dtype == torch.float32:
        return (TF32 if tf32 else FP32)[few]
    return {9: HOPPER, 10: BLACKWELL, 12: SM120}.get(device[0], AMPERE)[few]


def _has_descriptors(x: Tensor) -> bool:
    device = capability(x)
    return device is None or device[0] in (9, 10)  # 12, of workstations, spills by them


def _is_describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can stand for a matrix: whole rows, all of them at multiples of 16 bytes."""
    row, column = x.stride()
    aligned = row * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    return column == 1 and row > 0 and aligned and x.shape[1] > 0
