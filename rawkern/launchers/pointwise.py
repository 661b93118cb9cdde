"""Chains of pointwise functions over arrays: value, gradients, and gradients of the gradients.

The chain is a function of `rawkern.epilogue` or a sequence of them (or a `Chain`). Its tensors must be arrays of the
input's dtype and device that broadcast to the input and vary along at most one of its axes, the same for all. The input
may have any rank and any strides: dense memory of any order of dimensions (channels-last) is processed in place and
results have the same order; other memory is copied first and results are contiguous.
"""

import functools
import math

import numpy as np

from .. import runtime
from .chain import chain_of, channel_axis
from .channel_sum import LAYOUT, THREADS, plan, totals, view_of, zero
from .layout import arranged_as, contiguous, copy, dense, is_arranged_as
from .repeat import repeatable

_INPUTS = {"Forward": 1, "Backward": 2, "DoubleBackward": 3}


@functools.cache
def _params(chain_params):
    return runtime.params(
        ("inputs", "u8", (3,)),
        ("outputs", "u8", (2,)),
        ("partials", "u8"),
        ("chain", chain_params),
        ("directions", "u8", chain_params["tensors"].shape),
        ("layout", LAYOUT),
    )


@functools.cache
def kernel(body, cpp_type, chain_cpp, chain_params, walk=None):
    """The kernel for a body of cuda/pointwise.cu ("Forward", ...); `walk`: also sum gradients of tensors, this way."""
    body_type = f"{body}<{cpp_type}, {chain_cpp}>"
    return runtime.Kernel(
        name="rawkern_pointwise_" + {"Forward": "forward", "Backward": "backward"}.get(body, "double_backward"),
        file="pointwise.cu",
        type=f"Reducing<{body_type}, {walk}>" if walk else f"Elementwise<{body_type}>",
        threads=THREADS,
        params=_params(chain_params),
    )


@repeatable
def pointwise(input, chain, *, tensors=None, out=None, stream=None):
    """chain(input): an array of the input's shape and dtype.

    Args:
        tensors: arrays to use for the chain's tensors instead of those in it.

    Raises TypeError for what is no chain; RuntimeError where dtypes or devices differ or a tensor does not broadcast;
    ValueError where tensors vary along several axes or `out` does not fit.
    """
    call = _Call(input, chain, tensors, stream)
    (result,) = call.prepare_outputs((out,), ("out",), (True,))
    call.run("Forward", (call.input,), (result,))
    return call.finish(result, out)


@repeatable
def pointwise_backward(grad_output, input, chain, *, tensors=None, needs=None, out=None, stream=None):
    """Gradients of `pointwise`: a tuple of that of the input and that of each of the chain's tensors.

    Args:
        needs: which of them are wanted (default: all); the others are None.
        out: arrays for them, None for those that are to be allocated here. Gradients of tensors must be contiguous.
    """
    call = _Call(input, chain, tensors, stream, grad_output=grad_output)
    needs = call.check_needs(needs, 1)
    out = call.check_needs(out, 1, default=None)
    grad_output = call.arranged("grad_output", grad_output)
    (grad_input,) = call.prepare_outputs(out[:1], ("grad_input",), needs[:1])
    sums = call.prepare_sums(out[1:], needs[1:])
    call.run("Backward", (grad_output, call.input), (grad_input,), sums)
    return call.finish(grad_input, out[0]), *sums


@repeatable
def pointwise_double_backward(
    grad_output, input, chain, grad_grad_input, grad_grad_tensors, *, tensors=None, needs=None, out=None, stream=None
):
    """Gradients of `pointwise_backward`: a tuple of those of grad_output, of the input and of each tensor.

    Args:
        grad_grad_input: gradient of what pointwise_backward returned for the input; None: zero.
        grad_grad_tensors: the same for each of the chain's tensors.
        needs, out: as in `pointwise_backward`.
    """
    arrays = {f"grad_grad_tensors[{i}]": array for i, array in enumerate(grad_grad_tensors)}
    call = _Call(input, chain, tensors, stream, grad_output=grad_output, grad_grad_input=grad_grad_input, **arrays)
    needs = call.check_needs(needs, 2)
    out = call.check_needs(out, 2, default=None)
    grad_output = call.arranged("grad_output", grad_output)
    grad_grad_input = call.arranged("grad_grad_input", grad_grad_input)
    directions = call.check_directions(grad_grad_tensors)
    results = call.prepare_outputs(out[:2], ("grad_grad_output", "grad_input"), needs[:2])
    sums = call.prepare_sums(out[2:], needs[2:])
    call.run("DoubleBackward", (grad_output, call.input, grad_grad_input), results, sums, directions)
    return *(call.finish(*pair) for pair in zip(results, out[:2], strict=True)), *sums


class _Call:
    """What the launches of one call have in common: checked arguments, in memory as the kernels read them."""

    def __init__(self, input, chain, tensors, stream, **others):
        self.chain = chain_of(chain)
        tensors = tuple(self.chain.tensors if tensors is None else tensors)
        named = {f"tensor {i} of the chain": array for i, array in enumerate(tensors)}
        self.queue = runtime.queue_of(stream, input=input, **named, **others)
        self.chain.check_count(tensors)
        self.axis = channel_axis(input.shape, [array.shape for array in tensors])
        self.input = dense(self.queue, input)
        self.tensors = [contiguous(self.queue, array) for array in tensors]

    def check_needs(self, values, first, default=True):
        count = first + len(self.tensors)
        values = (default,) * count if values is None else tuple(values)
        if len(values) != count:
            raise ValueError(f"expected {count} entries, for {first} arrays and the chain's tensors, got {len(values)}")
        return values

    def arranged(self, name, array):
        """An array of the input's shape, in the input's order of memory."""
        if array is None:
            return None
        if array.shape != self.input.shape:
            raise RuntimeError(f"{name} has shape {array.shape}, expected the input's, {self.input.shape}")
        return arranged_as(self.queue, array, self.input)

    def check_directions(self, arrays):
        arrays = tuple(arrays)
        if len(arrays) != len(self.tensors):
            raise ValueError(f"grad_grad_tensors has {len(arrays)} entries, the chain has {len(self.tensors)} tensors")
        for i, (array, tensor) in enumerate(zip(arrays, self.tensors, strict=True)):
            if array is not None and array.shape != tensor.shape:
                raise RuntimeError(f"grad_grad_tensors[{i}] has shape {array.shape}, expected {tensor.shape}")
        return tuple(contiguous(self.queue, array) for array in arrays)

    def prepare_outputs(self, given, names, needs):
        """Arrays in the input's order of memory to compute into: those given where they have it."""
        results = []
        for array, name, needed in zip(given, names, needs, strict=True):
            if array is not None:
                runtime.check_out(array, self.input.shape, self.input.dtype, self.queue.device, name)
            usable = array is not None and is_arranged_as(array, self.input)
            results.append(None if not needed else array if usable else self.queue.empty_like(self.input))
        return results

    def prepare_sums(self, given, needs):
        results = []
        for i, (array, tensor, needed) in enumerate(zip(given, self.tensors, needs, strict=True)):
            if array is None and needed:
                array = self.queue.empty(tensor.shape, tensor.dtype)
            if needed:
                runtime.check_out(array, tensor.shape, tensor.dtype, self.queue.device, f"gradient of tensor {i}")
                if not array.flags.c_contiguous:
                    raise ValueError(f"the array for the gradient of tensor {i} is not contiguous")
            results.append(array if needed else None)
        return results

    def finish(self, result, out):
        """The array to return: the caller's own where there is one."""
        if result is None or out is None or out is result:
            return result
        return copy(self.queue, out, result)

    def run(self, body, inputs, outputs, sums=(), directions=()):
        if self.input.size == 0:
            for array in sums:
                if array is not None and array.size:
                    zero(self.queue, array)
            return
        wants_sums = any(array is not None for array in sums)
        if not wants_sums and all(array is None for array in outputs):
            return
        arrays = [array for array in (*inputs, *outputs) if array is not None]
        alignment = math.gcd(16, *map(runtime.pointer, arrays))
        how = plan(*view_of(self.input, self.axis), self.input.itemsize, alignment)
        layout = how.pack()
        partials = None
        if wants_sums:
            partials = self.queue.empty((len(sums), how.partials), np.float64)
            blocks = how.blocks
        else:
            layout["vector"] = alignment == 16
            blocks = -(-how.total // _block_elements(body, self.input.itemsize))
        cpp_type = runtime.cpp_type(self.input.dtype)
        walk = how.walk if wants_sums else None
        kernel(body, cpp_type, self.chain.cpp, self.chain.params, walk).launch(
            self.queue,
            blocks,
            inputs=_addresses(inputs, 3),
            outputs=_addresses(outputs, 2),
            partials=runtime.pointer(partials),
            chain=self.chain.pack(self.tensors, how.channels),
            directions=_addresses(directions, max(1, len(self.tensors))),
            layout=layout,
        )
        for i, array in enumerate(sums):
            if array is not None:
                totals(self.queue, how, partials, i, array)


def _addresses(arrays, count):
    addresses = [runtime.pointer(array) for array in arrays]
    return addresses + [0] * (count - len(addresses))


def _block_elements(body, itemsize):
    """Elements that a block of Elementwise<body> takes, its kBlockElements."""
    return THREADS * (16 // itemsize) * (4 if _INPUTS[body] == 1 else 2)


def kernels():
    """Every body, dtype and way to sum; a few chains stand for the endless number there can be."""
    from ..epilogue import ELU, GELU, Add, Clamp, Minimum, Mish, Mul, Softplus

    one = np.ones(1)
    model = chain_of((Add(0.5), Minimum(0.0), GELU(), Mul(2.0)))
    long = chain_of((Mul(one), Mish(), Clamp(-1.0, 1.0), Softplus(), Add(one), ELU(), GELU("tanh")))
    for cpp_type in runtime.CPP_TYPES.values():
        for body in _INPUTS:
            for chain in (chain_of(GELU()), model, long):
                yield kernel(body, cpp_type, chain.cpp, chain.params)
        for body in ("Backward", "DoubleBackward"):
            for walk in ("RowWalk", "ColumnWalk"):
                yield kernel(body, cpp_type, long.cpp, long.params, walk)
