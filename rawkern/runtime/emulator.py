"""The CPU behind the runtime's interface: the system's C++ compiler builds the same sources against cuda/include/cpu.

`RAWKERN_SANITIZE=address` builds with AddressSanitizer (the process must have its runtime preloaded);
`RAWKERN_CXX` names the compiler, `RAWKERN_THREADS` the number of CPU cores to use, `RAWKERN_EMULATED_ARCH` the GPU
architecture whose kernels are chosen (default sm_90a).
"""

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from . import cache
from .errors import CacheError, CompileError, EmulatorError

_ERROR_BYTES = 1024
_Error = ctypes.c_char * _ERROR_BYTES
#: The process's FiberPool (cuda/include/cpu/fiber.h).
_fiber_pool = (ctypes.c_void_p * 2)()


class Emulator:
    """The CPU. Arrays are numpy.ndarray."""

    name = "cpu"
    xp = np
    multiprocessors = 1
    #: The architecture whose kernels run: the emulator knows the instructions of all of them.
    arch = os.environ.get("RAWKERN_EMULATED_ARCH", "sm_90a")

    def __init__(self):
        self._functions = {}

    @staticmethod
    def empty(shape, dtype, stream=None):
        return np.empty(shape, dtype)

    @staticmethod
    def view(memory, shape, dtype, strides):
        """An array in the memory of another one, from its beginning."""
        return np.ndarray(shape, dtype, memory, 0, strides)

    @staticmethod
    def stream_pointer(stream):
        """What `repeat` takes."""
        return 0

    @staticmethod
    def on(stream):
        """A context in which NumPy's own operations may be used on this device's arrays."""
        if hasattr(stream, "uses_library"):
            stream.uses_library()
        return contextlib.nullcontext()

    def launch(self, kernel, grid, params, queue):
        params = ctypes.create_string_buffer(params.tobytes(), params.nbytes)
        self.repeat([self.prepare(kernel, grid, ctypes.addressof(params))], 0)

    def prepare(self, kernel, grid, params):
        """What `repeat` takes: a launch whose parameters are at the address `params`."""
        function = self._functions.get(kernel) or self._load(kernel)
        return function, params, (ctypes.c_uint * 3)(*grid), kernel.shared_bytes

    @staticmethod
    def repeat(launches, stream):
        """Runs prepared launches one after the other."""
        error = _Error()
        for function, params, grid, shared_bytes in launches:
            if function(params, grid, shared_bytes, workers(), error, _ERROR_BYTES, _fiber_pool):
                raise EmulatorError(error.value.decode())

    def _load(self, kernel):
        path = build(kernel)
        if os.environ.get("RAWKERN_SANITIZE") and not hasattr(ctypes.CDLL(None), "__asan_init"):
            raise RuntimeError(
                "RAWKERN_SANITIZE=address needs AddressSanitizer's runtime preloaded: start Python with "
                "LD_PRELOAD=$(g++ -print-file-name=libasan.so)"
            )  # loading would end the process
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise CacheError(
                f"cannot load {path}: {error}; is its file system mounted noexec? If so, set "
                "RAWKERN_CACHE_DIR to a place on another one"
            ) from error
        function = library.rawkern_launch
        function.argtypes = (
            ctypes.c_void_p,
            ctypes.POINTER(ctypes.c_uint),
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_void_p,
        )
        function.restype = ctypes.c_int
        self._functions[kernel] = function
        return function


@functools.cache
def workers():
    """OS threads that run blocks: the cores this process may use."""
    if count := os.environ.get("RAWKERN_THREADS"):
        return max(1, int(count))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def compiler():
    """The C++ compiler's path and a text that identifies it and the processor that -march=native means."""
    candidates = [os.environ["RAWKERN_CXX"]] if os.environ.get("RAWKERN_CXX") else ["g++", "clang++", "c++"]
    for candidate in candidates:
        if path := shutil.which(candidate):
            path = os.path.abspath(path)
            return path, _run([path, "-march=native", "-v", "-E", "-x", "c++", os.devnull]).stderr
    raise CompileError(
        f"running on the CPU needs a C++ compiler, and none of {', '.join(candidates)} was found: install one "
        "(such as apt-get install g++) or name it in RAWKERN_CXX"
    )


def flags():
    """Compiler flags. Contraction to fused multiply-add is on, as it is in NVRTC.

    -O3 would take twice as long to compile, for kernels that are a fifth faster.
    """
    common = ["-std=c++17", "-fPIC", "-shared", "-pthread", "-march=native", "-ffp-contract=fast", "-fno-math-errno"]
    common += ["-fvisibility=hidden", "-Wno-unknown-pragmas"]
    sanitize = os.environ.get("RAWKERN_SANITIZE", "")
    if sanitize not in ("", "address"):
        raise ValueError(f"RAWKERN_SANITIZE must be 'address' or unset, not {sanitize!r}")
    return [*common, "-O1", "-g1", "-fsanitize=address"] if sanitize else [*common, "-O2"]


def build(kernel):
    """Path of the kernel's shared object in the cache, compiled if need be."""
    path, identity = compiler()
    key = cache.key_of(kernel.source, identity, " ".join(flags()))
    return cache.find_or_build(key, ".so", lambda: _compile(kernel, path))


def _compile(kernel, path):
    with tempfile.TemporaryDirectory(prefix="rawkern-") as folder:
        # The folder's random name must not get into the debugging information: the same source gives the same bytes.
        command = [path, *flags(), f"-fdebug-prefix-map={folder}=.", "-x", "c++", "-", "-o", "kernel.so"]
        run = _run(command, cwd=folder, input=kernel.source)
        if run.returncode:
            raise CompileError(f"{kernel.name} ({kernel.type}) does not compile with {path}:\n{run.stderr}")
        return (Path(folder) / "kernel.so").read_bytes()


def _run(command, **options):
    environment = dict(os.environ)
    if environment.get("RAWKERN_SANITIZE"):
        environment.pop("LD_PRELOAD", None)  # the sanitizer is for the kernels; the compiler is slow under it
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", errors="replace", **options)
