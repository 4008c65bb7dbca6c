"""Attention sinks: one logit per head that takes part in each row's softmax and has no value.

    out = attention·sigmoid(lse - s);  log Σ exp = log(exp(lse) + exp(s))

Both follow from the result and the log-sum-exp of attention without sinks, so that the kernels have none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Add sinks to a finished attention, differentiably.

    Args:
        out: (..., L, H, Dv), without sinks.
        lse: (..., H, L), without sinks, in the accumulator's dtype; -inf where a row sees nothing.
        sinks: (H,), floating; -inf for none.

    Returns:
        out with sinks, in the dtype and layout of out, and with return_lse the log-sum-exp with sinks, else None. Of a
        row that sees nothing the first stays 0, with gradients 0, and the second is s.
    """
    s = sinks.to(lse.dtype)[:, None]
    # Neither a column nor a sink: -inf - (-inf) would be NaN.
    nothing = (lse == -torch.inf) & (s == -torch.inf)
    gap = lse.masked_fill(nothing, 0.0) - s
    weight = torch.sigmoid(gap).transpose(-1, -2).unsqueeze(-1)
    out = (out * weight).to(out.dtype)
    if not return_lse:
        return out, None
    # The larger one + log(1 + exp(-|gap|)). Each branch has the whole derivative, and a bounded one: at infinities the
    # branch that is not taken contributes 0, not NaN.
    total = torch.where(lse > s, lse - F.logsigmoid(gap), s - F.logsigmoid(-gap))
    return out, total.masked_fill(nothing, -torch.inf)
