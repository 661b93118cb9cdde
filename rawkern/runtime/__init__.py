"""Find, compile, cache, load and launch a kernel: a GPU through CuPy and the CPU emulator behind one interface."""

from .arrays import (
    CPP_TYPES,
    Queue,
    accumulator,
    bfloat16,
    check_out,
    cpp_type,
    describe,
    device_of,
    element_strides,
    is_cupy,
    is_dense,
    memory_order,
    pointer,
    queue_of,
)
from .errors import CacheError, CompileError, EmulatorError
from .kernel import Kernel, params
from .tape import ALIGNMENT, Plans, Recorder, Tape

__all__ = [
    "ALIGNMENT",
    "CPP_TYPES",
    "CacheError",
    "CompileError",
    "EmulatorError",
    "Kernel",
    "Plans",
    "Queue",
    "Recorder",
    "Tape",
    "accumulator",
    "bfloat16",
    "check_out",
    "cpp_type",
    "describe",
    "device_of",
    "element_strides",
    "is_cupy",
    "is_dense",
    "memory_order",
    "params",
    "pointer",
    "queue_of",
]
