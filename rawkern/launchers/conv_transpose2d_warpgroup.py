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

_MAX_STEPS, _MAX_PHASES, _MAX_STAGES, _MAX_WEIGHT_STAGES = 256, 64, 8, 12
_THREADS, _CONSUMERS, _CONSUMER_WARPS, _STAGERS = 384, 2, 8, 3
_ROWS = 64  # of a job: output channels
_ROW_BYTES = 128  # of a pixel's slab, or of a row of packed weights
_WEIGHT_STAGES = 4  # at least
_WEIGHT_BYTES = _ROWS * _ROW_BYTES  # of a slab and tap
_RAW_BYTES = {2: 3 * 4 * 32 * _ROW_BYTES, 4: 128}  # of the stagers' buffers, by element size
_SHARED_BYTES = 227 * 1024
_BARRIER_BYTES = 42 * 16  # on the emulator; half of it on a GPU
DTYPES = (np.dtype("float32"), np.dtype("float16"), bfloat16)

PARAMS = runtime.params(
    ("input", "u8"),
    ("weight", "u8"),
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
    ("channels_last", "i4"),
    ("vector", "i4"),
    ("out_vector", "i4"),
    ("phase", "i2", (_MAX_PHASES, 2)),
    ("first_step", "i2", (_MAX_PHASES + 1,)),
    ("offset", "i2", (_MAX_STEPS + 1,)),
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
)


@dataclass(frozen=True)
class Shape:
    """An instantiation's sizes: the phases of a pass, and the columns of a job in each of them."""

    phases: int
    pixels: int

    def pool_bytes(self, dtype, channel_min):
        """Shared memory left for staged input and weights, in whole swizzle patterns."""
        ending = _CONSUMER_WARPS * 16 * (32 + 8) * 4
        if channel_min:
            ending = (_CONSUMER_WARPS + _CONSUMERS) * self.phases * (self.pixels + 4) * 4
            ending += _CONSUMER_WARPS * self.phases * self.pixels * 2
        return (_SHARED_BYTES - _RAW_BYTES[dtype.itemsize] - ending - _BARRIER_BYTES) // 1024 * 1024

    def type(self, dtype, channel_min):
        return f"{cpp_type(dtype)}, {self.phases}, {self.pixels}, {self.pool_bytes(dtype, channel_min)}"


#: What there is. Neighbouring phases are computed together, so that rows of the output are stored whole; few pixels
#: want short jobs.
SHAPES = (Shape(1, 256), Shape(2, 128), Shape(4, 64), Shape(1, 64))


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
    tiles: int
    blocks: int
    cost: float  # cycles, roughly
    row_tiles_per_image: int  # where tiles do not straddle images
    fields: dict  # of PARAMS, but for what a call brings
    pack_fields: dict  # of PACK
    packed_bytes: int

    @property
    def slots(self):
        """Partial moments per channel of an image."""
        return self.row_tiles_per_image * self.fields["column_tiles"] * self.fields["passes"]


@functools.lru_cache(maxsize=4096)
def plan(geometry, dtype, precision, arch, multiprocessors, *, transposed, channel_min=False, per_image=False):
    """The plan for a geometry, or None where this family of kernels does not serve.

    It serves sm_90a, 16-bit types, and float32 in TF32, unless a tap reaches so far that no tile fits in shared memory.

    Args:
        transposed: the transposed convolution; else its input gradient.
        channel_min: whether a block must see all channels of its pixels.
        per_image: whether tiles must not straddle images.
    """
    tensor_core = dtype.itemsize == 2 or (dtype == np.float32 and check_precision(precision) == "tf32")
    if arch != "sm_90a" or not tensor_core or geometry.batch == 0:
        return None
    depth, rows = geometry.depth_and_rows(transposed)
    sizes = list(zip(geometry.input_size, geometry.output_size, strict=True))
    if not transposed:
        sizes = [size[::-1] for size in sizes]
    height, width = zip(sizes, geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True)
    rows_axis = Axis.of(*height[0], *height[1:], transposed, 1)
    works = []
    for align in _alignments(dtype):
        if width[0][0] % align == 0:  # rows of other lengths are not aligned
            axes = rows_axis, Axis.of(*width[0], *width[1:], transposed, align)
            works.append(_Work(geometry, dtype, depth, rows, axes, align, multiprocessors, channel_min, per_image))
    if works[0].steps > _MAX_STEPS or works[0].phases > _MAX_PHASES:
        return None
    candidates = [(tile.cost, work, tile) for work in works for shape in SHAPES for tile in work.tiles_of(shape)]
    if not candidates:
        return None
    _, work, tile = min(candidates, key=lambda candidate: candidate[0])
    return work.plan(tile, transposed)


def _alignments(dtype):
    """Multiples of pixels at which tiles may begin: of as many 16-bit ones as a copy of at most 16 bytes brings."""
    return (1, 2, 4, 8) if dtype.itemsize == 2 else (1,)


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
    cost: float


@dataclass(frozen=True)
class _Work:
    """A geometry seen as work for this family of kernels."""

    geometry: object
    dtype: np.dtype
    depth: int
    rows: int
    axes: tuple
    align: int  # of the columns at which tiles begin
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
    def phases(self):
        height, width = self.axes
        return len(height.taps) * len(width.taps)

    @property
    def slab(self):
        return _ROW_BYTES // self.dtype.itemsize

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
        aligned = self.align // math.gcd(self.align, width.in_step)
        widest = _round_up(min(shape.pixels, width.base) + width.halo, 32)
        for pitch, multiple in itertools.product(range(8, widest + 1, 8), {aligned, math.lcm(2, aligned)}):
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
            cost = self._cost(shape, parts, tiles, columns, staged_rows * planes * pitch, *rings)
            yield _Tile(*tile, parts, *rings, cost)

    def _parts(self, shape, tiles):
        """The numbers of parts worth trying: one, and where tiles are few, all that divide its jobs evenly.

        A part has whole passes where a block must see all channels.
        """
        together = self.units * self.groups_per_tile if self.channel_min else 1
        most = self._jobs(shape) // together if tiles < 2 * self.processors else 1
        return [parts for parts in range(1, most + 1) if most % parts == 0]

    def _rings(self, shape, stage_bytes):
        """How many buffers the rings of staged input and of weights have; None if a tile does not fit.

        First the stages that keep every slab of both consumers' tiles where it is for all of their jobs, or as many as
        three slabs; then weights, until their latency is hidden; then what is left.
        """
        pool = shape.pool_bytes(self.dtype, self.channel_min)
        most = min(_MAX_STAGES, (pool - _WEIGHT_STAGES * _WEIGHT_BYTES) // stage_bytes)
        if most < 2:
            return None
        wanted = _CONSUMERS * self.slabs if self._jobs(shape) > 1 and self.groups_per_tile == 1 else 3
        weight_stages = min(8, (pool - min(most, wanted) * stage_bytes) // _WEIGHT_BYTES)
        stages = min(_MAX_STAGES, (pool - weight_stages * _WEIGHT_BYTES) // stage_bytes)
        return stages, min(_MAX_WEIGHT_STAGES, (pool - stages * stage_bytes) // _WEIGHT_BYTES)

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

    def _cost(self, shape, parts, tiles, columns, staged_pixels, stages, weight_stages):
        """Cycles of a multiprocessor, within a fifth: fitted to the times of 490 plans for 17 geometries on an H200.

        The tensor cores take N / 2 cycles for 64 x N products of 32 bytes of depth, and some 170 pass between one tap's
        and the next one's; a stager warp takes some 1800 for each batch of 32 pixels, whichever way they are loaded,
        except single 16-bit pixels; a copy of weights is 1050 cycles under way; an epilogue takes some 30 for each
        column (45 in float), more where phases that are neighbours in memory are computed apart, and two consumers
        share it. Memory is read and written in sectors of 32 bytes, which short rows waste. All these are in each
        other's way, the more so the closer they are.
        """
        jobs = self._jobs(shape) // parts
        units = self.units * self.groups_per_tile / parts
        slices = (self.slabs - 1) * 4 + self.last_slices
        steps = self.steps * units
        row_bytes = columns * self.dtype.itemsize
        multiply = steps * (slices * shape.pixels / 2 + 170 * self.slabs) + 1150 * jobs
        stagings = 1 if self.groups_per_tile == 1 and _CONSUMERS * self.slabs <= stages else jobs
        batches = -(-staged_pixels // (_STAGERS * 32))
        staging = stagings * self.slabs * (batches * self._batch_cycles() + 450)
        staging *= 1 + 4 / (row_bytes * self.axes[1].in_step)
        weights = steps * self.slabs * 1050 / (weight_stages - 1)
        apart = shape.phases < min(4, len(self.axes[1].taps)) and not self.channel_min
        epilogue = 30 if self.dtype.itemsize == 2 else 45
        epilogue *= 1 + 40 / (row_bytes * shape.phases)
        epilogue = jobs * shape.phases * shape.pixels * (epilogue + 50 * apart)
        consumer = multiply + epilogue
        tile = sum(part**2.6 for part in (multiply, staging, weights, consumer / 2)) ** (1 / 2.6)
        turns = -(-tiles // self.groups_per_tile * parts // self.processors)
        return turns * tile + turns % 2 * consumer / 4  # the last tile has the multiprocessor to itself

    def _batch_cycles(self):
        """Of a stager warp, for 32 pixels of a slab."""
        height, width = self.axes
        cycles = 1650 if self.dtype.itemsize == 4 else {1: 2600, 2: 1830, 4: 1810, 8: 1790}[self.align]
        return cycles + (250 if height.in_step * width.in_step > 1 else 0)

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
            slabs=self.slabs,
            last_slices=self.last_slices,
            units=self.units,
            passes=len(phases),
            parts=tile.parts,
            jobs=self._jobs(shape) // tile.parts,
            phase=_padded(phases, (_MAX_PHASES, 2)),
            first_step=_padded(first_step, _MAX_PHASES + 1),
            offset=_padded(offsets, _MAX_STEPS + 1),
        )
        tiles = tile.row_tiles * tile.column_tiles * geometry.groups // self.groups_per_tile * tile.parts
        packed_bytes = self.units * geometry.groups * len(offsets) * self.slabs * _ROWS * _ROW_BYTES
        pack_fields = dict(
            count=packed_bytes // 16,
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
            tiles=tiles,
            cost=tile.cost,
            blocks=min(tiles, self.processors),
            row_tiles_per_image=tile.stack // tile.rows,
            fields=fields,
            pack_fields=pack_fields,
            packed_bytes=packed_bytes,
        )


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


def store(plan, chain):
    return _store(plan.shape, plan.dtype, plan.transposed, chain.cpp, chain.params)


@functools.cache
def _store(shape, dtype, transposed, cpp, chain_params):
    ending = runtime.params(("output", "u8"), ("saved", "u8"), ("bias", "u8"), ("chain", chain_params))
    name = "conv_transpose2d" if transposed else "conv_transpose2d_input_gradient"
    return _kernel(name, f"WarpgroupForward<{shape.type(dtype, False)}, {cpp}>", ending)


def moments(plan, chain):
    return _moments(plan.shape, plan.dtype, chain.cpp, chain.params)


@functools.cache
def _moments(shape, dtype, cpp, chain_params):
    ending = runtime.params(
        ("output", "u8"), ("bias", "u8"), ("moments", "u8"), ("slots", "i8"), ("chain", chain_params)
    )
    type = f"WarpgroupForwardWithMoments<{shape.type(dtype, False)}, {cpp}>"
    return _kernel("conv_transpose2d_with_moments", type, ending)


def channel_min(plan):
    return _channel_min(plan.shape, plan.dtype)


@functools.cache
def _channel_min(shape, dtype):
    ending = runtime.params(("values", "u8"), ("index", "u8"), ("bias", "u8"))
    type = f"WarpgroupForwardChannelMin<{shape.type(dtype, True)}>"
    return _kernel("conv_transpose2d_channel_min", type, ending)


@functools.cache
def pack(dtype):
    file, type = "conv_transpose2d/warpgroup_pack_weight.cu", f"WarpgroupPackWeight<{cpp_type(dtype)}>"
    return Kernel("conv_transpose2d_pack_weight", file, type, 256, PACK)


def launch(queue, plan, kernel, ending, gathered, weight, out_strides):
    """Packs the weight and launches `kernel` over `gathered`, the input or grad_output."""
    strides = runtime.element_strides(gathered)
    packed = _pack(queue, plan, weight)
    gather = dict(
        plan.fields,
        input=runtime.pointer(gathered),
        weight=runtime.pointer(packed),
        in_strides=strides,
        out_strides=out_strides,
        tiles=plan.tiles,
        channels_last=_channels_last(plan, gathered, strides),
        vector=pixels_per_copy(plan, gathered, strides),
        out_vector=outputs_per_store(plan, ending, out_strides),
    )
    kernel.launch(
        queue,
        plan.blocks,
        gather=tuple([gather[name] for name in PARAMS.names]),
        ending=tuple([ending[name] for name in kernel.params["ending"].names]),
    )


def _channels_last(plan, array, strides):
    """Whether channels can be loaded 16 bytes at a time."""
    unit = 16 // array.itemsize
    aligned = runtime.pointer(array) % 16 == 0 and plan.fields["depth"] % unit == 0
    return strides[1] == 1 and aligned and all(stride % unit == 0 for stride in (strides[0], *strides[2:]))


def pixels_per_copy(plan, array, strides):
    """The 16-bit pixels that one copy of at most 16 bytes may bring: aligned in every row, image and tile, and either
    all inside the image or all outside."""
    if strides[3] != 1 or array.itemsize != 2:
        return 1
    fields = plan.fields
    bits = strides[0] | strides[1] | strides[2] | fields["in_size"][1] | fields["in_origin"][1]
    bits |= runtime.pointer(array) // 2 | 8
    if fields["column_tiles"] > 1:
        bits |= fields["tile_columns"] * fields["in_step"][1]
    return bits & -bits


def outputs_per_store(plan, ending, strides):
    """How warpgroup_endings.cuh stores rows: the outputs that one store of at most 16 bytes may write, neighbours in
    memory, aligned in every row, image and tile, and all or none of them existing; 0 where channels are neighbours."""
    fields, phases, itemsize = plan.fields, plan.shape.phases, plan.dtype.itemsize
    if plan.channel_min:
        return 1
    vector = 1
    if strides[3] == 1 and fields["out_step"][1] == phases:
        bits = strides[0] | strides[1] | strides[2] | fields["out_size"][1]
        bits |= (ending["output"] | ending.get("saved", 0)) // itemsize | 16 // itemsize
        if fields["column_tiles"] > 1:
            bits |= fields["tile_columns"] * phases
        vector = bits & -bits
    return 0 if vector == 1 and strides[1] == 1 else vector


def _pack(queue, plan, weight):
    """The weight as warpgroup_gather.cuh reads it. Depth runs along its first axis for the transposed convolution."""
    strides = runtime.element_strides(weight)
    packed = queue.empty((plan.packed_bytes,), np.dtype("uint8"))
    depth_axis = 0 if plan.transposed else 1
    pack(plan.dtype).launch(
        queue,
        -(-plan.pack_fields["count"] // 256),
        weight=runtime.pointer(weight),
        packed=runtime.pointer(packed),
        group_stride=(plan.fields["depth"] if plan.transposed else plan.fields["rows"]) * strides[0],
        depth_stride=strides[depth_axis],
        row_stride=strides[1 - depth_axis],
        tap_strides=strides[2:],
        **plan.pack_fields,
    )
    return packed


def kernels():
    """Every instantiation, for the tests that compile them all; chains stand for the endless number there can be."""
    from .. import epilogue

    chains = [IDENTITY, chain_of((epilogue.Add(0.5), epilogue.Minimum(0.0), epilogue.GELU(), epilogue.Mul(2.0)))]
    gelu = chain_of((epilogue.GELU(),))
    for dtype in DTYPES:
        for shape in SHAPES:
            for chain in chains:
                yield _store(shape, dtype, True, chain.cpp, chain.params)
            yield _moments(shape, dtype, gelu.cpp, gelu.params)
            yield _channel_min(shape, dtype)
        yield pack(dtype)
