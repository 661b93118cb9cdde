"""The GPU and the emulator behind one interface: arrays, a clock, memory use, and what to write beside a result."""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
import tracemalloc
from pathlib import Path

import numpy as np


class Cpu:
    """The emulator. Its times say nothing about a GPU; everything else is the same."""

    kind = "cpu"
    xp = np
    l2_bytes = 1 << 16  # so that the quick problems rotate, too

    @property
    def name(self):
        return f"CPU emulator on {platform.processor() or platform.machine()}"

    def synchronize(self):
        pass

    def clock(self):
        return _HostClock()

    def memory_available(self):
        return 1 << 30

    def release(self):
        pass

    @contextlib.contextmanager
    def watch_memory(self):
        """Yields a list that, after the block, holds the most bytes allocated in it at any one time."""
        found = []
        tracemalloc.start()
        try:
            yield found
            found.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()

    def stamp(self):
        return {"device": self.name, "driver": None, "cuda": None, "cores": os.cpu_count()}


class _HostClock:
    def open(self):
        self._begin = time.perf_counter()

    def close(self):
        return time.perf_counter() - self._begin


class Gpu:
    """One NVIDIA GPU through CuPy. Work is launched on CuPy's and PyTorch's default stream."""

    kind = "cuda"

    def __init__(self):
        import cupy

        self.xp = cupy
        self._device = cupy.cuda.Device()
        self._runtime = cupy.cuda.runtime
        self.l2_bytes = self._device.attributes["L2CacheSize"]
        self.multiprocessors = self._device.attributes["MultiProcessorCount"]
        self.compute_capability = self._device.compute_capability

    @property
    def name(self):
        name = self._runtime.getDeviceProperties(self._device.id)["name"]
        return name.decode() if isinstance(name, bytes) else name

    def synchronize(self):
        """Waits for the whole device: work in any stream of this process."""
        self._runtime.deviceSynchronize()

    def clock(self):
        return _EventClock(self.xp)

    def memory_available(self):
        return self._runtime.memGetInfo()[0] + self.xp.get_default_memory_pool().free_bytes()

    def release(self):
        """Gives CuPy's unused memory back, so that others (PyTorch) can have it."""
        self.synchronize()
        self.xp.get_default_memory_pool().free_all_blocks()

    @contextlib.contextmanager
    def watch_memory(self):
        """Yields a list that, after the block, holds the most bytes CuPy allocated in it at any one time."""
        found = []
        watch = _watch(self.xp)
        with watch:
            yield found
        found.append(watch.most)

    def stamp(self):
        version = self._runtime.runtimeGetVersion()
        return {
            "device": self.name,
            "driver": _driver_version(),
            "cuda": f"{version // 1000}.{version % 1000 // 10}",
            "compute_capability": self.compute_capability,
            "multiprocessors": self.multiprocessors,
            "l2_bytes": self.l2_bytes,
        }


class _EventClock:
    def __init__(self, cupy):
        self._begin, self._end = cupy.cuda.Event(), cupy.cuda.Event()
        self._elapsed = cupy.cuda.get_elapsed_time

    def open(self):
        self._begin.record()

    def close(self):
        self._end.record()
        self._end.synchronize()
        return self._elapsed(self._begin, self._end) * 1e-3


def _watch(cupy):
    """A memory hook that counts what is allocated while it is active."""

    class Watch(cupy.cuda.MemoryHook):
        name = "bench"

        def __init__(self):
            self.live, self.now, self.most = {}, 0, 0

        def malloc_postprocess(self, **event):
            self.live[event["mem_ptr"]] = event["mem_size"]
            self.now += event["mem_size"]
            self.most = max(self.most, self.now)

        def free_postprocess(self, **event):
            self.now -= self.live.pop(event["mem_ptr"], 0)

    return Watch()


def _driver_version():
    tool = shutil.which("nvidia-smi")
    if tool:
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
            run = subprocess.run(query, capture_output=True, text=True, timeout=20)
            if run.returncode == 0 and run.stdout.strip():
                return run.stdout.split()[0]
    with contextlib.suppress(OSError):
        return Path("/proc/driver/nvidia/version").read_text().split("Module")[1].split()[0]
    return None


def device(kind="auto"):
    """The device to measure on: "cuda", "cpu" (the emulator), or "auto": the GPU if there is one.

    Raises RuntimeError where a GPU is asked for and CuPy finds none.
    """
    if kind == "cpu":
        return Cpu()
    try:
        import cupy

        found = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy is missing, or finds no driver
        found, reason = 0, f": {error}"
    else:
        reason = ""
    if found:
        return Gpu()
    raise RuntimeError(f"no GPU that CuPy can use{reason}; --device cpu --quick runs on the emulator")


def versions(commit=None):
    """Versions of what took part, and the commit."""
    found = {"python": platform.python_version(), "commit": commit or _commit()}
    for name in ("numpy", "cupy", "torch", "triton", "rawkern"):
        found[name] = _version(name)
    return found


def _version(name):
    candidates = [name, "cupy-cuda13x", "cupy-cuda12x"] if name == "cupy" else [name]
    for candidate in candidates:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(candidate)
    if name == "rawkern":
        import rawkern

        return rawkern.__version__
    return None


def _commit():
    root = Path(__file__).resolve().parents[1]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        run = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        result = subprocess.run(run, capture_output=True, text=True, timeout=20)
        if result.returncode == 0:
            return result.stdout.strip()
    return None
