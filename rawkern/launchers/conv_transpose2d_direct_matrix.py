"""The weight gradient for few channels on tensor cores: plan and kernels of direct_matrix_weight_gradient.cuh."""

import functools
import itertools
import math
from dataclasses import dataclass, replace

import numpy as np

from ..runtime import bfloat16
from .block_math import uses_tensor_cores
from .conv_transpose2d_direct_tile import TileAxis, tile_axes
from .conv_transpose2d_direct_tile_weight_gradient import WeightGradientPlan, weight_gradient_kernel
from .geometry import Geometry

#: The element types that tensor cores multiply.
DTYPES = (np.dtype("float32"), np.dtype("float16"), bfloat16)

#: Channels of a group on the narrower side from which on a matrix of 8 x 16 channels is full enough.
_FEWEST = 4
#: Channels of x and of gy that a matrix has; 32-bit words of its depth.
_ROWS, _COLUMNS, _WORDS = 8, 16, 8
#: Sums of one thread; matrix products and reads of gy that are unrolled, so that it compiles in about a second.
_SUMS, _PRODUCTS, _READS = 48, 256, 160
#: Columns of the kernel of one warp.
_TAPS = 4
#: Threads of a block; bytes of shared memory of a block (three of them on Hopper, one on every GPU), and of a
#: multiprocessor of Hopper; registers that each of its four parts has for a lane.
_THREADS, _SHARED, _ALL_SHARED, _REGISTERS = 512, 72 << 10, 227 << 10, 512
#: Bytes from the L2 cache in a clock of a multiprocessor of an H200, and of a sector of the cache.
_L2_BYTES, _SECTOR = 27, 32
#: Rows that a thread loads at a time, where everything exists (kMost of WordColumn).
_BATCH = 10
#: Longest sum of one warp; memory that the partial sums may take, in bytes.
_SLICE_PRODUCTS, _PARTIAL_BYTES = 4096, 1 << 26


@dataclass(frozen=True)
class MatrixShape:
    """The template arguments of MatrixWeightGradientShape, in order."""

    steps: int
    lines: int
    rows: int
    row_tiles: int
    row_blocks: int
    columns: int
    column_tiles: int
    column_blocks: int
    taps: int
    tap_blocks: int
    channels_last: bool
    min_blocks: int

    @property
    def words(self):
        """Words of a row of the rectangle."""
        return _WORDS * self.steps

    @property
    def threads(self):
        return 32 * self.steps * self.row_blocks * self.column_blocks * self.tap_blocks

    @property
    def cpp(self):
        tiles = (self.steps, self.lines, self.rows, self.row_tiles, self.row_blocks)
        tiles += (self.columns, self.column_tiles, self.column_blocks, self.taps, self.tap_blocks)
        last = (str(self.channels_last).lower(), self.min_blocks)
        return f"MatrixWeightGradientShape<{', '.join(map(str, tiles + last))}>"


class MatrixPlan(WeightGradientPlan):
    """Of direct_matrix_weight_gradient.cuh, whose blocks have one group each."""

    struct = "DirectMatrixWeightGradient"

    @property
    def shared_bytes(self):
        return _shared_bytes(self.height_axis, self.width_axis, self.shape)


def serves(geometry, dtype, precision):
    """Whether tensor cores are asked for, and channels enough to fill a matrix."""
    return uses_tensor_cores(dtype, precision) and min(geometry.depth_and_rows(True)) >= _FEWEST


@functools.lru_cache(maxsize=4096)
def matrix_plan(geometry, dtype, channels_last, multiprocessors):
    """The plan for a geometry, element type and order of memory; None if nothing fits."""
    problem = _Problem(geometry, dtype, *tile_axes(geometry, False), channels_last)
    shape = min(problem.shapes(), key=problem.cost, default=None)
    if shape is None:
        return None
    row_tiles, column_tiles, *across_and_down = problem.tiles(shape)
    return MatrixPlan(
        dtype=dtype,
        shape=shape,
        height_axis=problem.height,
        width_axis=problem.width,
        row_tiles=row_tiles,
        column_tiles=column_tiles,
        group_tiles=geometry.groups,
        width_tiles=across_and_down[0],
        height_tiles=across_and_down[1],
        tiles=math.prod(across_and_down) * geometry.batch,
        slice_tiles=problem.slice_tiles(shape, multiprocessors),
    )


@dataclass(frozen=True)
class _Problem:
    """What a shape is chosen for."""

    geometry: Geometry
    dtype: np.dtype
    height: TileAxis
    width: TileAxis
    channels_last: bool

    @property
    def pack(self):
        """Pixels of a word."""
        return 4 // self.dtype.itemsize

    @property
    def channels(self):
        """Of x and of gy, in a group."""
        return self.geometry.in_channels // self.geometry.groups, self.geometry.out_channels // self.geometry.groups

    def shapes(self):
        """Those that fit into registers and shared memory."""
        height, width = self.geometry.input_size
        most = [min(4, -(-channels // tile)) for channels, tile in zip(self.channels, (_ROWS, _COLUMNS), strict=True)]
        steps = [n for n in (1, 2, 4, 8) if n == 1 or n * _WORDS * self.pack < 2 * width]
        lines = [n for n in (1, 2, 4, 8) if n < 2 * height]
        pairs = [[(own, blocks) for own in (1, 2) for blocks in range(1, n + 1) if own * blocks <= n] for n in most]
        taps = {-(-self.width.kernel // blocks) for blocks in range(1, self.width.kernel + 1)}
        for step, line, rows, columns, tap in itertools.product(
            steps, lines, *pairs, sorted(n for n in taps if n <= _TAPS)
        ):
            if shape := self._fitting(step, line, rows, columns, tap):
                yield shape

    def _fitting(self, steps, lines, rows, columns, taps):
        """The shape with the number of blocks that there is room for; None if there is none for one."""
        sizes = min(self.channels[0], _ROWS * math.prod(rows)), min(self.channels[1], _COLUMNS * math.prod(columns))
        tiles = sizes[0], *rows, sizes[1], *columns, taps, -(-self.width.kernel // taps)
        shape = MatrixShape(steps, lines, *tiles, self.channels_last, 1)
        matrices = rows[0] * columns[0] * taps * self.height.kernel
        if 4 * matrices > _SUMS or matrices * lines > _PRODUCTS or shape.threads > _THREADS:
            return None
        if taps * columns[0] * self.height.extent(lines) > _READS or max(sizes) > shape.threads:
            return None
        bytes = _shared_bytes(self.height, self.width, shape)
        warps = 4 * (_REGISTERS // self._registers(shape))
        blocks = min(_ALL_SHARED // (bytes + 1024), warps * 32 // shape.threads, 16)
        return replace(shape, min_blocks=blocks) if bytes <= _SHARED and blocks else None

    def _registers(self, shape):
        """Registers of a thread, by the compiler's own counts for a few examples."""
        sums = 4 * shape.row_tiles * shape.column_tiles * shape.taps * self.height.kernel
        most = 44 + sums + 2 * shape.row_tiles * shape.lines + max(0, self.height.extent(shape.lines) - 12)
        # Words of gy that are used but once are read far ahead; tall kernels ask about more rows.
        most += 8 if self.height.kernel == 1 else 5 * max(0, self.height.kernel - 3)
        return -(-most // 8) * 8

    def tiles(self, shape):
        """(tiles of input and of output channels, rectangles of an image across and down)."""
        height, width = self.geometry.input_size
        channels = -(-self.channels[0] // shape.rows), -(-self.channels[1] // shape.columns)
        return *channels, -(-width // (shape.words * self.pack)), -(-height // shape.lines)

    def cost(self, shape):
        """Clocks of a multiprocessor for one image and group, estimated.

        What four schedulers issue, 10 instructions for a word that is staged and 2 for a matrix product, or what the L2
        cache delivers, whose sectors rows begin and end anywhere in. And what waiting for memory takes, 900 clocks for
        each batch of loads, while other blocks go on.
        """
        lines_y = self.height.extent(shape.lines)
        x = self._columns_of_thread(shape, shape.rows, shape.words)
        y = self._columns_of_thread(shape, shape.columns, self.width.extent(shape.words))
        staged = x * (30 + 10 * shape.lines) + y * (30 + 10 * lines_y)
        products = shape.row_tiles * shape.column_tiles * shape.taps * self.height.kernel * shape.lines
        reads = 2 * shape.row_tiles * shape.lines + 4 * shape.column_tiles * shape.taps * lines_y
        waits = x * -(-shape.lines // _BATCH) + y * -(-lines_y // _BATCH) + 2
        issued = (staged + 1.3 * reads + 2 * products) * shape.threads / 32 / 4
        fetched = self._fetched(shape) / _L2_BYTES
        return math.prod(self.tiles(shape)) * (max(issued, fetched) + 900 * waits / shape.min_blocks)

    def _fetched(self, shape):
        """Bytes of a rectangle and of what gy has for it."""
        pixels, size = shape.words * self.pack, self.dtype.itemsize
        step = math.gcd(self.width.stride, self.width.dilation)
        x, y = pixels * size, self.width.extent(pixels) * step * size
        lines = self.height.extent(shape.lines)
        return shape.rows * shape.lines * (x + _SECTOR) + shape.columns * lines * (y + _SECTOR)

    def _columns_of_thread(self, shape, channels, words):
        """Columns of words that one thread stages."""
        if shape.channels_last:
            return -(-words // (shape.threads // channels))
        span = min(words, shape.threads)
        return -(-words // span) * -(-channels // (shape.threads // span))

    def slice_tiles(self, shape, multiprocessors):
        """Rectangles of a slice: whole rounds of the blocks that the device holds, no sum long, and few slices."""
        *channel_tiles, across, down = self.tiles(shape)
        tiles = self.geometry.batch * across * down
        blocks, capacity = math.prod(channel_tiles) * self.geometry.groups, multiprocessors * shape.min_blocks
        longest = max(1, _SLICE_PRODUCTS // (shape.lines * _WORDS * self.pack))
        affordable = max(1, _PARTIAL_BYTES // (4 * math.prod(self.geometry.weight_shape)))

        def choices():
            for rounds in range(1, 9):
                slices = max(1, min(tiles, rounds * capacity // blocks, affordable))
                length = -(-tiles // slices)
                length = min(length, max(longest, -(-tiles // affordable)))
                # A block begins and ends in about the time of a rectangle.
                yield -(-(-(-tiles // length) * blocks) // capacity) * (length + 1), -length, length

        return min(choices())[-1] if tiles else 1


def _plane(words):
    """Words of a channel: see plane() of the kernel."""
    return words + (12 - words % 8) % 8


def _shared_bytes(height, width, shape):
    """Bytes of the kernel's Storage."""
    x = shape.rows * _plane(shape.lines * shape.words)
    y = shape.columns * _plane(height.extent(shape.lines) * width.row_length(shape.words))
    return 4 * max(x + y, 4 * shape.threads)


#: Arguments of Geometry.of that stand for the endless number of shapes there can be: groups with a stride, dilation and
#: phases; a kernel row with few channels, several tiles of channels of gy; channels that end within matrices on both
#: sides, by sums enough for several roles; a tall kernel.
EXAMPLES = (
    ((2, 16, 5, 12), (16, 16, 3, 5), (2, 3), (1, 2), 0, 2, (2, 1)),
    ((1, 5, 9, 40), (5, 130, 1, 3), (1, 2), (0, 1), 0, 1, 1),
    ((2, 28, 12, 35), (28, 20, 4, 4), 2, 1, (1, 0), 2, (1, 3)),
    ((1, 12, 17, 20), (12, 9, 7, 2), (1, 3), (3, 0), 0, 1, 1),
)


def kernels():
    """Every instantiation of the examples, for the tests that compile them all."""
    for example, dtype, channels_last in itertools.product(EXAMPLES, DTYPES, (False, True)):
        yield weight_gradient_kernel(matrix_plan(Geometry.of(*example), dtype, channels_last, 1))
