"""The operations on arrays: CuPy arrays on a GPU, NumPy arrays on the CPU. Nothing here knows of torch.

Every operation is a function of its own name, with the arguments of the function in `rawkern` and the keyword-only
`out` and `stream`; its gradients are beside it in the module of that name:

    from rawkern.launchers import conv_transpose2d
    from rawkern.launchers.conv_transpose2d import input_gradient, weight_gradient
"""

from .channel_sum import channel_sum
from .conv_transpose2d import conv_transpose2d
from .conv_transpose2d_gelu_group_norm import conv_transpose2d_gelu_group_norm
from .conv_transpose2d_min_sum_gelu_add import conv_transpose2d_min_sum_gelu_add
from .gelu import gelu
from .gelu_group_norm import gelu_group_norm
from .group_norm import group_norm
from .min_sum_gelu_add import min_sum_gelu_add
from .pointwise import pointwise

__all__ = [
    "channel_sum",
    "conv_transpose2d",
    "conv_transpose2d_gelu_group_norm",
    "conv_transpose2d_min_sum_gelu_add",
    "gelu",
    "gelu_group_norm",
    "group_norm",
    "min_sum_gelu_add",
    "pointwise",
]
