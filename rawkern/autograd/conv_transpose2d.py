"""Transposed convolution for PyTorch: three bilinear maps, each differentiated by means of the other two.

`y(x, w)` is bilinear; its input gradient `gx(gy, w)` and its weight gradient `gw(x, gy)` are bilinear again, so that
    d y  = y(dx, w) + y(x, dw)        d gx = gx(dgy, w) + gx(gy, dw)        d gw = gw(dx, gy) + gw(x, dgy)
and the adjoints of all of these are the same three maps. Derivatives of every order follow.

What describes a convolution beside its tensors goes through all of this as one tuple, (stride, padding, output_padding,
dilation, groups, precision), the last arguments of every operator here.
"""

import torch

from ..launchers.chain import chain_from, functions_of, parts_of
from ..launchers.channel_sum import channel_sum
from ..launchers.conv_transpose2d import conv_transpose2d as launch_conv_transpose2d
from ..launchers.conv_transpose2d import input_gradient as launch_input_gradient
from ..launchers.conv_transpose2d import weight_gradient as launch_weight_gradient
from ..launchers.geometry import Geometry, check_groups, pair
from . import autocast
from .operator import Operator, is_transformed, needs_gradient, refused, release_saved
from .pointwise import POINTWISE, check_chain, composed_gradients, pointwise_backward, pointwise_tangent
from .precision import check_precision


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
        precision: how float32 values are multiplied: "ieee", with the accuracy of float32 multiply-adds (the README's
            section on precision has the corners), "tf32", or None for what torch allows its own convolutions on the
            tensor's device.

    Returns:
        (N, C_out, H_out, W_out), channels-last if the input is. Under autocast the convolution runs in autocast's
        dtype, and the result has the dtype that torch's functions, applied one by one, would give it.

    Raises:
        RuntimeError, TypeError, ValueError: as torch does for the same mistake.
    """
    check_tensors("conv_transpose2d", input=input, weight=weight, bias=bias)
    signature, numbers, operands = parts_of(functions_of(epilogue)) if epilogue else ("", (), ())
    convolution = convolution_of(stride, padding, output_padding, dilation, groups, precision)
    if operands:
        check_chain(input, operands)
    if input.dim() != 3:
        return _convolved(input, weight, bias, operands, signature, numbers, convolution)
    if any(operand.dim() > 3 for operand in operands):
        raise RuntimeError("tensors of an epilogue have at most 3 dimensions where the input is unbatched")
    return _convolved(input.unsqueeze(0), weight, bias, operands, signature, numbers, convolution).squeeze(0)


def _convolved(input, weight, bias, operands, signature, numbers, convolution):
    dtype = None
    if autocast.is_on(input):
        input, weight, bias, *lowered = autocast.lowered(input, weight, bias, *operands)
        dtype = autocast.chain_dtype(input.dtype, input.device.type, signature, operands)
        operands = lowered
    tensors, static = (input, weight, bias, *operands), (signature, numbers, *convolution)
    if signature and (is_transformed() or needs_gradient(tensors)):
        output = CONV_TRANSPOSE2D_SAVING(tensors, static)[0]
    else:
        output = CONV_TRANSPOSE2D(tensors, static)
    return output if dtype is None else output.to(dtype)


def convolution_of(stride, padding, output_padding, dilation, groups, precision):
    """The tuple that describes a convolution. Raises as torch for what are no ints, ValueError for the precision."""
    return (
        (stride, stride) if type(stride) is int else pair(stride, "stride"),
        (padding, padding) if type(padding) is int else pair(padding, "padding"),
        (output_padding, output_padding) if type(output_padding) is int else pair(output_padding, "output_padding"),
        (dilation, dilation) if type(dilation) is int else pair(dilation, "dilation"),
        groups if type(groups) is int else check_groups(groups),
        None if precision is None else check_precision(precision),
    )


def check_tensors(function, **tensors):
    """Raises TypeError unless every argument is a tensor; only what torch's signature allows may be None."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            optional = name.endswith("bias") or name.startswith("norm_")
            if not optional or tensor is not None:
                raise TypeError(f"{function}(): argument '{name}' must be Tensor, not {type(tensor).__name__}")


def geometry_of(input_shape, weight_shape, convolution):
    stride, padding, output_padding, dilation, groups, _ = convolution
    return Geometry.of(input_shape, weight_shape, stride, padding, output_padding, groups, dilation)


def _launch(call, out, saved, input, weight, bias, operands, signature, numbers, convolution):
    stride, padding, output_padding, dilation, groups, precision = convolution
    call(
        launch_conv_transpose2d,
        input, weight, bias, stride, padding, output_padding, groups, dilation,
        epilogue=chain_from(signature, numbers), operands=operands, precision=precision, out=out, saved=saved,
    )  # fmt: skip


def _conv_transpose2d(call, input, weight, bias, operands, signature, numbers, *convolution):
    geometry = geometry_of(input.shape, weight.shape, convolution)
    output = call.empty(geometry.output_shape, input, layout_of=input)
    _launch(call, output, None, input, weight, bias, operands, signature, numbers, convolution)
    return output


def _conv_transpose2d_saving(call, input, weight, bias, operands, signature, numbers, *convolution):
    """(y, u): u the convolution with its bias, y the chain applied to it.

    u, as an output and not a saved intermediate, is part of the graph, which is what makes derivatives of higher order
    come out right.
    """
    geometry = geometry_of(input.shape, weight.shape, convolution)
    output, saved = (call.empty(geometry.output_shape, input, layout_of=input) for _ in range(2))
    _launch(call, output, saved, input, weight, bias, operands, signature, numbers, convolution)
    return output, saved


def convolve(input, weight, convolution, bias=None):
    """y(x, w), with a bias or not, without epilogue."""
    return CONV_TRANSPOSE2D((input, weight, bias), ("", (), *convolution))


def convolution_gradients(grad, input, weight, convolution, needs):
    """The gradients for input, weight and bias from that of the convolution; None where not needed."""
    if not torch.is_grad_enabled():  # nobody will differentiate them: all at once takes less time on the host
        return BACKWARD.gradients(needs, (grad, input, weight), (tuple(needs), *convolution))
    needs_input, needs_weight, needs_bias = needs
    grad_input = grad_weight = grad_bias = None
    if needs_input:
        grad_input = INPUT_GRADIENT((grad, weight), (tuple(input.shape[2:]), *convolution))
    if needs_weight:
        grad_weight = WEIGHT_GRADIENT((input, grad), (tuple(weight.shape[2:]), *convolution))
    if needs_bias:
        grad_bias = CHANNEL_SUM((grad,))
    return grad_input, grad_weight, grad_bias


def convolution_tangent(input, weight, convolution, tangents):
    """The derivative of the convolution along tangents of input, weight and bias; None if all of these are None."""
    v, weight_tangent, bias_tangent = tangents
    if weight_tangent is not None:
        result = convolve(input, weight_tangent, convolution, bias_tangent)
        return result if v is None else result + convolve(v, weight, convolution)
    if v is not None:
        return convolve(v, weight, convolution, bias_tangent)
    if bias_tangent is None:
        return None
    shape = geometry_of(input.shape, weight.shape, convolution).output_shape
    return bias_tangent.view(1, -1, 1, 1).expand(shape)


def _setup(ctx, tensors, static, output):
    ctx.signature, ctx.numbers, *ctx.convolution = static
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grads):
    (grad,) = grads
    input, weight, bias, *operands = ctx.saved_tensors
    if grad is None:
        return [None] * len(ctx.needs)
    if not ctx.signature:
        return convolution_gradients(grad, input, weight, ctx.convolution, ctx.needs)

    def compose(input, weight, bias, *operands):
        convolved = convolve(input, weight, ctx.convolution, bias)
        return POINTWISE((convolved, *operands), (ctx.signature, ctx.numbers))

    return composed_gradients(compose, (input, weight, bias, *operands), ctx.needs, grad)


def _tangent(ctx, tangents):
    input, weight, bias, *operands = ctx.saved_tensors
    tangent = convolution_tangent(input, weight, ctx.convolution, tangents[:3])
    if not ctx.signature:
        return tangent
    convolved = convolve(input, weight, ctx.convolution, bias)
    return pointwise_tangent(convolved, operands, ctx.signature, ctx.numbers, (tangent, *tangents[3:]))


def _saving_setup(ctx, tensors, static, outputs):
    ctx.signature, ctx.numbers, *ctx.convolution = static
    input, weight, _, *operands = tensors
    ctx.save_for_backward(input, weight, outputs[1], *operands)


def _saving_gradients(ctx, grads):
    grad_output, grad = grads
    input, weight, saved, *operands = ctx.saved_tensors
    needs, needs_operands = ctx.needs[:3], ctx.needs[3:]
    grad_operands = [None] * len(operands)
    if grad_output is not None:
        wanted = any(needs), *needs_operands
        through, *grad_operands = pointwise_backward(
            grad_output, saved, operands, ctx.signature, ctx.numbers, wanted
        )  # fmt: skip
        grad = through if grad is None else grad if through is None else grad + through
    del saved  # as large as what comes now
    release_saved(ctx)
    if grad is None:
        return *[None] * 3, *grad_operands
    return *convolution_gradients(grad, input, weight, ctx.convolution, needs), *grad_operands


def _saving_tangent(ctx, tangents):
    input, weight, saved, *operands = ctx.saved_tensors
    tangent = convolution_tangent(input, weight, ctx.convolution, tangents[:3])
    result = pointwise_tangent(saved, operands, ctx.signature, ctx.numbers, (tangent, *tangents[3:]))
    return result, torch.zeros_like(saved) if tangent is None else tangent


def fold_images(tensor, dim):
    """A batch of images as more images."""
    return tensor.movedim(dim, 0).flatten(0, 1)


def _fold_channels(batch_size, tensor, dim, axis):
    """A batch of tensors as one with more channels along `axis`; what is not batched is repeated."""
    batched = tensor.expand(batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return batched.movedim(0, axis).flatten(axis, axis + 1)


def _more_groups(batch_size, convolution):
    *others, groups, precision = convolution
    return *others, groups * batch_size, precision


def _batched(operator, batch_size, dims, tensors, static):
    """A batch of inputs is more images; a batch of weights is more groups. Batched operands of the chain: a loop."""
    (input, weight, bias, *operands), (dim, weight_dim, bias_dim, *others) = tensors, dims
    if any(other is not None for other in others):
        return None
    if weight_dim is None and bias_dim is None:
        outputs = operator((fold_images(input, dim), *tensors[1:]), static)
        place, size = 0, input.movedim(dim, 0).shape[1]
    elif operands:
        return None
    else:
        input, weight = _fold_channels(batch_size, input, dim, 1), _fold_channels(batch_size, weight, weight_dim, 0)
        bias = None if bias is None else _fold_channels(batch_size, bias, bias_dim, 0)
        outputs = operator((input, weight, bias), (*static[:2], *_more_groups(batch_size, static[2:])))
        place, size = 1, -1
    if isinstance(outputs, torch.Tensor):
        return outputs.unflatten(place, (batch_size, size)), place
    return tuple(output.unflatten(place, (batch_size, size)) for output in outputs), (place,) * len(outputs)


def _conv_batched(*arguments):
    return _batched(CONV_TRANSPOSE2D, *arguments)


def _saving_batched(*arguments):
    return _batched(CONV_TRANSPOSE2D_SAVING, *arguments)


def _input_gradient(call, grad_output, weight, input_size, *convolution):
    """gx(gy, w)."""
    geometry = geometry_of((grad_output.shape[0], weight.shape[0], *input_size), weight.shape, convolution)
    result = call.empty(geometry.input_shape, grad_output, layout_of=grad_output)
    call(launch_input_gradient, grad_output, weight, geometry, precision=convolution[-1], out=result)
    return result


def _bilinear_setup(ctx, tensors, static, output):
    ctx.size, *ctx.convolution = static
    ctx.save_for_backward(*tensors)


def _input_gradient_gradients(ctx, grads):
    if grads[0] is None:
        return None, None
    grad_output, weight = ctx.saved_tensors
    by_grad_output = by_weight = None
    if ctx.needs[0]:
        by_grad_output = convolve(grads[0], weight, ctx.convolution)
    if ctx.needs[1]:
        by_weight = WEIGHT_GRADIENT((grads[0], grad_output), (tuple(weight.shape[2:]), *ctx.convolution))
    return by_grad_output, by_weight


def _bilinear_tangent(operator, ctx, tangents):
    first, second = ctx.saved_tensors
    static = ctx.size, *ctx.convolution
    terms = []
    if tangents[0] is not None:
        terms.append(operator((tangents[0], second), static))
    if tangents[1] is not None:
        terms.append(operator((first, tangents[1]), static))
    return sum(terms[1:], terms[0])


def _input_gradient_tangent(ctx, tangents):
    return _bilinear_tangent(INPUT_GRADIENT, ctx, tangents)


def _input_gradient_batched(batch_size, dims, tensors, static):
    grad_output, weight = tensors
    if dims[1] is None:
        images = grad_output.movedim(dims[0], 0).shape[1]
        result = INPUT_GRADIENT((fold_images(grad_output, dims[0]), weight), static)
        return result.unflatten(0, (batch_size, images)), 0
    folded = _fold_channels(batch_size, grad_output, dims[0], 1), _fold_channels(batch_size, weight, dims[1], 0)
    result = INPUT_GRADIENT(folded, (static[0], *_more_groups(batch_size, static[1:])))
    return result.unflatten(1, (batch_size, -1)), 1


def _weight_gradient(call, input, grad_output, kernel_size, *convolution):
    """gw(x, gy)."""
    groups = convolution[-2]
    weight_shape = input.shape[1], grad_output.shape[1] // groups, *kernel_size
    geometry = geometry_of(input.shape, weight_shape, convolution)
    result = call.empty(geometry.weight_shape, input)
    call(launch_weight_gradient, input, grad_output, geometry, precision=convolution[-1], out=result)
    return result


def _weight_gradient_gradients(ctx, grads):
    if grads[0] is None:
        return None, None
    input, grad_output = ctx.saved_tensors
    by_input = by_grad_output = None
    if ctx.needs[0]:
        by_input = INPUT_GRADIENT((grad_output, grads[0]), (tuple(input.shape[2:]), *ctx.convolution))
    if ctx.needs[1]:
        by_grad_output = convolve(input, grads[0], ctx.convolution)
    return by_input, by_grad_output


def _weight_gradient_tangent(ctx, tangents):
    return _bilinear_tangent(WEIGHT_GRADIENT, ctx, tangents)


def _weight_gradient_batched(batch_size, dims, tensors, static):
    folded = [_fold_channels(batch_size, tensor, dim, 1) for tensor, dim in zip(tensors, dims, strict=True)]
    result = WEIGHT_GRADIENT(folded, (static[0], *_more_groups(batch_size, static[1:])))
    return result.unflatten(0, (batch_size, -1)), 0


def _channel_sum(call, input):
    """Sum over everything but the channels: the bias's gradient."""
    result = call.empty(input.shape[1:2], input)
    call(channel_sum, input, out=result)
    return result


def _channel_sum_setup(ctx, tensors, static, output):
    ctx.shape = tensors[0].shape


def _channel_sum_gradient(ctx, grads):
    return (None if grads[0] is None else grads[0].view(1, -1, 1, 1).expand(ctx.shape),)


def _channel_sum_tangent(ctx, tangents):
    return CHANNEL_SUM(tangents)


def _channel_sum_batched(batch_size, dims, tensors, static):
    folded = _fold_channels(batch_size, tensors[0], dims[0], 1)
    return CHANNEL_SUM((folded,)).unflatten(0, (batch_size, -1)), 0


def _backward(call, grad_output, input, weight, needs, *convolution):
    """The gradients for input, weight and bias that are needed."""
    grads = []
    if needs[0]:
        grads.append(_input_gradient(call, grad_output, weight, tuple(input.shape[2:]), *convolution))
    if needs[1]:
        grads.append(_weight_gradient(call, input, grad_output, tuple(weight.shape[2:]), *convolution))
    if needs[2]:
        grads.append(_channel_sum(call, grad_output))
    return tuple(grads)


#: How a convolution is written in the schemas of operators.
CONVOLUTION = (
    "SymInt[] stride, SymInt[] padding, SymInt[] output_padding, SymInt[] dilation, int groups, str? precision"
)
_ARGUMENTS = (
    f"Tensor input, Tensor weight, Tensor? bias, Tensor[] operands, str functions, float[] numbers, {CONVOLUTION}"
)

CONV_TRANSPOSE2D = Operator(
    f"conv_transpose2d({_ARGUMENTS}) -> Tensor",
    _conv_transpose2d,
    setup_context=_setup,
    backward=_gradients,
    jvp=_tangent,
    vmap=_conv_batched,
)
CONV_TRANSPOSE2D_SAVING = Operator(
    f"conv_transpose2d_saving({_ARGUMENTS}) -> (Tensor, Tensor)",
    _conv_transpose2d_saving,
    setup_context=_saving_setup,
    backward=_saving_gradients,
    jvp=_saving_tangent,
    vmap=_saving_batched,
)
INPUT_GRADIENT = Operator(
    f"conv_transpose2d_input_gradient(Tensor grad_output, Tensor weight, SymInt[] input_size, {CONVOLUTION}) -> Tensor",
    _input_gradient,
    setup_context=_bilinear_setup,
    backward=_input_gradient_gradients,
    jvp=_input_gradient_tangent,
    vmap=_input_gradient_batched,
)
WEIGHT_GRADIENT = Operator(
    f"conv_transpose2d_weight_gradient(Tensor input, Tensor grad_output, SymInt[] kernel_size, {CONVOLUTION}) "
    "-> Tensor",
    _weight_gradient,
    setup_context=_bilinear_setup,
    backward=_weight_gradient_gradients,
    jvp=_weight_gradient_tangent,
    vmap=_weight_gradient_batched,
)
BACKWARD = Operator(
    f"conv_transpose2d_backward(Tensor grad_output, Tensor input, Tensor weight, bool[] needs, {CONVOLUTION}) "
    "-> Tensor[]",
    _backward,
    backward=refused("all gradients of a convolution at once are not differentiable, each of them is"),
)
CHANNEL_SUM = Operator(
    "channel_sum(Tensor input) -> Tensor",
    _channel_sum,
    setup_context=_channel_sum_setup,
    backward=_channel_sum_gradient,
    jvp=_channel_sum_tangent,
    vmap=_channel_sum_batched,
)
