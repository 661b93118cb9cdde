"""How cuda/conv_transpose2d/direct_tile.cuh cuts a problem into blocks: decided from shapes alone, once per shape."""

import functools
import math
from dataclasses import dataclass

import numpy as np

from .. import runtime
from ..runtime import cpp_type

DIRECT_TILE = runtime.params(
    ("input", "u8"),
    ("weight", "u8"),
    ("in_strides", "i8", 4),
    ("out_strides", "i8", 4),
    ("weight_strides", "i8", 5),
    ("blocks", "i8"),
    ("height", "i4", 8),
    ("width", "i4", 8),
    ("groups", "i4"),
    ("depth", "i4"),
    ("rows", "i4"),
    ("width_tiles", "i4"),
    ("height_tiles", "i4"),
    ("row_tiles", "i4"),
    ("group_tiles", "i4"),
    ("unused", "i4"),
)

#: A kernel compiled for one shape takes a second to compile, once; smaller problems (products of an input and a
#: weight) are done by the kernel for all shapes in less time than a launch takes.
MIN_PRODUCTS = 1 << 22

#: Threads that a block should have, and the most of them.
THREADS = 256
#: Sums of one thread, in 32-bit registers.
_SUM_REGISTERS = 60
#: Strides from which on a thread would not hold one output of each phase.
_MOST_PHASES = 16
#: Multiply-adds that are unrolled: the longest code that compiles in about a second.
_UNROLLED = 1600
#: Bytes of shared memory of a block: what it should stay below so that several fit, and what it must.
_SHARED, MOST_SHARED = 24 << 10, 48 << 10
#: Inputs that one thread may have under way at once.
_COPIES = 192
#: From this many products on, sums are formed in runs.
_LONG_SUM = 256


@dataclass(frozen=True)
class TileAxis:
    """One axis of TransposedAxis or ConvolutionAxis in direct_tile.cuh."""

    transposed: bool
    kernel: int
    stride: int
    dilation: int

    @property
    def cpp(self):
        kind = "TransposedAxis" if self.transposed else "ConvolutionAxis"
        return f"{kind}<{self.kernel}, {self.stride}, {self.dilation}>"

    @property
    def period(self):
        return self.stride // math.gcd(self.stride, self.dilation)

    @property
    def unit(self):
        """Outputs come in multiples of this many."""
        return self.stride if self.transposed else 1

    @property
    def idle(self):
        """One output in so many has taps."""
        return self.stride // self.period if self.transposed else 1

    @property
    def slots(self):
        """Taps of one output, at most."""
        return -(-self.kernel // self.period) if self.transposed else self.kernel

    def extent(self, outputs):
        """Inputs that this many neighbouring outputs need."""
        if self.transposed:
            return outputs // self.stride + (self.kernel - 1) * self.dilation // self.stride
        return (outputs - 1) * self.period + (self.kernel - 1) * self.dilation * self.period // self.stride + 1

    def staged(self, outputs):
        """Inputs that are staged for so many outputs of a row, wherever in a stride they begin."""
        return self.extent(outputs) + (self.transposed and self.stride > 1)

    def row_length(self, outputs):
        """Elements of a staged line."""
        if self.transposed:
            return self.staged(outputs) + (self.kernel % self.period != 0 or self.period != self.stride)
        return -(-self.extent(outputs) // self.period) * self.period


@dataclass(frozen=True)
class DirectShape:
    """The template arguments of DirectShape in direct_tile.cuh, in order."""

    depth: int
    rows: int
    pixels: int
    width: int
    lines: int
    row_blocks: int
    groups: int
    channels_last: bool
    in_runs: bool
    stages: int
    min_blocks: int

    @property
    def threads(self):
        return self.width * self.lines * self.row_blocks * self.groups

    @property
    def cpp(self):
        fields = (self.depth, self.rows, self.pixels, self.width, self.lines, self.row_blocks, self.groups)
        flags = (str(flag).lower() for flag in (self.channels_last, self.in_runs))
        return f"DirectShape<{', '.join(map(str, fields))}, {', '.join(flags)}, {self.stages}, {self.min_blocks}>"


@dataclass(frozen=True)
class DirectTilePlan:
    """How direct_tile.cuh computes the transposed convolution (or, not `transposed`, its input gradient)."""

    transposed: bool
    dtype: np.dtype
    shape: DirectShape
    height_axis: TileAxis
    width_axis: TileAxis
    batch: int
    groups: int
    depth: int
    rows: int
    height: tuple
    width: tuple
    width_tiles: int
    height_tiles: int

    @property
    def row_tiles(self):
        return -(-self.rows // (self.shape.rows * self.shape.row_blocks))

    @property
    def group_tiles(self):
        return -(-self.groups // self.shape.groups)

    @property
    def blocks(self):
        return self.batch * self.group_tiles * self.row_tiles * self.height_tiles * self.width_tiles

    @property
    def slots(self):
        """Partial moments of one channel of one image: one of each warp."""
        return self.height_tiles * self.width_tiles * (self.shape.width * self.shape.lines // 32)

    @property
    def arguments(self):
        """The template arguments that all kernels of this plan share."""
        return f"{cpp_type(self.dtype)}, {self.height_axis.cpp}, {self.width_axis.cpp}, {self.shape.cpp}"


def tile_axes(geometry, transposed):
    """The axes (height, width) that a geometry's kernel is compiled for."""
    sizes = zip(geometry.kernel, geometry.stride, geometry.dilation, strict=True)
    return [TileAxis(transposed, kernel, stride, dilation if kernel > 1 else 1) for kernel, stride, dilation in sizes]


@functools.lru_cache(maxsize=4096)
def tile_plan(geometry, dtype, transposed, channels_last):
    """The plan for a geometry, element type and order of memory; None if its inputs do not fit into shared memory."""
    depth, rows = geometry.depth_and_rows(transposed)
    size = geometry.output_size if transposed else geometry.input_size
    axes = tile_axes(geometry, transposed)
    problem = _Problem(dtype, *axes, *size, depth, rows, geometry.groups, channels_last)
    shape = problem.shape()
    if shape is None:
        return None
    lead = geometry.padding[0] % geometry.stride[0] if transposed else 0  # blocks begin at a multiple of the stride
    return DirectTilePlan(
        transposed=transposed,
        dtype=dtype,
        shape=shape,
        height_axis=axes[0],
        width_axis=axes[1],
        batch=geometry.batch,
        groups=geometry.groups,
        depth=depth,
        rows=rows,
        height=geometry.axis(0, transposed),
        width=geometry.axis(1, transposed),
        width_tiles=-(-size[1] // shape.width),
        height_tiles=-(-(size[0] + lead) // (shape.lines * shape.pixels)),
    )


@dataclass(frozen=True)
class _Problem:
    """What a shape is chosen for: outputs of out_height x out_width and the axes that lead to them."""

    dtype: np.dtype
    height: TileAxis
    width: TileAxis
    out_height: int
    out_width: int
    depth: int
    rows: int
    groups: int
    channels_last: bool

    @property
    def words(self):
        """32-bit registers of a value."""
        return 2 if self.dtype == np.float64 else 1

    @property
    def in_runs(self):
        return self.depth * self.height.slots * self.width.slots > _LONG_SUM

    def shape(self):
        """The DirectShape, or None."""
        if max(self.height.unit, self.width.unit) > _MOST_PHASES or self.height.kernel * self.width.slots > _UNROLLED:
            return None
        rows, pixels = self._thread_tile()
        row_blocks = min(4, -(-self.rows // rows))
        for width, lines, groups in self._block_tiles(rows, pixels, row_blocks):
            depth = self._depth(rows, pixels, width, lines, row_blocks, groups)
            blocks = self._min_blocks(rows, pixels, width * lines * row_blocks * groups)
            if depth and blocks:
                tile = (depth, rows, pixels, width, lines, row_blocks, groups, self.channels_last, self.in_runs)
                return DirectShape(*tile, 1 + (depth < self.depth), blocks)
        return None

    def _thread_tile(self):
        """Output channels and rows of one thread: as many sums as there are registers for, as even as can be."""
        # Output rows of phases without taps take no registers.
        sums = _SUM_REGISTERS // self.words // (1 + self.in_runs) * self.height.idle
        unit = self.height.unit
        most = max(1, min(8, sums // max(4, unit), self.rows))
        # As many as divide the channels best; of equals the most.
        rows = min(range(most, (most - 1) // 2, -1), key=lambda rows: -(-self.rows // rows) * rows)
        taps = self.height.kernel * self.width.slots  # that a unit of rows multiplies with, for each channel
        rows = min(rows, max(1, _UNROLLED // taps))
        # A convolution's inputs are period times as many as its outputs: fewer of these need as many of those.
        stretch = 1 if self.height.transposed else self.height.period
        wanted = max(4, 8 // stretch) if rows == 1 else min(sums // rows, max(4, 16 // stretch))
        steps = min(-(-wanted // unit), sums // (rows * unit), _UNROLLED // (taps * rows), -(-self.out_height // unit))
        return rows, max(1, steps) * unit

    def _block_tiles(self, rows, pixels, row_blocks):
        """(width, lines, groups) of a block, the best first."""
        if self.channels_last:
            lanes = min(32, self.groups)
            while lanes:
                room = THREADS // (lanes * row_blocks)
                units = max(1, min(room, self.out_width + self.width.unit - 1) // self.width.unit)
                while units:
                    if units * self.width.unit * lanes * row_blocks <= 1024:
                        yield units * self.width.unit, 1, lanes
                    units //= 2
                lanes //= 2
            return
        step = math.lcm(32, self.width.unit)
        for width in sorted((step * n for n in (1, 2, 4) if step * n <= 256 or n == 1), key=self._cost_of_width):
            lines = max(1, min(THREADS // (width * row_blocks), -(-self.out_height // pixels)))
            while lines:
                groups = max(1, min(self.groups, THREADS // (width * row_blocks * lines)))
                while groups:
                    yield width, lines, groups
                    groups //= 2
                lines //= 2

    def _cost_of_width(self, width):
        """Columns that are computed and read for nothing."""
        return -(-self.out_width // width) * (width + self.width.extent(width) - self.width.extent(self.width.unit))

    def _depth(self, rows, pixels, width, lines, row_blocks, groups):
        """Input channels to stage at a time; 0 if not even one fits. With several groups, the same number each time."""
        threads, lines_in = width * lines * row_blocks * groups, self.height.extent(lines * pixels)
        for depth in range(self.depth, 0, -1):
            if groups > 1 and self.depth % depth:
                continue
            columns, planes = self.width.staged(width), groups * depth
            span = min(columns, threads)
            copies = -(-planes * lines_in // (threads // span)) * -(-columns // span)
            if self.channels_last:
                copies = -(-planes * lines_in * columns // threads)
            shared = planes * (lines_in * self.width.row_length(width) + self._table(rows, row_blocks)) + groups
            shared *= 4 * self.words * (1 + (depth < self.depth))
            if copies <= _COPIES and shared <= (_SHARED if depth > 1 else MOST_SHARED - 1024):
                return -(-self.depth // -(-self.depth // depth))
        return 0

    def _table(self, rows, row_blocks):
        """Weights of one input channel in the table."""
        run = 1 if rows == 1 else 2 if rows < 4 or self.words == 2 else 4
        phases = self.width.stride if self.width.transposed else 1
        return self.height.kernel * self.width.slots * phases * -(-rows // run) * run * row_blocks

    def _min_blocks(self, rows, pixels, threads):
        """Blocks for which there are registers, by the compiler's own count for a few examples."""
        sums = rows * -(-pixels // self.height.idle) * (1 + self.in_runs)
        values = 1.1 * sums + min(6, self.height.extent(pixels)) + rows + self.width.slots
        if self.channels_last:  # wide kernels, whose rows of weights NVRTC 13.0 loads early
            values += 7 * max(0, self.width.slots - 5)
        return blocks_for(self.dtype, self.channels_last, values, threads)


def blocks_for(dtype, channels_last, values, threads):
    """Blocks of so many threads for which a multiprocessor has registers, if each thread keeps so many values.

    By the compiler's own counts; 16-bit types and channels-last memory take more of them to stage a tile. Each of the
    multiprocessor's four parts has 512 registers for every lane. 0 if there are not enough for one block.
    """
    words = 2 if dtype == np.float64 else 1
    registers = 34 + 10 * words + words * values + 12 * (dtype.itemsize == 2) + 10 * channels_last
    return 4 * min(int(512 / registers), 12) // -(-threads // 32)


#: Arguments of Geometry.of that stand for the endless number of shapes there can be: depthwise, groups with a
#: dilation and phases without taps, few channels on one side with long sums, depthwise without a stride, several
#: outputs of one input channel.
EXAMPLES = (
    ((2, 3, 9, 35), (3, 1, 4, 4), 2, 1, 0, 3, 1),
    ((1, 2, 19, 18), (2, 1, 7, 7), 1, 3, 0, 2, 1),
    ((2, 16, 5, 12), (16, 16, 3, 5), (2, 3), (1, 2), 0, 2, (2, 1)),
    ((1, 80, 4, 5), (80, 3, 5, 5), 2, 2, 1, 1, 1),
    ((1, 3, 12, 70), (3, 1, 3, 3), 1, 1, 0, 3, 1),
    ((2, 2, 7, 9), (2, 2, 5, 4), (3, 4), (1, 2), 0, 2, (2, 1)),
)
