"""The fixtures of all tests. Triton runs in its interpreter here: set before anything imports Triton."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

import fastgpt
from fastgpt.backends import BACKENDS

settings.register_profile(
    "fastgpt", deadline=None, max_examples=20, suppress_health_check=list(HealthCheck), print_blob=True
)
settings.load_profile("fastgpt")


@pytest.fixture(scope="session", autouse=True)
def _bf16_in_the_interpreter():
    from interpreter_bf16 import mend_bf16

    mend_bf16()


@pytest.fixture(autouse=True)
def _fresh_randomness_and_threads():
    """Every test draws fresh random inputs; the seed is printed when it fails."""
    torch.set_num_threads(2)
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)


@pytest.fixture(params=[b for b in BACKENDS if b != "cuda"])
def backend(request):
    """Each backend in turn, in force for the test."""
    available = fastgpt.available_backends("gelu")[request.param]
    if not available:
        pytest.skip(available.reason)
    with fastgpt.use_backend(request.param):
        yield request.param
