"""Index spaces for kernels: the twin of cuda/include/index_space.cuh."""

import functools
import math

from .. import runtime

MAX_DIMS = 8


@functools.cache
def index_space_params(arrays):
    """The dtype of IndexSpace<arrays>."""
    return runtime.params(
        ("sizes", "i8", (MAX_DIMS,)),
        ("strides", "i8", (arrays, MAX_DIMS)),
        ("count", "i8"),
        ("dims", "i4"),
        ("unused", "i4"),
    )


def index_space(shape, *strides):
    """The fields of an IndexSpace over `shape`, in which array a has strides[a] (in elements), after `coalesce`.

    Raises RuntimeError if more than eight dimensions are left.
    """
    return _index_space(tuple(shape), tuple(map(tuple, strides)))


@functools.lru_cache(maxsize=4096)
def _index_space(shape, strides):
    dims = coalesce(shape, *strides)
    if len(dims) > MAX_DIMS:
        raise RuntimeError(
            f"broadcasting along more than {MAX_DIMS} separate dimensions is not supported, got shape {shape}"
        )
    dims += [(1, *(0 for _ in strides))] * (MAX_DIMS - len(dims))
    sizes, *by_array = zip(*dims, strict=True)
    used = max((i for i, size in enumerate(sizes) if size != 1), default=0) + 1
    return sizes, tuple(by_array), math.prod(shape), used, 0


def coalesce(shape, *strides):
    """[(size, stride in each array), ...]: dimensions of size 1 dropped, neighbours merged where one stride does."""
    result = []
    for size, *steps in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        if result and all(outer == size * inner for outer, inner in zip(result[-1][1:], steps, strict=True)):
            size *= result.pop()[0]
        result.append((size, *steps))
    return result


def by_stride(shape, first, *others):
    """Shape and strides with the axes reordered so that the strides in `first` fall; the last axis is the fastest."""
    order = sorted(range(len(shape)), key=lambda axis: (-abs(first[axis]), axis))
    return tuple(tuple(values[axis] for axis in order) for values in (shape, first, *others))


def contiguous_strides(shape):
    """Strides, in elements, of a contiguous array."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def broadcast_strides(shape, strides, target):
    """Strides with which an array of `shape` is read as `target`, to which it broadcasts."""
    missing = len(target) - len(shape)
    return (0,) * missing + tuple(0 if size == 1 else step for size, step in zip(shape, strides, strict=True))
