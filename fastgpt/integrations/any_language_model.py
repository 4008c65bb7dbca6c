"""Any language model of transformers: its head returns deferred logits, and its own forward computes the loss of them.

See `fastgpt.integrations.deferred_logits`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.loss import loss_utils

from fastgpt.integrations.deferred_logits import DeferredLogits, requested
from fastgpt.integrations.language_model import (
    LossHead,
    causal_loss_of_logits,
    has_own_loss,
    names_in_forward,
    takes_no_loss,
)
from fastgpt.integrations.recognized import Recognized, made
from fastgpt.integrations.replacement import Replacement
from fastgpt.ops._modules import is_unmodified

# A forward that computes a loss of its logits names one of these.
_CALLS = ("loss_function", "CrossEntropyLoss", "cross_entropy")
_LOSSES = (loss_utils.ForCausalLMLoss, loss_utils.ForMaskedLMLoss, causal_loss_of_logits)


def with_deferred_logits(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward whose logits are deferred while training; where nothing read them, it returns none."""

    @functools.wraps(forward)
    def with_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        as_dict = kwargs.get("return_dict")
        as_dict = self.config.return_dict if as_dict is None else as_dict
        head = self.get_output_embeddings()
        # A tuple without logits would be read as if they were there; a loss of the user's own is the user's.
        ours = (
            self.training
            and kwargs.get("labels") is not None
            and as_dict
            and not torch.compiler.is_compiling()
            and not has_own_loss(self)
            and isinstance(head, LossHead)
            and is_unmodified(head)
        )
        if not ours:
            return forward(self, *args, **kwargs)
        with requested(head) as further_out:
            output = forward(self, *args, **kwargs)
        if further_out:  # the model around this one may compute a loss of them
            return output
        return type(output)(**{name: _finished(value) for name, value in output.items()})

    return with_loss


def _finished(value: Any) -> Any:
    """Return None for logits that only a loss was computed from, and other deferred logits themselves."""
    if not isinstance(value, DeferredLogits):
        return value
    return None if value.call.has_loss and not value.call.made else value.value()


class AnyLanguageModel(Recognized):
    """A model with a head that computes a cross-entropy in its forward."""

    option, runs = "cross_entropy", "linear_cross_entropy"
    remark = "in training it returns no logits beside the loss"

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        head = module.get_output_embeddings()
        owner, name = _owner(module, head)
        kind: Any = type(owner)
        if not _calls(kind, name):
            return "its head is not called"
        return takes_no_loss(module, head)

    @classmethod
    def parts(cls, module: Any) -> dict[str, type[Replacement]]:
        head = module.get_output_embeddings()
        if isinstance(head, LossHead):  # a model within this one has the same head
            return {}
        return {_name(module, head): LossHead}

    @classmethod
    def members(cls, replaced: Any) -> dict[str, Any]:
        return {"forward": with_deferred_logits(replaced.forward)}


def replacement_of(module: nn.Module) -> type[Replacement] | None:
    """Return the class that takes the place of a language model's, or None."""
    kind: Any = type(module)
    if not isinstance(module, PreTrainedModel) or not _takes_labels(kind):
        return None
    head = module.get_output_embeddings()
    if not isinstance(head, nn.Module) or all(part is not head for part in module.modules()):
        return None
    names = names_in_forward(kind) | names_in_forward(type(_owner(module, head)[0]))
    # DistilBERT of transformers 4.57 has its loss as a submodule.
    has_loss = any(isinstance(part, nn.CrossEntropyLoss) for part in module.children())
    if names.isdisjoint(_CALLS) and not has_loss:
        return None
    of_another_kind = "loss_function" in names and module.loss_function not in _LOSSES
    return None if of_another_kind and not has_own_loss(module) else made(kind, AnyLanguageModel)


@functools.cache
def _takes_labels(kind: Any) -> bool:
    own = "forward" in vars(kind) or kind.__module__.startswith("transformers.")
    return (
        own and not issubclass(kind, Replacement) and "labels" in inspect.signature(kind.forward).parameters
    )


def _owner(model: nn.Module, head: nn.Module) -> tuple[nn.Module, str]:
    """Return the module that a head is a submodule of, and its name there."""
    parent, _, name = _name(model, head).rpartition(".")
    return model.get_submodule(parent), name


def _name(model: nn.Module, head: nn.Module) -> str:
    return next(name for name, part in model.named_modules() if part is head)


@functools.cache
def _calls(kind: Any, name: str) -> bool:
    """Return whether a class's forward, or that of a class above it, calls a submodule (MobileBERT's does not)."""
    try:
        sources = [inspect.getsource(inspect.unwrap(c.forward)) for c in kind.__mro__ if "forward" in vars(c)]
    except (OSError, TypeError):  # from a notebook: it is not known
        return True
    return any(f".{name}(" in source for source in sources)
