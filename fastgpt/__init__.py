"""fastgpt: GPT training in PyTorch, faster.

Hand-written fused kernels behind the interface people already use:

    from fastgpt import functional as F# was: import torch.nn.functional as F
    from fastgpt import ops# the ops, with everything the drop-in has no room for
    from fastgpt.model import GPT          # a thin GPT standing on them
    fastgpt.accelerate(model)              # for a model that somebody else wrote
"""

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

__version__ = "0.1.0"

extension.loaded()  # registers the C++ ops; what is missing shows when they are asked for

__all__ = [
    "Availability",
    "BackendUnavailable",
    "Explanation",
    "accelerate",
    "available_backends",
    "explain",
    "functional",
    "ops",
    "patch_functional",
    "restore",
    "use_backend",
]
