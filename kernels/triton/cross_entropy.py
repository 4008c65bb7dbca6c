"""Softmax cross-entropy over rows of logits, with smoothing, class weights, z-loss, a softcap and a scale k.

    x_j = softcap tanh(k logit_j / softcap), e = 1 with a softcap;   x_j = logit_j, e = k without
    m = max_j x_j;   s = sum_j exp(e (x_j - m));   lse = e m + log s;   p_j = exp(e (x_j - m)) / s
    w_j = class weights, or 1;   W = sum_j w_j;   a = (1 - eps) w_y;   b = eps / V   (eps: label smoothing)

    loss = a (log s + e (m - x_y)) + b (W log s + e sum_j w_j (m - x_j)) + z lse^2       0 for an ignored row
    dlogit_j = k (grad_loss [(a + b W + 2 z lse) p_j - a [j = y] - b w_j] + grad_lse p_j)
               (with a softcap, times 1 - (x_j / softcap)^2)

Shapes: logits (N, V) with any row stride, target (N,) int64, weight (V,) fp32, loss (N,) fp32, statistics (N, 2) fp32:
m and s. They are two numbers, because the sum lse would lose log s beside a large m. All terms of sum_j w_j (m - x_j)
have one sign, so that none cancels. The scale multiplies differences of logits, never a logit: e x_j - e m, contracted
to one fma, would compare an exact product with a rounded one. It is part of the factor of the base-2 exponentials, and
costs no instruction. A term that an option of 0 switches off is not computed: a class weight may be infinite, and 0 inf
is NaN.

One program takes one row. Bytes moved: the forward reads the logits once, the backward reads and writes them once and
recomputes p from m and s. The forward reads a row once whatever its length: each lane of the block, 16 bytes wide,
keeps its own running maximum and sum (one exp per element and one for the rescaling), and the lanes are merged at the
end of the row.

Rows of an odd length (V = 50257) start at odd addresses, where a GPU cannot load 16 bytes at a time. So the block walks
over an aligned grid that begins up to 15 elements before the row, with a mask only at both ends of the row.

A target outside [0, V) other than `ignore_index` is never an index: its row is NaN; TRITON_DEBUG=1 stops the kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import contiguous, rows_contiguous
from .common import LOG2E, next_power_of_2, on_device_of, tanh
from .tuned import chosen

ALIGN = tl.constexpr(16)  # elements: 16 bytes at least, in every dtype
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the initial maximum; with -inf, -inf - maximum would be NaN
# (BLOCK_V, warps) on every architecture. 16 elements a thread are two 16-byte loads in 16-bit dtypes. At least four
# programs fit into a multiprocessor, so that 32 KiB are in flight: more than latency times bandwidth (for the fastest,
# B200, 800 cycles of 29 bytes are 23 KiB). Options need registers, so that their tile is smaller.
TILE = (4096, 8)
TILE_OF_OPTIONS = (2048, 8)


@triton.jit
def _row_start(i_n, stride):
    """Return the row's offset rounded down to ALIGN, and by how many elements it was rounded."""
    start = i_n * stride
    shift = start % ALIGN
    return tl.multiple_of(start - shift, 16), shift.to(tl.int32)


@triton.jit
def _cap(b_x, softcap, logit_scale, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        factor = 1.0
        if logit_scale is not None:
            factor = logit_scale
        return softcap * tanh(b_x * (factor / softcap))
    else:
        return b_x


@triton.jit
def _exponent_scale(logit_scale, SOFTCAP: tl.constexpr):
    """Return e, the factor of x - m; `logit_scale` is None for 1."""
    if SOFTCAP or logit_scale is None:
        return 1.0
    else:
        return logit_scale


@triton.jit
def _check_target(y, ignore_index, V):
    """Return whether the row counts, and whether its target is a class."""
    counts = y != ignore_index
    is_class = (y >= 0) & (y < V)
    tl.device_assert(is_class | (y == ignore_index), "cross_entropy: target out of range")
    return counts, is_class


@triton.jit
def _load(p_tile, o, m, other, EDGE: tl.constexpr):
    """Load a tile of the aligned grid in fp32; `other` outside the row.  # [BLOCK_V]"""
    if EDGE:
        return tl.load(p_tile + o, mask=m, other=other).to(tl.float32)
    else:
        return tl.load(p_tile + o).to(tl.float32)


@triton.jit
def _accumulate(
    b_max, b_sum, b_smooth, b_w, p_row, p_weight, start, shift, end, softcap, logit_scale,
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, EDGE: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Add a tile to the lanes' maxima and to their sums of exp(x - maximum), w (maximum - x) and w.

    A lane takes GROUP neighbouring elements, which a thread loads at once. Their maximum is taken first, so that the
    sum is rescaled once per group, and an element costs one exponential and four other instructions.
    """
    rate = _exponent_scale(logit_scale, SOFTCAP) * LOG2E
    o = tl.arange(0, BLOCK_V)  # [BLOCK_V]
    m = (o >= shift - start) & (o < end - start)
    b_x = _load(p_row + start, o, m, float("-inf"), EDGE)
    if SOFTCAP:
        b_x = _cap(b_x, softcap, logit_scale, SOFTCAP)
        if EDGE:
            b_x = tl.where(m, b_x, float("-inf"))
    b_group = b_x.reshape(BLOCK_V // GROUP, GROUP)
    b_new = tl.maximum(b_max, tl.max(b_group, 1))  # [BLOCK_V / GROUP]
    b_e = tl.exp2((b_group - b_new[:, None]) * rate)
    b_sum = b_sum * tl.exp2((b_max - b_new) * rate) + tl.sum(b_e, 1)
    if SMOOTHING:
        b_term = (b_new[:, None] - b_group).reshape(BLOCK_V)
        b_weight = tl.full((BLOCK_V,), 1.0, tl.float32)
        if p_weight is not None:
            b_weight = _load(p_weight + (start - shift), o, m, 0.0, EDGE)
            b_term *= b_weight
        if EDGE:
            b_term = tl.where(m, b_term, 0.0)
            b_weight = tl.where(m, b_weight, 0.0)
        b_smooth += _raise_maximum(b_w, b_max, b_new) + tl.sum(b_term.reshape(BLOCK_V // GROUP, GROUP), 1)
        b_w += tl.sum(b_weight.reshape(BLOCK_V // GROUP, GROUP), 1)
    return b_new, b_sum, b_smooth, b_w


@triton.jit
def _raise_maximum(b_w, b_max, b_new):
    """Return what a new maximum adds to the sums of w (maximum - x); 0 in lanes without an x (maximum LOWEST)."""
    return tl.where(b_w == 0.0, 0.0, b_w * (b_new - b_max))


@triton.jit
def _cross_entropy_fwd(
    p_logits, p_target, p_weight, p_weight_sum, p_loss, p_statistics,
    stride, V, ignore_index, eps, z_loss, softcap, logit_scale,
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    o_row, shift = _row_start(i_n, stride)
    p_row = p_logits + o_row
    end = V + shift
    b_max = tl.full((BLOCK_V // GROUP,), LOWEST, tl.float32)
    b_sum = tl.zeros((BLOCK_V // GROUP,), tl.float32)
    b_smooth = tl.zeros((BLOCK_V // GROUP,), tl.float32)
    b_w = tl.zeros((BLOCK_V // GROUP,), tl.float32)
    b_max, b_sum, b_smooth, b_w = _accumulate(
        b_max, b_sum, b_smooth, b_w, p_row, p_weight, 0, shift, end, softcap, logit_scale,
        SMOOTHING, SOFTCAP, True, BLOCK_V, GROUP,
    )  # fmt: skip
    whole = end // BLOCK_V * BLOCK_V
    for start in range(BLOCK_V, whole, BLOCK_V):
        b_max, b_sum, b_smooth, b_w = _accumulate(
            b_max, b_sum, b_smooth, b_w, p_row, p_weight, start, shift, end, softcap, logit_scale,
            SMOOTHING, SOFTCAP, False, BLOCK_V, GROUP,
        )  # fmt: skip
    for start in range(tl.maximum(whole, BLOCK_V), end, BLOCK_V):  # 0 or 1 times
        b_max, b_sum, b_smooth, b_w = _accumulate(
            b_max, b_sum, b_smooth, b_w, p_row, p_weight, start, shift, end, softcap, logit_scale,
            SMOOTHING, SOFTCAP, True, BLOCK_V, GROUP,
        )  # fmt: skip

    e = _exponent_scale(logit_scale, SOFTCAP)
    row_max = tl.max(b_max, 0)
    row_sum = tl.sum(b_sum * tl.exp2((b_max - row_max) * (e * LOG2E)), 0)
    log_sum = tl.log(row_sum)

    y = tl.load(p_target + i_n)
    counts, is_class = _check_target(y, ignore_index, V)
    x_y = tl.load(p_logits + i_n * stride + y, mask=is_class, other=0.0).to(tl.float32)
    x_y = _cap(x_y, softcap, logit_scale, SOFTCAP)
    a = 1.0 - eps
    if p_weight is not None:
        a *= tl.load(p_weight + y, mask=is_class, other=0.0)
    loss = a * (log_sum - e * (x_y - row_max))
    lse = e * row_max + log_sum
    loss += tl.where(z_loss == 0.0, 0.0, z_loss * lse * lse)
    if SMOOTHING:
        W = tl.cast(V, tl.float32)  # V = 1 is a Python constant here
        if p_weight is not None:
            W = tl.load(p_weight_sum)
        smooth = W * log_sum + e * tl.sum(b_smooth + _raise_maximum(b_w, b_max, row_max), 0)
        loss += eps / V * tl.where(tl.abs(W) == float("inf"), W, smooth)
    loss = tl.where(is_class, loss, float("nan"))
    tl.store(p_loss + i_n, tl.where(counts, loss, 0.0))
    tl.store(p_statistics + 2 * i_n, row_max)
    tl.store(p_statistics + 2 * i_n + 1, row_sum)


@triton.jit
def _gradient(
    p_row, p_row_d, p_weight, start, shift, end, y, counts, row_max, c_p, c_y, c_w, softcap, logit_scale,
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, EDGE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Store c_p exp(e (x_j - m)) - c_y [j = y] - c_w w_j of a tile; y, start and end count on the aligned grid."""
    rate = _exponent_scale(logit_scale, SOFTCAP) * LOG2E
    o = tl.arange(0, BLOCK_V)  # [BLOCK_V]
    m = (o >= shift - start) & (o < end - start)
    b_x = _cap(_load(p_row + start, o, m, float("-inf"), EDGE), softcap, logit_scale, SOFTCAP)
    b_dx = c_p * tl.exp2((b_x - row_max) * rate)
    if SMOOTHING:
        if p_weight is not None:
            b_dx -= c_w * _load(p_weight + (start - shift), o, m, 0.0, EDGE)
        else:
            b_dx -= c_w
    b_dx = tl.where(o == y - start, b_dx - c_y, b_dx)
    if SOFTCAP:
        b_t = b_x * (1.0 / softcap)
        b_dx *= 1.0 - b_t * b_t
    b_dx = tl.where(counts, b_dx, 0.0).to(p_row_d.dtype.element_ty)  # even where the logits are NaN
    if EDGE:
        tl.store(p_row_d + start + o, b_dx, mask=m)
    else:
        tl.store(p_row_d + start + o, b_dx)


@triton.jit
def _cross_entropy_bwd(
    p_grad_loss, p_grad_lse, p_logits, p_target, p_statistics, p_weight, p_weight_sum,
    p_dlogits,  # may be p_logits
    stride, stride_d, V, ignore_index, eps, z_loss, softcap, logit_scale,
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, SAME_STRIDE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    y = tl.load(p_target + i_n)
    counts, is_class = _check_target(y, ignore_index, V)
    row_max = tl.load(p_statistics + 2 * i_n)
    row_sum = tl.load(p_statistics + 2 * i_n + 1)
    e = _exponent_scale(logit_scale, SOFTCAP)

    # dlogit_j = c_p exp(e (x_j - m)) - c_y [j = y] - c_w w_j
    grad = tl.load(p_grad_loss + i_n)
    grad = tl.where(is_class, grad, float("nan"))
    c_y = grad * (1.0 - eps)
    if p_weight is not None:
        c_y *= tl.load(p_weight + y, mask=is_class, other=0.0)
    c_p = c_y + tl.where(z_loss == 0.0, 0.0, grad * 2.0 * z_loss * (e * row_max + tl.log(row_sum)))
    c_w = grad * eps / V
    if SMOOTHING:
        W = tl.cast(V, tl.float32)  # V = 1 is a Python constant here
        if p_weight is not None:
            W = tl.load(p_weight_sum)
        c_p += c_w * W
    c_y = tl.where(counts, c_y, 0.0)  # not a product: 0 * inf is NaN
    c_p = tl.where(counts, c_p, 0.0)
    c_w = tl.where(counts, c_w, 0.0)
    if p_grad_lse is not None:
        c_p += tl.load(p_grad_lse + i_n)
        counts = counts | True  # every row has a gradient then
    c_p /= row_sum
    if logit_scale is not None:
        c_p *= logit_scale
        c_y *= logit_scale
        c_w *= logit_scale

    o_row, shift = _row_start(i_n, stride)
    o_row_d = i_n * stride_d - shift
    if SAME_STRIDE:
        o_row_d = o_row  # its alignment is known to the compiler
    p_row = p_logits + o_row
    p_row_d = p_dlogits + o_row_d
    end = V + shift
    y_shifted = (y + shift).to(tl.int32)
    whole = end // BLOCK_V * BLOCK_V
    _gradient(
        p_row, p_row_d, p_weight, 0, shift, end, y_shifted, counts, row_max, c_p, c_y, c_w, softcap, logit_scale,
        SMOOTHING, SOFTCAP, True, BLOCK_V,
    )  # fmt: skip
    for start in range(BLOCK_V, whole, BLOCK_V):
        _gradient(
            p_row, p_row_d, p_weight, start, shift, end, y_shifted, counts, row_max, c_p, c_y, c_w, softcap,
            logit_scale, SMOOTHING, SOFTCAP, False, BLOCK_V,
        )  # fmt: skip
    for start in range(tl.maximum(whole, BLOCK_V), end, BLOCK_V):  # 0 or 1 times
        _gradient(
            p_row, p_row_d, p_weight, start, shift, end, y_shifted, counts, row_max, c_p, c_y, c_w, softcap,
            logit_scale, SMOOTHING, SOFTCAP, True, BLOCK_V,
        )  # fmt: skip


class LossOptions(NamedTuple):
    """The options in the ops' schemas that all launchers have in common.

    Attributes:
        weight: (V,), fp32: of the classes.
    """

    weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    logit_scale: float

    def weight_sum(self) -> Tensor | None:
        """Return W on the device; None without label smoothing, which alone needs it."""
        return self.weight.sum() if self.weight is not None and self.label_smoothing != 0.0 else None

    def arguments(self) -> tuple[int, float, float, float, float | None, bool, bool]:
        """Return the kernels' arguments from ignore_index to SOFTCAP. A scale of 1 is none, and compiles to nothing."""
        scale = None if self.logit_scale == 1.0 else self.logit_scale
        return *self[1:-1], scale, self.label_smoothing != 0.0, self.softcap != 0.0

    def tile(self, kernel: str, logits: Tensor) -> tuple[int, int]:
        """Choose (BLOCK_V, warps). A short row is one tile, together with the elements before it."""
        V, options = logits.shape[1], self.label_smoothing != 0.0 or self.softcap != 0.0
        block, warps = chosen(kernel, logits, (V, int(options)), TILE_OF_OPTIONS if options else TILE)
        return min(block, next_power_of_2(V + ALIGN.value)), warps


def cross_entropy_fwd(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Return loss and statistics.

    Args:
        options: the fields of LossOptions.
    """
    rows_contiguous("cross_entropy_fwd_triton", logits=logits)
    o = LossOptions(*options)
    contiguous("cross_entropy_fwd_triton", target=target, weight=o.weight)
    N, V = logits.shape
    loss = logits.new_empty(N, dtype=torch.float32)
    statistics = logits.new_empty(N, 2, dtype=torch.float32)
    if not V:  # the sum has no terms, and no target is a class
        loss.copy_(torch.where(target == o.ignore_index, 0.0, torch.nan))
        statistics.zero_()
    elif N:
        block, warps = o.tile("cross_entropy_fwd", logits)
        with on_device_of(logits):
            _cross_entropy_fwd[(N,)](
                logits,
                target,
                o.weight,
                o.weight_sum(),
                loss,
                statistics,
                logits.stride(0),
                V,
                *o.arguments(),
                block,
                16 // logits.element_size(),
                num_warps=warps,
            )
    return loss, statistics


def cross_entropy_bwd(
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    statistics: Tensor,
    *options: Any,
) -> Tensor:
    """Return the gradient of the logits; `options` as in `cross_entropy_fwd`."""
    dlogits = logits.new_empty(logits.shape)
    _launch_bwd(dlogits, grad_loss, grad_lse, logits, target, statistics, LossOptions(*options))
    return dlogits


def cross_entropy_bwd_inplace(
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    statistics: Tensor,
    *options: Any,
) -> None:
    """Write the gradient over the logits: the thread that writes an element has read it before."""
    _launch_bwd(logits, grad_loss, grad_lse, logits, target, statistics, LossOptions(*options))


def cross_entropy_with_grad_inplace(logits: Tensor, target: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return loss and statistics, and write the gradient of loss.sum() over the logits.

    Args:
        arguments: the fields of LossOptions, and a size in bytes that only the CUDA kernel uses.
    """
    *options, _ = arguments
    loss, statistics = cross_entropy_fwd(logits, target, *options)
    _launch_bwd(logits, torch.ones_like(loss), None, logits, target, statistics, LossOptions(*options))
    return loss, statistics


def _launch_bwd(
    dlogits: Tensor,
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    statistics: Tensor,
    o: LossOptions,
) -> None:
    op = "cross_entropy_bwd_triton"
    rows_contiguous(op, logits=logits)
    contiguous(op, grad_loss=grad_loss, grad_lse=grad_lse, target=target)
    contiguous(op, statistics=statistics, weight=o.weight)
    N, V = logits.shape
    if not logits.numel():
        return
    block, warps = o.tile("cross_entropy_bwd", logits)
    with on_device_of(logits):
        _cross_entropy_bwd[(N,)](
            grad_loss,
            grad_lse,
            logits,
            target,
            statistics,
            o.weight,
            o.weight_sum(),
            dlogits,
            logits.stride(0),
            dlogits.stride(0),
            V,
            *o.arguments(),
            logits.stride(0) == dlogits.stride(0),
            block,
            num_warps=warps,
        )
