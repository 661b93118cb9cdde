"""Chains of pointwise functions on torch tensors, differentiable twice."""

import torch

from ..launchers.chain import chain_from, channel_axis, functions_of, parts_of
from ..launchers.pointwise import pointwise as launch_pointwise
from ..launchers.pointwise import pointwise_backward as launch_pointwise_backward
from ..launchers.pointwise import pointwise_double_backward as launch_pointwise_double_backward
from . import autocast
from .operator import Operator, is_transformed, refused, spread, unwrapped


def pointwise(input, chain):
    """Applies a chain of pointwise functions in one kernel.

    Args:
        input: tensor of any shape, float64, float32, float16 or bfloat16.
        chain: a function of `rawkern.epilogue` or a sequence of them. Tensors in it have the input's dtype and device,
            broadcast to the input and vary along at most one of its axes, the same for all.

    Returns:
        A tensor of the input's shape, with its memory format if the input is dense. Differentiable by the input and the
        chain's tensors, twice. Under autocast, tensors of different dtypes are promoted as torch's operators do.

    Raises:
        TypeError: `input` is no tensor, or `chain` holds something else than functions.
        RuntimeError: dtypes or devices differ, the dtype is not one of those above, a tensor does not broadcast.
        ValueError: the chain's tensors vary along several axes.
    """
    return pointwise_of(input, *parts_of(functions_of(chain)))


def pointwise_of(input, signature, numbers=(), tensors=()):
    """`pointwise` for the parts of a chain, see `launchers.chain.Chain`."""
    if tensors or not isinstance(input, torch.Tensor):
        check_chain(input, tensors)
    if tensors or "Softplus" in signature:
        input, *tensors = _autocast(input, tensors, signature)
    return POINTWISE((input, *tensors), (signature, numbers))


def _autocast(input, tensors, signature):
    if not autocast.is_on(input):
        return input, *tensors
    dtype = autocast.chain_dtype(input.dtype, input.device.type, signature, tensors)
    return [tensor.to(dtype) for tensor in (input, *tensors)]


def check_chain(input, tensors):
    """Raises TypeError unless all are tensors."""
    for i, tensor in enumerate((input, *tensors)):
        if not isinstance(tensor, torch.Tensor):
            name = f"tensor {i - 1} of the chain" if i else "argument 'input'"
            raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")


def pointwise_backward(grad_output, input, tensors, signature, numbers, needs):
    """Gradients of a chain's value, differentiable by grad_output, input and tensors.

    Args:
        grad_output: gradient of the value, of the input's shape.
        input, tensors: as `POINTWISE` keeps them.
        signature, numbers: of the chain, see `launchers.chain.Chain`.
        needs: which gradients are wanted, as bools for the input and each tensor.

    Returns:
        The gradients of the input and of each tensor in a row, None where not wanted.
    """
    return POINTWISE_BACKWARD.gradients(needs, (grad_output, input, *tensors), (signature, numbers, tuple(needs)))


def composed_gradients(function, inputs, needs, grad_output):
    """The gradients of `function(*inputs)` that are needed, themselves differentiable; None for the others."""
    inputs = unwrapped(inputs)
    if is_transformed():  # which allows no requires_grad_()
        return _transformed_gradients(function, inputs, needs, grad_output)
    with torch.enable_grad():
        # Views, so that a tensor that is given twice counts twice.
        inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        wanted = [tensor for tensor, need in zip(inputs, needs, strict=True) if need]
        for tensor in wanted:
            if not tensor.requires_grad:  # that of a finished transform of torch.func
                tensor.requires_grad_()
        output = function(*inputs)
    return spread(needs, torch.autograd.grad(output, wanted, grad_output, create_graph=True))


def _transformed_gradients(function, inputs, needs, grad_output):
    """`composed_gradients` inside a transform of torch.func."""

    def of_wanted(*wanted):
        found = iter(wanted)
        return function(*(next(found) if need else tensor for tensor, need in zip(inputs, needs, strict=True)))

    wanted = (tensor for tensor, need in zip(inputs, needs, strict=True) if need)
    return spread(needs, torch.func.vjp(of_wanted, *wanted)[1](grad_output))


def _directional(outputs, grad_output, input, tensors, signature, numbers, v, directions):
    """What `pointwise_double_backward` computes, for two outputs (grad_output, input) and tensors as `outputs` says."""
    exists = v is not None, *(direction is not None for direction in directions)
    given = [None if direction is None else direction.contiguous() for direction in directions]
    arrays = arranged_as(grad_output, input), input, arranged_as(v, input), *tensors, *given
    static = signature, numbers, tuple(outputs), exists
    present = tuple(array for array in arrays if array is not None)
    return spread(outputs, POINTWISE_DOUBLE_BACKWARD(present, static))


def _arranged(tensors):
    input, *operands = tensors
    return dense(input), *contiguous(operands)


def _pointwise(call, input, tensors, signature, numbers):
    channel_axis(input.shape, [tensor.shape for tensor in tensors])
    output = call.empty_like(input)
    call(launch_pointwise, input, chain_from(signature, numbers), tensors=tensors, out=output)
    return output


def _pointwise_setup(ctx, tensors, static, output):
    ctx.static = static
    ctx.save_for_backward(*tensors)


def _pointwise_gradients(ctx, grads):
    if grads[0] is None:
        return [None] * len(ctx.needs)
    input, *tensors = ctx.saved_tensors
    return pointwise_backward(grads[0], input, tensors, *ctx.static, ctx.needs)


def _pointwise_tangent(ctx, tangents):
    input, *tensors = ctx.saved_tensors
    return pointwise_tangent(input, tensors, *ctx.static, tangents)


def pointwise_tangent(input, tensors, signature, numbers, tangents):
    """The derivative of a chain's value along the tangents (None: zero) of input and tensors.

    The gradient of `pointwise_backward` for grad_output, which is linear, is this; grad_output's value plays no part.
    """
    v, *directions = tangents
    outputs = (True, False, *(False for _ in tensors))
    return _directional(outputs, input, input, tensors, signature, numbers, v, directions)[0]


def _pointwise_batched(batch_size, dims, tensors, static):
    """One call for the whole batch, unless the chain's tensors are batched."""
    if any(dim is not None for dim in dims[1:]):
        return None
    return POINTWISE((tensors[0].movedim(dims[0], 0), *tensors[1:]), static), 0


def _backward_arranged(tensors):
    grad_output, input, *operands = tensors
    return arranged_as(grad_output, input), input, *operands


def _pointwise_backward(call, grad_output, input, tensors, signature, numbers, needs):
    grads = [call.empty_like(tensor) if need else None for tensor, need in zip((input, *tensors), needs, strict=True)]
    chain = chain_from(signature, numbers)
    call(launch_pointwise_backward, grad_output, input, chain, tensors=tensors, needs=needs, out=grads)
    return tuple(grad for grad in grads if grad is not None)


def _pointwise_backward_setup(ctx, tensors, static, outputs):
    ctx.signature, ctx.numbers, ctx.wanted = static
    ctx.save_for_backward(*tensors)


def _pointwise_backward_gradients(ctx, grads):
    v, *directions = spread(ctx.wanted, grads)
    if v is None and all(direction is None for direction in directions):
        return [None] * len(ctx.needs)
    grad_output, input, *tensors = ctx.saved_tensors
    arguments = grad_output, input, tensors, ctx.signature, ctx.numbers, v, directions
    return _directional(ctx.needs, *arguments)


def _pointwise_backward_tangent(ctx, tangents):
    """By symmetry of second derivatives, what the tangents of input and tensors do is `pointwise_double_backward`."""
    grad_output, input, *tensors = ctx.saved_tensors
    tangent, v, *directions = tangents
    parts = []
    if tangent is not None:
        parts.append(pointwise_backward(tangent, input, tensors, ctx.signature, ctx.numbers, ctx.wanted))
    if v is not None or any(direction is not None for direction in directions):
        arguments = grad_output, input, tensors, ctx.signature, ctx.numbers, v, directions
        parts.append(_directional((False, *ctx.wanted), *arguments)[1:])
    sums = [sum(terms[1:], terms[0]) for terms in zip(*parts, strict=True) if terms[0] is not None]
    return tuple(sums)


def _pointwise_double_backward(call, tensors, signature, numbers, needs, exists):
    chain = chain_from(signature, numbers)
    count = chain.tensor_count
    tensors = list(tensors)
    grad_output, input = tensors[:2]
    v = tensors.pop(2) if exists[0] else None
    operands = tensors[2 : 2 + count]
    directions = spread(exists[1:], tensors[2 + count :])
    outs = [
        call.empty_like(tensor) if need else None for tensor, need in zip((input, input, *operands), needs, strict=True)
    ]
    call(
        launch_pointwise_double_backward,
        grad_output, input, chain, v, directions, tensors=operands, needs=needs, out=outs,
    )  # fmt: skip
    return tuple(out for out in outs if out is not None)


POINTWISE = Operator(
    "pointwise(Tensor input, Tensor[] tensors, str functions, float[] numbers) -> Tensor",
    _pointwise,
    setup_context=_pointwise_setup,
    backward=_pointwise_gradients,
    jvp=_pointwise_tangent,
    vmap=_pointwise_batched,
    arrange=_arranged,
)
POINTWISE_BACKWARD = Operator(
    "pointwise_backward(Tensor grad_output, Tensor input, Tensor[] tensors, str functions, float[] numbers, "
    "bool[] needs) -> Tensor[]",
    _pointwise_backward,
    setup_context=_pointwise_backward_setup,
    backward=_pointwise_backward_gradients,
    jvp=_pointwise_backward_tangent,
    arrange=_backward_arranged,
)
POINTWISE_DOUBLE_BACKWARD = Operator(
    "pointwise_double_backward(Tensor[] tensors, str functions, float[] numbers, bool[] needs, bool[] exists) "
    "-> Tensor[]",
    _pointwise_double_backward,
    backward=refused("rawkern's pointwise functions are differentiable twice, not three times"),
)


def contiguous(tensors):
    return [tensor.contiguous() for tensor in tensors]


def dense(tensor):
    """`tensor`, or a copy whose elements fill one block of memory in the order that torch chooses.

    A traced program is spared the question: its strides may be symbols. Launchers, too, copy what they must.
    """
    return tensor if torch.compiler.is_compiling() or is_dense(tensor) else tensor.clone()


def is_dense(tensor):
    """Whether the elements fill one block of memory, in any order of dimensions and each in a place of its own."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def arranged_as(tensor, model):
    """`tensor`, or a copy of it in the order of memory of the dense tensor `model`; None stays None."""
    if tensor is None or all(
        n == 1 or a == b for n, a, b in zip(model.shape, tensor.stride(), model.stride(), strict=True)
    ):
        return tensor
    order = sorted(range(model.dim()), key=lambda axis: (-model.stride(axis), axis))
    inverse = sorted(range(model.dim()), key=lambda place: order[place])
    return tensor.permute(order).contiguous().permute(inverse)
