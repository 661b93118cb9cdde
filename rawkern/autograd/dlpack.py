"""The one crossing between PyTorch tensors and the launchers' arrays. Nothing is copied either way.

CUDA tensors cross to CuPy, CPU tensors to NumPy, both by DLPack. bfloat16 crosses as int16, because not every library
speaks bfloat16 over DLPack, and is viewed as ml_dtypes' bfloat16 on the other side.

A crossing costs microseconds, and a launcher decides for a hundred of them. Both happen once for a call of a kind (the
shapes, strides, dtypes and so on): a `Recording` lets the launchers run on the arrays and writes down what they launch,
and the `Plan` that comes of it launches the same again for other tensors, of which it needs the addresses only.
"""

import operator

import numpy as np
import torch

# What programs of torch.compile allocate by, on the current GPU: half the time of torch.empty_strided.
from torch._C._dynamo.guards import _empty_strided_cpu, _empty_strided_cuda
from torch.utils.dlpack import to_dlpack

from ..runtime import Recorder, bfloat16

_TORCH_DTYPES = {
    np.dtype("float64"): torch.float64,
    np.dtype("float32"): torch.float32,
    np.dtype("float16"): torch.float16,
    bfloat16: torch.bfloat16,
    np.dtype("int64"): torch.int64,
    np.dtype("int32"): torch.int32,
    np.dtype("int16"): torch.int16,
    np.dtype("uint8"): torch.uint8,
}


class _Memory:
    """A tensor's memory, which may be written, for NumPy: like `array`, a view of it that is read-only."""

    def __init__(self, tensor, array):
        self._tensor = tensor  # kept alive by what NumPy makes of this
        self.__array_interface__ = {**array.__array_interface__, "data": (tensor.data_ptr(), False)}


def to_array(tensor, name="the argument"):
    """The tensor's memory as a NumPy or CuPy array; None stays None. Errors call it `name`."""
    if tensor is None:
        return None
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
    if tensor.device.type not in ("cpu", "cuda"):
        raise RuntimeError(f"rawkern runs on cpu and cuda tensors; {name} is on {tensor.device}")
    if tensor.layout is not torch.strided:
        raise RuntimeError(f"rawkern takes strided tensors; {name} is {tensor.layout}")
    if tensor.is_floating_point() and tensor.dtype not in _TORCH_DTYPES.values():
        raise RuntimeError(
            f"{name} has dtype {tensor.dtype}; rawkern's kernels take float64, float32, float16, bfloat16"
        )
    tensor = tensor.detach()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    is_bfloat16 = tensor.dtype is torch.bfloat16
    if is_bfloat16:
        tensor = tensor.view(torch.int16)
    if tensor.device.type == "cuda":
        import cupy

        # A capsule: no bookkeeping of streams, which launches do themselves.
        array = cupy.from_dlpack(to_dlpack(tensor))
    else:
        array = np.from_dlpack(tensor)  # Tensor.numpy() would forbid FSDP to resize the storage later
        if not array.flags.writeable:  # so it is with torch 2.6
            array = np.asarray(_Memory(tensor, array))
    return array.view(bfloat16) if is_bfloat16 else array


def empty(shape, like, dtype=None, layout_of=None):
    """A new tensor on the device of `like`, of its dtype or of `dtype`.

    Contiguous; or channels-last if `layout_of`, another tensor of 4 or 5 dimensions, is that and not contiguous too.
    """
    memory_format = torch.contiguous_format
    if layout_of is not None and layout_of.dim() in _CHANNELS_LAST and not layout_of.is_contiguous():
        channels_last = _CHANNELS_LAST[layout_of.dim()]
        if layout_of.is_contiguous(memory_format=channels_last):
            memory_format = channels_last
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format)


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Recording:
    """One call of an operator's body on ordinary tensors: its outputs, and what its launchers launched."""

    def __init__(self, names, tensors):
        self._arrays = {
            id(tensor): to_array(tensor, name)
            for name, tensor in zip(names, tensors, strict=True)
            if tensor is not None
        }
        self._like = tensors[0]
        self._outputs = []
        arrays = [None if tensor is None else self._arrays[id(tensor)] for tensor in tensors]
        stream = torch._C._cuda_getCurrentRawStream(self._like.device.index) if self._like.is_cuda else 0
        self._recorder = Recorder(stream, _allocator(self._like.device), arrays)

    def empty(self, shape, like, dtype=None, layout_of=None):
        """A new output; see the function `empty`."""
        return self._output(empty(shape, like, dtype, layout_of))

    def empty_like(self, tensor):
        """A new output of the shape, dtype and strides of a dense tensor."""
        return self._output(torch.empty_like(tensor))

    def empty_strided(self, shape, strides, like):
        """A new output of the device and dtype of `like`."""
        return self._output(torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device))

    def dtype(self, tensor):
        """The dtype of the tensor's array."""
        return self._arrays[id(tensor)].dtype

    def _output(self, output):
        self._outputs.append(output)
        self._arrays[id(output)] = self._recorder.add(to_array(output))
        return output

    def __call__(self, launcher, *arguments, **options):
        """Calls a launcher, with arrays in place of tensors, on PyTorch's current stream."""
        arguments = [self._crossed(value) for value in arguments]
        options = {name: self._crossed(value) for name, value in options.items()}
        return launcher(*arguments, **options, stream=self._recorder)

    def plan(self, results):
        """The Plan for calls of this kind, in which the body returned `results`; None if there cannot be one."""
        tape = self._recorder.tape()
        return None if tape is None else Plan(self._like, tape, self._outputs, results)

    def _crossed(self, value):
        if isinstance(value, torch.Tensor):
            return self._arrays[id(value)] if id(value) in self._arrays else to_array(value)
        if isinstance(value, (tuple, list)):
            return type(value)(self._crossed(item) for item in value)
        return value


def _allocator(device):
    """A function of shape and dtype for new arrays in PyTorch's memory.

    It knows the device alone: bound to the Recording, it would close a circle of references, and what the call used
    would not be freed before the next garbage collection.
    """

    def allocate(shape, dtype):
        return to_array(torch.empty(tuple(shape), dtype=_TORCH_DTYPES[np.dtype(dtype)], device=device))

    return allocate


class Plan:
    """What to allocate and to launch for one kind of call of an operator.

    Args:
        like: a tensor of the call, on whose device everything is.
        tape: what was launched.
        outputs: all new tensors that the launches knew as arguments, in this order.
        results: those of them that the call returns: one, or a tuple.
    """

    def __init__(self, like, tape, outputs, results):
        self._play = tape.play
        self._gpu = like.device.index if like.is_cuda else None
        self._layouts = [(tuple(output.shape), output.stride(), output.dtype) for output in outputs]
        if tape.workspace_bytes:
            self._layouts.append(((tape.workspace_bytes,), (1,), torch.uint8))
        places = {id(output): i for i, output in enumerate(outputs)}
        if isinstance(results, torch.Tensor):
            self._results_of = operator.itemgetter(places[id(results)])
        else:
            places = [places[id(result)] for result in results]
            # Of several places one call in C makes a tuple; of a single one it would not.
            several = len(places) > 1
            self._results_of = operator.itemgetter(*places) if several else lambda new: tuple([new[p] for p in places])

    def repeat(self, addresses):
        """Does it for tensors with these addresses; returns the results."""
        gpu = self._gpu
        if gpu is None:
            empty_strided, stream = _empty_strided_cpu, 0
        else:
            empty_strided = _empty_strided_cuda if torch._C._cuda_getDevice() == gpu else self._empty_strided
            # Looked up anew for every call: the user may be inside `torch.cuda.stream(...)`.
            stream = torch._C._cuda_getCurrentRawStream(gpu)
        new = []
        for layout in self._layouts:
            tensor = empty_strided(*layout)
            new.append(tensor)
            addresses.append(tensor.data_ptr())
        self._play(addresses, stream)
        # The workspace, which is the last of them, is freed on return: the allocator gives it away only to work that
        # comes later on the same stream.
        return self._results_of(new)

    def _empty_strided(self, shape, strides, dtype):
        """On a GPU that is not the current one."""
        return torch.empty_strided(shape, strides, dtype=dtype, device=f"cuda:{self._gpu}")
