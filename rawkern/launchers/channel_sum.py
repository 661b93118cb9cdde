"""Sums over all axes but one, and the two-stage plan that every per-channel sum of the library follows."""

import functools
import math
from dataclasses import dataclass

import numpy as np

from .. import runtime
from .layout import copy, dense
from .repeat import repeatable

THREADS = 256
_WARPS = THREADS // 32

#: The twin of ChannelLayout in cuda/include/channel_walk.cuh.
LAYOUT = runtime.params(
    ("total", "i8"),
    ("channels", "i8"),
    ("inner", "i8"),
    ("length", "i8"),
    ("slots", "i8"),
    ("slot_length", "i8"),
    ("width", "i8"),
    ("vector", "i8"),
)
_PARTIALS = runtime.params(("input", "u8"), ("partials", "u8"), ("layout", LAYOUT))
_TOTALS = runtime.params(
    ("partials", "u8"), ("output", "u8"), ("outputs", "i8"), ("count", "i8"), ("inner", "i8"), ("stride", "i8")
)

# A launch aims at this many warps; the split depends on the problem alone, so that results do not on the device.
_WARPS_WANTED = 16384


@dataclass(frozen=True)
class ChannelPlan:
    """Memory as (outer, channels, inner), and how warps share it out for sums per channel (channel_walk.cuh).

    Attributes:
        walk: "RowWalk" or "ColumnWalk".
        blocks: blocks of the first stage.
        vector: elements that are read at a time.
        partials: number of partial sums of one quantity.
    """

    outer: int
    channels: int
    inner: int
    walk: str
    length: int
    slots: int
    slot_length: int
    width: int
    vector: int
    blocks: int
    partials: int

    @property
    def total(self):
        return self.outer * self.channels * self.inner

    def pack(self):
        """The layout for a launch."""
        return np.array(tuple(int(getattr(self, name)) for name in LAYOUT.names), LAYOUT)[()]


def view_of(array, axis):
    """(outer, channels, inner) of a dense array: extents slower in memory than `axis`, its own, extents faster.

    With None for `axis` there is one channel.
    """
    if axis is None:
        return 1, 1, array.size
    order = runtime.memory_order(array)
    place = order.index(axis)
    extents = [array.shape[i] for i in order]
    return math.prod(extents[:place]), extents[place], math.prod(extents[place + 1 :])


@functools.lru_cache(4096)
def plan(outer, channels, inner, itemsize, alignment):
    """The ChannelPlan for non-empty memory (outer, channels, inner) that starts at a multiple of so many bytes.

    `alignment` is a power of two, at most 16.
    """
    vector = 16 // itemsize
    aligned = max(1, alignment // itemsize)
    total = outer * channels * inner
    # Short rows, and rows that 16-byte loads do not fit, are read as columns if there are enough rows to sum over.
    if outer >= 4 and (inner < 64 or (outer >= 16 and inner < 4096 and inner % vector and total % vector == 0)):
        return _column_plan(outer, channels, inner, math.gcd(aligned, total))
    length = outer * inner
    width = math.gcd(aligned, inner)
    step = 32 * width
    slots = max(1, min(-(-length // (4 * step)), _WARPS_WANTED // channels), -(-length // 65536))
    slot_length = -(-length // (slots * step)) * step
    slots = -(-length // slot_length)
    units = channels * slots
    blocks = -(-units // _WARPS)
    return ChannelPlan(
        outer, channels, inner, "RowWalk", length, slots, slot_length, 0, width, blocks, channels * slots
    )


def _column_plan(outer, channels, inner, vector):
    columns = channels * inner
    strip = 32 * vector
    # Several rows side by side make a matrix that fills whole strips, if that does not make it very wide.
    unit = strip if columns < 1024 else vector
    width = columns * (unit // math.gcd(columns, unit))
    rows = -(-outer * columns // width)
    strips = -(-width // strip)
    slots = max(1, min(-(-rows // 16), _WARPS_WANTED // strips), -(-rows // 1024))
    slot_length = -(-rows // slots)
    slots = -(-rows // slot_length)
    blocks = -(-strips * slots // _WARPS)
    return ChannelPlan(
        outer, channels, inner, "ColumnWalk", rows, slots, slot_length, width, vector, blocks, width * slots
    )


@functools.cache
def _partials_kernel(cpp_type, walk):
    return runtime.Kernel(
        name="rawkern_channel_partials",
        file="channel_sum.cu",
        type=f"ChannelPartials<{cpp_type}, {walk}>",
        threads=THREADS,
        params=_PARTIALS,
    )


@functools.cache
def _totals_kernel(cpp_type, team):
    return runtime.Kernel(
        name="rawkern_channel_totals",
        file="channel_sum.cu",
        type=f"ChannelTotals<{cpp_type}, {team}>",
        threads=THREADS,
        params=_TOTALS,
    )


def totals(queue, how, partials, quantity, out):
    """The second stage: sums the partial sums of one quantity into `out`, one value per channel or one for all.

    Args:
        how: the ChannelPlan of the first stage.
        partials: float64, (quantities, how.partials), as the first stage left it.
        out: contiguous, how.channels elements or 1.
    """
    per_channel = how.partials // how.channels
    if out.size == 1:
        outputs, count, inner, stride = 1, how.partials, how.partials, 0
    elif how.walk == "RowWalk":
        outputs, count, inner, stride = how.channels, per_channel, per_channel, 0
    else:
        outputs, count, inner, stride = how.channels, per_channel, how.inner, how.channels * how.inner
    team = 32 if count <= 512 else THREADS
    _totals_kernel(runtime.cpp_type(out.dtype), team).launch(
        queue,
        -(-outputs * team // THREADS),
        partials=runtime.pointer(partials) + quantity * how.partials * 8,
        output=runtime.pointer(out),
        outputs=outputs,
        count=count,
        inner=max(1, inner),
        stride=stride,
    )


@repeatable
def channel_sum(array, axis=1, *, out=None, stream=None):
    """The sum of `array` over all its axes but `axis`: shape (array.shape[axis],), the dtype of `array`.

    float16 and bfloat16 are summed in float32 and float64; two runs agree bit for bit. Any strides; memory of any order
    of dimensions is read in place, other memory is copied first.

    Raises IndexError if there is no such axis; ValueError if `out` does not fit.
    """
    queue = runtime.queue_of(stream, array=array)
    if not -array.ndim <= axis < array.ndim:
        raise IndexError(
            f"axis {axis} is out of range for an array of {array.ndim} dimensions (expected {-array.ndim} to "
            f"{array.ndim - 1})"
        )
    axis %= array.ndim
    channels = array.shape[axis]
    if out is None:
        out = queue.empty((channels,), array.dtype)
    runtime.check_out(out, (channels,), array.dtype, queue.device)
    result = out if out.flags.c_contiguous else queue.empty((channels,), array.dtype)
    array = dense(queue, array)
    if array.size == 0:
        zero(queue, result)
    else:
        how = plan(*view_of(array, axis), array.itemsize, math.gcd(16, runtime.pointer(array)))
        partials = queue.empty((how.partials,), np.float64)
        _partials_kernel(runtime.cpp_type(array.dtype), how.walk).launch(
            queue, how.blocks, input=runtime.pointer(array), partials=runtime.pointer(partials), layout=how.pack()
        )
        totals(queue, how, partials, 0, result)
    return out if out is result else copy(queue, out, result)


def zero(queue, out):
    """Sets a contiguous array to zero, as the sum of nothing."""
    _totals_kernel(runtime.cpp_type(out.dtype), 32).launch(
        queue,
        -(-out.size * 32 // THREADS),
        partials=0,
        output=runtime.pointer(out),
        outputs=out.size,
        count=0,
        inner=1,
        stride=0,
    )


def kernels():
    """Every instantiation, for the tests that compile them all."""
    for cpp_type in runtime.CPP_TYPES.values():
        for walk in ("RowWalk", "ColumnWalk"):
            yield _partials_kernel(cpp_type, walk)
        for team in (32, THREADS):
            yield _totals_kernel(cpp_type, team)
