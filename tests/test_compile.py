"""Every instantiation of every kernel compiles for every supported generation of GPUs, without a GPU, and keeps its
values in registers: nothing spilled, no stack."""

import collections
import importlib
import inspect
import itertools
import multiprocessing
import os
import pkgutil
import re
import zlib

import pytest
import sweep

import rawkern.launchers
from rawkern import runtime
from rawkern.runtime import emulator, nvrtc, source

#: By generation: Ampere and Ada, Hopper, Blackwell. Those of a generation have the same registers and nearly the same
#: instructions, so a file's kernels take turns; RAWKERN_TEST_ARCHITECTURES=all compiles each for all, in more time.
GENERATIONS = (("sm_80", "sm_86", "sm_89"), ("sm_90a",), ("sm_100", "sm_120"))
MODULES = {
    info.name: importlib.import_module(f"rawkern.launchers.{info.name}")
    for info in pkgutil.iter_modules(rawkern.launchers.__path__)
}
_PROPERTIES = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def kernels():
    """{test name: Kernel}: all of them, each once."""
    found = {}
    for module in MODULES.values():
        for kernel in getattr(module, "kernels", tuple)():
            found.setdefault((kernel.file, kernel.type, kernel.threads), kernel)
    return {f"{kernel.file.removesuffix('.cu')}: {kernel.type}": kernel for kernel in found.values()}


KERNELS = kernels()


def architectures(name):
    """Those to compile the kernel of this name for. Warpgroup instructions exist on Hopper only."""
    if "Warpgroup" in KERNELS[name].type:
        return ("sm_90a",)
    if os.environ.get("RAWKERN_TEST_ARCHITECTURES") == "all":
        return tuple(itertools.chain(*GENERATIONS))
    return tuple(generation[TURNS[name] % len(generation)] for generation in GENERATIONS)


def turns():
    """{test name: its number in its file}, in an order in which element types do not take turns, too."""
    files = collections.defaultdict(itertools.count)
    return {name: next(files[KERNELS[name].file]) for name in sorted(KERNELS, key=lambda n: zlib.crc32(n.encode()))}


TURNS = turns()


@pytest.fixture(scope="module")
def compiler():
    """A process to compile in, replaced now and then: NVRTC keeps some 10 MB of each kernel it compiled."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=50) as pool:
        yield pool


# pytest cuts long names, and a cut name tells nothing: the number comes first.
@pytest.mark.parametrize("name", KERNELS, ids=[f"{i}-{name}"[:90] for i, name in enumerate(KERNELS)])
def test_compiles_without_spills(name, compiler):
    problems = []
    for arch in architectures(name):
        # Without NVRTC's cache: what comes from there has no report.
        cubin, log = compiler.apply(nvrtc.compile_cubin, (KERNELS[name], arch, ("--no-cache",)))
        properties = _PROPERTIES.findall(log)
        assert cubin and properties, f"{arch}: no report by the assembler in:\n{log}"
        if "wgmma.mma_async instructions are serialized" in log:
            problems += [f"{arch}: {line.strip()}" for line in log.splitlines() if "serialized" in line]
        if any(int(number) for numbers in properties for number in numbers):
            problems += [f"{arch}: {line.strip()}" for line in log.splitlines() if _PROPERTIES.search(line)]
    assert not problems, f"registers do not suffice in {name}:\n" + "\n".join(problems)


@pytest.mark.parametrize("module", MODULES)
def test_launchers_list_their_kernels(module):
    builds = re.search(r"\bKernel\(", inspect.getsource(MODULES[module]))
    if not builds:
        return
    assert hasattr(MODULES[module], "kernels"), f"rawkern/launchers/{module}.py builds kernels and has no kernels()"
    listed = list(MODULES[module].kernels())
    assert listed and all(isinstance(kernel, runtime.Kernel) for kernel in listed)
    for dtype in getattr(MODULES[module], "DTYPES", runtime.CPP_TYPES):
        name = runtime.CPP_TYPES[dtype]
        assert any(re.search(rf"\b{name}\b", kernel.type) for kernel in listed), f"no instantiation for {name}"


def without_chain(kernel):
    """(file, type) with every chain of functions, of which there are endlessly many, made the same."""
    text = kernel.type
    while (start := re.search(r"\bChain<(?!>)", text)) is not None:
        end, depth = start.end(), 1
        while depth:
            depth += {"<": 1, ">": -1}.get(text[end], 0)
            end += 1
        text = f"{text[: start.start()]}Chain<>{text[end:]}"
    return kernel.file, text


@pytest.mark.parametrize("op", sweep.SWEEPS)
def test_what_is_launched_is_listed(op, monkeypatch):
    launched = {}

    def launch(self, kernel, grid, params, queue):
        launched[without_chain(kernel)] = kernel.type

    monkeypatch.setattr(emulator.Emulator, "launch", launch)  # what is launched does not depend on results
    sweep.SWEEPS[op]()
    listed = {without_chain(kernel) for kernel in KERNELS.values()}
    assert launched
    assert set(launched) <= listed, [launched[key] for key in set(launched) - listed]


def test_every_file_is_compiled_for_every_architecture():
    compiled = {(kernel.file, arch) for name, kernel in KERNELS.items() for arch in architectures(name)}
    for file in {kernel.file for kernel in KERNELS.values()}:
        hopper_only = all("Warpgroup" in kernel.type for kernel in KERNELS.values() if kernel.file == file)
        expected = ("sm_90a",) if hopper_only else itertools.chain(*GENERATIONS)
        assert {arch for name, arch in compiled if name == file} == set(expected), file


def test_every_source_file_is_compiled():
    files = {path.relative_to(source.root()).as_posix() for path in source.root().rglob("*.cu")}
    assert files == {kernel.file for kernel in KERNELS.values()}


def test_no_generic_lambdas():
    """NVRTC before 13.4 takes them for functions of the host; a newer one, with which tests compile, does not."""
    generic = re.compile(r"\[[^\[\]]*\]\s*\([^()]*\bauto\b")
    assert generic.search("run([&](auto width) { return width; });")
    for path in sorted([*source.root().rglob("*.cu"), *source.root().rglob("*.cuh")]):
        assert not generic.search(path.read_text()), f"{path.name} has a generic lambda"


def test_a_spill_would_be_noticed(tmp_path):
    """The assembler's report is read rightly: a kernel that cannot keep its values in registers."""
    (tmp_path / "spill.cu").write_text(
        """
        #include "platform.cuh"
        namespace rawkern {
        struct Spill {
          struct Params { float* data; int count; };
          static constexpr int kThreads = 1024;
          static constexpr int kMinBlocks = 2;
          __device__ static void run(const Params& p) {
            float values[100];
            for (int i = 0; i < 100; ++i) values[i] = p.data[i * p.count + threadIdx.x];
            for (int round = 0; round < p.count; ++round)
              for (int i = 0; i < 100; ++i) values[i] = values[i] * values[(i + 1) % 100] + values[(i * 7) % 100];
            for (int i = 0; i < 100; ++i) p.data[i * p.count + threadIdx.x] = values[i];
          }
        };
        }
        """
    )
    kernel = runtime.Kernel(
        "spill", "spill.cu", "Spill", 1024, runtime.params(("data", "u8"), ("count", "i4")), folder=tmp_path
    )
    _, log = nvrtc.compile_cubin(kernel, "sm_90a")
    assert any(int(stores) for _, stores, _ in _PROPERTIES.findall(log))
