"""The benchmarks by op, one for each op of `fastgpt.backends.OPS`."""

from importlib import import_module

from bench.harness.cases import Op
from fastgpt import backends

OPS: dict[str, Op] = {}
for name in backends.OPS:
    module = import_module(f"bench.ops.bench_{backends.SHARED_FILES.get(name, name)}")
    OPS[name] = next(op for op in vars(module).values() if isinstance(op, Op) and op.name == name)
