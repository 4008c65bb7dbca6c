"""Softmax cross-entropy over rows of logits, with everything that is a function of one row.

    x_j = logit_j, or softcap tanh(logit_j / softcap);   lse = log sum_j exp x_j;   p_j = exp(x_j - lse)
    w_j = class weights, or 1;   W = sum_j w_j;   a = (1 - eps) w_y;   b = eps / V   (eps: label smoothing)

    loss = a (lse - x_y) + b (W lse - sum_j w_j x_j) + z lse^2                           0 for an ignored row
    dx_j = grad_loss [(a + b W + 2 z lse) p_j - a [j = y] - b w_j] + grad_lse p_j
           (with a softcap, times 1 - (x_j / softcap)^2)

Shapes: logits (N, V) with any row stride, target (N,) int64, weight (V,) fp32, loss (N,) fp32, lse (N,) fp64.
lse is kept in fp64 and x - lse taken in two steps, so that p keeps its digits where the logits are large; the
loss takes log sum_j exp(x_j - max) and x_y - max apart for the same reason. One program takes one row. Bytes
moved: forward one read of the logits, backward one read and one write; p is recomputed from lse. The forward
reads a row once whatever its length: each lane of the block keeps a running maximum and sum of its own (one
exp an element), and the lanes meet at the end of the row.

Rows of an odd length (V = 50257) start at odd addresses, where a GPU cannot load 16 bytes at a time. So the
block walks an aligned grid that begins up to 15 elements before the row, masked at both ends of the row only.

No target is read through before it has been checked: one outside [0, V) that is not `ignore_index` makes its
row NaN, and stops the kernel under TRITON_DEBUG=1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.common import LOG2E, on_device_of, tanh

ALIGN = tl.constexpr(16)  # elements: 16 bytes at least, in every dtype
LOWEST = tl.constexpr(
    -3.4028234663852886e38
)  # a running maximum that is finite, so that -inf - max is no NaN
BLOCK_V = (
    4096  # with 8 warps 16 elements a thread, two 16-byte loads in 16-bit dtypes; several rows share an SM
)
WARPS = 8


@triton.jit
def _row_start(i_n, stride):
    """The row's offset rounded down to ALIGN, and how many elements before the row that is."""
    start = i_n * stride
    shift = start % ALIGN
    return tl.multiple_of(start - shift, 16), shift.to(tl.int32)


@triton.jit
def _cap(b_x, softcap, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        return softcap * tanh(b_x / softcap)
    else:
        return b_x


@triton.jit
def _check_target(y, ignore_index, V):
    """Whether the row counts, and whether its target is a class."""
    counts = y != ignore_index
    is_class = (y >= 0) & (y < V)
    tl.device_assert(is_class | (y == ignore_index), "cross_entropy: target out of range")
    return counts, is_class


@triton.jit
def _cross_entropy_fwd(
    p_logits,
    p_target,
    p_weight,
    p_weight_sum,
    p_loss,
    p_lse,
    stride,
    V,
    ignore_index,
    eps,
    z_loss,
    softcap,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    o_row, shift = _row_start(i_n, stride)
    o_block = tl.arange(0, BLOCK_V)
    b_max = tl.full((BLOCK_V,), LOWEST, tl.float32)
    b_sum = tl.zeros((BLOCK_V,), tl.float32)
    b_smooth = tl.zeros((BLOCK_V,), tl.float32)  # sum_j w_j (x_j - x_0)
    # x_0, so that a large offset common to the row does not drown the sum.
    origin = _cap(tl.load(p_logits + i_n * stride).to(tl.float32), softcap, SOFTCAP)
    origin = tl.where(tl.abs(origin) < float("inf"), origin, 0.0)
    for start in range(0, V + shift, BLOCK_V):
        o = start + o_block  # [BLOCK_V], of the aligned grid
        p_block = p_logits + o_row + o
        if (start > 0) & (start + BLOCK_V <= V + shift):
            b_x = tl.load(p_block).to(tl.float32)
        else:
            m = (o >= shift) & (o < V + shift)
            b_x = tl.load(p_block, mask=m, other=float("-inf")).to(tl.float32)
        m = (o >= shift) & (o < V + shift)
        if SOFTCAP:
            b_x = tl.where(m, _cap(b_x, softcap, SOFTCAP), float("-inf"))
        # One exp for both cases: the new element is the maximum, or it is not.
        b_e = tl.exp2(-tl.abs(b_x - b_max) * LOG2E)
        b_sum = tl.where(b_x > b_max, b_sum * b_e + 1.0, b_sum + b_e)
        b_max = tl.maximum(b_max, b_x)
        if SMOOTHING:
            if p_weight is not None:
                b_w = tl.load(p_weight + (o - shift), mask=m, other=0.0)  # [BLOCK_V]
                b_smooth += tl.where(m, b_w * (b_x - origin), 0.0)
            else:
                b_smooth += tl.where(m, b_x - origin, 0.0)

    row_max = tl.max(b_max, 0)
    log_sum = tl.log(tl.sum(b_sum * tl.exp(b_max - row_max), 0))
    lse = row_max.to(tl.float64) + log_sum.to(tl.float64)

    y = tl.load(p_target + i_n)
    counts, is_class = _check_target(y, ignore_index, V)
    x_y = tl.load(p_logits + i_n * stride + y, mask=is_class, other=0.0).to(tl.float32)
    x_y = _cap(x_y, softcap, SOFTCAP)
    a = 1.0 - eps
    if p_weight is not None:
        a *= tl.load(p_weight + y, mask=is_class, other=0.0)
    lse_high = lse.to(tl.float32)
    loss = a * (log_sum - (x_y - row_max)) + z_loss * lse_high * lse_high
    if SMOOTHING:
        W = V.to(tl.float32)
        if p_weight is not None:
            W = tl.load(p_weight_sum)
        loss += eps / V * (W * (lse - origin).to(tl.float32) - tl.sum(b_smooth, 0))
    loss = tl.where(is_class, loss, float("nan"))
    tl.store(p_loss + i_n, tl.where(counts, loss, 0.0))
    tl.store(p_lse + i_n, lse)


@triton.jit
def _cross_entropy_bwd(
    p_grad_loss,
    p_grad_lse,
    p_logits,
    p_target,
    p_lse,
    p_weight,
    p_weight_sum,
    p_dlogits,  # may be p_logits
    stride,
    stride_d,
    V,
    ignore_index,
    eps,
    z_loss,
    softcap,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SAME_STRIDE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    y = tl.load(p_target + i_n)
    counts, is_class = _check_target(y, ignore_index, V)
    lse = tl.load(p_lse + i_n)
    lse_high = lse.to(tl.float32)
    lse_low = (lse - lse_high).to(tl.float32)

    # dx_j = c_p p_j - c_y [j = y] - c_w w_j
    grad = tl.load(p_grad_loss + i_n)
    grad = tl.where(is_class, grad, float("nan"))
    c_y = grad * (1.0 - eps)
    if p_weight is not None:
        c_y *= tl.load(p_weight + y, mask=is_class, other=0.0)
    c_p = c_y + grad * 2.0 * z_loss * lse_high
    c_w = grad * eps / V
    if SMOOTHING:
        W = V.to(tl.float32)
        if p_weight is not None:
            W = tl.load(p_weight_sum)
        c_p += c_w * W
    c_y = tl.where(counts, c_y, 0.0)  # a selection: 0 * inf is no zero
    c_p = tl.where(counts, c_p, 0.0)
    c_w = tl.where(counts, c_w, 0.0)
    if p_grad_lse is not None:
        c_p += tl.load(p_grad_lse + i_n)

    o_row, shift = _row_start(i_n, stride)
    o_row_d = i_n * stride_d - shift
    if SAME_STRIDE:
        o_row_d = o_row  # whose alignment is known
    o_block = tl.arange(0, BLOCK_V)
    for start in range(0, V + shift, BLOCK_V):
        o = start + o_block  # [BLOCK_V], of the aligned grid
        m = (o >= shift) & (o < V + shift)
        is_inner = (start > 0) & (start + BLOCK_V <= V + shift)
        if is_inner:
            b_x = tl.load(p_logits + o_row + o).to(tl.float32)
        else:
            b_x = tl.load(p_logits + o_row + o, mask=m, other=float("-inf")).to(tl.float32)
        b_x = _cap(b_x, softcap, SOFTCAP)
        b_dx = c_p * tl.exp2(((b_x - lse_high) - lse_low) * LOG2E)
        if SMOOTHING:
            if p_weight is not None:
                b_dx -= c_w * tl.load(p_weight + (o - shift), mask=m, other=0.0)
            else:
                b_dx -= c_w
        b_dx = tl.where(o - shift == y, b_dx - c_y, b_dx)
        if SOFTCAP:
            b_t = b_x / softcap
            b_dx *= 1.0 - b_t * b_t
        if p_grad_lse is None:
            b_dx = tl.where(counts, b_dx, 0.0)  # even where the logits are NaN
        b_dx = b_dx.to(p_dlogits.dtype.element_ty)
        if is_inner:
            tl.store(p_dlogits + o_row_d + o, b_dx)
        else:
            tl.store(p_dlogits + o_row_d + o, b_dx, mask=m)


def cross_entropy_fwd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    N, V = logits.shape
    loss = logits.new_empty(N, dtype=torch.float32)
    lse = logits.new_empty(N, dtype=torch.float64)
    if N:
        with on_device_of(logits):
            _cross_entropy_fwd[(N,)](
                logits,
                target,
                weight,
                _weight_sum(weight, label_smoothing),
                loss,
                lse,
                logits.stride(0),
                V,
                ignore_index,
                label_smoothing,
                z_loss,
                softcap,
                label_smoothing != 0.0,
                softcap != 0.0,
                _block(V, label_smoothing, softcap),
                num_warps=WARPS,
            )
    return loss, lse


def cross_entropy_bwd(
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    dlogits = logits.new_empty(logits.shape)
    options = (weight, ignore_index, label_smoothing, z_loss, softcap)
    _launch_bwd(dlogits, grad_loss, grad_lse, logits, target, lse, *options)
    return dlogits


def cross_entropy_bwd_inplace(
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    """Writes the gradient over the logits: each element is read before it is written, by the same thread."""
    options = (weight, ignore_index, label_smoothing, z_loss, softcap)
    _launch_bwd(logits, grad_loss, grad_lse, logits, target, lse, *options)


def _launch_bwd(
    dlogits: Tensor,
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    N, V = logits.shape
    if not logits.numel():
        return
    with on_device_of(logits):
        _cross_entropy_bwd[(N,)](
            grad_loss,
            grad_lse,
            logits,
            target,
            lse,
            weight,
            _weight_sum(weight, label_smoothing),
            dlogits,
            logits.stride(0),
            dlogits.stride(0),
            V,
            ignore_index,
            label_smoothing,
            z_loss,
            softcap,
            label_smoothing != 0.0,
            softcap != 0.0,
            logits.stride(0) == dlogits.stride(0),
            _block(V, label_smoothing, softcap),
            num_warps=WARPS,
        )


def _weight_sum(weight: Tensor | None, label_smoothing: float) -> Tensor | None:
    """W on the device; only label smoothing asks for it."""
    return weight.sum() if weight is not None and label_smoothing != 0.0 else None


def _block(V: int, label_smoothing: float, softcap: float) -> int:
    """A short row is one tile with what comes before it; the options take registers from the tile."""
    block = BLOCK_V // 2 if label_smoothing or softcap else BLOCK_V
    return min(block, triton.next_power_of_2(V + ALIGN.value))
