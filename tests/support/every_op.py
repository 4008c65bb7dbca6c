"""A case of every op that the C++ kernels have: our function, PyTorch's, and inputs."""

import itertools

import torch
import torch.nn.functional as T

from fastgpt import ops
from fastgpt.testing import strided

NAMES = (
    "linear",
    "gelu",
    "bias_gelu",
    "linear_gelu",
    "mlp",
    "geglu",
    "swiglu",
    "relu_squared",
    "add_layer_norm",
    "rms_norm",
    "add_rms_norm",
    "rope",
    "attention",
    "attention_varlen",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_cross_entropy, row by row",  # another backward
)


def sdpa_by_document(q, k, v, bounds):
    """PyTorch's attention, causal, of (total, heads, D), a document at a time."""
    documents = [
        [t[begin:end].transpose(0, 1).unsqueeze(0) for t in (q, k, v)]
        for begin, end in itertools.pairwise(bounds)
    ]
    outs = [
        T.scaled_dot_product_attention(*d, is_causal=True, enable_gqa=True)
        for d in documents
        if d[0].shape[2]
    ]
    return torch.cat([out[0].transpose(0, 1) for out in outs])


def rotated(x, cos, sin):
    """RoPE of halves, of the first channels of x as the columns of cos have it."""
    pairs = cos.shape[-1]
    a, b = x[..., :pairs], x[..., pairs : 2 * pairs]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., 2 * pairs :]), dim=-1)


def case(name, dtype, rows=37, size=67):
    """(ours, PyTorch's, inputs); rows and columns of what the op works on.

    By default longer than a vector and with a tail on every instruction set. Attention has `rows` queries and keys
    and `size` columns a head, up to the 256 of the kernels.
    """

    def leaf(*shape, scale=1.0):
        return strided(shape, dtype, "contiguous", scale)

    vocab = 2 * size + 1
    target = torch.randint(0, vocab, (rows,))
    if name == "gelu":
        return ops.gelu, T.gelu, [leaf(rows, size)]
    if name == "bias_gelu":
        return (
            lambda x, b: ops.bias_gelu(x, b, "tanh"),
            lambda x, b: T.gelu(x + b, approximate="tanh"),
            [leaf(rows, size), leaf(size)],
        )
    if name == "linear":
        return ops.linear, T.linear, [leaf(rows, 16), leaf(2 * size, 16, scale=0.25), leaf(2 * size)]
    if name == "linear_gelu":
        inputs = [leaf(rows, 16), leaf(size, 16, scale=0.25), leaf(size)]
        return ops.linear_gelu, lambda *linear: T.gelu(T.linear(*linear)), inputs
    if name == "mlp":
        inputs = [
            leaf(rows, 16),
            leaf(size, 16, scale=0.25),
            leaf(size),
            leaf(16, size, scale=size**-0.5),
            leaf(16),
        ]
        return ops.mlp, lambda x, w1, b1, w2, b2: T.linear(T.gelu(T.linear(x, w1, b1)), w2, b2), inputs
    if name == "geglu":
        return ops.geglu, lambda a, b: T.gelu(a) * b, [leaf(rows, size), leaf(rows, size)]
    if name == "swiglu":
        # T.silu's backward has no forward mode.
        return ops.swiglu, lambda a, b: a * torch.sigmoid(a) * b, [leaf(rows, size), leaf(rows, size)]
    if name == "relu_squared":
        return ops.relu_squared, lambda x: T.relu(x).square(), [leaf(rows, size)]
    if name == "add_layer_norm":
        return (
            ops.add_layer_norm,
            lambda x, r, w, b: (T.layer_norm(x + r, w.shape, w, b), x + r),
            [leaf(rows, size), leaf(rows, size), leaf(size), leaf(size)],
        )
    if name == "rms_norm":
        return (
            lambda x, w: ops.rms_norm(x, w, offset=1.0),
            lambda x, w: T.rms_norm(x, w.shape, 1 + w, 1e-6),
            [leaf(rows, size), leaf(size)],
        )
    if name == "add_rms_norm":
        return (
            ops.add_rms_norm,
            lambda x, r, w: (T.rms_norm(x + r, w.shape, w, 1e-6), x + r),
            [leaf(rows, size), leaf(rows, size), leaf(size)],
        )
    if name == "rope":
        size = min(size, 256)
        angle = torch.randn(rows, size // 2)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        inputs = [leaf(2, heads, rows, size) for heads in (6, 4)]
        return (
            lambda q, k: ops.rope(q, k, cos, sin),
            lambda q, k: (
                rotated(q, cos.to(q.dtype), sin.to(q.dtype)),
                rotated(k, cos.to(k.dtype), sin.to(k.dtype)),
            ),
            inputs,
        )
    if name == "attention":
        return (
            lambda q, k, v: ops.attention(q, k, v, causal="upper_left"),
            lambda q, k, v: T.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
            [leaf(1, heads, rows, min(size, 256)) for heads in (2, 1, 1)],
        )
    if name == "attention_varlen":
        bounds = torch.tensor([0, rows // 3, rows // 3, rows])
        return (
            lambda q, k, v: ops.attention_varlen(q, k, v, bounds, bounds, rows, rows, causal="upper_left"),
            lambda q, k, v: sdpa_by_document(q, k, v, bounds.tolist()),
            [leaf(rows, heads, min(size, 256)) for heads in (2, 1, 1)],
        )
    options = {"reduction": "none" if name.endswith("row by row") else "mean", "label_smoothing": 0.1}
    if name == "cross_entropy":
        return (
            lambda x: ops.cross_entropy(x, target, **options),
            lambda x: T.cross_entropy(x, target, **options),
            [leaf(rows, vocab)],
        )
    return (
        lambda h, w, b: ops.linear_cross_entropy(h, w, target, bias=b, **options),
        lambda h, w, b: T.cross_entropy(T.linear(h, w, b), target, **options),
        [leaf(rows, 67), leaf(vocab, 67, scale=67**-0.5), leaf(vocab)],
    )
