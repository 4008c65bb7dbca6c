"""The GELUs of transformers. Quick GELU (x·sigmoid(1.702 x)) and the clipped one are other functions: they stay."""

from __future__ import annotations

from torch import Tensor
from transformers import activations

from fastgpt import functional
from fastgpt.integrations.replacement import Replacement


class _GELU(Replacement):
    option, runs, scripts = "gelu", "gelu", True
    approximate = "none"

    def forward(self, input: Tensor) -> Tensor:
        return functional.gelu(input, approximate=self.approximate)


class GELUActivation(_GELU, activations.GELUActivation):
    replaces = activations.GELUActivation


class GELUTanh(_GELU, activations.GELUTanh):
    replaces, approximate = activations.GELUTanh, "tanh"


class NewGELUActivation(_GELU, activations.NewGELUActivation):
    replaces, approximate = activations.NewGELUActivation, "tanh"


class FastGELUActivation(_GELU, activations.FastGELUActivation):
    """With √(2/π) to ten digits: the same function in float32."""

    replaces, approximate = activations.FastGELUActivation, "tanh"


class AccurateGELUActivation(_GELU, activations.AccurateGELUActivation):
    replaces, approximate = activations.AccurateGELUActivation, "tanh"


REPLACEMENTS = (GELUActivation, GELUTanh, NewGELUActivation, FastGELUActivation, AccurateGELUActivation)
