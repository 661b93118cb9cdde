"""The transposed convolution and its input gradient on Hopper's tensor cores: the host's side of
cuda/conv_transpose2d/warpgroup_gather.cuh.

A plan says which instantiation computes a geometry and how its tiles lie; it is made once per shape.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np

from .. import runtime
from ..runtime import Kernel, bfloat16, cpp_type
from .block_math import check_precision
from .chain import IDENTITY, chain_of
from .tensor_map import MAP_BYTES, MAX_BOX, MAX_STEP, NO_TENSOR, TENSOR, is_copied_by_engine, tensor_fields

_MAX_STEPS, _MAX_PHASES, _MAX_STAGES, _MAX_WEIGHT_STAGES, _MAX_BOXES = 256, 64, 8, 12, 4
_THREADS, _CONSUMERS, _CONSUMER_WARPS, _STAGERS = 384, 2, 8, 3
_ROWS = 64  # of a job: output channels
_ROW_BYTES = 128  # of a pixel's slab, or of a row of packed weights
_WEIGHT_BYTES = _ROWS * _ROW_BYTES  # of a slab and tap
_TAPS_TOGETHER = 2  # of a phase
_WEIGHT_STAGES = 4  # at least
_SEGMENT = 32  # pixels of a row that a box is for
_SECTOR = 32  # bytes that device memory and the L2 cache move at once
_SHARED_BYTES = 227 * 1024
_BARRIER_BYTES = (42 + _STAGERS * _MAX_BOXES) * 16 + _STAGERS * _MAX_BOXES * 8  # on the emulator; half of it on a GPU
DTYPES = (np.dtype("float32"), np.dtype("float16"), bfloat16)

FIXED_DIVISOR = runtime.params(("factor", "u4"), ("shift", "i4"))
PARAMS = runtime.params(
    ("input", "u8"),
    ("weight", "u8"),
    ("map", "u8"),
    ("in_strides", "i8", 4),
    ("out_strides", "i8", 4),
    ("tiles", "i4"),
    ("batch", "i4"),
    ("groups", "i4"),
    ("depth", "i4"),
    ("rows", "i4"),
    ("in_size", "i4", 2),
    ("in_step", "i4", 2),
    ("in_origin", "i4", 2),
    ("out_size", "i4", 2),
    ("out_step", "i4", 2),
    ("base_size", "i4", 2),
    ("stack", "i4"),
    ("tile_rows", "i4"),
    ("tile_columns", "i4"),
    ("column_tiles", "i4"),
    ("staged_rows", "i4"),
    ("pitch", "i4"),
    ("stage_pixels", "i4"),
    ("stages", "i4"),
    ("weight_stages", "i4"),
    ("slabs", "i4"),
    ("last_slices", "i4"),
    ("units", "i4"),
    ("passes", "i4"),
    ("parts", "i4"),
    ("jobs", "i4"),
    ("staging", "i4"),
    ("boxes", "i4"),
    ("box_bytes", "i4"),
    ("by_parts", FIXED_DIVISOR),
    ("by_groups", FIXED_DIVISOR),
    ("by_column_tiles", FIXED_DIVISOR),
    ("by_stack", FIXED_DIVISOR),
    ("span", "i4"),
    ("phase", "i2", (_MAX_PHASES, 2)),
    ("first_step", "i2", (_MAX_PHASES + 1,)),
    ("offset", "i4", (_MAX_STEPS + 4,)),
)
PACK = runtime.params(
    ("weight", "u8"),
    ("packed", "u8"),
    ("group_stride", "i8"),
    ("depth_stride", "i8"),
    ("row_stride", "i8"),
    ("tap_strides", "i8", 2),
    ("count", "i8"),
    ("depth", "i4"),
    ("rows", "i4"),
    ("units_per_group", "i4"),
    ("slabs", "i4"),
    ("passes", "i4"),
    ("kernel_w", "i4"),
    ("pass_step", "i2", (_MAX_PHASES + 1,)),
    ("tap", "i2", (_MAX_STEPS,)),
    ("map", "u8"),
    ("input", TENSOR),
)
#: How the input is staged: pixel by pixel, or by the copy engine, whose boxes hold pixels of rows, pixels of the tensor
#: seen as one long row, or channels of pixels.
PIXELS, ROWS, FLAT, CHANNELS = range(4)


@dataclass(frozen=True)
class Shape:
    """An instantiation's sizes: the phases of a pass, and the columns of a job in each of them."""

    phases: int
    pixels: int

    def pool_bytes(self, channel_min):
        """Shared memory left for staged input, boxes of it, and weights, in whole swizzle patterns."""
        ending = _CONSUMER_WARPS * 16 * (32 + 8) * 4
        if channel_min:
            ending = (_CONSUMER_WARPS + _CONSUMERS) * self.phases * (self.pixels + 4) * 4
            ending += _CONSUMER_WARPS * self.phases * self.pixels * 2
        return (_SHARED_BYTES - ending - _BARRIER_BYTES) // 1024 * 1024

    def type(self, dtype, split, channel_min):
        sizes = f"{self.phases}, {self.pixels}, {self.pool_bytes(channel_min)}"
        return f"{cpp_type(dtype)}, {str(split).lower()}, {sizes}"


#: What there is. Neighbouring phases are computed together, so that rows of the output are stored whole; few pixels
#: want short jobs.
SHAPES = (Shape(1, 256), Shape(1, 128), Shape(1, 64), Shape(2, 128), Shape(4, 64))
#: With split operands, which have totals in registers, too.
SPLIT_SHAPES = (Shape(1, 128), Shape(1, 64), Shape(2, 64))


@dataclass(frozen=True)
class Axis:
    """One axis of the gather. Output `step * u + phase` sums over the phase's taps (tap, plane, shift): input
    `in_step * (u + shift) + plane + origin`, where the origin is a multiple of `align`."""

    in_size: int
    out_size: int
    step: int
    in_step: int
    origin: int
    base: int
    halo: int
    taps: tuple  # of each phase

    @classmethod
    @functools.lru_cache(maxsize=4096)
    def of(cls, in_size, out_size, kernel, stride, padding, dilation, transposed, align):
        if transposed:
            phases = [
                [(k, (r + padding - k * dilation) // stride) for k in range(kernel)
                 if (r + padding - k * dilation) % stride == 0]
                for r in range(min(stride, out_size))
            ]  # fmt: skip
            step, in_step = stride, 1
        else:
            phases, step, in_step = [[(k, k * dilation - padding) for k in range(kernel)]], 1, stride
        reached = [position for phase in phases for _, position in phase]
        origin = min(reached, default=0) // align * align
        return cls(
            in_size=in_size,
            out_size=out_size,
            step=step,
            in_step=in_step,
            origin=origin,
            base=-(-out_size // step),
            halo=(max(reached, default=0) - origin) // in_step,
            taps=tuple(
                tuple((k, (c - origin) % in_step, (c - origin) // in_step) for k, c in phase) for phase in phases
            ),
        )


@dataclass(frozen=True)
class Plan:
    """How warpgroup_gather.cuh computes a geometry: an instantiation and its tiles."""

    shape: Shape
    transposed: bool
    channel_min: bool
    dtype: np.dtype
    split: bool  # float32 in two parts
    staging: int
    tiles: int
    blocks: int
    cost: float  # cycles, roughly
    row_tiles_per_image: int  # where tiles do not straddle images
    fields: dict  # of PARAMS, but for what a call brings
    pack_fields: dict  # of PACK
    packed_bytes: int

    @property
    def slab(self):
        """Channels."""
        return _slab(self.dtype, self.split)

    @property
    def slots(self):
        """Partial moments per channel of an image."""
        return self.row_tiles_per_image * self.fields["column_tiles"] * self.fields["passes"]


@functools.lru_cache(maxsize=4096)
def plan(
    geometry, dtype, precision, arch, multiprocessors, *, transposed, staging=PIXELS, channel_min=False, per_image=False
):
    """The plan for a geometry, or None where this family of kernels does not serve.

    It serves sm_90a, 16-bit types, and float32, unless a tap reaches so far that no tile fits in shared memory.

    Args:
        transposed: the transposed convolution; else its input gradient.
        staging: what `staging_of` says of the input.
        channel_min: whether a block must see all channels of its pixels.
        per_image: whether tiles must not straddle images.
    """
    if arch != "sm_90a" or dtype not in DTYPES or geometry.batch == 0:
        return None
    split = dtype == np.float32 and check_precision(precision) == "ieee"
    depth, rows = geometry.depth_and_rows(transposed)
    sizes = list(zip(geometry.input_size, geometry.output_size, strict=True))
    if not transposed:
        sizes = [size[::-1] for size in sizes]
    height, width = zip(sizes, geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True)
    works = []
    for align in _aligns(dtype, staging):
        axes = Axis.of(*height[0], *height[1:], transposed, 1), Axis.of(*width[0], *width[1:], transposed, align)
        works.append(
            _Work(geometry, dtype, split, depth, rows, axes, align, staging, multiprocessors, channel_min, per_image)
        )
    if works[0].steps > _MAX_STEPS or works[0].phases > _MAX_PHASES:
        return None
    shapes = SPLIT_SHAPES if split else SHAPES
    tiles = [(tile, work) for work in works for shape in shapes for tile in work.tiles_of(shape)]
    if not tiles and staging != PIXELS:
        return plan(
            geometry, dtype, precision, arch, multiprocessors,
            transposed=transposed, channel_min=channel_min, per_image=per_image,
        )  # fmt: skip
    if not tiles:
        return None
    tile, work = min(tiles, key=lambda candidate: candidate[0].cost)
    return work.plan(tile, transposed)


def _aligns(dtype, staging):
    """What the columns of the input at which tiles begin may be multiples of. Boxes in 16 bits are turned around eight
    pixels at a time: five times where the tile begins between eight, four times where it does not."""
    return (1, 8) if staging == ROWS and dtype.itemsize == 2 else (1,)


def is_faster(plan, other, device):
    """Whether `plan` should beat another family's, by their costs: not where one tap, few tiles or pixels that do not
    come in pairs leave the tensor cores waiting for input. On the emulator, which has no speed, it always does."""
    return device.name == "cpu" or plan.cost < other.cost


@dataclass(frozen=True)
class _Tile:
    shape: Shape
    rows: int
    columns: int
    pitch: int
    column_tiles: int
    row_tiles: int
    stack: int
    stage_pixels: int
    parts: int
    stages: int
    weight_stages: int
    boxes: int
    cost: float


@dataclass(frozen=True)
class _Work:
    """A geometry seen as work for this family of kernels."""

    geometry: object
    dtype: np.dtype
    split: bool
    depth: int
    rows: int
    axes: tuple
    align: int  # of the input's columns at which tiles begin
    staging: int
    multiprocessors: int
    channel_min: bool
    per_image: bool

    @property
    def processors(self):
        """At least two, so that the emulator has several blocks, too."""
        return max(2, self.multiprocessors)

    @property
    def steps(self):
        height, width = self.axes
        return sum(len(phase) for phase in height.taps) * sum(len(phase) for phase in width.taps)

    @property
    def pairs_of_taps(self):
        """Of all phases; what is left of a phase counts as one."""
        height, width = self.axes
        taps = [len(row) * len(column) for row, column in itertools.product(height.taps, width.taps)]
        return sum(-(-count // _TAPS_TOGETHER) for count in taps)

    @property
    def phases(self):
        height, width = self.axes
        return len(height.taps) * len(width.taps)

    @property
    def slab(self):
        return _slab(self.dtype, self.split)

    @property
    def slabs(self):
        return -(-self.depth // self.slab)

    @property
    def last_slices(self):
        """Of 32 bytes of channels, in the last slab."""
        return -(-(self.depth - (self.slabs - 1) * self.slab) * self.dtype.itemsize // 32)

    def tiles_of(self, shape):
        """The tiles that fit for an instantiation, with their costs."""
        height, width = self.axes
        if len(width.taps) % shape.phases:
            return
        widest = _round_up(min(shape.pixels, width.base) + width.halo, 32)
        aligned = self.align // math.gcd(self.align, width.in_step)
        multiples = {aligned * wide for wide in (1, 2, 16 // self.dtype.itemsize)}  # so that stores may be wider
        for pitch, multiple in itertools.product(range(8, widest + 1, 8), multiples):
            columns = min(pitch - width.halo, shape.pixels, width.base)
            if columns < width.base:
                columns = columns // multiple * multiple
            if columns < 1:
                continue
            column_tiles = -(-width.base // columns)
            if column_tiles > 1:  # all tiles about as wide
                columns = _round_up(-(-width.base // column_tiles), multiple)
            if pitch not in (_round_up(columns + width.halo, 8), _round_up(columns + width.halo, 32)):
                continue  # the same tile comes with another pitch
            most = (shape.pixels - columns) // pitch + 1
            for rows in {min(most, height.base), most, max(1, most // 2), 1}:
                yield from self._tiles(shape, rows, columns, pitch, column_tiles)

    def _tiles(self, shape, rows, columns, pitch, column_tiles):
        """One tile, whole and in the parts it can be divided into."""
        height, width = self.axes
        batch = self.geometry.batch
        planes, staged_rows = height.in_step * width.in_step, rows + height.halo
        # The last columns of a job may reach beyond the stage; they are dropped, whatever is there.
        stage_pixels = _round_up(planes * staged_rows * pitch, 8)
        if self.is_staged_by_engine and (pitch * width.in_step > MAX_BOX or width.in_step > MAX_STEP):
            return
        rings = self._rings(shape, stage_pixels * _ROW_BYTES)
        if rings is None or stage_pixels > 32767:
            return
        stack = height.base + height.halo
        if self.per_image:
            stack = _round_up(stack, rows)
            row_tiles = batch * stack // rows
        else:
            row_tiles = -(-((batch - 1) * stack + height.base) // rows)
        tiles = row_tiles * column_tiles * self.geometry.groups
        if batch * stack + rows >= 2**31 or tiles * self._jobs(shape) >= 2**30:
            return
        tile = shape, rows, columns, pitch, column_tiles, row_tiles, stack, stage_pixels
        for parts in self._parts(shape, tiles):
            cost = self._cost(shape, parts, tiles, columns, column_tiles, pitch, staged_rows * planes, *rings[:2])
            yield _Tile(*tile, parts, *rings, cost)

    def _parts(self, shape, tiles):
        """The numbers of parts worth trying: one, and where tiles are few, all that divide its jobs evenly.

        A part has whole passes where a block must see all channels.
        """
        together = self.units * self.groups_per_tile if self.channel_min else 1
        most = self._jobs(shape) // together if tiles < 2 * self.processors else 1
        return [parts for parts in range(1, most + 1) if most % parts == 0]

    @property
    def is_staged_by_engine(self):
        """Whether the copy engine brings the input straight to where it is multiplied from."""
        return self.staging == CHANNELS and not self.split

    @property
    def box_bytes(self):
        """Of a box: of all channels of a slab, or, if rows are aligned, of those that there are."""
        if self.staging == PIXELS or self.is_staged_by_engine:
            return 0
        some = self.staging == ROWS and self.slabs == 1
        channels = self.last_slices * 32 // self.dtype.itemsize if some else self.slab
        return _box_pixels(self.staging, self.dtype, self.split) * channels * self.dtype.itemsize

    def _rings(self, shape, stage_bytes):
        """How many buffers the rings of staged input, of weights and of boxes have; None if a tile does not fit.

        First two boxes, and the stages that keep every slab of both consumers' tiles where it is for all of their jobs,
        or as many as three slabs; then weights and boxes, until their latency is hidden; then what is left.
        """
        pool, ring = shape.pool_bytes(self.channel_min), _STAGERS * self.box_bytes
        boxes = 2 if ring else 0
        pool -= boxes * ring
        most = min(_MAX_STAGES, (pool - _WEIGHT_STAGES * _WEIGHT_BYTES) // stage_bytes)
        if most < 2:
            return None
        wanted = _CONSUMERS * self.slabs if self._jobs(shape) > 1 and self.groups_per_tile == 1 else 3
        weight_stages = min(8, (pool - min(most, wanted) * stage_bytes) // _WEIGHT_BYTES)
        stages = min(_MAX_STAGES, (pool - weight_stages * _WEIGHT_BYTES) // stage_bytes)
        pool -= stages * stage_bytes + weight_stages * _WEIGHT_BYTES
        if ring:
            more = min(_MAX_BOXES - boxes, pool // ring)
            boxes, pool = boxes + more, pool - more * ring
        return stages, min(_MAX_WEIGHT_STAGES, weight_stages + pool // _WEIGHT_BYTES), boxes

    def _blocks(self, column_tiles, neighbours):
        """Persistent blocks: one for each multiprocessor, or one fewer where every block would meet the same columns in
        all of its tiles. Blocks that always have the narrow last column, say, run ahead of those beside them, and what
        both write of one sector of memory no longer meets in the L2 cache (cuda/README.md: up to twice the time).

        Args:
            neighbours: tiles that are numbered one after the other in the same columns.
        """
        every = self.processors % (column_tiles * neighbours) == 0
        return self.processors - 1 if every and column_tiles > 2 else self.processors

    def _jobs(self, shape):
        """Of a tile."""
        return self.phases // shape.phases * self.units * self.groups_per_tile

    @property
    def units(self):
        """Of a group."""
        return -(-self.rows // _ROWS)

    @property
    def groups_per_tile(self):
        return self.geometry.groups if self.channel_min else 1

    def _cost(self, shape, parts, tiles, columns, column_tiles, pitch, rows, stages, weight_stages):
        """Cycles of a multiprocessor, within a fifth: fitted to the times of 1875 plans for 23 geometries on an H200.

        The tensor cores take N / 2 cycles for 64 x N products of 32 bytes of depth, and some 210 pass between those of
        two taps and of the next two, 300 where sums are added to totals in between; a copy of weights is 1860 cycles
        under way; an epilogue takes some 35 for each column (44 in float, 15 where only the minimum is kept), more
        where phases that are neighbours in memory are computed apart, and two consumers share it. Memory is read and
        written in sectors of 32 bytes, which short rows waste. All these are in each other's way, the more so the
        closer they are.
        """
        jobs = self._jobs(shape) // parts
        units = self.units * self.groups_per_tile / parts
        slices = (self.slabs - 1) * (self.slab * self.dtype.itemsize // 32) + self.last_slices
        steps = self.steps * units
        row_bytes = columns * self.dtype.itemsize
        gaps = self.pairs_of_taps * units * self.slabs
        multiply = steps * slices * shape.pixels / 2 * (3 if self.split else 1)
        multiply += gaps * (300 if self.split else 210) + 900 * jobs
        stagings = 1 if self.groups_per_tile == 1 and _CONSUMERS * self.slabs <= stages else jobs
        staging = stagings * self.slabs * (self._staging_cycles(pitch, rows) + 540)
        staging *= 1 + 6 / (row_bytes * self.axes[1].in_step)
        weights = steps * self.slabs * 1860 / (weight_stages - 1)
        apart = shape.phases < min(4, len(self.axes[1].taps)) and not self.channel_min
        epilogue = 35 if self.dtype.itemsize == 2 else 44
        epilogue = 15 if self.channel_min else epilogue * (1 + 28 / (row_bytes * shape.phases))
        epilogue += self._store_cycles(shape, columns, column_tiles)
        epilogue = jobs * shape.phases * shape.pixels * (epilogue + 30 * apart)
        consumer = multiply + epilogue
        tile = sum(part**3.6 for part in (multiply, staging, weights, consumer / 2)) ** (1 / 3.6)
        if stages <= self.slabs:  # no slab of the next tile is staged while this one's are multiplied
            tile *= 1.1
        turns = -(-tiles // self.groups_per_tile * parts // self.processors)
        return turns * tile + turns % 2 * consumer / 4  # the last tile has the multiprocessor to itself

    def _store_cycles(self, shape, columns, column_tiles):
        """For each column, what its outputs take longer to store than by 16 bytes at a time, if rows are contiguous."""
        width = self.axes[1]
        if self.channel_min or self.staging == CHANNELS or width.step != shape.phases:
            return 0
        vector = _outputs_of_row(self.dtype, width.out_size, column_tiles, columns * shape.phases)
        return {1: 8, 2: 2}.get(vector, 0)

    def _staging_cycles(self, pitch, rows):
        """Of a stager warp, for its share of a slab: of boxes or batches of 32 pixels, or rows of whole pixels."""
        height, width = self.axes
        if self.is_staged_by_engine:
            return rows * width.in_step / _STAGERS * 190
        wide = self.dtype.itemsize == 4
        pixels, flat, box = (1640, 1325, 1000) if wide else (2400, 2010, 1000 if self.align == 8 else 1500)
        if self.split:
            pixels, flat, box = 1235, 1150, 860
        more = 315 if height.in_step * width.in_step > 1 else 0
        if self.staging == PIXELS:
            return -(-pitch * rows // (_STAGERS * 32)) * (pixels + more)
        boxes = -(-pitch * width.in_step // _SEGMENT) * rows / width.in_step / _STAGERS
        return boxes * ((flat if self.staging == FLAT else box) + more)

    def plan(self, tile, transposed):
        height, width = self.axes
        geometry, shape = self.geometry, tile.shape
        staged_rows = tile.rows + height.halo
        phases, first_step, offsets, taps, pass_step = [], [0], [], [], [0]
        for row, row_taps in enumerate(height.taps):
            for column in range(0, len(width.taps), shape.phases):
                phases.append((row, column))
                for column_taps in width.taps[column : column + shape.phases]:
                    for kh, plane_h, shift_h in row_taps:
                        for kw, plane_w, shift_w in column_taps:
                            plane = plane_h * width.in_step + plane_w
                            offsets.append((plane * staged_rows + shift_h) * tile.pitch + shift_w)
                            taps.append(kh * geometry.kernel[1] + kw)
                    first_step.append(len(offsets))
                pass_step.append(len(offsets))
        fields = dict(
            batch=geometry.batch,
            groups=geometry.groups,
            depth=self.depth,
            rows=self.rows,
            in_size=(height.in_size, width.in_size),
            in_step=(height.in_step, width.in_step),
            in_origin=(height.origin, width.origin),
            out_size=(height.out_size, width.out_size),
            out_step=(height.step, width.step),
            base_size=(height.base, width.base),
            stack=tile.stack,
            tile_rows=tile.rows,
            tile_columns=tile.columns,
            column_tiles=tile.column_tiles,
            staged_rows=staged_rows,
            pitch=tile.pitch,
            stage_pixels=tile.stage_pixels,
            stages=tile.stages,
            weight_stages=tile.weight_stages,
            boxes=tile.boxes,
            box_bytes=self.box_bytes,
            by_parts=fixed_divisor(tile.parts),
            by_groups=fixed_divisor(geometry.groups),
            by_column_tiles=fixed_divisor(tile.column_tiles),
            by_stack=fixed_divisor(tile.stack),
            span=tile.pitch * width.in_step,
            slabs=self.slabs,
            last_slices=self.last_slices,
            units=self.units,
            passes=len(phases),
            parts=tile.parts,
            jobs=self._jobs(shape) // tile.parts,
            phase=_padded(phases, (_MAX_PHASES, 2)),
            first_step=_padded(first_step, _MAX_PHASES + 1),
            offset=_padded(offsets, _MAX_STEPS + 4),
        )
        neighbours = geometry.groups // self.groups_per_tile * tile.parts
        tiles = tile.row_tiles * tile.column_tiles * neighbours
        packed_bytes = self.units * geometry.groups * len(offsets) * self.slabs * _WEIGHT_BYTES
        pack_fields = dict(
            count=packed_bytes // (32 if self.split else 16),
            depth=self.depth,
            rows=self.rows,
            units_per_group=self.units,
            slabs=self.slabs,
            passes=len(phases),
            kernel_w=geometry.kernel[1],
            pass_step=_padded(pass_step, _MAX_PHASES + 1),
            tap=_padded(taps, _MAX_STEPS),
        )
        return Plan(
            shape=shape,
            transposed=transposed,
            channel_min=self.channel_min,
            dtype=self.dtype,
            split=self.split,
            staging=self.staging,
            tiles=tiles,
            cost=tile.cost,
            blocks=min(tiles, self._blocks(tile.column_tiles, neighbours)),
            row_tiles_per_image=tile.stack // tile.rows,
            fields=fields,
            pack_fields=pack_fields,
            packed_bytes=packed_bytes,
        )


def _slab(dtype, split):
    """The channels of a slab."""
    return _ROW_BYTES // dtype.itemsize // (2 if split else 1)


def _box_pixels(staging, dtype, split):
    """Of a box, from one channel to the next."""
    if staging == CHANNELS:
        return _SEGMENT
    return _SEGMENT + 16 // dtype.itemsize * (2 if split and staging == FLAT else 1)


def fixed_divisor(divisor):
    """What a FixedDivisor of warpgroup_tile.cuh needs to divide numbers from 0 to 2^31 - 1 by this one."""
    shift = (divisor - 1).bit_length()
    return (1 << (31 + shift)) // divisor + 1, shift


def _round_up(value, multiple):
    return -(-value // multiple) * multiple


def _padded(values, shape):
    result = np.zeros(shape, np.int16)
    result[: len(values)] = values
    return result


# Kernels are cached by what their source depends on, so that a chain's numbers play no part.


def _kernel(name, type, ending):
    params = np.dtype([("gather", PARAMS), ("ending", ending)], align=True)
    file = "conv_transpose2d/warpgroup_forward.cu"
    return Kernel(name, file, type, _THREADS, params, shared_bytes=_SHARED_BYTES)


def store(plan, chain, ending, strides):
    """The kernel that stores what a chain makes of the sums; `ending` has its parameters, `strides` the output's."""
    vector = outputs_per_store(plan, ending, strides)
    return _store(
        plan.shape, plan.dtype, plan.split, plan.transposed, chain.cpp, chain.params, vector, ending["saved"] != 0
    )


@functools.cache
def _store(shape, dtype, split, transposed, cpp, chain_params, vector, save):
    ending = runtime.params(("output", "u8"), ("saved", "u8"), ("bias", "u8"), ("chain", chain_params))
    name = "conv_transpose2d" if transposed else "conv_transpose2d_input_gradient"
    type = f"WarpgroupForward<{shape.type(dtype, split, False)}, {cpp}, {vector}, {str(save).lower()}>"
    return _kernel(name, type, ending)


def moments(plan, chain, ending, strides):
    """The kernel that stores sums and leaves the moments of what a chain makes of them."""
    return _moments(
        plan.shape, plan.dtype, plan.split, chain.cpp, chain.params, outputs_per_store(plan, ending, strides)
    )


@functools.cache
def _moments(shape, dtype, split, cpp, chain_params, vector):
    ending = runtime.params(
        ("output", "u8"), ("bias", "u8"), ("moments", "u8"), ("slots", "i8"), ("chain", chain_params)
    )
    type = f"WarpgroupForwardWithMoments<{shape.type(dtype, split, False)}, {cpp}, {vector}>"
    return _kernel("conv_transpose2d_with_moments", type, ending)


def channel_min(plan):
    return _channel_min(plan.shape, plan.dtype, plan.split)


@functools.cache
def _channel_min(shape, dtype, split):
    ending = runtime.params(("values", "u8"), ("index", "u8"), ("bias", "u8"))
    type = f"WarpgroupForwardChannelMin<{shape.type(dtype, split, True)}>"
    return _kernel("conv_transpose2d_channel_min", type, ending)


@functools.cache
def pack(dtype, split):
    file = "conv_transpose2d/warpgroup_pack_weight.cu"
    type = f"WarpgroupPackWeight<{cpp_type(dtype)}, {str(split).lower()}>"
    return Kernel("conv_transpose2d_pack_weight", file, type, 256, PACK)


def launch(queue, plan, kernel, ending, gathered, weight, out_strides):
    """Packs the weight and launches `kernel` over `gathered`, the input or grad_output."""
    packed, map = _pack(queue, plan, weight, gathered)
    gather = dict(
        plan.fields,
        input=runtime.pointer(gathered),
        weight=runtime.pointer(packed),
        map=map,
        in_strides=runtime.element_strides(gathered),
        out_strides=out_strides,
        tiles=plan.tiles,
        staging=plan.staging,
    )
    kernel.launch(
        queue,
        plan.blocks,
        gather=tuple([gather[name] for name in PARAMS.names]),
        ending=tuple([ending[name] for name in kernel.params["ending"].names]),
    )


def staging_of(array, geometry):
    """How an array (N, C, H, W) can be staged: ROWS or FLAT if pixels are neighbours, CHANNELS if channels are, as far
    as the copy engine can reach them; else PIXELS."""
    pointer, channels = runtime.pointer(array), array.shape[1] // geometry.groups
    for staging, axes in (ROWS, _rows), (CHANNELS, _channels), (FLAT, _flat):
        if is_copied_by_engine(pointer, *axes(array, channels)):
            return staging
    return PIXELS


def _rows(array, channels):
    """Sizes of the five axes of an array (N, groups times channels, H, W) from W on, and the strides in bytes of all
    but the first; a stride of zero where W is none whose elements are neighbours."""
    (batch, all_channels, height, width), (step_n, step_c, step_h, step_w) = array.shape, array.strides
    size = width, height, channels, all_channels // channels, batch
    return size, _strides(size, (step_w, step_h, step_c, channels * step_c, step_n), array.itemsize)


def _channels(array, channels):
    """The same from the channels of a group on: those, groups, W, H, N."""
    (batch, all_channels, height, width), (step_n, step_c, step_h, step_w) = array.shape, array.strides
    size = channels, all_channels // channels, width, height, batch
    return size, _strides(size, (step_c, channels * step_c, step_w, step_h, step_n), array.itemsize)


def _flat(array, channels):
    """The same of an array as one long row of as many channels as lie between two that begin at a multiple of 16 bytes:
    elements, such channels of a group, groups. The row ends with the last element of the first of them."""
    align = 16 // array.itemsize
    if channels % align or min(array.strides) <= 0:
        return (0,) * 5, (0,) * 4
    (batch, all_channels, height, width), (step_n, step_c, step_h, step_w) = array.shape, array.strides
    last = (batch - 1) * step_n + (align - 1) * step_c + (height - 1) * step_h
    size = last // array.itemsize + width, channels // align, all_channels // channels, 1, 1
    return size, _strides(size, (step_w, align * step_c, channels * step_c, 16, 16), array.itemsize)


def _strides(size, strides, itemsize):
    """Those of all axes but the first; zeros unless elements are neighbours in that one. Of an axis of one element any
    will do."""
    neighbours = strides[0] == itemsize or size[0] == 1
    return [
        16 * neighbours if extent == 1 else stride * neighbours for extent, stride in zip(size, strides, strict=True)
    ][1:]


def stores(dtype):
    """What `outputs_per_store` can say: single outputs of a row, pairs, 16 bytes of them; or times -1, of channels."""
    whole = 16 // dtype.itemsize
    return (1, 2, whole, *(-(1 << i) for i in range(whole.bit_length())))


def outputs_per_store(plan, ending, strides):
    """How warpgroup_endings.cuh stores: the outputs of a row that one store writes, neighbours in memory, aligned in
    every row, image and tile, and all or none of them existing. Where the neighbours are channels, how many of these it
    writes, times -1."""
    fields, phases, itemsize = plan.fields, plan.shape.phases, plan.dtype.itemsize
    aligned = (ending["output"] | ending.get("saved", 0)) // itemsize | 16 // itemsize
    vector = 1
    if _stores_rows(plan, strides):
        outside = aligned | strides[0] | strides[1] | strides[2]
        tile = fields["column_tiles"], fields["tile_columns"] * phases
        vector = _outputs_of_row(plan.dtype, fields["out_size"][1], *tile, outside)
    if vector == 1 and strides[1] == 1:
        bits = aligned | strides[0] | strides[2] | strides[3] | fields["rows"]
        vector = -(bits & -bits)
    return vector


def fills_sectors(plan, ending, strides):
    """Whether all that a tile writes begins and ends between two sectors of 32 bytes, so that no two tiles write into
    the same one. Arrays are taken to begin at one where they are aligned to 16 bytes."""
    fields = plan.fields
    if (ending["output"] | ending["saved"]) % 16:
        return False
    if _stores_rows(plan, strides):
        tile = fields["tile_columns"] * plan.shape.phases if fields["column_tiles"] > 1 else 0
        bits = strides[0] | strides[1] | strides[2] | tile
    else:
        bits = strides[0] | strides[2] | strides[3] if strides[1] == 1 else 1
    return bits * plan.dtype.itemsize % _SECTOR == 0


def _stores_rows(plan, strides):
    """Whether a job's outputs of a row are neighbours in memory: those of all phases of the row."""
    return strides[3] == 1 and plan.fields["out_step"][1] == plan.shape.phases


def _outputs_of_row(dtype, out_size, column_tiles, tile_outputs, outside=0):
    """The outputs of a row that one store may write: 1, 2, or 16 bytes of them. Rows and tiles are multiples of these,
    and so are the places of rows, which `outside` has or-ed together."""
    whole = 16 // dtype.itemsize
    bits = whole | outside | out_size | (tile_outputs if column_tiles > 1 else 0)
    vector = bits & -bits
    return vector if vector == whole else min(vector, 2)


def _pack(queue, plan, weight, gathered):
    """The weight as warpgroup_gather.cuh reads it, and the address of the map behind it by which the input is copied.
    Depth runs along the weight's first axis for the transposed convolution."""
    strides = runtime.element_strides(weight)
    packed = queue.empty((plan.packed_bytes + MAP_BYTES,), np.dtype("uint8"))
    map = 0 if plan.staging == PIXELS else runtime.pointer(packed) + plan.packed_bytes
    depth_axis = 0 if plan.transposed else 1
    pack(plan.dtype, plan.split).launch(
        queue,
        -(-plan.pack_fields["count"] // 256),
        weight=runtime.pointer(weight),
        packed=runtime.pointer(packed),
        group_stride=(plan.fields["depth"] if plan.transposed else plan.fields["rows"]) * strides[0],
        depth_stride=strides[depth_axis],
        row_stride=strides[1 - depth_axis],
        tap_strides=strides[2:],
        **plan.pack_fields,
        map=map,
        input=_tensor(plan, gathered),
    )
    return packed, map


def _tensor(plan, gathered):
    """TENSOR's fields for a plan's boxes: some pixels of a row and a slab's channels, or those of a row's planes."""
    if plan.staging == PIXELS:
        return NO_TENSOR
    fields, pointer, channels = plan.fields, runtime.pointer(gathered), plan.fields["depth"]
    slab, align = plan.slab, 16 // gathered.itemsize
    if plan.staging == CHANNELS and plan.split:
        return tensor_fields(pointer, *_channels(gathered, channels), (slab, 1, _SEGMENT, 1, 1), (1,) * 5, False)
    if plan.staging == CHANNELS:
        box, step = (slab, 1, fields["span"], 1, 1), (1, 1, fields["in_step"][1], 1, 1)
        return tensor_fields(pointer, *_channels(gathered, channels), box, step, True)
    pixels = _box_pixels(plan.staging, plan.dtype, plan.split)
    if plan.staging == FLAT:
        return tensor_fields(pointer, *_flat(gathered, channels), (pixels, slab // align, 1, 1, 1), (1,) * 5, False)
    box = pixels, 1, fields["box_bytes"] // (pixels * gathered.itemsize), 1, 1
    return tensor_fields(pointer, *_rows(gathered, channels), box, (1,) * 5, False)


def kernels():
    """Every instantiation, for the tests that compile them all; chains stand for the endless number there can be."""
    from .. import epilogue

    chain = chain_of((epilogue.Add(0.5), epilogue.Minimum(0.0), epilogue.GELU(), epilogue.Mul(2.0)))
    gelu = chain_of((epilogue.GELU(),))
    whole = [(dtype, False, SHAPES) for dtype in DTYPES]
    for dtype, split, shapes in (*whole, (np.dtype("float32"), True, SPLIT_SHAPES)):
        for shape, vector in itertools.product(shapes, stores(dtype)):
            yield _store(shape, dtype, split, True, IDENTITY.cpp, IDENTITY.params, vector, False)
            saves = abs(vector) * dtype.itemsize == 16  # only where sectors are filled
            yield _store(shape, dtype, split, True, chain.cpp, chain.params, vector, saves)
            yield _moments(shape, dtype, split, gelu.cpp, gelu.params, vector)
        for shape in shapes:
            yield _channel_min(shape, dtype, split)
        yield pack(dtype, split)
