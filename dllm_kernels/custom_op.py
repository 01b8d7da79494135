"""Operations as torch.library operators, which torch.compile keeps whole.

Eager calls do not go through an operator, because it costs 50 microseconds on a CPU, as much as the attention of a
small model. Functions take named tuples; an operator's schema is flat, with the fields in their place, and is inferred
from the annotations.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix


class _Signature:
    """Parameters and result of a function; named tuples among the parameters are spread into their fields."""

    def __init__(self, function: Callable):
        hints = get_type_hints(function)
        self.returns = hints.pop("return")
        self.kinds: list[tuple[Any, int]] = []  # of each parameter: its named tuple or None, and the number of fields
        self.flat: dict[str, Any] = {}
        for name, kind in hints.items():
            spread = hasattr(kind, "_fields")
            fields = get_type_hints(kind) if spread else {name: kind}
            self.kinds.append((kind if spread else None, len(fields)))
            self.flat |= fields

    def nest(self, flat: Sequence) -> list:
        nested, place = [], 0
        for kind, size in self.kinds:
            nested.append(flat[place] if kind is None else kind._make(flat[place:place + size]))
            place += size
        return nested

    def on_flat(self, function: Callable) -> Callable:
        return lambda *flat: function(*self.nest(flat))


def _flatten(inputs: Sequence) -> list:
    return [field for value in inputs for field in (value if isinstance(value, tuple) else (value,))]


def _register(name: str, parameters: dict[str, Any], returns: Any, run: Callable, fake: Callable) -> Callable:
    def prototype():
        """Has the signature that the schema is inferred from."""

    prototype.__signature__ = inspect.Signature(
        [inspect.Parameter(parameter, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
         for parameter, kind in parameters.items()], return_annotation=returns)
    operator = torch.library.custom_op(add_op_namespace_prefix(name), run, mutates_args=(),
                                       schema=torch.library.infer_schema(prototype, mutates_args=()))
    operator.register_fake(fake)
    return operator


def define_operator(name: str, run: Callable, fake: Callable) -> Callable:
    """Register `run`, which has no derivative, as the operator `name`.

    `fake` takes the same arguments and returns empty tensors of the results' shapes.
    """
    signature = _Signature(run)
    operator = _register(name, signature.flat, signature.returns, signature.on_flat(run), signature.on_flat(fake))
    return lambda *inputs: operator(*_flatten(inputs))


class Differentiable:
    """A function with a derivative of its own. Called, it runs eagerly.

    Args:
        name, instead: what has no second derivative, and what to use instead, for the error.
        forward: (*inputs) -> a tuple of the results and what else the backward needs.
        backward: (grad, that tuple, wanted, *inputs) -> the gradients of the first `count` inputs, which are tensors or
            None; None where wanted[i] is false.
        results: how many of the forward's tuple a call returns; the first has the derivative, the others have none.
    """

    def __init__(self, name: str, forward: Callable, backward: Callable, count: int, instead: str, results: int = 1):
        self.name, self.instead, self.count, self.results = name, instead, count, results
        self.forward, self.backward, self.signature = forward, backward, _Signature(forward)

    def __call__(self, *inputs) -> Tensor | tuple[Tensor, ...]:
        return _Eager.apply(self, *_flatten(inputs))

    def register(self, name: str, fake: Callable) -> Callable:
        """Register the forward as the operator `name` and the backward as `<name>_backward`; returns the forward.

        `fake` takes the inputs and returns empty tensors of the shapes of the forward's tuple.
        """
        signature, saved = self.signature, len(get_args(self.signature.returns))

        def run_backward(grad, *rest):
            outputs, wanted, flat = rest[:saved], rest[saved], rest[saved + 1:]
            gradients = self.backward(grad, outputs, wanted, *signature.nest(flat))
            return [gradient.contiguous() for gradient in gradients if gradient is not None]

        def fake_backward(grad, *rest):
            return [torch.empty_like(x, memory_format=torch.contiguous_format)
                    for x, want in zip(rest[saved + 1:], rest[saved], strict=False) if want]

        forward = _register(name, signature.flat, signature.returns,
                            torch.no_grad()(signature.on_flat(self.forward)), signature.on_flat(fake))
        parameters = {"grad": Tensor, **{f"output{place}": Tensor for place in range(saved)},
                      "wanted": Sequence[bool], **signature.flat}
        backward = _register(f"{name}_backward", parameters, list[Tensor], run_backward, fake_backward)

        def differentiate(ctx, grad, *_):
            values, wanted = _recall(ctx), list(ctx.needs_input_grad[:self.count])
            found = iter(backward(grad.contiguous(), *values[:saved], wanted, *values[saved:]))
            gradients = [next(found) if want else None for want in wanted]
            return *gradients, *[None] * (len(signature.flat) - self.count)

        forward.register_autograd(
            differentiate, setup_context=lambda ctx, inputs, output: _remember(ctx, *output, *inputs))

        def call(*inputs):
            first, *others = forward(*_flatten(inputs))[:self.results]
            return (first, *(other.detach() for other in others)) if others else first

        return call


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *flat):
        outputs = function.forward(*function.signature.nest(flat))
        ctx.function, ctx.saved = function, len(outputs)
        _remember(ctx, *outputs, *flat)
        if function.results == 1:
            return outputs[0]
        ctx.mark_non_differentiable(*outputs[1:function.results])
        return tuple(outputs[:function.results])

    @staticmethod
    def backward(ctx, grad, *_):
        function, values = ctx.function, _recall(ctx)
        if torch.is_grad_enabled():  # in a backward, that is create_graph=True
            raise RuntimeError(f"{function.name} has no second derivative, which create_graph=True asks for; "
                               f"{function.instead}")
        outputs, flat = values[:ctx.saved], values[ctx.saved:]
        wanted = ctx.needs_input_grad[1:1 + function.count]
        gradients = function.backward(grad, outputs, wanted, *function.signature.nest(flat))
        return None, *gradients, *[None] * (len(flat) - function.count)


def _remember(ctx, *values) -> None:
    ctx.save_for_backward(*(value for value in values if isinstance(value, Tensor)))
    ctx.others = [Tensor if isinstance(value, Tensor) else value for value in values]


def _recall(ctx) -> list:
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if value is Tensor else value for value in ctx.others]
