"""Check that the kernels of an installed fastgpt are on and right: run as a file, beside PyTorch alone."""

import sys
from pathlib import Path

import torch

import fastgpt
from fastgpt.testing import check_error_rule

sys.path.append(
    str(Path(__file__).parents[2])
)  # after the installed packages: `fastgpt` is not that of the checkout
from tests.support import every_op

torch.set_num_threads(2)
assert fastgpt.extension.loaded(), fastgpt.extension.problem()
with fastgpt.use_backend("cpp"):
    for name in every_op.NAMES:
        for dtype in (torch.float32, torch.bfloat16):
            check_error_rule(*every_op.case(name, dtype))
print(torch.__version__, fastgpt.extension.variant(), fastgpt.__file__, sep="\n")
