"""Compile a kernel for a GPU architecture with NVRTC, on machines with and without a GPU.

CuPy's RawModule could compile too, but always adds -ftz=true (which flushes subnormal numbers that torch keeps) and
caches without looking into headers; it loads what is compiled here.
"""

import functools

from . import cache
from .errors import CompileError

_OPTIONS = ("-std=c++17", "--ptxas-options=-v", "-lineinfo")


@functools.cache
def version():
    """NVRTC's version, (major, minor)."""
    from cupy_backends.cuda.libs import nvrtc

    return nvrtc.getVersion()


def arch_name(compute_capability):
    """The architecture to compile for on a device of this compute capability, such as "90" or "120".

    Hopper's warpgroup instructions exist only in the architecture-specific target sm_90a.
    """
    return "sm_90a" if str(compute_capability) == "90" else f"sm_{compute_capability}"


def build(kernel, arch):
    """Path of the kernel's cubin for `arch` in the cache, compiled if need be."""
    key = cache.key_of(kernel.source, arch, repr(version()), repr(_OPTIONS))
    return cache.find_or_build(key, ".cubin", lambda: compile_cubin(kernel, arch)[0])


def compile_cubin(kernel, arch, options=()):
    """Compiles without the cache: (cubin, log), where the log holds ptxas' report of registers and spills."""
    from cupy_backends.cuda.libs import nvrtc

    program = nvrtc.createProgram(kernel.source, kernel.file, (), ())
    try:
        nvrtc.compileProgram(program, (*_OPTIONS, *options, f"-arch={arch}"))
        return nvrtc.getCUBIN(program), nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise CompileError(f"{kernel.name} ({kernel.type}) does not compile for {arch}: {error}\n{log}") from None
    finally:
        nvrtc.destroyProgram(program)
