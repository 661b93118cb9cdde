"""GELU followed by group normalisation for PyTorch, without storing what lies between."""

from .gelu import signature_of
from .group_norm import group_norm_of


def gelu_group_norm(input, num_groups, weight=None, bias=None, eps=1e-5, approximate="none"):
    """group_norm(gelu(input, approximate), num_groups, weight, bias, eps) in two passes over the input.

    Args:
        input: (N, C, *); float64, float32, float16 or bfloat16 (16-bit types are computed in float32), any strides.
        num_groups, weight, bias, eps: as in `rawkern.group_norm`.
        approximate: "none" for the erf form of GELU, "tanh" for its approximation.

    Returns:
        (N, C, *); channels-last if the input is (4 or 5 dimensions), otherwise contiguous.

    Raises:
        As `rawkern.group_norm`; RuntimeError also for an unknown `approximate`.
    """
    return group_norm_of("gelu_group_norm", input, num_groups, weight, bias, eps, signature_of(approximate))
