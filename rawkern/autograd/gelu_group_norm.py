"""GELU followed by group normalisation for PyTorch, without storing what lies between."""

import torch

from ..epilogue import GELU
from ..launchers.gelu_group_norm import gelu_group_norm as launch_gelu_group_norm
from ..launchers.gelu_group_norm import gelu_group_norm_backward as launch_gelu_group_norm_backward
from .dlpack import stream_of, to_array
from .gelu import gelu
from .group_norm import GRADIENTS, arranged, check_arguments, empty_gradients, group_norm, statistics_like


def gelu_group_norm(input, num_groups, weight=None, bias=None, eps=1e-5, approximate="none"):
    """group_norm(gelu(input, approximate), num_groups, weight, bias, eps) in two passes over the input.

    Args:
        input: (N, C, *); float64, float32, float16 or bfloat16 (16-bit types are computed in float32), any strides.
        num_groups, weight, bias, eps: as in `rawkern.group_norm`.
        approximate: "none" for the erf form of GELU, "tanh" for its approximation.

    Returns:
        (N, C, *); channels-last if the input is (4 or 5 dimensions), otherwise contiguous.

    Raises:
        As `rawkern.group_norm`; RuntimeError also for an unknown `approximate`.
    """
    GELU(approximate)
    num_groups, eps = check_arguments("gelu_group_norm", input, num_groups, weight, bias, eps)
    return GeluGroupNorm.apply(arranged(input), weight, bias, num_groups, eps, approximate)


class GeluGroupNorm(torch.autograd.Function):
    """gelu_group_norm of an input that is contiguous or channels-last."""

    @staticmethod
    def forward(ctx, input, weight, bias, num_groups, eps, approximate):
        output = torch.empty_like(input)
        mean, rstd = statistics_like(input, num_groups)
        launch_gelu_group_norm(
            to_array(input),
            num_groups,
            to_array(weight),
            to_array(bias),
            eps,
            approximate,
            out=to_array(output),
            mean=to_array(mean),
            rstd=to_array(rstd),
            stream=stream_of(input),
        )
        ctx.arguments = num_groups, eps, approximate
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, bias, mean, rstd)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        if grad_output is None:
            return (None,) * 6
        input, weight, bias, mean, rstd = ctx.saved_tensors
        num_groups, eps, approximate = ctx.arguments
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            compose = lambda x, w, b: group_norm(gelu(x, approximate), num_groups, w, b, eps)  # noqa: E731
            return *composed_gradients(compose, (input, weight, bias), needs, grad_output), None, None, None
        grads = empty_gradients(input, needs)
        launch_gelu_group_norm_backward(
            to_array(arranged(grad_output, input)),
            to_array(input),
            to_array(mean),
            to_array(rstd),
            to_array(weight),
            approximate,
            needs=needs,
            **{name: to_array(grad) for name, grad in zip(GRADIENTS, grads, strict=True)},
            stream=stream_of(input),
        )
        return *grads, None, None, None


def composed_gradients(function, inputs, needs, grad_output):
    """The gradients of `function(*inputs)` that are needed, themselves differentiable; None for the others.

    For backward passes that are to be differentiated: what is fused is computed again in differentiable parts.
    """
    with torch.enable_grad():
        # Views, so that a tensor that is given twice counts twice.
        inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        output = function(*inputs)
    wanted = [tensor for tensor, need in zip(inputs, needs, strict=True) if need]
    grads = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=True))
    return [next(grads) if need else None for need in needs]
