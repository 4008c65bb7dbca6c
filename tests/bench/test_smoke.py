"""One forward and backward of each op on each backend: the first test on a new machine."""

import pytest
import torch

from fastgpt.testing import check_error_rule
from tests.support.every_op import NAMES, case


@pytest.mark.parametrize("name", NAMES)
def test_op_obeys_the_error_rule(backend, name):
    ours, pytorch, inputs = case(name, torch.float32 if backend == "reference" else torch.bfloat16)
    check_error_rule(ours, pytorch, inputs)
