"""Feed-forward blocks with a GELU, and masked language models with the code of RoBERTa's and its kind."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from fastgpt.integrations.fingerprint import fingerprint
from fastgpt.integrations.language_model import OwnerOfHead, masked_loss, with_fused_loss
from fastgpt.integrations.recognized import Recognized
from fastgpt.integrations.replacement import OwnerOfGelu


class Intermediate(OwnerOfGelu, Recognized):
    """intermediate_act_fn(dense(x)), BERT's."""

    code, then = ("ed37622b00211415",), "intermediate_act_fn"

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.activated(hidden_states)


class HeadTransform(OwnerOfGelu, Recognized):
    """LayerNorm(transform_act_fn(dense(x))), of BERT's head."""

    code, then = ("f4748bf484ed1fb2",), "transform_act_fn"

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.LayerNorm(self.activated(hidden_states))


class FeedForward(OwnerOfGelu, Recognized):
    """fc2(activation_fn(fc1(x))), of CLIP and many encoders of images and sound."""

    code: ClassVar[tuple[str, ...]] = ("841446fb07dfa915",)
    first, then, last = "fc1", "activation_fn", "fc2"

    def forward(self, hidden_states: Tensor) -> Tensor:
        return getattr(self, self.last)(self.activated(hidden_states))


class NeoXFeedForward(FeedForward):
    """GPT-NeoX's."""

    code = ("24f206b05ecf01d9",)
    first, then, last = "dense_h_to_4h", "act", "dense_4h_to_h"


class SamFeedForward(FeedForward):
    """SAM's."""

    code = ("da9524d8f5a8493c",)
    first, then, last = "lin1", "act", "lin2"


class DinoFeedForward(FeedForward):
    """DINOv2's."""

    code, then = ("934dff19cd44f6cc",), "activation"

    def forward(self, hidden_state: Tensor) -> Tensor:
        return self.fc2(self.activated(hidden_state))


class GPTJFeedForward(FeedForward):
    """GPT-J's, with dropout at the end."""

    code = ("5478c872d193b369",)
    first, then, last = "fc_in", "act", "fc_out"

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(super().forward(hidden_states))


class GPTNeoFeedForward(GPTJFeedForward):
    """GPT-Neo's and GPTBigCode's."""

    code = ("de1e41158c81b4a2",)
    first, last = "c_fc", "c_proj"


class MaskedLM(OwnerOfHead, Recognized):
    """A masked language model whose logits go from the last layer of its head to the loss, RoBERTa's.

    parts_code: submodules on the way to the logits, and the fingerprints of their forwards.
    """

    head = "lm_head.decoder"
    code: ClassVar[tuple[str, ...]] = ("9e67406c6286cdaf", "a1e20c88899bad1c", "23c4a05a0d17dae9")
    parts_code: ClassVar[dict[str, str]] = {"lm_head": "90cde36c9d3723ac"}

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        for name, code in cls.parts_code.items():
            part = module.get_submodule(name)
            if fingerprint(getattr(type(part), "replaces", type(part)).forward) != code:
                return f"its head is a {type(part).__name__}, which may compute something else"
        return super().refusal(module)

    @classmethod
    def members(cls, replaced: Any) -> dict[str, Any]:
        return {"forward": with_fused_loss(replaced.forward, cls.head, masked_loss)}


class AlbertMaskedLM(MaskedLM):
    """ALBERT's."""

    head, code = "predictions.decoder", ("52687c770bec31b2",)
    parts_code: ClassVar[dict[str, str]] = {"predictions": "45730410242ba5a2"}


class ErnieMaskedLM(MaskedLM):
    """ERNIE's, with BERT's head."""

    head, code = "cls.predictions.decoder", ("e5b9acb95aec96bb",)
    parts_code: ClassVar[dict[str, str]] = {"cls": "1c11af4cfa9e0074", "cls.predictions": "35ad72606438c53f"}


class DistilBertMaskedLM(MaskedLM):
    """DistilBERT's."""

    head, code = "vocab_projector", ("b87cfa820ce4d4ab",)
    parts_code: ClassVar[dict[str, str]] = {}


PATTERNS: tuple[type[Recognized], ...] = (
    *(Intermediate, HeadTransform, FeedForward, NeoXFeedForward, SamFeedForward, DinoFeedForward),
    *(GPTJFeedForward, GPTNeoFeedForward),
    *(MaskedLM, AlbertMaskedLM, ErnieMaskedLM, DistilBertMaskedLM),
)
