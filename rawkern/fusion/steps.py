"""The larger pieces that chains are made of: the convolution they begin with, normalisation, minimum and sum.

Each `match_...` gives a small record of what the node computes, with nodes for its tensors, or None.
"""

import operator
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F

from .patterns import Attribute, arguments_of, plain_module, static_tensor


@dataclass(frozen=True)
class Convolution:
    """A transposed convolution. `weight`, `bias` and `output_size` are nodes or None; `geometry` are constants.

    `module` is that which computes the output padding from `output_size`, or None for a function's call.
    """

    node: fx.Node
    input: fx.Node
    weight: object
    bias: object
    output_size: object
    geometry: dict
    module: nn.Module | None
    channels: int | None


@dataclass(frozen=True)
class Normalization:
    """A group normalisation; `weight` and `bias` are nodes or None."""

    node: fx.Node
    num_groups: int
    weight: object
    bias: object
    eps: float


_CONV_NAMES = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_GEOMETRY = ("stride", "padding", "output_padding", "groups", "dilation")


def match_convolution(node, root):
    """The transposed 2-D convolution that `node` computes."""
    if node.op == "call_module":
        module = plain_module(node, root, nn.ConvTranspose2d)
        given = arguments_of(node, ("input", "output_size"))
        if module is None or given is None or refusal(module) or not isinstance(given.get("input"), fx.Node):
            return None
        geometry = {name: getattr(module, name) for name in _GEOMETRY}
        weight, bias = (Attribute(f"{node.target}.{name}") for name in ("weight", "bias"))
        size = given.get("output_size")
        return Convolution(node, given["input"], weight, bias, size, geometry, module, module.out_channels)
    if node.op != "call_function" or node.target is not F.conv_transpose2d:
        return None
    given = arguments_of(node, _CONV_NAMES)
    if given is None or not isinstance(given.get("input"), fx.Node) or not isinstance(given.get("weight"), fx.Node):
        return None
    geometry = {name: given[name] for name in _GEOMETRY if name in given}
    if any(isinstance(argument, fx.Node) for argument in _flat(geometry.values())):
        return None
    weight = static_tensor(given["weight"], root)
    channels = None if weight is None or weight.dim() != 4 else weight.shape[1] * geometry.get("groups", 1)
    return Convolution(node, given["input"], given["weight"], given.get("bias"), None, geometry, None, channels)


def refusal(module):
    """Why a torch.nn.ConvTranspose2d cannot be fused although it is one; None if it can."""
    if module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}"
    if "weight" not in module._parameters or "bias" not in module._parameters:
        return "its weight or bias is not a parameter"
    return None


def match_normalization(node, value, root):
    """The group normalisation of `value` that `node` computes."""
    module = plain_module(node, root, nn.GroupNorm)
    if module is not None:
        if node.args != (value,) or node.kwargs:
            return None
        weight, bias = (Attribute(f"{node.target}.{name}") for name in ("weight", "bias"))
        return Normalization(node, module.num_groups, weight, bias, module.eps)
    if node.op != "call_function" or node.target not in (F.group_norm, torch.group_norm):
        return None
    given = arguments_of(node, ("input", "num_groups", "weight", "bias", "eps", "cudnn_enabled"))
    if given is None or given.get("input") is not value or type(given.get("num_groups")) is not int:
        return None
    eps = given.get("eps", 1e-5)
    tensors = [given.get(name) for name in ("weight", "bias")]
    if not isinstance(eps, (int, float)) or value in tensors:
        return None
    return Normalization(node, given["num_groups"], *tensors, eps)


def match_channel_minimum(node, value):
    """The node that takes the values from `node`, where that is `value.min(dim=1, keepdim=True)`; otherwise None."""
    is_min = (node.op, node.target) in (("call_function", torch.min), ("call_method", "min"))
    given = arguments_of(node, ("input", "dim", "keepdim")) if is_min else None
    if given is None or given.get("input") is not value or given.get("keepdim") is not True:
        return None
    if given.get("dim") not in (1, -3):
        return None
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_function":
        return None
    is_values = (users[0].target, users[0].args) in ((operator.getitem, (node, 0)), (getattr, (node, "values")))
    return users[0] if is_values else None


def is_height_sum(node, value):
    """Whether `node` is `value.sum(dim=2, keepdim=True)`."""
    is_sum = (node.op, node.target) in (("call_function", torch.sum), ("call_method", "sum"))
    given = arguments_of(node, ("input", "dim", "keepdim")) if is_sum else None
    if given is None or given.get("input") is not value or given.get("keepdim") is not True:
        return False
    dims = given.get("dim")
    return (list(dims) if isinstance(dims, (list, tuple)) else [dims]) in ([2], [-2])


def match_sum_with(node, value):
    """The node `other`, where `node` is value + other and not in place, since it may enlarge the value; or None."""
    if (node.op, node.target) not in (
        ("call_function", operator.add),
        ("call_function", torch.add),
        ("call_method", "add"),
    ):
        return None
    given = arguments_of(node, ("input", "other", "alpha"))
    if given is None or given.get("alpha", 1) != 1 or "other" not in given:
        return None
    other = given["other"] if given["input"] is value else given["input"]
    return other if isinstance(other, fx.Node) and other is not value else None


def _flat(values):
    for value in values:
        yield from _flat(value) if isinstance(value, (list, tuple)) else (value,)
