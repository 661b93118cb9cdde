"""Arrays for a benchmark: centred random numbers made on the device, dtypes, rotating sets, poison.

Everything is written against `xp`, NumPy or CuPy. bfloat16 is handled by its bits, so that no arithmetic of either
library on it is needed.
"""

from dataclasses import dataclass

import numpy as np

from rawkern.launchers.layout import is_channels_last
from rawkern.runtime import accumulator, bfloat16

from .timing import Turn

_CHUNK = 1 << 24
_ALIGNMENT = 256  # bytes, what allocators give; rotating views must not be worse aligned than a user's arrays

MODES = {
    # mode: (dtype, precision of the launchers)
    "float32/tf32": (np.dtype("float32"), "tf32"),
    "float32/ieee": (np.dtype("float32"), "ieee"),
    "bfloat16": (bfloat16, "ieee"),
    "float16": (np.dtype("float16"), "ieee"),
    "float64": (np.dtype("float64"), "ieee"),
}


@dataclass(frozen=True)
class Input:
    """An input to draw: centred values of standard deviation `scale` around `offset`."""

    shape: tuple
    scale: float = 1.0
    offset: float = 0.0
    #: Another dtype than the problem's: "float64" for statistics, "accumulator" for sums, "int32" for an index, which
    #: is drawn from range(int(scale)).
    dtype: str | None = None
    #: Whether (N, C, H, W) lies in memory as (N, H, W, C).
    channels_last: bool = False

    @property
    def size(self):
        return int(np.prod(self.shape, dtype=np.int64))

    def dtype_for(self, dtype):
        """The dtype of this input in a problem of `dtype`."""
        return accumulator(dtype) if self.dtype == "accumulator" else np.dtype(self.dtype or dtype)


def random_bits(xp, start, stop, seed):
    """64 random bits for each number in range(start, stop): splitmix64 (Steele, Lea, Flood 2014) of the position."""
    bits = xp.arange(start, stop, dtype=np.uint64)
    bits += np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return bits ^ (bits >> np.uint64(31))


def fill_random(xp, flat, seed, scale=1.0, offset=0.0):
    """Fills a contiguous one-dimensional array with centred values: the sum of four uniform ones, nearly normal."""
    for start in range(0, flat.size, _CHUNK):
        stop = min(start + _CHUNK, flat.size)
        bits = random_bits(xp, start, stop, seed)
        if flat.dtype.kind == "i":
            flat[start:stop] = ((bits >> np.uint64(33)) % np.uint64(int(scale))).astype(flat.dtype)
            continue
        total = xp.full(stop - start, -2 * 65535, np.float32)
        for lane in (0, 16, 32, 48):
            total += ((bits >> np.uint64(lane)) & np.uint64(0xFFFF)).astype(np.float32)
        value = total * np.float32(scale * 3**0.5 / 65536) + np.float32(offset)
        store(flat[start:stop], value)


def store(target, value):
    """target[...] = value with rounding to nearest, for any dtype of `target`."""
    if target.dtype != bfloat16:
        target[...] = value.astype(target.dtype)
        return
    bits = value.astype(np.float32).view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    target.view(np.uint16)[...] = (bits >> np.uint32(16)).astype(np.uint16)


def to_float64(array):
    """The values of an array of any of the dtypes as float64 (or int64 for integers)."""
    if array.dtype == bfloat16:
        return (array.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return array.astype(np.int64 if array.dtype.kind == "i" else np.float64)


def empty_sets(device, count, shape, dtype, channels_last=False):
    """`count` arrays of one shape, each aligned, in one allocation."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64))
    step = -(-size * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT // dtype.itemsize
    storage = np.dtype(f"i{dtype.itemsize}") if dtype == bfloat16 else dtype
    memory = device.xp.empty((count, max(step, 1)), storage).view(dtype)
    views = [memory[i, :size] for i in range(count)]
    if channels_last:
        batch, channels, height, width = shape
        return [view.reshape(batch, height, width, channels).transpose(0, 3, 1, 2) for view in views], memory
    return [view.reshape(shape) for view in views], memory


def poison(array):
    """Fills an array with what no kernel computes from finite inputs: NaN, or a negative index."""
    if array.dtype.kind == "i":
        array.fill(-7)
    elif array.dtype == bfloat16:
        array.view(np.int16).fill(0x7FC1)
    else:
        array.fill(np.nan)


def count_poison(xp, array):
    """How many elements are NaN or, for integers, negative."""
    flat, count = array.reshape(-1), 0
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        if array.dtype == bfloat16:
            wrong = (part.view(np.uint16) & np.uint16(0x7FFF)) > np.uint16(0x7F80)
        else:
            wrong = part < 0 if array.dtype.kind == "i" else part != part
        count += int(xp.count_nonzero(wrong))
    return count


class Sets(Turn):
    """Sets of inputs and outputs that timed calls go through in turn, together larger than the caches.

    Attributes:
        inputs: a dict of arrays by name for each set; every set holds other values.
        outputs: a list of arrays for each set.
    """

    def __init__(
        self, device, specification, dtype, seed, *, bytes_per_set, enough_bytes, most_bytes, least=3, most=2048
    ):
        """As many sets as fill `enough_bytes` and no more than fill `most_bytes`; at least two (`least`, if they fit).

        Args:
            specification: Input by name.
            bytes_per_set: of inputs and outputs.
        """
        bytes_per_set = max(bytes_per_set, 1)
        wanted = max(least, -(-enough_bytes // bytes_per_set) + 1)
        self.count = int(max(2, min(wanted, most, most_bytes // bytes_per_set)))
        super().__init__(self.count)
        self.device = device
        self.inputs = [{} for _ in range(self.count)]
        self.outputs = [[] for _ in range(self.count)]
        self._output_memory = []
        for number, (name, spec) in enumerate(specification.items()):
            views, memory = empty_sets(device, self.count, spec.shape, spec.dtype_for(dtype), spec.channels_last)
            fill_random(device.xp, memory.reshape(-1), 1000 * seed + number, spec.scale, spec.offset)
            for values, view in zip(self.inputs, views, strict=True):
                values[name] = view
        self._evict = None
        if self.count * bytes_per_set < enough_bytes:
            self._evict = device.xp.empty(enough_bytes, np.int8)

    def add_outputs(self, outputs):
        """Adds arrays of the shapes, dtypes and layouts of these to every set."""
        for output in outputs:
            views, memory = empty_sets(self.device, self.count, output.shape, output.dtype, is_channels_last(output))
            self._output_memory.append(memory)
            for arrays, view in zip(self.outputs, views, strict=True):
                arrays.append(view)

    def poison_outputs(self):
        """Poisons every output; where the sets are too few to push each other out of the caches, other memory does."""
        for memory in self._output_memory:
            poison(memory)
        if self._evict is not None:
            self._evict.fill(1)
