"""Rotary position embedding of queries and keys; the backward is the same kernel with -sin.

    (x_i, x_j) → (x_i cos_p - x_j sin_p, x_j cos_p + x_i sin_p)     for pair p of the first PAIRS · 2 channels

Pair p has the channels p and p + PAIRS, or 2p and 2p + 1 (INTERLEAVED). Shapes: q (B, H, T, D) and k (B, Hk, T, D), of
any strides but the last, cos and sin (T, PAIRS) or (B, T, PAIRS), results (B, T, heads, D). A program has one position
of one entry of the batch: it reads cos and sin once, and loops over the heads of q, then of k. The arithmetic is fp32.
Moved per element: one read and one write.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .checks import rows_contiguous
from .common import cdiv, next_power_of_2, on_device_of
from .tuned import chosen

HEADS = (16,)  # heads of a step of the loop


@triton.jit
def _rotate_heads(
    p_x, p_y, heads, s_h, D, b_cos, b_sin, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, REST: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Rotate all heads of one position. p_x and p_y: its first head."""
    o_p = tl.arange(0, BLOCK_P)
    for start in range(0, heads, BLOCK_H):
        o_h = (start + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]
        m_h = o_h < heads
        m = m_h
        if PAIRS < BLOCK_P:
            m = m_h & (o_p < PAIRS)[None, :]
        if INTERLEAVED:
            o_c = tl.arange(0, 2 * BLOCK_P)
            m_c = m_h
            if PAIRS < BLOCK_P:
                m_c = m_h & (o_c < 2 * PAIRS)[None, :]
            b_x = tl.load(p_x + o_h * s_h + o_c[None, :], mask=m_c).to(tl.float32)  # [BLOCK_H, 2 BLOCK_P]
            b_a, b_b = tl.split(tl.reshape(b_x, (BLOCK_H, BLOCK_P, 2)))
            b_y = tl.join(b_a * b_cos - b_b * b_sin, b_b * b_cos + b_a * b_sin)
            b_y = tl.reshape(b_y, (BLOCK_H, 2 * BLOCK_P))
            tl.store(p_y + o_h * D + o_c[None, :], b_y.to(p_y.dtype.element_ty), mask=m_c)
        else:
            p_a, p_out = p_x + o_h * s_h + o_p[None, :], p_y + o_h * D + o_p[None, :]
            b_a = tl.load(p_a, mask=m).to(tl.float32)  # [BLOCK_H, BLOCK_P]
            b_b = tl.load(p_a + PAIRS, mask=m).to(tl.float32)  # [BLOCK_H, BLOCK_P]
            tl.store(p_out, (b_a * b_cos - b_b * b_sin).to(p_y.dtype.element_ty), mask=m)
            tl.store(p_out + PAIRS, (b_b * b_cos + b_a * b_sin).to(p_y.dtype.element_ty), mask=m)
        if REST:  # channels that are copied, rounded up to a power of 2
            o_r = 2 * PAIRS + tl.arange(0, REST)
            m_r = m_h & (o_r < D)[None, :]
            b_r = tl.load(p_x + o_h * s_h + o_r[None, :], mask=m_r)
            tl.store(p_y + o_h * D + o_r[None, :], b_r, mask=m_r)


@triton.jit
def _rope_fwd(
    p_q, p_k, p_cos, p_sin, p_yq, p_yk, sign, T, H, Hk, D, s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_cb, s_ct, s_sb, s_st,
    PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, REST: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    i_b, i_t = i // T, i % T
    o_p = tl.arange(0, BLOCK_P)
    m = o_p < PAIRS
    b_cos = tl.load(p_cos + i_b * s_cb + i_t * s_ct + o_p, mask=m).to(tl.float32)[None, :]  # [1, BLOCK_P]
    b_sin = tl.load(p_sin + i_b * s_sb + i_t * s_st + o_p, mask=m).to(tl.float32)[None, :]  # [1, BLOCK_P]
    b_sin *= sign
    _rotate_heads(
        p_q + i_b * s_qb + i_t * s_qt, p_yq + i * H * D, H, s_qh, D, b_cos, b_sin, PAIRS, INTERLEAVED, REST,
        BLOCK_H, BLOCK_P,
    )  # fmt: skip
    _rotate_heads(
        p_k + i_b * s_kb + i_t * s_kt, p_yk + i * Hk * D, Hk, s_kh, D, b_cos, b_sin, PAIRS, INTERLEAVED, REST,
        BLOCK_H, BLOCK_P,
    )  # fmt: skip


def rope_fwd(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    rows_contiguous("rope_fwd_triton", q=q, k=k, cos=cos, sin=sin)
    return _rotated(q, k, cos, sin, interleaved, 1.0)


def rope_bwd(
    grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Return dq and dk."""
    rows_contiguous("rope_bwd_triton", grad_q=grad_q, grad_k=grad_k, cos=cos, sin=sin)
    return _rotated(grad_q, grad_k, cos, sin, interleaved, -1.0)


def _rotated(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, sign: float
) -> tuple[Tensor, Tensor]:
    (batch, heads, length, size), kv_heads, pairs = q.shape, k.shape[1], cos.shape[-1]
    q_out = q.new_empty(batch, length, heads, size)
    k_out = q.new_empty(batch, length, kv_heads, size)
    if q_out.numel() or k_out.numel():
        (block_h,) = chosen("rope_fwd", q, (pairs,), HEADS)
        block_p = next_power_of_2(pairs)
        rest = next_power_of_2(size - 2 * pairs) if size > 2 * pairs else 0
        # A thread has eight pairs.
        widest = max(block_p, rest // 2)
        warps = min(next_power_of_2(cdiv(block_h * widest, 256)), 8)
        q_strides, k_strides = q.stride()[:3], k.stride()[:3]
        cos_strides, sin_strides = (
            (0, *t.stride())[-3:-1] if t.dim() == 2 else t.stride()[:2] for t in (cos, sin)
        )
        with on_device_of(q):
            _rope_fwd[(batch * length,)](
                q, k, cos, sin, q_out, k_out, sign, length, heads, kv_heads, size, *q_strides, *k_strides,
                *cos_strides, *sin_strides, pairs, interleaved, rest, block_h, block_p, num_warps=warps,
            )  # fmt: skip
    return q_out.transpose(1, 2), k_out.transpose(1, 2)
