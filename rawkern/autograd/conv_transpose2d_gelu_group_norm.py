"""Transposed convolution, GELU, group normalisation for PyTorch, with the statistics taken inside the convolution."""

import torch

from ..launchers.chain import chain_from
from ..launchers.conv_transpose2d_gelu_group_norm import (
    conv_transpose2d_gelu_group_norm as launch_conv_transpose2d_gelu_group_norm,
)
from ..launchers.group_norm import group_norm_backward as launch_group_norm_backward
from ..launchers.group_norm_sizes import Sizes, check_eps
from . import autocast
from .conv_transpose2d import (
    CONVOLUTION,
    check_tensors,
    convolution_gradients,
    convolution_of,
    convolution_tangent,
    convolve,
    fold_images,
    geometry_of,
)
from .gelu import signature_of
from .gelu_group_norm import gelu_group_norm
from .group_norm import gradient_arranged, normalised, normalised_tangent
from .operator import Operator, is_transformed, needs_gradient, refused, release_saved
from .pointwise import composed_gradients


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
        (N, C_out, H_out, W_out), channels-last if the input is. Under autocast the convolution runs in autocast's
        dtype, and the result has the dtype that torch's functions, applied one by one, would give it.

    Raises:
        RuntimeError, TypeError, ValueError, ZeroDivisionError: as torch does for the same mistake.
    """
    check_tensors(
        "conv_transpose2d_gelu_group_norm",
        input=input, weight=weight, conv_bias=conv_bias, norm_weight=norm_weight, norm_bias=norm_bias,
    )  # fmt: skip
    signature_of(approximate)  # for its errors
    convolution = convolution_of(stride, padding, output_padding, dilation, groups, precision)
    num_groups, eps = Sizes.check_num_groups(num_groups), check_eps(eps)
    if input.dim() == 3:
        convolved = convolve(input.unsqueeze(0), weight, convolution, conv_bias).squeeze(0)
        return gelu_group_norm(convolved, num_groups, norm_weight, norm_bias, eps, approximate)
    dtype = None
    if autocast.is_on(input):
        input, weight, conv_bias, norm_weight, norm_bias = autocast.lowered(
            input, weight, conv_bias, norm_weight, norm_bias
        )
        dtype = autocast.normalised_dtype(input)
    tensors = input, weight, conv_bias, norm_weight, norm_bias
    static = num_groups, eps, approximate, *convolution
    keeps = needs_gradient(tensors) or is_transformed()
    output = SAVING(tensors, static)[0] if keeps else PLAIN(tensors, static)
    return output if dtype is None else output.to(dtype)


def _shape(tensor):
    return None if tensor is None else tensor.shape


def _geometry(input, weight, norm_weight, norm_bias, num_groups, convolution):
    geometry = geometry_of(input.shape, weight.shape, convolution)
    Sizes.of(geometry.output_shape, num_groups, _shape(norm_weight), _shape(norm_bias))
    return geometry


def _launch(call, tensors, num_groups, eps, approximate, convolution, **outputs):
    input, weight, conv_bias, norm_weight, norm_bias = tensors
    stride, padding, output_padding, dilation, groups, precision = convolution
    call(
        launch_conv_transpose2d_gelu_group_norm,
        input, weight, conv_bias, num_groups, norm_weight, norm_bias, eps,
        stride, padding, output_padding, groups, dilation,
        approximate=approximate, precision=precision, **outputs,
    )  # fmt: skip


def _plain(call, input, weight, conv_bias, norm_weight, norm_bias, num_groups, eps, approximate, *convolution):
    geometry = _geometry(input, weight, norm_weight, norm_bias, num_groups, convolution)
    output = call.empty(geometry.output_shape, input, layout_of=input)
    tensors = input, weight, conv_bias, norm_weight, norm_bias
    _launch(call, tensors, num_groups, eps, approximate, convolution, out=output)
    return output


def _saving(call, input, weight, conv_bias, norm_weight, norm_bias, num_groups, eps, approximate, *convolution):
    """The result, the convolution's output, and mean and rstd in one tensor."""
    geometry = _geometry(input, weight, norm_weight, norm_bias, num_groups, convolution)
    output, saved = (call.empty(geometry.output_shape, input, layout_of=input) for _ in range(2))
    statistics = call.empty((2, geometry.batch, num_groups), input, torch.float64)
    mean, rstd = statistics
    tensors = input, weight, conv_bias, norm_weight, norm_bias
    _launch(
        call, tensors, num_groups, eps, approximate, convolution, out=output, saved=saved, mean=mean, rstd=rstd
    )  # fmt: skip
    return output, saved, statistics


def _setup(ctx, tensors, static, output):
    ctx.static = static
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grads):
    """The forward pass once more: this one kept nothing."""
    if grads[0] is None:
        return [None] * 5
    return composed_gradients(_composition(ctx.static), ctx.saved_tensors, ctx.needs, grads[0])


def _saving_setup(ctx, tensors, static, outputs):
    ctx.static = static
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.save_for_backward(*tensors, *outputs[1:])


def _saving_gradients(ctx, grads):
    if grads[0] is None or not any(ctx.needs):
        return [None] * 5
    input, weight, conv_bias, norm_weight, norm_bias, saved, statistics = ctx.saved_tensors
    if torch.is_grad_enabled():
        tensors = input, weight, conv_bias, norm_weight, norm_bias
        return composed_gradients(_composition(ctx.static), tensors, ctx.needs, grads[0])
    _, _, approximate, *convolution = ctx.static
    needs_input, needs_weight, *needs = ctx.needs
    wanted = any(ctx.needs[:3]), *needs
    tensors = grads[0], saved, norm_weight, statistics
    grad, grad_conv_bias, *norm_grads = EPILOGUE_BACKWARD.gradients(
        wanted, tensors, (signature_of(approximate), wanted)
    )
    del tensors, saved  # as large as what comes now
    release_saved(ctx)
    grad_input, grad_weight, _ = convolution_gradients(
        grad, input, weight, convolution, (needs_input, needs_weight, False)
    )
    return grad_input, grad_weight, grad_conv_bias, *norm_grads


def _epilogue_backward(call, grad_output, convolved, norm_weight, statistics, functions, needs):
    """The gradients of GELU and normalisation for the convolution's output, its bias, norm_weight and norm_bias.

    The bias's is summed where that of the output, without which it is not to be had, is computed.
    """
    channels = convolved.shape[1:2]
    grads = [
        call.empty(shape, convolved, layout_of=layout) if need else None
        for shape, layout, need in zip((convolved.shape, *[channels] * 3), (convolved, *[None] * 3), needs, strict=True)
    ]
    grad_convolved, grad_conv_bias, grad_norm_weight, grad_norm_bias = grads
    call(
        launch_group_norm_backward,
        grad_output, convolved, *statistics, norm_weight, needs=(needs[0], *needs[2:]),
        grad_input=grad_convolved, grad_weight=grad_norm_weight, grad_bias=grad_norm_bias,
        grad_input_sum=grad_conv_bias, chain=chain_from(functions, ()),
    )  # fmt: skip
    return tuple(grad for grad in grads if grad is not None)


def _composition(static):
    """The same function in differentiable parts."""
    num_groups, eps, approximate, *convolution = static

    def function(input, weight, conv_bias, norm_weight, norm_bias):
        convolved = convolve(input, weight, convolution, conv_bias)
        return normalised(convolved, norm_weight, norm_bias, num_groups, eps, signature_of(approximate))

    return function


def _saving_tangent(ctx, tangents):
    input, weight, _, norm_weight, _, saved, statistics = ctx.saved_tensors
    num_groups, eps, approximate, *convolution = ctx.static
    tangent = convolution_tangent(input, weight, convolution, tangents[:3])
    static = num_groups, eps, signature_of(approximate)
    return normalised_tangent(saved, norm_weight, statistics, static, (tangent, *tangents[3:])), None, None


def _saving_batched(batch_size, dims, tensors, static):
    """A batch of inputs is more images; anything else is done one after the other."""
    if any(dim is not None for dim in dims[1:]):
        return None
    outputs = SAVING((fold_images(tensors[0], dims[0]), *tensors[1:]), static)
    places = 0, 0, 1
    pairs = zip(outputs, places, strict=True)
    return tuple(output.unflatten(place, (batch_size, -1)) for output, place in pairs), places


_ARGUMENTS = (
    "Tensor input, Tensor weight, Tensor? conv_bias, Tensor? norm_weight, Tensor? norm_bias, int num_groups, "
    f"float eps, str approximate, {CONVOLUTION}"
)

PLAIN = Operator(
    f"conv_transpose2d_gelu_group_norm({_ARGUMENTS}) -> Tensor", _plain, setup_context=_setup, backward=_gradients
)
SAVING = Operator(
    f"conv_transpose2d_gelu_group_norm_saving({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _saving,
    setup_context=_saving_setup,
    backward=_saving_gradients,
    jvp=_saving_tangent,
    vmap=_saving_batched,
)
EPILOGUE_BACKWARD = Operator(
    "conv_transpose2d_gelu_group_norm_epilogue_backward(Tensor grad_output, Tensor convolved, Tensor? norm_weight, "
    "Tensor statistics, str functions, bool[] needs) -> Tensor[]",
    _epilogue_backward,
    backward=refused("the backward pass of a fused normalisation is not differentiable by itself"),
    arrange=gradient_arranged,
)
