"""The weight gradient of the transposed convolution on arrays: its plan, its kernels, its launch."""

import functools
import math
from dataclasses import dataclass

import numpy as np

from .. import runtime
from ..runtime import Kernel, check_out, cpp_type, element_strides, pointer, queue_of
from . import block_math
from . import conv_transpose2d_direct as direct
from . import conv_transpose2d_weight_gradient_taps as taps
from .block_math import BlockMath, check_precision
from .geometry import check_shape
from .layout import is_channels_last
from .repeat import repeatable

WEIGHT_GRADIENT = runtime.params(
    ("input", "u8"),
    ("grad_output", "u8"),
    ("partial", "u8"),
    ("in_strides", "i8", 4),
    ("out_strides", "i8", 4),
    ("pixels", "i8"),
    ("slice_pixels", "i8"),
    ("slices", "i8"),
    ("height", "i4", 8),
    ("width", "i4", 8),
    ("groups", "i4"),
    ("rows", "i4"),
    ("columns", "i4"),
    ("row_tiles", "i4"),
    ("column_tiles", "i4"),
)
SUM_SLICES = runtime.params(
    ("partial", "u8"),
    ("output", "u8"),
    ("slices", "i8"),
    ("elements", "i8"),
    ("row_stride", "i8"),
    ("column_stride", "i8"),
    ("tap_strides", "i8", 2),
    ("kernel_h", "i4"),
    ("kernel_w", "i4"),
    ("rows", "i4"),
    ("columns", "i4"),
)

#: Longest sum of products that one block forms before partial sums are combined in double.
_SLICE_PIXELS = 16384
#: Memory the weight gradient's partial sums may take, in bytes; larger weights get fewer, longer slices.
_PARTIAL_BYTES = 1 << 28
#: Threads that share the slices of one weight, where there are many.
_PARTS = 8


@repeatable
def weight_gradient(input, grad_output, geometry, *, precision=None, out=None, stream=None):
    """Gradient for the weight, (C_in, C_out / groups, kH, kW), from the input and grad_output.

    Deterministic: slices of the pixels are summed by blocks of their own and combined in a fixed order, in double.
    """
    queue = queue_of(stream, input=input, grad_output=grad_output)
    check_shape("input", input, geometry.input_shape)
    check_shape("grad_output", grad_output, geometry.output_shape)
    if out is None:
        out = queue.empty(geometry.weight_shape, input.dtype)
    check_out(out, geometry.weight_shape, input.dtype, queue.device)
    partial = _partials(queue, geometry, precision, input, grad_output)
    strides = element_strides(out)
    slices = partial.shape[0]
    parts = _PARTS if slices >= 4 * _PARTS else 1
    _sum_slices_kernel(out.dtype, parts).launch(
        queue,
        -(-out.size * parts // 256),
        partial=pointer(partial),
        output=pointer(out),
        slices=slices,
        elements=out.size,
        row_stride=strides[0],
        column_stride=strides[1],
        tap_strides=strides[2:],
        kernel_h=geometry.kernel[0],
        kernel_w=geometry.kernel[1],
        rows=geometry.in_channels // geometry.groups,
        columns=geometry.out_channels // geometry.groups,
    )
    return out


def _partials(queue, geometry, precision, input, grad_output):
    """The slices' partial sums, [slice][group][tap][row][column], in the accumulator's dtype.

    They come from the first family of kernels that serves the problem, for every caller the same:
    1. conv_transpose2d_direct: few channels per group, of which a large tile would be mostly padding. The smallest
       products of the tensor cores (conv_transpose2d_direct_matrix), or plain multiply-adds.
    2. conv_transpose2d_weight_gradient_taps, many taps from one staged tile: 16-bit types, and float32 in TF32 or, on
       Hopper, in full.
    3. weight_gradient.cu, one tap per block: everything.
    """
    dtype, device = input.dtype, queue.device
    arguments = geometry, dtype, precision, is_channels_last(input), device.multiprocessors
    if few := direct.direct_weight_gradient_plan(*arguments):
        return direct.weight_gradient_partials(queue, few, geometry, input, grad_output)
    weights = math.prod(geometry.weight_shape)
    if products := taps.products_for(geometry, dtype, check_precision(precision), device.arch):
        share = taps.share_of(geometry, input, grad_output)
        plan = taps.taps_plan(geometry, dtype.itemsize, products, share, device.multiprocessors)
        partial = queue.empty((plan.slices, weights), np.dtype("float32"))
        taps.launch(queue, input, grad_output, geometry, plan, share, partial)
        return partial
    plan = _plan(geometry, dtype, precision, device.multiprocessors)
    partial = queue.empty((plan.slices, weights), runtime.accumulator(dtype))
    _launch(queue, input, grad_output, geometry, plan, partial)
    return partial


def _launch(queue, input, grad_output, geometry, plan, partial):
    _product_kernel(plan.block).launch(
        queue,
        plan.blocks,
        input=pointer(input),
        grad_output=pointer(grad_output),
        partial=pointer(partial),
        in_strides=element_strides(input),
        out_strides=element_strides(grad_output),
        pixels=plan.pixels,
        slice_pixels=plan.slice_pixels,
        slices=plan.slices,
        height=geometry.axis(0, True),
        width=geometry.axis(1, True),
        groups=geometry.groups,
        rows=plan.rows,
        columns=plan.columns,
        row_tiles=plan.row_tiles,
        column_tiles=plan.column_tiles,
    )


@dataclass(frozen=True)
class WeightGradientPlan:
    """How weight_gradient.cu computes a geometry's weight gradient."""

    block: BlockMath
    rows: int
    columns: int
    row_tiles: int
    column_tiles: int
    pixels: int
    slice_pixels: int
    slices: int
    blocks: int


@functools.lru_cache(maxsize=4096)
def _plan(geometry, dtype, precision, multiprocessors):
    """Slices of pixels: enough to fill the device and to keep sums short, within the memory for partial sums."""
    rows, columns = geometry.in_channels // geometry.groups, geometry.out_channels // geometry.groups
    copies = math.prod(geometry.kernel) * geometry.groups
    pixels = geometry.batch * math.prod(geometry.input_size)
    candidates = block_math.weight_gradient_choices(dtype, check_precision(precision))
    # The slices fill the device, so what counts is the work of one slice.
    block = block_math.choose(candidates, rows, columns, copies, 1)
    row_tiles, column_tiles = -(-rows // block.rows), -(-columns // block.columns)
    to_fill = -(-4 * multiprocessors // (row_tiles * column_tiles * copies))
    to_keep_short = -(-pixels // _SLICE_PIXELS)
    affordable = max(1, _PARTIAL_BYTES // (8 * math.prod(geometry.weight_shape)))
    wanted = max(1, min(max(to_fill, to_keep_short), affordable, -(-pixels // 64)))
    slab = block.words * block.pack
    slice_pixels = max(1, -(-pixels // (wanted * slab))) * slab
    slices = -(-pixels // slice_pixels)
    return WeightGradientPlan(
        block, rows, columns, row_tiles, column_tiles, pixels, slice_pixels, slices,
        blocks=row_tiles * column_tiles * copies * slices,
    )  # fmt: skip


@functools.cache
def _product_kernel(block):
    file, type = "conv_transpose2d/weight_gradient.cu", f"WeightGradient<{block.type}>"
    return Kernel("conv_transpose2d_weight_gradient", file, type, block.threads, WEIGHT_GRADIENT)


@functools.cache
def _sum_slices_kernel(dtype, parts):
    file, type = "conv_transpose2d/weight_gradient.cu", f"SumSlices<{cpp_type(dtype)}, {parts}>"
    return Kernel("conv_transpose2d_sum_slices", file, type, 256, SUM_SLICES)


def kernels():
    """Every instantiation, for the tests that compile them all."""
    for (dtype, tensor_core), _ in block_math.all_choices():
        for block in block_math.weight_gradient_choices(dtype, "tf32" if tensor_core else "ieee"):
            yield _product_kernel(block)
        for parts in (1, _PARTS):
            yield _sum_slices_kernel(dtype, parts)
