"""`accelerate(model)`: a model that somebody else wrote, on fastgpt's kernels; `restore(model)` undoes it.

What can be replaced, and by what, is in `fastgpt.integrations`, one file a family of models.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastgpt.backends import kernels_off
from fastgpt.integrations import replacements
from fastgpt.integrations.replacement import Replacement, calls_functional
from fastgpt.malloc import advice

if TYPE_CHECKING:
    from fastgpt.integrations.verify import Verification

_RECORD = "_fastgpt_accelerated"  # on the model: what the modules' classes do not say

# A module with such a name that is left as it was is worth a line of the report.
_NOTEWORTHY = re.compile(
    r"attention|attn|crossentropy|gelu|layer_?norm|rms_?norm|rotary|rope(?![a-z])|swiglu", re.IGNORECASE
)
# Submodules or parameters, by name, of a feed-forward block whose activation is multiplied by a gate.
_GATED = ({"gate_proj", "up_proj"}, {"gate_up_proj"}, {"wi_0", "wi_1"}, {"w1", "w3"}, {"w12"})
_UNKNOWN = "no replacement is known for it"
_PATCHED = "; where it calls torch.nn.functional, fastgpt.patch_functional() serves that"


@dataclass(frozen=True)
class Entry:
    """Result for the modules of one class.

    kind:   the class's name.
    where:  the modules' names, each number in them written as "*".
    detail: the op they run on; or, of those that were left, why.
    count:  how many they are.
    """

    kind: str
    where: str
    detail: str
    count: int


@dataclass(frozen=True)
class Report:
    """Replaced modules, and those left unchanged with the reason; prints as a table. `model` is the model.

    note:   what to know before the table.
    advice: what else would make the model faster.
    """

    model: nn.Module
    replaced: tuple[Entry, ...]
    left: tuple[Entry, ...]
    note: str = ""
    advice: str = ""

    def verify(self, batch: Any) -> Verification:
        """Run the model's step twice, and say what the second really called and where its time went.

        Args:
            batch: what the model is called with: a mapping of keyword arguments, a tuple of arguments, or one tensor.
                The loss is the output's, or else the sum of what it returns; without anything to train, the step is a
                forward. Losses are fused in training (`model.train()`).

        Returns:
            For each op of fastgpt and each operator of PyTorch: calls, backend and share of the operators' time; and
            the ops that modules were given and none called. It prints as a table. Of a compiled model only what is an
            operator is seen, not the kernels that the compiler makes. Gradients, buffers and random numbers are as
            before.
        """
        from fastgpt.integrations.verify import verify

        words = (entry.detail.removeprefix("within ").split()[0] for entry in self.replaced)
        return verify(self.model, batch, words)

    def __str__(self) -> str:
        lines = [self.note] if self.note else []
        for title, entries in (("replaced", self.replaced), ("left as it was", self.left)):
            if entries:
                lines.append(title)
                kind, where = (max(len(getattr(e, key)) for e in entries) for key in ("kind", "where"))
                lines += [f"{e.count:>6} × {e.kind:<{kind}}  {e.where:<{where}}  {e.detail}" for e in entries]
        lines = lines or ["nothing in this model is of a kind that fastgpt replaces"]
        return "\n".join([*lines, self.advice] if self.advice else lines)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}\n{self}\n>"


class _Work:
    """One call of `accelerate`: what has been done, how to undo it, and what was left."""

    def __init__(self, model: nn.Module, options: dict[str, bool]) -> None:
        self.model, self.options = model, options
        self.table = replacements()
        self.replaced: Counter[tuple[str, str, str]] = Counter()
        self.left: Counter[tuple[str, str, str]] = Counter()
        self.undo: list[Callable[[], Any]] = []

    def all(self) -> None:
        record: dict[str, Any] = {}
        self.undo.append(lambda: delattr(self.model, _RECORD))
        setattr(self.model, _RECORD, record)
        known = self._transformers(record) if "transformers" in sys.modules else set()
        for name, module in reversed(list(self.model.named_modules())):  # what is inside comes first
            if not isinstance(module, Replacement):
                self._module(name, module, known)

    def _transformers(self, record: dict[str, Any]) -> set[nn.Module]:
        """Attention and losses by transformers' own switches; returns the modules whose attention is done with."""
        from fastgpt.integrations import attention, language_model

        done: set[nn.Module] = set()
        for name, model in attention.outermost(self.model):
            inside = attention.configured(model)
            reason = None if self.options["attention"] else "attention=False"
            for inner, part in inside:
                reason = reason or attention.refusal(part, inner)
            if reason is not None:
                self._note(self.left, "attention", name, reason)
            else:
                before = attention.in_force(model)
                record.setdefault("attention", {})[name] = before
                self.undo.append(lambda m=model, b=before: attention.give_back(m, b))  # type: ignore[misc]
                model.set_attn_implementation(attention.NAME)
                self._note(self.replaced, "AttentionInterface", name, attention.runs(before))
            done |= {m for m in model.modules() if attention.uses_interface(m)}
        if self.options["cross_entropy"]:
            for name, model in language_model.with_causal_loss(self.model, self._computes_its_loss):
                self.undo.append(lambda m=model: delattr(m, "_loss_function"))  # type: ignore[misc]
                model.loss_function = language_model.causal_loss_of_logits
                if not self._has_a_fused_loss(model):
                    self._note(self.replaced, "loss_function", name, "cross_entropy (on logits)")
        return done

    def _computes_its_loss(self, model: nn.Module) -> bool:
        """Return whether a model's replacement does without its loss_function."""
        from fastgpt.integrations import language_model

        found = self._class_for(model)
        with_another = found is not None and issubclass(found, language_model.OwnerOfHead)
        return type(model) in self.table or (with_another and self._has_a_fused_loss(model))

    def _has_a_fused_loss(self, model: nn.Module) -> bool:
        found = self._class_for(model)
        return found is not None and found.refusal(model) is None

    def _class_for(self, module: nn.Module) -> type[Replacement] | None:
        """Return the class that takes the place of a module's own, if any."""
        found = self.table.get(type(module))
        if found is None and "transformers" in sys.modules:
            from fastgpt.integrations import any_language_model, patterns

            found = patterns.replacement_of(module) or any_language_model.replacement_of(module)
        return found

    def _module(self, name: str, module: nn.Module, known: set[nn.Module]) -> None:
        cls = self._class_for(module)
        if cls is None:
            of = next((c for c in type(module).__mro__ if c in self.table), None)
            kind = type(module).__name__
            if of is not None:
                self._note(
                    self.left, kind, name, f"a {of.__name__} of its own kind: it may compute something else"
                )
            elif module not in known and _NOTEWORTHY.search(kind) and not _makes_angles(module):
                self._note(self.left, kind, name, _UNKNOWN + (_PATCHED if calls_functional(module) else ""))
            elif type(module).__module__.partition(".")[0] != "torch" and _is_gated(module):
                self._note(self.left, kind, name, f"its gated activation: {_UNKNOWN}")
            return
        reason = None if self.options[cls.option] else f"{cls.option}=False"
        reason = reason or self._given(cls, module) or cls.refusal(module)
        parts = {part: (module.get_submodule(part), new) for part, new in cls.parts(module).items()}
        for part, (inner, new) in parts.items():
            if reason is None and self._given(new, inner) is not None:
                reason = f"{part}: {self._given(new, inner)}"
        if reason is not None:
            self._note(self.left, type(module).__name__, name, reason)
            return
        self._note(
            self.replaced, type(module).__name__, name, cls.runs + (f" ({cls.remark})" if cls.remark else "")
        )
        for part in cls.absorbs():
            self._absorb(getattr(module, part), f"{name}.{part}" if name else part, cls.runs)
        for inner, new in ((module, cls), *parts.values()):
            former = type(inner)
            self.undo.append(lambda m=inner, former=former: setattr(m, "__class__", former))  # type: ignore[misc]
            setattr(inner, "__class__", new)  # noqa: B010

    def _absorb(self, module: Any, name: str, into: str) -> None:
        """Note that a replaced module is not called: the op of the module that contains it computes it."""
        if isinstance(module, Replacement):
            kind = type(module).replaces.__name__
            key = self._key(kind, name, module.runs)
            self.replaced[key] -= 1
            self._note(self.replaced, kind, name, f"within {into}")

    def _given(self, cls: type[Replacement], module: nn.Module) -> str | None:
        """Return why a module cannot be given the class, or None."""
        if type(module) is not cls.replaces:
            return f"it is a {type(module).__name__}, not a {cls.replaces.__name__}"
        return "its forward was replaced on the module itself" if "forward" in vars(module) else None

    def _note(self, entries: Counter[tuple[str, str, str]], kind: str, name: str, detail: str) -> None:
        entries[self._key(kind, name, detail)] += 1

    def _key(self, kind: str, name: str, detail: str) -> tuple[str, str, str]:
        return kind, re.sub(r"\b\d+\b", "*", name) or "the model", detail

    def report(self) -> Report:
        def entries(counted: Counter[tuple[str, str, str]]) -> tuple[Entry, ...]:
            return tuple(Entry(*key, n) for key, n in reversed(counted.items()) if n)

        device = next((tensor.device for tensor in self.model.parameters()), torch.device("cpu"))
        note = f"warning: {off}" if (off := kernels_off(device)) else ""
        more = advice() if device.type == "cpu" else ""
        return Report(self.model, entries(self.replaced), entries(self.left), note, more)


def accelerate(
    model: nn.Module,
    *,
    attention: bool = True,
    cross_entropy: bool = True,
    gelu: bool = True,
    layer_norm: bool = True,
    rms_norm: bool = True,
    rope: bool = True,
    swiglu: bool = True,
) -> Report:
    """Run a model's attention, losses, activations and norms on fastgpt's kernels, in place.

    Parameters, buffers, hooks and the keys of the state dict stay what they are; a model computes the same, up to
    rounding (with dropout: from other random numbers, of the same distribution). What is not known exactly is left
    alone. Do it before `torch.compile`, DDP or `fully_shard`.

    In training a language model of transformers whose head and loss are fused (the report says
    linear_cross_entropy) returns a loss and no logits: they are never made. It returns both in evaluation, with
    `return_dict=False`, and with `cross_entropy=False`. Causal models understand `label_smoothing=` beside `labels=`.

    Args:
        model: PyTorch's own modules and models of transformers are known; see `fastgpt.integrations`.
        attention, cross_entropy, gelu, layer_norm, rms_norm, rope, swiglu: what to replace; rope is the rotation
            of queries and keys, and swiglu stands for MLPs with a gate, GEGLU's too.

    Returns:
        What was replaced by what, and what was left and why; it prints as a table, and `.model` is the model. For
        a model that is accelerated already nothing is done, and the report says so.

    Raises:
        TypeError: model is no module. Whatever is raised, the model is left as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate takes a torch.nn.Module, not a {type(model).__name__}")
    inner = _inner(model)
    already = _accelerated(inner)
    if already:
        what = f"{_listed(already)} in it" if already[0] else "the model"
        note = f"nothing done: {what} is accelerated already (fastgpt.restore({_written(already[0])}) undoes that)"
        return Report(model, (), (), note)
    options = dict(attention=attention, cross_entropy=cross_entropy, gelu=gelu, swiglu=swiglu)
    options |= dict(layer_norm=layer_norm, rms_norm=rms_norm, rope=rope)
    work = _Work(inner, options)
    try:
        work.all()
    except BaseException:
        for undo in reversed(work.undo):
            undo()
        raise
    return replace(work.report(), model=model)


def _is_gated(module: nn.Module) -> bool:
    """Return whether a module is a feed-forward block with a gate (SwiGLU, GEGLU), which no replacement fuses."""
    names = {*module._modules, *module._parameters}
    return any(names >= gate for gate in _GATED)


def _makes_angles(module: nn.Module) -> bool:
    """Return whether a module makes angles of a rotation, once for all layers: there is nothing to replace."""
    if "transformers" not in sys.modules or not type(module).__name__.endswith("RotaryEmbedding"):
        return False
    from fastgpt.integrations.rotary import makes_angles

    return makes_angles(type(module))


def _inner(model: nn.Module) -> nn.Module:
    """The model itself where it is one that torch.compile returned."""
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")  # imported by torch.compile, and slow to import
    while dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        model = model._orig_mod
    return model


def _accelerated(model: nn.Module) -> list[str]:
    """The names of those within a model, "" for itself, that `accelerate` was called with."""
    return [name for name, module in model.named_modules() if _RECORD in vars(module)]


def _listed(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _written(name: str) -> str:
    return f'model.get_submodule("{name}")' if name else "model"


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: the same classes, switches and results as before. Parameters keep what they have learned.

    Raises:
        ValueError: the model was not accelerated, or its modules were given other classes since (`fully_shard`,
            `torch.nn.utils.parametrizations`).
    """
    model = _inner(model)
    record = vars(model).get(_RECORD) if isinstance(model, nn.Module) else None
    if record is None:
        already = _accelerated(model) if isinstance(model, nn.Module) else []
        within = f"; {_listed(already)} in it was: fastgpt.restore({_written(already[0])})" if already else ""
        raise ValueError(f"this model was not accelerated, so there is nothing to restore{within}")
    replaced = [module for module in model.modules() if isinstance(module, Replacement)]
    for module in replaced:
        if "replaces" not in vars(type(module)):
            raise ValueError(
                f"a {type(module).__name__} was given another class since accelerate, by fully_shard or a "
                "parametrization it may be: it cannot be restored"
            )
    if "transformers" in sys.modules:
        from fastgpt.integrations import attention, language_model

        for name, before in record.get("attention", {}).items():
            attention.give_back(model.get_submodule(name), before)
        for part in model.modules():
            if vars(part).get("_loss_function") is language_model.causal_loss_of_logits:
                del part._loss_function
    for module in replaced:
        setattr(module, "__class__", type(module).replaces)  # noqa: B010  (as mypy wants it)
    delattr(model, _RECORD)
