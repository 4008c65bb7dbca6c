"""The fixtures of all tests.

`backend` is each backend in turn, `dtype` each dtype that the backend serves, `examples` the number of examples that
hypothesis draws. The following become slow here: a hundred examples; tests marked `once` on all backends but one; tests
marked `costly`, and float16, where a kernel is interpreted or emulated.

On the CPU, Triton runs in its interpreter and the CUDA kernels in the emulator. `--device cuda` runs the tests that
take a backend or the fixture `cuda`, and only those, on a GPU: kernels compiled, every tensor that a test makes on the
GPU. There a backend for GPUs that is missing is a failure. Tests marked `gpu` run there alone, those marked `emulated`
on the CPU alone.
"""

import os
import random
import time
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

import fastgpt
from fastgpt.backends import BACKENDS
from tests.support.contract import DTYPES, GPU_BACKENDS, PROVED_ONCE, dtypes_of

EXAMPLES = {"cpp": 20, "reference": 20, "triton": 5, "cuda": 5}  # an interpreted or emulated one costs more
MANY = 100  # in the slow tier


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the kernels run")
    parser.addoption(
        "--seed",
        default="0",
        metavar="N|random",
        help="seed of all inputs, with the test's name (default: 0)",
    )
    parser.addoption(
        "--simt-profile", metavar="NAME", help="the GPU that is emulated (PROFILES in tests/simt/emulator.py)"
    )
    parser.addoption(
        "--minutes", type=float, metavar="N", help="start no test after that time; the summary counts them"
    )


START = time.monotonic()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    minutes = item.config.option.minutes
    if minutes is not None and time.monotonic() - START > 60 * minutes:
        pytest.skip(f"not started: the {minutes:g} minutes of --minutes are over")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    # Of the workers, too: a thread that waits leaves its core to others.
    os.environ["OMP_WAIT_POLICY"] = "passive"
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which nothing has done yet
    if (
        config.option.seed == "random"
    ):  # drawn once: xdist passes the main process's options on to its workers
        config.option.seed = str(int.from_bytes(os.urandom(4), "little"))
    if not config.option.seed.isdecimal():
        raise pytest.UsageError(f"--seed takes a number or 'random', not {config.option.seed!r}")
    fixed = config.option.seed == "0"
    if not fixed:
        config.option.hypothesis_seed = config.option.seed
    settings.register_profile(
        "fastgpt",
        deadline=None,
        max_examples=EXAMPLES["cpp"],
        suppress_health_check=list(HealthCheck),
        derandomize=fixed,
        print_blob=not fixed,
    )
    settings.load_profile("fastgpt")


def pytest_terminal_summary(terminalreporter, config):
    terminalreporter.write_line(
        f"seed: {config.option.seed} (--seed {config.option.seed} draws the same inputs)"
    )


@pytest.hookimpl(optionalhook=True)  # `make gpu` needs no pytest-xdist
def pytest_xdist_auto_num_workers():
    """Start a worker for each core that this process may use, eight at most: each takes up to about 2 GiB."""
    return min(len(os.sched_getaffinity(0)), 8)


def pytest_generate_tests(metafunc):
    """Parametrize tests by backend, and by the dtypes or numbers of examples of each backend."""
    given = {
        name
        for mark in metafunc.definition.iter_markers("parametrize")
        for name in (mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0])
    }
    names = [name for name in ("dtype", "examples") if name in metafunc.fixturenames and name not in given]
    if "backend" not in metafunc.fixturenames or "backend" in given:
        return
    only = metafunc.definition.get_closest_marker("only")
    cases = []
    for backend in only.args if only else BACKENDS:
        if names == ["dtype"]:
            cases += [
                pytest.param(backend, dtype, id=f"{backend}-{DTYPES[dtype]}") for dtype in dtypes_of(backend)
            ]
        elif names == ["examples"]:
            cases.append(pytest.param(backend, EXAMPLES[backend], id=f"{backend}-{EXAMPLES[backend]}"))
            cases.append(pytest.param(backend, MANY, id=f"{backend}-{MANY}", marks=pytest.mark.slow))
        else:
            cases.append(pytest.param(backend, id=backend))
    metafunc.parametrize(["backend", *names], cases, indirect=["backend"])


def pytest_make_parametrize_id(val):
    """bf16 for torch.bfloat16, 2x3x64 for a shape."""
    if isinstance(val, torch.dtype):
        return DTYPES.get(val)
    if isinstance(val, tuple) and all(type(n) is int for n in val):
        return "x".join(map(str, val)) or "scalar"
    return None


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their marks
def pytest_collection_modifyitems(config, items):
    on_gpu = config.getoption("--device") == "cuda"
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        backend = parameters.get("backend")
        only = item.get_closest_marker("only")
        here = only.args[0] if only and PROVED_ONCE not in only.args else PROVED_ONCE
        again = item.get_closest_marker("once") and backend not in (None, here)
        costly = item.get_closest_marker("costly") or parameters.get("dtype") == torch.float16
        if not on_gpu and (again or (costly and backend in GPU_BACKENDS)):
            item.add_marker(pytest.mark.slow)
    elsewhere = {item for item in items if not _belongs(item, on_gpu)}
    config.hook.pytest_deselected(items=list(elsewhere))
    items[:] = [item for item in items if item not in elsewhere]


def _belongs(item, on_gpu):
    """Whether a test is for the device that this run is on."""
    if item.get_closest_marker("emulated" if on_gpu else "gpu"):
        return False
    return not on_gpu or bool({"backend", "cuda"} & set(item.fixturenames))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Skip tests of Triton's kernels without Triton, and what the GPU of --simt-profile has too little memory for."""
    try:
        return (yield)
    except fastgpt.BackendUnavailable as error:
        if pyfuncitem.config.option.simt_profile and "of shared memory a block" in str(error):
            pytest.skip(str(error))
        raise
    except ModuleNotFoundError as error:
        if error.name == "triton":
            pytest.skip("Triton is not installed")
        raise


@pytest.fixture(scope="session", autouse=True)
def _device(pytestconfig):
    """Tensors on the GPU, or else Triton's interpreter with what it lacks."""
    if pytestconfig.getoption("--device") == "cuda":
        torch.set_default_device("cuda")
        return
    try:
        from tests.support.interpreter_bf16 import patch_interpreter_bf16
        from tests.support.interpreter_descriptors import patch_interpreter_descriptors
        from tests.support.interpreter_products import patch_interpreter_products
    except ImportError:  # no Triton: tests of its kernels are skipped
        return
    patch_interpreter_products()
    patch_interpreter_bf16()
    patch_interpreter_descriptors()


@pytest.fixture(scope="session", autouse=True)
def _emulated_gpu(pytestconfig):
    """The GPU that the emulator stands for."""
    if name := pytestconfig.getoption("--simt-profile"):
        from tests.simt import emulator

        if name not in emulator.PROFILES:
            raise pytest.UsageError(
                f"--simt-profile takes one of {', '.join(emulator.PROFILES)}, not {name!r}"
            )
        emulator.choose(name)


@pytest.fixture(autouse=True)
def _seeded(request):
    """Seed all generators by the test's name and --seed; one thread, unless the test sets another number."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)
    name = f"{request.config.option.seed} {request.node.path.name}::{request.node.name}"
    seed = zlib.crc32(name.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture
def backend(request, _seeded):
    """Select a backend for the test, by its name; on the CPU, the CUDA kernels run in the emulator."""
    on_gpu = request.config.getoption("--device") == "cuda"
    if request.param == "cpp" and on_gpu:
        pytest.skip("the C++ kernels are the CPU's")
    if request.param == "cuda":
        yield request.getfixturevalue("cuda")
        return
    _require(request.param, on_gpu)
    if request.param == "cpp":
        torch.set_num_threads(2)  # whose kernels cut their work between threads
    with fastgpt.use_backend(request.param):
        yield request.param


@pytest.fixture
def cuda(request, _seeded):
    """Select the CUDA kernels: on a GPU themselves, on the CPU in the emulator."""
    if request.config.getoption("--device") == "cuda":
        _require("cuda", on_gpu=True)
        with fastgpt.use_backend("cuda"):
            yield "cuda"
        return
    from tests.simt import emulator

    if emulator.problem():
        pytest.skip(emulator.problem())
    emulator.seed(torch.initial_seed())
    with emulator.running(), fastgpt.use_backend("cuda"):
        yield "cuda"


def _require(backend, on_gpu):
    """Skip a test whose backend is missing here; on a GPU, where all are to be tested, it fails."""
    available = fastgpt.available_backends("gelu")[backend]
    if not available:
        (pytest.fail if on_gpu else pytest.skip)(available.reason)
