"""What torch.autocast does to arguments, as it does for torch's own operators.

Convolutions run in autocast's dtype. Normalisations, sums and softplus run in float32 on a GPU; on a CPU torch leaves
them in the dtype of what they are given. Other functions take what they are given, and promote. float64 stays.
"""

import torch
from torch.compiler import is_dynamo_compiling


def is_on(tensor):
    """Whether autocast is on for the tensor's device."""
    if not is_dynamo_compiling() and not torch._C._is_any_autocast_enabled():
        return False  # the same answer in a third of the time
    device_type = tensor.device.type
    return device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)  # meta has no autocast


def lowered(input, *tensors):
    """The tensors (None stays) in the dtype in which convolutions run under autocast on the device of `input`."""
    return _cast(torch.get_autocast_dtype(input.device.type), (input, *tensors))


def normalised_dtype(input):
    """The dtype of a normalisation's result under autocast."""
    return torch.promote_types(input.dtype, torch.float32) if input.device.type == "cuda" else input.dtype


def raised(input, *tensors):
    """The tensors (None stays) in the dtype in which normalisations run under autocast."""
    if input.device.type == "cuda":
        return _cast(torch.float32, (input, *tensors))
    return promote(input, *tensors)


def promote(input, *tensors):
    """The tensors (None stays) in the dtype that torch promotes theirs to."""
    dtype = input.dtype
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return _cast(dtype, (input, *tensors))


def chain_dtype(dtype, device_type, signature, operands):
    """The dtype that functions applied to a tensor of `dtype` one by one would arrive at under autocast."""
    for operand in operands:
        dtype = torch.promote_types(dtype, operand.dtype)
    runs_in_float32 = device_type == "cuda" and "Softplus" in signature
    return torch.promote_types(dtype, torch.float32) if runs_in_float32 else dtype


def _cast(dtype, tensors):
    return tuple([tensor.to(dtype) if _is_eligible(tensor) else tensor for tensor in tensors])


def _is_eligible(tensor):
    return tensor is not None and tensor.is_floating_point() and tensor.dtype is not torch.float64
