"""Boxes that the copy engine brings: in the order, with the zeros, the rounding and the swizzle that are promised."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from rawkern import runtime
from rawkern.launchers.tensor_map import MAP_BYTES, TENSOR, tensor_fields
from rawkern.runtime import Kernel, Queue

FOLDER = Path(__file__).parent / "kernels"
COPY = Kernel(
    "copy_boxes", "tensor_copy.cu", "CopyBoxes", 32,
    runtime.params(("map", "u8"), ("at", "u8"), ("output", "u8"), ("bytes", "i4")), folder=FOLDER,
)  # fmt: skip


def make_map(dtype, rounds):
    type = f"MakeMap<{runtime.cpp_type(dtype)}, {str(rounds).lower()}>"
    params = runtime.params(("tensor", TENSOR), ("map", "u8"))
    return Kernel("make_map", "tensor_copy.cu", type, 32, params, folder=FOLDER)


def rounded_to_tf32(values):
    """To nearest; no value is a tie."""
    return ((values.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)


def boxes(device, host, box, step, places, swizzle=False, rounds=True):
    """The boxes of `host`, copied to the device, at these places, axes from the fastest on."""
    tensor = np.array(host) if device == "cpu" else pytest.importorskip("cupy").asarray(host)
    queue = Queue(runtime.device_of(tensor))
    count = [-(-extent // every) for extent, every in zip(box, step, strict=True)]
    words = int(np.prod(count)) * tensor.itemsize // 4
    map = queue.empty((MAP_BYTES,), np.dtype("uint8"))
    at = queue.device.xp.asarray(np.array(places, np.int32))
    output = queue.empty((len(places), words), np.dtype("uint32"))
    fields = tensor_fields(runtime.pointer(tensor), tensor.shape[::-1], tensor.strides[-2::-1], box, step, swizzle)
    make_map(tensor.dtype, rounds).launch(queue, 1, tensor=fields, map=runtime.pointer(map))
    COPY.launch(queue, len(places), map=runtime.pointer(map), at=runtime.pointer(at),
                output=runtime.pointer(output), bytes=4 * words)  # fmt: skip
    copied = output if device == "cpu" else output.get()
    return copied.reshape(len(places), -1).view(tensor.dtype).reshape(len(places), *count[::-1])


def expected(tensor, box, step, at):
    result = np.zeros([-(-extent // every) for extent, every in zip(box, step, strict=True)][::-1], tensor.dtype)
    for index in np.ndindex(result.shape):
        place = [at[a] + index[4 - a] * step[a] for a in range(5)][::-1]
        if all(0 <= coordinate < size for coordinate, size in zip(place, tensor.shape, strict=True)):
            result[index] = tensor[tuple(place)]
    return result


@pytest.mark.parametrize(("dtype", "rounds"), [("float32", True), ("float32", False), ("float16", True)])
@pytest.mark.parametrize("step", [(1, 1, 1, 1, 1), (1, 2, 3, 1, 1)], ids=["every", "steps"])
def test_boxes_inside_and_outside(dtype, rounds, step, device):
    rng = np.random.default_rng(0)
    host = rng.standard_normal((2, 2, 5, 7, 24)).astype(dtype)
    box, places = (16, 5, 4, 1, 1), list(itertools.product((-8, 8, 16), (-2, 4), (0, 3), (1,), (0, 1)))
    found = boxes(device, host, box, step, places, rounds=rounds)
    values = rounded_to_tf32(host) if dtype == "float32" and rounds else host
    for one, at in zip(found, places, strict=True):
        np.testing.assert_array_equal(one, expected(values, box, step, at))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_swizzled_boxes(dtype, device):
    rng = np.random.default_rng(1)
    row = 128 // np.dtype(dtype).itemsize
    host = rng.standard_normal((1, 3, 2, 19, 40)).astype(dtype)
    box, places = (row, 16, 2, 1, 1), [(0, -1, 0, 2, 0), (8, 7, 1, 0, 0)]
    found = boxes(device, host, box, (1,) * 5, places, swizzle=True)
    values = rounded_to_tf32(host) if dtype == "float32" else host
    for one, at in zip(found, places, strict=True):
        rows = expected(values, box, (1,) * 5, at).reshape(-1, 8, row // 8)
        units = np.arange(8) ^ np.arange(len(rows))[:, None] % 8
        np.testing.assert_array_equal(one.reshape(-1, 8, row // 8), np.take_along_axis(rows, units[..., None], 1))


def test_special_values_stay_what_they_are(device):
    """Rounded to TF32: infinities, numbers too small to be normal, and NaN, whatever its bits."""
    words = np.array([0x7F800000, 0xFF800000, 0x7FFFFFFF, 0x7FC00000, 0xFFFFFFFF, 0x7F800001, 0, 0x80000000], np.uint32)
    host = np.tile(words.view(np.float32), 8).reshape(1, 1, 1, 1, 64)
    found = boxes(device, host, (32, 1, 1, 1, 1), (1,) * 5, [(0,) * 5])
    np.testing.assert_array_equal(found[0].ravel(), host.ravel()[:32])
