"""A case of every op that the C++ kernels have: our function, PyTorch's, and inputs."""

import torch
import torch.nn.functional as T

from fastgpt import ops
from fastgpt.testing import strided

NAMES = (
    "gelu",
    "bias_gelu",
    "linear_gelu",
    "geglu",
    "add_layer_norm",
    "attention",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_cross_entropy, row by row",  # another backward
)


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
    if name == "linear_gelu":
        inputs = [leaf(rows, 16), leaf(size, 16, scale=0.25), leaf(size)]
        return ops.linear_gelu, lambda *linear: T.gelu(T.linear(*linear)), inputs
    if name == "geglu":
        return ops.geglu, lambda a, b: T.gelu(a) * b, [leaf(rows, size), leaf(rows, size)]
    if name == "add_layer_norm":
        return (
            ops.add_layer_norm,
            lambda x, r, w, b: (T.layer_norm(x + r, w.shape, w, b), x + r),
            [leaf(rows, size), leaf(rows, size), leaf(size), leaf(size)],
        )
    if name == "attention":
        return (
            lambda q, k, v: ops.attention(q, k, v, causal="upper_left"),
            lambda q, k, v: T.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
            [leaf(1, heads, rows, min(size, 256)) for heads in (2, 1, 1)],
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
