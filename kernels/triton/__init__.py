"""Triton kernels of the fastgpt ops, one file an op; imported as `fastgpt.kernels`.

Each file reads from top to bottom: the mathematics, constants, forward kernel, backward kernel, and
the launchers `X_fwd` and `X_bwd`, whose arguments are those of the op's schema in `fastgpt/ops/X.py`.
Nothing here knows of autograd or dispatch.
"""
