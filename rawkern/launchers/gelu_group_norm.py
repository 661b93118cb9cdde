"""Group normalisation of gelu(input), on arrays: neither pass stores gelu(input)."""

from ..epilogue import GELU
from .chain import chain_of
from .group_norm import group_norm, group_norm_backward
from .group_norm_held import held_kernels
from .group_norm_kernels import chained_kernels
from .repeat import repeatable


@repeatable
def gelu_group_norm(
    input,
    num_groups,
    weight=None,
    bias=None,
    eps=1e-5,
    approximate="none",
    *,
    out=None,
    mean=None,
    rstd=None,
    stream=None,
):
    """group_norm(gelu(input, approximate), num_groups, weight, bias, eps); arguments and errors as there.

    Raises RuntimeError also if `approximate` is neither "none" nor "tanh".
    """
    chain = chain_of(GELU(approximate))
    return group_norm(input, num_groups, weight, bias, eps, out=out, mean=mean, rstd=rstd, stream=stream, chain=chain)


@repeatable
def gelu_group_norm_backward(grad_output, input, mean, rstd, weight=None, approximate="none", **options):
    """The gradients for input, weight and bias; mean and rstd are those of gelu(input).

    Keyword arguments as in `group_norm_backward`.
    """
    chain = chain_of(GELU(approximate))
    return group_norm_backward(grad_output, input, mean, rstd, weight, chain=chain, **options)


def kernels():
    """Every instantiation, for the tests that compile them all."""
    for approximate in ("none", "tanh"):
        chain = chain_of(GELU(approximate))
        yield from chained_kernels(chain)
        yield from held_kernels(chain)
