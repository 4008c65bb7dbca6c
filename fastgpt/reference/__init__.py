"""The specification of each op in plain PyTorch: any device, any floating dtype, meant to be read.

Everything is computed in float32, or in float64 for float64 inputs, whatever the inputs' dtype.
"""

from .add_layer_norm import add_layer_norm
from .attention import attention, attention_varlen
from .cross_entropy import cross_entropy
from .gelu import bias_gelu, geglu, gelu, linear_gelu
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .mlp import mlp
from .philox import dropout_keep
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
    "dropout_keep",
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
