"""The precision in which float32 convolutions multiply, following PyTorch's own switches."""

import torch

from ..launchers.block_math import check_precision


def resolve_precision(precision, tensor):
    """ "ieee" or "tf32": `precision` if given; else on a GPU what torch allows cuDNN's convolutions, on a CPU "ieee".

    Read at every call. torch 2.9 brought `torch.backends.cudnn.conv.fp32_precision`, whose getter resolves the settings
    above it and the older `allow_tf32`; reading `allow_tf32` after the newer switch was used is an error there.
    """
    if precision is not None:
        return check_precision(precision)
    if tensor.device.type != "cuda":
        return "ieee"
    conv = getattr(torch.backends.cudnn, "conv", None)
    allowed = conv.fp32_precision == "tf32" if conv is not None else torch.backends.cudnn.allow_tf32
    return "tf32" if allowed else "ieee"
