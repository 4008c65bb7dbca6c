"""The choice of backend: use_backend, available_backends, explain, and what happens where a backend is missing."""

import os
import re
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as T

import fastgpt
from fastgpt import backends, extension, ops
from fastgpt import functional as F
from fastgpt.backends import BACKENDS, OPS, current_backend
from tests.support.dropin import NAMES, example

CPP = bool(fastgpt.available_backends("gelu")["cpp"])
# Why not "cuda", on tensors of the CPU.
NO_CUDA = (
    "CUDA kernels are not built|is a build without CUDA|no CUDA GPU is visible|are on cpu and cuda serves"
)
needs_cpp = pytest.mark.skipif(not CPP, reason="the C++ kernels are not built")


def chosen(function, *arguments, **options):
    return fastgpt.explain(function, *arguments, **options).backend


def run(script, **environment):
    """Runs a script in a process of its own; returns what it prints."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_use_backend_nests_and_restores():
    assert current_backend() == "auto"
    with fastgpt.use_backend("reference"):
        with fastgpt.use_backend("triton"):
            assert chosen(ops.gelu, torch.ones(3)) == "triton"
            with fastgpt.use_backend("auto"):
                assert current_backend() == "auto"
            assert current_backend() == "triton"
        assert chosen(ops.gelu, torch.ones(3)) == "reference"
    assert current_backend() == "auto"


def test_use_backend_restores_after_an_exception():
    with pytest.raises(ZeroDivisionError), fastgpt.use_backend("reference"):
        1 / 0
    assert current_backend() == "auto"


def test_one_use_backend_can_be_entered_again_and_within_itself():
    reference = fastgpt.use_backend("reference")
    for _ in range(2):
        with reference, fastgpt.use_backend("triton"), reference:
            assert current_backend() == "reference"
        assert current_backend() == "auto"


def test_use_backend_decorates_a_function_in_every_thread():
    @fastgpt.use_backend("reference")
    def inside():
        return current_backend()

    answers = []
    threads = [threading.Thread(target=lambda: answers.append(inside())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == ["reference"] * 4
    assert inside() == "reference"
    assert current_backend() == "auto"


def test_decorated_function_restores_the_choice_of_each_of_two_threads():
    both_are_in = threading.Barrier(2, timeout=10)
    first_is_out = threading.Event()
    after = {}

    @fastgpt.use_backend("reference")
    def inside(last):
        both_are_in.wait()
        if last:
            first_is_out.wait(10)

    def thread(outer, last):
        with fastgpt.use_backend(outer):
            inside(last)
            after[outer] = current_backend()
            first_is_out.set()

    for order in (
        ("triton", "auto"),
        ("auto", "triton"),
    ):  # whichever entered last, one of these pops the wrong one
        after.clear()
        first_is_out.clear()
        threads = [threading.Thread(target=thread, args=(name, name == order[1])) for name in order]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert after == {"triton": "triton", "auto": "auto"}


def test_each_thread_starts_at_auto_and_sees_its_own_choice_alone():
    seen, other_is_in, this_has_looked = [], threading.Event(), threading.Event()

    def other():
        seen.append(current_backend())
        with fastgpt.use_backend("triton"):
            other_is_in.set()
            this_has_looked.wait(10)
            seen.append(current_backend())

    with fastgpt.use_backend("reference"):
        thread = threading.Thread(target=other)
        thread.start()
        assert other_is_in.wait(10)
        assert current_backend() == "reference"
        this_has_looked.set()
        thread.join()
    assert seen == ["auto", "triton"]


@pytest.mark.parametrize("name", ["fast", "pytorch", "", None, "CPP"])
def test_unknown_backend_is_a_value_error_with_the_names(name):
    with pytest.raises(ValueError, match="auto, reference, cpp, triton, cuda"):
        fastgpt.use_backend(name)


def test_every_op_lists_every_backend_with_a_reason_where_it_is_missing():
    for op in OPS:
        available = fastgpt.available_backends(op)
        assert tuple(available) == BACKENDS
        assert available["reference"]
        for answer in available.values():
            assert bool(answer) is answer.available
            assert answer.available or len(answer.reason) > 10
        assert bool(available["cuda"]) is extension.cuda_loaded()


def test_unknown_op_is_a_value_error_with_the_names():
    with pytest.raises(ValueError, match=r"no op 'relu'.*attention.*gelu"):
        fastgpt.available_backends("relu")


@needs_cpp
def test_explain_names_the_backend_and_why_not_the_others():
    answer = fastgpt.explain(ops.gelu, torch.randn(3))
    assert answer.backend == "cpp"
    assert set(answer.reasons) == {"reference", "triton", "cuda"}
    assert all(answer.reasons.values())
    assert answer.reasons["reference"] == "cpp is preferred on cpu"
    assert answer.reasons["triton"] == "it is never chosen automatically on cpu"
    assert str(answer).startswith("gelu: cpp\n  not reference: cpp is preferred on cpu\n")
    with fastgpt.use_backend("reference"):
        answer = fastgpt.explain(ops.gelu, torch.randn(3))
    assert answer.backend == "reference"
    assert answer.reasons["cpp"] == "use_backend('reference') chose another"


def test_explain_of_a_call_that_goes_to_pytorch():
    answer = fastgpt.explain(F.cross_entropy, torch.randn(2, 3), torch.rand(2, 3))
    assert answer.backend == "pytorch"
    assert set(answer.reasons) == set(BACKENDS)
    for backend in ("reference", "cpp", "triton"):
        if fastgpt.available_backends("cross_entropy")[backend]:
            assert answer.reasons[backend] == "the targets are class probabilities"


def test_explain_of_several_ops_lists_them_in_order():
    def block(x):
        return ops.gelu(ops.add_layer_norm(x, None)[0])

    answer = fastgpt.explain(block, torch.randn(2, 4))
    assert [d.op for d in answer.decisions] == ["add_layer_norm", "gelu"]
    assert str(answer).count("not cuda") == 2


def test_explain_counts_a_call_of_the_drop_in_once_and_like_calls_together():
    def block(x):
        return F.gelu(F.gelu(x)) + ops.gelu(x)

    answer = fastgpt.explain(block, torch.randn(2, 4))
    assert [d.op for d in answer.decisions] == ["gelu"] * 3
    assert str(answer).startswith("3 × gelu: ") and str(answer).count("not cuda") == 1


def test_explain_of_no_op_says_so():
    answer = fastgpt.explain(torch.relu, torch.randn(3))
    assert (answer.backend, answer.reasons, answer.decisions) == (None, {}, ())
    assert str(answer) == "no fastgpt op was called"


def test_explain_of_a_refused_call_names_no_backend():
    with fastgpt.use_backend("cuda"):
        answer = fastgpt.explain(ops.gelu, torch.randn(3))
    assert answer.backend is None
    assert re.search(NO_CUDA, answer.reasons["cuda"])
    assert str(answer).startswith("gelu: no backend can run this")


def test_explain_lets_other_errors_through_and_leaves_nothing_behind():
    with pytest.raises(TypeError):
        fastgpt.explain(ops.gelu, 3.0)
    fastgpt.explain(ops.gelu, torch.ones(2))
    ops.gelu(torch.ones(2))  # not recorded anywhere
    assert len(fastgpt.explain(ops.gelu, torch.ones(2)).decisions) == 1
    nested = fastgpt.explain(lambda: (ops.gelu(torch.ones(2)), fastgpt.explain(ops.gelu, torch.ones(2))))
    assert len(nested.decisions) == 1
    assert current_backend() == "auto"


def test_cuda_is_refused_on_the_cpu_with_the_reason():
    for name in NAMES:
        arguments, options = example(name)
        with fastgpt.use_backend("cuda"), pytest.raises(fastgpt.BackendUnavailable, match=NO_CUDA):
            getattr(F, name)(*arguments, **options)


@needs_cpp
def test_large_heads_go_to_the_reference_and_in_the_drop_in_to_pytorch():
    q = torch.randn(1, 1, 2, 257)
    assert chosen(ops.attention, q, q, q) == "reference"
    assert chosen(F.scaled_dot_product_attention, q, q, q) == "pytorch"
    narrow = torch.randn(1, 1, 2, 256)
    assert chosen(ops.attention, narrow, narrow, narrow) == "cpp"
    assert chosen(ops.attention, narrow, narrow, q) == "reference"
    with fastgpt.use_backend("cpp"), pytest.raises(fastgpt.BackendUnavailable, match="head_dim is 257"):
        ops.attention(q, q, q)


def test_triton_refuses_float64_and_without_its_interpreter_the_cpu():
    with fastgpt.use_backend("triton"), pytest.raises(fastgpt.BackendUnavailable, match="float64"):
        ops.gelu(torch.ones(3, dtype=torch.float64))
    printed = run(
        "import fastgpt, torch\n"
        "try:\n"
        "    with fastgpt.use_backend('triton'): fastgpt.ops.gelu(torch.ones(3))\n"
        "except fastgpt.BackendUnavailable as error: print(error)\n"
    )
    assert printed.startswith("gelu cannot run on the triton backend: ")
    assert "the tensors are on cpu and triton serves CUDA GPUs (TRITON_INTERPRET=1 interprets" in printed


def test_meta_tensors_run_on_the_reference_in_ops():
    assert ops.gelu(torch.ones(3, device="meta")).shape == (3,)
    assert chosen(ops.gelu, torch.ones(3, device="meta")) == "reference"


@needs_cpp
@pytest.mark.parametrize("function", [ops.gelu, F.gelu])
def test_compiled_code_follows_use_backend(function):
    """The graph compiled under one backend never serves a call under another."""
    graphs = []

    def record(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes if "fastgpt" in str(node.target)})
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: function(x) + 1, fullgraph=True, backend=record)
    x = torch.randn(7)
    for name in ("auto", "reference", "cpp", "reference", "auto"):
        with fastgpt.use_backend(name):
            torch.testing.assert_close(compiled(x), T.gelu(x) + 1)
    used = [next(iter(graph)) for graph in graphs]
    assert len(used) == 3, "one graph for each of auto, reference and cpp, each compiled once"
    assert "gelu_fwd_cpp" in used[0]
    assert "gelu_fwd_reference" in used[1]
    assert "gelu_fwd_cpp" in used[2]
    with fastgpt.use_backend("cuda"), pytest.raises(Exception, match=NO_CUDA):
        compiled(x)


@pytest.mark.parametrize(
    ("problems", "triton", "expected"),
    [
        ({}, True, "triton"),
        ({}, False, "cuda"),
        ({1: "sm_75 and the CUDA kernels are compiled for sm_80"}, False, "reference"),
    ],
)
def test_on_a_gpu_triton_comes_first_then_cuda_then_the_reference(problems, triton, expected, monkeypatch):
    """Also where another GPU of the machine has kernels and this one has not."""
    monkeypatch.setattr(extension, "cuda_problem", lambda number=None: problems.get(number, ""))
    monkeypatch.setattr(extension, "cuda_loaded", lambda number=None: not extension.cuda_problem(number))
    monkeypatch.setattr(backends.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "_triton_problem", lambda number: None)
    if not triton:
        monkeypatch.setattr(backends, "_installed", lambda package: package != "triton")
    backends._cached_machine_refusal.cache_clear()
    try:
        device = torch.device("cuda", 1)
        assert backends.select("gelu", device, lambda backend: None) == expected
        with fastgpt.use_backend("cuda"):
            if problems:
                with pytest.raises(fastgpt.BackendUnavailable, match=r"cuda backend: sm_75 and"):
                    backends.select("gelu", device, lambda backend: None)
            else:
                assert backends.select("gelu", device, lambda backend: None) == "cuda"
    finally:
        backends._cached_machine_refusal.cache_clear()


@pytest.mark.parametrize(
    ("capability", "built", "reason"),
    [
        ((7, 5), True, "Triton needs compute capability 8.0, and this GPU has 7.5"),
        ((8, 9), False, "Triton's driver cannot be compiled: Failed to find C compiler."),
        ((8, 0), True, None),
        ((12, 0), True, None),
    ],
)
def test_triton_says_why_it_cannot_serve_a_gpu(capability, built, reason, monkeypatch):
    """Asked before the first launch, so that "auto" takes another backend and nothing raises out of an op."""
    from triton.runtime import driver

    class Active:
        @property
        def utils(self):
            if not built:
                raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(type(driver), "active", Active())
    monkeypatch.setattr(backends.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends.torch.cuda, "get_device_capability", lambda number: capability)
    monkeypatch.setattr(extension, "cuda_problem", lambda number=None: "not built")
    monkeypatch.setattr(extension, "cuda_loaded", lambda number=None: False)
    backends._cached_machine_refusal.cache_clear()
    try:
        assert backends._machine_refusal("triton", "cuda", 0) == reason
        chosen = backends.select("gelu", torch.device("cuda", 0), lambda backend: None, drop_in=True)
        assert chosen == ("pytorch" if reason else "triton")
    finally:
        backends._cached_machine_refusal.cache_clear()


def test_an_op_on_the_cpu_asks_nothing_of_the_gpus(monkeypatch):
    """In a process forked from one that uses CUDA, as a DataLoader's, any question raises."""

    def forked(*_):
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    for name in ("is_available", "device_count", "get_device_capability", "current_device"):
        monkeypatch.setattr(backends.torch.cuda, name, forked)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backends._cached_machine_refusal.cache_clear()
    try:
        assert backends.select("gelu", torch.device("cpu"), lambda backend: None) in ("cpp", "reference")
        assert backends._machine_refusal("cuda", "cpu", None) and backends._machine_refusal(
            "triton", "cpu", None
        )
    finally:
        backends._cached_machine_refusal.cache_clear()


WITHOUT_THE_EXTENSION = """
import sys, types
{stub}
import torch, fastgpt
from fastgpt import functional as F, ops
x = torch.randn(4, 8, requires_grad=True)
assert fastgpt.explain(ops.gelu, x).backend == "reference"
assert fastgpt.explain(F.gelu, x).backend == "pytorch"
ops.gelu(x).sum().backward()
torch.testing.assert_close(F.gelu(x), torch.nn.functional.gelu(x))
answer = fastgpt.available_backends("gelu")["cpp"]
assert not answer
try:
    with fastgpt.use_backend("cpp"): F.gelu(x)
except fastgpt.BackendUnavailable as error:
    assert answer.reason in str(error)
else:
    raise SystemExit("use_backend('cpp') fell back in silence")
assert fastgpt.extension.variant() is None
print(answer.reason)
"""


def test_without_the_extension_all_runs_and_the_reason_names_what_mends_it():
    reason = run(WITHOUT_THE_EXTENSION.format(stub="sys.modules['fastgpt._C'] = None"))
    assert "the compiled extension is missing" in reason
    assert "pip install --no-build-isolation" in reason


@pytest.mark.parametrize("version", ["2.10.1+cpu", "1.13.0"])
def test_torch_without_the_stable_abi_is_refused_with_the_oldest_supported(version):
    stub = f"import torch; torch.__version__ = {version!r}"
    reason = run(
        WITHOUT_THE_EXTENSION.format(stub=stub) + "assert '_cpu_' not in open('/proc/self/maps').read()\n"
    )
    assert f"for torch 2.11 and later and this is torch {version}" in reason
    assert "pip install --upgrade 'torch>=2.11'" in reason


@pytest.mark.skipif(not extension.loaded(), reason="the C++ kernels are not built")
def test_libraries_of_another_version_are_refused_by_name():
    stub = (
        "stub = types.ModuleType('fastgpt._C')\n"
        "stub.build_info = lambda: {'version': '99.0', 'torch': '2.11.0', 'variants': 'plain'}\n"
        "stub.cpu_variants = lambda: ['plain']\n"
        "sys.modules['fastgpt._C'] = stub"
    )
    reason = run(
        WITHOUT_THE_EXTENSION.format(stub=stub) + "assert '_cpu_' not in open('/proc/self/maps').read()\n"
    )
    assert reason.startswith("_cpu_plain.so is refused (it is of fastgpt ")
    assert "not 99.0" in reason and "pip install --no-build-isolation" in reason


def test_without_triton_the_reason_says_how_to_install_it():
    printed = run(
        "import sys; sys.modules['triton'] = None\n"
        "import fastgpt\n"
        "print(fastgpt.available_backends('gelu')['triton'].reason)"
    )
    assert "pip install triton" in printed


def test_threads_that_overlap_leave_no_choice_behind_for_compiled_code():
    """First in, first out: the mirror that Dynamo guards must come back to "auto", not to the other's choice."""
    second_is_in, first_is_out = threading.Event(), threading.Event()

    def first():
        with fastgpt.use_backend("cpp"):
            second_is_in.wait(10)
        first_is_out.set()

    def second():
        with fastgpt.use_backend("reference"):
            second_is_in.set()
            first_is_out.wait(10)

    threads = [threading.Thread(target=f) for f in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fastgpt.backends._traced_backend == "auto"
