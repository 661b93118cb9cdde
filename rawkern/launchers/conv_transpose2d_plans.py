"""What can be decided from shapes alone: block sizes, padding, tiles, slices. Computed once per shape."""

import functools
import math
from dataclasses import dataclass

from . import block_math
from .block_math import BlockMath, check_precision


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
    cost: float  # cycles, roughly; of float64 nobody asks

    @property
    def image_span(self):
        """Columns reserved per image where tiles must not straddle images."""
        return -(-self.pixels // self.block.columns) * self.block.columns

    @property
    def slots(self):
        """Partial moments of one channel of one image."""
        return self.image_span // self.block.columns * self.phases

    def tiles(self, image_span=0):
        return -(-self.batch * (image_span or self.pixels) // self.block.columns)

    @property
    def row_tiles(self):
        """Over all groups."""
        return self.groups * (self.rows_padded // self.block.rows)


@functools.lru_cache(maxsize=4096)
def gather_plan(geometry, dtype, precision, multiprocessors, transposed):
    """The plan for a geometry and element type; raises ValueError for an unknown precision."""
    depth, rows = geometry.depth_and_rows(transposed)
    if transposed:
        pairs = list(zip(geometry.output_size, geometry.stride, strict=True))
        phases = math.prod(min(stride, size) for size, stride in pairs)
        pixels = math.prod(-(-size // stride) for size, stride in pairs)
    else:
        phases, pixels = 1, math.prod(geometry.input_size)
    candidates = block_math.choices(dtype, check_precision(precision), depth * _most_taps(geometry, transposed))
    copies = geometry.groups * phases
    block = block_math.choose(candidates, rows, geometry.batch * pixels, copies, multiprocessors)
    tiles = copies * -(-rows // block.rows) * -(-geometry.batch * pixels // block.columns)
    pairs = -(-tiles // multiprocessors) * block.rows * block.columns / block.efficiency * depth
    cost = _cost(geometry, pairs, phases, dtype, precision, _most_taps(geometry, transposed))
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
        cost=cost,
    )


def _cost(geometry, pairs, phases, dtype, precision, most_taps):
    """Cycles, roughly, for so many pairs of channels at an output of each phase, from times measured on an H200.

    A multiprocessor makes 115 products a cycle in TF32 and 150 in 16 bits; taps share what they read, and pixels a
    stride apart are read or written one by one. In full float32 it makes 65, whatever they are, of 128.
    """
    if not block_math.uses_tensor_cores(dtype, precision):
        return pairs * math.prod(geometry.kernel) / phases / 65
    rate = 115 if dtype.itemsize == 4 else 150
    return pairs * most_taps / rate * (0.7 + 0.4 / most_taps) * (0.5 + 0.5 * geometry.stride[1])


def _most_taps(geometry, transposed):
    """Taps that meet in one output, in the phase that has most."""
    if not transposed:
        return math.prod(geometry.kernel)
    periods = (s // math.gcd(s, d) for s, d in zip(geometry.stride, geometry.dilation, strict=True))
    return math.prod(-(-kernel // period) for kernel, period in zip(geometry.kernel, periods, strict=True))
