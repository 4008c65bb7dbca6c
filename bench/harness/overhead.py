"""Overhead of an eager call, by the way of registering an op: `python -m bench.harness.overhead`.

All patterns compute the same GELU of a 4×4 float32 tensor with the same C++ kernels; they differ in the path through
PyTorch. The results are medians of interleaved rounds on one thread. docs/design.md has the figures and the choice.
The compilation of the C++ pattern takes about half a minute.

`python -m bench.harness.overhead launchers` measures the host time of the Triton ops instead, as CPU time on CPU
tensors: everything from the call to the launch. The launch is replaced by an empty function, so the time that Triton
and the driver need for a launch is not included.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.utils.cpp_extension
from torch import Tensor

import fastgpt
from fastgpt import backends
from fastgpt.ops.gelu import _BWD, _FWD

ROUNDS, CALLS = 31, 300

CPP_AUTOGRAD = """
using torch::autograd::AutogradContext; using torch::autograd::variable_list; using at::Tensor;
static Tensor call(const Tensor& a) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fastgpt::gelu_fwd_cpp", "")
      .typed<Tensor(const Tensor&, bool)>();
  return op.call(a, false);
}
struct Gelu : torch::autograd::Function<Gelu> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x});
    return call(x);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fastgpt::gelu_bwd_cpp", "")
        .typed<Tensor(const Tensor&, const Tensor&, bool)>();
    return {op.call(grads[0], ctx->get_saved_variables()[0], false)};
  }
};
Tensor gelu(const Tensor& x) { return Gelu::apply(x); }
"""


def patterns() -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the functions of all patterns by name."""
    fwd, bwd = _FWD["cpp"], _BWD["cpp"]

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return fwd(x, False)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return bwd(grad, ctx.saved_tensors[0], False)

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return bwd(grad, ctx.saved_tensors[0], False)

    library = torch.library.Library("fastgpt_overhead", "DEF")
    library.define("gelu(Tensor x) -> Tensor")
    library.impl("gelu", lambda x: fwd(x, False), "CPU")
    torch.library.register_autograd("fastgpt_overhead::gelu", backward, setup_context=setup)
    patterns.library = library  # type: ignore[attr-defined]  # deleting a library unregisters its ops

    @torch.library.custom_op("fastgpt_overhead::custom_gelu", mutates_args=())
    def custom(x: Tensor) -> Tensor:
        return fwd(x, False)

    custom.register_autograd(backward, setup_context=setup)

    compiled = torch.utils.cpp_extension.load_inline(
        "fastgpt_overhead_cpp", CPP_AUTOGRAD, functions=["gelu"], extra_cflags=["-O2", "-g0"]
    )
    return {
        "torch.nn.functional.gelu": torch.nn.functional.gelu,
        "C++ autograd over the registered ops": compiled.gelu,
        "autograd.Function over the registered ops": Function.apply,
        "Python register_autograd": torch.ops.fastgpt_overhead.gelu,
        "torch.library.custom_op": custom,
        "fastgpt.ops.gelu (checks and choice of backend included)": fastgpt.ops.gelu,
        "fastgpt.functional.gelu": fastgpt.functional.gelu,
    }


def launchers() -> dict[str, Callable[[], Tensor]]:
    """Return calls of Triton ops on small tensors by name, and replace Triton's launch by an empty function."""
    from triton.runtime.jit import JITFunction

    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: None
    backends._cached_machine_refusal = lambda backend, device, number: None  # type: ignore[assignment]
    fastgpt.use_backend("triton").__enter__()
    x, weight, bias = (torch.randn(size, requires_grad=True) for size in ((64, 64), (64, 64), 64))
    target = torch.zeros(64, dtype=torch.int64)
    ops = fastgpt.ops
    return {
        "gelu": lambda: ops.gelu(x),
        "bias_gelu": lambda: ops.bias_gelu(x, bias),
        "cross_entropy": lambda: ops.cross_entropy(x, target),
        "add_layer_norm": lambda: ops.add_layer_norm(x, x, bias, bias)[0],
        "rms_norm": lambda: ops.rms_norm(x, bias),
        "linear_gelu": lambda: ops.linear_gelu(x, weight, bias),
    }


def main(which: str) -> None:
    """Print a Markdown table of microseconds per call."""
    torch.set_num_threads(1)
    if which == "launchers":
        found, clock = launchers(), time.process_time
    else:
        x, clock = torch.randn(4, 4, requires_grad=True), time.perf_counter
        found = {name: partial(function, x) for name, function in patterns().items()}
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in found}
    grads = {name: torch.ones_like(function()) for name, function in found.items()}
    for _ in range(ROUNDS):
        for name, function in found.items():
            start = clock()
            for _ in range(CALLS):
                function()
            times[name][0].append((clock() - start) / CALLS)
            start = clock()
            for _ in range(CALLS):
                function().backward(grads[name])
            times[name][1].append((clock() - start) / CALLS)
    print("| pattern | forward, µs | forward + backward, µs |\n|---|---|---|")
    for name, (forward, both) in times.items():
        print(f"| {name} | {1e6 * statistics.median(forward):.1f} | {1e6 * statistics.median(both):.1f} |")


if __name__ == "__main__":
    main(*sys.argv[1:2] or ["patterns"])
