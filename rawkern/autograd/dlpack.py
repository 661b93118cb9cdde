"""The one crossing between PyTorch tensors and the launchers' arrays. Nothing is copied either way.

CUDA tensors cross to CuPy, CPU tensors to NumPy, both by DLPack. bfloat16 crosses as int16, because not every library
speaks bfloat16 over DLPack, and is viewed as ml_dtypes' bfloat16 on the other side.
"""

import numpy as np
import torch
from torch.utils.dlpack import to_dlpack

from ..runtime import bfloat16

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


def to_array(tensor):
    """The tensor's memory as a NumPy or CuPy array; None stays None."""
    if tensor is None:
        return None
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.device.type not in ("cpu", "cuda"):
        raise RuntimeError(f"rawkern runs on cpu and cuda tensors, not on {tensor.device}")
    if tensor.layout is not torch.strided:
        raise RuntimeError(f"rawkern takes strided tensors, not {tensor.layout}")
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
        array = np.from_dlpack(tensor)
    return array.view(bfloat16) if is_bfloat16 else array


class TorchStream:
    """PyTorch's current stream of a device, and PyTorch's allocator as the source of workspaces.

    Looked up anew for every launch: the user may be inside `torch.cuda.stream(...)`.
    """

    def __init__(self, device):
        self.device = device
        self.ptr = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0

    def empty(self, shape, dtype):
        return to_array(torch.empty(tuple(shape), dtype=_TORCH_DTYPES[np.dtype(dtype)], device=self.device))


def stream_of(tensor):
    """The stream to launch on for work on this tensor."""
    return TorchStream(tensor.device)
