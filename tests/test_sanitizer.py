"""Memory accesses of the kernels, watched by AddressSanitizer. The programs run in processes of their own, because its
runtime must be loaded before everything else; they use NumPy arrays, since torch is slow under it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sweep

from rawkern.runtime import emulator

ROOT = Path(__file__).parents[1]
KERNELS = Path(__file__).parent / "kernels"

FAULT = """
import sys
from pathlib import Path
import numpy as np
from rawkern import runtime

struct, count, size = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
fields = runtime.params(("output", "u8"), ("count", "i4"))
kernel = runtime.Kernel("faulty", "faults.cu", struct, 64, fields, folder=Path(sys.argv[1]))
output = np.zeros(size)
kernel.launch(runtime.queue_of(output=output), 1, output=runtime.pointer(output), count=count)
print("nothing found")
"""


def runtime_library():
    path, _ = emulator.compiler()
    name = "libasan.so" if "clang" not in Path(path).name else "libclang_rt.asan.so"
    found = subprocess.run([path, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    assert os.path.isabs(found), f"{path} comes without AddressSanitizer's runtime, {name}"
    return found


def run(*arguments):
    """The finished process of Python under AddressSanitizer."""
    options = "detect_leaks=0:halt_on_error=1:abort_on_error=0:exitcode=99:detect_stack_use_after_return=0"
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime_library(),
        "RAWKERN_SANITIZE": "address",
        "ASAN_OPTIONS": options,
        "PYTHONMALLOC": "malloc",
        "RAWKERN_THREADS": "1",  # starting threads is what costs most under it
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def fault(struct, count, size):
    return run("-c", FAULT, KERNELS, struct, count, size)


def line_of(comment):
    lines = (KERNELS / "faults.cu").read_text().splitlines()
    (number,) = (n for n, line in enumerate(lines, 1) if line.endswith(f"// {comment}"))
    return f"faults.cu:{number}"


@pytest.mark.parametrize(
    ("struct", "count", "size", "comment", "access"),
    [
        ("ReadPastEnd", 64, 64, "read past the end", "READ of size 8"),
        ("ReadPastEnd", -1, 64, "read past the end", "READ of size 8"),
        ("WritePastEnd", 3, 3, "write past the end", "WRITE of size 8"),
        ("WritePastEnd", 64, 64, "write past the end", "WRITE of size 8"),
        ("SharedPastEnd", 1, 64, "shared memory past the end", "READ of size 8"),
        ("SharedPastEnd", -1, 64, "shared memory past the end", "READ of size 8"),
    ],
)
def test_access_out_of_bounds_is_reported(struct, count, size, comment, access):
    process = fault(struct, count, size)
    assert process.returncode == 99, process.stdout + process.stderr
    assert "AddressSanitizer: heap-buffer-overflow" in process.stderr
    assert access in process.stderr and line_of(comment) in process.stderr


@pytest.mark.parametrize(
    ("struct", "count", "size"), [("ReadPastEnd", 63, 64), ("WritePastEnd", 2, 3), ("SharedPastEnd", 0, 64)]
)
def test_the_same_within_bounds_is_not(struct, count, size):
    process = fault(struct, count, size)
    assert process.returncode == 0 and "nothing found" in process.stdout, process.stderr


def test_what_a_failed_launch_leaves_behind_is_not_reported():
    """Threads were left in the middle of functions, whose arrays must not look poisoned to the next launch."""
    launch = "kernel.launch("
    program = FAULT.replace(launch, f"try:\n  {launch}").replace("print(", "except runtime.EmulatorError: pass\nprint(")
    again = FAULT[FAULT.index(launch) :].replace("count=count", "count=64")
    process = run("-c", program + again, KERNELS, "LeavesFrames", 60, 64)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("nothing found") == 2


@pytest.mark.parametrize("op", sweep.SWEEPS)
def test_kernels_stay_within_their_memory(op):
    process = run("tests/sweep.py", op)
    assert process.returncode == 0, process.stderr[-6000:]
    assert f"{op} done" in process.stdout


def test_without_its_runtime_a_clear_error():
    environment = {**os.environ, "RAWKERN_SANITIZE": "address", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FAULT, str(KERNELS), "SomeReturn", "64", "64"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == 1
    assert "RuntimeError: RAWKERN_SANITIZE=address needs AddressSanitizer's runtime preloaded" in process.stderr
