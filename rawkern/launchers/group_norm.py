"""Group normalisation on arrays (NumPy on the CPU, CuPy on a GPU): forward, backward and twice backward.

Everything here works on an optional chain of pointwise functions without operands that is applied to the input first;
`gelu_group_norm` and the convolution that ends in a normalisation are made of the same parts.
"""

import numpy as np

from ..runtime import check_out, pointer, queue_of
from .chain import IDENTITY
from .channel_sum import channel_sum
from .group_norm_held import HeldPlan, gradients_held, normalize_held
from .group_norm_kernels import (
    THREADS,
    RowPlan,
    channel_gradients,
    channel_width,
    grad_input_kernel,
    group_means_kernel,
    groups_of,
    normalize_kernel,
    row_moments_kernel,
    row_sums_kernel,
    second_channel_gradients_kernel,
    second_gradients_kernel,
    second_row_sums_kernel,
    statistics_kernel,
    team_of,
)
from .group_norm_sizes import (
    FLOAT64,
    Sizes,
    arranged,
    arranged_with,
    channel_vector,
    check_eps,
    check_gradient,
    empty,
    is_channels_last,
    layout_of,
    shapes_of,
    statistics_arrays,
)
from .layout import contiguous
from .repeat import repeatable


@repeatable
def group_norm(
    input, num_groups, weight=None, bias=None, eps=1e-5, *, out=None, mean=None, rstd=None, stream=None, chain=IDENTITY
):
    """Group normalisation: (x - mean) / sqrt(variance + eps) * weight + bias, statistics over the channels of a group.

    Args:
        input: (N, C, *), any strides. float64, float32, float16 or bfloat16; 16-bit types are computed in float32.
        num_groups: the number of groups, a divisor of C.
        weight, bias: (C,) or None, of the input's dtype.
        eps: added to the variance.
        out: array for the result, contiguous or channels-last.
        mean, rstd: float64 arrays (N, num_groups) for the statistics, which the backward pass needs.
        stream: the CUDA stream to launch on (anything with a `ptr`); default CuPy's current one.
        chain: pointwise functions without operands, applied to the input before it is normalised.

    Returns:
        The result, of the input's shape; channels-last if the input is (4 or 5 dimensions), otherwise contiguous.

    Raises:
        RuntimeError, TypeError, ValueError, ZeroDivisionError: as torch for the same mistake; see Sizes.of.
    """
    queue = queue_of(stream, input=input, weight=weight, bias=bias)
    sizes = Sizes.of(input.shape, num_groups, *shapes_of(weight, bias))
    eps = check_eps(eps)
    mean, rstd = statistics_arrays(queue, sizes, mean, rstd)
    input, out = arranged_with(queue, input, out)
    held = HeldPlan.of(sizes, input, out)
    if held is not None:
        normalize_held(queue, held, input, mean, rstd, weight, bias, eps, chain, out)
        return out
    moments = row_moments(queue, sizes, input, chain)
    statistics(queue, sizes, moments, eps, mean, rstd)
    normalize(queue, sizes, input, mean, rstd, weight, bias, chain, out)
    return out


@repeatable
def group_norm_backward(
    grad_output,
    input,
    mean,
    rstd,
    weight=None,
    *,
    needs=(True, True, True),
    grad_input=None,
    grad_weight=None,
    grad_bias=None,
    grad_input_sum=None,
    stream=None,
    chain=IDENTITY,
):
    """The gradients of `group_norm` for input, weight and bias.

    Args:
        grad_output: gradient of the result, of the input's shape and dtype.
        input, weight, chain: as given to `group_norm`.
        mean, rstd: the statistics from there, float64, (N, num_groups).
        needs: which of the three gradients are wanted; the others are not computed.
        grad_input, grad_weight, grad_bias: arrays for the results; contiguous, but for grad_input.
        grad_input_sum: contiguous array (C,) for the sums of grad_input over all but the channels, the gradient of a
            bias that was added to the input; None if they are not wanted. grad_input must be.

    Returns:
        grad_input (of the layout of `input`), grad_weight, grad_bias; None for what is not needed.
    """
    queue = queue_of(stream, grad_output=grad_output, input=input, weight=weight)
    sizes = Sizes.of(input.shape, mean.shape[1], *shapes_of(weight))
    check_gradient(queue, sizes, grad_output, input, mean, rstd)
    input, grad_input = arranged_with(queue, input, grad_input, wanted=needs[0])
    grad_weight, grad_bias = (
        channel_vector(queue, sizes, array, input.dtype, name) if need else None
        for need, array, name in zip(needs[1:], (grad_weight, grad_bias), ("grad_weight", "grad_bias"), strict=True)
    )
    if grad_input_sum is not None:
        if not needs[0]:
            raise ValueError("grad_input_sum needs grad_input: needs[0] is false")
        channel_vector(queue, sizes, grad_input_sum, input.dtype, "grad_input_sum")
    grad_output = arranged(queue, grad_output, is_channels_last(input))
    weight = contiguous(queue, weight)
    held = HeldPlan.of(sizes, input, grad_output, grad_input)
    if held is not None:
        if any(needs):
            grads = grad_input, grad_weight, grad_bias
            gradients_held(queue, sizes, held, grad_output, input, mean, rstd, weight, chain, *grads)
        if grad_input_sum is not None:
            channel_sum(grad_input, out=grad_input_sum, stream=stream)
        return grad_input, grad_weight, grad_bias
    common = dict(grad_output=pointer(grad_output), input=pointer(input), mean=pointer(mean), rstd=pointer(rstd))
    common |= dict(groups=groups_of(sizes), chain=chain.pack())
    rows = RowPlan.of(sizes, input, grad_output)
    sums = queue.empty((sizes.batch * sizes.channels, rows.slots, 2), FLOAT64)
    if not sizes.is_empty:
        row_sums_kernel(input.dtype, chain).launch(queue, rows.blocks, sums=pointer(sums), rows=rows.fields, **common)
    if needs[1] or needs[2]:
        _channel_gradients(queue, sizes, rows, sums, grad_weight, grad_bias, input.dtype)
    if needs[0] and not sizes.is_empty:
        means = _group_means(queue, sizes, rows, sums, weight, None, input.dtype, 2)
        rows = RowPlan.of(sizes, input, grad_output, grad_input)
        input_sums = None if grad_input_sum is None else queue.empty(sums.shape, FLOAT64)
        grad_input_kernel(input.dtype, chain).launch(
            queue,
            rows.blocks,
            grad_input=pointer(grad_input),
            weight=pointer(weight),
            means=pointer(means),
            sums=pointer(input_sums),
            rows=rows.fields,
            **common,
        )
        if grad_input_sum is not None:
            _channel_gradients(queue, sizes, rows, input_sums, None, grad_input_sum, input.dtype)
    elif grad_input_sum is not None:
        channel_sum(grad_input, out=grad_input_sum, stream=stream)
    return grad_input, grad_weight, grad_bias


@repeatable
def group_norm_double_backward(
    grad_output,
    input,
    mean,
    rstd,
    weight=None,
    *,
    grad_grad_input=None,
    grad_grad_weight=None,
    grad_grad_bias=None,
    needs=(True, True, True),
    out_grad_output=None,
    out_input=None,
    out_weight=None,
    stream=None,
):
    """The gradients of `group_norm_backward` (with the identity as chain) for grad_output, input and weight.

    Args:
        grad_grad_input, grad_grad_weight, grad_grad_bias: gradients of its three results; None stands for zeros.
        needs: which of the three gradients are wanted.
        out_grad_output, out_input, out_weight: arrays for the results.

    Returns:
        The gradients for grad_output and input (of the layout of `input`) and weight; None for what is not needed.
    """
    u, t = grad_grad_weight, grad_grad_bias
    queue = queue_of(
        stream, grad_output=grad_output, input=input, weight=weight,
        grad_grad_input=grad_grad_input, grad_grad_weight=u, grad_grad_bias=t,
    )  # fmt: skip
    sizes = Sizes.of(input.shape, mean.shape[1], *shapes_of(weight))
    check_gradient(queue, sizes, grad_output, input, mean, rstd)
    input, out_grad_output = arranged_with(queue, input, out_grad_output, wanted=needs[0])
    channels_last = is_channels_last(input)
    if needs[1]:
        out_input = empty(queue, input.shape, input.dtype, channels_last) if out_input is None else out_input
        check_out(out_input, input.shape, input.dtype, queue.device, "out_input")
        if layout_of(out_input) != layout_of(input):
            raise ValueError(f"out_input must have the strides {input.strides}, got {out_input.strides}")
    else:
        out_input = None
    out_weight = channel_vector(queue, sizes, out_weight, input.dtype, "out_weight") if needs[2] else None
    grad_output, v = (arranged(queue, array, channels_last) for array in (grad_output, grad_grad_input))
    weight, u, t = (contiguous(queue, array) for array in (weight, u, t))
    dtype = input.dtype
    rows = RowPlan.of(sizes, input, grad_output, v, out_grad_output, out_input)
    if sizes.is_empty:
        if out_weight is not None:
            sums = queue.empty((sizes.batch * sizes.channels, rows.slots, 2), FLOAT64)
            _channel_gradients(queue, sizes, rows, sums, out_weight, None, dtype)
        return out_grad_output, out_input, out_weight
    common = dict(
        grad_output=pointer(grad_output),
        input=pointer(input),
        v=pointer(v),
        mean=pointer(mean),
        rstd=pointer(rstd),
        rows=rows.fields,
        groups=groups_of(sizes),
    )
    sums = queue.empty((sizes.batch * sizes.channels, rows.slots, 5), FLOAT64)
    second_row_sums_kernel(dtype).launch(queue, rows.blocks, sums=pointer(sums), **common)
    means = _group_means(queue, sizes, rows, sums, weight, u, dtype, 5)
    if needs[2]:
        width = channel_width(sizes.channels, rows.slots)
        second_channel_gradients_kernel(dtype).launch(
            queue,
            -(-sizes.channels // width),
            sums=pointer(sums),
            means=pointer(means),
            rstd=pointer(rstd),
            grad_weight=pointer(out_weight),
            groups=groups_of(sizes),
            images=sizes.batch,
            channels=sizes.channels,
            slots=rows.slots,
            width=width,
        )
    if needs[0] or needs[1]:
        second_gradients_kernel(dtype).launch(
            queue,
            rows.blocks,
            grad_grad_output=pointer(out_grad_output),
            grad_input=pointer(out_input),
            weight=pointer(weight),
            u=pointer(u),
            t=pointer(t),
            means=pointer(means),
            **common,
        )
    return out_grad_output, out_input, out_weight


def row_moments(queue, sizes, input, chain):
    """Partial moments of chain(input), float64, (rows, slots, 3); `input` is contiguous or channels-last.

    A row is a channel of an image, or in contiguous memory a whole group, which is one piece there.
    """
    if not is_channels_last(input):
        sizes = Sizes(sizes.batch, sizes.num_groups, sizes.group_size, sizes.num_groups)
    rows = RowPlan.of(sizes, input)
    moments = queue.empty((sizes.batch * sizes.channels, rows.slots, 3), FLOAT64)
    if not sizes.is_empty:
        row_moments_kernel(input.dtype, chain).launch(
            queue,
            rows.blocks,
            input=pointer(input),
            moments=pointer(moments),
            rows=rows.fields,
            chain=chain.pack(),
        )
    return moments


def statistics(queue, sizes, moments, eps, mean, rstd):
    """Fills mean and rstd (N, num_groups) from partial moments (rows, slots, 3), the rows group after group."""
    count = sizes.batch * sizes.num_groups
    if sizes.is_empty or count == 0:
        return
    entries = moments.shape[0] * moments.shape[1] // count
    team = team_of(entries)
    statistics_kernel().launch(
        queue,
        -(-count * team // THREADS),
        moments=pointer(moments),
        mean=pointer(mean),
        rstd=pointer(rstd),
        count=count,
        entries=entries,
        eps=eps,
        team=team,
    )


def normalize(queue, sizes, input, mean, rstd, weight, bias, chain, out):
    """out = (chain(input) - mean) * rstd * weight + bias; input and out both contiguous or both channels-last."""
    if sizes.is_empty:
        return
    weight, bias = contiguous(queue, weight), contiguous(queue, bias)
    rows = RowPlan.of(sizes, input, out)
    normalize_kernel(input.dtype, chain).launch(
        queue,
        rows.blocks,
        input=pointer(input),
        output=pointer(out),
        mean=pointer(mean),
        rstd=pointer(rstd),
        weight=pointer(weight),
        bias=pointer(bias),
        rows=rows.fields,
        groups=groups_of(sizes),
        chain=chain.pack(),
    )


def _channel_gradients(queue, sizes, rows, sums, grad_weight, grad_bias, dtype):
    images = 0 if sizes.is_empty else sizes.batch
    # torch, too, answers NaN for the weight where every image is empty: there is no mean.
    factor = np.nan if sizes.batch and not sizes.spatial else 1.0
    channel_gradients(queue, dtype, sums, grad_weight, grad_bias, images, sizes.channels, rows.slots, factor)


def _group_means(queue, sizes, rows, sums, weight, second_weight, dtype, kind):
    count = sizes.batch * sizes.num_groups
    means = queue.empty((count, {2: 2, 5: 7}[kind]), FLOAT64)
    team = team_of(sizes.channels_per_group * rows.slots)
    group_means_kernel(dtype, {2: "FirstTerms", 5: "SecondTerms"}[kind]).launch(
        queue,
        -(-count * team // THREADS),
        sums=pointer(sums),
        weight=pointer(weight),
        second_weight=pointer(second_weight),
        means=pointer(means),
        groups=groups_of(sizes),
        count=count,
        slots=rows.slots,
        elements=sizes.group_size,
        team=team,
    )
    return means
