"""fastgpt: faster GPT training in PyTorch.

Hand-written fused kernels with familiar interfaces:

    from fastgpt import functional as F    # was: import torch.nn.functional as F
    from fastgpt import ops                # the ops, with options that torch.nn.functional lacks
    from fastgpt.model import GPT          # a thin GPT on these ops
    fastgpt.accelerate(model)              # for models written by others
    fastgpt.keep_freed_memory()            # on a CPU, once: large tensors reuse freed memory
"""

import fastgpt._interrupt  # noqa: F401  (before PyTorch is imported)
from fastgpt import extension, functional, ops
from fastgpt.backends import (
    Availability,
    BackendUnavailable,
    Explanation,
    available_backends,
    explain,
    use_backend,
)
from fastgpt.integrations.accelerate import accelerate, restore
from fastgpt.integrations.patch_functional import patch_functional
from fastgpt.malloc import keep_freed_memory

__version__ = "0.1.0"

extension.loaded()  # registers the C++ ops; if they are missing, the first call says so

__all__ = [
    "Availability",
    "BackendUnavailable",
    "Explanation",
    "accelerate",
    "available_backends",
    "explain",
    "functional",
    "keep_freed_memory",
    "ops",
    "patch_functional",
    "restore",
    "use_backend",
]
