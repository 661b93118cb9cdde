"""The precision in which float32 convolutions multiply, following PyTorch's own switches."""

import torch

_PRECISIONS = ("ieee", "tf32", None)


def check_precision(precision):
    """`precision`, if it is one that `rawkern.conv_transpose2d` takes. Raises ValueError otherwise."""
    if precision not in _PRECISIONS:
        raise ValueError(f"precision must be 'ieee', 'tf32' or None, got {precision!r}")
    return precision


def default_precision(tensor):
    """ "ieee" or "tf32": on a GPU what torch allows cuDNN's convolutions, on a CPU "ieee".

    Read at every call, also at those of a compiled program. torch 2.9 brought
    `torch.backends.cudnn.conv.fp32_precision`, whose getter resolves the settings above it and the older `allow_tf32`;
    reading `allow_tf32` after the newer switch was used is an error there. The getter itself takes a seventh of the
    attribute's time.
    """
    if not tensor.is_cuda or tensor.dtype is not torch.float32:
        return "ieee"
    allowed = _getter("cuda", "conv") == "tf32" if _getter is not None else torch.backends.cudnn.allow_tf32
    return "tf32" if allowed else "ieee"


_getter = getattr(torch._C, "_get_fp32_precision_getter", None)
