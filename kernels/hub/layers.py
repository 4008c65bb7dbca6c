"""Layers for `kernels.kernelize` and transformers' `use_kernels=True`: forwards by the names that models ask for.

They have no state: `forward` is called on the model's own module, whose attributes it reads. The mapping that a caller
registers names them by layer: {"RMSNorm": {"cuda": LayerRepository(repo_id, layer_name="RMSNorm")}}.
"""

from torch import Tensor, nn

from .ops import gelu, rms_norm


class RMSNorm(nn.Module):
    """Of Llama, Mistral, Qwen and others: x / sqrt(mean(x²) + variance_epsilon) * weight, in x's dtype."""

    can_torch_compile = True
    has_backward = True

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class RMSNormZeroCentered(nn.Module):
    """Of Gemma: multiplied by 1 + weight; eps is called so."""

    can_torch_compile = True
    has_backward = True

    weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, offset=1.0)


class GeLU(nn.Module):
    """The exact GELU."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input)


class GeluTanh(nn.Module):
    """GELU's tanh approximation."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, "tanh")


class NewGELU(nn.Module):
    """The same, as GPT-2 calls it."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, "tanh")
