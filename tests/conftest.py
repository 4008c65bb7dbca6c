"""The fixtures of all tests.

On the CPU, Triton runs in its interpreter. `--device cuda` runs the tests that take a backend, and only those,
on a GPU: its kernels compiled, every tensor that a test makes on the GPU.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

import fastgpt
from fastgpt.backends import BACKENDS

settings.register_profile(
    "fastgpt", deadline=None, max_examples=20, suppress_health_check=list(HealthCheck), print_blob=True
)
settings.load_profile("fastgpt")


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the kernels run")


def pytest_configure(config):
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which nothing has done yet


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") == "cuda":
        elsewhere = [item for item in items if "backend" not in item.fixturenames]
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if item not in elsewhere]


@pytest.fixture(scope="session", autouse=True)
def _device(pytestconfig):
    """Tensors on the GPU, or else Triton's interpreter with what it lacks."""
    if pytestconfig.getoption("--device") == "cuda":
        torch.set_default_device("cuda")
        return
    from interpreter_bf16 import mend_bf16
    from interpreter_descriptors import mend_descriptors

    mend_bf16()
    mend_descriptors()


@pytest.fixture(autouse=True)
def _fresh_randomness_and_threads():
    """Every test draws fresh random inputs; the seed is printed when it fails."""
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(False)
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)


@pytest.fixture
def single_thread(_fresh_randomness_and_threads):
    """For models so small that a second thread is only waited for."""
    torch.set_num_threads(1)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each backend in turn, in force for the test; on the CPU, the CUDA kernels run in the emulator."""
    on_gpu = request.config.getoption("--device") == "cuda"
    if request.param == "cpp" and on_gpu:
        pytest.skip("the C++ kernels are the CPU's")
    if request.param == "cuda" and not on_gpu:
        from simt import emulator

        if emulator.problem():
            pytest.skip(emulator.problem())
        emulator.seed(torch.initial_seed())
        with emulator.running(), fastgpt.use_backend("cuda"):
            yield "cuda"
        return
    available = fastgpt.available_backends("gelu")[request.param]
    if not available:
        pytest.skip(available.reason)
    with fastgpt.use_backend(request.param):
        yield request.param
