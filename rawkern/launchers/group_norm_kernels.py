"""The kernels of group_norm.cu: which there are, their parameters, and how rows are spread over threads."""

import functools
from dataclasses import dataclass

import numpy as np

from .. import runtime
from ..runtime import Kernel, cpp_type, pointer
from .chain import chain_of
from .group_norm_sizes import is_channels_last

THREADS = 256

ROWS = runtime.params(
    ("rows", "i8"),
    ("spatial", "i8"),
    ("slots", "i8"),
    ("slot_length", "i8"),
    ("channels", "i8"),
    ("lanes", "i4"),
    ("channels_last", "i4"),
    ("vector", "i4"),
    ("unused", "i4"),
)
GROUPS = runtime.params(("groups", "i8"), ("channels_per_group", "i8"))
_STATISTICS = runtime.params(
    ("moments", "u8"),
    ("mean", "u8"),
    ("rstd", "u8"),
    ("count", "i8"),
    ("entries", "i8"),
    ("eps", "f8"),
    ("team", "i8"),
)
_MEANS = runtime.params(
    ("sums", "u8"),
    ("weight", "u8"),
    ("second_weight", "u8"),
    ("means", "u8"),
    ("groups", GROUPS),
    ("count", "i8"),
    ("slots", "i8"),
    ("elements", "f8"),
    ("team", "i8"),
)
_CHANNEL_GRADIENTS = runtime.params(
    ("sums", "u8"),
    ("grad_weight", "u8"),
    ("grad_bias", "u8"),
    ("images", "i8"),
    ("channels", "i8"),
    ("slots", "i8"),
    ("width", "i8"),
    ("weight_factor", "f8"),
)
_SECOND_CHANNEL_GRADIENTS = runtime.params(
    ("sums", "u8"),
    ("means", "u8"),
    ("rstd", "u8"),
    ("grad_weight", "u8"),
    ("groups", GROUPS),
    ("images", "i8"),
    ("channels", "i8"),
    ("slots", "i8"),
    ("width", "i8"),
)


@dataclass(frozen=True)
class RowPlan:
    """How rows are spread over threads (cuda/include/team_walk.cuh)."""

    slots: int
    blocks: int
    fields: object

    @classmethod
    def of(cls, sizes, *arrays):
        """For kernels that walk all of these arrays at once (None is skipped), all of the layout of the first."""
        arrays = [array for array in arrays if array is not None]
        channels_last = is_channels_last(arrays[0])
        rows, spatial = sizes.batch * sizes.channels, sizes.spatial
        if channels_last:
            lanes = 32 // min(32, power_of_two(sizes.channels + 1) // 2)
            slot_length = 128 * lanes
        else:
            lanes = min(32, power_of_two(-(-spatial // 8)))
            slot_length = 4096 if rows * (spatial // 4096) >= 4096 else 1024
        slots = max(1, -(-spatial // slot_length))
        vector = not channels_last and not any(pointer(array) % 16 for array in arrays)
        warps = -(-rows * lanes // 32) * slots
        fields = (rows, spatial, slots, slot_length, sizes.channels, lanes, channels_last, vector, 0)
        return cls(slots, -(-warps * 32 // THREADS), np.array(fields, ROWS)[()])


def groups_of(sizes):
    """The fields of `Groups`."""
    return np.array((sizes.num_groups, sizes.channels_per_group), GROUPS)[()]


def power_of_two(n):
    """The smallest power of two that is not below n; 1 for 0."""
    return 1 << max(0, n - 1).bit_length()


def team_of(entries):
    """Threads that combine `entries` values: up to a warp for few, a block for many."""
    return THREADS if entries > 128 else min(32, power_of_two(-(-entries // 4)))


def channel_width(channels, slots):
    """Channels that one block sums, see ChannelTotal."""
    return 1 if slots > 1 else min(32, power_of_two(-(-channels // 128)))


def _kernel(name, type, params):
    return Kernel(name=name, file="group_norm.cu", type=type, threads=THREADS, params=params)


@functools.cache
def _walking_kernel(name, struct, arrays, dtype, cpp, chain_params, groups=True):
    """A kernel that walks rows: pointers, the rows, the groups, and the chain if it takes one."""
    fields = [(array, "u8") for array in arrays] + [("rows", ROWS)]
    fields += [("groups", GROUPS)] if groups else []
    fields += [("chain", chain_params)] if cpp else []
    arguments = ", ".join(part for part in (cpp_type(dtype), cpp) if part)
    return _kernel(name, f"{struct}<{arguments}>", runtime.params(*fields))


def check_chain(chain):
    """Raises ValueError if functions before a normalisation take tensors."""
    if chain.tensor_count:
        raise ValueError("the functions before a normalisation take no tensors")


def _chained_kernel(name, struct, arrays, dtype, chain, groups=True):
    check_chain(chain)
    return _walking_kernel(name, struct, arrays, dtype, chain.cpp, chain.params, groups)


def row_moments_kernel(dtype, chain):
    return _chained_kernel("group_norm_row_moments", "RowMoments", ("input", "moments"), dtype, chain, groups=False)


@functools.cache
def statistics_kernel():
    return _kernel("group_norm_statistics", "GroupStatistics", _STATISTICS)


def normalize_kernel(dtype, chain):
    arrays = ("input", "output", "mean", "rstd", "weight", "bias")
    return _chained_kernel("group_norm_normalize", "Normalize", arrays, dtype, chain)


def row_sums_kernel(dtype, chain):
    arrays = ("grad_output", "input", "mean", "rstd", "sums")
    return _chained_kernel("group_norm_row_sums", "RowSums", arrays, dtype, chain)


@functools.cache
def group_means_kernel(dtype, terms):
    return _kernel("group_norm_group_means", f"GroupMeans<{cpp_type(dtype)}, {terms}>", _MEANS)


@functools.cache
def channel_gradients_kernel(dtype):
    return _kernel("group_norm_channel_gradients", f"ChannelGradients<{cpp_type(dtype)}>", _CHANNEL_GRADIENTS)


def channel_gradients(queue, dtype, sums, grad_weight, grad_bias, images, channels, slots, weight_factor=1.0):
    """Fills the gradients, each of which may be None, from partial sums, float64, (images, channels, slots, 2)."""
    width = channel_width(channels, slots)
    channel_gradients_kernel(dtype).launch(
        queue,
        -(-channels // width),
        sums=pointer(sums),
        grad_weight=pointer(grad_weight),
        grad_bias=pointer(grad_bias),
        images=images,
        channels=channels,
        slots=slots,
        width=width,
        weight_factor=weight_factor,
    )


def grad_input_kernel(dtype, chain):
    arrays = ("grad_output", "input", "grad_input", "mean", "rstd", "weight", "means", "sums")
    return _chained_kernel("group_norm_grad_input", "GradInput", arrays, dtype, chain)


def second_row_sums_kernel(dtype):
    arrays = ("grad_output", "input", "v", "mean", "rstd", "sums")
    return _walking_kernel("group_norm_second_row_sums", "SecondRowSums", arrays, dtype, None, None)


@functools.cache
def second_channel_gradients_kernel(dtype):
    type = f"SecondChannelGradients<{cpp_type(dtype)}>"
    return _kernel("group_norm_second_channel_gradients", type, _SECOND_CHANNEL_GRADIENTS)


def second_gradients_kernel(dtype):
    arrays = (
        "grad_output",
        "input",
        "v",
        "grad_grad_output",
        "grad_input",
        "mean",
        "rstd",
        "weight",
        "u",
        "t",
        "means",
    )
    return _walking_kernel("group_norm_second_gradients", "SecondGradients", arrays, dtype, None, None)


def chained_kernels(chain):
    """The instantiations for one chain and all dtypes."""
    for dtype in runtime.CPP_TYPES:
        for kernel_of in (row_moments_kernel, normalize_kernel, row_sums_kernel, grad_input_kernel):
            yield kernel_of(dtype, chain)


def kernels():
    """Every instantiation, for the tests that compile them all."""
    yield from chained_kernels(chain_of(()))
    yield statistics_kernel()
    for dtype in runtime.CPP_TYPES:
        yield group_means_kernel(dtype, "FirstTerms")
        yield group_means_kernel(dtype, "SecondTerms")
        yield channel_gradients_kernel(dtype)
        yield second_row_sums_kernel(dtype)
        yield second_channel_gradients_kernel(dtype)
        yield second_gradients_kernel(dtype)
