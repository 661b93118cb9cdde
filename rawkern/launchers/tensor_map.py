"""What the copy engine must know of a tensor: the host's side of cuda/include/tensor_copy.cuh."""

from .. import runtime

AXES = 5
#: What a copy brings along an axis at most, and how far apart the elements of an axis may be that it takes.
MAX_BOX, MAX_STEP = 256, 8
MAP_BYTES = 256  # of a map in global memory; on the emulator, which keeps more in it than a GPU

TENSOR = runtime.params(
    ("tensor", "u8"),
    ("strides", "i8", AXES - 1),
    ("size", "i4", AXES),
    ("box", "i4", AXES),
    ("step", "i4", AXES),
    ("swizzle", "i4"),
)
#: No map.
NO_TENSOR = (0, (0,) * (AXES - 1), (0,) * AXES, (0,) * AXES, (0,) * AXES, 0)


def tensor_fields(pointer, size, strides, box, step, swizzle):
    """TENSOR's fields. Axes begin with the one along which elements are neighbours, `strides`, in bytes, with the one
    after it."""
    return pointer, tuple(strides), tuple(size), tuple(box), tuple(step), int(swizzle)


def is_copied_by_engine(pointer, size, strides):
    """Whether a tensor can be described by a map: aligned addresses, and nothing beyond the fields of a map."""
    return (
        pointer % 16 == 0
        and all(0 < extent < 2**31 for extent in size)
        and all(0 < stride < 2**40 and stride % 16 == 0 for stride in strides)
    )
