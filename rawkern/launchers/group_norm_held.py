"""Normalisation of groups that registers can hold (cuda/group_norm_held.cu): which they are, how they are spread."""

import functools
from dataclasses import dataclass

import numpy as np

from .. import runtime
from ..runtime import Kernel, cpp_type, pointer
from .chain import chain_of
from .group_norm_kernels import channel_gradients, check_chain, power_of_two
from .group_norm_sizes import FLOAT64, is_channels_last
from .layout import contiguous

THREADS = 512
VALUES = 8  # that a thread holds
_SECTOR = 32  # bytes that memory delivers at once
_BLOCKS = 512  # some two for each multiprocessor of a large GPU; beyond, blocks take more images one after the other
_MAX_ROUNDS = 64  # sums over the images of a thread may be float

HELD = runtime.params(
    ("images", "i8"),
    ("inverse_size", "f8"),
    ("groups", "i4"),
    ("channels_per_group", "i4"),
    ("size", "i4"),
    ("divisor", "i4"),
    ("reciprocal", "u4"),
    ("jump", "u4"),
    ("loads", "i4"),
    ("stride", "i4"),
    ("team_bits", "i4"),
    ("across_bits", "i4"),
    ("rounds", "i4"),
    ("channels_last", "i4"),
)


@dataclass(frozen=True)
class HeldPlan:
    """How groups are spread over teams of threads.

    Attributes:
        width: elements of a vector: 16 bytes' worth, or 1.
        forward_blocks: blocks of the forward kernel, of as many groups as there are teams.
        slots: parts into which the backward kernel divides the images; a block takes one part of some groups.
        backward_blocks: its blocks.
        fields: of the kernels' HeldGroups.
    """

    width: int
    forward_blocks: int
    slots: int
    backward_blocks: int
    fields: object

    @classmethod
    def of(cls, sizes, *arrays):
        """For these arrays, all of the layout of the first (None is skipped); None if groups cannot be held."""
        arrays = [array for array in arrays if array is not None]
        channels_last, itemsize = is_channels_last(arrays[0]), arrays[0].itemsize
        if sizes.is_empty or sizes.group_size > THREADS * VALUES or sizes.channels >= 2**30:
            return None
        if channels_last and sizes.channels_per_group * itemsize < _SECTOR:
            return None  # a group alone would use a part of what memory delivers; walking along rows uses all of it
        run = sizes.channels_per_group if channels_last else sizes.group_size
        width = 16 // itemsize
        if run % width or any(pointer(array) % 16 for array in arrays):
            width = 1
        vectors = sizes.group_size // width
        team = _team(vectors, VALUES // width)
        images = min(THREADS // team, power_of_two(sizes.batch))  # side by side in a block
        across = THREADS // team // images
        columns, parts = -(-sizes.num_groups // across), -(-sizes.batch // images)
        rounds = min(_MAX_ROUNDS, max(1, columns * parts // _BLOCKS))
        slots = -(-parts // rounds)
        divisor = sizes.channels_per_group if channels_last else sizes.spatial
        fields = (sizes.batch, 1 / sizes.group_size, sizes.num_groups, sizes.channels_per_group)
        jump = sizes.channels - sizes.channels_per_group if channels_last else 0
        fields += (sizes.group_size, divisor, -(-(2**31) // divisor), jump, -(-vectors // team), team * width)
        fields += (team.bit_length() - 1, across.bit_length() - 1, rounds, channels_last)
        forward_blocks = -(-sizes.batch * sizes.num_groups * team // THREADS)
        return cls(width, forward_blocks, slots, columns * slots, np.array(fields, HELD)[()])


def _team(vectors, loads):
    """Threads for a group: few, which spares sums between them, but 8 if there are vectors for them, side by side."""
    return max(min(8, power_of_two(vectors)), power_of_two(-(-vectors // loads)))


def normalize_held(queue, plan, input, mean, rstd, weight, bias, eps, chain, out):
    """Fills mean, rstd and out = (chain(input) - mean) * rstd * weight + bias."""
    weight, bias = contiguous(queue, weight), contiguous(queue, bias)
    _kernel("NormalizeHeld", input.dtype, chain, plan.width).launch(
        queue,
        plan.forward_blocks,
        input=pointer(input),
        output=pointer(out),
        mean=pointer(mean),
        rstd=pointer(rstd),
        weight=pointer(weight),
        bias=pointer(bias),
        groups=plan.fields,
        eps=eps,
        chain=chain.pack(),
    )


def gradients_held(
    queue, sizes, plan, grad_output, input, mean, rstd, weight, chain, grad_input, grad_weight, grad_bias
):
    """Fills the gradients, each of which may be None; `weight` is contiguous."""
    sums = None
    if plan.slots > 1 and (grad_weight is not None or grad_bias is not None):
        sums = queue.empty((plan.slots, sizes.channels, 2), FLOAT64)
    _kernel("GradientsHeld", input.dtype, chain, plan.width).launch(
        queue,
        plan.backward_blocks,
        grad_output=pointer(grad_output),
        input=pointer(input),
        grad_input=pointer(grad_input),
        mean=pointer(mean),
        rstd=pointer(rstd),
        weight=pointer(weight),
        sums=pointer(sums),
        grad_weight=pointer(grad_weight),
        grad_bias=pointer(grad_bias),
        groups=plan.fields,
        slots=plan.slots,
        chain=chain.pack(),
    )
    if sums is not None:
        channel_gradients(queue, input.dtype, sums, grad_weight, grad_bias, plan.slots, sizes.channels, 1)


_FIELDS = {
    "NormalizeHeld": (
        *((name, "u8") for name in ("input", "output", "mean", "rstd", "weight", "bias")),
        ("groups", HELD),
        ("eps", "f8"),
    ),
    "GradientsHeld": (
        *((name, "u8") for name in ("grad_output", "input", "grad_input", "mean", "rstd", "weight")),
        *((name, "u8") for name in ("sums", "grad_weight", "grad_bias")),
        ("groups", HELD),
        ("slots", "i8"),
    ),
}
_NAMES = {"NormalizeHeld": "group_norm_held", "GradientsHeld": "group_norm_held_gradients"}


def _kernel(struct, dtype, chain, width):
    check_chain(chain)
    return _instance(struct, dtype, chain.cpp, chain.params, width)


@functools.cache
def _instance(struct, dtype, cpp, chain_params, width):
    itemsize = np.dtype(dtype).itemsize
    wide = 4 if itemsize == 2 else 8  # bytes of the kernels' W
    shared = (2 * wide + itemsize) * THREADS * VALUES + 16 * THREADS // 32 + 16
    return Kernel(
        name=_NAMES[struct],
        file="group_norm_held.cu",
        type=f"{struct}<{cpp_type(dtype)}, {cpp}, {width}>",
        threads=THREADS,
        params=runtime.params(*_FIELDS[struct], ("chain", chain_params)),
        shared_bytes=shared if struct == "GradientsHeld" else 0,
    )


def held_kernels(chain):
    """The instantiations for one chain and all dtypes."""
    for dtype in runtime.CPP_TYPES:
        for width in (1, 16 // np.dtype(dtype).itemsize):
            for struct in _FIELDS:
                yield _kernel(struct, dtype, chain, width)


def kernels():
    """Every instantiation, for the tests that compile them all."""
    yield from held_kernels(chain_of(()))
