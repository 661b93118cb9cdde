"""The GPU behind the runtime's interface: CuPy loads and launches what NVRTC compiled."""

import contextlib
import ctypes
import threading

import cupy
from cupy_backends.cuda.api import driver

from . import nvrtc


def as_cupy_stream(stream):
    """A CuPy stream for anything with a `ptr`."""
    return stream if isinstance(stream, cupy.cuda.stream._BaseStream) else _from_pointer(stream.ptr)


def _from_pointer(pointer):
    if hasattr(cupy.cuda.Stream, "from_external"):  # CuPy 14
        return cupy.cuda.Stream.from_external(_Pointer(pointer))
    return cupy.cuda.ExternalStream(pointer)


class _Pointer:
    """Speaks the CUDA stream protocol."""

    def __init__(self, pointer):
        self.pointer = pointer

    def __cuda_stream__(self):
        return 0, self.pointer


class Gpu:
    """One NVIDIA GPU. Arrays are cupy.ndarray."""

    name = "gpu"
    xp = cupy

    def __init__(self, index):
        self.index = index
        self._device = cupy.cuda.Device(index)
        self._functions = {}
        self.compute_capability = self._device.compute_capability
        if int(self.compute_capability) < 80:
            raise RuntimeError(
                f"rawkern needs a GPU of compute capability 8.0 or later; cuda:{index} has {self.compute_capability}"
            )
        self.arch = nvrtc.arch_name(self.compute_capability)
        self.multiprocessors = self._device.attributes["MultiProcessorCount"]

    def empty(self, shape, dtype, stream=None):
        """Memory of CuPy's pool that may be used in `stream` at once and be reused there when it is freed."""
        with self.on(stream):
            return cupy.empty(shape, dtype)

    @staticmethod
    def view(memory, shape, dtype, strides):
        """An array in the memory of another one, from its beginning."""
        return cupy.ndarray(shape, dtype, memory.data, strides)

    def stream_pointer(self, stream):
        """What `repeat` takes: the pointer of a stream, or of CuPy's current one on this device."""
        return cupy.cuda.get_current_stream(self.index).ptr if stream is None else stream.ptr

    @contextlib.contextmanager
    def on(self, stream):
        """A context in which CuPy's own operations run on this device, in `stream` (None: CuPy's current one)."""
        if hasattr(stream, "uses_library"):
            stream.uses_library()
        with self._device:
            if stream is None:
                yield
                return
            with as_cupy_stream(stream):
                yield

    def launch(self, kernel, grid, params, queue):
        function = self._functions.get(kernel) or self._load(kernel)
        if cupy.cuda.runtime.getDevice() == self.index:
            function(grid, (kernel.threads, 1, 1), (params,), shared_mem=kernel.shared_bytes, stream=queue.stream)
        else:
            with self._device:
                function(grid, (kernel.threads, 1, 1), (params,), shared_mem=kernel.shared_bytes, stream=queue.stream)
        _thread.has_context = True  # CuPy sees to it

    def prepare(self, kernel, grid, params):
        """What `repeat` takes: a launch whose parameters are at the address `params`."""
        function = self._functions.get(kernel) or self._load(kernel)
        pointers = (ctypes.c_void_p * 1)(params)  # the driver wants an array of pointers to the arguments
        fixed = (function.ptr, *grid, kernel.threads, 1, 1, kernel.shared_bytes)
        return fixed, ctypes.addressof(pointers), pointers

    def repeat(self, launches, stream):
        """Launches what was prepared, on the stream with this pointer, whatever the current device is.

        Straight through the driver: a third of what a call of CuPy's kernel objects costs on the host.
        """
        if cupy.cuda.runtime.getDevice() != self.index or not _thread.has_context:
            with self._device:
                _bind_context()
                self._launch_all(launches, stream)
        else:
            self._launch_all(launches, stream)

    @staticmethod
    def _launch_all(launches, stream):
        for fixed, params, _ in launches:
            driver.launchKernel(*fixed, stream, params, 0)

    def _load(self, kernel):
        with self._device:
            module = cupy.RawModule(path=str(nvrtc.build(kernel, self.arch)))
            raw = module.get_function(kernel.name)
            if kernel.shared_bytes > 48 * 1024:
                raw.max_dynamic_shared_size_bytes = kernel.shared_bytes
            function = self._functions[kernel] = raw.kernel  # of the current device: not to be looked up outside
        return function


class _Thread(threading.local):
    """Whether the thread has a CUDA context, which the driver's functions need and the runtime's make."""

    has_context = False


_thread = _Thread()


def _bind_context():
    if not driver.ctxGetCurrent():
        cupy.cuda.runtime.free(0)  # does nothing but make the context of the current device the thread's
    _thread.has_context = True


_gpus = {}


def gpu(index):
    """The GPU with this index: one object per device, also when several threads ask for it at once."""
    return _gpus.get(index) or _gpus.setdefault(index, Gpu(index))
