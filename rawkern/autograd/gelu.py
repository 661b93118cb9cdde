"""GELU on torch tensors: the chain of that one function."""

from ..epilogue import GELU
from .pointwise import pointwise_of


def gelu(input, approximate="none"):
    """torch.nn.functional.gelu in one kernel, differentiable twice.

    Args:
        input: tensor of any shape, float64, float32, float16 or bfloat16.
        approximate: "none" for the exact form by erf, "tanh" for the approximation.

    Raises RuntimeError for another `approximate` and for other dtypes, TypeError for what is no tensor or no string.
    """
    return pointwise_of(input, _ERF if approximate == "none" else signature_of(approximate))


def signature_of(approximate):
    """The signature of GELU in this form. Raises as `rawkern.epilogue.GELU`."""
    if approximate == "none":
        return _ERF
    return _TANH if approximate == "tanh" else GELU(approximate).signature


_ERF, _TANH = GELU("none").signature, GELU("tanh").signature
