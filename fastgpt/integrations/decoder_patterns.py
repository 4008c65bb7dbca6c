"""Norms, gated MLPs, attentions, layers and language models with the code of Llama's, Gemma's and their kind."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import activations

from fastgpt import ops
from fastgpt.integrations import rotary
from fastgpt.integrations.language_model import OwnerOfHead, causal_loss, with_fused_loss
from fastgpt.integrations.recognized import Recognized
from fastgpt.integrations.replacement import approximation
from fastgpt.ops._checks import FLOATS, no_float64_on_gpu_backends
from fastgpt.ops._fallback import goes_to_pytorch, plain_reason
from fastgpt.ops._modules import is_unmodified


class RMSNorm(Recognized):
    """x / sqrt(mean(x²) + eps), rounded to x's dtype and multiplied by the weight."""

    option, runs = "rms_norm", "rms_norm"
    code: ClassVar[tuple[str, ...]] = ("1ee42456c7aca18a", "0d161ac7918611ed")  # Llama's, T5's
    eps_name: ClassVar[str] = "variance_epsilon"
    offset: ClassVar[float] = 0.0
    keeps_dtype: ClassVar[bool] = False  # else the result has the promoted dtype of x and weight

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self._normed(hidden_states)

    def _normed(self, x: Tensor) -> Tensor:
        if not self.serves("rms_norm", x):
            return super().forward(x)
        return ops.rms_norm(x, self.weight, getattr(self, self.eps_name), offset=self.offset)

    def added(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norm of residual + x, and that sum."""
        if not is_unmodified(self) or not self.serves("add_rms_norm", x, residual):
            total = residual + x
            return self(total), total
        return ops.add_rms_norm(x, residual, self.weight, getattr(self, self.eps_name), offset=self.offset)

    def serves(self, op: str, x: Tensor, residual: Tensor | None = None) -> bool:
        """Return whether a kernel computes the norm with these arguments."""
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        reason = plain_reason(x, self.weight, optional=(residual,))
        if reason is None and residual is not None and residual.shape != x.shape:
            reason = "the shapes differ"
        if reason is None and (
            self.weight.dtype not in FLOATS or (self.weight.dtype != dtype and not self.keeps_dtype)
        ):
            reason = f"the dtypes are {dtype} and {self.weight.dtype}"
        return not goes_to_pytorch(op, x, reason, lambda b: no_float64_on_gpu_backends(b, dtype))


class WeightedRMSNorm(RMSNorm):
    """OLMo 2's, GPT-OSS's and Helium's: rounded after the multiplication."""

    code, keeps_dtype = ("0eacfc7afefc5baf", "d9c41fc4da1d7fcb"), True


class OffsetRMSNorm(RMSNorm):
    """Gemma's: multiplied by 1 + weight."""

    code, needs = ("19ee73e5bff3816f",), {"_norm": "05c8f0d466defd7d"}
    eps_name, offset, keeps_dtype = "eps", 1.0, True

    def forward(self, x: Tensor) -> Tensor:
        return self._normed(x)


# Some versions of transformers have a class of their own.
_SILUS = (nn.SiLU, getattr(activations, "SiLUActivation", nn.SiLU))


class SwiGLU(Recognized):
    """down_proj(silu(gate_proj(x)) * up_proj(x))."""

    option, runs = "swiglu", "swiglu"
    code: ClassVar[tuple[str, ...]] = ("368b963af22e7084",)
    activation: ClassVar[str] = "act_fn"  # the name of the gate's

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        activation = module.get_submodule(cls.activation)
        if type(activation) not in _SILUS:
            return f"its gate is no SiLU or GELU that is known, but {type(activation).__name__}"
        return None

    @classmethod
    def absorbs(cls) -> tuple[str, ...]:
        return (cls.activation,)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(self._gated(gate, up))

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        activation = getattr(self, self.activation)
        if not is_unmodified(activation) or not self._serves(gate, up):
            return activation(gate) * up
        return self._gate(gate, up)

    def _gate(self, gate: Tensor, up: Tensor) -> Tensor:
        return ops.swiglu(gate, up)

    def _serves(self, gate: Tensor, up: Tensor) -> bool:
        reason = plain_reason(gate, up)
        if reason is None and (gate.dtype != up.dtype or gate.shape != up.shape):
            reason = "the dtypes or shapes differ"
        return not goes_to_pytorch(
            self.runs, gate, reason, lambda b: no_float64_on_gpu_backends(b, gate.dtype)
        )


class GEGLU(SwiGLU):
    """down_proj(gelu(gate_proj(x)) * up_proj(x))."""

    runs = "geglu"

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        return (
            super().refusal(module) if approximation(module.get_submodule(cls.activation)) is None else None
        )

    def _gate(self, gate: Tensor, up: Tensor) -> Tensor:
        return ops.geglu(gate, up, approximation(getattr(self, self.activation)) or "none")


class T5GEGLU(GEGLU):
    """wo(dropout(gelu(wi_0(x)) * wi_1(x))), of T5 1.1, MT5 and UMT5."""

    code, activation = ("1712dcdcd0bd9cc0",), "act"

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        if approximation(module.act) is None:
            return f"its gate is no GELU that is known, but {type(module.act).__name__}"
        return None

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.wi_0(hidden_states), self.wi_1(hidden_states)
        h, weight = self.dropout(self._gated(gate, up)), self.wo.weight
        if isinstance(weight, Tensor) and h.dtype != weight.dtype and weight.dtype != torch.int8:
            h = h.to(weight.dtype)  # where wo is kept in float32 beside layers of 16 bits
        return self.wo(h)


class PreNormLayer(Recognized):
    """A layer with norms before attention and MLP: the sum after the attention and the second norm are one op."""

    option, runs = "rms_norm", "add_rms_norm"
    # They differ in the arguments of the attention.
    code = (
        *("896970dc87b3702d", "af50c80fd82565b8", "8c3de64edfeab82c"),  # Llama
        *("db578e7ede7a4ab3", "c38011051b68f074", "4e861a004eb54677"),  # Mixtral
        *("fb3148f518c3cf32", "359a1e8e99f4d373", "d27dcd595ae4eecb"),  # Qwen3-VL
    )
    arguments: ClassVar[tuple[str, ...]]  # of the attention beside its input
    defaults: ClassVar[dict[str, Any]]

    @classmethod
    def members(cls, replaced: Any) -> dict[str, Any]:
        named = list(inspect.signature(inspect.unwrap(replaced.forward)).parameters.values())[2:]
        named = [p for p in named if p.kind is p.POSITIONAL_OR_KEYWORD]
        defaults = {p.name: p.default for p in named if p.default is not p.empty}
        return {"arguments": tuple(p.name for p in named), "defaults": defaults}

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        norm = module.post_attention_layernorm
        return None if isinstance(norm, RMSNorm) else f"its norm is a {type(norm).__name__}"

    @classmethod
    def absorbs(cls) -> tuple[str, ...]:
        return ("post_attention_layernorm",)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = {**self.defaults, **dict(zip(self.arguments, args, strict=False)), **kwargs}
        residual = hidden_states
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **given)
        norm = self.post_attention_layernorm
        if isinstance(norm, RMSNorm):
            normed, residual = norm.added(attended, residual)
        else:  # another module was put in its place
            residual = residual + attended
            normed = norm(residual)
        return residual + self.mlp(normed)


class CausalLM(OwnerOfHead, Recognized):
    """A language model whose logits go from its head to its loss."""

    head = "lm_head"
    code: ClassVar[tuple[str, ...]] = (
        *("ff1674cf2da4b806", "31d99856cdeb17cf", "abe904f64eaf3e09"),  # plain
        "e9c625db88ba818a",  # with the logits of a router beside them
        # with a router's loss, if it is requested
        *("5f27dd391e2273de", "db4bf8f5188e98bb", "0c80a36a92ae92c2"),
    )

    @staticmethod
    def of_logits(model: Any) -> dict[str, Any]:
        """Return what the model does to the logits before the loss: fields of `Loss`."""
        return {}

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        if module.loss_type != "ForCausalLM":
            return f"its loss is {module.loss_type}"
        return super().refusal(module)

    @classmethod
    def members(cls, replaced: Any) -> dict[str, Any]:
        options: dict[str, Any] = {"own": _with_a_routers_loss, "of_logits": cls.of_logits}
        return {"forward": with_fused_loss(replaced.forward, cls.head, causal_loss, **options)}


class CappedCausalLM(CausalLM):
    """Gemma 2's: with a cap of the logits before the loss."""

    code = ("345f0544ef82ff48", "a2451e920a82fbc1", "98e78c2a64453c90", "6f097186382e9feb")

    @staticmethod
    def of_logits(model: Any) -> dict[str, Any]:
        return {"softcap": model.config.final_logit_softcapping}


class DividedCausalLM(CausalLM):
    """Granite's: the logits are divided by a number."""

    code = (
        *("ca474d62301243ae", "8bc93edf9b8388da", "d6207ef7b1b34dbb"),
        # with a router's loss, if it is requested
        *("27f0da3beaafca05", "ceefd9e6334f8bd5", "df28759b718fa8d8"),
    )

    @staticmethod
    def of_logits(model: Any) -> dict[str, Any]:
        return {"logit_scale": 1.0 / model.config.logits_scaling}


class ScaledCausalLM(CausalLM):
    """Cohere's: the logits are multiplied by a number."""

    code = (
        *("c40e17d171acc39b", "a061b5875c296f14", "9f3052c6786a4ecb"),
        *("0e42cfc9b1f8638e", "dc26cdc279abed13"),  # with the logits of a router beside them
    )

    @staticmethod
    def of_logits(model: Any) -> dict[str, Any]:
        return {"logit_scale": model.logit_scale}


class RotaryAttention(Recognized):
    """An attention, with its own code, whose queries and keys are rotated by one op."""

    option, runs = "rope", "rope"

    @classmethod
    def fits(cls, kind: Any, found: str | None) -> bool:
        return rotary.is_known(inspect.unwrap(kind.forward)) and rotary.with_rope(kind.forward) is not None

    @classmethod
    def members(cls, replaced: Any) -> dict[str, Any]:
        return {"forward": rotary.with_rope(replaced.forward)}


def _with_a_routers_loss(model: Any, kwargs: dict[str, Any]) -> bool:
    requested = kwargs.get("output_router_logits")
    return bool(getattr(model.config, "output_router_logits", False) if requested is None else requested)


PATTERNS: tuple[type[Recognized], ...] = (
    *(RMSNorm, WeightedRMSNorm, OffsetRMSNorm, SwiGLU, GEGLU, T5GEGLU, PreNormLayer, RotaryAttention),
    *(CausalLM, CappedCausalLM, DividedCausalLM, ScaledCausalLM),
)
