"""Group normalisation for PyTorch, differentiable twice."""

import torch

from ..launchers.chain import chain_from
from ..launchers.group_norm import group_norm as launch_group_norm
from ..launchers.group_norm import group_norm_backward as launch_group_norm_backward
from ..launchers.group_norm import group_norm_double_backward as launch_group_norm_double_backward
from ..launchers.group_norm_sizes import Sizes, check_eps
from . import autocast
from .operator import Operator, is_transformed, refused, spread
from .pointwise import POINTWISE, composed_gradients, pointwise_tangent


def group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    """Group normalisation (Wu and He 2018), as `torch.nn.functional.group_norm`.

    Args:
        input: (N, C, *); float64, float32, float16 or bfloat16 (16-bit types are computed in float32), any strides.
        num_groups: the number of groups, a divisor of C; statistics are over the channels of a group and all of *.
        weight, bias: (C,) or None, of the input's dtype.
        eps: added to the variance.

    Returns:
        (N, C, *); channels-last if the input is (4 or 5 dimensions), otherwise contiguous. Under autocast, float32 on a
        GPU and the input's dtype on a CPU, as in torch.

    Raises:
        RuntimeError, TypeError, ValueError, ZeroDivisionError: as torch does for the same mistake; also RuntimeError
        for mixed dtypes or devices.
    """
    return group_norm_of("group_norm", input, num_groups, weight, bias, eps, "")


def normalised(input, weight, bias, num_groups, eps, chain):
    """`group_norm`, of checked arguments, of a chain of functions, given by its signature, of the input."""
    return GROUP_NORM((input, weight, bias), (num_groups, eps, chain))[0]


def group_norm_of(function, input, num_groups, weight, bias, eps, chain):
    """`group_norm` of a chain of functions, given by its signature, of the input; `function` is named in errors."""
    check_arguments(function, input, weight, bias)
    dtype = None
    if autocast.is_on(input):
        dtype = autocast.normalised_dtype(input)
        input, weight, bias = autocast.raised(input, weight, bias)
    num_groups = num_groups if type(num_groups) is int else Sizes.check_num_groups(num_groups)
    eps = eps if type(eps) is float else check_eps(eps)
    output = normalised(input, weight, bias, num_groups, eps, chain)
    return output if dtype is None else output.to(dtype)


def check_arguments(function, input, weight, bias):
    """Raises TypeError unless input is a tensor and the others are tensors or None."""
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, torch.Tensor) and (name == "input" or tensor is not None):
            raise TypeError(f"{function}(): argument '{name}' must be Tensor, not {type(tensor).__name__}")


def is_channels_last(tensor):
    """Whether the memory is channels-last and not contiguous too."""
    if tensor.dim() not in (4, 5) or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=_CHANNELS_LAST[tensor.dim()])


def arranged(tensor, like=None):
    """The tensor in a layout the kernels know, or in that of `like`: itself if it can be, else a copy.

    Inside a transform of torch.func a tensor has no layout that it could be asked for; there launchers copy.
    """
    if (like is None and tensor.is_contiguous()) or is_transformed():
        return tensor
    if is_channels_last(tensor if like is None else like):
        return tensor.contiguous(memory_format=_CHANNELS_LAST[tensor.dim()])
    return tensor.contiguous()


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _shape(tensor):
    return None if tensor is None else tensor.shape


def _input_arranged(tensors):
    return arranged(tensors[0]), *tensors[1:]


def _group_norm(call, input, weight, bias, num_groups, eps, chain):
    Sizes.of(input.shape, num_groups, _shape(weight), _shape(bias))
    output = call.empty(input.shape, input, layout_of=input)
    statistics = call.empty((2, input.shape[0], num_groups), input, torch.float64)
    mean, rstd = statistics
    chain = chain_from(chain, ())
    call(launch_group_norm, input, num_groups, weight, bias, eps, out=output, mean=mean, rstd=rstd, chain=chain)
    return output, statistics


def _setup(ctx, tensors, static, outputs):
    ctx.static = static
    ctx.mark_non_differentiable(outputs[1])
    ctx.save_for_backward(*tensors, outputs[1])


def _gradients(ctx, grads):
    if grads[0] is None:
        return [None] * 3
    input, weight, bias, statistics = ctx.saved_tensors
    chain = ctx.static[-1]
    if chain and torch.is_grad_enabled():
        # To be differentiated again: what is fused is computed once more in differentiable parts.
        compose = lambda x, w, b: _composed(x, w, b, *ctx.static)  # noqa: E731
        return composed_gradients(compose, (input, weight, bias), ctx.needs, grads[0])
    return group_norm_gradients(grads[0], input, weight, statistics, chain, ctx.needs)


def group_norm_gradients(grad_output, input, weight, statistics, chain, needs):
    """The gradients for input, weight and bias that are needed, None for the others."""
    return GROUP_NORM_BACKWARD.gradients(needs, (grad_output, input, weight, statistics), (chain, tuple(needs)))


def _composed(input, weight, bias, num_groups, eps, chain):
    return GROUP_NORM((POINTWISE((input,), (chain, ())), weight, bias), (num_groups, eps, ""))[0]


def _tangent(ctx, tangents):
    input, weight, _, statistics = ctx.saved_tensors
    return normalised_tangent(input, weight, statistics, ctx.static, tangents), None


def normalised_tangent(input, weight, statistics, static, tangents):
    """The derivative of a normalisation along tangents of input, weight and bias.

    But for the weight, the derivative for the input is symmetric: it is its own adjoint, the backward pass.
    """
    chain = static[-1]
    v, weight_tangent, bias_tangent = tangents
    terms = []
    if v is not None:
        if chain:
            v = pointwise_tangent(input, (), chain, (), (v,))
        value = POINTWISE((input,), (chain, ())) if chain else input
        (term,) = GROUP_NORM_BACKWARD((v, value, None, statistics), ("", (True, False, False)))
        terms.append(term if weight is None else term * _along_channels(weight, input))
    if weight_tangent is not None:
        terms.append(normalised(input, weight_tangent, None, *static))
    if bias_tangent is not None:
        terms.append(_along_channels(bias_tangent, input).expand(input.shape))
    return sum(terms[1:], terms[0])


def _along_channels(vector, input):
    return vector.view(1, -1, *[1] * (input.dim() - 2))


def _batched(batch_size, dims, tensors, static):
    """The batch becomes part of the images, unless weight or bias is batched."""
    if dims[1] is not None or dims[2] is not None:
        return None
    input = tensors[0].movedim(dims[0], 0)
    images = input.shape[1]
    output, statistics = GROUP_NORM((input.flatten(0, 1), *tensors[1:]), static)
    return (output.unflatten(0, (batch_size, images)), statistics.unflatten(1, (batch_size, images))), (0, 1)


def gradient_arranged(tensors):
    """The gradient of the result in the layout of the input, which are the first two."""
    grad_output, input, *others = tensors
    return arranged(grad_output, input), input, *others


def _group_norm_backward(call, grad_output, input, weight, statistics, chain, needs):
    shapes = input.shape, input.shape[1:2], input.shape[1:2]
    layouts = input, None, None
    grads = [
        call.empty(shape, input, layout_of=layout) if need else None
        for shape, layout, need in zip(shapes, layouts, needs, strict=True)
    ]
    mean, rstd = statistics
    call(
        launch_group_norm_backward,
        grad_output, input, mean, rstd, weight, needs=needs, chain=chain_from(chain, ()),
        **dict(zip(("grad_input", "grad_weight", "grad_bias"), grads, strict=True)),
    )  # fmt: skip
    return tuple(grad for grad in grads if grad is not None)


def _backward_setup(ctx, tensors, static, outputs):
    ctx.chain, ctx.wanted = static
    ctx.save_for_backward(*tensors)


def _backward_gradients(ctx, grads):
    """mean and rstd are functions of the input, and count as such here."""
    if ctx.chain:
        raise RuntimeError("the backward pass of a fused normalisation is not differentiable by itself")
    if all(grad is None for grad in grads):
        return [None] * 4
    directions = spread(ctx.wanted, grads)
    return *_second(ctx.saved_tensors, directions, ctx.needs[:3]), None


def _second(tensors, directions, needs):
    """The gradients of group_norm_backward for grad_output, input, weight; None where not needed."""
    grad_output, input, weight, statistics = tensors
    v, *vectors = directions
    v = None if v is None else arranged(v, input)
    tensors = grad_output, input, weight, statistics, v, *vectors
    return GROUP_NORM_DOUBLE_BACKWARD.gradients(needs, tensors, (tuple(needs),))


def _backward_tangent(ctx, tangents):
    """By symmetry of second derivatives, what the tangents of input and weight do is the double backward."""
    if ctx.chain:
        raise NotImplementedError("the backward pass of a fused normalisation has no forward-mode derivative")
    _, input, weight, statistics = ctx.saved_tensors
    tangent, v, weight_tangent, _ = tangents
    parts = []
    if tangent is not None:
        parts.append(group_norm_gradients(tangent, input, weight, statistics, "", ctx.wanted))
    if v is not None or weight_tangent is not None:
        needs = False, ctx.wanted[0], ctx.wanted[1]
        _, by_input, by_weight = _second(ctx.saved_tensors, (v, weight_tangent, None), needs)
        parts.append((by_input, by_weight, input.new_zeros(input.shape[1:2])))
    columns = (terms for terms, need in zip(zip(*parts, strict=True), ctx.wanted, strict=True) if need)
    return tuple(sum(terms[1:], terms[0]) for terms in columns)


def _group_norm_double_backward(call, grad_output, input, weight, statistics, v, u, t, needs):
    models = grad_output, input, weight
    outs = [call.empty(m.shape, m, layout_of=m) if need else None for m, need in zip(models, needs, strict=True)]
    mean, rstd = statistics
    call(
        launch_group_norm_double_backward,
        grad_output, input, mean, rstd, weight,
        grad_grad_input=v, grad_grad_weight=u, grad_grad_bias=t, needs=needs,
        **dict(zip(("out_grad_output", "out_input", "out_weight"), outs, strict=True)),
    )  # fmt: skip
    return tuple(out for out in outs if out is not None)


GROUP_NORM = Operator(
    "group_norm(Tensor input, Tensor? weight, Tensor? bias, int num_groups, float eps, str functions) "
    "-> (Tensor, Tensor)",
    _group_norm,
    setup_context=_setup,
    backward=_gradients,
    jvp=_tangent,
    vmap=_batched,
    arrange=_input_arranged,
)
GROUP_NORM_BACKWARD = Operator(
    "group_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor statistics, str functions, "
    "bool[] needs) -> Tensor[]",
    _group_norm_backward,
    setup_context=_backward_setup,
    backward=_backward_gradients,
    jvp=_backward_tangent,
    arrange=gradient_arranged,
)
GROUP_NORM_DOUBLE_BACKWARD = Operator(
    "group_norm_double_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor statistics, "
    "Tensor? grad_grad_input, Tensor? grad_grad_weight, Tensor? grad_grad_bias, bool[] needs) -> Tensor[]",
    _group_norm_double_backward,
    backward=refused("rawkern.group_norm is differentiable twice, not three times"),
)
