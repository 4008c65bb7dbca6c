"""A linear layer and GELU: one matrix product with the activation in its epilogue.

    z = x weight^T + bias,   y = gelu(z)                                    forward: one kernel
    dz = dy gelu'(z),   dbias = sum_i dz_i                                  backward: `gelu.bias_gelu_bwd`, then
    dx = dz weight,   dweight = dz^T x                                      PyTorch's products

Shapes: x (M, K), weight (N, K) of any strides, bias (N,), y, z (M, N) contiguous. Sums and activation are fp32; y and z
are each rounded once, from the same sum. z is written only if the backward will need it.

Bytes: the forward reads x and weight and writes y and z. A product followed by an elementwise kernel would write z,
read it and write y: half as much again.

The backward computes dz in an elementwise kernel, not in the prologue of the product dx = dz weight. A tile of 128
columns of dx has 256 FLOPs for each element of dz, 0.06 cycles of a Hopper multiprocessor. Every such tile would
recompute dz: 17 fp32 instructions, 0.13 cycles, and exponentials and roots for as long, so that the product would run
at less than half its speed. dweight needs dz as well, so that dz is written in any case. A prologue would save one of
five reads and writes of (M, N), 0.1 cycles per element, where the products take K / 1024 cycles. The elementwise kernel
also sums dbias, in a fixed order and without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .checks import contiguous
from .common import capability, cdiv, is_tf32, on_device_of
from .gelu import bias_gelu_bwd, gelu
from .tuned import chosen

# (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages): first for many rows, then for at most FEW_ROWS. Few rows are bound by
# reading weight, and narrow tiles give enough programs to read it. `python -m bench resources` shows the registers and
# shared memory of each.
Tile = tuple[int, int, int, int, int]
FEW_ROWS = 64
# Two programs fit into a multiprocessor: the tensor cores multiply for one while the other is in its epilogue, which
# at K = 768 takes as long. With 128 × 256 (194 registers, 147 KiB) only one would fit.
HOPPER = ((128, 128, 64, 8, 3), (64, 32, 64, 4, 4))
BLACKWELL = HOPPER  # likewise; the accumulators of two programs fill half of the tensor memory
AMPERE = ((128, 128, 32, 8, 4), (64, 32, 64, 4, 4))  # and every other GPU: 48 KiB, so that two fit into 99
SM120 = ((128, 64, 32, 8, 4), (64, 32, 64, 4, 4))  # here the epilogue of AMPERE's tile takes 142 registers
TF32 = ((128, 64, 32, 8, 3), (64, 32, 32, 4, 3))  # elements of twice the size: half the columns
FP32 = ((64, 64, 16, 8, 2), (64, 64, 16, 8, 2))  # no tensor core multiplies IEEE fp32: operands in registers
INTERPRETED: Tile = (32, 16, 16, 4, 1)  # small, so that tests reach the edges of tiles
GROUP_M = tl.constexpr(8)  # rows of tiles that run together and share their columns of weight in the L2 cache


@triton.jit
def _tile_of(i, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return row and column of tile i: down the rows of a group of GROUP_M, then on to the next column."""
    columns = tl.cdiv(N, BLOCK_N)
    first = i // (GROUP_M * columns) * GROUP_M
    rows = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP_M)
    i = i % (GROUP_M * columns)
    return first + i % rows, i // rows


@triton.jit
def _epilogue(b_z, p_bias, p_y, p_z, o_m, o_n, M, N, TANH: tl.constexpr):
    """Add the bias to z, and store z and gelu(z)."""
    if p_bias is not None:
        b_z += tl.load(p_bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    o = o_m[:, None] * N + o_n[None, :]
    m = (o_m < M)[:, None] & (o_n < N)[None, :]
    if p_z is not None:
        tl.store(p_z + o, b_z.to(p_z.dtype.element_ty), mask=m)
    tl.store(p_y + o, gelu(b_z, TANH).to(p_y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["M"])
def _linear_gelu_fwd(
    p_x,  # if DESCRIPTORS, p_x and p_weight are tensor descriptors
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
        # Rows beyond the edge wrap around, which needs no mask; their results are not stored.
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
    # In halves: the epilogue then takes half the registers, and two programs fit into a multiprocessor.
    b_left, b_right = tl.split(b_z.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1))
    o_half = i_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    _epilogue(b_left, p_bias, p_y, p_z, o_m, o_half, M, N, TANH)
    _epilogue(b_right, p_bias, p_y, p_z, o_m, o_half + BLOCK_N // 2, M, N, TANH)


def linear_gelu_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, tanh: bool, with_z: bool
) -> tuple[Tensor, Tensor]:
    """Return y and, if `with_z`, the pre-activation z; else z is empty."""
    contiguous("linear_gelu_fwd_triton", bias=bias)
    (M, K), N = x.shape, weight.shape[0]
    y, z = x.new_empty(M, N), x.new_empty((M, N) if with_z else 0)
    if not y.numel():
        return y, z
    tf32 = is_tf32(x)
    few = M <= FEW_ROWS
    row = chosen("linear_gelu_fwd", x, (N, K, int(few), int(tf32)), _tile(x, tf32, few))
    block_m, block_n, block_k, warps, stages = row
    # With few rows the kernel takes microseconds, less than the host takes to make the descriptors.
    descriptors = not few and _has_descriptors(x) and _fits_descriptor(x) and _fits_descriptor(weight)
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
    """Return dz and dbias."""
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
    return device is None or device[0] in (9, 10)  # with descriptors, 12 (workstations) spills


def _fits_descriptor(x: Tensor) -> bool:
    """Return whether the rows of a matrix are contiguous and begin at multiples of 16 bytes."""
    row, column = x.stride()
    aligned = row * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    return column == 1 and row > 0 and aligned and x.shape[1] > 0
