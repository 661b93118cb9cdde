"""What can be decided from shapes alone: block sizes, padding, tiles, slices. Computed once per shape."""

import functools
import math
from dataclasses import dataclass

from . import block_math
from .block_math import BlockMath, check_precision

#: Longest sum of products that one block forms before partial sums are combined in double.
_SLICE_PIXELS = 16384
#: Memory the weight gradient's partial sums may take, in bytes; larger weights get fewer, longer slices.
_PARTIAL_BYTES = 1 << 28


@dataclass(frozen=True)
class GatherPlan:
    """How gather.cuh computes the transposed convolution (or, not `transposed`, its input gradient) of a geometry."""

    block: BlockMath
    transposed: bool
    batch: int
    groups: int
    depth: int
    depth_words: int
    rows: int
    rows_padded: int
    height: tuple
    width: tuple
    phases: int
    pixels: int  # of one image, in the largest phase

    @property
    def image_span(self):
        """Columns reserved per image where tiles must not straddle images."""
        return -(-self.pixels // self.block.columns) * self.block.columns

    def tiles(self, image_span=0):
        return -(-self.batch * (image_span or self.pixels) // self.block.columns)

    @property
    def row_tiles(self):
        """Over all groups."""
        return self.groups * (self.rows_padded // self.block.rows)


@functools.lru_cache(maxsize=4096)
def gather_plan(geometry, dtype, precision, multiprocessors, transposed):
    """The plan for a geometry and element type; raises ValueError for an unknown precision."""
    in_channels, out_channels = geometry.in_channels // geometry.groups, geometry.out_channels // geometry.groups
    depth, rows = (in_channels, out_channels) if transposed else (out_channels, in_channels)
    if transposed:
        pairs = list(zip(geometry.output_size, geometry.stride, strict=True))
        phases = math.prod(min(stride, size) for size, stride in pairs)
        pixels = math.prod(-(-size // stride) for size, stride in pairs)
    else:
        phases, pixels = 1, math.prod(geometry.input_size)
    candidates = block_math.choices(dtype, check_precision(precision), depth * _most_taps(geometry, transposed))
    copies = geometry.groups * phases
    block = block_math.choose(candidates, rows, geometry.batch * pixels, copies, multiprocessors)
    return GatherPlan(
        block=block,
        transposed=transposed,
        batch=geometry.batch,
        groups=geometry.groups,
        depth=depth,
        depth_words=-(-depth // (block.words * block.pack)) * block.words,
        rows=rows,
        rows_padded=-(-rows // block.rows) * block.rows,
        height=geometry.axis(0, transposed),
        width=geometry.axis(1, transposed),
        phases=phases,
        pixels=pixels,
    )


def _most_taps(geometry, transposed):
    """Taps that meet in one output, in the phase that has most."""
    if not transposed:
        return math.prod(geometry.kernel)
    periods = (s // math.gcd(s, d) for s, d in zip(geometry.stride, geometry.dilation, strict=True))
    return math.prod(-(-kernel // period) for kernel, period in zip(geometry.kernel, periods, strict=True))


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
def weight_gradient_plan(geometry, dtype, precision, multiprocessors):
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
