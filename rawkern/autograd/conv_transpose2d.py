"""Transposed convolution for PyTorch: three bilinear maps, each differentiated by means of the other two.

`y(x, w)` is bilinear; its input gradient `gx(gy, w)` and its weight gradient `gw(x, gy)` are bilinear again, so that
    d y  = y(dx, w) + y(x, dw)        d gx = gx(dgy, w) + gx(gy, dw)        d gw = gw(dx, gy) + gw(x, dgy)
and the adjoints of all of these are the same three maps. Derivatives of every order follow.
"""

import torch

from ..launchers.chain import chain_of
from ..launchers.channel_sum import channel_sum
from ..launchers.conv_transpose2d import conv_transpose2d as launch_conv_transpose2d
from ..launchers.conv_transpose2d import input_gradient as launch_input_gradient
from ..launchers.conv_transpose2d import weight_gradient as launch_weight_gradient
from ..launchers.geometry import Geometry
from .dlpack import stream_of, to_array
from .pointwise import pointwise_backward
from .precision import resolve_precision


def conv_transpose2d(
    input,
    weight,
    bias=None,
    stride=1,
    padding=0,
    output_padding=0,
    groups=1,
    dilation=1,
    *,
    epilogue=(),
    precision=None,
):
    """Transposed 2-D convolution, followed by a chain of pointwise functions in the same kernel.

    Everything up to `dilation` is as in `torch.nn.functional.conv_transpose2d`.

    Args:
        input: (N, C_in, H, W) or (C_in, H, W); float64, float32, float16 or bfloat16; any strides.
        weight: (C_in, C_out / groups, kH, kW).
        bias: (C_out,) or None.
        epilogue: functions of `rawkern.epilogue`, applied in order to the result; tensors among their operands must
            broadcast per channel and are differentiable.
        precision: how float32 values are multiplied: "ieee", "tf32", or None for what torch allows its own
            convolutions on the tensor's device.

    Returns:
        (N, C_out, H_out, W_out), channels-last if the input is.

    Raises:
        RuntimeError, TypeError, ValueError: as torch does for the same mistake.
    """
    check_tensors("conv_transpose2d", input=input, weight=weight, bias=bias)
    if input.dim() == 3:
        if any(len(tensor.shape) > 3 for tensor in chain_of(epilogue).tensors):
            raise RuntimeError("tensors of an epilogue have at most 3 dimensions where the input is unbatched")
        return conv_transpose2d(
            input.unsqueeze(0), weight, bias, stride, padding, output_padding, groups, dilation,
            epilogue=epilogue, precision=precision,
        ).squeeze(0)  # fmt: skip
    geometry = Geometry.of(input.shape, weight.shape, stride, padding, output_padding, groups, dilation)
    chain = chain_of(epilogue)
    precision = resolve_precision(precision, input)
    keep = torch.is_grad_enabled()  # inside forward it is always off
    output, _ = ConvTranspose2d.apply(input, weight, bias, geometry, precision, chain, keep, *chain.tensors)
    return output


def check_tensors(function, **tensors):
    """Raises TypeError unless every argument is a tensor; only what torch's signature allows may be None."""
    for name, tensor in tensors.items():
        optional = name.endswith("bias") or name.startswith("norm_")
        if not isinstance(tensor, torch.Tensor) and not (optional and tensor is None):
            raise TypeError(f"{function}(): argument '{name}' must be Tensor, not {type(tensor).__name__}")


def empty_output(shape, like):
    """A new tensor of `shape` like `like`; channels-last if `like` is and is not contiguous as well."""
    channels_last = like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last and not like.is_contiguous() else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


class ConvTranspose2d(torch.autograd.Function):
    """(y, u): u the convolution with its bias, y the chain applied to it.

    u is stored, and returned, only where the chain's derivative will need it. As an output, and not a saved
    intermediate, it is part of the graph, which is what makes derivatives of higher order come out right.
    """

    @staticmethod
    def forward(ctx, input, weight, bias, geometry, precision, chain, keep, *operands):
        output = empty_output(geometry.output_shape, input)
        needs_saved = keep and not chain.is_identity and any(ctx.needs_input_grad)
        saved = torch.empty_like(output) if needs_saved else None
        launch_conv_transpose2d(
            to_array(input),
            to_array(weight),
            to_array(bias),
            geometry.stride,
            geometry.padding,
            geometry.output_padding,
            geometry.groups,
            geometry.dilation,
            epilogue=chain,
            operands=[to_array(operand) for operand in operands],
            precision=precision,
            out=to_array(output),
            saved=to_array(saved),
            stream=stream_of(input),
        )
        ctx.geometry, ctx.precision, ctx.chain = geometry, precision, chain
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, saved, *operands)
        return output, saved

    @staticmethod
    def backward(ctx, grad_output, grad_saved):
        input, weight, saved, *operands = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, _, _, _, _, *needs_operands = ctx.needs_input_grad
        grad_operands = [None] * len(operands)
        grad = grad_output
        if grad_output is not None and not ctx.chain.is_identity:
            needs_saved = needs_input or needs_weight or needs_bias
            grad, *grad_operands = pointwise_backward(
                grad_output, saved, ctx.chain, tuple(operands), (needs_saved, *needs_operands)
            )
        if grad_saved is not None:
            grad = grad_saved if grad is None else grad + grad_saved
        if grad is None:
            return (None,) * 7 + tuple(grad_operands)
        grad_input = InputGradient.apply(grad, weight, ctx.geometry, ctx.precision) if needs_input else None
        grad_weight = WeightGradient.apply(input, grad, ctx.geometry, ctx.precision) if needs_weight else None
        grad_bias = ChannelSum.apply(grad) if needs_bias else None
        return grad_input, grad_weight, grad_bias, None, None, None, None, *grad_operands


class InputGradient(torch.autograd.Function):
    """gx(gy, w)."""

    @staticmethod
    def forward(ctx, grad_output, weight, geometry, precision):
        result = empty_output(geometry.input_shape, grad_output)
        launch_input_gradient(
            to_array(grad_output),
            to_array(weight),
            geometry,
            precision=precision,
            out=to_array(result),
            stream=stream_of(weight),
        )
        ctx.geometry, ctx.precision = geometry, precision
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_output, weight)
        return result

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return None, None, None, None
        grad_output, weight = ctx.saved_tensors
        needs_grad_output, needs_weight, _, _ = ctx.needs_input_grad
        by_grad_output = convolve(grad, weight, ctx.geometry, ctx.precision) if needs_grad_output else None
        by_weight = WeightGradient.apply(grad, grad_output, ctx.geometry, ctx.precision) if needs_weight else None
        return by_grad_output, by_weight, None, None


class WeightGradient(torch.autograd.Function):
    """gw(x, gy)."""

    @staticmethod
    def forward(ctx, input, grad_output, geometry, precision):
        result = torch.empty(geometry.weight_shape, dtype=input.dtype, device=input.device)
        launch_weight_gradient(
            to_array(input),
            to_array(grad_output),
            geometry,
            precision=precision,
            out=to_array(result),
            stream=stream_of(input),
        )
        ctx.geometry, ctx.precision = geometry, precision
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, grad_output)
        return result

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return None, None, None, None
        input, grad_output = ctx.saved_tensors
        needs_input, needs_grad_output, _, _ = ctx.needs_input_grad
        by_input = InputGradient.apply(grad_output, grad, ctx.geometry, ctx.precision) if needs_input else None
        by_grad_output = convolve(input, grad, ctx.geometry, ctx.precision) if needs_grad_output else None
        return by_input, by_grad_output, None, None


class ChannelSum(torch.autograd.Function):
    """Sum over everything but the channels: the bias's gradient."""

    @staticmethod
    def forward(ctx, grad_output):
        ctx.shape = grad_output.shape
        result = torch.empty(grad_output.shape[1], dtype=grad_output.dtype, device=grad_output.device)
        channel_sum(to_array(grad_output), out=to_array(result), stream=stream_of(grad_output))
        return result

    @staticmethod
    def backward(ctx, grad):
        return grad.view(1, -1, 1, 1).expand(ctx.shape)


def convolve(input, weight, geometry, precision):
    """y(x, w) without bias or epilogue."""
    return ConvTranspose2d.apply(input, weight, None, geometry, precision, chain_of(()), False)[0]
