"""Minimum over channels, sum over height, GELU, plus bias, for PyTorch."""

import torch

from ..launchers.index_space import MAX_DIMS
from ..launchers.min_sum_gelu_add import bias_gradient as launch_bias_gradient
from ..launchers.min_sum_gelu_add import check_input, output_shape
from ..launchers.min_sum_gelu_add import input_gradient as launch_input_gradient
from ..launchers.min_sum_gelu_add import min_sum_gelu_add as launch_min_sum_gelu_add
from ..launchers.min_sum_gelu_add import sum_gradient as launch_sum_gradient
from . import autocast
from .operator import Operator, is_transformed, needs_gradient, refused
from .pointwise import is_dense


def min_sum_gelu_add(input, bias):
    """`gelu(input.min(dim=1, keepdim=True)[0].sum(dim=2, keepdim=True)) + bias`, GELU in its erf form.

    Args:
        input: (N, C, H, W); float64, float32, float16 or bfloat16; any strides.
        bias: a tensor of the same dtype whose shape broadcasts with (N, 1, 1, W), also one that enlarges it.

    Returns:
        A contiguous tensor of the broadcast shape. Under autocast, of the dtype that torch's functions arrive at.

    The gradient of the minimum goes to the channel that `torch.min` returns: the first of equals, the first NaN. The
    backward pass is differentiable once.

    Raises:
        RuntimeError: input not of four dimensions, a bias that does not broadcast, mixed dtypes or devices, dtypes that
            are not floating-point.
        IndexError: no channels.
        TypeError: not a tensor.
    """
    check_operands("min_sum_gelu_add", input=input, bias=bias)
    if autocast.is_on(input):
        input, bias = autocast.raised(input, bias)
    tensors = input, plain(bias)
    if needs_gradient(tensors) or is_transformed():
        return MIN_SUM_GELU_ADD_SAVING(tensors)[0]
    return MIN_SUM_GELU_ADD(tensors)


def check_operands(function, **operands):
    """Raises TypeError unless all are tensors."""
    for name, operand in operands.items():
        if not isinstance(operand, torch.Tensor):
            raise TypeError(f"{function}(): argument '{name}' must be Tensor, not {type(operand).__name__}")


def plain(tensor):
    """The tensor; a contiguous copy if it has more dimensions than kernels know, lest strides keep them apart."""
    return tensor.contiguous() if tensor.dim() > MAX_DIMS else tensor


def empty_saved(call, like, shape):
    """The tensors kept for backward: index (N, H, W) and sums (N, W), for a plane of pixels of this shape."""
    batch, _, width = shape
    dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
    return call.empty(shape, like, torch.int32), call.empty((batch, width), like, dtype)


def _min_sum_gelu_add(call, input, bias):
    check_input(input.shape)
    batch, _, _, width = input.shape
    output = call.empty(output_shape(batch, width, bias.shape), input)
    call(launch_min_sum_gelu_add, input, bias, out=output)
    return output


def _min_sum_gelu_add_saving(call, input, bias):
    """The result; one channel number per pixel and GELU's argument per column, which backward needs; not the minima."""
    check_input(input.shape)
    batch, _, height, width = input.shape
    output = call.empty(output_shape(batch, width, bias.shape), input)
    index, sums = empty_saved(call, input, (batch, height, width))
    call(launch_min_sum_gelu_add, input, bias, out=output, index=index, sums=sums)
    return output, index, sums


def gradient_strides(tensor):
    """Strides for the gradient of a tensor: its own, unless elements share a place or there are holes."""
    return tuple((tensor if is_dense(tensor) else torch.empty_like(tensor, device="meta")).stride())


def _setup(ctx, tensors, static, output):
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grads):
    """The forward pass once more: this one kept nothing."""
    input, bias = ctx.saved_tensors
    _, index, sums = MIN_SUM_GELU_ADD_SAVING((input.detach(), bias.detach()))
    layout = input.shape, gradient_strides(input), bias.shape
    return gradients(grads[0], layout, index, sums, ctx.needs)


def _saving_setup(ctx, tensors, static, outputs):
    input, bias = tensors
    ctx.layout = input.shape, gradient_strides(input), bias.shape  # the input itself is not kept alive
    ctx.mark_non_differentiable(outputs[1], outputs[2])
    ctx.save_for_backward(outputs[1], outputs[2])


def _saving_gradients(ctx, grads):
    index, sums = ctx.saved_tensors
    return gradients(grads[0], ctx.layout, index, sums, ctx.needs)


def gradients(grad_output, layout, index, sums, needs):
    """The gradients for input and bias, None where not needed. `layout`: input's shape, its strides, bias's shape."""
    if grad_output is None:
        return None, None
    return MIN_SUM_GELU_ADD_BACKWARD.gradients(needs, (plain(grad_output), index, sums), (*layout, tuple(needs)))


def _backward(call, grad_output, index, sums, shape, strides, bias_shape, needs):
    results = []
    if needs[0]:
        grad_sum = call(launch_sum_gradient, grad_output, sums)
        results.append(call.empty_strided(shape, strides, grad_output))
        call(launch_input_gradient, grad_sum, index, shape, call.dtype(grad_output), out=results[-1])
    if needs[1]:
        results.append(call.empty(bias_shape, grad_output))
        call(launch_bias_gradient, grad_output, bias_shape, out=results[-1])
    return tuple(results)


#: `backward` of the backward passes.
once_differentiable = refused("the minimum over channels is once_differentiable: its gradient has no gradient here")

MIN_SUM_GELU_ADD = Operator(
    "min_sum_gelu_add(Tensor input, Tensor bias) -> Tensor",
    _min_sum_gelu_add,
    setup_context=_setup,
    backward=_gradients,
)
MIN_SUM_GELU_ADD_SAVING = Operator(
    "min_sum_gelu_add_saving(Tensor input, Tensor bias) -> (Tensor, Tensor, Tensor)",
    _min_sum_gelu_add_saving,
    setup_context=_saving_setup,
    backward=_saving_gradients,
)
MIN_SUM_GELU_ADD_BACKWARD = Operator(
    "min_sum_gelu_add_backward(Tensor grad_output, Tensor index, Tensor sums, SymInt[] shape, SymInt[] strides, "
    "SymInt[] bias_shape, bool[] needs) -> Tensor[]",
    _backward,
    backward=once_differentiable,
)
