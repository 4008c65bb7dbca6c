"""Random calls of the drop-in for `test_differential.py`: shapes, layouts, dtypes and options by one seed each."""

import random
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

FUNCTIONS = (
    *("gelu", "layer_norm", "rms_norm"),
    *("cross_entropy", "linear_cross_entropy", "scaled_dot_product_attention"),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALF = (torch.bfloat16, torch.float16)


def contiguous(values, _):
    return values.clone()


def transposed(values, _):
    return values.mT.contiguous().mT if values.dim() > 1 else values.clone()


def in_steps(values, _):
    """Every second element of the last dimension."""
    room = values.new_full((*values.shape[:-1], 2 * values.shape[-1]), torch.nan)
    room[..., ::2] = values
    return room[..., ::2]


def expanded(values, draw):
    """One element of a dimension for all; never of the last, in which most functions would be constant."""
    if values.dim() < 2:
        return values.clone()
    dim = draw.randrange(values.dim() - 1)
    return values.narrow(dim, 0, min(1, values.shape[dim])).expand(values.shape).detach()


def negated(values, _):
    """A view with PyTorch's negative bit."""
    return torch._neg_view(-values)


def within_nan(values, _):
    """A slice of a larger tensor of NaN."""
    room = values.new_full([n + 2 for n in values.shape], torch.nan)
    inside = tuple(slice(1, n + 1) for n in values.shape)
    room[inside] = values
    return room[inside]


def with_offset(values, _):
    """One element behind the start of its memory, so that vectors are not aligned."""
    room = values.new_full((values.numel() + 1,), torch.nan)
    room[1:] = values.reshape(-1)
    return room[1:].view(values.shape)


def with_gaps(values, _):
    """A gap after each row."""
    room = values.new_full((*values.shape[:-1], values.shape[-1] + 3), torch.nan)
    room[..., : values.shape[-1]] = values
    return room[..., : values.shape[-1]]


LAYOUTS = (contiguous, transposed, in_steps, expanded, negated, within_nan, with_offset, with_gaps)


def laid_out(values, layout, draw):
    return layout(values, draw) if values.dim() else values.clone()


class _Upstream(torch.autograd.Function):
    """The identity, whose gradient arrives in a layout."""

    @staticmethod
    def forward(ctx, x, layout, seed):
        ctx.layout, ctx.seed = layout, seed
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        layout = contiguous if ctx.layout is expanded else ctx.layout  # which would change its values
        return laid_out(grad, layout, random.Random(ctx.seed)), None, None


@dataclass
class Case:
    """A call: positional tensors and options. Floating tensors require gradients unless they are fixed."""

    function: str
    dtype: torch.dtype
    autocast: bool
    seed: int
    upstream: Any = contiguous
    tensors: list[torch.Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    layouts: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self):
        given = ", ".join(
            f"{n}: {tuple(t.shape)} {t.dtype} {layout}"
            for n, t, layout in zip(self.names, self.tensors, self.layouts, strict=True)
        )
        how = " under autocast" if self.autocast else ""
        return f"seed {self.seed}: {self.function}({given}; {self.options}){how}, upstream {self.upstream.__name__}"

    def call(self, module, upstream=True, wide=False):
        """The function of a module as one of the tensors; `wide`: computed in float32, whatever their dtype."""

        def called(*tensors):
            dtype = next(t.dtype for t in tensors if t.is_floating_point())
            if wide and dtype in HALF:
                floats = [t.float() if t.is_floating_point() else t for t in tensors]
                return _Upstream.apply(called(*floats).to(dtype), self.upstream, self.seed)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                result = getattr(module, self.function)(
                    **dict(zip(self.names, tensors, strict=True)), **self.options
                )
            return (
                _Upstream.apply(result, self.upstream, self.seed)
                if upstream and result.requires_grad
                else result
            )

        return called


class _Maker:
    """Draws the arguments of one case."""

    def __init__(self, case):
        self.case, self.draw = case, random.Random(case.seed)
        torch.manual_seed(case.seed)

    def size(self, least=1, most=9):
        return self.draw.choice((least, self.draw.randint(least, most), self.draw.randint(least, 40)))

    def shape(self, dims, least=1):
        return tuple(self.size(least, 5) for _ in range(dims))

    def tensor(self, name, shape, *, scale=1.0, grad=True, dtype=None, without=()):
        values = torch.randn(shape).mul_(scale).to(dtype or self.case.dtype)
        layout = self.draw.choice([layout for layout in LAYOUTS if layout not in without])
        tensor = laid_out(values, layout, self.draw)
        self.add(name, tensor.requires_grad_(grad and self.maybe(0.9)), layout.__name__)

    def add(self, name, tensor, layout="contiguous"):
        self.case.names.append(name)
        self.case.tensors.append(tensor)
        self.case.layouts.append(layout)

    def maybe(self, share=0.5):
        return self.draw.random() < share

    def targets(self, shape, classes):
        targets = torch.randint(0, classes, shape)
        index = self.draw.choice((-100, -1, 0, classes + 3))
        if targets.numel() > 1 and index != 0:
            targets.view(-1)[self.draw.randrange(targets.numel())] = index
        self.case.options["ignore_index"] = index
        self.case.options["reduction"] = self.draw.choice(("mean", "sum", "none"))
        if self.maybe():
            self.case.options["label_smoothing"] = self.draw.choice((0.1, 0.5, 1.0))
        self.add("target", targets)

    def gelu(self):
        self.tensor("input", self.shape(self.draw.randint(1, 4), 0), scale=self.draw.choice((1.0, 4.0)))
        self.case.options["approximate"] = self.draw.choice(("none", "tanh"))

    def rms_norm(self):
        shape = self.shape(self.draw.randint(1, 4))
        normalized = shape[-self.draw.randint(1, len(shape)) :]
        self.tensor("input", shape, scale=self.draw.choice((1.0, 10.0)))
        if self.maybe(0.7):
            self.tensor("weight", normalized)
        self.case.options |= {
            "normalized_shape": list(normalized),
            "eps": self.draw.choice((None, 1e-6, 1e-3)),
        }

    def layer_norm(self):
        shape = self.shape(self.draw.randint(1, 4))
        count = self.draw.randint(1, len(shape))
        if (
            prod(shape[-count:]) < 5
        ):  # of few elements that may be near one another the gradient is rounding alone
            shape = (*shape[:-1], 7)
        normalized = shape[-count:]
        self.tensor("input", shape, scale=self.draw.choice((1.0, 10.0)))
        for name in ("weight", "bias"):
            if self.maybe(0.7):
                self.tensor(name, normalized)
        self.case.options |= {"normalized_shape": list(normalized), "eps": self.draw.choice((1e-5, 1e-3))}

    def cross_entropy(self):
        classes, dims = self.size(2, 9), self.draw.randint(1, 4)
        batch = self.shape(dims - 1)
        shape = (batch[0], classes, *batch[1:]) if batch else (classes,)
        self.tensor("input", shape, scale=self.draw.choice((1.0, 8.0)))
        self.targets(batch, classes)
        if self.maybe(0.4):
            self.weight(classes)

    def weight(self, classes):
        self.tensor("weight", (classes,), grad=False, without=LAYOUTS[1:])
        self.case.tensors[-1].abs_().add_(0.1)

    def no_equal_rows(self):
        """In 16 bits not one key, value or class for all: the gradient is 0, and what is computed rounding alone."""
        return (expanded,) if self.case.dtype in HALF or self.case.autocast else ()

    def linear_cross_entropy(self):
        least = (
            8 if self.case.dtype in HALF or self.case.autocast else 1
        )  # products of few terms cancel by luck
        rows, size, classes = self.size(least, 9), self.size(least, 20), self.size(max(least, 2), 20)
        self.tensor("input", (rows, size))
        self.tensor("linear_weight", (classes, size), scale=size**-0.5, without=self.no_equal_rows())
        if self.maybe():
            self.tensor("linear_bias", (classes,))
        self.targets((rows,), classes)
        if self.maybe(0.3):
            self.weight(classes)

    def scaled_dot_product_attention(self):
        half = self.case.dtype in HALF or self.case.autocast
        # In 16 bits of four dimensions, as PyTorch's kernel; and of four rows and columns: fewer are right by luck.
        dims = 4 if half else self.draw.randint(2, 4)
        rows, columns = (self.size(4, 40) if half else self.size(1, 20) for _ in range(2))
        batch, size = self.shape(dims - 2), self.draw.choice((1, 7, 8, 16, 33))
        groups = self.draw.choice((1, 2, 3)) if dims == 4 else 1
        queries = (batch[0], batch[1] * groups) if dims == 4 else batch
        self.tensor("query", (*queries, rows, size))
        self.tensor("key", (*batch, columns, size), without=self.no_equal_rows())
        value_size = size if half or self.maybe() else self.size(1, 9)
        self.tensor("value", (*batch, columns, value_size), without=self.no_equal_rows())
        kind = self.draw.choice(("none", "none", "causal", "boolean", "additive"))
        if kind == "causal" and not half:
            self.case.options["is_causal"] = True
        elif kind == "boolean":
            self.add("attn_mask", torch.rand(rows, columns) > (0.2 if half else 0.5))
        elif kind == "additive":
            dtype = torch.float32 if half and self.maybe() else self.case.dtype
            self.tensor("attn_mask", (rows, columns), grad=False, dtype=dtype)
        if self.maybe(0.3):
            self.case.options["scale"] = self.draw.choice((0.1, 1.0))
        if groups > 1 or (self.maybe(0.2) and dims == 4):
            self.case.options["enable_gqa"] = True


def case(function, seed, dtypes=DTYPES):
    """The call that belongs to a seed."""
    draw = random.Random(seed)
    dtype = draw.choice(dtypes)
    autocast = dtype == torch.float32 and draw.random() < 0.25
    made = Case(function, dtype, autocast, seed, draw.choice(LAYOUTS))
    getattr(_Maker(made), function)()
    if not any(t.requires_grad for t in made.tensors):
        made.tensors[0].requires_grad_()
    return made
