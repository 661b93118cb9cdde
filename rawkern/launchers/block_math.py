"""Which block of threads multiplies with what: the host's view of cuda/conv_transpose2d/block_math.cuh."""

from dataclasses import dataclass

import numpy as np

from ..runtime import accumulator, bfloat16, cpp_type


@dataclass(frozen=True)
class BlockMath:
    """One instantiation of Simt or TensorCore.

    Attributes:
        type: C++ type.
        rows, columns: size of a block's tile of accumulators.
        words: depth of a slab in words; pack: values of depth per word.
        threads: threads of a block.
        word: dtype of a word of packed weights.
        efficiency: share of the multiplier's peak that a full tile reaches, against which waste is weighed.
    """

    type: str
    rows: int
    columns: int
    words: int
    pack: int
    threads: int
    word: np.dtype
    efficiency: float


def _simt(dtype, rows, columns, thread_rows, thread_columns, words, efficiency, run=0):
    return BlockMath(
        type=f"Simt<{cpp_type(dtype)}, {rows}, {columns}, {thread_rows}, {thread_columns}, {words}, {run}>",
        rows=rows,
        columns=columns,
        words=words,
        pack=1,
        threads=rows // thread_rows * (columns // thread_columns),
        word=accumulator(dtype),
        efficiency=efficiency,
    )


def _tensor_core(dtype, rows, columns, warps_rows, warps_columns, words, efficiency):
    operand = "Tf32" if dtype == np.float32 else cpp_type(dtype)
    return BlockMath(
        type=f"TensorCore<{cpp_type(dtype)}, {operand}, {rows}, {columns}, {warps_rows}, {warps_columns}, {words}>",
        rows=rows,
        columns=columns,
        words=words,
        pack=1 if operand == "Tf32" else 2,
        threads=warps_rows * warps_columns * 32,
        word=np.dtype("int32"),
        efficiency=efficiency,
    )


def _choices_for(dtype, tensor_core):
    """Block sizes, and how fast they were on an H200 at full tiles, relative to the fastest."""
    if tensor_core:
        return (
            _tensor_core(dtype, 128, 128, 2, 4, 16, 1.0),
            _tensor_core(dtype, 64, 128, 2, 4, 16, 0.65),
            _tensor_core(dtype, 64, 64, 2, 2, 16, 0.55),
            _tensor_core(dtype, 16, 128, 1, 4, 16, 0.4),
        )
    if dtype == np.float64:
        return _simt(dtype, 64, 64, 4, 4, 8, 1.0), _simt(dtype, 8, 128, 8, 1, 8, 0.5)
    return (
        _simt(dtype, 128, 128, 8, 8, 8, 1.0),
        _simt(dtype, 64, 256, 8, 8, 8, 0.92),
        _simt(dtype, 64, 64, 8, 4, 16, 0.85),
        _simt(dtype, 8, 256, 8, 1, 8, 0.3),
    )


#: By (dtype, tensor cores or not): the block sizes there are. 16-bit types always go to the tensor cores.
CHOICES = {
    (np.dtype("float64"), False): _choices_for(np.dtype("float64"), False),
    (np.dtype("float32"), False): _choices_for(np.dtype("float32"), False),
    (np.dtype("float32"), True): _choices_for(np.dtype("float32"), True),
    (np.dtype("float16"), True): _choices_for(np.dtype("float16"), True),
    (bfloat16, True): _choices_for(bfloat16, True),
}


#: Sums of more than this many products are formed in runs where float32 is to be summed as exactly as float32 can be.
_LONG_SUM = 256

#: For such sums: accumulators for a run beside those for the total, so that tiles are smaller.
LONG_SUM_CHOICES = (
    _simt(np.dtype("float32"), 128, 64, 8, 8, 16, 1.0, run=8),
    _simt(np.dtype("float32"), 64, 128, 8, 8, 16, 0.97, run=8),
    _simt(np.dtype("float32"), 64, 64, 8, 4, 16, 0.88, run=8),
    _simt(np.dtype("float32"), 8, 256, 8, 1, 8, 0.3, run=16),
)


def all_choices():
    """Every ((dtype, tensor cores or not), candidates) there is."""
    yield from CHOICES.items()
    yield (np.dtype("float32"), False), LONG_SUM_CHOICES


def uses_tensor_cores(dtype, precision):
    """Whether values are multiplied by tensor cores: 16-bit types always, float32 if `precision` is "tf32"."""
    return dtype.itemsize == 2 or (dtype == np.float32 and precision == "tf32")


def choices(dtype, precision, depth):
    """The candidates for element type `dtype` and sums of `depth` products.

    `precision` ("ieee" or "tf32") matters for float32 only.
    """
    tensor_core = uses_tensor_cores(dtype, precision)
    if dtype == np.float32 and not tensor_core and depth > _LONG_SUM:
        return LONG_SUM_CHOICES
    return CHOICES[np.dtype(dtype), tensor_core]


#: For the weight gradient, which always sums in runs.
_WEIGHT_GRADIENT_CHOICES = (
    _simt(np.dtype("float32"), 64, 64, 8, 8, 16, 1.0),
    _simt(np.dtype("float32"), 8, 256, 8, 1, 8, 0.3),
)


def weight_gradient_choices(dtype, precision):
    """The candidates for the weight gradient: its slices fill a GPU anyway, and larger tiles were no faster."""
    if dtype == np.float32 and precision == "ieee":
        return _WEIGHT_GRADIENT_CHOICES
    return [math for math in choices(dtype, precision, 0) if math.rows * math.columns <= 64 * 64]


def choose(candidates, rows, columns, copies, multiprocessors):
    """The candidate that should be fastest for `copies` matrices of rows x columns.

    The cost is the number of rounds in which the multiprocessors work the tiles off, times a tile's work.
    """

    def cost(math):
        tiles = copies * -(-rows // math.rows) * -(-columns // math.columns)
        return -(-tiles // multiprocessors) * math.rows * math.columns / math.efficiency

    return min(candidates, key=cost)


def check_precision(precision):
    """`precision` resolved: None means "ieee" at the array level. Raises ValueError for anything but ieee and tf32."""
    if precision not in (None, "ieee", "tf32"):
        raise ValueError(f"precision must be 'ieee', 'tf32' or None, got {precision!r}")
    return precision or "ieee"
