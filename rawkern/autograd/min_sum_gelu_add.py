"""Minimum over channels, sum over height, GELU, plus bias, for PyTorch."""

import torch
from torch.autograd.function import once_differentiable

from ..launchers.index_space import MAX_DIMS
from ..launchers.min_sum_gelu_add import bias_gradient as launch_bias_gradient
from ..launchers.min_sum_gelu_add import check_input, output_shape
from ..launchers.min_sum_gelu_add import input_gradient as launch_input_gradient
from ..launchers.min_sum_gelu_add import min_sum_gelu_add as launch_min_sum_gelu_add
from ..launchers.min_sum_gelu_add import sum_gradient as launch_sum_gradient
from .dlpack import stream_of, to_array


def min_sum_gelu_add(input, bias):
    """`gelu(input.min(dim=1, keepdim=True)[0].sum(dim=2, keepdim=True)) + bias`, GELU in its erf form.

    Args:
        input: (N, C, H, W); float64, float32, float16 or bfloat16; any strides.
        bias: a tensor of the same dtype whose shape broadcasts with (N, 1, 1, W), also one that enlarges it.

    Returns:
        A contiguous tensor of the broadcast shape.

    The gradient of the minimum goes to the channel that `torch.min` returns: the first of equals, the first NaN. The
    backward pass is differentiable once.

    Raises:
        RuntimeError: input not of four dimensions, a bias that does not broadcast, mixed dtypes or devices, dtypes that
            are not floating-point.
        IndexError: no channels.
        TypeError: not a tensor.
    """
    check_operands("min_sum_gelu_add", input=input, bias=bias)
    return MinSumGELUAdd.apply(input, bias, torch.is_grad_enabled())


def check_operands(function, **operands):
    """Raises TypeError unless all are tensors, RuntimeError unless dtypes and devices agree, naming both."""
    first_name = first = None
    for name, operand in operands.items():
        if not isinstance(operand, torch.Tensor):
            raise TypeError(f"{function}(): argument '{name}' must be Tensor, not {type(operand).__name__}")
        if first is None:
            first_name, first = name, operand
        elif operand.dtype != first.dtype:
            raise RuntimeError(f"{first_name} and {name} have different dtypes: {first.dtype} and {operand.dtype}")
        elif operand.device != first.device:
            raise RuntimeError(f"{first_name} and {name} are on different devices: {first.device} and {operand.device}")


class MinSumGELUAdd(torch.autograd.Function):
    """Keeps one channel number per pixel and GELU's argument per column; not the minima."""

    @staticmethod
    def forward(ctx, input, bias, keep):
        check_input(input.shape)
        batch, _, height, width = input.shape
        shape = output_shape(batch, width, bias.shape)
        output = torch.empty(shape, dtype=input.dtype, device=input.device)
        needs_saved = keep and ctx.needs_input_grad[0]
        index, sums = empty_saved(input, (batch, height, width)) if needs_saved else (None, None)
        launch_min_sum_gelu_add(
            to_array(input),
            to_array(plain(bias)),
            out=to_array(output),
            index=to_array(index),
            sums=to_array(sums),
            stream=stream_of(input),
        )
        ctx.bias_shape = bias.shape
        ctx.like = torch.empty_like(input, device="meta")  # the gradient's layout, without keeping the input alive
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(index, sums)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        if grad_output is None:
            return None, None, None
        index, sums = ctx.saved_tensors
        grad_input = input_gradient(grad_output, ctx.like, index, sums) if ctx.needs_input_grad[0] else None
        grad_bias = bias_gradient(grad_output, ctx.bias_shape) if ctx.needs_input_grad[1] else None
        return grad_input, grad_bias, None


def plain(tensor):
    """The tensor; a contiguous copy if it has more dimensions than kernels know, lest strides keep them apart."""
    return tensor.contiguous() if tensor.dim() > MAX_DIMS else tensor


def empty_saved(like, shape):
    """The tensors kept for backward: index (N, H, W) and sums (N, W), for a plane of pixels of this shape."""
    batch, _, width = shape
    dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
    index = torch.empty(shape, dtype=torch.int32, device=like.device)
    return index, torch.empty((batch, width), dtype=dtype, device=like.device)


def input_gradient(grad_output, like, index, sums):
    """The dense gradient for the input, with the layout of `like`."""
    result = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=grad_output.device)
    stream = stream_of(grad_output)
    grad_sum = launch_sum_gradient(to_array(plain(grad_output)), to_array(sums), stream=stream)
    out = to_array(result)
    launch_input_gradient(grad_sum, to_array(index), out.shape, out.dtype, out=out, stream=stream)
    return result


def bias_gradient(grad_output, shape):
    """The gradient for the bias."""
    result = torch.empty(shape, dtype=grad_output.dtype, device=grad_output.device)
    launch_bias_gradient(to_array(plain(grad_output)), shape, out=to_array(result), stream=stream_of(grad_output))
    return result
