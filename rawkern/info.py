"""What a bug report needs to say: versions, devices, compiler, cache. Plain text; whatever is missing is said to be."""

import importlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import rawkern

from .runtime import cache, emulator


def add_arguments(parser):
    """`info` has no options."""


def main(args):
    """Prints the report. The exit status is 0, also where something is missing."""
    print(report())
    return 0


def report():
    """The report as text, one `name: value` a line."""
    parts = [
        ("rawkern", lambda: f"{rawkern.__version__} in {Path(rawkern.__file__).parent}"),
        ("Python", lambda: f"{platform.python_version()} in {sys.prefix}"),
        ("platform", platform.platform),
        ("processor", _processor),
        ("NumPy", lambda: _version("numpy")),
        ("ml_dtypes", lambda: _version("ml_dtypes")),
        ("PyTorch", _torch),
        ("CuPy", _cupy),
        ("CUDA driver", lambda: _cuda_version(_runtime().driverGetVersion())),
        ("CUDA runtime", lambda: _cuda_version(_runtime().runtimeGetVersion())),
        ("NVRTC", _nvrtc),
        ("devices", _devices),
        ("C++ compiler", _compiler),
        ("cache", _cache),
        ("settings", _settings),
    ]
    width = max(len(name) for name, _ in parts) + 1
    lines = []
    for name, value in parts:
        try:
            text = value()
        except ImportError as error:
            text = f"not found ({error})"
        except Exception as error:  # a report must come out whatever is broken
            text = f"not usable ({type(error).__name__}: {error})"
        first, *rest = str(text).splitlines() or [""]
        lines += [f"{name + ':':<{width}} {first}", *(f"{'':<{width}} {line}" for line in rest)]
    return "\n".join(lines)


def _version(name):
    return importlib.import_module(name).__version__


def _torch():
    import torch

    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"
    return f"{torch.__version__}, built for {built_for}, {'sees a GPU' if torch.cuda.is_available() else 'sees no GPU'}"


def _cupy():
    import cupy

    packages = (
        importlib.metadata.distribution(name) for name in ("cupy-cuda12x", "cupy-cuda13x", "cupy") if _has(name)
    )
    return f"{cupy.__version__} ({', '.join(package.metadata['Name'] for package in packages) or 'unknown package'})"


def _has(distribution):
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _runtime():
    import cupy

    return cupy.cuda.runtime


def _cuda_version(number):
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


def _nvrtc():
    from .runtime import nvrtc

    return ".".join(map(str, nvrtc.version()))


def _devices():
    runtime = _runtime()
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        return f"no GPU ({error})"
    lines = []
    for index in range(count):
        properties = runtime.getDeviceProperties(index)
        lines.append(
            f"cuda:{index} {properties['name'].decode()}, compute capability {properties['major']}."
            f"{properties['minor']}, {properties['totalGlobalMem'] / 2**30:.1f} GiB, "
            f"{properties['multiProcessorCount']} multiprocessors"
        )
    return "\n".join(lines) or "no GPU"


def _processor():
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    return f"{model}, {emulator.workers()} of {os.cpu_count()} cores to use"


def _compiler():
    path, _ = emulator.compiler()
    answer = subprocess.run([path, "--version"], capture_output=True, encoding="utf-8", errors="replace", timeout=30)
    return f"{path}: {(answer.stdout.splitlines() or ['says nothing about its version'])[0]}"


def _cache():
    place = cache.location()
    count, size = cache.size()
    return f"{place}, {count} kernels, {size / 2**20:.1f} MiB" if place.exists() else f"{place}, not there yet"


def _settings():
    names = sorted(name for name in os.environ if name.startswith(("RAWKERN_", "CUPY_")) or name == "CUDA_PATH")
    return ", ".join(f"{name}={os.environ[name]}" for name in names) or "none"
