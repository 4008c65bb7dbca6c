"""Ahead-of-time compilation of the Triton kernels, in every configuration of the launchers; needs no GPU.

The launchers are called with CPU tensors, and a recorder replaces the launch. The compiled kernels are therefore those
of a GPU, with the tile sizes of its architecture and the specializations of the arguments. A process can use either
Triton's interpreter or its compiler: TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}


@dataclass(frozen=True)
class Configuration:
    """A call of the launchers of an op.

    Attributes:
        quick: every test run compiles this configuration.
    """

    op: str
    name: str
    launch: Callable[[], None]
    quick: bool = False


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel.

    Attributes:
        kernel: name of the kernel.
        constants: compile-time arguments, such as BLOCK_M, and every argument that is None.
        numbers: other integer arguments.
        itemsize: bytes of an element of the first tensor with two or more dimensions.
        shared: bytes of shared memory of a program.
    """

    kernel: str
    constants: dict[str, Any]
    numbers: dict[str, int]
    itemsize: int
    warps: int
    stages: int
    shared: int
    cubin: bytes


def configurations() -> Iterator[Configuration]:
    """Yield all configurations, the most important first."""
    for dtype, size in itertools.product((BF16, FP32), (64, 128, 256)):
        name, quick = f"{_NAMES[dtype]} d{size}", dtype == BF16 and size < 256
        dropped = _attention(dtype, size, dropout=0.1, mask=torch.bool)
        yield Configuration("attention", f"{name} causal", _attention(dtype, size), quick)
        yield Configuration(
            "attention", f"{name} deterministic", _attention(dtype, size, deterministic=True), quick
        )
        yield Configuration("attention", f"{name} dropout mask", dropped, quick and size == 64)
    for size in (64, 128, 256):
        yield Configuration("attention", f"tf32 d{size} causal", _tf32(_attention(FP32, size)))
        dropped = _tf32(_attention(FP32, size, dropout=0.1, mask=torch.bool))
        yield Configuration("attention", f"tf32 d{size} dropout mask", dropped)
    for size in (64, 256):
        deterministic = _tf32(_attention(FP32, size, deterministic=True))
        yield Configuration("attention", f"tf32 d{size} deterministic", deterministic)
    yield Configuration("attention", "tf32 d64 decoding", _tf32(_decoding(FP32, 64)))
    for size in (96, 128):
        yield Configuration("attention", f"fp16 d{size} full", _attention(FP16, size, right=-1))
    for size in (64, 128):
        yield Configuration("attention", f"bf16 d{size} small", _attention(BF16, size, small=True))
        deterministic = _attention(BF16, size, small=True, deterministic=True)
        yield Configuration("attention", f"bf16 d{size} small deterministic", deterministic)
    for size in (64, 128):
        yield Configuration("attention", f"bf16 d{size} alibi", _attention(BF16, size, alibi=True))
    for size in (64, 128):
        yield Configuration("attention", f"bf16 d{size} decoding", _decoding(BF16, size), size == 64)
    yield Configuration(
        "attention", "bf16 d256 decoding one head", _decoding(BF16, 256, heads=1, length=1 << 17)
    )
    for size in (64, 128):
        yield Configuration("attention", f"bf16 d{size} one tile", _attention(BF16, size, length=32))
    narrow = _attention(BF16, 128, value_size=64, left=128, kv_heads=1)
    yield Configuration("attention", "bf16 d128 dv64 window", narrow)
    for dtype, size in ((BF16, 64), (BF16, 128), (FP32, 128)):
        learned = _attention(dtype, size, mask=FP32, learned=True)
        yield Configuration("attention", f"{_NAMES[dtype]} d{size} learned mask", learned)
    everything = _attention(BF16, 64, left=256, softcap=30.0, dropout=0.1, mask=FP32, alibi=True, kv_heads=1)
    yield Configuration("attention", "bf16 d64 everything", everything)
    for size in (64, 128):
        yield Configuration(
            "attention_varlen", f"bf16 d{size} causal", _attention_varlen(BF16, size), size == 64
        )
    for dtype in (BF16, FP32):
        name = _NAMES[dtype]
        for classes in (50304, 50257):
            launch = _cross_entropy(dtype, classes)
            yield Configuration("cross_entropy", f"{name} V{classes}", launch, dtype == BF16)
        launch = _cross_entropy(dtype, 50257, 0.1, 30.0)
        yield Configuration("cross_entropy", f"{name} V50257 smoothing softcap", launch)
        launch = _cross_entropy(dtype, 50257, scale=0.0625)
        yield Configuration("cross_entropy", f"{name} V50257 scale", launch)
    yield Configuration("cross_entropy", "bf16 V1 smoothing", _cross_entropy(BF16, 1, 0.1))
    for dtype, form, op in itertools.product((BF16, FP32), ("erf", "tanh"), ("gelu", "bias_gelu", "geglu")):
        yield Configuration(op, f"{_NAMES[dtype]} {form}", _gelu(op, dtype, form == "tanh"), dtype == BF16)
    for dtype, op in itertools.product((BF16, FP32), ("swiglu", "relu_squared")):
        yield Configuration(op, _NAMES[dtype], _elementwise(op, dtype), dtype == BF16)
    for dtype, form in ((BF16, "erf"), (BF16, "tanh"), (FP16, "erf"), (FP32, "erf")):
        launch = _linear_gelu(dtype, form == "tanh")
        yield Configuration("linear_gelu", f"{_NAMES[dtype]} {form}", launch, dtype == BF16)
    yield Configuration("linear_gelu", "bf16 erf 16 rows", _linear_gelu(BF16, rows=16))
    launch = _linear_gelu(BF16, inner=770)  # rows without a tensor descriptor
    yield Configuration("linear_gelu", "bf16 erf K=770", launch)
    yield Configuration("linear_gelu", "tf32 erf", _tf32(_linear_gelu(FP32)))
    yield Configuration("linear_gelu", "tf32 erf 16 rows", _tf32(_linear_gelu(FP32, rows=16)))
    for dtype, size in ((BF16, 768), (BF16, 64), (BF16, 1600), (BF16, 4096), (BF16, 16384), (FP32, 768)):
        name, quick = f"{_NAMES[dtype]} D{size}", (dtype, size) == (BF16, 768)
        yield Configuration("add_layer_norm", name, _layer_norm(dtype, size), quick)
    for dtype, size in ((BF16, 768), (BF16, 64), (BF16, 4096), (BF16, 16384), (FP32, 768)):
        name, quick = f"{_NAMES[dtype]} D{size}", (dtype, size) == (BF16, 768)
        yield Configuration("rms_norm", name, _rms_norm(dtype, size), quick)
        yield Configuration("add_rms_norm", name, _rms_norm(dtype, size, residual=True), quick)
    for dtype, size in ((BF16, 64), (BF16, 128), (FP32, 64)):
        for interleaved in (False, True):
            name = f"{_NAMES[dtype]} d{size}{' interleaved' if interleaved else ''}"
            launch = _rope(dtype, size, interleaved=interleaved)
            yield Configuration("rope", name, launch, (dtype, size) == (BF16, 64))
    yield Configuration("rope", "bf16 d96 turned 32", _rope(BF16, 96, turned=32))


# ---- launchers called as the ops call them ----


def _tf32(launch: Callable[[], None]) -> Callable[[], None]:
    """Wrap a call so that PyTorch allows tf32 for fp32 products."""

    def launch_with_tf32() -> None:
        matmul = torch.backends.cuda.matmul
        before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
        try:
            launch()
        finally:
            matmul.fp32_precision = before

    return launch_with_tf32


def _attention(
    dtype: torch.dtype,
    size: int,
    *,
    value_size: int | None = None,
    kv_heads: int = 2,
    left: int = -1,
    right: int = 0,
    softcap: float = 0.0,
    dropout: float = 0.0,
    mask: torch.dtype | None = None,
    alibi: bool = False,
    deterministic: bool = False,
    length: int = 256,
    small: bool = False,
    learned: bool = False,
) -> Callable[[], None]:
    """Return a call of attention's launchers.

    Args:
        learned: the mask, of all heads, requires a gradient; without it all heads share it.
        small: the problem is too small for tensor descriptors; without it every problem counts as large.
    """

    def launch() -> None:
        from fastgpt.kernels import attention, attention_launch

        heads = 2
        q = torch.empty(1, length, heads, size, dtype=dtype).transpose(1, 2)
        k = torch.empty(1, length, kv_heads, size, dtype=dtype).transpose(1, 2)
        v = torch.empty(1, length, kv_heads, value_size or size, dtype=dtype).transpose(1, 2)
        extras = (
            None if mask is None else torch.zeros(1, heads if learned else 1, length, length, dtype=mask),
            torch.ones(heads) if alibi else None,
            torch.zeros(1, dtype=torch.int64) if dropout else None,
        )
        options = (size**-0.5, True, left, right, softcap, dropout)
        least = attention_launch.DESCRIPTOR_MIN_MACS if small else 0
        with mock.patch.object(attention_launch, "DESCRIPTOR_MIN_MACS", least):
            out, stats = attention.attention_fwd(q, k, v, *extras, *options)
            attention.attention_bwd(out, None, q, k, v, out, stats, *extras, *options, learned, deterministic)

    return launch


def _decoding(dtype: torch.dtype, size: int, *, heads: int = 2, length: int = 4096) -> Callable[[], None]:
    def launch() -> None:
        from fastgpt.kernels import attention

        q = torch.empty(1, 1, heads, size, dtype=dtype).transpose(1, 2)
        k = torch.empty(1, length, heads, size, dtype=dtype).transpose(1, 2)
        attention.attention_fwd(q, k, k, None, None, None, size**-0.5, True, -1, 0, 0.0, 0.0)

    return launch


def _attention_varlen(dtype: torch.dtype, size: int) -> Callable[[], None]:
    def launch() -> None:
        from fastgpt.kernels import attention_varlen

        q = torch.empty(512, 2, size, dtype=dtype)
        bounds = torch.tensor([0, 256, 512], dtype=torch.int32)
        options = (bounds, bounds, None, None, 256, 256, size**-0.5, False, -1, 0, 0.0, 0.0)
        out, stats = attention_varlen.attention_varlen_fwd(q, q, q, *options)
        attention_varlen.attention_varlen_bwd(out, None, q, q, q, out, stats, *options, False)

    return launch


def _cross_entropy(
    dtype: torch.dtype, classes: int, smoothing: float = 0.0, softcap: float = 0.0, scale: float = 1.0
) -> Callable[[], None]:
    def launch() -> None:
        from fastgpt.kernels import cross_entropy

        logits, target = torch.empty(4, classes, dtype=dtype), torch.zeros(4, dtype=torch.int64)
        options = (torch.ones(classes) if smoothing else None, -100, smoothing, 0.0, softcap, scale)
        loss, statistics = cross_entropy.cross_entropy_fwd(logits, target, *options)
        cross_entropy.cross_entropy_bwd(loss, None, logits, target, statistics, *options)

    return launch


def _gelu(op: str, dtype: torch.dtype, tanh: bool) -> Callable[[], None]:
    def launch() -> None:
        from fastgpt.kernels import gelu

        x = torch.empty(256, 3072, dtype=dtype)
        second: tuple[Tensor, ...] = {"gelu": (), "bias_gelu": (x[0].clone(),), "geglu": (x.clone(),)}[op]
        getattr(gelu, f"{op}_fwd")(x, *second, tanh)
        getattr(gelu, f"{op}_bwd")(x, x, *second, tanh)

    return launch


def _elementwise(op: str, dtype: torch.dtype) -> Callable[[], None]:
    def launch() -> None:
        module = importlib.import_module(f"fastgpt.kernels.{op}")
        x = torch.empty(256, 3072, dtype=dtype)
        inputs = (x, x.clone()) if op == "swiglu" else (x,)
        getattr(module, f"{op}_fwd")(*inputs)
        getattr(module, f"{op}_bwd")(x, *inputs)

    return launch


def _linear_gelu(
    dtype: torch.dtype, tanh: bool = False, *, rows: int = 256, inner: int = 768
) -> Callable[[], None]:
    def launch() -> None:
        from fastgpt.kernels import linear_gelu

        x, weight = torch.empty(rows, inner, dtype=dtype), torch.empty(3072, inner, dtype=dtype)
        y, z = linear_gelu.linear_gelu_fwd(x, weight, weight[:, 0].contiguous(), tanh, True)
        linear_gelu.linear_gelu_bwd(y, z, tanh)

    return launch


def _layer_norm(dtype: torch.dtype, size: int) -> Callable[[], None]:
    def launch() -> None:
        from fastgpt.kernels import add_layer_norm

        x, weight = torch.empty(64, size, dtype=dtype), torch.empty(size)
        normed, total, mean, rstd = add_layer_norm.add_layer_norm_fwd(x, x, weight, weight, 1e-5)
        add_layer_norm.add_layer_norm_bwd(normed, normed, total, weight, mean, rstd)

    return launch


def _rms_norm(dtype: torch.dtype, size: int, *, residual: bool = False) -> Callable[[], None]:
    def launch() -> None:
        from fastgpt.kernels import rms_norm

        x, weight = torch.empty(64, size, dtype=dtype), torch.empty(size)
        other = torch.empty_like(x) if residual else None
        normed, _, rstd = rms_norm.rms_norm_fwd(x, other, weight, 1e-6, 0.0)
        rms_norm.rms_norm_bwd(normed, other, x, weight, rstd, 0.0)

    return launch


def _rope(
    dtype: torch.dtype, size: int, *, turned: int | None = None, interleaved: bool = False
) -> Callable[[], None]:
    """Return a call of one launcher; the other launches the same kernel."""

    def launch() -> None:
        from fastgpt.kernels import rope

        q, k = (torch.empty(1, 64, heads, size, dtype=dtype).transpose(1, 2) for heads in (16, 4))
        cos = torch.empty(64, (turned or size) // 2)
        rope.rope_fwd(q, k, cos, cos.clone(), interleaved)

    return launch


# ---- recording and compiling ----


# Multiprocessors of the largest GPU of each architecture (NVIDIA's datasheets); split decoding depends on them.
MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 142, "sm_90a": 132, "sm_100a": 148, "sm_120": 188}


def compiled(configuration: Configuration, arch: str) -> Iterator[Compiled]:
    """Compile every kernel that a configuration launches for one of `bench.codegen.sass.ARCHITECTURES`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    from fastgpt.kernels import attention, attention_config, attention_launch, linear_gelu

    number = int(arch.removeprefix("sm_").removesuffix("a"))
    target = GPUTarget("cuda", number, 32)
    backend = make_backend(target)
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    recorded = lambda self, *args, grid, warmup, **kwargs: launches.append((self, args, kwargs))  # noqa: E731
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", recorded))
        for module in (attention_config, attention_launch, linear_gelu):
            stack.enter_context(mock.patch.object(module, "capability", lambda _: divmod(number, 10)))
        count = MULTIPROCESSORS[arch]
        stack.enter_context(mock.patch.object(attention, "multiprocessors", lambda _: count))
        configuration.launch()
    for function, arguments, keywords in launches:
        # As in a launch: 1 and None become constants, and arguments divisible by 16 are marked.
        bind = create_function_from_signature(function.signature, function.params, backend)
        bound, specialization, given = bind(*arguments, **keywords)
        options, signature, constants, attributes = function._pack_args(
            backend, keywords, bound, specialization, given
        )
        source = ASTSource(function, signature, constants, attributes)
        kernel = triton.compile(source, target=target, options=options.__dict__)
        yield Compiled(
            function.__name__.removeprefix("_"),
            {p.name: bound[p.name] for p in function.params if p.is_constexpr or bound[p.name] is None},
            {name: value for name, value in bound.items() if type(value) is int},
            next(x.element_size() for x in arguments if isinstance(x, Tensor) and x.dim() > 1),
            kernel.metadata.num_warps,
            kernel.metadata.num_stages,
            kernel.metadata.shared,
            kernel.asm["cubin"],
        )
