"""Compares `fastgpt.functional` with `torch.nn.functional`, call by call."""

import inspect

import pytest
import torch
import torch.nn.functional as T
from torch import Tensor

from fastgpt import functional as F
from fastgpt.testing import check_error_rule

NAMES = (
    *("scaled_dot_product_attention", "cross_entropy", "linear_cross_entropy"),
    *("gelu", "layer_norm", "rms_norm"),
)


def leaf(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


def classes(*shape, below=5, ignored=()):
    """Random targets; those at the flat places `ignored` are -100."""
    target = torch.randint(0, below, shape)
    target.view(-1)[list(ignored)] = -100
    return target


def example(name, dtype=torch.float32):
    """Arguments and options with which the kernels serve the function."""
    if name == "gelu":
        return (leaf(3, 5, dtype=dtype),), {"approximate": "tanh"}
    if name == "layer_norm":
        return (leaf(3, 5, dtype=dtype), [5], leaf(5, dtype=dtype), leaf(5, dtype=dtype)), {}
    if name == "rms_norm":
        return (leaf(3, 5, dtype=dtype), [5], leaf(5, dtype=dtype)), {}
    if name == "cross_entropy":
        return (leaf(4, 5, dtype=dtype), classes(4, ignored=[2])), {"label_smoothing": 0.1}
    if name == "linear_cross_entropy":
        return (leaf(4, 3, dtype=dtype), leaf(5, 3, dtype=dtype), classes(4)), {
            "linear_bias": leaf(5, dtype=dtype)
        }
    return tuple(leaf(2, 3, n, 8, dtype=dtype) for n in (4, 6, 6)), {"is_causal": True, "scale": 0.3}


def check_same(name, *arguments, autocast=False, **options):
    """Both accept the call; results and gradients agree by the error rule, in dtype and shape exactly."""
    bound = inspect.signature(getattr(F, name)).bind(*arguments, **options).arguments
    places = [key for key, value in bound.items() if isinstance(value, Tensor)]

    def of_tensors(function):
        def call(*tensors):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                given = {**bound, **dict(zip(places, tensors, strict=True))}
                return function(**given)

        return call

    tensors = [bound[key] for key in places]
    functions = of_tensors(getattr(F, name)), of_tensors(getattr(T, name))
    check_error_rule(*functions, tensors, rounding=torch.bfloat16 if autocast else None)


def check_same_error(error, name, *arguments, **options):
    """PyTorch refuses the call with this error, and the drop-in with the same."""
    for function in (getattr(T, name), getattr(F, name)):
        with pytest.raises(error) as raised:
            function(*arguments, **options)
        assert type(raised.value) is error, f"{function.__module__}.{name} raised {raised.value!r}"
