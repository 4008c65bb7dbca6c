"""The native ops: those of `torch.nn.functional`, with further options, and fused ones.

Each op's file holds its contract (checks, docstring), its registration for every backend and its autograd.
`fastgpt.backends.select` chooses the backend.
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
from .relu_squared import relu_squared
from .rms_norm import add_rms_norm, rms_norm
from .rope import rope
from .swiglu import swiglu

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
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
    "relu_squared",
    "rms_norm",
    "rope",
    "swiglu",
]
