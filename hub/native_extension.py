"""The compiled extension that kernel-builder built; takes the place of the module that finds or builds one."""

import torch

from ._ops import add_op_namespace_prefix, ops


def why_missing() -> None:
    """Nothing is: the package does not import without its extension."""


def why_missing_on_cuda(operator: str) -> str | None:
    """Why an operator of csrc/cuda cannot run on this machine, None if it can."""
    if not torch.cuda.is_available():
        return "needs a GPU"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(add_op_namespace_prefix(operator), "CUDA"):
        return "this build of the kernel is for CPUs"
    return None


def operators():
    """The namespace of its operators."""
    return ops
