"""The weight gradient on tensor cores: plan, kernels and launch of cuda/conv_transpose2d/weight_gradient_taps.cu."""

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np

from .. import runtime
from ..runtime import Kernel, bfloat16, cpp_type, element_strides, pointer
from .block_math import uses_tensor_cores

_PARAMS = runtime.params(
    ("input", "u8"),
    ("grad_output", "u8"),
    ("partial", "u8"),
    ("in_strides", "i8", 4),
    ("out_strides", "i8", 4),
    ("next", "i8", 2),
    ("apart", "i8", 2),
    ("row_pixels", "i8"),
    ("slices", "i8"),
    ("units", "i8"),
    ("slice_units", "i8"),
    ("in_size", "i4", 2),
    ("out_size", "i4", 2),
    ("kernel", "i4", 2),
    ("stride", "i4", 2),
    ("padding", "i4", 2),
    ("dilation", "i4", 2),
    ("groups", "i4"),
    ("rows", "i4"),
    ("columns", "i4"),
    ("strip_width", "i4"),
    ("tap_step", "i4"),
    ("row_step", "i4"),
    ("classes", "i4"),
    ("chunks", "i4"),
    ("chunk_rows", "i4"),
    ("row_tiles", "i4"),
    ("column_tiles", "i4"),
    ("tap_tiles", "i4", 2),
    ("tile_taps", "i4"),
    ("tile_channels", "i4"),
    ("inverse", "i4"),
)

#: The element types that tensor cores multiply.
DTYPES = (np.dtype("float32"), np.dtype("float16"), bfloat16)

#: How a warpgroup multiplies (weight_gradient_products.cuh): by mma.sync, by wgmma (sm_90a), by wgmma in full float32.
WARP, WARPGROUP, SPLIT = "WarpProducts", "WarpgroupProducts", "SplitWarpgroupProducts"

#: Longest sum of products that one block forms before partial sums are combined in double, in pixels.
SLICE_PIXELS = 16384
#: Memory that the partial sums may take, in bytes; larger weights get fewer, longer slices.
_PARTIAL_BYTES = 1 << 28
#: A slice of fewer steps than this is mostly beginning and end.
_SLICE_STEPS = 16
#: Chunks of the rows of an image that are tried.
_MOST_CHUNKS = 32
#: Rows of channels that a warpgroup multiplies; bytes of a staged row.
_ROWS, _ROW_BYTES = 64, 128
#: Pixels that the last tap of a window may lie beyond the first: a window has 64 words.
_WINDOW = 32
#: What one multiprocessor of an H200 does in a clock: words of depth times products; bytes between registers, L1 and
#: shared memory; bytes from the L2 cache.
_PRODUCTS, _SHARED_BYTES, _L2_BYTES = 1024, 128, 27


@dataclass(frozen=True)
class Block:
    """One shape of a block: see WeightGradientTaps.

    Attributes:
        products: WARP, WARPGROUP or SPLIT.
        warpgroups, columns, spread: kWarpgroups, kColumns, kSpread.
    """

    products: str
    warpgroups: int
    columns: int
    spread: int

    @property
    def taps(self):
        return self.warpgroups // self.spread

    @property
    def rows(self):
        return _ROWS * self.spread

    @property
    def threads(self):
        return 128 * self.warpgroups

    @property
    def resident(self):
        """Blocks that are on a multiprocessor at a time, as their registers allow."""
        return 2 if self.threads * (self.columns // 2 * self.parts + 70) <= 32768 else 1

    @property
    def parts(self):
        """Of a value that is staged."""
        return 2 if self.products == SPLIT else 1

    def cpp(self, dtype):
        arguments = f"{self.columns}" if self.products == SPLIT else f"{cpp_type(dtype)}, {self.columns}"
        return f"{self.products}<{arguments}>, {self.warpgroups}, {self.spread}"

    def shared_bytes(self, pixels):
        stages = 2 if self.products == WARP else 3
        tiles = (stages * self.columns + (self.taps + stages - 1) * self.rows) * self.parts
        strips, rows = 2 * 2 * pixels * 12, 2 * 80
        return -(-(tiles * _ROW_BYTES + strips + rows) // 1024) * 1024


#: Warpgroups, columns, spread: three row taps of kernels of width 3, or of any width; two of even widths; and where
#: there is one row tap, two tiles of input channels.
_SHAPES = ((3, 192, 1), (3, 96, 1), (3, 48, 1), (2, 256, 1), (2, 128, 1), (2, 64, 1), (2, 256, 2), (2, 128, 2))
#: How threads share out what is staged; see weight_gradient_staging.cuh.
PIXELS, CHANNELS, WINDOWS = "AlongPixels", "AlongChannels", "AlongWindows"
#: For kernels of some widths, by (width, stride): where rows are whole, and for any rows.
ALL_TAPS = {
    (3, 1): "AlongThreeTaps<kWholeRows>",
    **{(width, 2): f"AlongTapsStride2<kWholeRows, {width}>" for width in (2, 3, 4)},
}
ANY_ROWS = {
    (3, 1): "AlongThreeTaps<kAnyRows>",
    **{(width, 2): f"AlongTapsStride2<kAnyRows, {width}>" for width in (3, 4)},
}
_WIDTHS = {share: width for shares in (ALL_TAPS, ANY_ROWS) for (width, _), share in shares.items()}
#: Any rows are staged so where their strips are no longer than this, times the rows: a step takes two thirds of what it
#: takes along pixels, where rows of all images share strips, or 16-bit values half.
_MOST_WASTE = {4: 1.4, 2: 1.8}
SHARES = PIXELS, CHANNELS, WINDOWS, *_WIDTHS
#: Rows of x that a lane has in UnitRows lie so far apart, others as far as there are warps.
_UNIT_ROWS = 32


@functools.cache
def blocks(itemsize, products, share):
    """The blocks there are: those whose values fit into registers and shared memory; 16-bit values are not split."""
    too_large = set()
    if products == WARP:
        too_large |= {(3, 192, 1), (2, 256, 2)}
    if products == SPLIT:
        too_large |= {(3, 192, 1), (2, 256, 1), (2, 256, 2)} if itemsize == 4 else set(_SHAPES)
    if share == PIXELS and itemsize == 2:
        too_large |= {(3, 192, 1), (2, 256, 2)}
    if share == ANY_ROWS[3, 2] and itemsize == 2:
        too_large |= {(3, 192, 1)}
    if share == WINDOWS:
        too_large |= {shape for shape in _SHAPES if shape[2] > 1}  # they have one row tap, and 1 x 1 kernels no window
    if width := _WIDTHS.get(share):
        too_large |= {shape for shape in _SHAPES if (shape[0] == 3) != (width == 3)}  # kernels are squares mostly
    return tuple(Block(products, *shape) for shape in _SHAPES if shape not in too_large)


@dataclass(frozen=True)
class TapsPlan:
    """How weight_gradient_taps.cu computes a geometry's weight gradient."""

    block: Block
    tile_taps: int
    tile_channels: int
    strip_width: int
    tap_step: int
    row_step: int
    tap_tiles: tuple
    row_tiles: int
    column_tiles: int
    classes: int
    chunks: int
    chunk_rows: int
    units: int
    slice_units: int
    slices: int

    @property
    def tiles(self):
        """Blocks of one slice and group."""
        return math.prod(self.tap_tiles) * self.row_tiles * self.column_tiles


def products_for(geometry, dtype, precision, arch):
    """How tensor cores multiply a geometry's values; None if they do not: channels too few to fill them, float64, or
    full float32 elsewhere than on Hopper."""
    if min(geometry.depth_and_rows(True)) < 16 or geometry.batch == 0:
        return None
    if uses_tensor_cores(dtype, precision):
        return WARPGROUP if arch == "sm_90a" else WARP
    return SPLIT if dtype == np.float32 and arch == "sm_90a" else None


def share_of(geometry, input, grad_output):
    """What is neighbours in the memory of both arrays, and so how a tile is staged."""
    strides = element_strides(input), element_strides(grad_output)
    arrays = tuple(zip((input, grad_output), strides, strict=True))
    if all(step[1] == 1 and _whole_words(array, step, 1) for array, step in arrays):
        return CHANNELS
    if not all(step[3] == 1 for step in strides):
        return PIXELS
    whole = _whole_rows(geometry, arrays)
    taps = (geometry.kernel[1], geometry.stride[1]) if geometry.dilation[1] == 1 else None
    if taps in ALL_TAPS and whole and _whole_units(input, strides[0]):
        return ALL_TAPS[taps]
    longest = _MOST_WASTE[input.itemsize] * geometry.input_size[1]
    if taps in ANY_ROWS and _strip_width(geometry, input.itemsize) <= longest:
        return ANY_ROWS[taps]
    is_window = geometry.stride[1] == 1 and geometry.kernel[1] > 1 and geometry.dilation[1] <= _WINDOW
    return WINDOWS if whole and is_window else PIXELS


def _whole_rows(geometry, arrays):
    """Whether rows of x are whole strips, and 16-bit pixels of both arrays lie in words."""
    input = arrays[0][0]
    whole_words = input.itemsize == 4 or geometry.output_size[1] % 2 == 0
    whole_strips = _strip_width(geometry, input.itemsize) == geometry.input_size[1]
    return whole_words and whole_strips and all(_whole_words(array, step, 3) for array, step in arrays)


def _strip_width(geometry, itemsize):
    """Pixels of the strips that a row of x takes."""
    pixels = _ROW_BYTES // itemsize
    return -(-geometry.input_size[1] // pixels) * pixels


def _whole_units(array, strides):
    """Whether 16 bytes of neighbouring pixels, counted from a row's first, lie at a multiple of 16 bytes."""
    return all(number * array.itemsize % 16 == 0 for number in (pointer(array) // array.itemsize, *strides[:3]))


def _whole_words(array, strides, axis):
    """Whether elements 2 i and 2 i + 1 along this axis, where they are neighbours, lie in one aligned word of 4 bytes.

    Always true of 32-bit elements.
    """
    others = [stride for i, stride in enumerate(strides) if i != axis]
    even = (array.shape[axis], pointer(array) // array.itemsize, *others)
    return array.itemsize == 4 or all(number % 2 == 0 for number in even)


@functools.lru_cache(maxsize=4096)
def taps_plan(geometry, itemsize, products, share, multiprocessors):
    """The plan for a geometry and 16- or 32-bit elements."""
    candidates = [
        (block, taps) for block in blocks(itemsize, products, share) for taps in _tile_taps(geometry, block, share)
    ]
    block, tile_taps = min(candidates, key=lambda candidate: _cost(geometry, *candidate))
    strip_width = _strip_width(geometry, itemsize) if share in ANY_ROWS.values() else geometry.input_size[1]
    return _sliced(geometry, block, tile_taps, strip_width, _ROW_BYTES // itemsize, multiprocessors)


def _tile_taps(geometry, block, share):
    """The numbers of column taps that a tile can have."""
    for taps in range(1, min(geometry.kernel[1], block.columns // 16) + 1):
        channels = block.columns // taps
        if block.columns % (16 * taps) or channels % (block.columns // (4 * block.warpgroups)):
            continue  # a warp's rows must be of one tap
        if _WIDTHS.get(share, taps) != taps:
            continue
        if share == WINDOWS and not (taps > 1 and (taps - 1) * geometry.dilation[1] <= _WINDOW):
            continue
        yield taps


def _tiling(geometry, block, tile_taps):
    """(steps between the row taps of a block, tiles of row taps, of column taps, of input and output channels)."""
    step = geometry.stride[0] // math.gcd(geometry.stride[0], geometry.dilation[0])
    classes = min(step, geometry.kernel[0])
    in_channels, out_channels = geometry.in_channels // geometry.groups, geometry.out_channels // geometry.groups
    return (
        step,
        classes * -(-geometry.kernel[0] // (step * block.taps)),
        -(-geometry.kernel[1] // tile_taps),
        -(-in_channels // block.rows),
        -(-out_channels // (block.columns // tile_taps)),
    )


def _cost(geometry, block, tile_taps):
    """Clocks of a multiprocessor for one step of all blocks of a slice.

    The tensor cores, shared memory or the L2 cache sets the pace; a warpgroup without a tap costs nothing.
    """
    _, tap_tiles_h, tap_tiles_w, row_tiles, column_tiles = _tiling(geometry, block, tile_taps)
    tiles = tap_tiles_h * tap_tiles_w * row_tiles * column_tiles
    used = geometry.kernel[0] * tap_tiles_w * row_tiles * block.spread * column_tiles  # products of warpgroups
    used *= 2 * block.parts - 1  # of two parts, three products
    products = used * _ROWS * block.columns * 32 / _PRODUCTS
    read = used * (_ROWS + block.columns) + (1 + block.parts) * tiles * (block.rows + block.columns)
    distinct = block.columns // tile_taps * min(geometry.stride[1], 8) + block.rows
    return max(products, read * _ROW_BYTES / _SHARED_BYTES, tiles * distinct * _ROW_BYTES / _L2_BYTES) + tiles * 100


def _sliced(geometry, block, tile_taps, strip_width, pixels, multiprocessors):
    """The plan with the slices that take least time: enough to fill the device and to keep sums short.

    Time is counted in steps of the busiest multiprocessor. Partial sums stay within the memory for them, if need be at
    the price of longer sums.
    """
    tap_step, *tap_tiles, row_tiles, column_tiles = _tiling(geometry, block, tile_taps)
    row_step = geometry.dilation[0] // math.gcd(geometry.stride[0], geometry.dilation[0])
    height = geometry.input_size[0]
    strips, classes, class_rows = (
        -(-geometry.batch * strip_width // pixels),
        min(row_step, height),
        -(-height // row_step),
    )
    tiles = math.prod(tap_tiles) * row_tiles * column_tiles * geometry.groups
    capacity = multiprocessors * block.resident
    affordable = max(1, _PARTIAL_BYTES // (4 * math.prod(geometry.weight_shape)))
    longest = max(1, strips * height // _SLICE_STEPS)
    first_rounds = -(-min(-(-strips * height * pixels // SLICE_PIXELS), affordable) * tiles // capacity)

    def choices():
        for wanted_chunks in range(1, max(1, min(class_rows // (4 * block.taps), _MOST_CHUNKS)) + 1):
            chunk_rows = -(-class_rows // wanted_chunks)
            units = strips * classes * -(-class_rows // chunk_rows)
            for rounds in range(first_rounds, first_rounds + 4):
                wanted = max(1, min(rounds * capacity // tiles, affordable, longest))
                slice_units = -(-units // wanted)
                slices = -(-units // slice_units)
                too_long = slice_units * chunk_rows * pixels > SLICE_PIXELS and slices < min(affordable, longest)
                steps = slice_units * (chunk_rows + block.taps - 1) + _SLICE_STEPS // 2
                yield too_long, -(-slices * tiles // capacity) * steps, slices, chunk_rows, slice_units, units

    *_, slices, chunk_rows, slice_units, units = min(choices())
    return TapsPlan(
        block=block,
        tile_taps=tile_taps,
        tile_channels=block.columns // tile_taps,
        strip_width=strip_width,
        tap_step=tap_step,
        row_step=row_step,
        tap_tiles=tuple(tap_tiles),
        row_tiles=row_tiles,
        column_tiles=column_tiles,
        classes=classes,
        chunks=-(-class_rows // chunk_rows),
        chunk_rows=chunk_rows,
        units=units,
        slice_units=slice_units,
        slices=slices,
    )


def launch(queue, input, grad_output, geometry, plan, share, partial):
    """Writes the partial sums (slices, weights) of float32 that `plan` says."""
    strides = element_strides(input), element_strides(grad_output)
    step_rows = plan.row_step, plan.row_step * geometry.stride[0]
    warps = plan.block.threads // 32
    lane_rows = _UNIT_ROWS if share in ALL_TAPS.values() else warps, warps
    _kernel(input.dtype, plan.block, share).launch(
        queue,
        plan.tiles * geometry.groups * plan.slices,
        input=pointer(input),
        grad_output=pointer(grad_output),
        partial=pointer(partial),
        in_strides=strides[0],
        out_strides=strides[1],
        next=[input.itemsize * rows * stride[2] for rows, stride in zip(step_rows, strides, strict=True)],
        apart=[input.itemsize * rows * stride[1] for rows, stride in zip(lane_rows, strides, strict=True)],
        row_pixels=geometry.batch * plan.strip_width,
        slices=plan.slices,
        units=plan.units,
        slice_units=plan.slice_units,
        in_size=geometry.input_size,
        out_size=geometry.output_size,
        kernel=geometry.kernel,
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        groups=geometry.groups,
        rows=geometry.in_channels // geometry.groups,
        columns=geometry.out_channels // geometry.groups,
        strip_width=plan.strip_width,
        tap_step=plan.tap_step,
        row_step=plan.row_step,
        classes=plan.classes,
        chunks=plan.chunks,
        chunk_rows=plan.chunk_rows,
        row_tiles=plan.row_tiles,
        column_tiles=plan.column_tiles,
        tap_tiles=plan.tap_tiles,
        tile_taps=plan.tile_taps,
        tile_channels=plan.tile_channels,
        inverse=-(-256 * 16 // plan.tile_channels),
    )


@functools.cache
def _kernel(dtype, block, share):
    return Kernel(
        "conv_transpose2d_weight_gradient_taps",
        "conv_transpose2d/weight_gradient_taps.cu",
        f"WeightGradientTaps<{block.cpp(dtype)}, {share}>",
        block.threads,
        _PARAMS,
        shared_bytes=block.shared_bytes(_ROW_BYTES // dtype.itemsize),
    )


def kernels():
    """Every instantiation, for the tests that compile them all."""
    for dtype, products in itertools.product(DTYPES, (WARP, WARPGROUP, SPLIT)):
        for share in SHARES:
            for block in blocks(dtype.itemsize, products, share):
                yield _kernel(dtype, block, share)
