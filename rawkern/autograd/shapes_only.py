"""What a body of an operator gets instead of a `Recording` where nothing is computed: on fake and meta tensors."""

import torch

from .dlpack import empty

#: Arguments that have dtypes of their own: what a forward pass kept for its backward pass.
_KEPT = ("index", "statistics", "sums")


class ShapesOnly:
    """Allocates outputs; launches nothing.

    Args:
        names: those of all tensors in a row.
        tensors: the tensors, or None.

    Raises RuntimeError where devices or dtypes differ, naming both, as a launch would.
    """

    def __init__(self, names, tensors):
        check_devices(names, tensors)
        named = [(name, tensor) for name, tensor in zip(names, tensors, strict=True) if tensor is not None]
        first_name, first = named[0]
        for name, tensor in named[1:]:
            pair = f"{first_name} and {name}"
            if tensor.dtype != first.dtype and name not in _KEPT:
                raise RuntimeError(f"{pair} have different dtypes: {first.dtype} and {tensor.dtype}")

    def empty(self, shape, like, dtype=None, layout_of=None):
        return empty(shape, like, dtype, layout_of)

    def empty_like(self, tensor):
        return torch.empty_like(tensor)

    def empty_strided(self, shape, strides, like):
        return torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device)

    def dtype(self, tensor):
        return tensor.dtype

    def __call__(self, launcher, *arguments, **options):
        return None


def check_devices(names, tensors):
    """Raises RuntimeError where tensors (None is skipped) are on different devices, naming both."""
    named = [(name, tensor) for name, tensor in zip(names, tensors, strict=True) if tensor is not None]
    first_name, first = named[0]
    for name, tensor in named[1:]:
        if tensor.device != first.device:
            raise RuntimeError(f"{first_name} and {name} are on different devices: {first.device} and {tensor.device}")
