"""The vocabulary of pointwise functions that `rawkern.pointwise` and the epilogue of a convolution are chained from.

Each class is named after a torch function and takes the arguments of its torch counterpart; its value, its derivative
(also at kinks and ties) and what it does with NaN and infinities are those of that function:

    epilogue = (Add(bias), Minimum(0.0), GELU(), Mul(2.0))

`Add`, `Sub`, `Mul` and `Div` take a number, or a tensor (torch, CuPy or NumPy) that has one element or varies along one
axis of what it is combined with, as a bias of shape (C, 1, 1) does; gradients flow to tensors. Numbers are parameters
of the compiled kernel: a new value compiles nothing. Functions are immutable and compare by value, their tensors by
identity.

All constructors raise TypeError for an argument of the wrong type.
"""

import math
import numbers

__all__ = [
    "ELU",
    "GELU",
    "Add",
    "Clamp",
    "Div",
    "Function",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "Maximum",
    "Minimum",
    "Mish",
    "Mul",
    "ReLU",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Sub",
    "Tanh",
]


class Function:  # without __slots__, which torch.compile did not see into in torch 2.6
    """A pointwise function.

    Attributes:
        cpp: its template in cuda/include/pointwise_functions.cuh.
        numbers: its numbers, in the order of the template's arguments.
        tensor: its tensor operand, if it has one.
        signature: the template's name, with a # for each number and an @ for a tensor. A negative zero is #-: it equals
            zero, and yet what is computed for one is not computed for the other.
    """

    def __init__(self):
        self._set()

    def _set(self, cpp=None, numbers=(), tensor=None, **arguments):
        """Fills in the attributes; `arguments` are what repr shows."""
        cpp, numbers = cpp or type(self).__name__, tuple(numbers)
        object.__setattr__(self, "cpp", cpp)
        object.__setattr__(self, "numbers", numbers)
        object.__setattr__(self, "tensor", tensor)
        marks = ["#-" if number == 0 and math.copysign(1.0, number) < 0 else "#" for number in numbers]
        object.__setattr__(self, "signature", cpp + "".join(marks) + "@" * (tensor is not None))
        object.__setattr__(self, "_arguments", arguments)

    def __setattr__(self, name, value):
        raise AttributeError(f"{type(self).__name__} is immutable; make a new one")

    def __delattr__(self, name):
        raise AttributeError(f"{type(self).__name__} is immutable; make a new one")

    def __reduce__(self):
        return _rebuild, (type(self), tuple(self._arguments.values()))

    def __repr__(self):
        return f"{type(self).__name__}({', '.join(f'{k}={_show(v)}' for k, v in self._arguments.items())})"

    def _key(self):
        return type(self), self.cpp, self.numbers, id(self.tensor)

    def __eq__(self, other):
        return self._key() == other._key() if isinstance(other, Function) else NotImplemented

    def __hash__(self):
        return hash(self._key())


class _Arithmetic(Function):
    """A function of the input and a number or a tensor."""

    def __init__(self, other):
        if _is_tensor(other):
            self._set(tensor=other, other=other)
        else:
            other = _number(self, "other", other, "a number or a tensor")
            self._set(numbers=(other,), other=other)


class Add(_Arithmetic):
    """x + other"""


class Sub(_Arithmetic):
    """x - other"""


class Mul(_Arithmetic):
    """x * other"""


class Div(_Arithmetic):
    """x / other"""


class Minimum(Function):
    """torch.minimum(x, other) for a number: an upper limit; where x equals it, half of the gradient passes."""

    def __init__(self, other):
        other = _number(self, "other", other)
        self._set(numbers=(other,), other=other)


class Maximum(Function):
    """torch.maximum(x, other) for a number: a lower limit; where x equals it, half of the gradient passes."""

    def __init__(self, other):
        other = _number(self, "other", other)
        self._set(numbers=(other,), other=other)


class Clamp(Function):
    """torch.clamp(x, min, max) for numbers, of which one may be None; at the limits the whole gradient passes.

    Raises RuntimeError if both are None.
    """

    def __init__(self, min=None, max=None):
        if min is None and max is None:
            raise RuntimeError("Clamp: At least one of 'min' or 'max' must not be None")
        min = None if min is None else _number(self, "min", min)
        max = None if max is None else _number(self, "max", max)
        cpp = "ClampMax" if min is None else "ClampMin" if max is None else "Clamp"
        self._set(cpp, (limit for limit in (min, max) if limit is not None), min=min, max=max)


class Hardtanh(Function):
    """torch.nn.functional.hardtanh(x, min_val, max_val): a clamp with no gradient at the limits.

    Raises ValueError if min_val is greater than max_val.
    """

    def __init__(self, min_val=-1.0, max_val=1.0):
        min_val, max_val = _number(self, "min_val", min_val), _number(self, "max_val", max_val)
        if min_val > max_val:
            raise ValueError(f"Hardtanh: min_val ({min_val}) cannot be greater than max_val ({max_val})")
        self._set(numbers=(min_val, max_val), min_val=min_val, max_val=max_val)


class ReLU(Function):
    """torch.nn.functional.relu(x)"""


class LeakyReLU(Function):
    """torch.nn.functional.leaky_relu(x, negative_slope)"""

    def __init__(self, negative_slope=0.01):
        negative_slope = _number(self, "negative_slope", negative_slope)
        self._set(numbers=(negative_slope,), negative_slope=negative_slope)


class ELU(Function):
    """torch.nn.functional.elu(x, alpha)"""

    def __init__(self, alpha=1.0):
        alpha = _number(self, "alpha", alpha)
        self._set(numbers=(alpha,), alpha=alpha)


class SiLU(Function):
    """torch.nn.functional.silu(x): x * sigmoid(x)"""


class Mish(Function):
    """torch.nn.functional.mish(x): x * tanh(softplus(x))"""


class Hardswish(Function):
    """torch.nn.functional.hardswish(x): x * clamp(x + 3, 0, 6) / 6"""


class Sigmoid(Function):
    """torch.sigmoid(x)"""


class Tanh(Function):
    """torch.tanh(x)"""


class Softplus(Function):
    """torch.nn.functional.softplus(x, beta, threshold): log(1 + exp(beta x)) / beta, x where beta x > threshold"""

    def __init__(self, beta=1.0, threshold=20.0):
        beta, threshold = _number(self, "beta", beta), _number(self, "threshold", threshold)
        self._set(numbers=(beta, threshold), beta=beta, threshold=threshold)


class GELU(Function):
    """torch.nn.functional.gelu(x, approximate=...): "none" is the exact form by erf, "tanh" the approximation.

    Raises RuntimeError if `approximate` is another string.
    """

    def __init__(self, approximate="none"):
        if not isinstance(approximate, str):
            raise TypeError(f"GELU: argument 'approximate' must be str, not {type(approximate).__name__}")
        if approximate not in ("none", "tanh"):
            raise RuntimeError(f"GELU: approximate argument must be either none or tanh, not {approximate!r}")
        self._set("GeluErf" if approximate == "none" else "GeluTanh", approximate=approximate)


def _number(function, name, value, expected="a number"):
    if type(value) is float:
        return value  # asking the abstract class takes longer than all the rest
    if not isinstance(value, numbers.Real):
        raise TypeError(
            f"{type(function).__name__}: argument '{name}' must be {expected}, not {type(value).__name__} ({value!r})"
        )
    return float(value)


def _is_tensor(value):
    """Whether `value` is an array or a tensor, found out without importing the libraries that define them."""
    # torch 2.6, when it compiles, denies that tensors have __dlpack__.
    return hasattr(value, "shape") and (hasattr(value, "__dlpack__") or hasattr(value, "is_cuda"))


def _show(value):
    if not _is_tensor(value):
        return repr(value)
    return f"{type(value).__name__} of shape {tuple(value.shape)} and dtype {str(value.dtype).removeprefix('torch.')}"


def _rebuild(kind, arguments):
    return kind(*arguments)
