"""`rawkern.fuse`: an existing model, with its transposed convolutions and what follows them as rawkern's kernels."""

import inspect
import types

import torch

from .forward import FusedForward
from .report import print_report, rows_of
from .views import view_of

__all__ = ["fuse"]


def fuse(model, *, report=False):
    """A model that computes the same as `model`, with rawkern's kernels where its functions fit.

    Found are, as modules, functions, methods or operators of any forward:
      - a torch.nn.ConvTranspose2d or conv_transpose2d, and the functions of `rawkern.epilogue` that follow it (numbers,
        and parameters or buffers per channel, as their operands);
      - in evaluation, batch normalisation behind such a convolution (float32 and float64);
      - a GELU and group normalisation, behind such a convolution or anything else;
      - the minimum over channels, sum over height, GELU and sum with a tensor, behind such a convolution or not;
      - two and more functions of `rawkern.epilogue` with numbers in a row, behind anything.
    Everything else is left alone: layers with hooks or parametrisations, subclasses of torch's layers, values that are
    used twice, forwards that cannot be traced without a change of meaning (their submodules are still looked into). A
    convolution that nothing follows stays torch's. Where at a call something does not fit (dtypes, devices, no batch,
    autocast), the chain runs as it was. The result is as often differentiable as the functions of rawkern in it.

    What runs in the place of layers does not call them, so that hooks for all modules at once do not see these layers.

    Args:
        model: a torch.nn.Module; it stays as it is.
        report: whether to print a table of what was fused, and why convolutions were not.

    Returns:
        A model of the same class. It shares parameters, buffers and hooks with `model`: training, loading or moving
        either is seen in both, and the state_dict is the same. `training` is its own, copied now. Attributes that are
        neither parameters nor buffers are copied now, too; a change of those of the returned model is noticed. It can
        be fused again, copied by copy.deepcopy, and pickled if `model` can. Copies that share its attributes, as
        copy.copy and torch.nn.DataParallel make them, run with the parameters and attributes of what they were copied
        from. torch.nn.utils.parametrize comes before: it would change one of the two models only.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"fuse(): argument 'model' must be torch.nn.Module, not {type(model).__name__}")
    view, copies = view_of(model)
    for copy in copies.values():
        if _has_inside(copy):
            copy.__dict__["forward"] = FusedForward(copy)
    _plan(view, copies.values())
    if report:
        print_report(view)
    return view


def _plan(view, modules):
    """Makes the plans for the usual calls in training and in evaluation, so that torch.compile finds them."""
    before = {module: module.training for module in modules}
    for mode in (not view.training, view.training):
        for module in modules:
            module.__dict__["training"] = mode
        rows_of(view)
    for module, mode in before.items():
        module.__dict__["training"] = mode


def _has_inside(module):
    """Whether chains may lie in the module's forward: in all but torch's own layers and what is never called."""
    layer = type(module).__module__.startswith("torch.nn.modules") and not isinstance(module, torch.nn.Sequential)
    forward = inspect.getattr_static(type(module), "forward")
    return not layer and isinstance(forward, types.FunctionType) and forward is not torch.nn.Module.forward
