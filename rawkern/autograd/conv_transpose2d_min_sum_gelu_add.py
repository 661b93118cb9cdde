"""Transposed convolution, minimum over channels, sum over height, GELU, plus bias, for PyTorch."""

import torch
from torch.autograd.function import once_differentiable

from ..launchers.conv_transpose2d_min_sum_gelu_add import conv_bias_gradient as launch_conv_bias_gradient
from ..launchers.conv_transpose2d_min_sum_gelu_add import (
    conv_transpose2d_min_sum_gelu_add as launch_conv_transpose2d_min_sum_gelu_add,
)
from ..launchers.conv_transpose2d_min_sum_gelu_add import geometry_of, output_shape
from ..launchers.conv_transpose2d_min_sum_gelu_add import input_gradient as launch_input_gradient
from ..launchers.conv_transpose2d_min_sum_gelu_add import sum_gradient as launch_sum_gradient
from ..launchers.conv_transpose2d_min_sum_gelu_add import weight_gradient as launch_weight_gradient
from .dlpack import stream_of, to_array
from .min_sum_gelu_add import bias_gradient, check_operands, empty_saved, plain
from .precision import resolve_precision


def conv_transpose2d_min_sum_gelu_add(
    input,
    weight,
    conv_bias,
    bias,
    stride=1,
    padding=0,
    output_padding=0,
    groups=1,
    dilation=1,
    *,
    precision=None,
):
    """`min_sum_gelu_add(conv_transpose2d(input, weight, conv_bias, ...), bias)`, the convolution's output never stored.

    Args:
        input: (N, C_in, H, W); float64, float32, float16 or bfloat16; any strides. The batch cannot be left out, since
            the minimum runs over dimension 1 and the sum over dimension 2.
        weight: (C_in, C_out / groups, kH, kW).
        conv_bias: (C_out,) or None.
        bias: a tensor whose shape broadcasts with (N, 1, 1, W_out), also one that enlarges it.
        stride, padding, output_padding, groups, dilation: as in `torch.nn.functional.conv_transpose2d`.
        precision: how float32 values are multiplied in the forward pass: "ieee", "tf32", or None for what torch allows
            its own convolutions on the tensor's device. Gradients are always computed in full float32.

    Returns:
        A contiguous tensor of the broadcast shape.

    The gradients of input, weight and conv_bias follow the one channel per pixel that was the minimum. Other channels
    are left out, not multiplied by zero: an infinite weight or input that was not the minimum's leaves no NaN. The
    backward pass is differentiable once.

    Raises:
        RuntimeError, TypeError, ValueError: as torch does for the same mistake.
    """
    function = "conv_transpose2d_min_sum_gelu_add"
    optional = {} if conv_bias is None else {"conv_bias": conv_bias}
    check_operands(function, input=input, weight=weight, **optional, bias=bias)
    geometry = geometry_of(input.shape, weight.shape, stride, padding, output_padding, groups, dilation)
    if conv_bias is not None:
        geometry.check_bias(conv_bias.shape)
    precision = resolve_precision(precision, input)
    keep = torch.is_grad_enabled()  # inside forward it is always off
    return ConvTranspose2dMinSumGELUAdd.apply(input, weight, conv_bias, bias, geometry, precision, keep)


class ConvTranspose2dMinSumGELUAdd(torch.autograd.Function):
    """Keeps input and weight, one channel number per output pixel, and GELU's argument per output column."""

    @staticmethod
    def forward(ctx, input, weight, conv_bias, bias, geometry, precision, keep):
        shape = output_shape(geometry.batch, geometry.output_size[1], bias.shape)
        output = torch.empty(shape, dtype=input.dtype, device=input.device)
        index, sums = None, None
        if keep and any(ctx.needs_input_grad[:3]):
            index, sums = empty_saved(input, (geometry.batch, *geometry.output_size))
        launch_conv_transpose2d_min_sum_gelu_add(
            to_array(input),
            to_array(weight),
            to_array(conv_bias),
            to_array(plain(bias)),
            geometry.stride,
            geometry.padding,
            geometry.output_padding,
            geometry.groups,
            geometry.dilation,
            precision=precision,
            out=to_array(output),
            index=to_array(index),
            sums=to_array(sums),
            stream=stream_of(input),
        )
        ctx.geometry, ctx.bias_shape = geometry, bias.shape
        ctx.set_materialize_grads(False)
        needs_input, needs_weight, *_ = ctx.needs_input_grad
        ctx.like = torch.empty_like(input, device="meta")  # the gradient's layout, also where the input is not kept
        ctx.save_for_backward(input if needs_weight else None, weight if needs_input else None, index, sums)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        if grad_output is None:
            return (None,) * 7
        needs_bias = ctx.needs_input_grad[3]
        grad_input, grad_weight, grad_conv_bias = _convolution_gradients(ctx, grad_output)
        grad_bias = bias_gradient(grad_output, ctx.bias_shape) if needs_bias else None
        return grad_input, grad_weight, grad_conv_bias, grad_bias, None, None, None


def _convolution_gradients(ctx, grad_output):
    """The gradients for input, weight and conv_bias; None for those that are not needed."""
    needs_input, needs_weight, needs_conv_bias = ctx.needs_input_grad[:3]
    if not (needs_input or needs_weight or needs_conv_bias):
        return None, None, None
    input, weight, index, sums = ctx.saved_tensors
    like, geometry, stream = ctx.like, ctx.geometry, stream_of(grad_output)
    common = {"dtype": like.dtype, "device": grad_output.device}
    index = to_array(index)
    grad_sum = launch_sum_gradient(to_array(plain(grad_output)), to_array(sums), stream=stream)
    grad_input = grad_weight = grad_conv_bias = None
    if needs_input:
        grad_input = torch.empty_strided(like.shape, like.stride(), **common)
        launch_input_gradient(grad_sum, index, to_array(weight), geometry, out=to_array(grad_input), stream=stream)
    if needs_weight:
        grad_weight = torch.empty(geometry.weight_shape, **common)
        launch_weight_gradient(grad_sum, index, to_array(input), geometry, out=to_array(grad_weight), stream=stream)
    if needs_conv_bias:
        grad_conv_bias = torch.empty(geometry.out_channels, **common)
        out = to_array(grad_conv_bias)
        launch_conv_bias_gradient(grad_sum, index, geometry, out.dtype, out=out, stream=stream)
    return grad_input, grad_weight, grad_conv_bias
