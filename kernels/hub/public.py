"""fastgpt's ops without the package: Triton kernels on a GPU, plain PyTorch on a CPU."""

from . import flash_attn_interface, layers
from .backends import BackendUnavailable, available_backends, explain, use_backend
from .ops import (
    add_layer_norm,
    add_rms_norm,
    attention,
    attention_varlen,
    bias_gelu,
    cross_entropy,
    geglu,
    gelu,
    linear,
    linear_cross_entropy,
    linear_gelu,
    mlp,
    relu_squared,
    rms_norm,
    rope,
    swiglu,
)

__all__ = [
    "BackendUnavailable",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_varlen",
    "available_backends",
    "bias_gelu",
    "cross_entropy",
    "explain",
    "flash_attn_interface",
    "geglu",
    "gelu",
    "layers",
    "linear",
    "linear_cross_entropy",
    "linear_gelu",
    "mlp",
    "relu_squared",
    "rms_norm",
    "rope",
    "swiglu",
    "use_backend",
]
