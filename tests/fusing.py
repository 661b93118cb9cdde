"""What the tests of fuse share: comparing a fused model with the one it was made of, and stand-ins for the kernels."""

import copy

import torch
import torch.nn.functional as F

import rawkern
from rawkern import epilogue
from rawkern.fusion import kernels
from rawkern.fusion.report import rows_of

_BINARY = {epilogue.Add: torch.add, epilogue.Sub: torch.sub, epilogue.Mul: torch.mul, epilogue.Div: torch.div}
_LIMITS = {epilogue.Minimum: torch.minimum, epilogue.Maximum: torch.maximum}
_FUNCTIONS = {
    epilogue.Hardtanh: F.hardtanh, epilogue.ReLU: F.relu, epilogue.LeakyReLU: F.leaky_relu, epilogue.ELU: F.elu,
    epilogue.SiLU: F.silu, epilogue.Mish: F.mish, epilogue.Hardswish: F.hardswish, epilogue.Sigmoid: torch.sigmoid,
    epilogue.Tanh: torch.tanh, epilogue.Softplus: F.softplus,
}  # fmt: skip


def _apply(function, x):
    """A function of the vocabulary by torch's operators."""
    kind = type(function)
    if kind in _BINARY:
        return _BINARY[kind](x, *function.numbers if function.tensor is None else (function.tensor,))
    if kind in _LIMITS:
        return _LIMITS[kind](x, torch.tensor(*function.numbers, dtype=x.dtype))
    if kind is epilogue.Clamp:
        limits = {"Clamp": ("min", "max"), "ClampMin": ("min",), "ClampMax": ("max",)}[function.cpp]
        return torch.clamp(x, **dict(zip(limits, function.numbers, strict=True)))
    if kind is epilogue.GELU:
        return F.gelu(x, approximate="none" if function == epilogue.GELU() else "tanh")
    return _FUNCTIONS[kind](x, *function.numbers)


def conv_transpose2d(
    input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1, *, epilogue=()
):
    y = F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return pointwise(y, epilogue)


def pointwise(y, functions):
    for function in functions:
        y = _apply(function, y)
    return y


def gelu_group_norm(input, num_groups, weight=None, bias=None, eps=1e-5, approximate="none"):
    return F.group_norm(F.gelu(input, approximate=approximate), num_groups, weight, bias, eps)


def conv_transpose2d_gelu_group_norm(
    input, weight, conv_bias, num_groups, norm_weight, norm_bias, eps, *, approximate="none", **geometry
):
    y = F.conv_transpose2d(input, weight, conv_bias, **geometry)
    return gelu_group_norm(y, num_groups, norm_weight, norm_bias, eps, approximate)


def min_sum_gelu_add(input, bias):
    return F.gelu(input.min(dim=1, keepdim=True)[0].sum(dim=2, keepdim=True)) + bias


def conv_transpose2d_min_sum_gelu_add(input, weight, conv_bias, bias, **geometry):
    return min_sum_gelu_add(F.conv_transpose2d(input, weight, conv_bias, **geometry), bias)


STAND_INS = (
    conv_transpose2d, conv_transpose2d_gelu_group_norm, conv_transpose2d_min_sum_gelu_add, gelu_group_norm,
    min_sum_gelu_add, pointwise,
)  # fmt: skip


def use_stand_ins(monkeypatch):
    """Lets fused models run torch's operators, so that a test compiles nothing; returns the list of calls made."""
    calls = []

    def recorded(function):
        def call(*args, **kwargs):
            calls.append(function.__name__)
            return function(*args, **kwargs)

        return call

    for function in STAND_INS:
        monkeypatch.setattr(kernels, function.__name__, recorded(function))
    return calls


def step(model, *inputs):
    """Output and gradients (of the inputs and of all parameters) of one forward and backward pass."""
    inputs = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    model.zero_grad()
    torch.manual_seed(7)
    output = model(*inputs)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    if output.requires_grad:
        output.backward(grad)
    grads = [None if x.grad is None else x.grad.clone() for x in (*inputs, *model.parameters())]
    model.zero_grad()
    return output.detach(), grads


def fuse_and_compare(model, *inputs, **tolerances):
    """fuse(model), after one training step of each was found to agree, and neither to have changed the state."""
    fused = rawkern.fuse(model)
    state = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(step(fused, *inputs), step(model, *inputs), **tolerances)
    state_after, fused_state = model.state_dict(), fused.state_dict()
    assert list(fused_state) == list(state_after) == list(state)
    assert all(fused_state[name].data_ptr() == state_after[name].data_ptr() for name in state)
    return fused


def fused_functions(fused):
    """The names of the functions of rawkern that the model has become, in the order of the report."""
    return [row.result for row in rows_of(fused) if row.fused]
