"""Base of all families: the class that a module has while it is accelerated, and layers that fuse.

A module is accelerated by giving it another class, a subclass of its own with another forward. Its parameters,
buffers, hooks and state keep their names; it can be copied, pickled and saved; giving the class back restores it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastgpt import functional, ops
from fastgpt.integrations.patch_functional import NAMES
from fastgpt.ops._checks import no_float64_on_gpu_backends
from fastgpt.ops._fallback import goes_to_pytorch, plain_reason
from fastgpt.ops._modules import is_unmodified


class Replacement(nn.Module):
    """The base of the classes that take another's place.

    replaces: the class whose place it takes; of exactly this class, since a subclass may compute something else.
    option:   the argument of `accelerate` that switches it.
    runs:     the op that it runs on, for the report; remark: what the report adds.
    scripts:  whether torch.jit.script can compile its forward, in which the drop-in is then PyTorch's.
    """

    replaces: ClassVar[type[nn.Module]]
    option: ClassVar[str]
    runs: ClassVar[str]
    remark: ClassVar[str] = ""
    scripts: ClassVar[bool] = False

    def __prepare_scriptable__(self) -> Replacement:
        """Called by torch.jit.script, of every module in a model, before it compiles any."""
        if not self.scripts:
            raise RuntimeError(
                f"torch.jit.script cannot compile an accelerated {type(self).replaces.__name__}: script the model "
                "before fastgpt.accelerate(model), or after fastgpt.restore(model); torch.jit.trace and torch.export "
                "need neither"
            )
        return self

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        """Return why this module, of the class that is replaced, must be left unchanged, or None.

        Its submodules have been looked at already.
        """
        return None

    @classmethod
    def parts(cls, module: Any) -> dict[str, type[Replacement]]:
        """Submodules by name that get a class of their own together with it."""
        return {}

    @classmethod
    def absorbs(cls) -> tuple[str, ...]:
        """Attributes whose work its own op does as well: modules there are not called any more."""
        return ()


def calls_functional(module: nn.Module) -> bool:
    """Return whether a module's class names a function that `patch_functional` replaces, or has no readable code."""
    methods = [
        value
        for cls in type(module).__mro__
        if cls not in (nn.Module, object)
        for value in vars(cls).values()
    ]
    codes = [code for method in methods if (code := getattr(method, "__code__", None)) is not None]
    if type(module).forward is nn.Module.forward:
        return True
    while codes:
        code = codes.pop()
        if set(NAMES) & set(code.co_names):
            return True
        codes += [constant for constant in code.co_consts if hasattr(constant, "co_names")]
    return False


def approximation(activation: Any) -> str | None:
    """Return "none" or "tanh" for a GELU, a function or a replaced module; None for other activations."""
    if activation in (functional.PYTORCH_GELU, functional.gelu):
        return "none"
    if isinstance(activation, Replacement) and activation.runs == "gelu":
        found: str = activation.approximate  # type: ignore[assignment]
        return found
    return None


def linear_gelu(input: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """`ops.linear_gelu`, or PyTorch's layer and activation where no kernel serves the call. Shapes as there."""
    reason = plain_reason(input, weight, optional=(bias,))
    if reason is None and input.dtype != weight.dtype and not torch.is_autocast_enabled(input.device.type):
        reason = "the dtypes differ"
    case = lambda b: no_float64_on_gpu_backends(b, input.dtype)  # noqa: E731
    if goes_to_pytorch("linear_gelu", input, reason, case):
        return functional.PYTORCH_GELU(nn.functional.linear(input, weight, bias), approximate=approximate)
    return ops.linear_gelu(input, weight, bias, approximate)


class LinearGelu(Replacement, nn.Linear):
    """A linear layer whose owner may ask for the GELU of its output as well, by `approximate`.

    The owner asks, instead of reading the weight, so that whoever hooks or shards the layer sees a call of it.
    """

    replaces = nn.Linear
    option = "gelu"
    runs = "linear_gelu"

    def forward(self, input: Tensor, approximate: str | None = None) -> Tensor:
        if approximate is None:
            return super().forward(input)
        return linear_gelu(input, self.weight, self.bias, approximate)


class OwnerOfGelu(Replacement):
    """The base for modules that call a linear layer and then its activation: `first` and `then` name them."""

    option, runs = "gelu", "linear_gelu"
    first: ClassVar[str] = "dense"
    first_class: ClassVar[type[Replacement]] = LinearGelu
    then: ClassVar[str]

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        activation = getattr(module, cls.then)
        if approximation(activation) is None:
            return f"its activation is no GELU that is known, but {type(activation).__name__}"
        return None

    @classmethod
    def parts(cls, module: Any) -> dict[str, type[Replacement]]:
        return {cls.first: cls.first_class}

    @classmethod
    def absorbs(cls) -> tuple[str, ...]:
        return (cls.then,)

    def activated(self, x: Tensor) -> Tensor:
        """Compute the activation of the layer's output, as one op where the layer supports it.

        A layer that was hooked, or replaced by another module such as an adapter, is called as before.
        """
        layer, activation = getattr(self, self.first), getattr(self, self.then)
        approximate = approximation(activation)
        fuses = isinstance(layer, Replacement) and all(
            is_unmodified(module, called=True)
            for module in (layer, activation)
            if isinstance(module, nn.Module)
        )
        if approximate is not None and fuses:
            return layer(x, approximate=approximate)
        return activation(layer(x))
