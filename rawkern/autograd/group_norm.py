"""Group normalisation for PyTorch, differentiable twice."""

import torch
from torch.autograd.function import once_differentiable

from ..launchers.group_norm import group_norm as launch_group_norm
from ..launchers.group_norm import group_norm_backward as launch_group_norm_backward
from ..launchers.group_norm import group_norm_double_backward as launch_group_norm_double_backward
from ..launchers.group_norm_sizes import Sizes, check_eps
from .dlpack import stream_of, to_array


def group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    """Group normalisation (Wu and He 2018), as `torch.nn.functional.group_norm`.

    Args:
        input: (N, C, *); float64, float32, float16 or bfloat16 (16-bit types are computed in float32), any strides.
        num_groups: the number of groups, a divisor of C; statistics are over the channels of a group and all of *.
        weight, bias: (C,) or None, of the input's dtype.
        eps: added to the variance.

    Returns:
        (N, C, *); channels-last if the input is (4 or 5 dimensions), otherwise contiguous.

    Raises:
        RuntimeError, TypeError, ValueError, ZeroDivisionError: as torch does for the same mistake; also RuntimeError
        for mixed dtypes or devices.
    """
    num_groups, eps = check_arguments("group_norm", input, num_groups, weight, bias, eps)
    return GroupNorm.apply(arranged(input), weight, bias, num_groups, eps)


def check_arguments(function, input, num_groups, weight, bias, eps):
    """num_groups and eps as an int and a float; raises unless everything is as `group_norm` says."""
    if not isinstance(input, torch.Tensor):
        raise TypeError(f"{function}(): argument 'input' must be Tensor, not {type(input).__name__}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{function}(): argument '{name}' must be Tensor, not {type(tensor).__name__}")
    shapes = [None if tensor is None else tensor.shape for tensor in (weight, bias)]
    return Sizes.of(input.shape, num_groups, *shapes).num_groups, check_eps(eps)


def is_channels_last(tensor):
    """Whether the memory is channels-last and not contiguous too."""
    if tensor.dim() not in (4, 5) or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=_CHANNELS_LAST[tensor.dim()])


def arranged(tensor, like=None):
    """The tensor in a layout the kernels know, or in that of `like`: itself if it can be, else a copy."""
    if is_channels_last(tensor if like is None else like):
        return tensor.contiguous(memory_format=_CHANNELS_LAST[tensor.dim()])
    return tensor.contiguous()


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def statistics_like(tensor, num_groups):
    """New tensors for mean and rstd."""
    return torch.empty((2, tensor.shape[0], num_groups), dtype=torch.float64, device=tensor.device).unbind()


class GroupNorm(torch.autograd.Function):
    """group_norm of an input that is contiguous or channels-last."""

    @staticmethod
    def forward(ctx, input, weight, bias, num_groups, eps):
        output = torch.empty_like(input)
        mean, rstd = statistics_like(input, num_groups)
        launch_group_norm(
            to_array(input),
            num_groups,
            to_array(weight),
            to_array(bias),
            eps,
            out=to_array(output),
            mean=to_array(mean),
            rstd=to_array(rstd),
            stream=stream_of(input),
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, mean, rstd)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        if grad_output is None:
            return (None,) * 5
        input, weight, mean, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        grads = GroupNormBackward.apply(arranged(grad_output, input), input, weight, mean, rstd, needs)
        return *grads, None, None


class GroupNormBackward(torch.autograd.Function):
    """The gradients for input, weight and bias as a function of grad_output, input and weight.

    mean and rstd are functions of the input, and count as such where this is differentiated.
    """

    @staticmethod
    def forward(ctx, grad_output, input, weight, mean, rstd, needs):
        grads = empty_gradients(input, needs)
        launch_group_norm_backward(
            to_array(grad_output),
            to_array(input),
            to_array(mean),
            to_array(rstd),
            to_array(weight),
            needs=needs,
            **{name: to_array(grad) for name, grad in zip(GRADIENTS, grads, strict=True)},
            stream=stream_of(input),
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_output, input, weight, mean, rstd)
        return grads

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_grad_input, grad_grad_weight, grad_grad_bias):
        if grad_grad_input is None and grad_grad_weight is None and grad_grad_bias is None:
            return (None,) * 6
        grad_output, input, weight, mean, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        results = [
            torch.empty_like(tensor) if need else None
            for tensor, need in zip((grad_output, input, weight), needs, strict=True)
        ]
        if grad_grad_input is not None:
            grad_grad_input = arranged(grad_grad_input, input)
        launch_group_norm_double_backward(
            to_array(grad_output),
            to_array(input),
            to_array(mean),
            to_array(rstd),
            to_array(weight),
            grad_grad_input=to_array(grad_grad_input),
            grad_grad_weight=to_array(grad_grad_weight),
            grad_grad_bias=to_array(grad_grad_bias),
            needs=needs,
            out_grad_output=to_array(results[0]),
            out_input=to_array(results[1]),
            out_weight=to_array(results[2]),
            stream=stream_of(input),
        )
        return *results, None, None, None


GRADIENTS = ("grad_input", "grad_weight", "grad_bias")


def empty_gradients(input, needs):
    """New tensors for the gradients of input, weight and bias; None for what is not needed."""
    vector = lambda: torch.empty(input.shape[1], dtype=input.dtype, device=input.device)  # noqa: E731
    makers = (lambda: torch.empty_like(input), vector, vector)
    return tuple(make() if need else None for make, need in zip(makers, needs, strict=True))
