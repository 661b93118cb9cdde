"""Transposed convolution, minimum over channels, sum over height, GELU, plus bias, and its gradients, on arrays.

Forward, the convolution's output is never stored: the minimum over the channels is taken where it is produced.
Backward, one channel number per pixel tells which of the channels has a gradient: no dense gradient is formed either.
"""

import functools

import numpy as np

from .. import runtime
from ..runtime import Kernel, accumulator, check_out, cpp_type, element_strides, pointer, queue_of
from .conv_transpose2d import channel_min
from .geometry import Geometry
from .layout import contiguous
from .min_sum_gelu_add import bias_gradient, check_contiguous, output_shape, reduce, sum_gelu_add, sum_gradient
from .repeat import repeatable

__all__ = [
    "bias_gradient",
    "conv_bias_gradient",
    "conv_transpose2d_min_sum_gelu_add",
    "geometry_of",
    "input_gradient",
    "output_shape",
    "sum_gradient",
    "weight_gradient",
]

_CHANNELS = 32
_INT32 = np.dtype("int32")
_FLOAT64 = np.dtype("float64")
#: Pixels whose products are summed in one accumulator before partial sums are added in double.
_SLICE_PIXELS = 2048
#: Blocks of the weight gradient on one multiprocessor of a data centre's GPU: what its shared memory holds.
_BLOCKS_AT_ONCE = 4
#: Memory the weight gradient's partial sums may take, in bytes; larger weights get fewer, longer slices.
_PARTIAL_BYTES = 1 << 28
#: Rows of the output of a block of the bias gradient.
_BIAS_ROWS = 128

_GEOMETRY = runtime.params(
    ("pixels", "i8"),
    ("in_size", "i4", 2),
    ("out_size", "i4", 2),
    ("kernel", "i4", 2),
    ("stride", "i4", 2),
    ("padding", "i4", 2),
    ("dilation", "i4", 2),
    ("in_channels", "i4"),
    ("in_per_group", "i4"),
    ("out_per_group", "i4"),
    ("padded_channels", "i4"),
)
_PACK = runtime.params(
    ("weight", "u8"),
    ("packed", "u8"),
    ("strides", "i8", 4),
    ("elements", "i8"),
    ("taps", "i4"),
    ("kernel_w", "i4"),
    ("in_channels", "i4"),
    ("out_per_group", "i4"),
    ("padded_channels", "i4"),
    ("unused", "i4"),
)
_INPUT_GRADIENT = runtime.params(
    ("grad", "u8"),
    ("index", "u8"),
    ("packed", "u8"),
    ("output", "u8"),
    ("out_strides", "i8", 4),
    ("geometry", _GEOMETRY),
    ("channels_last", "i4"),
    ("unused", "i4"),
)
_WEIGHT_GRADIENT = runtime.params(
    ("grad", "u8"),
    ("index", "u8"),
    ("input", "u8"),
    ("partial", "u8"),
    ("in_strides", "i8", 4),
    ("slices", "i8"),
    ("slice_pixels", "i8"),
    ("geometry", _GEOMETRY),
    ("channels_last", "i4"),
    ("unused", "i4"),
)
_BIAS_GRADIENT = runtime.params(
    ("grad", "u8"),
    ("index", "u8"),
    ("partial", "u8"),
    ("columns", "i8"),
    ("slices", "i8"),
    ("row_slices", "i8"),
    ("height", "i4"),
    ("width", "i4"),
    ("channels", "i4"),
    ("slice_rows", "i4"),
)


def geometry_of(input_shape, weight_shape, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """The convolution's geometry. Raises RuntimeError for an input without batch, else what Geometry.of raises.

    The minimum is taken over dimension 1 and the sum over dimension 2 of (N, C, H, W); without a batch those would be
    the height and the width.
    """
    if len(input_shape) != 4:
        raise RuntimeError(f"input: expected 4 dimensions (N, C, H, W), but got shape {tuple(input_shape)}")
    return Geometry.of(input_shape, weight_shape, stride, padding, output_padding, groups, dilation)


@repeatable
def conv_transpose2d_min_sum_gelu_add(
    input,
    weight,
    conv_bias,
    bias,
    stride=1,
    padding=0,
    output_padding=0,
    groups=1,
    dilation=1,
    *,
    precision=None,
    out=None,
    index=None,
    sums=None,
    stream=None,
):
    """gelu(sum over H of (minimum over C of conv_transpose2d(input, weight, conv_bias, ...))) + bias.

    Args:
        input: (N, C_in, H, W), any strides.
        weight: (C_in, C_out / groups, kH, kW), any strides.
        conv_bias: (C_out,) or None.
        bias: any shape that broadcasts with (N, 1, 1, W_out).
        stride, padding, output_padding, groups, dilation: as in torch.nn.functional.conv_transpose2d.
        precision: "ieee" (default) or "tf32", for float32.
        out: array for the result, in the broadcast shape.
        index: int32 array (N, H_out, W_out) that gets the channel of each minimum, or None. Contiguous, as `sums`.
        sums: array (N, W_out) in the accumulator's dtype that gets GELU's argument, or None.
        stream: the CUDA stream to launch on (anything with a `ptr`); default CuPy's current one.

    Returns:
        The result.

    Raises:
        RuntimeError, TypeError, ValueError: as torch for the same mistake; see Geometry.of.
    """
    geometry = geometry_of(input.shape, weight.shape, stride, padding, output_padding, groups, dilation)
    queue = queue_of(stream, input=input, weight=weight, conv_bias=conv_bias, bias=bias)
    shape = output_shape(geometry.batch, geometry.output_size[1], bias.shape)
    out = queue.empty(shape, input.dtype) if out is None else out
    check_out(out, shape, input.dtype, queue.device)
    values, _ = channel_min(input, weight, conv_bias, geometry, precision=precision, index=index, stream=stream)
    return sum_gelu_add(values, bias, out=out, sums=sums, stream=stream)


@repeatable
def input_gradient(grad_sum, index, weight, geometry, *, out=None, stream=None):
    """The gradient for the convolution's input, (N, C_in, H, W).

    Args:
        grad_sum: (N, W_out), accumulator's dtype: the gradient for the sums; see `sum_gradient`.
        index: (N, H_out, W_out) int32: the channel of each minimum.
        out: array for the result, any strides; default contiguous.
    """
    queue = queue_of(stream, weight=weight)
    _check_shape("weight", weight, geometry.weight_shape)
    _check_saved(queue, geometry, grad_sum, index, weight.dtype)
    out = queue.empty(geometry.input_shape, weight.dtype) if out is None else out
    check_out(out, geometry.input_shape, weight.dtype, queue.device)
    if out.size == 0:
        return out
    fields = _geometry_fields(geometry)
    pixels, padded = fields[0], fields[-1]
    packed = _pack(queue, weight, geometry, padded)
    strides = element_strides(out)
    kernel = _input_gradient_kernel(weight.dtype)
    kernel.launch(
        queue,
        -(-pixels // 64) * (padded // _CHANNELS),
        grad=pointer(grad_sum),
        index=pointer(index),
        packed=pointer(packed),
        output=pointer(out),
        out_strides=strides,
        geometry=fields,
        channels_last=_is_channels_last(strides),
        unused=0,
    )
    return out


@repeatable
def weight_gradient(grad_sum, index, input, geometry, *, out=None, stream=None):
    """The gradient for the weight, (C_in, C_out / groups, kH, kW). Arguments as in `input_gradient`."""
    queue = queue_of(stream, input=input)
    _check_shape("input", input, geometry.input_shape)
    _check_saved(queue, geometry, grad_sum, index, input.dtype)
    if min(input.strides) < 0:  # the kernel's offsets are negative where there is no pixel
        input = contiguous(queue, input)
    out = queue.empty(geometry.weight_shape, input.dtype) if out is None else out
    check_out(out, geometry.weight_shape, input.dtype, queue.device)
    kernel = _weight_gradient_kernel(input.dtype)
    fields = _geometry_fields(geometry)
    pixels, padded = fields[0], fields[-1]
    rows = geometry.out_channels // geometry.groups
    taps = geometry.kernel[0] * geometry.kernel[1]
    blocks = -(-taps // 3) * (padded // _CHANNELS) * -(-rows // (512 // accumulator(input.dtype).itemsize))
    slices, slice_pixels = _slices(pixels, blocks, out.size, queue.device)
    shape = (slices, *geometry.kernel, rows, geometry.in_channels)
    partial = queue.empty(shape, accumulator(input.dtype))
    strides = element_strides(input)
    kernel.launch(
        queue,
        blocks * slices,
        grad=pointer(grad_sum),
        index=pointer(index),
        input=pointer(input),
        partial=pointer(partial),
        in_strides=strides,
        slices=slices,
        slice_pixels=slice_pixels,
        geometry=fields,
        channels_last=_is_channels_last(strides),
        unused=0,
    )
    reduce(queue, partial, (0,), out.transpose(2, 3, 1, 0))
    return out


@repeatable
def conv_bias_gradient(grad_sum, index, geometry, dtype, *, out=None, stream=None):
    """The gradient for the convolution's bias, (C_out,). Arguments as in `input_gradient`."""
    dtype = np.dtype(dtype)
    queue = queue_of(stream, grad_sum=grad_sum)
    _check_saved(queue, geometry, grad_sum, index, dtype)
    out = queue.empty((geometry.out_channels,), dtype) if out is None else out
    check_out(out, (geometry.out_channels,), dtype, queue.device)
    height, width = geometry.output_size
    columns, row_slices = geometry.batch * width, -(-height // _BIAS_ROWS)
    slices = -(-columns // 32) * row_slices
    partial = queue.empty((slices, geometry.out_channels), _FLOAT64)
    _bias_gradient_kernel(grad_sum.dtype).launch(
        queue,
        slices * -(-geometry.out_channels // 128),
        grad=pointer(grad_sum),
        index=pointer(index),
        partial=pointer(partial),
        columns=columns,
        slices=slices,
        row_slices=row_slices,
        height=height,
        width=width,
        channels=geometry.out_channels,
        slice_rows=_BIAS_ROWS,
    )
    reduce(queue, partial, (0,), out)
    return out


def kernels():
    """Every instantiation, for the tests that compile them all."""
    for dtype in runtime.CPP_TYPES:
        yield _pack_kernel(dtype)
        yield _input_gradient_kernel(dtype)
        yield _weight_gradient_kernel(dtype)
    for dtype in sorted({accumulator(dtype) for dtype in runtime.CPP_TYPES}, key=str):
        yield _bias_gradient_kernel(dtype)


def _pack(queue, weight, geometry, padded):
    """The weights as [tap][output channel within the group][input channel], the last padded, and a row of zeros."""
    rows, taps = geometry.out_channels // geometry.groups, geometry.kernel[0] * geometry.kernel[1]
    elements = (taps * rows + 1) * padded
    packed = queue.empty((elements,), weight.dtype)
    _pack_kernel(weight.dtype).launch(
        queue,
        -(-elements // 256),
        weight=pointer(weight),
        packed=pointer(packed),
        strides=element_strides(weight),
        elements=elements,
        taps=taps,
        kernel_w=geometry.kernel[1],
        in_channels=geometry.in_channels,
        out_per_group=rows,
        padded_channels=padded,
        unused=0,
    )
    return packed


def _geometry_fields(geometry):
    """The fields of SparseGeometry."""
    height, width = geometry.input_size
    return (
        geometry.batch * height * width,
        geometry.input_size,
        geometry.output_size,
        geometry.kernel,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.in_channels,
        geometry.in_channels // geometry.groups,
        geometry.out_channels // geometry.groups,
        -(-geometry.in_channels // _CHANNELS) * _CHANNELS,
    )


def _slices(pixels, blocks_per_slice, weights, device):
    """How many slices of pixels, and their length: sums that are short, within memory's limit, and as many blocks as
    the device runs at once, or a multiple of that."""
    at_once = _BLOCKS_AT_ONCE * device.multiprocessors
    to_keep_short = -(-pixels // _SLICE_PIXELS)
    to_fill = -(-to_keep_short * blocks_per_slice // at_once) * at_once // blocks_per_slice
    affordable = max(1, _PARTIAL_BYTES // (8 * weights))
    slices = max(1, min(max(to_fill, to_keep_short), affordable, -(-pixels // 128)))
    slice_pixels = max(1, -(-pixels // (slices * 32))) * 32
    return -(-pixels // slice_pixels), slice_pixels


def _is_channels_last(strides):
    """Whether lanes should walk along the channels rather than along the width."""
    return abs(strides[1]) < abs(strides[3])


def _check_saved(queue, geometry, grad_sum, index, dtype):
    height, width = geometry.output_size
    for name, array, shape, expected in (
        ("grad_sum", grad_sum, (geometry.batch, width), accumulator(dtype)),
        ("index", index, (geometry.batch, height, width), _INT32),
    ):
        check_contiguous(name, array, shape, expected, queue)


def _check_shape(name, array, shape):
    if tuple(array.shape) != tuple(shape):
        raise RuntimeError(f"expected {name} of shape {list(shape)}, but got {list(array.shape)}")


def _kernel(name, type, threads, params, shared_bytes=0):
    return Kernel(name, "conv_transpose2d/sparse_gradients.cu", type, threads, params, shared_bytes)


@functools.cache
def _pack_kernel(dtype):
    return _kernel("conv_transpose2d_pack_rows", f"PackRows<{cpp_type(dtype)}>", 256, _PACK)


@functools.cache
def _input_gradient_kernel(dtype):
    name, type = "conv_transpose2d_sparse_input_gradient", f"SparseInputGradient<{cpp_type(dtype)}>"
    return _kernel(name, type, 256, _INPUT_GRADIENT)


@functools.cache
def _weight_gradient_kernel(dtype):
    name, type = "conv_transpose2d_sparse_weight_gradient", f"SparseWeightGradient<{cpp_type(dtype)}>"
    size = accumulator(dtype).itemsize
    # Storage of the kernel: sums, a tile of x, what its pixels meet.
    tile = _CHANNELS * (32 * dtype.itemsize + min(4 * dtype.itemsize, 16))
    shared = 3 * (512 + size) * _CHANNELS + tile + 3 * 8 * (4 * size + 16)
    return _kernel(name, type, 96, _WEIGHT_GRADIENT, shared)


@functools.cache
def _bias_gradient_kernel(dtype):
    name, type = "conv_transpose2d_sparse_bias_gradient", f"SparseBiasGradient<{cpp_type(dtype)}>"
    return _kernel(name, type, 256, _BIAS_GRADIENT)
