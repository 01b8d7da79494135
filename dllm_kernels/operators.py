"""Registration of an operation with torch.library, so that torch.compile keeps it whole.

Eager calls go to the backend directly: a custom operator costs 50 microseconds a call on a CPU, as much as the
attention of a small model. Under torch.compile the operator is one opaque node; its backward runs the backend again and
differentiates it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def define_operator(name: str, arguments: str, run: Callable, fake: Callable, differentiable: Sequence[int] = (),
                    returns: str = "Tensor") -> Callable:
    """Register `dllm_kernels::<name>` and return it.

    Args:
        arguments: its schema without the parentheses, "Tensor q, int? block_length".
        run: computes it from these arguments by position; if differentiable, by PyTorch or an autograd.Function.
        fake: empty tensors of the result's shapes, from the same arguments.
        differentiable: the places of the arguments that get a gradient, with a single result.
        returns: the schema of the result.
    """

    def forward(*args):
        with torch.no_grad():
            return run(*args)

    operator = torch.library.custom_op(f"dllm_kernels::{name}", forward, mutates_args=(),
                                       schema=f"({arguments}) -> {returns}")
    operator.register_fake(fake)
    if not differentiable:
        return operator

    def differentiate(grad: Tensor, *args) -> list[Tensor]:
        args = list(args)
        leaves = [i for i in differentiable if args[i] is not None]
        for i in leaves:
            args[i] = args[i].detach().requires_grad_()
        with _recording(), torch.enable_grad():
            out = run(*args)
        return list(torch.autograd.grad(out, [args[i] for i in leaves], grad))

    backward_operator = torch.library.custom_op(f"dllm_kernels::{name}_backward", differentiate, mutates_args=(),
                                                schema=f"(Tensor grad, {arguments}) -> Tensor[]")
    backward_operator.register_fake(
        lambda grad, *args: [torch.empty_like(args[i]) for i in differentiable if args[i] is not None])

    def setup_context(ctx, inputs, output):
        ctx.tensors = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
        ctx.save_for_backward(*(inputs[i] for i in ctx.tensors))
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]

    def backward(ctx, grad):
        args = list(ctx.others)
        for i, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            args[i] = tensor
        gradients: list[Tensor | None] = [None] * len(args)
        places = [i for i in differentiable if args[i] is not None]
        for i, gradient in zip(places, backward_operator(grad.contiguous(), *args), strict=True):
            gradients[i] = gradient
        return tuple(gradients)

    operator.register_autograd(backward, setup_context=setup_context)
    return operator


def _recording():
    """Inside an operator PyTorch's dispatcher passes autograd by; within this context it does not."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)
