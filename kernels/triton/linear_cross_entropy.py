"""Cross-entropy of a linear layer's output; only a chunk of the logits is in memory at a time.

    logits = hidden weight^T + bias,   loss and statistics as in cross_entropy.py
    dhidden = dlogits weight,   dweight = dlogits^T hidden,   dbias = sum_i dlogits_i

Shapes: hidden (N, D), weight (V, D), bias (V,), target (N,). The rows are processed in chunks of C. One matrix product
gives the logits of a chunk (C, V) in the inputs' dtype, the cross-entropy kernels write the gradient over them, and two
more products give the chunk's part of the gradients. The row gradient of loss.sum() is 1, known in the forward: so
forward and backward take three products instead of four. For any other row gradient, `linear_cross_entropy_bwd`
recomputes the logits of each chunk.

The products are PyTorch's (cuBLAS). Statistics and sums over chunks are fp32. The cross-entropy kernels are those of
Triton or of csrc/cuda/cross_entropy.cu, which computes loss and gradient of a chunk with one read and one write of its
logits. The latter import nothing of Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._ops import ops

# Rows of a chunk. dweight (V, D) is fp32, and read and written once per chunk: 8 V D bytes for 6 C V D FLOPs of the
# three products. At 800 TFLOP/s and 4.8 TB/s that is 220 / C of their time: 5 % at C = 4096, and 20 % at a quarter of
# it, which would still fill the GPU. The logits of 4096 rows are 412 MB at V = 50304 in 16 bits. A larger vocabulary or
# fp32 reaches the second bound, which keeps the op's memory small.
CHUNK_ROWS = 4096
CHUNK_BYTES = 2**29
ROW_MULTIPLE = 128  # a tile of the products


class Kernels(NamedTuple):
    """Cross-entropy of a chunk: the loss, the gradient written over the logits, and both at once."""

    fwd: Callable[..., Any]
    bwd_inplace: Callable[..., Any]
    with_grad_inplace: Callable[..., Any]


def _triton() -> Kernels:
    from . import cross_entropy as module

    return Kernels(
        module.cross_entropy_fwd, module.cross_entropy_bwd_inplace, module.cross_entropy_with_grad_inplace
    )


def _cuda() -> Kernels:
    return Kernels(
        ops.cross_entropy_fwd_cuda.default,
        ops.cross_entropy_bwd_inplace_cuda.default,
        ops.cross_entropy_with_grad_inplace_cuda.default,
    )


def linear_cross_entropy_fwd(*arguments: Any) -> tuple[Tensor, ...]:
    return _forward(_triton(), *arguments)


def linear_cross_entropy_bwd(*arguments: Any) -> tuple[Tensor, ...]:
    return _backward(_triton(), *arguments)


def linear_cross_entropy_fwd_cuda(*arguments: Any) -> tuple[Tensor, ...]:
    return _forward(_cuda(), *arguments)


def linear_cross_entropy_bwd_cuda(*arguments: Any) -> tuple[Tensor, ...]:
    return _backward(_cuda(), *arguments)


def chunk_rows(N: int, V: int, itemsize: int, chunk: int) -> int:
    """Return the rows of a chunk: `chunk` if it is positive, else about equal chunks within the two bounds above."""
    if chunk > 0:
        return min(chunk, max(N, 1))
    most = max(min(CHUNK_ROWS, CHUNK_BYTES // (max(V, 1) * itemsize)), ROW_MULTIPLE)
    even = _cdiv(N, max(_cdiv(N, most), 1))
    return max(min(_cdiv(even, ROW_MULTIPLE) * ROW_MULTIPLE, N), 1)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _logits_buffer(hidden: Tensor, V: int, rows: int) -> Tensor:
    """Allocate (rows, V) with rows that start at multiples of 16 elements, as the products' fast loads need."""
    buffer = hidden.new_empty(rows, _cdiv(V, 16) * 16)
    # On CPUs with AMX, PyTorch's 16-bit products read past the ends of rows, and a NaN there would reach the result.
    if not hidden.is_cuda:
        buffer[:, V:] = 0
    return buffer[:, :V]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """Write hidden weight^T + bias to the first rows of the buffer and return them."""
    logits = buffer[: hidden.shape[0]]
    if bias is None:
        return torch.mm(hidden, weight.t(), out=logits)
    return torch.addmm(bias, hidden, weight.t(), out=logits)


def _mm_fp32(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Compute out = a b in fp32. Products of 16-bit factors with an fp32 result exist only on the GPU."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


def _add_mm_fp32(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute out += a b in fp32, like `_mm_fp32`."""
    if a.dtype == torch.float32:
        out.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(a.float(), b.float())


def _forward(
    kernels: Kernels,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    chunk: int,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, statistics, and with `with_grad` the fp32 gradients of loss.sum(): dhidden, dweight, dbias."""
    (N, D), V = hidden.shape, weight.shape[0]
    options = (class_weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    fp32 = {"dtype": torch.float32, "device": hidden.device}
    loss = torch.empty(N, **fp32)
    statistics = torch.empty((N, 2), **fp32)
    dhidden = torch.empty((N, D) if with_grad else 0, **fp32)
    dweight = torch.zeros((V, D) if with_grad else 0, **fp32)
    dbias = torch.zeros(V if with_grad and bias is not None else 0, **fp32)

    rows = chunk_rows(N, V, hidden.element_size(), chunk)
    buffer = _logits_buffer(hidden, V, rows)
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        h, y = hidden[part], target[part]
        logits = _logits(h, weight, bias, buffer)
        if with_grad:
            loss[part], statistics[part] = kernels.with_grad_inplace(logits, y, *options, 0)
            _mm_fp32(logits, weight, dhidden[part])
            _add_mm_fp32(dweight, logits.t(), h)
            if bias is not None:
                dbias += logits.sum(0, dtype=torch.float32)
        else:
            loss[part], statistics[part] = kernels.fwd(logits, y, *options)
    return loss, statistics, dhidden, dweight, dbias


def _backward(
    kernels: Kernels,
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    statistics: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dhidden, dweight and dbias for any row gradient, in the inputs' dtypes."""
    (N, D), V = hidden.shape, weight.shape[0]
    options = (class_weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    dweight = hidden.new_zeros(V, D, dtype=torch.float32)
    dbias = hidden.new_zeros(0 if bias is None else V, dtype=torch.float32)

    rows = chunk_rows(N, V, hidden.element_size(), chunk)
    buffer = _logits_buffer(hidden, V, rows)
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        h = hidden[part]
        logits = _logits(h, weight, bias, buffer)
        kernels.bwd_inplace(grad_loss[part], None, logits, target[part], statistics[part], *options)
        torch.mm(logits, weight, out=dhidden[part])
        _add_mm_fp32(dweight, logits.t(), h)
        if bias is not None:
            dbias += logits.sum(0, dtype=torch.float32)
    return dhidden, dweight.to(weight.dtype), dbias.to(hidden.dtype if bias is None else bias.dtype)
