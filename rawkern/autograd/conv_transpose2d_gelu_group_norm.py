"""Transposed convolution, GELU, group normalisation for PyTorch, with the statistics taken inside the convolution."""

import torch

from ..epilogue import GELU
from ..launchers.conv_transpose2d_gelu_group_norm import (
    conv_transpose2d_gelu_group_norm as launch_conv_transpose2d_gelu_group_norm,
)
from ..launchers.conv_transpose2d_gelu_group_norm import (
    conv_transpose2d_gelu_group_norm_backward as launch_conv_transpose2d_gelu_group_norm_backward,
)
from ..launchers.geometry import Geometry
from ..launchers.group_norm_sizes import Sizes, check_eps
from .conv_transpose2d import check_tensors, conv_transpose2d, empty_output
from .dlpack import stream_of, to_array
from .gelu import gelu
from .gelu_group_norm import composed_gradients, gelu_group_norm
from .group_norm import group_norm, statistics_like
from .precision import resolve_precision


def conv_transpose2d_gelu_group_norm(
    input,
    weight,
    conv_bias,
    num_groups,
    norm_weight=None,
    norm_bias=None,
    eps=1e-5,
    stride=1,
    padding=0,
    output_padding=0,
    groups=1,
    dilation=1,
    *,
    approximate="none",
    precision=None,
):
    """group_norm(gelu(conv_transpose2d(input, weight, conv_bias, ...)), num_groups, norm_weight, norm_bias, eps).

    GELU and the statistics of the groups are computed where the convolution's output is produced; that output is
    stored once (and kept for the backward pass), gelu of it never.

    Args:
        input: (N, C_in, H, W); float64, float32, float16 or bfloat16; any strides. Also (C_in, H, W), for which
            torch's functions, composed, normalise axis 1 of the (C_out, H_out, W_out) output, and so does this.
        weight: (C_in, C_out / groups, kH, kW).
        conv_bias: (C_out,) or None.
        num_groups, norm_weight, norm_bias, eps: as in `rawkern.group_norm`.
        stride, padding, output_padding, groups, dilation, precision: as in `rawkern.conv_transpose2d`.
        approximate: "none" for the erf form of GELU, "tanh" for its approximation.

    Returns:
        (N, C_out, H_out, W_out), channels-last if the input is.

    Raises:
        RuntimeError, TypeError, ValueError, ZeroDivisionError: as torch does for the same mistake.
    """
    check_tensors(
        "conv_transpose2d_gelu_group_norm",
        input=input, weight=weight, conv_bias=conv_bias, norm_weight=norm_weight, norm_bias=norm_bias,
    )  # fmt: skip
    GELU(approximate)
    convolution = stride, padding, output_padding, groups, dilation
    if input.dim() == 3:
        convolved = conv_transpose2d(input, weight, conv_bias, *convolution, precision=precision)
        return gelu_group_norm(convolved, num_groups, norm_weight, norm_bias, eps, approximate)
    geometry = Geometry.of(input.shape, weight.shape, *convolution)
    shapes = [None if tensor is None else tensor.shape for tensor in (norm_weight, norm_bias)]
    num_groups = Sizes.of(geometry.output_shape, num_groups, *shapes).num_groups
    arguments = geometry, num_groups, check_eps(eps), approximate, resolve_precision(precision, input)
    keep = torch.is_grad_enabled()  # inside forward it is always off
    return ConvTranspose2dGeluGroupNorm.apply(input, weight, conv_bias, norm_weight, norm_bias, keep, *arguments)


class ConvTranspose2dGeluGroupNorm(torch.autograd.Function):
    """The operation on 4-D input."""

    @staticmethod
    def forward(
        ctx, input, weight, conv_bias, norm_weight, norm_bias, keep, geometry, num_groups, eps, approximate, precision
    ):
        output = empty_output(geometry.output_shape, input)
        saved = torch.empty_like(output) if keep and any(ctx.needs_input_grad) else None
        mean, rstd = statistics_like(output, num_groups)
        launch_conv_transpose2d_gelu_group_norm(
            to_array(input),
            to_array(weight),
            to_array(conv_bias),
            num_groups,
            to_array(norm_weight),
            to_array(norm_bias),
            eps,
            *_convolution(geometry),
            approximate=approximate,
            precision=precision,
            out=to_array(output),
            saved=to_array(saved),
            mean=to_array(mean),
            rstd=to_array(rstd),
            stream=stream_of(input),
        )
        ctx.arguments = geometry, num_groups, eps, approximate, precision
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, conv_bias, norm_weight, norm_bias, saved, mean, rstd)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        if grad_output is None:
            return (None,) * 11
        *inputs, saved, mean, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            grads = composed_gradients(_composition(*ctx.arguments), inputs, needs, grad_output)
        else:
            grads = _gradients(grad_output, inputs, saved, mean, rstd, needs, *ctx.arguments)
        return *grads, None, None, None, None, None, None


def _gradients(grad_output, inputs, saved, mean, rstd, needs, geometry, num_groups, eps, approximate, precision):
    input, weight, _, norm_weight, _ = inputs
    likes = (saved, None, None, None, None)  # the input's gradient is channels-last if the output is
    outs = [
        _empty_gradient(tensor, like) if need else None for tensor, like, need in zip(inputs, likes, needs, strict=True)
    ]
    launch_conv_transpose2d_gelu_group_norm_backward(
        to_array(grad_output),
        to_array(input),
        to_array(weight),
        to_array(saved),
        to_array(mean),
        to_array(rstd),
        to_array(norm_weight),
        geometry,
        approximate,
        needs=needs,
        precision=precision,
        outs=[to_array(out) for out in outs],
        stream=stream_of(input),
    )
    return outs


def _empty_gradient(tensor, like):
    if like is not None:
        return empty_output(tensor.shape, like)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _composition(geometry, num_groups, eps, approximate, precision):
    """The same function in differentiable parts."""

    def function(input, weight, conv_bias, norm_weight, norm_bias):
        convolved = conv_transpose2d(input, weight, conv_bias, *_convolution(geometry), precision=precision)
        return group_norm(gelu(convolved, approximate), num_groups, norm_weight, norm_bias, eps)

    return function


def _convolution(geometry):
    return geometry.stride, geometry.padding, geometry.output_padding, geometry.groups, geometry.dilation
