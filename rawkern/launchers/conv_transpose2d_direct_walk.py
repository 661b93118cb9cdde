"""How cuda/conv_transpose2d/direct_walk.cuh cuts a problem into threads: decided from shapes alone, once per shape."""

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np

from .. import runtime
from ..runtime import cpp_type
from .conv_transpose2d_direct_tile import TileAxis, tile_axes

DIRECT_WALK = runtime.params(
    ("input", "u8"),
    ("weight", "u8"),
    ("in_strides", "i8", 4),
    ("out_strides", "i8", 4),
    ("weight_strides", "i8", 5),
    ("threads", "i8"),
    ("height", "i4", 8),
    ("width", "i4", 8),
    ("groups", "i4"),
    ("rows", "i4"),
    ("units", "i4"),
    ("parts", "i4"),
    ("steps", "i4"),
    ("unused", "i4"),
)

#: Threads of a block.
THREADS = 128
#: The most output channels of a group: each reads the group's input channel for itself.
_MOST_ROWS = 4
#: Columns of a thread must be whole strides, and neighbours in memory are stored together where they are a power of
#: two; other strides would scatter what neighbouring threads store.
_STRIDES = (1, 2, 4)
_MOST_COLUMNS = 8
#: Bytes of neighbouring columns that a thread stores, if it owns more than one stride.
_STORED = 8
#: Outputs of a thread in one step, and the most rows of them, if registers allow.
_OUTPUTS, _PIXELS = 16, 8
#: 32-bit registers for weights, inputs and sums: what they should stay below, and what they must.
_REGISTERS, _MOST_REGISTERS = 88, 128
#: Multiply-adds that are unrolled.
_UNROLLED = 1024
#: Steps of a thread, so that finding its place is soon paid for; and threads from which on there are enough for that.
_STEPS = 32
_THREADS_WANTED = 1 << 19


@dataclass(frozen=True)
class DirectWalkPlan:
    """How direct_walk.cuh computes the transposed convolution (or, not `transposed`, its input gradient)."""

    transposed: bool
    dtype: np.dtype
    height_axis: TileAxis
    width_axis: TileAxis
    pixels: int
    columns: int
    lead: int
    channels_last: bool
    min_blocks: int
    batch: int
    groups: int
    depth: int
    rows: int
    height: tuple
    width: tuple
    units: int
    walk: int  # steps from the first row to the last
    steps: int

    @property
    def parts(self):
        return -(-self.walk // self.steps)

    @property
    def threads(self):
        return self.batch * self.groups * self.rows * self.parts * self.units

    @property
    def blocks(self):
        return -(-self.threads // THREADS)

    @property
    def slots(self):
        """Partial moments of one channel of one image: one of each warp and step."""
        return self.walk * -(-self.units // 32)

    def of_whole_warps(self):
        """The same with warps that have one channel and the same rows each, as moments are formed by warps."""
        return dataclasses.replace(self, units=-(-self.units // 32) * 32)

    @property
    def arguments(self):
        """The template arguments that all kernels of this plan share."""
        flag = str(self.channels_last).lower()
        shape = f"WalkShape<{self.pixels}, {self.columns}, {self.lead}, {flag}, {self.min_blocks}>"
        return f"{cpp_type(self.dtype)}, {self.height_axis.cpp}, {self.width_axis.cpp}, {shape}"


@functools.lru_cache(maxsize=4096)
def walk_plan(geometry, dtype, transposed, channels_last):
    """The plan for a geometry, element type and order of memory; None if it does not suit or registers do not do."""
    depth, rows = geometry.depth_and_rows(transposed)
    if depth > 1 or rows > _MOST_ROWS:
        return None
    height, width = tile_axes(geometry, transposed)
    columns = _columns(width, dtype, channels_last)
    if columns is None:
        return None
    lead_h, lead = (p % s if transposed else 0 for p, s in zip(geometry.padding, geometry.stride, strict=True))
    size = geometry.output_size if transposed else geometry.input_size
    words = 2 if dtype == np.float64 else 1
    pixels, values = _pixels(height, width, columns, lead, size[0] + lead_h, words)
    if pixels is None:
        return None
    units = -(-size[1] // columns)
    walk = -(-(size[0] + lead_h) // pixels)
    threads = geometry.batch * geometry.groups * rows * units
    return DirectWalkPlan(
        transposed=transposed,
        dtype=dtype,
        height_axis=height,
        width_axis=width,
        pixels=pixels,
        columns=columns,
        lead=lead,
        channels_last=channels_last,
        min_blocks=min_blocks(dtype, values),
        batch=geometry.batch,
        groups=geometry.groups,
        depth=depth,
        rows=rows,
        height=geometry.axis(0, transposed),
        width=geometry.axis(1, transposed),
        units=units,
        walk=walk,
        steps=steps_of(walk, threads, _THREADS_WANTED),
    )


def _columns(width, dtype, channels_last):
    """Output columns of a thread. None if they would be too many, or neighbours would not be stored together."""
    if not width.transposed and width.period > 1:
        return 1  # neighbours meet few inputs in common
    if channels_last:
        return max(2, width.unit) if width.unit <= _MOST_COLUMNS else None
    return max(_STORED // dtype.itemsize, width.unit, 2) if width.unit in _STRIDES else None


def _pixels(height, width, columns, lead, out_height, words):
    """Output rows of a thread in one step, and registers of its values by an estimate; (None, None) if too many."""
    taps = height.kernel * width.kernel
    columns_in = (
        (lead + columns - 1) // width.stride + 1 + (width.kernel - 1) * width.dilation // width.stride
        if width.transposed
        else width.extent(columns)
    )
    # A convolution's inputs are period times as many as its outputs: fewer of these need as many of those.
    wanted = min(_PIXELS, _OUTPUTS // columns) if height.transposed else max(1, _PIXELS // height.period)
    most = min(-(-wanted // height.unit), -(-out_height // height.unit))
    for count in range(most, 0, -1):
        pixels = count * height.unit
        values = words * (taps + height.extent(pixels) * columns_in + pixels * columns)
        limit = _REGISTERS if count > 1 else _MOST_REGISTERS
        if values <= limit and pixels * columns * height.slots * width.slots <= _UNROLLED:
            return pixels, values + words * pixels * columns  # sums on their way into memory take more
    return None, None


def steps_of(walk, threads, wanted):
    """Steps of a thread, of a walk that so many threads would do alone: fewer where more are wanted, each as many."""
    steps = max(1, min(_STEPS, walk, threads * walk // wanted))
    return -(-walk // -(-walk // steps))


def min_blocks(dtype, values):
    """Blocks for which there are registers, by the compiler's own count for some dozens of examples."""
    if dtype == np.float64:
        return 2  # a chain's functions take many more
    return max(1, int(512 // (48 + 8 * (dtype.itemsize == 2) + values)))
