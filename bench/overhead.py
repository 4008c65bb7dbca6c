"""The eager cost of a call, by the way an op is registered:  python -m bench.overhead

All patterns compute the same GELU of a 4×4 float32 tensor with the same C++ kernels, so that what
differs is the way through PyTorch. Medians of interleaved rounds, one thread. docs/design.md quotes
the figures and says what was chosen. Compiling the C++ pattern takes about half a minute.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.cpp_extension
from torch import Tensor

import fastgpt
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
    """Name of each pattern and its function."""
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
    patterns.library = library  # type: ignore[attr-defined]  # a library unregisters its ops when it dies

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


def main() -> None:
    """Prints a Markdown table of microseconds a call."""
    torch.set_num_threads(1)
    x = torch.randn(4, 4, requires_grad=True)
    grad = torch.randn(4, 4)
    found = patterns()
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in found}
    for _ in range(ROUNDS):
        for name, function in found.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                function(x)
            times[name][0].append((time.perf_counter() - start) / CALLS)
            start = time.perf_counter()
            for _ in range(CALLS):
                function(x).backward(grad)
            times[name][1].append((time.perf_counter() - start) / CALLS)
    print("| pattern | forward, µs | forward + backward, µs |\n|---|---|---|")
    for name, (forward, both) in times.items():
        print(f"| {name} | {1e6 * statistics.median(forward):.1f} | {1e6 * statistics.median(both):.1f} |")


if __name__ == "__main__":
    main()
