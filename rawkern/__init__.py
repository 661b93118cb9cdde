"""Hand-written CUDA kernels for PyTorch and CuPy, compiled at run time.

The functions below take torch tensors and are differentiable; `rawkern.launchers` holds the same operations for CuPy
and NumPy arrays and needs no torch, which is why everything here is imported when it is first used.
"""

import importlib

__version__ = "0.1.0"

_FUNCTIONS = (
    "conv_transpose2d",
    "conv_transpose2d_gelu_group_norm",
    "conv_transpose2d_min_sum_gelu_add",
    "gelu",
    "gelu_group_norm",
    "group_norm",
    "min_sum_gelu_add",
    "pointwise",
)
_MODULES = ("epilogue", "launchers", "nn", "runtime", "testing")

__all__ = [*_FUNCTIONS, *_MODULES, "fuse"]


def __getattr__(name):
    if name in _FUNCTIONS:
        value = getattr(importlib.import_module(f"rawkern.autograd.{name}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"rawkern.{name}")
    elif name == "fuse":
        value = importlib.import_module("rawkern.fusion").fuse
    else:
        raise AttributeError(f"module 'rawkern' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
