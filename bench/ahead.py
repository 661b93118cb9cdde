"""Compiles the kernels of a run before it begins: on all cores at once, not one by one where each is first called.

Worker processes call what will be measured on arrays that nobody fills, with the emulator standing for the GPU: it has
the GPU's architecture and size, and only writes down what it is asked to launch. What fails here is left for the run
itself to report.
"""

import concurrent.futures
import contextlib
import functools
import multiprocessing
import os

import numpy as np

from rawkern import runtime
from rawkern.runtime import nvrtc

from . import peers
from .data import MODES, Input, empty_sets
from .devices import Cpu
from .problems import operations

_launched = []  # in a worker


def compile_all(jobs, compute_capability, multiprocessors, compiled=lambda done, known: None):
    """Compiles for (operation, problem, direction, mode) jobs what is not in the cache.

    Args:
        compiled: is told how many kernels are compiled and how many are known so far.
    """
    arch = nvrtc.arch_name(compute_capability)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with concurrent.futures.ProcessPoolExecutor(cores, spawn, stand_in, (arch, multiprocessors)) as pool:
        finding = [pool.submit(kernels_of, operation.name, *job) for operation, *job in jobs]
        kernels, building = set(), []
        for found in concurrent.futures.as_completed(finding):
            new = set(found.result()) - kernels
            kernels |= new
            building += [pool.submit(_build, kernel, arch) for kernel in new]
        for done, _ in enumerate(concurrent.futures.as_completed(building), 1):
            compiled(done, len(building))
    return kernels


def stand_in(arch, multiprocessors):
    """Makes this process's emulator stand for a GPU."""
    device = runtime.device_of(np.empty(0))
    device.name, device.arch, device.multiprocessors = "gpu", arch, multiprocessors
    device.launch = lambda kernel, grid, params, queue: _launched.append(kernel)
    device.prepare = lambda kernel, grid, params: _launched.append(kernel)
    device.repeat = lambda launches, stream: None


def kernels_of(operation_name, problem, direction, mode):
    """What a job launches: a list of Kernels. Where the emulator stands for a GPU."""
    (operation,) = (operation for operation in operations() if operation.name == operation_name)
    _launched.clear()
    with contextlib.suppress(Exception):
        _call(operation, problem, direction, *MODES[mode])
    return list(_launched)


def _call(operation, problem, direction, dtype, precision):
    if direction != "train":
        operation.call(problem, direction, _empty(operation.inputs(problem, direction), dtype), precision)
        return
    arrays = _empty(operation.inputs(problem, "forward"), dtype)
    grads = _empty({"grad_output": Input(operation.output_shape(problem))}, dtype)
    ours = functools.partial(operation.rawkern, problem, precision)
    peers.Step(peers.Trial(ours, [arrays], list(grads.values()), operation.differentiable, "train", "", None))(0)


def _empty(specification, dtype):
    return {
        name: empty_sets(Cpu(), 1, each.shape, each.dtype_for(dtype), each.channels_last)[0][0]
        for name, each in specification.items()
    }


def _build(kernel, arch):
    with contextlib.suppress(Exception):
        nvrtc.build(kernel, arch)
