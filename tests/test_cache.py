"""The cache of compiled kernels: found again, never trusted blindly, safe among processes."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rawkern import runtime
from rawkern.runtime import cache, emulator, nvrtc, source

ROOT = Path(__file__).parents[1]
KERNELS = Path(__file__).parent / "kernels"

#: Launches a kernel of the folder argv[1] and prints how often a compiler ran, and what the kernel computed.
PROGRAM = """
import json, sys, time
from pathlib import Path
import numpy as np
from rawkern import runtime
from rawkern.runtime import emulator

compilations = 0
compile_kernel = emulator._compile

def counted(*args):
    global compilations
    compilations += 1
    result = compile_kernel(*args)
    time.sleep(float(sys.argv[2]) if len(sys.argv) > 2 else 0)
    return result

emulator._compile = counted
inner = runtime.params(("numbers", "f8", 2), ("pointers", "u8", 1))
fields = ("output", "u8"), ("count", "i4"), ("scale", "f4"), ("inner", inner), ("offset", "i8")
kernel = runtime.Kernel("echo", "echo.cu", "Echo", 96, runtime.params(*fields), folder=Path(sys.argv[1]))
output = np.zeros(3)
queue = runtime.queue_of(output=output)
address = runtime.pointer(output)
kernel.launch(queue, 1, output=address, count=3, scale=2, inner=((1, 10), (0,)), offset=0)
print(json.dumps([compilations, output.tolist()]))
"""
RIGHT = [10.0, 12.0, 14.0]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty cache directory of this test's own."""
    path = tmp_path / "cache"
    monkeypatch.setenv("RAWKERN_CACHE_DIR", str(path))
    return path


def start(folder=KERNELS, *arguments, cwd=ROOT, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", PROGRAM, str(folder), *arguments]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return json.loads(output)


def entries(place):
    return sorted(path.name for path in place.iterdir())


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


# Across processes.


def test_first_use_compiles_and_a_second_process_finds_it(place):
    assert finish(start()) == [1, RIGHT]
    (first,) = entries(place)
    before = (place / first).stat()
    assert finish(start()) == [0, RIGHT]
    assert entries(place) == [first]
    assert (place / first).stat().st_mtime_ns == before.st_mtime_ns


def test_directory_and_entries_are_private(place):
    old = os.umask(0)
    try:
        finish(start())
    finally:
        os.umask(old)
    assert mode(place) == 0o700
    assert [mode(path) for path in place.iterdir()] == [0o600]


def test_relative_directory(place, tmp_path):
    for name in (".", "below", "below/deeper"):
        (tmp_path / "here").mkdir(mode=0o700, exist_ok=True)
        assert finish(start(cwd=tmp_path / "here", RAWKERN_CACHE_DIR=name)) == [1, RIGHT]
        assert finish(start(cwd=tmp_path / "here", RAWKERN_CACHE_DIR=name)) == [0, RIGHT]
        assert list((tmp_path / "here" / name).glob("*.so"))


def test_edited_header_is_noticed(place, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(source.root(), copy)
    shutil.copy(KERNELS / "echo.cu", copy)
    assert finish(start(copy)) == [1, RIGHT]
    header = copy / "include" / "platform.cuh"
    text = header.read_text()
    assert text.count("return int64(blockIdx.y) * gridDim.x + blockIdx.x;") == 1
    edited = text.replace("gridDim.x + blockIdx.x;", "gridDim.x + blockIdx.x + (threadIdx.x == 2);")
    header.write_text(edited)
    assert finish(start(copy)) == [1, [10.0, 12.0, 0.0]]
    header.write_text(text)
    assert finish(start(copy)) == [0, RIGHT]
    assert len(entries(place)) == 2


@pytest.mark.parametrize("count", [2, 8])
def test_processes_that_compile_the_same_kernel_at_once(place, count):
    processes = [start(KERNELS, "1.5") for _ in range(count)]
    results = [finish(process) for process in processes]
    assert [result for _, result in results] == [RIGHT] * count
    assert sum(compilations for compilations, _ in results) > 1, "they were to meet, and did not"
    (entry,) = entries(place)
    assert entry.endswith(".so")
    assert finish(start()) == [0, RIGHT]


def test_processes_that_find_a_damaged_entry_at_once(place):
    finish(start())
    (entry,) = place.iterdir()
    entry.write_bytes(b"")
    results = [finish(process) for process in [start(KERNELS, "0.2") for _ in range(4)]]
    assert [result for _, result in results] == [RIGHT] * 4
    assert entries(place) == [entry.name]


def test_killed_process_leaves_nothing_that_harms(place):
    process = start(KERNELS, "60")
    time.sleep(2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert finish(start()) == [1, RIGHT]


def test_the_same_source_gives_the_same_bytes(place, tmp_path, monkeypatch):
    for sanitize in ("", "address"):
        monkeypatch.setenv("RAWKERN_SANITIZE", sanitize)
        kernel = runtime.Kernel(
            "echo", "collectives.cu", "Places", 32, runtime.params(("output", "u8")), folder=KERNELS
        )
        path, _ = emulator.compiler()
        first = emulator._compile(kernel, path)
        monkeypatch.chdir(tmp_path)
        assert emulator._compile(kernel, path) == first


# One entry, looked at closely. The content is any bytes here; nothing is loaded.


class Builder:
    """Stands for a compiler; counts."""

    def __init__(self, content=b"a compiled kernel"):
        self.content = content
        self.runs = 0

    def __call__(self):
        self.runs += 1
        return self.content


KEY = cache.key_of("source", "options")


def find(builder):
    return cache.find_or_build(KEY, ".so", builder)


def test_keys_delimit_their_parts():
    keys = [cache.key_of(*parts) for parts in (("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ("", "abc"))]
    assert len(set(keys)) == 5


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def corrupt(path):
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def extend(path):
    path.write_bytes(path.read_bytes() + b"x")


def replace_by_link_to_the_same(path):
    elsewhere = path.parent.parent / "elsewhere"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


def replace_by_broken_link(path):
    path.unlink()
    path.symlink_to("nowhere")


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGES = [truncate, corrupt, empty, extend, replace_by_link_to_the_same, replace_by_broken_link, replace_by_pipe]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entry_is_rebuilt(place, damage):
    builder = Builder()
    path = find(builder)
    assert find(builder) == path and builder.runs == 1
    damage(path)
    assert find(builder) == path and builder.runs == 2
    assert path.read_bytes() == builder.content
    assert not path.is_symlink() and mode(path) == 0o600
    assert entries(place) == [path.name]
    assert find(builder) == path and builder.runs == 2


def test_link_is_replaced_and_what_it_points_to_left_alone(place, tmp_path):
    path = find(Builder())
    replace_by_link_to_the_same(path)
    find(Builder())
    assert (tmp_path / "elsewhere").read_bytes() == b"a compiled kernel"


def test_damaged_entry_of_another_content_does_not_stay_in_the_way(place):
    """A compiler whose output differs from run to run."""
    path = find(Builder())
    corrupt(path)
    other = Builder(b"another content")
    assert find(other).read_bytes() == other.content
    assert find(other).read_bytes() == other.content and other.runs == 1


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give a file to another user")
def test_entry_of_another_user_is_not_trusted(place):
    path = find(Builder())
    os.chown(path, 65534, 65534)
    builder = Builder()
    assert find(builder) == path and builder.runs == 1
    assert path.stat().st_uid == os.getuid()


def test_entry_of_another_user_is_not_trusted_as_anyone(place, monkeypatch):
    """The same without being root: the user changes instead of the file."""
    path = find(Builder())
    me = os.getuid()
    answers = iter([me, me + 1])  # whose is the directory, whose the entry
    monkeypatch.setattr(os, "getuid", lambda: next(answers, me))
    builder = Builder()
    assert find(builder) == path and builder.runs == 1


def test_directory_of_another_user_is_refused(place, monkeypatch):
    find(Builder())
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    with pytest.raises(runtime.CacheError, match="belongs to another user; set RAWKERN_CACHE_DIR"):
        find(Builder())


@pytest.mark.parametrize("permissions", [0o770, 0o777, 0o720, 0o702, 0o1777])
def test_directory_writable_by_others_is_refused(place, permissions):
    find(Builder())
    place.chmod(permissions)
    builder = Builder()
    with pytest.raises(runtime.CacheError, match=f"{place} is writable by others; run chmod 700"):
        find(builder)
    assert builder.runs == 0
    place.chmod(0o755)
    find(builder)
    assert builder.runs == 0


def test_directory_that_cannot_be_made(place, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAWKERN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(runtime.CacheError, match=r"cannot use the cache directory .*set RAWKERN_CACHE_DIR"):
        find(Builder())


def as_nobody(action):
    """Runs `action` in a child process, as another user where this one is root; returns the text it returns."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            os.write(writing, action().encode())
        except BaseException as error:
            os.write(writing, f"failed: {error!r}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as file:
        return file.read()


def test_unwritable_directory(monkeypatch):
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own is closed to others
        os.chmod(folder, 0o711)
        place = Path(folder) / "cache"
        place.mkdir(mode=0o500)
        if os.getuid() == 0:
            os.chown(place, 65534, 65534)
        monkeypatch.setenv("RAWKERN_CACHE_DIR", str(place))

        def action():
            try:
                find(Builder())
            except runtime.CacheError as error:
                return str(error)
            return "no error"

        message = as_nobody(action)
        assert "cannot write to the cache directory" in message and "set RAWKERN_CACHE_DIR" in message
        place.chmod(0o700)


def test_failed_write_leaves_nothing(place, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(runtime.CacheError, match="No space left on device"):
        find(Builder())
    assert entries(place) == []


def test_failed_build_leaves_nothing(place):
    def build():
        raise runtime.CompileError("no")

    with pytest.raises(runtime.CompileError):
        find(build)
    assert entries(place) == []


def test_abandoned_files_go_after_a_while(place):
    find(Builder())
    old, new = place / ".writing-old", place / ".writing-new"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, time.time() - 2 * 3600))
    cache.find_or_build(cache.key_of("another"), ".so", Builder())
    assert not old.exists() and new.exists()


def test_size_counts_whole_entries(place):
    assert cache.size() == (0, 0)
    assert not place.exists(), "looking must not create"
    find(Builder(b"12345"))
    cache.find_or_build(KEY, ".cubin", Builder(b"123"))
    (place / ".writing-x").write_bytes(b"half")
    assert cache.size() == (2, 8)


def test_gpu_code_goes_through_the_same_cache(place, monkeypatch):
    pytest.importorskip("cupy_backends")
    kernel = runtime.Kernel("places", "collectives.cu", "Places", 32, runtime.params(("output", "u8")), folder=KERNELS)
    first, other = nvrtc.build(kernel, "sm_80"), nvrtc.build(kernel, "sm_90a")
    assert first != other and len(entries(place)) == 2
    monkeypatch.setattr(nvrtc, "compile_cubin", None)
    assert nvrtc.build(kernel, "sm_80") == first
