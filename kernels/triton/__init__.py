"""Triton kernels of the fastgpt ops, one file per op; imported as `fastgpt.kernels`.

Each file has, in this order, the formulas, constants, the forward kernel, the backward kernel, and the launchers
`X_fwd` and `X_bwd`, whose arguments are those of the op's schema in `fastgpt/ops/X.py`. Nothing here depends on
autograd or dispatch. Attention begins in attention.py and continues in attention_*.py.

Names in kernels: p_ pointer, b_ block (a tensor in registers), o_ offsets, m_ mask of a load or store, i_ index of a
program, s_ strides; capital letters are compile-time constants or sizes.
"""
