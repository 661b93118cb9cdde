"""The weight gradient for few channels per group: plan and kernels of direct_tile_weight_gradient.cuh."""

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np

from .. import runtime
from ..runtime import Kernel, accumulator, bfloat16, cpp_type
from .conv_transpose2d_direct_tile import EXAMPLES, MOST_SHARED, THREADS, TileAxis, blocks_for, tile_axes
from .geometry import Geometry

DIRECT_TILE_WEIGHT_GRADIENT = runtime.params(
    ("input", "u8"),
    ("grad_output", "u8"),
    ("partial", "u8"),
    ("in_strides", "i8", 4),
    ("out_strides", "i8", 4),
    ("block_count", "i8"),
    ("tiles", "i8"),
    ("slice_tiles", "i8"),
    ("height", "i4", 8),
    ("width", "i4", 8),
    ("groups", "i4"),
    ("rows", "i4"),
    ("columns", "i4"),
    ("row_tiles", "i4"),
    ("column_tiles", "i4"),
    ("group_tiles", "i4"),
    ("width_tiles", "i4"),
    ("height_tiles", "i4"),
)

#: Sums of one thread, in 32-bit registers.
_SUM_REGISTERS = 49
#: Warps of a block with different weights.
_ROLES = 16
#: Blocks that a launch should have; most slices, which one thread adds up; most products of a
#: thread in one sum.
_BLOCKS, _SLICES, _SLICE_PRODUCTS = 4096, 128, 512


@dataclass(frozen=True)
class WeightGradientShape:
    """The template arguments of WeightGradientShape in direct_tile_weight_gradient.cuh, in order."""

    pixels: int
    width: int
    lines: int
    rows: int
    row_blocks: int
    columns: int
    column_blocks: int
    taps: int
    tap_blocks: int
    groups: int
    channels_last: bool
    min_blocks: int

    @property
    def threads(self):
        return self.width * self.lines * self.groups * self.row_blocks * self.column_blocks * self.tap_blocks

    @property
    def cpp(self):
        first = (self.pixels, self.width, self.lines, self.rows, self.row_blocks, self.columns, self.column_blocks)
        last = (self.taps, self.tap_blocks, self.groups, str(self.channels_last).lower(), self.min_blocks)
        return f"WeightGradientShape<{', '.join(map(str, first + last))}>"


@dataclass(frozen=True)
class WeightGradientPlan:
    """How a kernel compiled for one shape computes a geometry's weight gradient.

    Attributes:
        shape: its template arguments, in order.
        row_tiles, column_tiles, group_tiles: blocks for all channels of x, of gy, and groups.
        width_tiles, height_tiles: rectangles of an image; tiles: of all images; slice_tiles: of a slice of them.
    """

    dtype: np.dtype
    shape: object
    height_axis: TileAxis
    width_axis: TileAxis
    row_tiles: int
    column_tiles: int
    group_tiles: int
    width_tiles: int
    height_tiles: int
    tiles: int
    slice_tiles: int

    @property
    def slices(self):
        return -(-self.tiles // self.slice_tiles)

    @property
    def blocks(self):
        return self.slices * self.row_tiles * self.column_tiles * self.group_tiles

    @property
    def arguments(self):
        return f"{cpp_type(self.dtype)}, {self.height_axis.cpp}, {self.width_axis.cpp}, {self.shape.cpp}"

    @property
    def shared_bytes(self):
        """Shared memory that is asked for at launch."""
        return 0


class TileWeightGradientPlan(WeightGradientPlan):
    """Of direct_tile_weight_gradient.cuh."""

    struct = "DirectTileWeightGradient"


@functools.lru_cache(maxsize=4096)
def weight_gradient_kernel(plan):
    """The kernel of a WeightGradientPlan."""
    file, type = "conv_transpose2d/direct_weight_gradient.cu", f"{plan.struct}<{plan.arguments}>"
    name, threads = "conv_transpose2d_direct_weight_gradient", plan.shape.threads
    return Kernel(name, file, type, threads, DIRECT_TILE_WEIGHT_GRADIENT, shared_bytes=plan.shared_bytes)


@functools.lru_cache(maxsize=4096)
def tile_weight_gradient_plan(geometry, dtype, channels_last):
    """The plan for a geometry, element type and order of memory; None if nothing fits into shared memory."""
    axes = tile_axes(geometry, False)
    rows, columns = geometry.in_channels // geometry.groups, geometry.out_channels // geometry.groups
    shape = _shape(dtype, *axes, rows, columns, geometry.groups, channels_last)
    if shape is None:
        return None
    row_tiles = -(-rows // (shape.rows * shape.row_blocks))
    column_tiles = -(-columns // (shape.columns * shape.column_blocks))
    group_tiles = -(-geometry.groups // shape.groups)
    width_tiles = -(-geometry.input_size[1] // shape.width)
    height_tiles = -(-geometry.input_size[0] // (shape.lines * shape.pixels))
    tiles = geometry.batch * width_tiles * height_tiles
    slices = min(_SLICES, -(-_BLOCKS // (row_tiles * column_tiles * group_tiles)))
    slice_tiles = max(1, min(-(-tiles // slices), max(-(-tiles // _SLICES), _SLICE_PRODUCTS // shape.pixels)))
    return TileWeightGradientPlan(
        dtype, shape, *axes, row_tiles, column_tiles, group_tiles, width_tiles, height_tiles, tiles, slice_tiles
    )


def _shape(dtype, height, width, rows, columns, groups, channels_last):
    """The shape with the fewest instructions whose tiles fit; None if there is none."""
    for pixels in (8, 4, 2, 1) if height.period == 1 else (4, 2, 1):
        own = _own(dtype, height, width, rows, columns, pixels)
        if own is None:
            return None
        own_rows, own_columns, taps = own
        tap_blocks = -(-width.kernel // taps)
        row_blocks = min(-(-rows // own_rows), max(1, _ROLES // tap_blocks))
        column_blocks = min(-(-columns // own_columns), max(1, _ROLES // (tap_blocks * row_blocks)))
        while row_blocks:
            roles = (own_rows, row_blocks, own_columns, column_blocks, taps, tap_blocks)
            for tile in _tiles(math.prod(roles[1::2]), groups, channels_last):
                if shape := _fitting_shape(dtype, height, width, pixels, *tile, roles, channels_last):
                    return shape
            if column_blocks > 1:
                column_blocks //= 2
            else:
                row_blocks //= 2
    return None


def _own(dtype, height, width, rows, columns, pixels):
    """(channels of x, channels of gy, columns of the kernel) of one thread, with the fewest instructions a product."""
    registers = _SUM_REGISTERS // (2 if dtype == np.float64 else 1)

    def cost(own):
        own_rows, own_columns, taps = own
        padded = math.prod(-(-n // m) * m for n, m in zip((rows, columns, width.kernel), own, strict=True))
        loads = own_rows * pixels + own_columns * taps * height.extent(pixels)
        return padded * (1 + loads / (math.prod(own) * height.kernel * pixels))

    candidates = [
        own
        for own in itertools.product(range(1, min(rows, 4) + 1), range(1, columns + 1), range(1, width.kernel + 1))
        if math.prod(own) * height.kernel <= registers
    ]
    return min(candidates, key=cost, default=None)


def _fitting_shape(dtype, height, width, pixels, groups, tile_width, lines, roles, channels_last):
    """The shape, or None if its two stages do not fit into shared memory, or its sums into registers."""
    own_rows, row_blocks, own_columns, column_blocks, taps, tap_blocks = roles
    outputs = lines * pixels
    x = row_blocks * own_rows * outputs * tile_width
    y = column_blocks * own_columns * height.extent(outputs) * width.row_length(tile_width)
    threads = groups * tile_width * lines * row_blocks * column_blocks * tap_blocks
    bytes = 2 * accumulator(dtype).itemsize * groups * (x + y + 2)
    if bytes > MOST_SHARED - 1024 or threads > 1024:
        return None
    values = 1.15 * own_rows * own_columns * taps * height.kernel + own_rows * pixels + height.extent(pixels)
    blocks = blocks_for(dtype, channels_last, values, threads)
    return WeightGradientShape(pixels, tile_width, lines, *roles, groups, channels_last, blocks) if blocks else None


def _tiles(roles, groups, channels_last):
    """(groups, width, lines) of a block, the best first: whole warps for each role."""
    own_groups = min(32, 1 << (groups - 1).bit_length()) if channels_last else 1
    while own_groups:
        tile_width = 32 // own_groups if own_groups < 8 else 8
        lines = max(1, THREADS // (own_groups * tile_width * roles))
        while lines:
            if own_groups * tile_width * lines % 32 == 0:
                yield own_groups, tile_width, lines
            lines //= 2
        own_groups //= 2


def kernels():
    """Every instantiation of the examples, for the tests that compile them all; one stands for those in bfloat16."""
    for dtype in runtime.CPP_TYPES:
        for example in EXAMPLES[:1] if dtype == bfloat16 else EXAMPLES:
            for channels_last in (False, True):
                yield weight_gradient_kernel(tile_weight_gradient_plan(Geometry.of(*example), dtype, channels_last))
