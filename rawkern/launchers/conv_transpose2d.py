"""Transposed 2-D convolution and its two gradients on arrays (NumPy on the CPU, CuPy on a GPU)."""

import math

import numpy as np

from .. import runtime
from ..runtime import check_out, element_strides, pointer, queue_of
from . import block_math
from . import conv_transpose2d_kernels as kernels_of
from .block_math import check_precision
from .chain import IDENTITY, chain_of, channel_axis
from .conv_transpose2d_kernels import kernels
from .geometry import Geometry

__all__ = ["channel_min", "conv_transpose2d", "input_gradient", "kernels", "weight_gradient", "with_moments"]

#: Longest sum of products that is formed in one accumulator before partial sums are combined in double.
_SLICE_PIXELS = 16384
#: Memory the weight gradient's partial sums may take, in bytes; larger weights get fewer, longer slices.
_PARTIAL_BYTES = 1 << 28


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
        saved: array like `out` (with its strides) for the convolution before the epilogue, or None.
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
    bias = queue.contiguous(bias)
    operands = _per_channel(queue, geometry, operands)
    ending = dict(
        output=pointer(out),
        saved=pointer(saved),
        bias=pointer(bias),
        chain=chain.pack(operands, geometry.out_channels),
    )
    _forward(queue, geometry, input, weight, precision, kernels_of.store, chain, ending, element_strides(out))
    return out


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
    bias = queue.contiguous(bias)
    ending = dict(values=pointer(values), index=pointer(index), bias=pointer(bias))
    strides = (height * width, 0, width, 1)
    _forward(queue, geometry, input, weight, precision, kernels_of.channel_min, IDENTITY, ending, strides)
    return values, index


def with_moments(input, weight, bias, chain, geometry, *, precision=None, out=None, stream=None):
    """The transposed convolution, and the statistics of a chain applied to it, computed where it is produced.

    Returns:
        out: (N, C_out, H_out, W_out), the convolution before the chain.
        moments: (N * C_out, slots, 3) float64, partial count, mean and sum of squared deviations of chain(out).
    """
    queue = _queue(stream, geometry, input, weight, bias)
    out = _output(queue, geometry, input, out)
    block = _choose_forward(geometry, input.dtype, precision, queue.device)
    tiles = -(-_largest_phase(geometry) // block.columns)
    phases = math.prod([min(s, size) for s, size in zip(geometry.stride, geometry.output_size, strict=True)])
    moments = queue.empty((geometry.batch * geometry.out_channels, tiles * phases, 3), np.dtype("float64"))
    bias = queue.contiguous(bias)
    ending = dict(
        output=pointer(out),
        bias=pointer(bias),
        moments=pointer(moments),
        slots=tiles * phases,
        chain=chain.pack(chain.tensors, geometry.out_channels),
    )
    span = tiles * block.columns
    strides = element_strides(out)
    _forward(queue, geometry, input, weight, precision, kernels_of.moments, chain, ending, strides, image_span=span)
    return out, moments


def input_gradient(grad_output, weight, geometry, *, precision=None, out=None, stream=None):
    """Gradient for the input: the convolution of grad_output (N, C_out, H_out, W_out) with the weight.

    Returns:
        (N, C_in, H, W); channels-last if grad_output is.
    """
    queue = queue_of(stream, grad_output=grad_output, weight=weight)
    _check_shape("grad_output", grad_output, geometry.output_shape)
    _check_shape("weight", weight, geometry.weight_shape)
    if out is None:
        out = queue.empty(geometry.input_shape, grad_output.dtype)
        out = _like_layout(queue, out, grad_output)
    check_out(out, geometry.input_shape, grad_output.dtype, queue.device)
    if out.size == 0:
        return out
    rows, depth = geometry.in_channels // geometry.groups, geometry.out_channels // geometry.groups
    pixels = geometry.batch * math.prod(geometry.input_size)
    candidates = block_math.choices(grad_output.dtype, check_precision(precision), depth * math.prod(geometry.kernel))
    block = block_math.choose(candidates, rows, pixels, geometry.groups, queue.device.multiprocessors)
    packed, depth_words, rows_padded = _pack(queue, weight, geometry, block, depth_axis=1)
    tiles = -(-pixels // block.columns)
    gather = dict(
        input=pointer(grad_output),
        weight=pointer(packed),
        in_strides=element_strides(grad_output),
        out_strides=element_strides(out),
        image_span=0,
        tiles=tiles,
        height=geometry.axis(0, transposed=False),
        width=geometry.axis(1, transposed=False),
        batch=geometry.batch,
        groups=geometry.groups,
        depth=depth,
        depth_words=depth_words,
        rows=rows,
        rows_padded=rows_padded,
    )
    kernel = kernels_of.input_gradient(block)
    blocks = tiles * geometry.groups * (rows_padded // block.rows)
    ending = dict(output=pointer(out), saved=0, bias=0, chain=IDENTITY.pack((), rows))
    _launch(kernel, queue, blocks, gather, ending)
    return out


def weight_gradient(input, grad_output, geometry, *, precision=None, out=None, stream=None):
    """Gradient for the weight, (C_in, C_out / groups, kH, kW), from the input and grad_output.

    Deterministic: slices of the pixels are summed by blocks of their own and combined in a fixed order, in double.
    """
    queue = queue_of(stream, input=input, grad_output=grad_output)
    _check_shape("input", input, geometry.input_shape)
    _check_shape("grad_output", grad_output, geometry.output_shape)
    if out is None:
        out = queue.empty(geometry.weight_shape, input.dtype)
    check_out(out, geometry.weight_shape, input.dtype, queue.device)
    rows, columns = geometry.in_channels // geometry.groups, geometry.out_channels // geometry.groups
    taps = math.prod(geometry.kernel)
    pixels = geometry.batch * math.prod(geometry.input_size)
    candidates = block_math.weight_gradient_choices(input.dtype, check_precision(precision))
    block = block_math.choose(candidates, rows, columns, taps * geometry.groups, 1)
    row_tiles, column_tiles = -(-rows // block.rows), -(-columns // block.columns)
    blocks_per_slice = row_tiles * column_tiles * taps * geometry.groups
    slices = _slices(pixels, blocks_per_slice, out.size, queue.device)
    slab = block.words * block.pack
    slice_pixels = max(1, -(-pixels // (slices * slab))) * slab
    slices = -(-pixels // slice_pixels)
    partial = queue.empty((slices, out.size), runtime.accumulator(input.dtype))
    kernels_of.weight_gradient(block).launch(
        queue,
        blocks_per_slice * slices,
        input=pointer(input),
        grad_output=pointer(grad_output),
        partial=pointer(partial),
        in_strides=element_strides(input),
        out_strides=element_strides(grad_output),
        pixels=pixels,
        slice_pixels=slice_pixels,
        slices=slices,
        height=geometry.axis(0, transposed=True),
        width=geometry.axis(1, transposed=True),
        groups=geometry.groups,
        rows=rows,
        columns=columns,
        row_tiles=row_tiles,
        column_tiles=column_tiles,
    )
    strides = element_strides(out)
    kernels_of.sum_slices(input.dtype).launch(
        queue,
        -(-out.size // 256),
        partial=pointer(partial),
        output=pointer(out),
        slices=slices,
        elements=out.size,
        row_stride=strides[0],
        column_stride=strides[1],
        tap_strides=strides[2:],
        kernel_h=geometry.kernel[0],
        kernel_w=geometry.kernel[1],
        rows=rows,
        columns=columns,
    )
    return out


def _queue(stream, geometry, input, weight, bias, **operands):
    queue = queue_of(stream, input=input, weight=weight, bias=bias, **operands)
    _check_shape("input", input, geometry.input_shape)
    _check_shape("weight", weight, geometry.weight_shape)
    if bias is not None:
        geometry.check_bias(bias.shape)
    return queue


def _check_shape(name, array, shape):
    if tuple(array.shape) != tuple(shape):
        raise RuntimeError(f"expected {name} of shape {list(shape)}, but got {list(array.shape)}")


def _per_channel(queue, geometry, operands):
    """The epilogue's operands, contiguous; raises unless each broadcasts to the output along its channels."""
    if channel_axis(geometry.output_shape, [operand.shape for operand in operands]) not in (None, 1):
        raise ValueError(
            "tensors of an epilogue must broadcast per channel, such as (C, 1, 1), got "
            + ", ".join(str(tuple(operand.shape)) for operand in operands)
        )
    return [queue.contiguous(operand) for operand in operands]


def _is_channels_last(array):
    return array.ndim == 4 and runtime.memory_order(array) == (0, 2, 3, 1)


def _like_layout(queue, array, like):
    """`array`, new and contiguous, with its memory seen as channels-last if `like` is channels-last."""
    if not _is_channels_last(like):
        return array
    batch, channels, height, width = array.shape
    return array.reshape(batch, height, width, channels).transpose(0, 3, 1, 2)


def _output(queue, geometry, input, out):
    if out is None:
        out = _like_layout(queue, queue.empty(geometry.output_shape, input.dtype), input)
    check_out(out, geometry.output_shape, input.dtype, queue.device)
    return out


def _largest_phase(geometry):
    """Pixels of the largest phase of one image."""
    return math.prod([-(-o // s) for o, s in zip(geometry.output_size, geometry.stride, strict=True)])


def _longest_sum(geometry):
    """Products per output: the input channels of a group times the taps of the phase that has most."""
    periods = (s // math.gcd(s, d) for s, d in zip(geometry.stride, geometry.dilation, strict=True))
    taps = math.prod(-(-kernel // period) for kernel, period in zip(geometry.kernel, periods, strict=True))
    return geometry.in_channels // geometry.groups * taps


def _choose_forward(geometry, dtype, precision, device):
    rows = geometry.out_channels // geometry.groups
    phases = math.prod([min(s, size) for s, size in zip(geometry.stride, geometry.output_size, strict=True)])
    columns = geometry.batch * _largest_phase(geometry)
    candidates = block_math.choices(dtype, check_precision(precision), _longest_sum(geometry))
    return block_math.choose(candidates, rows, columns, geometry.groups * phases, device.multiprocessors)


def _forward(queue, geometry, input, weight, precision, kernel_of, chain, ending, out_strides, image_span=0):
    if geometry.batch == 0:
        return
    block = _choose_forward(geometry, input.dtype, precision, queue.device)
    packed, depth_words, rows_padded = _pack(queue, weight, geometry, block, depth_axis=0)
    columns = geometry.batch * (image_span or _largest_phase(geometry))
    tiles = -(-columns // block.columns)
    phases = [min(s, size) for s, size in zip(geometry.stride, geometry.output_size, strict=True)]
    gather = dict(
        input=pointer(input),
        weight=pointer(packed),
        in_strides=element_strides(input),
        out_strides=out_strides,
        image_span=image_span,
        tiles=tiles,
        height=geometry.axis(0, transposed=True),
        width=geometry.axis(1, transposed=True),
        batch=geometry.batch,
        groups=geometry.groups,
        depth=geometry.in_channels // geometry.groups,
        depth_words=depth_words,
        rows=geometry.out_channels // geometry.groups,
        rows_padded=rows_padded,
    )
    blocks = tiles * phases[0] * phases[1]
    if kernel_of is not kernels_of.channel_min:
        blocks *= geometry.groups * (rows_padded // block.rows)
    _launch(kernel_of(block, chain), queue, blocks, gather, ending)


def _launch(kernel, queue, blocks, gather, ending):
    names = kernel.params["ending"].names
    gather = tuple(gather[name] for name in kernels_of.GATHER.names)
    kernel.launch(queue, blocks, gather=gather, ending=tuple(ending[name] for name in names))


def _pack(queue, weight, geometry, block, depth_axis):
    """Packed weights, their depth in words and their rows, as padded. Depth runs along weight axis `depth_axis`."""
    strides = element_strides(weight)
    in_per_group, out_per_group = geometry.in_channels // geometry.groups, geometry.out_channels // geometry.groups
    depth, rows = (in_per_group, out_per_group) if depth_axis == 0 else (out_per_group, in_per_group)
    depth_words = -(-depth // (block.words * block.pack)) * block.words
    rows_padded = -(-rows // block.rows) * block.rows
    words = geometry.groups * geometry.kernel[0] * geometry.kernel[1] * depth_words * rows_padded
    packed = queue.empty((words,), block.word)
    kernels_of.pack(block).launch(
        queue,
        -(-words // 256),
        weight=pointer(weight),
        packed=pointer(packed),
        group_stride=in_per_group * strides[0],
        depth_stride=strides[depth_axis],
        row_stride=strides[1 - depth_axis],
        tap_strides=strides[2:],
        words=words,
        kernel_h=geometry.kernel[0],
        kernel_w=geometry.kernel[1],
        depth=depth,
        depth_words=depth_words,
        rows=rows,
        rows_padded=rows_padded,
    )
    return packed, depth_words, rows_padded


def _slices(pixels, blocks_per_slice, weights, device):
    """How many slices of pixels: enough to fill the device and to keep sums short, within the memory for partials."""
    to_fill = -(-4 * device.multiprocessors // blocks_per_slice)
    to_keep_short = -(-pixels // _SLICE_PIXELS)
    affordable = max(1, _PARTIAL_BYTES // (8 * weights))
    return max(1, min(max(to_fill, to_keep_short), affordable, -(-pixels // 64)))
