"""Arrays made dense or brought into another's order of dimensions, by copies on the queue's stream."""

import numpy as np

from ..runtime import is_dense, memory_order

_SAME_SIZE = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def dense(queue, array):
    """`array`, or a contiguous copy of it if its elements do not fill one block of memory (None stays None)."""
    if array is None or is_dense(array):
        return array
    return copy(queue, queue.empty(array.shape, array.dtype), array)


def contiguous(queue, array):
    """`array`, or a copy of it in C order (None stays None)."""
    if array is None or array.flags.c_contiguous:
        return array
    return copy(queue, queue.empty(array.shape, array.dtype), array)


def arranged_as(queue, array, model):
    """`array`, or a copy of it whose elements lie in memory as those of the dense array `model` of the same shape."""
    if array is None or is_arranged_as(array, model):
        return array
    return copy(queue, queue.empty_like(model), array)


def is_arranged_as(array, model):
    """Whether the elements of two arrays of one shape lie in memory in the same way."""
    extents = zip(array.shape, array.strides, model.strides, strict=True)
    return array.size == 0 or all(a == b for n, a, b in extents if n != 1)


def copy(queue, destination, source):
    """Copies `source` into `destination`, whose shape and dtype it has; returns `destination`."""
    unsigned = _SAME_SIZE[source.itemsize]  # the bits: not every library's copy knows every dtype
    with queue.device.on(queue.stream):
        destination.view(unsigned)[...] = source.view(unsigned)
    return destination


def is_channels_last(array):
    """Whether a 4-D array lies in memory in the order (N, H, W, C)."""
    return array.ndim == 4 and memory_order(array) == (0, 2, 3, 1)
