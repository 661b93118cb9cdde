"""Launches written down and repeated: what a tape makes of addresses, and when there can be none."""

import contextlib
import ctypes
import types

import numpy as np
import pytest

from rawkern import runtime
from rawkern.epilogue import GELU, Add
from rawkern.launchers import group_norm, pointwise
from rawkern.runtime import Recorder


def recorded(launcher, *arrays, allocate=np.empty, **options):
    recorder = Recorder(0, allocate, arrays)
    launcher(recorder, *arrays, **options)
    return recorder.tape()


def addresses(*arrays):
    return [runtime.pointer(array) for array in arrays]


def norm(stream, x, weight, bias, out):
    group_norm(x, 2, weight, bias, out=out, stream=stream)


def draw(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype("f4")


def test_a_tape_is_played_on_other_arrays():
    x, weight, bias = draw(3, 4, 2060), draw(4), draw(4)  # of groups that take a workspace
    tape = recorded(norm, x, weight, bias, np.empty_like(x))
    others = draw(3, 4, 2060) + 1, draw(4) * 2, draw(4) - 1
    out = np.full_like(x, np.nan)
    workspace = np.empty(tape.workspace_bytes, np.uint8)
    tape.play(addresses(*others, out, workspace), 0)
    assert (out == group_norm(others[0], 2, *others[1:])).all()


def test_workspaces_do_not_overlap():
    """Poisoned before and checked after: nothing but the workspace and the output is written."""
    x, weight, bias = draw(3, 4, 2060), draw(4), draw(4)  # of groups that take a workspace
    tape = recorded(norm, x, weight, bias, np.empty_like(x))
    memory = np.full(tape.workspace_bytes + 256, 0xA5, np.uint8)
    out = np.empty_like(x)
    tape.play(addresses(x, weight, bias, out, memory[64 : 64 + tape.workspace_bytes]), 0)
    assert (out == group_norm(x, 2, weight, bias)).all()
    assert (memory[:64] == 0xA5).all() and (memory[64 + tape.workspace_bytes :] == 0xA5).all()


def test_null_stays_null():
    x = draw(3, 4, 2060)
    tape = recorded(norm, x, None, None, np.empty_like(x))
    out = np.empty_like(x)
    workspace = np.empty(tape.workspace_bytes, np.uint8)
    tape.play([runtime.pointer(x), 0, 0, *addresses(out, workspace)], 0)
    assert (out == group_norm(x, 2)).all()


def test_parts_of_one_array_are_told_apart():
    operands = draw(8)

    def chain(stream, x, a, b, out):
        pointwise(x, (Add(a), GELU(), Add(b)), out=out, stream=stream)

    x = draw(3, 4)
    tape = recorded(chain, x, operands[:4], operands[4:], np.empty_like(x))
    out, a, b = np.empty_like(x), draw(4) + 1, draw(4) - 1
    tape.play(addresses(x, a, b, out), 0)
    assert (out == pointwise(x, (Add(a), GELU(), Add(b)))).all()


def test_copies_of_a_library_cannot_be_repeated():
    x = draw(3, 8)[:, ::2]

    def gelu(stream, x, out):
        pointwise(x, GELU(), out=out, stream=stream)

    assert recorded(gelu, x, np.empty((3, 4), "f4")) is None


def test_an_unknown_address_cannot_be_repeated():
    x, hidden = draw(3, 4), draw(4)

    def add(stream, x, out):
        pointwise(x, Add(hidden), out=out, stream=stream)

    assert recorded(add, x, np.empty_like(x)) is None


def test_nothing_to_launch():
    x = draw(0, 4)

    def gelu(stream, x, out):
        pointwise(x, GELU(), out=out, stream=stream)

    tape = recorded(gelu, x, np.empty_like(x))
    tape.play([0, 0], 0)
    assert tape.workspace_bytes == 0


def test_errors_of_a_kernel_leave_the_tape_usable(monkeypatch):
    x = draw(3, 4)

    def gelu(stream, x, out):
        pointwise(x, GELU(), out=out, stream=stream)

    tape = recorded(gelu, x, np.empty_like(x))
    out = np.empty_like(x)
    repeat = runtime.emulator.Emulator.repeat
    monkeypatch.setattr(runtime.emulator.Emulator, "repeat", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        tape.play(addresses(x, out), 0)
    monkeypatch.setattr(runtime.emulator.Emulator, "repeat", staticmethod(repeat))
    tape.play(addresses(x, out), 0)
    assert (out == pointwise(x, GELU())).all()


def test_what_the_driver_gets(monkeypatch):
    """On a GPU a launch goes straight to the driver: function, grid, block, shared memory, stream, parameters."""
    gpu_module = pytest.importorskip("rawkern.runtime.gpu")
    kernel = runtime.Kernel("name", "file.cu", "Type", 96, runtime.params(("a", "u8"), ("n", "i8")), shared_bytes=640)
    gpu = object.__new__(gpu_module.Gpu)
    gpu.index, gpu._device, entered = 1, contextlib.nullcontext(), []
    gpu._functions = {kernel: types.SimpleNamespace(ptr=4321)}
    monkeypatch.setattr(gpu_module.cupy.cuda.runtime, "getDevice", lambda: 1)
    monkeypatch.setattr(gpu_module, "_thread", gpu_module._Thread())
    monkeypatch.setattr(gpu_module, "_bind_context", lambda: entered.append(True))
    launched = []

    def launch(*arguments):
        pointer = ctypes.c_void_p.from_address(arguments[9]).value
        launched.append((arguments[:9], list((ctypes.c_uint64 * 2).from_address(pointer)), arguments[10]))

    monkeypatch.setattr(gpu_module.driver, "launchKernel", launch)
    x = draw(4)
    recorder = Recorder(77, np.empty, [x])
    params = np.array((runtime.pointer(x) + 8, 5), kernel.params)[()]
    recorder.launched(gpu, kernel, (3, 2, 1), params)
    tape = recorder.tape()
    tape.play([4096], 99)
    tape.play([8192], 98)
    assert launched == [
        ((4321, 3, 2, 1, 96, 1, 1, 640, 99), [4104, 5], 0),
        ((4321, 3, 2, 1, 96, 1, 1, 640, 98), [8200, 5], 0),
    ]
    assert entered  # a thread without a context gets one first
