"""Attention without a kernel, by which the tests of both attention ops measure."""

import torch

from fastgpt.reference import dropout_keep


def composed(q, k, v, *, scale=None, causal="none", window=None, softcap=None, alibi_slopes=None, attn_mask=None,
             sinks=None, dropout_p=0.0, seed=None, first_batch=0):  # fmt: skip
    """`ops.attention` out of elementary PyTorch operations, all in the inputs' dtype."""
    heads, rows, columns = q.shape[1], q.shape[2], k.shape[2]
    k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
    s = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    diagonal = torch.arange(rows)[:, None] + (0 if causal == "upper_left" else columns - rows)
    distance = torch.arange(columns)[None, :] - diagonal
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(s.dtype).view(-1, heads, 1, 1) * distance.abs()
    left, right = (window, window) if isinstance(window, int) else (window or (-1, -1))
    right = right if causal == "none" else 0
    seen = torch.ones(rows, columns, dtype=torch.bool)
    if left >= 0:
        seen = seen & (distance >= -left)
    if right >= 0:
        seen = seen & (distance <= right)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        seen = seen & attn_mask
    elif attn_mask is not None:
        s = s + attn_mask.to(s.dtype)
    s = s.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        s = torch.cat((s, sinks.to(s.dtype).view(-1, 1, 1).expand(*s.shape[:3], 1)), dim=-1)
    blind = (s == -torch.inf).all(dim=-1, keepdim=True)
    p = torch.softmax(s.masked_fill(blind, 0), dim=-1).masked_fill(blind, 0)[..., :columns]
    if dropout_p:
        keep = dropout_keep(torch.tensor([seed]), dropout_p, (q.shape[0], heads, rows, columns), first_batch)
        p = p * keep / (1 - dropout_p) if dropout_p < 1 else p * 0
    return p @ v


def composed_varlen(q, k, v, lengths_q, lengths_k, *, alibi_slopes=None, **options):
    """`ops.attention_varlen` likewise, document by document."""
    outs, row, column = [], 0, 0
    for n, (rows, columns) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        document = (q[row : row + rows], *(t[column : column + columns] for t in (k, v)))
        row, column = row + rows, column + columns
        if alibi_slopes is not None:
            options["alibi_slopes"] = alibi_slopes[n] if alibi_slopes.dim() == 2 else alibi_slopes
        out = composed(*(t.transpose(0, 1).unsqueeze(0) for t in document), first_batch=n, **options)
        outs.append(out[0].transpose(0, 1))
    return torch.cat([*outs, q.new_zeros(q.shape[0] - row, q.shape[1], v.shape[2])])
