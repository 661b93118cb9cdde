"""What kernels may do and what they are told when they break the rules, on both devices and in both compilers."""

import os
import re
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from rawkern import runtime
from rawkern.runtime import emulator, nvrtc, source
from rawkern.runtime.kernel import linear_grid, pack

FOLDER = Path(__file__).parent / "kernels"
SIXTEEN_BIT = {"Half": np.dtype("float16"), "BFloat16": runtime.bfloat16}


def kernel_of(file, struct, threads, *fields, **options):
    name = "test_" + re.sub(r"\W", "_", struct).lower()
    return runtime.Kernel(name, file, struct, threads, runtime.params(*fields), folder=FOLDER, **options)


def on(device, array):
    """The NumPy array on the device under test."""
    if device == "cpu":
        return np.array(array)
    import cupy

    return cupy.asarray(array)


def back(array):
    return array if isinstance(array, np.ndarray) else array.get()


def launch(kernel, blocks, *, grid=None, **fields):
    """Launches with arrays given as they are; `grid` overrides the grid that `blocks` would get."""
    arrays = [value for value in fields.values() if hasattr(value, "dtype") and value.ndim]
    queue = runtime.Queue(runtime.device_of(arrays[0]))
    fields = {name: runtime.pointer(v) if hasattr(v, "dtype") and v.ndim else v for name, v in fields.items()}
    if grid:
        queue.device.launch(kernel, grid, pack(kernel.params, fields), queue)
    else:
        kernel.launch(queue, blocks, **fields)


def line_of(comment, file="faults.cu"):
    """`file:line` of the marked line, as error messages give it."""
    lines = (FOLDER / file).read_text().splitlines()
    (number,) = (n for n, line in enumerate(lines, 1) if line.endswith(f"// {comment}"))
    return f"kernels/{file}:{number}"


# Parameters and grids.

INNER = runtime.params(("numbers", "f8", 2), ("pointers", "u8", 1))
ECHO = dict(output="u8", count="i4", scale="f4", inner=INNER, offset="i8")


def echo(**changed):
    fields = {**ECHO, **changed}
    return kernel_of("echo.cu", "Echo", 96, *[(name, fields[name]) for name in fields if fields[name] is not None])


@pytest.mark.parametrize("count", [1, 95, 96, 97, 5000])
def test_parameters_arrive_and_every_block_runs_once(device, count):
    output = on(device, np.full(count + 1, -1.0))
    launch(echo(), -(-count // 96), output=output, count=count, scale=0.5, inner=((2, 3), (0,)), offset=2**40)
    expected = np.append(np.arange(count) * 0.5 + 2.0**40 + 6, -1)
    np.testing.assert_array_equal(back(output), expected)


def test_no_blocks_no_launch(device):
    output = on(device, np.zeros(1))
    launch(echo(), 0, output=output, count=1, scale=1, inner=((1, 1), (0,)), offset=1)
    assert back(output)[0] == 0


@pytest.mark.parametrize("grid", [(1, 1, 1), (5, 1, 1), (1, 7, 1), (1, 1, 3), (4, 3, 2), (3001, 2, 2)])
def test_grids_of_three_dimensions(device, grid):
    x, y, z = grid
    output = on(device, np.full(x * y * z, -1, np.int64))
    launch(kernel_of("collectives.cu", "Places", 32, ("output", "u8")), 0, grid=grid, output=output)
    expected = (np.arange(z)[:, None, None] * 1000 + np.arange(y)[:, None]) * 1000 + np.arange(x)
    np.testing.assert_array_equal(back(output), expected.ravel())


def test_grid_of_more_blocks_than_one_dimension_holds():
    assert linear_grid(1) == (1, 1, 1)
    assert linear_grid(2**31 - 1) == (2**31 - 1, 1, 1)
    for blocks in (2**31, 2**40):
        x, y, z = linear_grid(blocks)
        assert x < 2**31 and y <= 65535 and z == 1 and x * y >= blocks
    with pytest.raises(ValueError, match="beyond what a grid can hold"):
        linear_grid(2**48)


def test_fields_must_be_given_exactly():
    dtype = runtime.params(("a", "i4"), ("b", "f8"))
    assert dtype.itemsize == 16
    assert pack(dtype, {"b": 2.5, "a": 1}).tolist() == (1, 2.5)
    for fields in ({"a": 1}, {"a": 1, "b": 2, "c": 3}):
        with pytest.raises(TypeError, match="needs the fields a, b"):
            pack(dtype, fields)
    with pytest.raises(KeyError):
        pack(dtype, {"a": 1, "c": 3})
    with pytest.raises(OverflowError):
        pack(dtype, {"a": 2**31, "b": 0})


def _gxx(kernel):
    return emulator.build(kernel)


def _nvrtc(kernel):
    return nvrtc.compile_cubin(kernel, "sm_80")


COMPILERS = [pytest.param(_gxx, id="g++"), pytest.param(_nvrtc, id="nvrtc")]


@pytest.mark.parametrize("build", COMPILERS)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(count="i8"), "size of .*Params.*count differs"),
        (dict(scale="i4"), "type of .*Params::scale differs"),
        (dict(offset="f8"), "type of .*Params::offset differs"),
        (dict(count="f4", scale="i4"), "type of .*Params::count differs"),
        (dict(inner=runtime.params(("numbers", "f8", 1), ("pointers", "u8", 2))), "size of .*inner.*numbers"),
        (dict(output=None), "size of Entry::Params differs"),
        (dict(offset=None, output="u8"), "size of Entry::Params differs"),
        (dict(scale=None), "decomposes into 5|more elements than"),  # leaves no hole in sizes and places
        (dict(scale=None, amount="f4"), "amount"),
    ],
)
def test_parameters_unlike_the_struct_do_not_compile(build, changed, message):
    with pytest.raises(runtime.CompileError, match=message):
        build(echo(**changed))


def test_fields_in_another_order_do_not_compile():
    """Only a C++ compiler is asked for places: older NVRTC has no offsetof."""
    inner = runtime.params(("pointers", "u8", 1), ("numbers", "f8", 2))
    with pytest.raises(runtime.CompileError, match=r"place of .*inner.*numbers"):
        emulator.build(echo(inner=inner))


@pytest.mark.parametrize("build", COMPILERS)
def test_threads_unlike_the_struct_do_not_compile(build):
    kernel = runtime.Kernel("echo", "echo.cu", "Echo", 64, echo().params, folder=FOLDER)
    with pytest.raises(runtime.CompileError, match="threads per block differ"):
        build(kernel)


# Compile errors and sources.


@pytest.mark.parametrize("build", COMPILERS)
def test_compile_error_names_file_and_line(build):
    with pytest.raises(runtime.CompileError, match=r"kernels/broken\.cuh[:(]5[:)]") as error:
        build(kernel_of("broken.cu", "Broken", 32, ("output", "u8")))
    assert "test_broken (Broken) does not compile" in str(error.value)
    assert "undeclared_name" in str(error.value)


def test_flattened_source_keeps_files_and_lines(tmp_path):
    (tmp_path / "include").mkdir()
    (tmp_path / "deep").mkdir()
    (tmp_path / "include" / "both.cuh").write_text("#pragma once\nint both;\n")
    (tmp_path / "deep" / "near.cuh").write_text('#include "../include/both.cuh"\nint near_one;\n')
    (tmp_path / "deep" / "top.cu").write_text(
        '#include "near.cuh"\n#include "both.cuh"\n  #  include "near.cuh"\nint top;\n'
    )
    text = source.flatten("deep/top.cu", tmp_path)
    assert [text.count(f"int {name};") for name in ("both", "near_one", "top")] == [1, 1, 1]
    position = None
    found = {}
    for line in text.splitlines():
        if match := re.match(r'#line (\d+) "(.+)"', line):
            position = [match[2], int(match[1])]
        else:
            found[line] = tuple(position)
            position[1] += 1
    name = tmp_path.name
    assert found["int both;"] == (f"{name}/include/both.cuh", 2)
    assert found["int near_one;"] == (f"{name}/deep/near.cuh", 2)
    assert found["int top;"] == (f"{name}/deep/top.cu", 4)


def test_missing_include_is_named(tmp_path):
    (tmp_path / "top.cu").write_text('#include "nowhere.cuh"\n')
    with pytest.raises(FileNotFoundError, match=r"nowhere\.cuh"):
        source.flatten("top.cu", tmp_path)


def test_no_cpp_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setenv("RAWKERN_CXX", "no-such-compiler")
    emulator.compiler.cache_clear()
    expected = r"no-such-compiler was found: install one.*apt-get install g\+\+"
    try:
        with pytest.raises(runtime.CompileError, match=expected):
            emulator.build(echo())
    finally:
        emulator.compiler.cache_clear()


# Rules of CUDA that the emulator watches. A GPU does not report these, so they are tried on the CPU only.

FAULT = (("output", "u8"), ("count", "i4"))


def fault(struct, count, blocks=1):
    output = np.zeros(64)
    launch(kernel_of("faults.cu", struct, 64, *FAULT), blocks, output=output, count=count)
    return output


def test_shared_memory_starts_as_nan_in_every_block():
    assert np.isnan(fault("UninitialisedShared", 0, blocks=8)).all()


@pytest.mark.parametrize("count", [1, 31, 32, 63])
def test_barrier_that_some_threads_do_not_reach(count):
    with pytest.raises(runtime.EmulatorError) as error:
        fault("SomeReturn", count, blocks=3)
    message = str(error.value)
    assert "test_somereturn" in message and "barrier divergence" in message
    assert f"reached by {count} of 64 threads" in message and f"{64 - count} returned" in message
    assert line_of("barrier that some do not reach") in message
    assert (fault("SomeReturn", 64) == 1).all(), "the next launch must work"


@pytest.mark.parametrize("count", [1, 32, 63])
def test_threads_at_different_barriers(count):
    with pytest.raises(runtime.EmulatorError) as error:
        fault("DifferentBarriers", count)
    message = str(error.value)
    assert "test_differentbarriers" in message and "different barriers" in message
    assert line_of("another barrier") in message
    assert (fault("DifferentBarriers", 64) == 1).all()


@pytest.mark.parametrize("count", [1, 31, 33])
def test_warp_collective_that_some_lanes_do_not_reach(count):
    with pytest.raises(runtime.EmulatorError) as error:
        fault("SomeLanes", count)
    assert "test_somelanes" in str(error.value) and "warp divergence" in str(error.value)
    assert line_of("collective of some lanes") in str(error.value)
    np.testing.assert_array_equal(fault("SomeLanes", 32), np.arange(64) < 32)  # whole warps may differ


def test_lanes_at_different_collectives():
    with pytest.raises(runtime.EmulatorError, match="lanes wait at different warp collectives") as error:
        fault("DifferentCollectives", 5)
    assert line_of("another collective") in str(error.value)
    assert (fault("DifferentCollectives", 32) == 1).all()


def test_barrier_against_collective():
    with pytest.raises(runtime.EmulatorError, match="divergence") as error:
        fault("BarrierAgainstCollective", 0)
    places = [line_of("odd threads"), line_of("even lanes")]
    assert any(place in str(error.value) for place in places)


def test_partial_mask_is_refused():
    with pytest.raises(runtime.EmulatorError, match="full mask") as error:
        fault("PartialMask", 0)
    assert line_of("partial mask") in str(error.value)


def test_many_failing_launches_leave_memory_alone():
    """Threads of a failed block are abandoned where they are; their stacks must not pile up."""
    resource = pytest.importorskip("resource")
    for _ in range(20):
        with pytest.raises(runtime.EmulatorError):
            fault("SomeReturn", 63)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(1000):
        with pytest.raises(runtime.EmulatorError):
            fault("SomeReturn", 63)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_kernels_share_what_the_emulator_runs_them_in(tmp_path):
    """Hundreds of them, each a library of its own, would otherwise fill the memory with stacks and blocks."""
    (tmp_path / "touch.cu").write_text(
        """
        #include "platform.cuh"
        namespace rawkern {
        template <int kNumber>
        struct Touch {
          struct Params { int* output; };
          static constexpr int kThreads = 1024, kMinBlocks = 1;
          __device__ static void run(const Params& p) {
            __syncthreads();
            p.output[threadIdx.x] = kNumber;
          }
        };
        }
        """
    )
    output, resident = np.zeros(1024, np.int32), []
    for number in range(3):
        params = runtime.params(("output", "u8"))
        launch(runtime.Kernel("touch", "touch.cu", f"Touch<{number}>", 1024, params, folder=tmp_path), 1, output=output)
        assert (output == number).all()
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert resident[2] - resident[1] < 2**20


# What threads can do together.


@pytest.mark.parametrize("distance", [0, 1, 2, 5, 16, 31])
def test_shuffles(device, distance):
    values = np.arange(64, dtype=np.int32) * 3 + 1
    output = on(device, np.zeros((4, 64), np.int32))
    kernel = kernel_of("collectives.cu", "Shuffles", 64, ("input", "u8"), ("output", "u8"), ("distance", "i4"))
    launch(kernel, 1, input=on(device, values), output=output, distance=distance)
    lane, warp = np.arange(64) % 32, np.arange(64) // 32 * 32
    up, down = lane - distance, lane + distance
    sources = [np.full(64, distance), np.where(up < 0, lane, up), np.where(down > 31, lane, down), lane ^ distance]
    for row, chosen in zip(back(output), sources, strict=True):
        np.testing.assert_array_equal(row, values[warp + chosen])


@pytest.mark.parametrize("source_lane", [32, 37, 64, -1])
def test_shuffle_from_beyond_the_warp_wraps_around(device, source_lane):
    values = np.arange(64, dtype=np.int32) * 3 + 1
    output = on(device, np.zeros((4, 64), np.int32))
    kernel = kernel_of("collectives.cu", "Shuffles", 64, ("input", "u8"), ("output", "u8"), ("distance", "i4"))
    launch(kernel, 1, input=on(device, values), output=output, distance=source_lane)
    np.testing.assert_array_equal(back(output)[0], values[np.arange(64) // 32 * 32 + source_lane % 32])


@pytest.mark.parametrize("pattern", ["none", "all", "one", "random"])
def test_votes(device, pattern):
    values = {
        "none": np.zeros(64),
        "all": np.ones(64),
        "one": np.arange(64) == 40,
        "random": np.random.default_rng(0).integers(0, 2, 64),
    }[pattern].astype(np.int32)
    output = on(device, np.zeros((3, 64), np.uint32))
    kernel = kernel_of("collectives.cu", "Votes", 64, ("input", "u8"), ("output", "u8"))
    launch(kernel, 1, input=on(device, values), output=output)
    warps = values.reshape(2, 32)
    ballots = (warps.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1)
    for row, per_warp in zip(back(output), (ballots, warps.any(1), warps.all(1)), strict=True):
        np.testing.assert_array_equal(row, np.repeat(per_warp, 32))


def test_atomics_across_blocks(device):
    count, sum_, precise, largest = (on(device, np.zeros(1, dtype)) for dtype in ("i4", "f4", "f8", "i4"))
    fields = ("count", "sum", "precise_sum", "largest")
    kernel = kernel_of("collectives.cu", "Atomics", 96, *[(field, "u8") for field in fields])
    launch(kernel, 200, **dict(zip(fields, (count, sum_, precise, largest), strict=True)))
    total = 200 * 96
    assert [back(array)[0] for array in (count, sum_, precise, largest)] == [
        total,
        total / 2,
        total * (total - 1) / 2,
        total - 1,
    ]


@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_barriers_and_shared_memory(device, rounds):
    values = np.random.default_rng(rounds).standard_normal((50, 160))
    output = on(device, np.zeros_like(values))
    kernel = kernel_of("collectives.cu", "Reverse", 160, ("input", "u8"), ("output", "u8"), ("rounds", "i4"))
    launch(kernel, 50, input=on(device, values), output=output, rounds=rounds)
    np.testing.assert_array_equal(back(output), values[:, :: -1 if rounds % 2 else 1])


def test_dynamic_shared_memory(device):
    values = np.arange(128, dtype=np.float32)
    output = on(device, np.zeros_like(values))
    fields = ("input", "u8"), ("output", "u8")
    kernel = kernel_of("collectives.cu", "Rotate", 128, *fields, shared_bytes=80000)
    launch(kernel, 1, input=on(device, values), output=output)
    np.testing.assert_array_equal(back(output), np.roll(values, -1))
    if device == "cpu":
        with pytest.raises(runtime.EmulatorError, match=r"less dynamic shared memory .* kernels/collectives\.cu"):
            launch(kernel_of("collectives.cu", "Rotate", 128, *fields), 1, input=values, output=output)


def test_asynchronous_copies(device):
    values = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
    output = on(device, np.zeros_like(values))
    kernel = kernel_of("collectives.cu", "Copies", 64, ("input", "u8"), ("output", "u8"), ("wait", "i4"))
    launch(kernel, 1, input=on(device, values), output=output, wait=1)
    np.testing.assert_array_equal(back(output), values[::-1])
    if device == "cpu":
        launch(kernel, 1, input=values, output=output, wait=0)
        assert np.isnan(output).all(), "a copy that nobody waits for must not be seen"


# Element types.


def convert(device, name, elements, numbers):
    """(numbers rounded to 16 bits, elements widened to float32), as a kernel does it."""
    fields = ("elements", "u8"), ("widened", "u8"), ("numbers", "u8"), ("rounded", "u8"), ("count", "i8")
    kernel = kernel_of("collectives.cu", f"Convert<{name}>", 256, *fields)
    widened, rounded = on(device, np.zeros(len(numbers), "f4")), on(device, np.zeros(len(numbers), "u2"))
    arguments = dict(elements=on(device, elements), widened=widened, numbers=on(device, numbers), rounded=rounded)
    launch(kernel, -(-len(numbers) // 256), **arguments, count=len(numbers))
    return back(rounded), back(widened)


def same_numbers(found, expected):
    """Equal bit for bit, except that any NaN stands for any other."""
    found_nan, expected_nan = np.isnan(found), np.isnan(expected)
    np.testing.assert_array_equal(found_nan, expected_nan)
    unsigned = f"u{found.itemsize}"
    np.testing.assert_array_equal(found.view(unsigned)[~found_nan], expected.view(unsigned)[~found_nan])


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("name", SIXTEEN_BIT)
def test_every_16_bit_pattern_widens_exactly_and_comes_back(device, name):
    patterns = np.arange(65536, dtype=np.uint16)
    expected = patterns.view(SIXTEEN_BIT[name]).astype(np.float32)
    rounded, widened = convert(device, name, patterns, expected)
    same_numbers(widened, expected)
    same_numbers(rounded.view(SIXTEEN_BIT[name]), patterns.view(SIXTEEN_BIT[name]))


def awkward_floats(dtype):
    """Every value of the 16-bit type, the midpoints between neighbours, the floats next to both, and the extremes."""
    exact = np.arange(65536, dtype=np.uint16).view(dtype).astype(np.float32)
    exact = np.sort(exact[np.isfinite(exact)])
    middle = ((exact[1:].astype(np.float64) + exact[:-1]) / 2).astype(np.float32)
    overflow = np.float32(ml_dtypes.finfo(dtype).max) * np.float32(1 + 2.0**-10 if dtype == np.float16 else 1)
    floats = np.concatenate([exact, middle, [overflow]]).astype(np.float32)
    floats = np.concatenate(
        [floats, np.nextafter(floats, np.float32(np.inf)), np.nextafter(floats, np.float32(-np.inf))]
    )
    smallest = np.float32(1e-45)
    extremes = np.array([smallest, -smallest, 1e-40, -1e-40, 3.4028235e38, -3.4028235e38, np.inf, -np.inf], np.float32)
    nans = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(
        np.float32
    )
    random = np.random.default_rng(0).integers(0, 2**32, 300_000, dtype=np.uint32).view(np.float32)
    return np.concatenate([floats, extremes, nans, random])


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")
@pytest.mark.parametrize("name", SIXTEEN_BIT)
def test_rounding_to_16_bits(device, name):
    dtype = SIXTEEN_BIT[name]
    numbers = awkward_floats(dtype)
    rounded, _ = convert(device, name, np.zeros(len(numbers), np.uint16), numbers)
    same_numbers(rounded.view(dtype), numbers.astype(dtype))


# Matrix products of a warp.


def words_of(values, operand):
    """Values (rows, k) as (rows, 8) words."""
    if operand == "Tf32":
        return values.astype(np.float32).view(np.uint32)
    return np.ascontiguousarray(values.astype(SIXTEEN_BIT[operand])).view(np.uint32)


def truncated(values, operand):
    """What the unit reads out of an operand, in float64."""
    if operand == "Tf32":
        words = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
        return words.view(np.float32).astype(np.float64)
    return values.astype(SIXTEEN_BIT[operand]).astype(np.float64)


def product(device, operand, a, b, d):
    kernel = kernel_of("collectives.cu", f"Product<{operand}>", 32, ("a", "u8"), ("b", "u8"), ("d", "u8"))
    d = on(device, d.astype(np.float32))
    # B travels as columns of words: the words of a column are neighbours along k.
    right = np.ascontiguousarray(words_of(np.ascontiguousarray(b.T), operand).T)
    launch(kernel, 1, a=on(device, words_of(a, operand)), b=on(device, right), d=d)
    return back(d)


OPERANDS = {"Tf32": 8, "Half": 16, "BFloat16": 16}


@pytest.mark.parametrize("operand", OPERANDS)
def test_matrix_product_of_a_warp(device, operand):
    random = np.random.default_rng(1)
    a, b, d = (random.standard_normal(shape) for shape in ((16, OPERANDS[operand]), (OPERANDS[operand], 8), (16, 8)))
    expected = truncated(a, operand) @ truncated(b, operand) + d.astype(np.float32)
    magnitude = np.abs(truncated(a, operand)) @ np.abs(truncated(b, operand)) + np.abs(d)
    error = np.abs(product(device, operand, a, b, d) - expected)
    assert (error <= magnitude * 2.0**-20).all()  # sums in float32; a GPU's unit truncates when it aligns the terms
    if operand == "Tf32":
        untruncated = a.astype(np.float32).astype(np.float64) @ b.astype(np.float32) + d.astype(np.float32)
        assert (np.abs(untruncated - expected) > magnitude * 2.0**-16).any(), "this data cannot tell truncation apart"


@pytest.mark.parametrize("operand", OPERANDS)
def test_matrix_product_places_every_element(device, operand):
    """Small integers are exact, so each of the 16 x k and k x 8 elements must be exactly where it belongs."""
    depth = OPERANDS[operand]
    random = np.random.default_rng(2)
    a, b, d = (random.integers(-8, 9, shape).astype(float) for shape in ((16, depth), (depth, 8), (16, 8)))
    np.testing.assert_array_equal(product(device, operand, a, b, d), a @ b + d)


@pytest.mark.parametrize("operand", (False, True))
def test_rounding_to_tf32(operand, device):
    random = np.random.default_rng(3).integers(0, 2**32, 100_000, dtype=np.uint32)
    ties = (random & np.uint32(0xFFFFE000)) | np.uint32(0x1000)
    words = np.concatenate(
        [random, ties, ties - np.uint32(1), np.array([0, 1 << 31, 0x7F7FFFFF, 0xFF800000], np.uint32)]
    )
    numbers = words.view(np.float32)
    finite = np.isfinite(numbers)
    output = on(device, np.zeros(len(numbers), np.uint32))
    fields = ("input", "u8"), ("output", "u8"), ("count", "i8")
    kernel = kernel_of("collectives.cu", f"RoundTf32<{str(operand).lower()}>", 256, *fields)
    launch(kernel, -(-len(numbers) // 256), input=on(device, numbers), output=output, count=len(numbers))
    rounded = back(output)
    bits, to_even = words[finite].astype(np.uint64), device == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
    expected = (bits + 0xFFF + (bits >> 13 & 1) if to_even else bits + 0x1000) & 0xFFFFE000  # in sign and magnitude
    if operand and not to_even:
        subnormal = np.abs(numbers[finite]) < np.finfo(np.float32).tiny
        expected[subnormal] = bits[subnormal] & 0xFFFFE000  # only cut
        assert subnormal.any()
    np.testing.assert_array_equal(rounded[finite] & np.uint32(0xFFFFE000), expected)
    read = (rounded & np.uint32(0xFFFFE000)).view(np.float32)  # what the unit reads
    np.testing.assert_array_equal(np.isnan(read), np.isnan(numbers))
    np.testing.assert_array_equal(read[np.isinf(numbers)], numbers[np.isinf(numbers)])


# Arrays and threads of the host.


def test_queue_of_names_what_differs():
    a, b = np.zeros(3, np.float32), np.zeros(3)
    with pytest.raises(RuntimeError, match="input and weight have different dtypes: float32 and float64"):
        runtime.queue_of(input=a, bias=None, weight=b)
    with pytest.raises(RuntimeError, match="input has dtype int64"):
        runtime.queue_of(input=np.zeros(3, np.int64))
    with pytest.raises(TypeError, match=r"weight: expected a numpy\.ndarray or a cupy\.ndarray, got list"):
        runtime.queue_of(input=a, weight=[1.0])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0), (1, 0, 2, 3)])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (1, 3, 1, 1), (1, 1, 1, 1)])
def test_memory_order_is_kept(order, shape):
    array = np.zeros([shape[axis] for axis in order]).transpose(np.argsort(order))
    assert array.shape == shape and runtime.is_dense(array)
    like = runtime.queue_of(input=array).empty_like(array)
    assert like.shape == shape
    strides = [[s for s, n in zip(a.strides, shape, strict=True) if n > 1] for a in (like, array)]
    assert strides[0] == strides[1]
    for not_dense in (np.broadcast_to(array[:1], (5, *shape[1:])), np.zeros((4, *shape[1:], 2))[..., 0]):
        assert not runtime.is_dense(not_dense)
        assert runtime.memory_order(not_dense) == (0, 1, 2, 3)


def test_threads_of_the_host_may_launch_at_once(device):
    """Also the first launch, which compiles and loads."""
    kernel = runtime.Kernel("test_threads", "echo.cu", "Echo", 96, echo().params, folder=FOLDER)
    outputs = [on(device, np.zeros(5000)) for _ in range(8)]
    start = threading.Barrier(8)
    errors = []

    def run(index):
        try:
            start.wait()
            for _ in range(20):
                fields = dict(output=outputs[index], count=5000, scale=1.0, inner=((index, 1), (0,)), offset=0)
                launch(kernel, 53, **fields)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for index, output in enumerate(outputs):
        np.testing.assert_array_equal(back(output), np.arange(5000.0) + index)
