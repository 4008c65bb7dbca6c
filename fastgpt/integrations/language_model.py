"""Language models of transformers: the projection to the vocabulary and its loss as one op.

A model's forward computes logits in its head and hands them to a loss. Here the loss is computed inside the head's
own forward, where hooks of FSDP and others have made its weight whole, and returned in the logits' place; the model's
own forward is called as it is, without labels. So nothing of it is written again, and there are no logits in training.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from transformers import PreTrainedModel
from transformers.loss import loss_utils

from fastgpt import functional, ops
from fastgpt.integrations import deferred_logits
from fastgpt.integrations.replacement import Replacement
from fastgpt.ops._checks import no_float64_on_gpu_backends
from fastgpt.ops._fallback import goes_to_pytorch, plain_reason
from fastgpt.ops._modules import is_unmodified

_FEW = 7 / 8  # below this share of rows that count, those are taken out first


@dataclass(frozen=True)
class Loss:
    """A loss over classes: targets (...) in int64; ignore_index does not count.

    count:   what the sum is divided by; None for the number of targets that count.
    float32: the loss is float32 even where the logits are not.
    softcap, logit_scale: logits made of hidden states become c tanh(scale logits / c), as in `ops.cross_entropy`.
    """

    target: Tensor
    count: Any = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    float32: bool = True
    softcap: float | None = None
    logit_scale: float = 1.0

    def of_hidden(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The loss of logits hidden @ weight.T + bias, for hidden (..., D) and weight (V, D); scalar."""
        hidden = hidden.reshape(-1, hidden.shape[-1])
        target = self.target.reshape(-1).to(hidden.device)
        reason = plain_reason(hidden, weight, target, optional=(bias,))
        if (
            reason is None
            and hidden.dtype != weight.dtype
            and not torch.is_autocast_enabled(hidden.device.type)
        ):
            reason = "the dtypes differ"
        reason = reason or _of_targets(target)
        case = lambda b: no_float64_on_gpu_backends(b, hidden.dtype)  # noqa: E731
        if goes_to_pytorch("linear_cross_entropy", hidden, reason, case):
            logits = nn.functional.linear(hidden, weight, bias)
            logits = logits if self.logit_scale == 1.0 else self.logit_scale * logits
            logits = logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
            return self.of_logits(logits, target)
        traced = torch.compiler.is_compiling() or isinstance(target, FakeTensor)
        if hidden.device.type == "cpu" and not traced and len(hidden) == len(target):
            # In masked language modelling six rows in seven do not count. (On a GPU, to ask which is to wait for it.)
            counted = (target != self.ignore_index).nonzero()[:, 0]
            if 0 < len(counted) < _FEW * len(target):
                hidden, target = hidden.index_select(0, counted), target[counted]
        loss = ops.linear_cross_entropy(
            hidden, weight, target, bias=bias, softcap=self.softcap, logit_scale=self.logit_scale,
            loss_dtype=self._dtype(), **self._options(),
        )  # fmt: skip
        return self._divided(loss)

    def of_logits(self, logits: Tensor, target: Tensor | None = None) -> Tensor:
        """The loss of logits (..., V); scalar."""
        logits = logits.reshape(-1, logits.shape[-1])
        target = (self.target if target is None else target).reshape(-1)
        if isinstance(logits, deferred_logits.DeferredLogits):
            logits = logits.float() if self.float32 else logits
            return self._divided(functional.PYTORCH_CROSS_ENTROPY(logits, target, **self._options()))
        reason = plain_reason(logits, target) or _of_targets(target)
        case = lambda b: no_float64_on_gpu_backends(b, logits.dtype)  # noqa: E731
        if goes_to_pytorch("cross_entropy", logits, reason, case):
            logits = logits.float() if self.float32 else logits
            return self._divided(functional.PYTORCH_CROSS_ENTROPY(logits, target, **self._options()))
        return self._divided(ops.cross_entropy(logits, target, loss_dtype=self._dtype(), **self._options()))

    def _dtype(self) -> torch.dtype | None:
        return torch.float32 if self.float32 else None

    def _options(self) -> dict[str, Any]:
        return {
            "ignore_index": self.ignore_index,
            "reduction": "mean" if self.count is None else "sum",
            "label_smoothing": self.label_smoothing,
        }

    def _divided(self, loss: Tensor) -> Tensor:
        if self.count is None:
            return loss
        return loss / (self.count.to(loss.device) if isinstance(self.count, Tensor) else self.count)


def _of_targets(target: Tensor) -> str | None:
    """Return why these targets are left to PyTorch, or None."""
    return None if target.dtype == torch.int64 else f"the targets are {target.dtype}"


def causal_loss(
    labels: Tensor,
    *,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    **_: Any,
) -> Loss:
    """The next token's loss, with the arguments of transformers' `ForCausalLMLoss`, and label_smoothing."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return Loss(shift_labels, num_items_in_batch, ignore_index, label_smoothing)


def masked_loss(labels: Tensor, **_: Any) -> Loss:
    """The masked tokens' loss, as BERT's and ELECTRA's forward have it: a plain CrossEntropyLoss."""
    return Loss(labels, float32=False)


def causal_loss_of_logits(logits: Tensor, labels: Tensor, vocab_size: int, **options: Any) -> Tensor:
    """Replacement of transformers' `ForCausalLMLoss` for logits. Arguments as there."""
    return causal_loss(labels.to(logits.device), **options).of_logits(logits)


# The loss that the next call of a head is to give: a stack for each thread; while a graph is traced, which one thread
# does at a time, a variable that Dynamo can follow, and that leaves nothing in the graph.
_thread = threading.local()
_traced: Loss | None = None
_given: Tensor | None = None


class LossHead(Replacement, nn.Linear):
    """The projection to the vocabulary. A call for which a loss is `wanted` gives that instead of the logits.

    A call that is given the fields of a `Loss`, and a bias to add to its own, gives that loss; one for which they are
    `deferred_logits.requested` gives such logits.
    """

    replaces, option, runs = nn.Linear, "cross_entropy", "linear_cross_entropy"

    def forward(
        self, input: Tensor, fields: dict[str, Any] | None = None, bias: Tensor | None = None
    ) -> Tensor:
        if fields is not None:
            both = self.bias if bias is None else bias if self.bias is None else self.bias + bias
            return Loss(**fields).of_hidden(input, self.weight, both)
        loss = self._taken()
        if loss is None:
            logits = None if torch.compiler.is_compiling() else deferred_logits.deferred(self, input)
            return super().forward(input) if logits is None else logits
        value = loss.of_hidden(input, self.weight, self.bias)
        self._give(value)
        return value

    def _taken(self) -> Loss | None:
        """Take the loss that was requested of this head; None afterwards."""
        global _traced
        if torch.compiler.is_compiling():
            loss, _traced = _traced, None
            return loss
        wishes = getattr(_thread, "wishes", None)
        if not wishes or wishes[-1][0] is not self:
            return None
        loss = wishes[-1][1]
        wishes[-1] = (None, None)
        return loss

    def _give(self, value: Tensor) -> None:
        global _given  # noqa: PLW0603
        if torch.compiler.is_compiling():
            _given = value
        else:
            _thread.wishes[-1] = (None, value)

    def given(self) -> Tensor | None:
        """Return, within `wanted`, the loss that was computed; None if the head was not called."""
        if torch.compiler.is_compiling():
            return _given
        head, value = _thread.wishes[-1]
        return None if head is self else value

    @contextmanager
    def wanted(self, loss: Loss) -> Iterator[None]:
        """Within, the first call of the head in this thread gives this loss; calls of the model may be nested."""
        global _traced, _given
        if torch.compiler.is_compiling():
            before, _traced = _traced, loss
            try:
                yield
            finally:
                _traced, _given = before, None
            return
        wishes = _thread.__dict__.setdefault("wishes", [])
        wishes.append((self, loss))
        try:
            yield
        finally:
            wishes.pop()


def with_fused_loss(
    forward: Callable[..., Any],
    head: str,
    loss: Callable[..., Loss],
    logits: str = "logits",
    rest: tuple[str, Callable[[Any, Tensor], Tensor]] | None = None,
    no_cache: bool = False,
    own: Callable[[Any, dict[str, Any]], bool] = lambda model, kwargs: False,
    of_logits: Callable[[Any], dict[str, Any]] = lambda model: {},
) -> Callable[..., Any]:
    """A model's forward with its loss fused into the head while training, and computed from the logits otherwise.

    Args:
        forward: the model's own.
        head: the name of the submodule that makes logits of hidden states, and does so last.
        loss: of the labels and the keyword arguments.
        logits: their name in the model's output. In training they are None there.
        rest: what else is added to the loss: the name of its labels, without which there is no loss at all, and a
            function of the output and these.
        no_cache: whether the model's own forward sets use_cache=False where it is given labels.
        own: whether a call's loss is left to the model's forward; of the model and the keyword arguments.
        of_logits: what the model does to the logits before the loss: the `softcap` and `logit_scale` of `Loss`.
    """

    @functools.wraps(forward)
    def with_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        layer = self.get_submodule(head)
        as_dict = kwargs.get("return_dict")
        as_dict = self.config.return_dict if as_dict is None else as_dict
        # A tuple without logits would be read as if they were there; a loss of the user's own is the user's.
        ours = (
            as_dict
            and "_loss_function" not in vars(self)
            and isinstance(layer, LossHead)
            and is_unmodified(layer, called=True)
            and not own(self, kwargs)
        )
        if labels is None or not ours or (rest is not None and kwargs.get(rest[0]) is None):
            return forward(self, *args, **kwargs)
        wanted = replace(loss(**kwargs), **of_logits(self))
        kwargs["labels"] = None
        if no_cache:
            kwargs["use_cache"] = False
        if self.training:
            with layer.wanted(wanted):
                output = forward(self, *args, **kwargs)
                value = layer.given()
            made = output[logits].dim() != 0
            if made is (value is not None) and (made or of_logits(self)):
                raise RuntimeError(
                    f"something called {head} before the model did, and got the loss for the logits: call "
                    "fastgpt.accelerate(model, cross_entropy=False) for such a model"
                )
            if made:  # torch.compile broke the graph between here and the head, which was not asked then
                found = {**output, "loss": wanted.of_logits(output[logits])}
            else:
                found = {**output, logits: None, "loss": output[logits] if value is None else value}
        else:
            output = forward(self, *args, **kwargs)
            found = {**output, "loss": wanted.of_logits(output[logits])}
        if rest is not None:
            found["loss"] = found["loss"] + rest[1](output, kwargs[rest[0]])
        return type(output)(**found)

    return with_loss


def takes_no_loss(module: Any, layer: nn.Module) -> str | None:
    """Return why the loss of a model of transformers cannot be fused into its head, or None."""
    if type(layer) is not nn.Linear and type(layer) is not LossHead:
        return f"its head is a {type(layer).__name__}, not a Linear"
    if has_own_loss(module):
        return "it has a loss_function of its own"
    return None


def has_own_loss(model: Any) -> bool:
    """Return whether somebody gave a model of transformers another loss_function than those of its kind."""
    return vars(model).get("_loss_function", causal_loss_of_logits) is not causal_loss_of_logits


class OwnerOfHead(Replacement):
    """The base for models whose forward is `with_fused_loss`; `head` names the submodule that makes the logits."""

    option, runs = "cross_entropy", "linear_cross_entropy"
    remark = "in training it returns no logits beside the loss"
    head: ClassVar[str]

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        return takes_no_loss(module, module.get_submodule(cls.head))

    @classmethod
    def parts(cls, module: Any) -> dict[str, type[Replacement]]:
        return {cls.head: LossHead}


def with_causal_loss(model: nn.Module, known: Callable[[nn.Module], bool]) -> Iterator[tuple[str, Any]]:
    """Yield the models of transformers in a model, with their names, that compute the next-token loss by loss_function.

    Those that are known otherwise are left out; some of them warn when their loss_function is read.
    """
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or known(module):
            continue
        if "loss_function" not in names_in_forward(type(module)):
            continue
        with_head = module.get_output_embeddings() is not None
        if with_head and module.loss_function is loss_utils.ForCausalLMLoss:
            yield name, module


def names_in_forward(model: type) -> frozenset[str]:
    """Return what a class's forward, and those of the classes above it which it calls, name."""
    found: set[str] = set()
    for cls in model.__mro__:
        if "forward" in vars(cls):
            names = getattr(getattr(inspect.unwrap(cls.forward), "__code__", None), "co_names", ())  # type: ignore[attr-defined]
            found |= set(names)
            if "super" not in names:
                break
    return frozenset(found)
