"""The native ops: what `torch.nn.functional` offers and everything it has no room for.

Each op's file holds its contract (checks, docstring), its registration for every backend and its
autograd; the choice of backend is `fastgpt.backends.select`.
"""

from .add_layer_norm import add_layer_norm
from .attention import attention
from .attention_varlen import attention_varlen
from .cross_entropy import cross_entropy
from .geglu import geglu
from .gelu import bias_gelu, gelu
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .linear_gelu import linear_gelu
from .mlp import mlp

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
