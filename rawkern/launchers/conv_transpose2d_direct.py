"""Transposed convolution with few channels per group on arrays: the direct kernels.

But for some weight gradients (conv_transpose2d_direct_matrix.py) they use no tensor cores.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np

from .. import runtime
from ..runtime import Kernel, cpp_type, element_strides, pointer
from . import conv_transpose2d_direct_matrix as matrix
from . import conv_transpose2d_direct_walk_weight_gradient as walk_gradient
from .block_math import check_precision
from .chain import IDENTITY, chain_of
from .conv_transpose2d_direct_tile import (
    DIRECT_TILE,
    EXAMPLES,
    MIN_PRODUCTS,
    DirectTilePlan,
    tile_plan,
)
from .conv_transpose2d_direct_tile_weight_gradient import (
    WeightGradientPlan,
    tile_weight_gradient_plan,
    weight_gradient_kernel,
)
from .conv_transpose2d_direct_walk import DIRECT_WALK, DirectWalkPlan, walk_plan
from .conv_transpose2d_direct_walk import THREADS as WALK_THREADS
from .geometry import Geometry

DIRECT = runtime.params(
    ("input", "u8"),
    ("weight", "u8"),
    ("in_strides", "i8", 4),
    ("out_strides", "i8", 4),
    ("weight_strides", "i8", 5),
    ("warps", "i8"),
    ("height", "i4", 8),
    ("width", "i4", 8),
    ("batch", "i4"),
    ("groups", "i4"),
    ("depth", "i4"),
    ("rows", "i4"),
    ("row_tiles", "i4"),
    ("height_tiles", "i4"),
    ("width_tiles", "i4"),
    ("run", "i4"),
)
DIRECT_WEIGHT_GRADIENT = runtime.params(
    ("input", "u8"),
    ("grad_output", "u8"),
    ("partial", "u8"),
    ("in_strides", "i8", 4),
    ("out_strides", "i8", 4),
    ("lines", "i8"),
    ("slice_lines", "i8"),
    ("warps", "i8"),
    ("height", "i4", 8),
    ("width", "i4", 8),
    ("groups", "i4"),
    ("rows", "i4"),
    ("columns", "i4"),
    ("unused", "i4"),
)

#: The implicit GEMMs work in tiles of 8 to 16 output channels at least and slabs of 8 to 32 input channels. Below
#: this many channels on one side most of a tile is padding, and multiply-adds on a tile that fits are faster.
_FEW = 16
#: Where the other side is wide, the sums are long enough for the tensor cores to win although they multiply padding.
_PRODUCTS_PER_TAP = 1024

#: Threads of a block of direct.cuh.
_THREADS = 128

#: Products that are summed in one go; the sums of such runs are summed after that.
_RUN = 128
#: Warps of the weight gradient that a launch aims at; and the most rows of pixels in one slice.
_WARPS_WANTED = 1 << 15
_SLICE_LINES = 512
#: Memory the weight gradient's partial sums may take, in bytes; larger weights get fewer, longer slices.
_PARTIAL_BYTES = 1 << 26


def few_channels(geometry):
    """Whether the direct kernels are the faster ones: see `_FEW`. The same for every dtype, pass and device."""
    rows, depth = geometry.out_channels // geometry.groups, geometry.in_channels // geometry.groups
    return min(rows, depth) <= _FEW and rows * depth <= _PRODUCTS_PER_TAP


def _products(geometry):
    """Products of an input and a weight, or the number of outputs if they are more."""
    per_input = geometry.out_channels // geometry.groups * math.prod(geometry.kernel)
    return max(math.prod(geometry.input_shape) * per_input, math.prod(geometry.output_shape))


@dataclass(frozen=True)
class DirectPlan:
    """How direct.cuh computes the transposed convolution (or, not `transposed`, its input gradient) of a geometry."""

    transposed: bool
    dtype: np.dtype
    rows_per_thread: int
    pixels_per_thread: int
    batch: int
    groups: int
    depth: int
    rows: int
    row_tiles: int
    height: tuple
    width: tuple
    height_tiles: int
    width_tiles: int
    slots: int
    run: int

    @property
    def arguments(self):
        """The template arguments that all kernels of this plan share."""
        return f"{cpp_type(self.dtype)}, {self.rows_per_thread}, {self.pixels_per_thread}"


#: Output channels and pixels of one thread: for depthwise convolutions, and for all others.
_THREAD_TILES = ((1, 8), (4, 4))


@functools.lru_cache(maxsize=4096)
def direct_plan(geometry, dtype, precision, transposed, channels_last=False, tiled=True):
    """The plan for a geometry and element type; None where the implicit GEMM is faster.

    Args:
        precision: makes no difference, as these problems are bound by memory: float32 is multiplied as float32.
        transposed: the transposed convolution, or its input gradient.
        channels_last: whether the output is in channels-last memory.
        tiled: whether the kernel compiled for one shape may be taken: not for the minimum over all channels.

    Raises ValueError for an unknown precision.
    """
    check_precision(precision)
    if not few_channels(geometry):
        return None
    if tiled and _products(geometry) >= MIN_PRODUCTS:
        arguments = geometry, dtype, transposed, channels_last
        if plan := walk_plan(*arguments) or tile_plan(*arguments):
            return plan
    return _plan(geometry, dtype, transposed)


def _plan(geometry, dtype, transposed):
    """The plan for direct.cuh, which knows no shape."""
    depth, rows = geometry.depth_and_rows(transposed)
    per_thread, pixels = _THREAD_TILES[rows > 1]
    size = geometry.output_size if transposed else geometry.input_size
    phases = min(geometry.stride[0], size[0]) if transposed else 1
    height_tiles = -(-size[0] // (phases * pixels))
    width_tiles = -(-size[1] // 32)
    return DirectPlan(
        transposed=transposed,
        dtype=dtype,
        rows_per_thread=per_thread,
        pixels_per_thread=pixels,
        batch=geometry.batch,
        groups=geometry.groups,
        depth=depth,
        rows=rows,
        row_tiles=-(-rows // per_thread),
        height=geometry.axis(0, transposed),
        width=geometry.axis(1, transposed),
        height_tiles=height_tiles,
        width_tiles=width_tiles,
        slots=width_tiles * height_tiles * phases,
        run=max(1, _RUN // math.prod(geometry.kernel)),
    )


def store(queue, plan, chain, ending, gathered, weight, out_strides):
    """Computes `plan` over `gathered` (the input, or grad_output) and stores it through a chain."""
    kernel = _store_kernel(plan, chain.cpp, chain.params)
    _launch(queue, plan, kernel, ending, gathered, weight, out_strides)


def with_moments(queue, plan, chain, ending, input, weight, out_strides):
    """Stores the convolution and, in ending["moments"], the statistics of a chain applied to it, `plan.slots` each."""
    kernel = _moments_kernel(plan, chain.cpp, chain.params)
    ending = {**ending, "channels": plan.groups * plan.rows}
    if isinstance(plan, DirectWalkPlan):
        plan = plan.of_whole_warps()
    _launch(queue, plan, kernel, ending, input, weight, out_strides)


def channel_min(queue, plan, ending, input, weight, out_strides):
    """Stores the minimum over channels and its index."""
    _launch(queue, plan, _channel_min_kernel(plan), ending, input, weight, out_strides)


def _launch(queue, plan, kernel, ending, gathered, weight, out_strides):
    strides = element_strides(weight)
    in_per_group = plan.depth if plan.transposed else plan.rows
    depth_axis = 0 if plan.transposed else 1
    operands = (
        pointer(gathered),
        pointer(weight),
        element_strides(gathered),
        out_strides,
        (in_per_group * strides[0], strides[depth_axis], strides[1 - depth_axis], *strides[2:]),
    )
    if isinstance(plan, DirectTilePlan):
        blocks, sizes = plan.blocks, _tile_sizes(plan)
    elif isinstance(plan, DirectWalkPlan):
        blocks, sizes = plan.blocks, _walk_sizes(plan)
    else:
        warps = plan.batch * plan.slots
        if kernel.name != _CHANNEL_MIN:  # whose warps see all channels
            warps *= plan.groups * plan.row_tiles
        blocks, sizes = -(-warps // (_THREADS // 32)), _sizes(plan, warps)
    ending = tuple([ending[name] for name in kernel.params["ending"].names])
    kernel.launch(queue, blocks, direct=operands + sizes, ending=ending)


def _sizes(plan, warps):
    channels = (plan.batch, plan.groups, plan.depth, plan.rows, plan.row_tiles)
    return (warps, plan.height, plan.width, *channels, plan.height_tiles, plan.width_tiles, plan.run)


def _tile_sizes(plan):
    tiles = (plan.width_tiles, plan.height_tiles, plan.row_tiles, plan.group_tiles)
    return (plan.blocks, plan.height, plan.width, plan.groups, plan.depth, plan.rows, *tiles, 0)


def _walk_sizes(plan):
    channels = (plan.groups, plan.rows, plan.units, plan.parts, plan.steps)
    return (plan.threads, plan.height, plan.width, *channels, 0)


@dataclass(frozen=True)
class DirectWeightGradientPlan:
    """How direct_weight_gradient.cu computes a geometry's weight gradient."""

    lines: int
    slice_lines: int
    slices: int
    warps: int


@functools.lru_cache(maxsize=4096)
def direct_weight_gradient_plan(geometry, dtype, precision, channels_last=False, multiprocessors=1):
    """The plan for a geometry; None where the implicit GEMM is faster. Arguments as for `direct_plan`.

    Where tensor cores are asked for and channels enough to fill the smallest of their products they multiply, in TF32
    too; otherwise float32 is multiplied as float32.
    """
    precision = check_precision(precision)
    if not few_channels(geometry):
        return None
    if _products(geometry) >= MIN_PRODUCTS:
        if matrix.serves(geometry, dtype, precision) and (
            plan := matrix.matrix_plan(geometry, dtype, channels_last, multiprocessors)
        ):
            return plan
        arguments = geometry, dtype, channels_last
        if plan := walk_gradient.walk_weight_gradient_plan(*arguments) or tile_weight_gradient_plan(*arguments):
            return plan
    weights = math.prod(geometry.weight_shape)
    lines = geometry.batch * geometry.input_size[0]
    wanted = max(-(-_WARPS_WANTED // weights), -(-lines // _SLICE_LINES))
    affordable = max(1, _PARTIAL_BYTES // (8 * weights))
    slice_lines = max(1, -(-lines // min(wanted, affordable)))
    slices = -(-lines // slice_lines)
    return DirectWeightGradientPlan(lines, slice_lines, slices, weights * slices)


def weight_gradient_partials(queue, plan, geometry, input, grad_output):
    """The partial sums of the weight gradient: [slice][group][tap][row][column], in the accumulator's dtype."""
    partial = queue.empty((plan.slices, math.prod(geometry.weight_shape)), runtime.accumulator(input.dtype))
    if isinstance(plan, walk_gradient.WalkWeightGradientPlan):
        walk_gradient.launch(queue, plan, geometry, input, grad_output, partial)
        return partial
    fields = dict(
        input=pointer(input),
        grad_output=pointer(grad_output),
        partial=pointer(partial),
        in_strides=element_strides(input),
        out_strides=element_strides(grad_output),
        groups=geometry.groups,
        rows=geometry.in_channels // geometry.groups,
        columns=geometry.out_channels // geometry.groups,
    )
    if isinstance(plan, WeightGradientPlan):
        kernel, blocks = weight_gradient_kernel(plan), plan.blocks
        names = ("tiles", "slice_tiles", "row_tiles", "column_tiles", "group_tiles", "width_tiles", "height_tiles")
        fields |= {name: getattr(plan, name) for name in names} | {"block_count": blocks}
    else:
        kernel = _weight_gradient_kernel(input.dtype)
        blocks = -(-plan.warps // (kernel.threads // 32))
        fields |= dict(lines=plan.lines, slice_lines=plan.slice_lines, warps=plan.warps, unused=0)
    fields |= dict(height=geometry.axis(0, True), width=geometry.axis(1, True))
    kernel.launch(queue, blocks, **{name: fields[name] for name in kernel.params.names})
    return partial


_CHANNEL_MIN = "conv_transpose2d_direct_channel_min"


def _kernel(plan, name, type, chain, ending, file="direct_forward"):
    """A kernel for a plan: `type` is that of direct.cuh, without its arguments."""
    family, operands, threads = "Direct", DIRECT, _THREADS
    if isinstance(plan, DirectTilePlan):
        family, operands, threads = "DirectTile", DIRECT_TILE, plan.shape.threads
    elif isinstance(plan, DirectWalkPlan):
        family, operands, threads = "DirectWalk", DIRECT_WALK, WALK_THREADS
    arguments = ", ".join([plan.arguments, *chain])
    return Kernel(
        name,
        f"conv_transpose2d/{file}.cu",
        f"{type.replace('Direct', family)}<{arguments}>",
        threads,
        np.dtype([("direct", operands), ("ending", ending)], align=True),
    )


# Kernels are cached by what their source depends on, so that a chain's numbers play no part.


@functools.lru_cache(maxsize=4096)
def _store_kernel(plan, cpp, chain_params):
    ending = runtime.params(("output", "u8"), ("saved", "u8"), ("bias", "u8"), ("chain", chain_params))
    if plan.transposed:
        return _kernel(plan, "conv_transpose2d_direct", "DirectForward", [cpp], ending)
    name = "conv_transpose2d_direct_input_gradient"
    return _kernel(plan, name, "DirectInputGradient", [], ending, "direct_input_gradient")


@functools.lru_cache(maxsize=4096)
def _moments_kernel(plan, cpp, chain_params):
    ending = runtime.params(
        ("output", "u8"),
        ("bias", "u8"),
        ("moments", "u8"),
        ("slots", "i8"),
        ("channels", "i8"),
        ("chain", chain_params),
    )
    return _kernel(plan, "conv_transpose2d_direct_with_moments", "DirectForwardWithMoments", [cpp], ending)


@functools.lru_cache(maxsize=4096)
def _channel_min_kernel(plan):
    ending = runtime.params(("values", "u8"), ("index", "u8"), ("bias", "u8"))
    return _kernel(plan, _CHANNEL_MIN, "DirectForwardChannelMin", [], ending)


@functools.cache
def _weight_gradient_kernel(dtype):
    file, type = "conv_transpose2d/direct_weight_gradient.cu", f"DirectWeightGradient<{cpp_type(dtype)}>"
    return Kernel("conv_transpose2d_direct_weight_gradient", file, type, 256, DIRECT_WEIGHT_GRADIENT)


def kernels():
    """Every instantiation, for the tests that compile them all; chains stand for the endless number there can be."""
    from .. import epilogue

    chains = [IDENTITY, chain_of((epilogue.Add(0.5), epilogue.Minimum(0.0), epilogue.GELU(), epilogue.Mul(2.0)))]
    gelu = chain_of((epilogue.GELU(),))
    for dtype in runtime.CPP_TYPES:
        for example in EXAMPLES:
            geometry = Geometry.of(*example)
            plan = _plan(geometry, dtype, True)
            for chain in chains:
                yield _store_kernel(plan, chain.cpp, chain.params)
            yield _moments_kernel(plan, gelu.cpp, gelu.params)
            yield _channel_min_kernel(plan)
            yield _store_kernel(_plan(geometry, dtype, False), IDENTITY.cpp, IDENTITY.params)
            if dtype == runtime.bfloat16:
                continue  # the tiles of float16
            for plan in filter(None, (make(geometry, dtype, True, False) for make in (tile_plan, walk_plan))):
                yield _moments_kernel(plan, gelu.cpp, gelu.params)
                yield _store_kernel(plan, chains[1].cpp, chains[1].params)
            for channels_last in (False, True):
                for make, transposed in itertools.product((tile_plan, walk_plan), (True, False)):
                    if plan := make(geometry, dtype, transposed, channels_last):
                        yield _store_kernel(plan, IDENTITY.cpp, IDENTITY.params)
        yield _weight_gradient_kernel(dtype)
