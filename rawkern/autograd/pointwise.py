"""Chains of pointwise functions on torch tensors, differentiable twice."""

import torch
from torch.autograd.function import once_differentiable

from ..launchers.chain import chain_of
from ..launchers.pointwise import pointwise as launch_pointwise
from ..launchers.pointwise import pointwise_backward as launch_pointwise_backward
from ..launchers.pointwise import pointwise_double_backward as launch_pointwise_double_backward
from .dlpack import stream_of, to_array


def pointwise(input, chain):
    """Applies a chain of pointwise functions in one kernel.

    Args:
        input: tensor of any shape, float64, float32, float16 or bfloat16.
        chain: a function of `rawkern.epilogue` or a sequence of them. Tensors in it have the input's dtype and device,
            broadcast to the input and vary along at most one of its axes, the same for all.

    Returns:
        A tensor of the input's shape, with its memory format if the input is dense. Differentiable by the input and the
        chain's tensors, twice.

    Raises:
        TypeError: `input` is no tensor, or `chain` holds something else than functions.
        RuntimeError: dtypes or devices differ, the dtype is not one of those above, a tensor does not broadcast.
        ValueError: the chain's tensors vary along several axes.
    """
    chain = chain_of(chain)
    for i, tensor in enumerate((input, *chain.tensors)):
        if not isinstance(tensor, torch.Tensor):
            name = f"tensor {i - 1} of the chain" if i else "argument 'input'"
            raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
    return Pointwise.apply(input, chain, *chain.tensors)


def pointwise_backward(grad_output, input, chain, tensors, needs):
    """Gradients of `chain(input)`, differentiable by grad_output, input and tensors.

    Args:
        grad_output: gradient of the value, of the input's shape.
        chain: the `launchers.chain.Chain`.
        tensors: the chain's tensors.
        needs: which gradients are wanted, as bools for the input and each tensor.

    Returns:
        A tuple of the gradients of the input and of each tensor, None where not wanted.
    """
    return PointwiseBackward.apply(grad_output, input, chain, tuple(needs), *tensors)


class Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, chain, *tensors):
        input_ = dense(input)
        output = torch.empty_like(input_)
        launch_pointwise(
            to_array(input_),
            chain,
            tensors=[to_array(t.contiguous()) for t in tensors],
            out=to_array(output),
            stream=stream_of(input),
        )
        ctx.chain = chain
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, *tensors)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        if grad_output is None:
            return None, None, *(None for _ in ctx.chain.tensors)
        input, *tensors = ctx.saved_tensors
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:])
        grad_input, *grad_tensors = pointwise_backward(grad_output, input, ctx.chain, tensors, needs)
        return grad_input, None, *grad_tensors


class PointwiseBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad_output, input, chain, needs, *tensors):
        input_, tensors_ = dense(input), [t.contiguous() for t in tensors]
        results = _empty_like((input_, *tensors_), needs)
        launch_pointwise_backward(
            to_array(arranged_as(grad_output, input_)),
            to_array(input_),
            chain,
            tensors=[to_array(t) for t in tensors_],
            needs=needs,
            out=[to_array(t) for t in results],
            stream=stream_of(input),
        )
        ctx.chain = chain
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_output, input, *tensors)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_grad_input, *grad_grad_tensors):
        nothing = (None,) * (4 + len(grad_grad_tensors))
        if grad_grad_input is None and all(g is None for g in grad_grad_tensors):
            return nothing
        grad_output, input, *tensors = ctx.saved_tensors
        input_, tensors_ = dense(input), [t.contiguous() for t in tensors]
        needs = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[4:])
        results = _empty_like((input_, input_, *tensors_), needs)
        launch_pointwise_double_backward(
            to_array(arranged_as(grad_output, input_)),
            to_array(input_),
            ctx.chain,
            to_array(arranged_as(grad_grad_input, input_)),
            [None if g is None else to_array(g.contiguous()) for g in grad_grad_tensors],
            tensors=[to_array(t) for t in tensors_],
            needs=needs,
            out=[to_array(t) for t in results],
            stream=stream_of(input),
        )
        return results[0], results[1], None, None, *results[2:]


def _empty_like(tensors, needs):
    return [torch.empty_like(t) if needed else None for t, needed in zip(tensors, needs, strict=True)]


def dense(tensor):
    """`tensor`, or a copy whose elements fill one block of memory in the order that torch chooses."""
    if tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return tensor
    return torch.empty_like(tensor).copy_(tensor)


def arranged_as(tensor, model):
    """`tensor`, or a copy of it in the order of memory of the dense tensor `model`; None stays None."""
    if tensor is None or all(
        n == 1 or a == b for n, a, b in zip(model.shape, tensor.stride(), model.stride(), strict=True)
    ):
        return tensor
    return torch.empty_like(model).copy_(tensor)
