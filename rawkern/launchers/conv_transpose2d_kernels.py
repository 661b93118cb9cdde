"""The kernels of cuda/conv_transpose2d and the layout of their parameters."""

import functools

import numpy as np

from .. import runtime
from ..runtime import Kernel
from . import block_math
from .chain import IDENTITY, chain_of

GATHER = runtime.params(
    ("input", "u8"),
    ("weight", "u8"),
    ("in_strides", "i8", 4),
    ("out_strides", "i8", 4),
    ("image_span", "i8"),
    ("tiles", "i8"),
    ("height", "i4", 8),
    ("width", "i4", 8),
    ("batch", "i4"),
    ("groups", "i4"),
    ("depth", "i4"),
    ("depth_words", "i4"),
    ("rows", "i4"),
    ("rows_padded", "i4"),
)
PACK = runtime.params(
    ("weight", "u8"),
    ("packed", "u8"),
    ("group_stride", "i8"),
    ("depth_stride", "i8"),
    ("row_stride", "i8"),
    ("tap_strides", "i8", 2),
    ("words", "i8"),
    ("kernel_h", "i4"),
    ("kernel_w", "i4"),
    ("depth", "i4"),
    ("depth_words", "i4"),
    ("rows", "i4"),
    ("rows_padded", "i4"),
)


CHANNEL_MIN = "conv_transpose2d_channel_min"


# Kernels are cached by what their source depends on, so that a chain's numbers play no part.


def _gather(name, type, threads, ending):
    """A kernel made of gather.cuh."""
    params = np.dtype([("gather", GATHER), ("ending", ending)], align=True)
    file = "input_gradient" if type.startswith("InputGradient") else "forward"
    return Kernel(name, f"conv_transpose2d/{file}.cu", type, threads, params)


def store(block, chain):
    return _store(block, chain.cpp, chain.params)


@functools.cache
def _store(block, cpp, chain_params):
    ending = runtime.params(("output", "u8"), ("saved", "u8"), ("bias", "u8"), ("chain", chain_params))
    return _gather("conv_transpose2d", f"Forward<{block.type}, {cpp}>", block.threads, ending)


def moments(block, chain):
    return _moments(block, chain.cpp, chain.params)


@functools.cache
def _moments(block, cpp, chain_params):
    ending = runtime.params(
        ("output", "u8"), ("bias", "u8"), ("moments", "u8"), ("slots", "i8"), ("chain", chain_params)
    )
    return _gather("conv_transpose2d_with_moments", f"ForwardWithMoments<{block.type}, {cpp}>", block.threads, ending)


@functools.cache
def channel_min(block):
    ending = runtime.params(("values", "u8"), ("index", "u8"), ("bias", "u8"))
    return _gather(CHANNEL_MIN, f"ForwardChannelMin<{block.type}>", block.threads, ending)


@functools.cache
def input_gradient(block):
    ending = runtime.params(("output", "u8"), ("saved", "u8"), ("bias", "u8"), ("chain", IDENTITY.params))
    return _gather("conv_transpose2d_input_gradient", f"InputGradient<{block.type}>", block.threads, ending)


@functools.cache
def pack(block):
    return Kernel(
        "conv_transpose2d_pack_weight", "conv_transpose2d/pack_weight.cu", f"PackWeight<{block.type}>", 256, PACK
    )


def kernels():
    """Every instantiation, for the tests that compile them all; chains stand for the endless number there can be."""
    from .. import epilogue

    chains = [IDENTITY, chain_of((epilogue.Add(0.5), epilogue.Minimum(0.0), epilogue.GELU(), epilogue.Mul(2.0)))]
    for _, candidates in block_math.all_choices():
        for block in candidates:
            for chain in chains:
                yield store(block, chain)
            yield moments(block, chain_of((epilogue.GELU(),)))
            yield channel_min(block)
            yield input_gradient(block)
            yield pack(block)
