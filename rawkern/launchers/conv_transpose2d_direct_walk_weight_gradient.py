"""The weight gradient of depthwise convolutions: plan and kernels of direct_walk_weight_gradient.cuh."""

import dataclasses
import functools
import math
from dataclasses import dataclass

from .. import runtime
from ..runtime import Kernel, accumulator, bfloat16, element_strides, pointer
from .conv_transpose2d_direct_tile import EXAMPLES as TILE_EXAMPLES
from .conv_transpose2d_direct_walk import THREADS, DirectWalkPlan, min_blocks, steps_of, walk_plan
from .geometry import Geometry

_PARAMS = runtime.params(
    ("grad_output", "u8"),
    ("input", "u8"),
    ("partial", "u8"),
    ("grad_strides", "i8", 4),
    ("input_strides", "i8", 4),
    ("warps", "i8"),
    ("strips", "i8"),
    ("slice_strips", "i8"),
    ("height", "i4", 8),
    ("width", "i4", 8),
    ("groups", "i4"),
    ("slices", "i4"),
    ("units", "i4"),
    ("parts", "i4"),
    ("steps", "i4"),
    ("unused", "i4"),
)

#: Warps that a launch should have, and products of a thread in one sum that are enough where there are more.
_WARPS_WANTED, _SLICE_PRODUCTS = 1 << 13, 512
#: In channels-last memory lanes have a channel each: so many of a warp's, on average, must have one.
_FEWEST_LANES = 16
#: The most slices, which few threads add up, and the memory that their sums may take, in bytes.
_SLICES, _PARTIAL_BYTES = 2048, 1 << 28

#: As those of the other direct kernels, depthwise, with channels enough for both orders of memory.
EXAMPLES = (
    ((2, 37, 9, 35), (37, 1, 3, 3), 1, 1, 0, 37, 1),
    ((1, 34, 7, 9), (34, 1, 7, 7), 2, 3, 1, 34, 1),
    ((2, 19, 5, 12), (19, 1, 6, 6), 3, 1, 0, 19, 1),
    ((1, 16, 12, 20), (16, 1, 4, 4), 2, 1, 0, 16, 1),
    ((2, 17, 13, 10), (17, 1, 3, 2), (4, 6), 0, 0, 17, (6, 4)),
)


@dataclass(frozen=True)
class WalkWeightGradientPlan:
    """How a kernel compiled for one shape computes a depthwise convolution's weight gradient.

    Attributes:
        walk: as the input gradient of the same convolution walks, but for its blocks and steps.
        strips: of one channel, in all images; slice_strips: of a slice of them.
    """

    walk: DirectWalkPlan
    strips: int
    slice_strips: int

    @property
    def slices(self):
        return -(-self.strips // self.slice_strips)

    @property
    def warps(self):
        return self.slices * _warps(self.walk)


def _warps(walk):
    """Warps for all channels."""
    return -(-walk.groups // 32) if walk.channels_last else walk.groups


@functools.lru_cache(maxsize=4096)
def walk_weight_gradient_plan(geometry, dtype, channels_last):
    """The plan for a geometry, element type and order of memory; None if it does not suit or registers do not do."""
    walk = walk_plan(geometry, dtype, False, channels_last)
    if walk is None or walk.rows > 1 or (channels_last and walk.groups < _FEWEST_LANES * _warps(walk)):
        return None
    steps = steps_of(walk.walk, walk.batch * walk.groups * walk.units, 32 * _WARPS_WANTED)
    walk = dataclasses.replace(walk, min_blocks=_min_blocks(walk), steps=steps)
    strips = walk.batch * walk.parts * walk.units
    lanes = 1 if channels_last else 32
    affordable = _PARTIAL_BYTES // (math.prod(geometry.weight_shape) * accumulator(dtype).itemsize)
    wanted = -(-_WARPS_WANTED // _warps(walk))
    enough = min(_SLICE_PRODUCTS // (walk.steps * walk.pixels * walk.columns), strips // (lanes * wanted))
    least = -(-strips // (lanes * max(1, min(_SLICES, affordable))))
    return WalkWeightGradientPlan(walk, strips, lanes * max(1, enough, least))


def _min_blocks(walk):
    """Blocks for which there are registers: a quarter more than values, by the compiler's count for Ampere."""
    height, width = walk.height_axis, walk.width_axis
    values = height.kernel * width.kernel + walk.pixels * walk.columns
    values += height.extent(walk.pixels) * width.extent(walk.columns)
    return min_blocks(walk.dtype, 1.25 * values)


def launch(queue, plan, geometry, input, grad_output, partial):
    """Writes the partial sums (slices, weights) that `plan` says."""
    walk = plan.walk
    _kernel(walk.arguments).launch(
        queue,
        -(-plan.warps * 32 // THREADS),
        grad_output=pointer(grad_output),
        input=pointer(input),
        partial=pointer(partial),
        grad_strides=element_strides(grad_output),
        input_strides=element_strides(input),
        warps=plan.warps,
        strips=plan.strips,
        slice_strips=plan.slice_strips,
        height=geometry.axis(0, False),
        width=geometry.axis(1, False),
        groups=walk.groups,
        slices=plan.slices,
        units=walk.units,
        parts=walk.parts,
        steps=walk.steps,
        unused=0,
    )


@functools.lru_cache(maxsize=4096)
def _kernel(arguments):
    file, type = "conv_transpose2d/direct_weight_gradient.cu", f"DirectWalkWeightGradient<{arguments}>"
    return Kernel("conv_transpose2d_direct_weight_gradient", file, type, THREADS, _PARAMS)


def kernels():
    """Every instantiation of the examples, for the tests that compile them all; one stands for those in bfloat16."""
    for dtype in runtime.CPP_TYPES:
        for example in EXAMPLES[:1] if dtype == bfloat16 else (*TILE_EXAMPLES, *EXAMPLES):
            for channels_last in (False, True):
                if plan := walk_weight_gradient_plan(Geometry.of(*example), dtype, channels_last):
                    yield _kernel(plan.walk.arguments)
