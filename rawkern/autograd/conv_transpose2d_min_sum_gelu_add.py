"""Transposed convolution, minimum over channels, sum over height, GELU, plus bias, for PyTorch."""

from ..launchers.conv_transpose2d_min_sum_gelu_add import conv_bias_gradient as launch_conv_bias_gradient
from ..launchers.conv_transpose2d_min_sum_gelu_add import (
    conv_transpose2d_min_sum_gelu_add as launch_conv_transpose2d_min_sum_gelu_add,
)
from ..launchers.conv_transpose2d_min_sum_gelu_add import geometry_of, output_shape
from ..launchers.conv_transpose2d_min_sum_gelu_add import input_gradient as launch_input_gradient
from ..launchers.conv_transpose2d_min_sum_gelu_add import sum_gradient as launch_sum_gradient
from ..launchers.conv_transpose2d_min_sum_gelu_add import weight_gradient as launch_weight_gradient
from ..launchers.min_sum_gelu_add import bias_gradient as launch_bias_gradient
from . import autocast
from .conv_transpose2d import CONVOLUTION, convolution_of, convolve
from .min_sum_gelu_add import (
    check_operands,
    empty_saved,
    gradient_strides,
    min_sum_gelu_add,
    once_differentiable,
    plain,
)
from .operator import Operator, is_transformed, needs_gradient


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
        A contiguous tensor of the broadcast shape. Under autocast the convolution runs in autocast's dtype, and what
        follows in the dtype that torch's functions, applied one by one, would run in; where these differ, in two steps.

    The gradients of input, weight and conv_bias follow the one channel per pixel that was the minimum. Other channels
    are left out, not multiplied by zero: an infinite weight or input that was not the minimum's leaves no NaN. The
    backward pass is differentiable once.

    Raises:
        RuntimeError, TypeError, ValueError: as torch does for the same mistake.
    """
    optional = {} if conv_bias is None else {"conv_bias": conv_bias}
    check_operands("conv_transpose2d_min_sum_gelu_add", input=input, weight=weight, **optional, bias=bias)
    convolution = convolution_of(stride, padding, output_padding, dilation, groups, precision)
    if autocast.is_on(input):
        input, weight, conv_bias = autocast.lowered(input, weight, conv_bias)
        if bias.dtype != input.dtype or autocast.normalised_dtype(input) != input.dtype:
            return min_sum_gelu_add(convolve(input, weight, convolution, conv_bias), bias)
    tensors = input, weight, conv_bias, plain(bias)
    if needs_gradient(tensors) or is_transformed():
        return SAVING(tensors, convolution)[0]
    return PLAIN(tensors, convolution)


def _geometry(input, weight, conv_bias, convolution):
    stride, padding, output_padding, dilation, groups, _ = convolution
    geometry = geometry_of(input.shape, weight.shape, stride, padding, output_padding, groups, dilation)
    if conv_bias is not None:
        geometry.check_bias(conv_bias.shape)
    return geometry


def _launch(call, input, weight, conv_bias, bias, convolution, **outputs):
    stride, padding, output_padding, dilation, groups, precision = convolution
    call(
        launch_conv_transpose2d_min_sum_gelu_add,
        input, weight, conv_bias, bias, stride, padding, output_padding, groups, dilation,
        precision=precision, **outputs,
    )  # fmt: skip


def _plain(call, input, weight, conv_bias, bias, *convolution):
    geometry = _geometry(input, weight, conv_bias, convolution)
    output = call.empty(output_shape(geometry.batch, geometry.output_size[1], bias.shape), input)
    _launch(call, input, weight, conv_bias, bias, convolution, out=output)
    return output


def _saving(call, input, weight, conv_bias, bias, *convolution):
    """The result; one channel number per output pixel and GELU's argument per output column, which backward needs."""
    geometry = _geometry(input, weight, conv_bias, convolution)
    output = call.empty(output_shape(geometry.batch, geometry.output_size[1], bias.shape), input)
    index, sums = empty_saved(call, input, (geometry.batch, *geometry.output_size))
    _launch(call, input, weight, conv_bias, bias, convolution, out=output, index=index, sums=sums)
    return output, index, sums


def _plain_setup(ctx, tensors, static, output):
    ctx.convolution = static
    ctx.save_for_backward(*tensors)


def _plain_gradients(ctx, grads):
    """The forward pass once more: this one kept nothing."""
    tensors = [None if tensor is None else tensor.detach() for tensor in ctx.saved_tensors]
    _, index, sums = SAVING(tensors, ctx.convolution)
    input, weight, _, bias = tensors
    layout = tuple(input.shape), gradient_strides(input), tuple(weight.shape), tuple(bias.shape)
    return _gradients(grads[0], input, weight, index, sums, layout, ctx.convolution, ctx.needs)


def _saving_setup(ctx, tensors, static, outputs):
    input, weight, _, bias = tensors
    ctx.convolution = static
    ctx.layout = tuple(input.shape), gradient_strides(input), tuple(weight.shape), tuple(bias.shape)
    ctx.mark_non_differentiable(outputs[1], outputs[2])
    needs_input, needs_weight = ctx.needs_input_grad[:2]  # what no gradient needs is not kept alive
    ctx.save_for_backward(input if needs_weight else None, weight if needs_input else None, *outputs[1:])


def _saving_gradients(ctx, grads):
    return _gradients(grads[0], *ctx.saved_tensors, ctx.layout, ctx.convolution, ctx.needs)


def _gradients(grad_output, input, weight, index, sums, layout, convolution, needs):
    if grad_output is None:
        return [None] * 4
    tensors = plain(grad_output), input, weight, index, sums
    return BACKWARD.gradients(needs, tensors, (*layout, tuple(needs), *convolution))


def _backward(call, grad_output, input, weight, index, sums, shape, strides, weight_shape, bias_shape, needs, *conv):
    stride, padding, output_padding, dilation, groups, _ = conv
    geometry = geometry_of(shape, weight_shape, stride, padding, output_padding, groups, dilation)
    results = []
    if any(needs[:3]):
        grad_sum = call(launch_sum_gradient, grad_output, sums)
    if needs[0]:
        results.append(call.empty_strided(shape, strides, grad_output))
        call(launch_input_gradient, grad_sum, index, weight, geometry, out=results[-1])
    if needs[1]:
        results.append(call.empty(weight_shape, grad_output))
        call(launch_weight_gradient, grad_sum, index, input, geometry, out=results[-1])
    if needs[2]:
        results.append(call.empty((geometry.out_channels,), grad_output))
        call(launch_conv_bias_gradient, grad_sum, index, geometry, call.dtype(grad_output), out=results[-1])
    if needs[3]:
        results.append(call.empty(bias_shape, grad_output))
        call(launch_bias_gradient, grad_output, bias_shape, out=results[-1])
    return tuple(results)


_ARGUMENTS = f"Tensor input, Tensor weight, Tensor? conv_bias, Tensor bias, {CONVOLUTION}"

PLAIN = Operator(
    f"conv_transpose2d_min_sum_gelu_add({_ARGUMENTS}) -> Tensor",
    _plain,
    setup_context=_plain_setup,
    backward=_plain_gradients,
)
SAVING = Operator(
    f"conv_transpose2d_min_sum_gelu_add_saving({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _saving,
    setup_context=_saving_setup,
    backward=_saving_gradients,
)
BACKWARD = Operator(
    "conv_transpose2d_min_sum_gelu_add_backward(Tensor grad_output, Tensor? input, Tensor? weight, Tensor index, "
    "Tensor sums, SymInt[] shape, SymInt[] strides, SymInt[] weight_shape, SymInt[] bias_shape, bool[] needs, "
    f"{CONVOLUTION}) -> Tensor[]",
    _backward,
    backward=once_differentiable,
)
