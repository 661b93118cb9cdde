"""GELU over arrays: the chain of that one function."""

from ..epilogue import GELU
from .pointwise import pointwise, pointwise_backward, pointwise_double_backward
from .repeat import repeatable


@repeatable
def gelu(input, approximate="none", *, out=None, stream=None):
    """GELU of every element, "none": by erf, "tanh": the approximation; shape, dtype and errors as in `pointwise`."""
    return pointwise(input, GELU(approximate), out=out, stream=stream)


@repeatable
def gelu_backward(grad_output, input, approximate="none", *, out=None, stream=None):
    """The gradient of the input."""
    return pointwise_backward(grad_output, input, GELU(approximate), out=(out,), stream=stream)[0]


@repeatable
def gelu_double_backward(grad_output, input, grad_grad_input, approximate="none", *, out=None, stream=None):
    """Gradients of `gelu_backward` by grad_output and input; `out`: a pair of arrays or None."""
    return pointwise_double_backward(
        grad_output, input, GELU(approximate), grad_grad_input, (), out=out or (None, None), stream=stream
    )
