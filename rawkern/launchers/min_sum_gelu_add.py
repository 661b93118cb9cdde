"""Minimum over channels, sum over height, GELU, plus bias, and its gradients, on arrays (NumPy or CuPy)."""

import functools
import math
from itertools import product

import numpy as np

from .. import runtime
from ..runtime import Kernel, accumulator, check_out, cpp_type, device_of, element_strides, pointer, queue_of
from .index_space import broadcast_strides, by_stride, contiguous_strides, index_space, index_space_params
from .repeat import repeatable

_THREADS = 256
#: Blocks that fill any GPU: what a reduction of few outputs is cut into, on every device alike.
_MANY_BLOCKS = 1024
#: Threads that fill any GPU.
_MANY_THREADS = _THREADS * _MANY_BLOCKS
#: Terms per thread beyond which a reduction is cut into slices.
_LONG_SUM = 64
_INT32 = np.dtype("int32")
_FLOAT64 = np.dtype("float64")

_MIN = runtime.params(
    ("input", "u8"),
    ("values", "u8"),
    ("index", "u8"),
    ("pixels", index_space_params(2)),
    ("channel_stride", "i8"),
    ("channels", "i4"),
    ("share", "i4"),
    ("vector", "i4"),
    ("unused", "i4"),
)
_REDUCE = runtime.params(
    ("input", "u8"),
    ("output", "u8"),
    ("x", "u8"),
    ("kept", index_space_params(2)),
    ("reduced", index_space_params(1)),
    ("slices", "i8"),
    ("slice_length", "i8"),
    ("share", "i4"),
    ("along_reduced", "i4"),
)
_GELU_ADD = runtime.params(("output", "u8"), ("x", "u8"), ("bias", "u8"), ("space", index_space_params(3)))
_SPREAD = runtime.params(
    ("output", "u8"),
    ("grad", "u8"),
    ("index", "u8"),
    ("pixels", index_space_params(3)),
    ("channel_stride", "i8"),
    ("channels", "i4"),
    ("share", "i4"),
    ("vector", "i4"),
    ("unused", "i4"),
)


def output_shape(batch, width, bias_shape):
    """The shape of (batch, 1, 1, width) + bias. Raises RuntimeError if the bias does not broadcast."""
    sums, bias = (batch, 1, 1, width), tuple(bias_shape)
    dims = max(4, len(bias))
    pairs = zip((1,) * (dims - 4) + sums, (1,) * (dims - len(bias)) + bias, strict=True)
    shape = []
    for ours, others in pairs:
        if ours != others and ours != 1 and others != 1:
            raise RuntimeError(f"bias has shape {bias}, which does not broadcast with the {sums} of the sums")
        shape.append(others if ours == 1 else ours)
    return tuple(shape)


def check_input(shape):
    """Raises RuntimeError unless `shape` is (N, C, H, W), IndexError if there are no channels."""
    if len(shape) != 4:
        raise RuntimeError(f"input: expected 4 dimensions (N, C, H, W), but got shape {tuple(shape)}")
    if shape[1] == 0:
        raise IndexError(f"input: expected dimension 1 (channels) to have non-zero size, but got shape {tuple(shape)}")
    if shape[1] >= 2**31 - 2**16:
        raise RuntimeError(f"input: 2**31 and more channels are not supported, got shape {tuple(shape)}")


@repeatable
def min_sum_gelu_add(input, bias, *, out=None, index=None, sums=None, stream=None):
    """gelu(sum over H of (minimum over C of input)) + bias, with GELU in its erf form.

    Args:
        input: (N, C, H, W), any strides.
        bias: any shape that broadcasts with (N, 1, 1, W), also one that enlarges it.
        out: array for the result, in the broadcast shape.
        index: int32 array (N, H, W) that gets the channel of each minimum, or None. Contiguous, as `sums`.
        sums: array (N, W) in the accumulator's dtype (float32, or float64 for float64) that gets GELU's argument, or
            None. `index` and `sums` are what the gradients need.
        stream: the CUDA stream to launch on (anything with a `ptr`); default CuPy's current one.

    Returns:
        The result.

    Raises:
        RuntimeError: wrong rank, no broadcast, mixed dtypes or devices. IndexError: no channels.
    """
    queue = queue_of(stream, input=input, bias=bias)
    check_input(input.shape)
    batch, _, height, width = input.shape
    shape = output_shape(batch, width, bias.shape)
    check_contiguous("index", index, (batch, height, width), _INT32, queue)
    check_contiguous("sums", sums, (batch, width), accumulator(input.dtype), queue)
    out = _output(queue, out, shape, input.dtype)
    values = queue.empty((batch, height, width), accumulator(input.dtype))
    _channel_min(queue, input, values, index)
    _sum_gelu_add(queue, values, bias, sums, out)
    return out


@repeatable
def channel_min(input, *, values=None, index=None, stream=None):
    """Minimum over the channels of (N, C, H, W), as torch.min: the first of equals, NaN before everything.

    Returns:
        values: (N, H, W) in the accumulator's dtype.
        index: (N, H, W) int32, the channel of the minimum.
    """
    queue = queue_of(stream, input=input)
    check_input(input.shape)
    batch, _, height, width = input.shape
    dtype = accumulator(input.dtype)
    values = queue.empty((batch, height, width), dtype) if values is None else values
    index = queue.empty((batch, height, width), _INT32) if index is None else index
    check_contiguous("values", values, (batch, height, width), dtype, queue)
    check_contiguous("index", index, (batch, height, width), _INT32, queue)
    _channel_min(queue, input, values, index)
    return values, index


@repeatable
def sum_gelu_add(values, bias, *, out=None, sums=None, stream=None):
    """gelu(sum over H of values) + bias, for values (N, H, W) in the accumulator's dtype of the bias's.

    The second half of `min_sum_gelu_add`, which see for `out`, `sums` and the result.
    """
    queue = queue_of(stream, bias=bias)
    if values.ndim != 3:
        raise RuntimeError(f"values: expected 3 dimensions (N, H, W), but got shape {tuple(values.shape)}")
    batch, _, width = values.shape
    dtype = accumulator(bias.dtype)
    check_contiguous("values", values, values.shape, dtype, queue)
    check_contiguous("sums", sums, (batch, width), dtype, queue)
    out = _output(queue, out, output_shape(batch, width, bias.shape), bias.dtype)
    _sum_gelu_add(queue, values, bias, sums, out)
    return out


@repeatable
def sum_gradient(grad_output, sums, *, out=None, stream=None):
    """The gradient for the sums, (N, W), from the gradient for the output and the sums that the forward pass kept.

    Sums `grad_output` over everything that the bias enlarged and multiplies by GELU's derivative; accumulator's dtype.
    """
    queue = queue_of(stream, grad_output=grad_output)
    dtype = accumulator(grad_output.dtype)
    check_contiguous("sums", sums, sums.shape, dtype, queue)
    batch, width = sums.shape
    check_broadcast(grad_output.shape, (batch, 1, 1, width), "sums")
    out = queue.empty(sums.shape, dtype) if out is None else out
    check_contiguous("out", out, sums.shape, dtype, queue)
    axes = _broadcast_axes(grad_output.shape, (batch, 1, 1, width))
    reduce(queue, grad_output, axes, out.reshape(batch * width), x=sums)
    return out


@repeatable
def bias_gradient(grad_output, bias_shape, *, out=None, stream=None):
    """The gradient for the bias: the sum of `grad_output` over the dimensions along which the bias was repeated."""
    queue = queue_of(stream, grad_output=grad_output)
    bias_shape = tuple(bias_shape)
    check_broadcast(grad_output.shape, bias_shape, "bias")
    out = _output(queue, out, bias_shape, grad_output.dtype)
    reduce(queue, grad_output, _broadcast_axes(grad_output.shape, bias_shape), out)
    return out


@repeatable
def input_gradient(grad_sum, index, shape, dtype, *, out=None, stream=None):
    """The gradient for the input: grad_sum[n, w] at channel index[n, h, w], zero at all others.

    Args:
        grad_sum: (N, W), accumulator's dtype; see `sum_gradient`.
        index: (N, H, W) int32.
        shape: of the input, (N, C, H, W).
        dtype: of the input.
        out: array for the result, dense in any order of dimensions; default contiguous.
    """
    dtype = np.dtype(dtype)
    queue = queue_of(stream, grad_sum=grad_sum)
    check_input(shape)
    batch, channels, height, width = shape
    check_contiguous("grad_sum", grad_sum, (batch, width), accumulator(dtype), queue)
    check_contiguous("index", index, (batch, height, width), _INT32, queue)
    out = _output(queue, out, shape, dtype)
    strides = element_strides(out)
    axes = by_stride((batch, height, width), _without_channels(strides), (height * width, width, 1), (width, 0, 1))
    pixels = index_space(*axes)
    kernel, share, vector = _spread_plan(dtype, pixels, strides[1], channels, pointer(out))
    packs = pixels[2] // (16 // dtype.itemsize if vector else 1)
    blocks = -(-packs // _THREADS) * share if kernel is _spread_planes_kernel else -(-pixels[2] * share // _THREADS)
    kernel(dtype).launch(
        queue,
        blocks,
        output=pointer(out),
        grad=pointer(grad_sum),
        index=pointer(index),
        pixels=pixels,
        channel_stride=strides[1],
        channels=channels,
        share=share,
        vector=vector,
        unused=0,
    )
    return out


def reduce(queue, array, axes, output, x=None):
    """Sums `array` over `axes` into `output`, in double and in a fixed order; times GELU's derivative at x if given.

    Args:
        axes: to sum over. What is kept, in order, has as many elements as `output`.
        output: its dimensions, without those of size 1, are the kept ones; one-dimensional if x is given.
        x: contiguous array with output's dtype and number of elements, or None.
    """
    shape, strides = array.shape, element_strides(array)
    kept_axes = [axis for axis in range(array.ndim) if axis not in axes and shape[axis] != 1]
    kept_shape = tuple(shape[axis] for axis in kept_axes)
    kept_strides = tuple(strides[axis] for axis in kept_axes)
    if x is None:
        places = [step for size, step in zip(output.shape, element_strides(output), strict=True) if size != 1]
    else:
        places = contiguous_strides(kept_shape)
    reduced = by_stride([shape[axis] for axis in axes], [strides[axis] for axis in axes])
    kept, reduced_space = index_space(kept_shape, kept_strides, places), index_space(*reduced)
    along_reduced = kept[2] < 64 or _smallest(*reduced) < _smallest(kept_shape, kept_strides)
    share = _power_of_two(reduced_space[2], _THREADS if along_reduced else 8)
    bundles = -(-kept[2] // (_THREADS // share))
    slices, slice_length = _slices(reduced_space[2], share, bundles)
    dtypes = (array.dtype, output.dtype, x is not None)
    if slices > 1:
        partial = queue.empty((slices, kept[2]), _FLOAT64)
        dtypes = (array.dtype, _FLOAT64, False)
        kept = index_space(kept_shape, kept_strides, contiguous_strides(kept_shape))
    _reduce_kernel(*dtypes).launch(
        queue,
        bundles * slices,
        input=pointer(array),
        output=pointer(output if slices == 1 else partial),
        x=pointer(x) if slices == 1 else 0,
        kept=kept,
        reduced=reduced_space,
        slices=slices,
        slice_length=slice_length,
        share=share,
        along_reduced=along_reduced,
    )
    if slices > 1:
        reduce(queue, partial.reshape(slices, *kept_shape), (0,), output, x)


def check_broadcast(shape, operand_shape, name):
    """Raises RuntimeError unless the operand broadcasts to `shape`."""
    missing = len(shape) - len(operand_shape)
    fits = missing >= 0 and all(n in (1, shape[missing + i]) for i, n in enumerate(operand_shape))
    if not fits:
        raise RuntimeError(
            f"grad_output has shape {tuple(shape)}, to which {name} of shape {tuple(operand_shape)} does not broadcast"
        )


def check_contiguous(name, array, shape, dtype, queue):
    """Raises RuntimeError unless the array (None is fine) is what a kernel expects that knows no strides."""
    if array is None:
        return
    if tuple(array.shape) != tuple(shape) or array.dtype != dtype or not array.flags.c_contiguous:
        raise RuntimeError(
            f"{name}: expected a contiguous {np.dtype(dtype).name} array of shape {tuple(shape)}, but got "
            f"{array.dtype.name} of shape {tuple(array.shape)} with strides {array.strides}"
        )
    if device_of(array) is not queue.device:
        raise RuntimeError(f"{name} is on {runtime.describe(array)}, another device than the other arrays")


def kernels():
    """Every instantiation, for the tests that compile them all."""
    for dtype in runtime.CPP_TYPES:
        for kernel in (_min_of_planes_kernel, _min_of_neighbours_kernel, _spread_planes_kernel):
            yield kernel(dtype)
        yield _spread_neighbours_kernel(dtype)
        yield _gelu_add_kernel(dtype)
    reductions = set()
    for dtype, gelu in product(runtime.CPP_TYPES, (False, True)):
        output = accumulator(dtype) if gelu else dtype
        reductions |= {(dtype, output, gelu), (dtype, _FLOAT64, False), (_FLOAT64, output, gelu)}
        reductions |= {(accumulator(dtype), accumulator(dtype), False), (accumulator(dtype), dtype, False)}
    for reduction in sorted(reductions, key=str):
        yield _reduce_kernel(*reduction)


def _channel_min(queue, input, values, index):
    batch, channels, height, width = input.shape
    strides = element_strides(input)
    axes = by_stride((batch, height, width), _without_channels(strides), (height * width, width, 1))
    pixels = index_space(*axes)
    wide = 16 // input.dtype.itemsize
    if _channels_are_neighbours(pixels, strides[1]):
        vector = _are_channels_packs(input.dtype, pixels, strides[1], channels, pointer(input))
        share = _lanes(-(-channels // (wide if vector else 1)), pixels[2])
        kernel, per_block = _min_of_neighbours_kernel, _THREADS // share
    else:
        vector = _are_pixels_packs(input.dtype, pixels, strides[1], pointer(input))
        share = max(1, _power_of_two(channels // 4 + 1, 16) // 2)
        if not vector:  # each share locates its pixels anew and waits for the others: no more than fill any GPU
            share = min(share, _power_of_two(-(-_MANY_THREADS * wide // max(1, pixels[2])), share))
        kernel, per_block = _min_of_planes_kernel, _THREADS // share * wide
    kernel(input.dtype).launch(
        queue,
        -(-pixels[2] // per_block),
        input=pointer(input),
        values=pointer(values),
        index=pointer(index),
        pixels=pixels,
        channel_stride=strides[1],
        channels=channels,
        share=share,
        vector=vector,
        unused=0,
    )


def _sum_gelu_add(queue, values, bias, sums, out):
    if out.size == 0 and sums is None:
        return
    batch, _, width = values.shape
    sums = queue.empty((batch, width), values.dtype) if sums is None else sums
    reduce(queue, values, (1,), sums)
    x_strides = broadcast_strides((batch, 1, 1, width), (width, 0, 0, 1), out.shape)
    bias_strides = broadcast_strides(bias.shape, element_strides(bias), out.shape)
    _gelu_add_kernel(out.dtype).launch(
        queue,
        -(-out.size // _THREADS),
        output=pointer(out),
        x=pointer(sums),
        bias=pointer(bias),
        space=index_space(out.shape, element_strides(out), x_strides, bias_strides),
    )


def _spread_plan(dtype, pixels, channel_stride, channels, address):
    """The kernel that writes the input's gradient, its `share`, and whether it stores 16 bytes at a time."""
    if _channels_are_neighbours(pixels, channel_stride):
        vector = _are_channels_packs(dtype, pixels, channel_stride, channels, address)
        packs = -(-channels // (16 // dtype.itemsize if vector else 1))
        return _spread_neighbours_kernel, _lanes(packs, pixels[2]), vector
    return _spread_planes_kernel, -(-channels // 32), _are_pixels_packs(dtype, pixels, channel_stride, address)


def _are_pixels_packs(dtype, pixels, channel_stride, address):
    """Whether packs of 16 bytes along the fastest pixel dimension are whole and aligned in the first array."""
    wide = 16 // dtype.itemsize
    sizes, strides, _, dims, _ = pixels
    steps = [*strides[0][: dims - 1], channel_stride]
    whole = strides[0][dims - 1] == 1 and sizes[dims - 1] % wide == 0
    return whole and address % 16 == 0 and all(step % wide == 0 for step in steps)


def _are_channels_packs(dtype, pixels, channel_stride, channels, address):
    """Whether packs of 16 bytes along the channels are whole and aligned in the first array."""
    wide = 16 // dtype.itemsize
    whole = channel_stride == 1 and channels % wide == 0
    return whole and address % 16 == 0 and all(step % wide == 0 for step in pixels[1][0])


def _channels_are_neighbours(pixels, channel_stride):
    """Whether lanes should walk along the channels: they lie closer than the pixels of the first array do."""
    return abs(channel_stride) <= min((abs(step) for step in pixels[1][0] if step), default=0)


def _without_channels(strides):
    return strides[0], strides[2], strides[3]


def _lanes(packs, pixels):
    """Lanes that share a pixel: a power of two, a whole warp only where there are few pixels."""
    return _power_of_two(packs // 2 + 1, 8 if pixels >= 1 << 14 else 32)


def _power_of_two(value, limit):
    """The smallest power of two that is at least `value`, at most `limit`."""
    return min(limit, 1 << max(0, value - 1).bit_length())


def _smallest(shape, strides):
    """The smallest distance in memory between neighbours along any dimension."""
    return min((abs(step) for size, step in zip(shape, strides, strict=True) if size > 1), default=math.inf)


def _slices(length, share, bundles):
    """How many slices a reduction is cut into, and their length."""
    if length <= _LONG_SUM * share or bundles == 0:
        return 1, length
    slices = max(1, min(-(-_MANY_BLOCKS // bundles), -(-length // (share * _LONG_SUM // 2))))
    slice_length = -(-length // slices)
    return -(-length // slice_length), slice_length


def _broadcast_axes(shape, operand_shape):
    """The axes of `shape` along which an operand of `operand_shape` was repeated."""
    missing = len(shape) - len(operand_shape)
    repeated = [i for i, n in enumerate(operand_shape, missing) if n == 1 and shape[i] != 1]
    return (*range(missing), *repeated)


def _output(queue, out, shape, dtype):
    out = queue.empty(shape, dtype) if out is None else out
    check_out(out, shape, dtype, queue.device)
    return out


def _kernel(name, type, params):
    return Kernel(name, "min_sum_gelu_add.cu", type, _THREADS, params)


@functools.cache
def _min_of_planes_kernel(dtype):
    return _kernel("channel_min_of_planes", f"MinOfPlanes<{cpp_type(dtype)}>", _MIN)


@functools.cache
def _min_of_neighbours_kernel(dtype):
    return _kernel("channel_min_of_neighbours", f"MinOfNeighbours<{cpp_type(dtype)}>", _MIN)


@functools.cache
def _reduce_kernel(input, output, gelu):
    types = f"{cpp_type(input)}, {cpp_type(output)}, {str(gelu).lower()}"
    return _kernel("sum_times_gelu_derivative" if gelu else "sum_of_axes", f"Reduce<{types}>", _REDUCE)


@functools.cache
def _gelu_add_kernel(dtype):
    return _kernel("gelu_add", f"GeluAdd<{cpp_type(dtype)}>", _GELU_ADD)


@functools.cache
def _spread_planes_kernel(dtype):
    return _kernel("channel_min_gradient_planes", f"SpreadPlanes<{cpp_type(dtype)}>", _SPREAD)


@functools.cache
def _spread_neighbours_kernel(dtype):
    return _kernel("channel_min_gradient_neighbours", f"SpreadNeighbours<{cpp_type(dtype)}>", _SPREAD)
