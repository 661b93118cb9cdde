"""Transposed convolution, GELU, group normalisation on arrays.

The convolution's kernel stores its output once and leaves the statistics of gelu(output); one more pass reads the
output, applies GELU and normalises.
"""

from ..epilogue import GELU
from ..runtime import check_out, queue_of
from .chain import chain_of
from .conv_transpose2d import conv_transpose2d, input_gradient, weight_gradient, with_moments
from .gelu_group_norm import gelu_group_norm
from .geometry import Geometry
from .group_norm import group_norm_backward, normalize, statistics
from .group_norm_sizes import Sizes, check_eps, check_layout, layout_of, statistics_arrays
from .repeat import repeatable


@repeatable
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
    out=None,
    saved=None,
    mean=None,
    rstd=None,
    stream=None,
):
    """group_norm(gelu(conv_transpose2d(input, weight, conv_bias, ...)), num_groups, norm_weight, norm_bias, eps).

    Args:
        input: (N, C_in, H, W), or (C_in, H, W), of which torch's composition normalises axis 1, and so does this.
        weight, conv_bias, stride, padding, output_padding, groups, dilation, precision: as in `conv_transpose2d`.
        num_groups, norm_weight, norm_bias, eps: as in `group_norm`, for the C_out channels of the convolution.
        approximate: "none" or "tanh", as in gelu.
        out: array for the result, (N, C_out, H_out, W_out), contiguous or channels-last.
        saved: array like `out` for the convolution's output, which the backward pass needs; without it, `out` serves.
        mean, rstd: float64 arrays (N, num_groups) for the statistics, which the backward pass needs.
        stream: the CUDA stream to launch on (anything with a `ptr`); default CuPy's current one.

    Returns:
        The result; channels-last if the input is.

    Raises:
        RuntimeError, TypeError, ValueError, ZeroDivisionError: as torch for the same mistake.
    """
    chain, eps = chain_of(GELU(approximate)), check_eps(eps)
    if input.ndim == 3:
        convolved = conv_transpose2d(
            input, weight, conv_bias, stride, padding, output_padding, groups, dilation,
            precision=precision, out=saved, stream=stream,
        )  # fmt: skip
        return gelu_group_norm(
            convolved, num_groups, norm_weight, norm_bias, eps, approximate,
            out=out, mean=mean, rstd=rstd, stream=stream,
        )  # fmt: skip
    queue = queue_of(
        stream, input=input, weight=weight, conv_bias=conv_bias, norm_weight=norm_weight, norm_bias=norm_bias
    )
    geometry = Geometry.of(input.shape, weight.shape, stride, padding, output_padding, groups, dilation)
    shapes = [None if array is None else array.shape for array in (norm_weight, norm_bias)]
    sizes = Sizes.of(geometry.output_shape, num_groups, *shapes)
    mean, rstd = statistics_arrays(queue, sizes, mean, rstd)
    for name, array in (("out", out), ("saved", saved)):
        if array is not None:
            check_out(array, geometry.output_shape, input.dtype, queue.device, name)
            check_layout(array, name)
    if out is not None and saved is not None and layout_of(out) != layout_of(saved):
        raise ValueError(f"saved must have the strides of out, {out.strides}, got {saved.strides}")
    convolved, moments = with_moments(
        input, weight, conv_bias, chain, geometry,
        precision=precision, out=out if saved is None else saved, stream=stream,
    )  # fmt: skip
    if out is None:
        out = convolved if saved is None else queue.empty_like(saved)
    statistics(queue, sizes, moments, eps, mean, rstd)
    normalize(queue, sizes, convolved, mean, rstd, norm_weight, norm_bias, chain, out)
    return out


#: The arrays for which `conv_transpose2d_gelu_group_norm_backward` gives gradients, in order.
DIFFERENTIABLE = ("input", "weight", "conv_bias", "norm_weight", "norm_bias")


@repeatable
def conv_transpose2d_gelu_group_norm_backward(
    grad_output,
    input,
    weight,
    saved,
    mean,
    rstd,
    norm_weight,
    geometry,
    approximate="none",
    *,
    needs=(True,) * 5,
    precision=None,
    outs=(None,) * 5,
    stream=None,
):
    """The gradients for input, weight, conv_bias, norm_weight and norm_bias.

    Args:
        grad_output: (N, C_out, H_out, W_out).
        input, weight, norm_weight, approximate, precision: as given to `conv_transpose2d_gelu_group_norm`.
        saved, mean, rstd: what it stored.
        geometry: the convolution's `Geometry`.
        needs: which of the five gradients are wanted; the others are not computed.
        outs: arrays for the results, or None; the last three contiguous.

    Returns:
        The five gradients; None for what is not needed.
    """
    queue = queue_of(stream, grad_output=grad_output, saved=saved)
    grad_bias = None
    if needs[2]:
        grad_bias = outs[2] if outs[2] is not None else queue.empty((geometry.out_channels,), saved.dtype)
    grad_convolved, grad_norm_weight, grad_norm_bias = group_norm_backward(
        grad_output,
        saved,
        mean,
        rstd,
        norm_weight,
        needs=(any(needs[:3]), needs[3], needs[4]),
        grad_weight=outs[3],
        grad_bias=outs[4],
        grad_input_sum=grad_bias,
        stream=stream,
        chain=chain_of(GELU(approximate)),
    )
    options = dict(precision=precision, stream=stream)
    grad_input = grad_weight = None
    if needs[0]:
        grad_input = input_gradient(grad_convolved, weight, geometry, out=outs[0], **options)
    if needs[1]:
        grad_weight = weight_gradient(input, grad_convolved, geometry, out=outs[1], **options)
    return grad_input, grad_weight, grad_bias, grad_norm_weight, grad_norm_bias
