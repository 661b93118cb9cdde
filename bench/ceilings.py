"""The ceilings of this machine, measured in this run: nothing here is a figure from a data sheet.

A floor needs a ceiling that nobody beats, so each is the best of several ways to reach it, and of several samples:

    bandwidth   kernels of 16-byte loads and stores (ceilings.cu), and the driver's own copy and fill
    products    cuBLAS (through torch or CuPy), and loops that feed the tensor cores from registers (mma.sync) or, on
                Hopper, from shared memory (wgmma), because cuBLAS does not reach their rate in TF32
    others      multiply-adds from registers

On the emulator, NumPy stands for all of them, so that the whole path can be tested; those floors mean nothing.
"""

import functools
from pathlib import Path

import numpy as np

from rawkern import runtime

from .data import MODES, fill_random
from .floors import Ceilings

_TRAFFIC = runtime.params(("source", "u8"), ("target", "u8"), ("vectors", "i8"))
_LOOP = runtime.params(("target", "u8"), ("rounds", "i8"), ("seed", "f8"))
_OPERANDS = {"float32/tf32": ("Tf32", 8), "bfloat16": ("BFloat16", 16), "float16": ("Half", 16)}
_TORCH_SIZES = {"float64": 4096}
_SAMPLES = 5


def measure(device, progress=lambda what: None):
    """Ceilings of a devices.Gpu or devices.Cpu, in about two seconds on an H200. `progress` is told what comes next."""
    return _Gpu(device, progress).measure() if device.kind == "cuda" else _measure_cpu(device)


def _best_seconds(device, call, repeat=1):
    """The shortest of a few samples of `repeat` calls, per call, after a warm-up."""
    best, clock = float("inf"), device.clock()
    call()
    for _ in range(_SAMPLES):
        device.synchronize()
        clock.open()
        for _ in range(repeat):
            call()
        device.synchronize()
        best = min(best, clock.close() / repeat)
    return best


class _Best:
    """Keeps the largest figure under each name, and where it came from."""

    def __init__(self):
        self.rates, self.how = {}, {}

    def add(self, name, rate, source):
        if rate > self.rates.get(name, 0.0):
            self.rates[name], self.how[name] = rate, source


class _Gpu:
    def __init__(self, device, progress):
        self.device, self.xp, self.progress = device, device.xp, progress
        self.best = _Best()
        self.queue = runtime.queue_of(array=self.xp.empty(1, np.float32))

    def measure(self):
        self.progress("memory bandwidth")
        self._bandwidths()
        self.progress("arithmetic rates")
        self._loops()
        self.progress("cuBLAS")
        self._cublas()
        self.device.release()
        rates = self.best.rates
        vector = {name: rates[f"vector {name}"] for name in ("float32", "float64")}
        matrix = {mode: rates[f"matrix {mode}"] for mode in MODES if f"matrix {mode}" in rates}
        return Ceilings(rates["copy"], rates["read"], rates["write"], matrix, vector, self.best.how)

    def _bandwidths(self):
        size = int(min(2 << 30, self.device.memory_available() // 4)) // 4096 * 4096
        source, target = self.xp.empty(size // 4, np.float32), self.xp.empty(size // 4, np.float32)
        fill_random(self.xp, source, 1)
        copy = self.xp.cuda.runtime.memcpyAsync, self.xp.cuda.runtime.memsetAsync
        stream = self.xp.cuda.get_current_stream().ptr
        pointers = source.data.ptr, target.data.ptr
        ways = [
            ("copy", 2, "kernel", lambda: self._move("Copy", *pointers, size)),
            ("copy", 2, "driver", lambda: copy[0](pointers[1], pointers[0], size, 3, stream)),  # 3: device to device
            ("read", 1, "kernel", lambda: self._move("Read", *pointers, size)),
            ("write", 1, "kernel", lambda: self._move("Write", *pointers, size)),
            ("write", 1, "driver", lambda: copy[1](pointers[1], 1, size, stream)),
        ]
        for name, passes, source_name, call in ways:
            self.best.add(name, passes * size / _best_seconds(self.device, call, 4), source_name)

    def _move(self, kind, source, target, size):
        blocks = -(-size // (16 * 4 * 256))
        _kernel(kind, _TRAFFIC).launch(self.queue, blocks, source=source, target=target, vectors=size // 16)

    def _loops(self):
        for dtype in ("float32", "float64"):
            self._loop(f"vector {dtype}", f"FmaLoop<{'float' if dtype == 'float32' else 'double'}>", 8, 256 * 16 * 2)
        for mode, (operand, depth) in _OPERANDS.items():
            self._loop(f"matrix {mode}", f"MmaLoop<{operand}>", 4, 8 * 8 * 16 * 8 * depth * 2, "mma.sync")
            if self.queue.device.arch == "sm_90a":
                self._loop(f"matrix {mode}", f"WgmmaLoop<{operand}>", 1, 2 * 4 * 64 * 256 * depth * 2, "wgmma")

    def _loop(self, name, kind, blocks_per_multiprocessor, flop_per_round, source="registers"):
        target = self.xp.empty(1, np.float64)
        blocks, rounds = self.device.multiprocessors * blocks_per_multiprocessor, 256

        def launch():
            _kernel(kind, _LOOP).launch(self.queue, blocks, target=target.data.ptr, rounds=rounds, seed=1.0)

        seconds = _best_seconds(self.device, launch)
        rounds = int(max(256, min(256 * 4e-3 / seconds, 1 << 24)))  # about 4 ms
        self.best.add(name, blocks * rounds * flop_per_round / _best_seconds(self.device, launch), source)

    def _cublas(self):
        try:
            import torch
        except ImportError:
            return self._cupy_products()
        if not torch.cuda.is_available():
            return self._cupy_products()
        from .peers import float32_precision

        for mode, (dtype, precision) in MODES.items():
            size = _TORCH_SIZES.get(mode, 8192)
            with float32_precision(precision):
                a, b = (torch.randn(size, size, dtype=getattr(torch, dtype.name), device="cuda") for _ in "ab")
                out = torch.empty_like(a)
                seconds = _best_seconds(self.device, functools.partial(torch.matmul, a, b, out=out))
            self.best.add(f"matrix {mode}", 2 * size**3 / seconds, "cuBLAS (torch)")
            del a, b, out
        torch.cuda.empty_cache()
        return None

    def _cupy_products(self):
        """CuPy multiplies float32 without TF32 unless its user asks for it by an environment variable."""
        for mode, dtype, size in (("float32/ieee", np.float32, 8192), ("float64", np.float64, 4096)):
            matrices = [self.xp.empty((size, size), dtype) for _ in range(2)]
            for i, matrix in enumerate(matrices):
                fill_random(self.xp, matrix.reshape(-1), i)
            try:
                seconds = _best_seconds(self.device, functools.partial(self.xp.matmul, *matrices))
            except (ImportError, RuntimeError):  # cuBLAS is not installed: the loops above must do
                continue
            self.best.add(f"matrix {mode}", 2 * size**3 / seconds, "cuBLAS (CuPy)")


def kernels():
    """Every kernel of ceilings.cu, for the test that compiles them without a GPU."""
    yield from (_kernel(kind, _TRAFFIC) for kind in ("Copy", "Read", "Write"))
    yield from (_kernel(f"FmaLoop<{kind}>", _LOOP) for kind in ("float", "double"))
    for operand, _ in _OPERANDS.values():
        yield _kernel(f"MmaLoop<{operand}>", _LOOP)
        yield _kernel(f"WgmmaLoop<{operand}>", _LOOP)


@functools.cache
def _kernel(kind, params):
    folder = Path(__file__).resolve().parent
    return runtime.Kernel(
        name="bench_ceiling", file="ceilings.cu", type=kind, threads=256, params=params, folder=folder
    )


def _measure_cpu(device):
    a, b = (np.random.default_rng(i).random((512, 512), np.float32) for i in range(2))
    source = np.ones(1 << 22, np.float32)
    target = np.empty_like(source)
    rates = {
        "copy": 2 * source.nbytes / _best_seconds(device, lambda: np.copyto(target, source)),
        "read": source.nbytes / _best_seconds(device, source.sum),
        "write": source.nbytes / _best_seconds(device, lambda: target.fill(1)),
    }
    products = {
        name: 2 * 512**3 / _best_seconds(device, functools.partial(np.matmul, a.astype(name), b.astype(name)))
        for name in ("float32", "float64")
    }
    matrix = {mode: products["float64" if mode == "float64" else "float32"] for mode in MODES}
    how = dict.fromkeys([*rates, *(f"matrix {mode}" for mode in matrix)], "NumPy")
    return Ceilings(rates["copy"], rates["read"], rates["write"], matrix, products, how)
