"""What launchers need to know about arrays: their device, their element type, where to put new ones."""

import functools
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from .emulator import Emulator

bfloat16 = np.dtype(ml_dtypes.bfloat16)

#: C++ element type of each dtype the kernels know.
CPP_TYPES = {
    np.dtype("float64"): "double",
    np.dtype("float32"): "float",
    np.dtype("float16"): "Half",
    bfloat16: "BFloat16",
}


@dataclass(frozen=True)
class Queue:
    """Where a launcher's work goes: a device, and on a GPU the stream (None: CuPy's current one)."""

    device: object
    stream: object = None

    def empty(self, shape, dtype):
        """A new array. A stream that has an `empty` of its own (PyTorch's allocator) provides the memory."""
        if hasattr(self.stream, "empty"):
            return self.stream.empty(shape, np.dtype(dtype))
        return self.device.empty(shape, dtype, self.stream)

    def empty_like(self, array, dtype=None):
        """A new array of the shape of `array`, with its order of dimensions in memory (channels-last stays so)."""
        order = memory_order(array)
        permuted = self.empty([array.shape[axis] for axis in order], dtype or array.dtype)
        return permuted.transpose(np.argsort(order)) if order else permuted

    def launch(self, kernel, grid, params):
        """Launches a kernel; a stream that has a method `launched` (see tape.Recorder) is told."""
        self.device.launch(kernel, grid, params, self)
        if hasattr(self.stream, "launched"):
            self.stream.launched(self.device, kernel, grid, params)


_EMULATOR = Emulator()


def device_of(array):
    """The device of an array: the emulator for NumPy, a GPU for CuPy."""
    if type(array) is np.ndarray or isinstance(array, np.ndarray):
        return _EMULATOR
    if is_cupy(type(array)):
        return _gpu(array.data.device_id)
    raise TypeError(f"expected a numpy.ndarray or a cupy.ndarray, got {type(array).__name__}")


@functools.cache
def is_cupy(type):
    """Whether a type is one of CuPy's, which need not be installed."""
    return type.__module__.partition(".")[0] == "cupy"


def _gpu(index):
    from .gpu import gpu  # only where there are CuPy arrays

    return gpu(index)


def queue_of(stream=None, **arrays):
    """The queue for a launch on these arrays (by argument name; None is skipped).

    Raises TypeError for what is no array or has an element type the kernels do not know, RuntimeError where devices or
    element types differ, naming both.
    """
    first_name = first = device = None
    for name, array in arrays.items():
        if array is None:
            continue
        try:
            array_device = device_of(array)
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from None
        if array.dtype not in CPP_TYPES:
            known = ", ".join(dtype.name for dtype in CPP_TYPES)
            raise RuntimeError(f"{name} has dtype {array.dtype.name}; rawkern's kernels take {known}")
        if first is None:
            first_name, first, device = name, array, array_device
        elif array_device is not device:
            raise RuntimeError(
                f"{first_name} and {name} are on different devices: {describe(first)} and {describe(array)}"
            )
        elif array.dtype != first.dtype:
            raise RuntimeError(
                f"{first_name} and {name} have different dtypes: {first.dtype.name} and {array.dtype.name}"
            )
    return Queue(device, stream)


def describe(array):
    """The device of an array in words."""
    device = device_of(array)
    return "cpu" if device.name == "cpu" else f"cuda:{device.index}"


def check_out(out, shape, dtype, device, name="out"):
    """Raises unless `out` is an array of this shape, dtype and device."""
    if tuple(out.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(out.shape)}, expected {tuple(shape)}")
    if out.dtype != dtype:
        raise ValueError(f"{name} has dtype {out.dtype.name}, expected {np.dtype(dtype).name}")
    if device_of(out) is not device:
        raise ValueError(f"{name} is on {describe(out)}, another device than the inputs")
    if out.size and any(step <= 0 for size, step in zip(out.shape, out.strides, strict=True) if size > 1):
        raise ValueError(f"{name} must have positive strides, one place per element, got {out.strides}")
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError(f"{name} is read-only")


def cpp_type(dtype):
    """The C++ element type of a dtype, such as "BFloat16"."""
    return CPP_TYPES[np.dtype(dtype)]


def accumulator(dtype):
    """The dtype in which values of `dtype` are computed and summed: float64 for float64, otherwise float32."""
    return np.dtype("float64") if dtype == np.float64 else np.dtype("float32")


def pointer(array):
    """The address of an array's first element; 0 for None."""
    if array is None:
        return 0
    return array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else array.data.ptr


def element_strides(array):
    """Strides in elements. Raises ValueError where elements do not lie whole numbers of elements apart."""
    if any(stride % array.itemsize for stride in array.strides):
        raise ValueError(f"strides {array.strides} are no multiples of the item size, {array.itemsize}: pass a copy")
    return tuple(stride // array.itemsize for stride in array.strides)


def memory_order(array):
    """The axes of a dense array from the slowest in memory to the fastest; the plain order if it is not dense.

    Dense means that the elements fill one block of memory without holes or repetition, in any order of dimensions.
    """
    plain = tuple(range(array.ndim))
    order = sorted(plain, key=lambda axis: (-array.strides[axis], axis))
    order = tuple(axis for axis in order if array.shape[axis] != 1)
    expected = array.itemsize
    for axis in reversed(order):
        if array.strides[axis] != expected:
            return plain
        expected *= array.shape[axis]
    if array.size == 0 or order == tuple(sorted(order)):
        return plain
    # Axes of extent 1 go where they keep the plain order as far as possible: right behind their predecessor.
    result = list(order)
    for axis in plain:
        if array.shape[axis] == 1:
            result.insert(result.index(axis - 1) + 1 if axis - 1 in result else 0, axis)
    return tuple(result)


def is_dense(array):
    """Whether `memory_order` describes the array: no holes, no repetition."""
    return array.transpose(memory_order(array)).flags.c_contiguous
