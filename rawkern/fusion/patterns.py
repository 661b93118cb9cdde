"""What one node of a graph computes, in the words of `rawkern.epilogue`: modules, functions, methods and operators.

`pointwise_items` turns a node into the items of a chain. An item is
  - a function of `rawkern.epilogue`;
  - a `Scalar`: a function with a number that torch would round to the dtype of the chain first, as it does with
    tensors of no dimensions;
  - an `Operand`: a function with a tensor per channel, which a node of the graph computes.
"""

import operator
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..epilogue import (
    ELU,
    GELU,
    Add,
    Clamp,
    Div,
    Hardswish,
    Hardtanh,
    LeakyReLU,
    Maximum,
    Minimum,
    Mish,
    Mul,
    ReLU,
    Sigmoid,
    SiLU,
    Softplus,
    Sub,
    Tanh,
)
from .tracing import IN_PLACE_OPERATORS, has_hooks
from .views import is_opaque


@dataclass(frozen=True)
class Scalar:
    """`kind(number)`, where the number is rounded to the dtype of what it is combined with."""

    kind: type
    number: float


@dataclass(frozen=True)
class Operand:
    """`kind(tensor)`, where `node` computes the tensor: a node of the graph, or a `Computed`."""

    kind: type
    node: object


@dataclass(frozen=True)
class Attribute:
    """A tensor of the module that the graph does not read yet; `path` as in a get_attr node."""

    path: str


@dataclass(frozen=True)
class Computed:
    """A call of `function` that is not in the graph yet."""

    function: object
    arguments: tuple


def plain_module(node, root, kind):
    """The module that a node calls, if its class is exactly `kind` and calling it runs nothing but its forward."""
    if node.op != "call_module":
        return None
    module = root.get_submodule(node.target)
    return module if type(module) is kind and not is_opaque(module) and not has_hooks(module) else None


def arguments_of(node, names):
    """The node's arguments by name, given the names of all positions; None if there are others."""
    if len(node.args) > len(names) or any(name not in names for name in node.kwargs):
        return None
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def pointwise_items(node, value, root, channels):
    """The items that `node` applies to `value`, one of its arguments; None if it does something else with it.

    Args:
        root: the module whose graph it is.
        channels: the number of channels of `value`, or None where tensors cannot be operands.
    """
    if node.op == "call_module":
        return _module_items(node, value, root, channels)
    names, build = _CALLS.get((node.op, node.target), (None, None))
    given = None if build is None else arguments_of(node, names)
    if given is None or sum(argument is value for argument in given.values()) != 1:
        return None
    try:
        return build(given, value, root, channels)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # arguments that the vocabulary does not take
        return None


def _module_items(node, value, root, channels):
    if node.args != (value,) or node.kwargs:
        return None
    norm = plain_module(node, root, nn.BatchNorm2d)
    if norm is not None:
        return _batch_norm_items(norm, node.target) if norm.num_features == channels else None
    for kind, build in _MODULES.items():
        module = plain_module(node, root, kind)
        if module is not None:
            return build(module)
    return None


def _batch_norm_items(module, path):
    """Batch normalisation in evaluation: (x - mean) * scale + bias, each per channel."""
    if module.training or module.running_mean is None or module.running_var is None:
        return None
    mean, variance, weight, bias = (
        Attribute(f"{path}.{name}") for name in ("running_mean", "running_var", "weight", "bias")
    )
    items = (
        Operand(Sub, Computed(_per_channel, (mean,))),
        Operand(Mul, Computed(_batch_norm_scale, (variance, module.eps, weight))),
    )
    return items if module.bias is None else (*items, Operand(Add, Computed(_per_channel, (bias,))))


def _per_channel(tensor):
    return tensor.view(-1, 1, 1)


def _batch_norm_scale(variance, eps, weight):
    scale = torch.rsqrt(variance + eps)
    return _per_channel(scale if weight is None else scale * weight)


def static_tensor(node, root):
    """The tensor that `node` reads from the module, perhaps with other axes, as it is now; None for anything else."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "get_attr":
        value = root
        for name in node.target.split("."):
            value = getattr(value, name)
        return value.detach() if isinstance(value, torch.Tensor) else None
    if (node.op, node.target) not in _AXES or not node.args:
        return None
    base = static_tensor(node.args[0], root)
    if base is None or len(node.all_input_nodes) != 1 or node.kwargs:
        return None
    arguments = node.args[1:]
    return getattr(base, node.target)(*arguments) if node.op == "call_method" else node.target(base, *arguments)


_AXES = {
    ("call_function", operator.getitem), ("call_function", torch.reshape), ("call_function", torch.unsqueeze),
    ("call_method", "reshape"), ("call_method", "unsqueeze"), ("call_method", "view"),
}  # fmt: skip


def fits(shape, channels, dims=3):
    """Whether a tensor of this shape has one value, or one per channel, beside a value of so many dimensions."""
    shape = tuple(shape)
    if len(shape) > dims:
        return False
    ones = (1,) * len(shape)
    return shape == ones or (len(shape) >= 3 and shape == (*ones[:-3], channels, 1, 1))


def constant_of(node):
    """The number in a tensor of no dimensions that the graph makes from a number; None for anything else."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "call_method" and node.target == "new_tensor":
        number = node.args[1] if len(node.args) == 2 and not node.kwargs else None
        return _number(number)
    given = arguments_of(node, ("value", "dtype", "device"))
    if node.op != "call_function" or node.target not in _MAKERS or given is None:
        return None
    number = _MAKERS[node.target](given.get("value"))
    dtype = given.get("dtype")
    if isinstance(dtype, fx.Node):  # perhaps not a floating-point type, which would round the number
        return number if number in (0, 1) else None
    if number is None or (dtype is not None and dtype.is_complex):
        return None
    return torch.tensor(number, dtype=dtype).item()


def _filled(number):
    return lambda size: number if size in ((), []) else None


def _number(value):
    return value if type(value) in (int, float) else None


_MAKERS = {torch.tensor: _number, torch.scalar_tensor: _number, torch.zeros: _filled(0.0), torch.ones: _filled(1.0)}


def _arithmetic(kind, commutative):
    def build(given, value, root, channels):
        if given.get("alpha", 1) != 1 or given.get("rounding_mode") is not None:
            return None
        swapped = given["input"] is not value
        other = given["input" if swapped else "other"]
        if swapped and not commutative:
            # 1 - x is -x + 1, sign of zero and rounding included; the vocabulary has no 1 / x.
            return (Mul(-1.0), Add(other)) if kind is Sub and _number(other) is not None else None
        return _binary(kind, other, root, channels)

    return build


def _binary(kind, other, root, channels):
    if _number(other) is not None:
        return (kind(other),)
    constant = constant_of(other)
    if constant is not None:
        return (Scalar(kind, constant),)
    tensor = static_tensor(other, root)
    if tensor is not None and channels is not None and fits(tensor.shape, channels, dims=4):
        return (Operand(kind, other),)
    return None


def _limit(kind):
    def build(given, value, root, channels):
        if "other" not in given:  # the minimum of all elements
            return None
        other = given["other"] if given["input"] is value else given["input"]
        constant = constant_of(other)
        return None if constant is None else (Scalar(kind, constant),)

    return build


def _reversed_subtraction(given, value, root, channels):
    if given["input"] is not value or given.get("alpha", 1) != 1 or _number(given["other"]) is None:
        return None
    return Mul(-1.0), Add(given["other"])


def _clamp(minimum="min", maximum="max"):
    def build(given, value, root, channels):
        limits = given.get(minimum), given.get(maximum)
        if given["input"] is not value or any(limit is not None and _number(limit) is None for limit in limits):
            return None
        return (Clamp(*limits),)

    return build


def _activation(kind, *names, fixed=()):
    """A function whose arguments of these names are those of `kind`; 'inplace' changes nothing about its value."""

    def build(given, value, root, channels):
        if given["input"] is not value or not isinstance(given.get("inplace", False), bool):
            return None
        if any(isinstance(given.get(name), (fx.Node, bool)) for name in names):
            return None
        return (kind(*fixed, **{name: given[name] for name in names if name in given}),)

    return build


def _calls():
    """(op, target) of a node: the names of its arguments, and what builds its items from them."""
    table = {}

    def add(targets, names, build):
        for target in targets:
            op = "call_method" if isinstance(target, str) else "call_function"
            table[op, target] = tuple(names.split()), build

    for kind, names, commutative in ((Add, "add", True), (Sub, "sub subtract", False), (Mul, "mul multiply", True)):
        name = names.partition(" ")[0]
        operators = [getattr(operator, name), IN_PLACE_OPERATORS[f"i{name}"]]
        functions = [getattr(torch, alias) for alias in names.split()]
        methods = [alias + suffix for alias in names.split() for suffix in ("", "_")]
        arguments = "input other" if kind is Mul else "input other alpha"
        add([*operators, *functions, *methods], arguments, _arithmetic(kind, commutative))
    add([operator.truediv, IN_PLACE_OPERATORS["itruediv"]], "input other", _arithmetic(Div, False))
    add(
        [torch.div, torch.divide, torch.true_divide, "div", "div_", "divide", "divide_", "true_divide", "true_divide_"],
        "input other rounding_mode",
        _arithmetic(Div, False),
    )
    add([torch.rsub], "input other alpha", _reversed_subtraction)
    add([torch.minimum, torch.min, "minimum", "min"], "input other", _limit(Minimum))
    add([torch.maximum, torch.max, "maximum", "max"], "input other", _limit(Maximum))
    add([torch.clamp, torch.clip, torch.clamp_, "clamp", "clamp_", "clip", "clip_"], "input min max", _clamp())
    add([torch.clamp_min, torch.clamp_min_, "clamp_min", "clamp_min_"], "input min", _clamp())
    add([torch.clamp_max, torch.clamp_max_, "clamp_max", "clamp_max_"], "input max", _clamp())
    add([F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"], "input inplace", _activation(ReLU))
    add([F.relu6], "input inplace", _activation(Hardtanh, fixed=(0.0, 6.0)))
    add([F.leaky_relu, F.leaky_relu_], "input negative_slope inplace", _activation(LeakyReLU, "negative_slope"))
    add([F.elu, F.elu_], "input alpha inplace", _activation(ELU, "alpha"))
    add([F.hardtanh, F.hardtanh_], "input min_val max_val inplace", _activation(Hardtanh, "min_val", "max_val"))
    add([F.silu], "input inplace", _activation(SiLU))
    add([F.mish], "input inplace", _activation(Mish))
    add([F.hardswish], "input inplace", _activation(Hardswish))
    add([F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"], "input", _activation(Sigmoid))
    add([F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"], "input", _activation(Tanh))
    add([F.softplus], "input beta threshold", _activation(Softplus, "beta", "threshold"))
    add([F.gelu], "input approximate", _activation(GELU, "approximate"))
    return table


_CALLS = _calls()

_MODULES = {
    nn.Identity: lambda module: (),
    nn.Dropout: lambda module: None if module.training else (),
    nn.Dropout2d: lambda module: None if module.training else (),
    nn.ReLU: lambda module: (ReLU(),),
    nn.ReLU6: lambda module: (Hardtanh(module.min_val, module.max_val),),
    nn.LeakyReLU: lambda module: (LeakyReLU(module.negative_slope),),
    nn.ELU: lambda module: (ELU(module.alpha),),
    nn.SiLU: lambda module: (SiLU(),),
    nn.Mish: lambda module: (Mish(),),
    nn.Hardswish: lambda module: (Hardswish(),),
    nn.Hardtanh: lambda module: (Hardtanh(module.min_val, module.max_val),),
    nn.Sigmoid: lambda module: (Sigmoid(),),
    nn.Tanh: lambda module: (Tanh(),),
    nn.Softplus: lambda module: (Softplus(module.beta, module.threshold),),
    nn.GELU: lambda module: (GELU(module.approximate),),
}

#: What may change a value that other nodes see: operators with "=", and the functions among them.
_MUTATING = frozenset(IN_PLACE_OPERATORS.values())


def may_mutate(node, root):
    """Whether running `node` may change a tensor that another node reads."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if node.op == "call_module":
        module = root.get_submodule(node.target)
        torchs = type(module).__module__.startswith("torch.nn.modules") and not isinstance(module, nn.Sequential)
        harmless = torchs and not has_hooks(module) and not is_opaque(module) and not any(module.children())
        return not harmless or bool(getattr(module, "inplace", False)) or next(module.buffers(), None) is not None
    if node.op == "call_method":
        return node.target.endswith("_") or node.target.startswith("__")
    if node.target in _MUTATING or "out" in node.kwargs:
        return True
    if node.kwargs.get("inplace") or any(argument is True for argument in node.args):  # perhaps 'inplace' by position
        return True
    origin = getattr(node.target, "__module__", None) or ""
    known = origin.partition(".")[0] in ("torch", "_operator", "math", "builtins", "")
    return not known or origin.startswith("torch._ops") or getattr(node.target, "__name__", "_").endswith("_")
