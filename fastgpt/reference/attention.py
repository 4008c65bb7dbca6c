"""Scaled dot-product attention (Vaswani et al., 2017, arXiv:1706.03762) with every option of the ops."""

from itertools import pairwise

import torch
from torch import Tensor

from .cross_entropy import log_sum_exp
from .philox import dropout_keep
from .precision import accumulator


def band(rows: int, columns: int, lower_right: bool, left: int, right: int, device: torch.device) -> Tensor:
    """Compute the columns that each row attends to: bool (rows, columns).

    Row i stands on the diagonal at column i + offset, where offset is columns - rows if the band is
    aligned to the lower right corner, else 0. It sees `left` columns before and `right` after that
    one; -1 is no bound. Causal attention is right = 0.
    """
    diagonal = torch.arange(rows, device=device)[:, None] + (columns - rows if lower_right else 0)
    column = torch.arange(columns, device=device)[None, :]
    seen = torch.ones(rows, columns, dtype=torch.bool, device=device)
    if left >= 0:
        seen &= column >= diagonal - left
    if right >= 0:
        seen &= column <= diagonal + right
    return seen


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    sinks: Tensor | None = None,
    scale: float,
    lower_right: bool = True,
    left: int = -1,
    right: int = -1,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    first_batch: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention and the log-sum-exp of its scores.

        s = scale·q·kᵀ;  s = c·tanh(s/c) with a softcap c;  s -= slope·|i + offset - j| with ALiBi;  s += mask
        out = dropout(softmax(s))·v;  with a sink, softmax([s, sink]) without its last column

    Args:
        q: (B, H, Lq, D).
        k: (B, Hk, Lk, D); query head h reads key head h // (H/Hk).
        v: (B, Hk, Lk, Dv).
        attn_mask: broadcastable to (B, H, Lq, Lk); bool (True takes part) or floating (added).
        alibi_slopes: (H,) or (B, H) (Press et al., arXiv:2108.12409).
        seed: one int64, the key of the dropout mask (`dropout_keep`).
        sinks: (H,), the scores of a column that every row sees and that has no value; finite, or -inf for none.
        left, right, lower_right: see `band`.
        first_batch: what the dropout mask takes for the first batch entry's number.

    Returns:
        out (B, H, Lq, Dv) in q's dtype and lse (B, H, Lq) in float32 (float64 for float64). A row
        that sees nothing is 0, its lse is -inf, or its sink, and its gradients are 0.
    """
    batch, heads, rows, _ = q.shape
    columns, group = k.shape[2], heads // max(k.shape[1], 1)
    acc = accumulator(q.dtype)
    k, v = (t.to(acc).repeat_interleave(group, dim=1) if group != 1 else t.to(acc) for t in (k, v))

    s = scale * (q.to(acc) @ k.transpose(-1, -2))
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        diagonal = torch.arange(rows, device=q.device)[:, None] + (columns - rows if lower_right else 0)
        distance = (diagonal - torch.arange(columns, device=q.device)).abs()
        s = s - alibi_slopes.to(acc).view(-1, heads, 1, 1) * distance
    s = s.masked_fill(~band(rows, columns, lower_right, left, right, q.device), -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        s = s.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        s = s + attn_mask.to(acc)
    if sinks is not None:
        s = torch.cat((s, sinks.to(acc).view(-1, 1, 1).expand(batch, heads, rows, 1)), dim=-1)

    # A row that sees nothing would be 0/0: it is computed as if it saw everything, then erased.
    sees = (s != -torch.inf).any(dim=-1, keepdim=True)
    s = torch.where(sees, s, 0)
    lse = torch.where(sees, log_sum_exp(s)[..., None], -torch.inf)
    p = torch.softmax(s, dim=-1)[..., :columns] * sees
    if dropout_p > 0:
        assert seed is not None
        keep = dropout_keep(seed, dropout_p, (batch, heads, rows, columns), first_batch)
        p = p * keep * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
    return (p @ v).to(q.dtype), lse.squeeze(-1)


def check_documents(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    """Raises ValueError where bounds on the CPU do not ascend from 0 within the tensors."""
    for name, cu, total in (("q", cu_seqlens_q, q.shape[0]), ("k", cu_seqlens_k, k.shape[0])):
        starts = cu.tolist() if cu.device.type == "cpu" else [0, 0]
        if starts[0] != 0 or starts[-1] > total or any(a > b for a, b in pairwise(starts)):
            raise ValueError(f"cu_seqlens_{name} must ascend from 0 to at most {total}, got {starts}")


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    sinks: Tensor | None = None,
    **options: float,
) -> tuple[Tensor, Tensor]:
    """Compute attention over packed documents; rows attend within their document only.

    Args:
        q: (total_q, H, D); document n holds rows cu_seqlens_q[n] to cu_seqlens_q[n+1].
        k, v: (total_k, Hk, D) and (total_k, Hk, Dv), by cu_seqlens_k.
        alibi_slopes: (H,) or (documents, H).
        sinks: (H,), of every document.
        options: as `attention`; the dropout mask of document n is that of batch entry n.

    Returns:
        out (total_q, H, Dv) and lse (H, total_q). Rows past the last document are 0 (lse -inf, or the sink).

    Raises:
        ValueError: the document bounds do not ascend from 0 within the tensors.
    """
    check_documents(q, k, cu_seqlens_q.cpu(), cu_seqlens_k.cpu())
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    heads, documents = q.shape[1], len(starts_q) - 1
    outs, lses = [], []
    for n in range(documents):
        rows, columns = slice(*starts_q[n : n + 2]), slice(*starts_k[n : n + 2])
        qn, kn, vn = (t.transpose(0, 1).unsqueeze(0) for t in (q[rows], k[columns], v[columns]))
        slopes = alibi_slopes[n] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        out, lse = attention(qn, kn, vn, None, slopes, seed, sinks=sinks, first_batch=n, **options)  # type: ignore[arg-type]
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    rest = q.shape[0] - starts_q[-1]
    outs.append(q.new_zeros(rest, heads, v.shape[2]))
    of_rest = q.new_full((heads,), -torch.inf) if sinks is None else sinks
    lses.append(of_rest.to(accumulator(q.dtype))[:, None].expand(heads, rest))
    return torch.cat(outs), torch.cat(lses, dim=1)
