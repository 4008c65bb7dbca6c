"""A test for modules that can be fused with their neighbours."""

from __future__ import annotations

from torch import nn

# Hooks of these libraries free parameters after a forward and leave its result unchanged.
_SHARDING = ("torch.distributed.", "deepspeed.")


def is_unmodified(module: nn.Module, *, called: bool = False) -> bool:
    """Return whether a module computes what its class computes: no hook, no forward assigned to the instance.

    Args:
        called: whether the caller still calls the module. Forward pre-hooks, and the forward hooks of sharding
            libraries, then run as before and are allowed.
    """
    if "forward" in module.__dict__ or module._backward_hooks or module._backward_pre_hooks:
        return False
    if called:
        return all(hook.__module__.startswith(_SHARDING) for hook in module._forward_hooks.values())
    return not module._forward_hooks and not module._forward_pre_hooks
