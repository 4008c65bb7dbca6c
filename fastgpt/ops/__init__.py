"""The native ops: what `torch.nn.functional` offers and everything it has no room for.

Each op's file holds its contract (checks, docstring), its registration for every backend and its
autograd; the choice of backend is `fastgpt.backends.select`.
"""

from fastgpt.ops.add_layer_norm import add_layer_norm
from fastgpt.ops.attention import attention
from fastgpt.ops.attention_varlen import attention_varlen
from fastgpt.ops.cross_entropy import cross_entropy
from fastgpt.ops.geglu import geglu
from fastgpt.ops.gelu import bias_gelu, gelu
from fastgpt.ops.linear import linear
from fastgpt.ops.linear_cross_entropy import linear_cross_entropy
from fastgpt.ops.linear_gelu import linear_gelu
from fastgpt.ops.mlp import mlp

__all__ = [
    "add_layer_norm",
    "attention",
    "attention_varlen",
    "bias_gelu",
    "cross_entropy",
    "geglu",
    "gelu",
    "linear",
    "linear_cross_entropy",
    "linear_gelu",
    "mlp",
]
