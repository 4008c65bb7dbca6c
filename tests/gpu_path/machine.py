"""A GPU that does not exist: tensors that report its device and hold no data, and kernels recorded instead of launched.

`enter` changes PyTorch and Triton in the whole process, so that it belongs into a process of its own, before fastgpt is
imported. Tensors are PyTorch's fake ones, on the CPU for PyTorch's C++ code, since autograd of fake CUDA tensors needs
a CUDA build; Python code sees them on cuda:0. The registered ops run their implementation for Triton, not their fake.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.codegen.launches import MULTIPROCESSORS

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


class Driver:
    """Triton's driver, for a GPU of some compute capability; it compiles nothing."""

    utils = None

    def __init__(self, capability: tuple[int, int], device: int) -> None:
        self.target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
        self.device = device

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return CUDA


@dataclass
class Launch:
    """What a launcher hands to Triton.

    Attributes:
        tile: the BLOCK sizes, warps and stages.
        descriptors: box and strides in bytes of each tensor descriptor.
    """

    kernel: str
    grid: tuple[int, ...]
    itemsize: int
    tile: dict[str, int]
    descriptors: list[tuple[list[int], list[int]]]


@dataclass
class Machine:
    """The GPU's compute capability, and what happened since `reset`.

    Attributes:
        launches: in order.
        compiled: a kernel's name for every key of Triton's cache that was not there.
    """

    capability: tuple[int, int] = (9, 0)
    launches: list[Launch] = field(default_factory=list)
    compiled: list[str] = field(default_factory=list)
    devices: int = 0

    def reset(self) -> None:
        self.launches.clear()
        self.compiled.clear()


class _Kernel:
    """In the place of a compiled kernel."""

    function = packed_metadata = None

    def launch_metadata(self, *_: Any) -> None: ...

    def run(self, *_: Any) -> None: ...


class _OnCpu(TorchFunctionMode):
    """Makes the tensors of cuda:0 on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_cpu, (args, kwargs or {}))
        return func(*args, **kwargs)


def _cpu(x: Any) -> Any:
    if isinstance(x, torch.device) or (isinstance(x, str) and x.startswith("cuda")):
        return CPU if torch.device(x).type == "cuda" else x
    return x


def enter(compiles: bool = False) -> Machine:
    """Change this process; nothing changes it back.

    Args:
        compiles: whether Triton compiles what is launched, into its cache on the disk.
    """
    machine = Machine()
    multiprocessors = {arch.removesuffix("a"): n for arch, n in MULTIPROCESSORS.items()}

    def properties(device: Any = None) -> SimpleNamespace:
        major, minor = machine.capability
        return SimpleNamespace(
            major=major, multi_processor_count=multiprocessors.get(f"sm_{major}{minor}", 40)
        )

    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = lambda index: index
    torch.cuda.get_device_capability = lambda device=None: machine.capability
    torch.cuda.get_device_name = lambda device=None: "GPU"
    torch.cuda.get_device_properties = properties
    _report_cuda()
    _run_implementations()

    run = JITFunction.run

    def recorded(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        machine.launches.append(_launch(self, arguments, tuple(grid), keywords))
        run(self, *arguments, grid=grid, warmup=warmup, **keywords)

    def compile_(self: Any, key: Any, *_: Any) -> _Kernel:
        machine.compiled.append(self.__name__.removeprefix("_"))
        kernel = self.device_caches[driver.active.get_current_device()][0][key] = _Kernel()
        return kernel

    JITFunction.run = recorded
    if compiles:
        CompiledKernel._init_handles = lambda self: setattr(self, "_run", lambda *_: None)
    else:
        JITFunction._do_compile = compile_
    return machine


def _launch(function: Any, arguments: Any, grid: tuple[int, ...], keywords: dict[str, Any]) -> Launch:
    named = dict(zip((p.name for p in function.params), arguments, strict=False)) | keywords
    tile = {k: v for k, v in named.items() if k.startswith("BLOCK") or k in ("num_warps", "num_stages")}
    described = [x for x in arguments if isinstance(x, TensorDescriptor)]
    boxes = [(x.block_shape, [s * x.base.element_size() for s in x.strides]) for x in described]
    first = next(x for x in arguments if isinstance(x, (TensorDescriptor, torch.Tensor)))
    itemsize = (first.base if isinstance(first, TensorDescriptor) else first).element_size()
    return Launch(function.__name__.removeprefix("_"), grid, itemsize, tile, boxes)


def _report_cuda() -> None:
    """Fake tensors report cuda:0 to Python code, but not to PyTorch's own dispatch of fake tensors."""
    inside = 0
    dispatch = FakeTensorMode.__torch_dispatch__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        inside += 1
        try:
            return dispatch(self, *args, **kwargs)
        finally:
            inside -= 1

    device = FakeTensor.device.fget
    FakeTensorMode.__torch_dispatch__ = counted
    FakeTensor.device = property(lambda self: device(self) if inside else CUDA)
    FakeTensor.is_cuda = property(lambda self: not inside)
    FakeTensor.data_ptr = lambda self: self.storage_offset() * self.element_size()


def _run_implementations() -> None:
    """The registered ops' dictionaries lead to the Python implementations, which fake tensors would not reach."""
    library, implementations = torch.library.Library, {}
    register = library.impl

    def impl(self: Any, name: Any, function: Any, *rest: Any, **options: Any) -> Any:
        implementations[name] = function
        return register(self, name, function, *rest, **options)

    with mock.patch.object(library, "impl", impl):
        import fastgpt.ops  # noqa: F401
    for module in [m for name, m in sys.modules.items() if name.startswith("fastgpt.ops.")]:
        for overloads in vars(module).values():
            if isinstance(overloads, dict) and isinstance(overloads.get("triton"), torch._ops.OpOverload):
                for backend in ("triton", "reference"):
                    overload = overloads[backend]
                    overloads[backend] = implementations.get(overload._opname, overload)
    for name, function in implementations.items():
        setattr(torch.ops.fastgpt, name, SimpleNamespace(default=function))


@contextlib.contextmanager
def gpu(machine: Machine, capability: tuple[int, int]) -> Iterator[None]:
    """Fake tensors on a new GPU of a compute capability, for which Triton has compiled nothing yet."""
    from fastgpt import backends
    from fastgpt.kernels import common

    machine.capability = capability
    machine.reset()
    machine.devices += 1
    driver.set_active(Driver(capability, machine.devices))
    for cached in (backends._cached_machine_refusal, common._capability, common._multiprocessors):
        cached.cache_clear()
    with FakeTensorMode(), _OnCpu():
        yield
