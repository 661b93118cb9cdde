"""Transposed 2-D convolution and its two gradients on arrays (NumPy on the CPU, CuPy on a GPU)."""

import numpy as np

from .. import runtime
from ..runtime import check_out, element_strides, pointer, queue_of
from . import conv_transpose2d_direct as direct
from . import conv_transpose2d_kernels as kernels_of
from . import conv_transpose2d_warpgroup as warpgroup
from .chain import IDENTITY, chain_of, channel_axis
from .conv_transpose2d_kernels import kernels
from .conv_transpose2d_plans import GatherPlan, gather_plan
from .conv_transpose2d_weight_gradient import weight_gradient
from .geometry import Geometry, check_shape
from .layout import contiguous, is_channels_last
from .pointwise import pointwise
from .repeat import repeatable

__all__ = ["channel_min", "conv_transpose2d", "input_gradient", "kernels", "weight_gradient", "with_moments"]


@repeatable
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
    operands=None,
    precision=None,
    out=None,
    saved=None,
    stream=None,
):
    """Transposed 2-D convolution followed by a chain of pointwise functions, in one kernel.

    Args:
        input: (N, C_in, H, W) or (C_in, H, W), any strides.
        weight: (C_in, C_out / groups, kH, kW), any strides.
        bias: (C_out,) or None.
        stride, padding, output_padding, groups, dilation: as in torch.nn.functional.conv_transpose2d.
        epilogue: pointwise functions of rawkern.epilogue, or a chain made of them.
        operands: the arrays of the epilogue's tensors, where the epilogue names torch tensors.
        precision: "ieee" (default) or "tf32", for float32.
        out: array for the result, (N, C_out, H_out, W_out), any strides.
        saved: array like `out` (with its strides) for the convolution before the epilogue, or None. With it, the
            epilogue may be a second kernel, which reads what was saved, so rounded to the element type.
        stream: the CUDA stream to launch on (anything with a `ptr`); default CuPy's current one.

    Returns:
        The result; channels-last if the input is.

    Raises:
        RuntimeError, TypeError, ValueError: as torch for the same mistake; see Geometry.of.
    """
    if input.ndim == 3:
        out, saved = (None if array is None else array[None] for array in (out, saved))
        batched = conv_transpose2d(
            input[None], weight, bias, stride, padding, output_padding, groups, dilation,
            epilogue=epilogue, operands=operands, precision=precision, out=out, saved=saved, stream=stream,
        )  # fmt: skip
        return batched[0]
    geometry = Geometry.of(input.shape, weight.shape, stride, padding, output_padding, groups, dilation)
    chain = chain_of(epilogue)
    operands = chain.tensors if operands is None else operands
    named = {f"tensor {i} of the epilogue": operand for i, operand in enumerate(operands)}
    queue = _queue(stream, geometry, input, weight, bias, **named)
    out = _output(queue, geometry, input, out)
    if saved is not None:
        check_out(saved, geometry.output_shape, input.dtype, queue.device, "saved")
        if saved.strides != out.strides and saved.size:
            raise ValueError(f"saved must have the strides of out, {out.strides}, got {saved.strides}")
    bias = contiguous(queue, bias)
    operands = _per_channel(queue, geometry, operands)
    ending = dict(
        output=pointer(out),
        saved=pointer(saved),
        bias=pointer(bias),
        chain=chain.pack(operands, geometry.out_channels),
    )
    strides = element_strides(out)
    plan = _plan(queue, geometry, input, precision, channels_last=is_channels_last(out))
    if saved is None or not isinstance(plan, warpgroup.Plan) or warpgroup.fills_sectors(plan, ending, strides):
        _store(queue, plan, chain, ending, input, weight, strides)
        return out
    # What neighbouring tiles write of one sector of 32 bytes meets in the L2 cache, unless tiles of two arrays are too
    # much for it; then a kernel of its own for the chain takes less time (third model: 1.4 ms instead of 2.4).
    ending |= dict(output=pointer(saved), saved=0, chain=IDENTITY.pack())
    _store(queue, plan, IDENTITY, ending, input, weight, strides)
    return pointwise(saved, chain, tensors=operands, out=out, stream=stream)


@repeatable
def channel_min(input, weight, bias, geometry, *, precision=None, values=None, index=None, stream=None):
    """The minimum over all channels of the transposed convolution, which itself is not stored.

    Returns:
        values: (N, H_out, W_out) in the accumulator's dtype (float32, or float64 for float64).
        index: (N, H_out, W_out) int32, the channel of the minimum: the first of equals, NaN before everything.
    """
    queue = _queue(stream, geometry, input, weight, bias)
    shape = (geometry.batch, *geometry.output_size)
    dtype = runtime.accumulator(input.dtype)
    values = queue.empty(shape, dtype) if values is None else values
    index = queue.empty(shape, np.dtype("int32")) if index is None else index
    check_out(values, shape, dtype, queue.device, "values")
    check_out(index, shape, np.dtype("int32"), queue.device, "index")
    height, width = geometry.output_size
    bias = contiguous(queue, bias)
    ending = dict(values=pointer(values), index=pointer(index), bias=pointer(bias))
    strides = (height * width, 0, width, 1)
    plan = _plan(queue, geometry, input, precision, channel_min=True)
    if isinstance(plan, warpgroup.Plan):
        warpgroup.launch(queue, plan, warpgroup.channel_min(plan), ending, input, weight, strides)
    elif isinstance(plan, GatherPlan):
        _gather(queue, plan, kernels_of.channel_min(plan.block), ending, input, weight, strides)
    else:
        direct.channel_min(queue, plan, ending, input, weight, strides)
    return values, index


@repeatable
def with_moments(input, weight, bias, chain, geometry, *, precision=None, out=None, stream=None):
    """The transposed convolution, and the statistics of a chain applied to it, computed where it is produced.

    Returns:
        out: (N, C_out, H_out, W_out), the convolution before the chain.
        moments: (N * C_out, slots, 3) float64, partial count, mean and sum of squared deviations of chain(out).
    """
    queue = _queue(stream, geometry, input, weight, bias)
    out = _output(queue, geometry, input, out)
    plan = _plan(queue, geometry, input, precision, per_image=True)
    moments = queue.empty((geometry.batch * geometry.out_channels, plan.slots, 3), np.dtype("float64"))
    bias = contiguous(queue, bias)
    ending = dict(
        output=pointer(out),
        bias=pointer(bias),
        moments=pointer(moments),
        slots=plan.slots,
        chain=chain.pack(chain.tensors, geometry.out_channels),
    )
    strides = element_strides(out)
    if isinstance(plan, warpgroup.Plan):
        kernel = warpgroup.moments(plan, chain, ending, strides)
        warpgroup.launch(queue, plan, kernel, ending, input, weight, strides)
    elif isinstance(plan, GatherPlan):
        _gather(queue, plan, kernels_of.moments(plan.block, chain), ending, input, weight, strides, plan.image_span)
    else:
        direct.with_moments(queue, plan, chain, ending, input, weight, strides)
    return out, moments


@repeatable
def input_gradient(grad_output, weight, geometry, *, precision=None, out=None, stream=None):
    """Gradient for the input: the convolution of grad_output (N, C_out, H_out, W_out) with the weight.

    Returns:
        (N, C_in, H, W); channels-last if grad_output is.
    """
    queue = queue_of(stream, grad_output=grad_output, weight=weight)
    check_shape("grad_output", grad_output, geometry.output_shape)
    check_shape("weight", weight, geometry.weight_shape)
    if out is None:
        out = queue.empty(geometry.input_shape, grad_output.dtype)
        out = _like_layout(queue, out, grad_output)
    check_out(out, geometry.input_shape, grad_output.dtype, queue.device)
    ending = dict(output=pointer(out), saved=0, bias=0, chain=IDENTITY.pack())
    channels_last = is_channels_last(out)
    plan = _plan(queue, geometry, grad_output, precision, transposed=False, channels_last=channels_last)
    _store(queue, plan, IDENTITY, ending, grad_output, weight, element_strides(out))
    return out


def _plan(
    queue, geometry, gathered, precision, *, transposed=True, channels_last=False, channel_min=False, per_image=False
):
    """The plan by which a problem is computed, from the first family of kernels that serves it.

    1. conv_transpose2d_direct, plain multiply-adds: few channels per group, of which a tensor core's tile would be
       mostly padding.
    2. conv_transpose2d_warpgroup, Hopper's products of whole warpgroups: 16-bit types, and float32 in TF32 or split in
       two, where the costs that both families estimate say that it is faster than
    3. gather.cuh, products of warps or plain multiply-adds: everything, on every GPU.

    Args:
        gathered: the input, or grad_output.
        transposed: the transposed convolution; else its input gradient.
        channels_last: whether the output is in channels-last memory.
        channel_min: whether the kernel ends in the minimum over channels, so that a block must see all of them.
        per_image: whether it ends in moments of each image, so that a block must not see two.
    """
    device, dtype = queue.device, gathered.dtype
    few = direct.direct_plan(geometry, dtype, precision, transposed, channels_last, tiled=not channel_min)
    if few:
        return few
    fast = warpgroup.plan(
        geometry, dtype, precision, device.arch, device.multiprocessors,
        transposed=transposed, staging=warpgroup.staging_of(gathered, geometry),
        channel_min=channel_min, per_image=per_image,
    )  # fmt: skip
    general = gather_plan(geometry, dtype, precision, device.multiprocessors, transposed)
    return fast if fast and warpgroup.is_faster(fast, general, device) else general


def _store(queue, plan, chain, ending, gathered, weight, out_strides):
    """Computes a plan over `gathered`, the input or grad_output, and stores it through a chain."""
    if isinstance(plan, warpgroup.Plan):
        kernel = warpgroup.store(plan, chain, ending, out_strides)
        warpgroup.launch(queue, plan, kernel, ending, gathered, weight, out_strides)
    elif isinstance(plan, GatherPlan):
        block = plan.block
        kernel = kernels_of.store(block, chain) if plan.transposed else kernels_of.input_gradient(block)
        _gather(queue, plan, kernel, ending, gathered, weight, out_strides)
    else:
        direct.store(queue, plan, chain, ending, gathered, weight, out_strides)


def _queue(stream, geometry, input, weight, bias, **operands):
    queue = queue_of(stream, input=input, weight=weight, bias=bias, **operands)
    check_shape("input", input, geometry.input_shape)
    check_shape("weight", weight, geometry.weight_shape)
    if bias is not None:
        geometry.check_bias(bias.shape)
    return queue


def _per_channel(queue, geometry, operands):
    """The epilogue's operands, contiguous; raises unless each broadcasts to the output along its channels."""
    if channel_axis(geometry.output_shape, [operand.shape for operand in operands]) not in (None, 1):
        raise ValueError(
            "tensors of an epilogue must broadcast per channel, such as (C, 1, 1), got "
            + ", ".join(str(tuple(operand.shape)) for operand in operands)
        )
    return [contiguous(queue, operand) for operand in operands]


def _like_layout(queue, array, like):
    """`array`, new and contiguous, with its memory seen as channels-last if `like` is channels-last."""
    if not is_channels_last(like):
        return array
    batch, channels, height, width = array.shape
    return array.reshape(batch, height, width, channels).transpose(0, 3, 1, 2)


def _output(queue, geometry, input, out):
    if out is None:
        out = _like_layout(queue, queue.empty(geometry.output_shape, input.dtype), input)
    check_out(out, geometry.output_shape, input.dtype, queue.device)
    return out


def _gather(queue, plan, kernel, ending, gathered, weight, out_strides, image_span=0):
    """Packs the weight and launches one of gather.cuh's kernels over `gathered`, the input or grad_output."""
    if plan.batch == 0:
        return
    packed = _pack(queue, plan, weight)
    tiles = plan.tiles(image_span)
    blocks = tiles * plan.phases
    if kernel.name != kernels_of.CHANNEL_MIN:  # whose blocks see all rows
        blocks *= plan.row_tiles
    gather = (
        pointer(gathered),
        pointer(packed),
        element_strides(gathered),
        out_strides,
        image_span,
        tiles,
        plan.height,
        plan.width,
        plan.batch,
        plan.groups,
        plan.depth,
        plan.depth_words,
        plan.rows,
        plan.rows_padded,
    )
    ending = tuple([ending[name] for name in kernel.params["ending"].names])
    kernel.launch(queue, blocks, gather=gather, ending=ending)


def _pack(queue, plan, weight):
    """The weight as gather.cuh reads it. Depth runs along the weight's first axis for the transposed convolution."""
    strides = element_strides(weight)
    in_per_group = plan.depth if plan.transposed else plan.rows
    depth_axis = 0 if plan.transposed else 1
    kernel_h, kernel_w = weight.shape[2:]
    words = plan.groups * kernel_h * kernel_w * plan.depth_words * plan.rows_padded
    packed = queue.empty((words,), plan.block.word)
    kernels_of.pack(plan.block).launch(
        queue,
        -(-words // 256),
        weight=pointer(weight),
        packed=pointer(packed),
        group_stride=in_per_group * strides[0],
        depth_stride=strides[depth_axis],
        row_stride=strides[1 - depth_axis],
        tap_strides=strides[2:],
        words=words,
        kernel_h=kernel_h,
        kernel_w=kernel_w,
        depth=plan.depth,
        depth_words=plan.depth_words,
        rows=plan.rows,
        rows_padded=plan.rows_padded,
    )
    return packed
