"""What `python -m rawkern check` runs: every op, each with torch's computation of the same."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

import rawkern
from rawkern import epilogue

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        inputs: makes the arguments (tensors in float64, see `_draw`), the same at every call.
        ours, theirs: the function and torch's computation of the same, called with these arguments by name.
        elementwise: see `rawkern.testing.compare`.
        precision: the mode in which PyTorch's convolution runs on a GPU: "ieee" or "tf32".
    """

    op: str
    name: str
    dtype: torch.dtype
    inputs: Callable
    ours: Callable
    theirs: Callable
    elementwise: bool = False
    precision: str = "ieee"


def cases():
    """All cases. Few and small: on a machine without a GPU each of their kernels takes about a second to compile."""
    return [case for group in (_convolutions, _models, _normalisations, _pointwise) for case in group()]


def _draw(text, *shape, exact=False):
    """Normal numbers, reproducible by name; or eighths, of which sums of products are exact in float32.

    Where a minimum or a kink decides, rounding must not decide otherwise in another dtype: exact numbers.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
    if exact:
        return torch.randint(-12, 13, shape, generator=generator).double() / 8
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _op(name, **options):
    """A public function of rawkern, looked up when it is called."""
    return lambda **arguments: getattr(rawkern, name)(**arguments, **options)


# Convolutions ---------------------------------------------------------------------------------------------------------


def _convolution_inputs(
    shape, weight, *, bias=None, bias_name="bias", bias_mean=0.0, channels_last=False, exact=False, **options
):
    def inputs():
        x = _draw("input", *shape, exact=exact)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        arguments = {"input": x, "weight": _draw("weight", *weight, exact=exact), **options}
        if bias:
            arguments[bias_name] = _draw("conv bias", bias, exact=exact) + bias_mean
        return arguments

    return inputs


_SMALL = {"shape": (2, 5, 9, 11), "weight": (5, 6, 3, 3), "bias": 6, "stride": 2, "padding": 1, "output_padding": 1}
_PLAIN = _convolution_inputs(**_SMALL)
_VARIANTS = {
    "k4 s1 dilated, 2 groups, channels-last": _convolution_inputs(
        (2, 6, 8, 7), (6, 4, 4, 4), bias=8, groups=2, dilation=(2, 1), padding=(3, 0), channels_last=True
    ),
    "k2x5 s3x2 op2x1, no batch, no bias": _convolution_inputs(
        (5, 7, 6), (5, 3, 2, 5), stride=(3, 2), output_padding=(2, 1)
    ),
    "k3 s2, depthwise": _convolution_inputs((2, 7, 6, 9), (7, 1, 3, 3), bias=7, stride=2, groups=7),
    "k1 s3, phases without taps": _convolution_inputs((1, 4, 5, 6), (4, 5, 1, 1), bias=5, stride=3),
    "k3 s2, many tiles": _convolution_inputs((3, 33, 21, 37), (33, 70, 3, 3), bias=70, stride=2, padding=1),
}


def _convolutions():
    op, plain = "conv_transpose2d", functional.conv_transpose2d
    for dtype in DTYPES:
        yield Case(op, "k3 s2 p1 op1", dtype, _PLAIN, _op(op, precision="ieee"), plain)
    for name, inputs in _VARIANTS.items():
        yield Case(op, name, torch.float32, inputs, _op(op, precision="ieee"), plain)
    yield Case(op, "k3 s2 p1 op1, TF32", torch.float32, _PLAIN, _op(op, precision="tf32"), plain, precision="tf32")


# Models ---------------------------------------------------------------------------------------------------------------


def _min_sum_gelu_add(input, bias):
    return functional.gelu(input.min(dim=1, keepdim=True)[0].sum(dim=2, keepdim=True)) + bias


def _conv_min_sum_gelu_add(input, weight, conv_bias, bias, **options):
    return _min_sum_gelu_add(functional.conv_transpose2d(input, weight, conv_bias, **options), bias)


def _gelu_group_norm(input, num_groups, weight=None, bias=None, eps=1e-5, approximate="none"):
    return functional.group_norm(functional.gelu(input, approximate=approximate), num_groups, weight, bias, eps)


def _conv_gelu_group_norm(
    input, weight, conv_bias, num_groups, norm_weight=None, norm_bias=None, eps=1e-5, *, approximate="none", **options
):
    output = functional.conv_transpose2d(input, weight, conv_bias, **options)
    return _gelu_group_norm(output, num_groups, norm_weight, norm_bias, eps, approximate)


def _conv_add_min_gelu_mul(input, weight, bias, **options):
    output = functional.conv_transpose2d(input, weight, bias, **options) + 0.5
    zero = torch.zeros((), dtype=output.dtype, device=output.device)
    return functional.gelu(torch.min(output, zero)) * 2.0


def _model_inputs(exact=False, tensors=None, **options):
    """Arguments of a convolution with `conv_bias`, tensors by name and shape, and options."""
    convolution = _convolution_inputs(**_SMALL, bias_name="conv_bias", exact=exact, **options)
    return lambda: {
        **convolution(),
        **{name: _draw(name, *shape, exact=exact) for name, shape in (tensors or {}).items()},
    }


def _models():
    chain = (epilogue.Add(0.5), epilogue.Minimum(0.0), epilogue.GELU(), epilogue.Mul(2.0))
    fused = _op("conv_transpose2d", epilogue=chain, precision="ieee")
    # Exact, because the chain makes small numbers of large ones, whose rounding would be large at their scale.
    inputs = _convolution_inputs(**_SMALL, exact=True)
    for dtype in DTYPES:
        yield Case("conv_transpose2d", "add, min, GELU, mul", dtype, inputs, fused, _conv_add_min_gelu_mul)

    op, theirs = "conv_transpose2d_gelu_group_norm", _conv_gelu_group_norm
    inputs = _model_inputs(tensors={"norm_weight": (6,), "norm_bias": (6,)}, num_groups=3)
    for dtype in DTYPES:
        yield Case(op, "3 groups", dtype, inputs, _op(op, precision="ieee"), theirs)
    inputs = _model_inputs(num_groups=2, approximate="tanh")
    yield Case(op, "tanh, not affine", torch.float32, inputs, _op(op, precision="ieee"), theirs)

    op, theirs = "conv_transpose2d_min_sum_gelu_add", _conv_min_sum_gelu_add
    # The mean puts the sums of minima around zero: far below it GELU is constant, and nothing would be compared.
    inputs = _model_inputs(exact=True, bias_mean=3.0, tensors={"bias": (1, 1, 1)})
    for dtype in DTYPES:
        yield Case(op, "bias (1, 1, 1)", dtype, inputs, _op(op, precision="ieee"), theirs)
    inputs = _model_inputs(exact=True, bias_mean=3.0, tensors={"bias": (4, 1, 1)})
    yield Case(op, "bias that enlarges", torch.float32, inputs, _op(op, precision="ieee"), theirs)


# Normalisation and reductions -----------------------------------------------------------------------------------------


def _affine_inputs(*shape, mean=0.0, affine=True, **options):
    def inputs():
        arguments = {"input": _draw("input", *shape) + mean, **options}
        if affine:
            arguments |= {"weight": _draw("weight", shape[1]), "bias": _draw("bias", shape[1])}
        return arguments

    return inputs


def _normalisations():
    op = "group_norm"
    for dtype in DTYPES:
        inputs = _affine_inputs(3, 6, 7, 9, num_groups=2)
        yield Case(op, "2 groups", dtype, inputs, _op(op), functional.group_norm)
    for name, inputs in {
        "mean 1e5 deviations": _affine_inputs(2, 6, 16, 16, num_groups=3, mean=1e5),
        "(N, C), not affine": _affine_inputs(5, 12, num_groups=4, affine=False),
        "(N, C, L), rows past a block": _affine_inputs(2, 4, 5003, num_groups=1),
    }.items():
        yield Case(op, name, torch.float32, inputs, _op(op), functional.group_norm)

    op = "gelu_group_norm"
    for dtype in DTYPES:
        inputs = _affine_inputs(3, 6, 7, 9, num_groups=2)
        yield Case(op, "2 groups", dtype, inputs, _op(op), _gelu_group_norm)

    op = "min_sum_gelu_add"
    for dtype in DTYPES:
        yield Case(op, "bias (5, 1, 1)", dtype, _min_sum_inputs, _op(op), _min_sum_gelu_add)


def _min_sum_inputs():
    """The mean puts the sums of minima around zero."""
    return {"input": _draw("input", 2, 7, 9, 11, exact=True) + 1.25, "bias": _draw("bias", 5, 1, 1, exact=True)}


# Pointwise functions --------------------------------------------------------------------------------------------------


#: Functions whose gradient at NaN torch itself has not decided: its vectorised kernels differ from its scalar ones.
_UNDECIDED_AT_NAN = ("ELU", "Hardswish", "Hardtanh")


def _corners(nan=True):
    """Multiples of 5/8 from -7.5 to 7.5 with NaN, infinities and both zeros among them."""
    x = _draw("pointwise", 3, 5, 17, 13, exact=True) * 5
    corners = [float("inf"), float("-inf"), 0.0, -0.0, 0.5, -0.5, 1.0, 3.0, -3.0, 25.0, -25.0, 100.0, -100.0]
    x.view(-1)[: len(corners)] = torch.tensor(corners)
    if nan:
        x.view(-1)[len(corners)] = float("nan")
    return x


def _vocabulary():
    """Name, our function and torch's for every pointwise function; kinks lie on corners of the inputs."""
    return {
        "Add": (epilogue.Add(0.5), lambda x: x + 0.5),
        "Sub": (epilogue.Sub(0.5), lambda x: x - 0.5),
        "Mul": (epilogue.Mul(-1.5), lambda x: x * -1.5),
        "Div": (epilogue.Div(3.0), lambda x: x / 3.0),
        "Minimum": (epilogue.Minimum(0.5), lambda x: torch.minimum(x, _like(x, 0.5))),
        "Maximum": (epilogue.Maximum(0.5), lambda x: torch.maximum(x, _like(x, 0.5))),
        "Clamp": (epilogue.Clamp(-0.5, 1.0), lambda x: x.clamp(-0.5, 1.0)),
        "Hardtanh": (epilogue.Hardtanh(-0.5, 1.0), lambda x: functional.hardtanh(x, -0.5, 1.0)),
        "ReLU": (epilogue.ReLU(), functional.relu),
        "LeakyReLU": (epilogue.LeakyReLU(0.125), lambda x: functional.leaky_relu(x, 0.125)),
        "ELU": (epilogue.ELU(0.75), lambda x: functional.elu(x, 0.75)),
        "SiLU": (epilogue.SiLU(), functional.silu),
        "Mish": (epilogue.Mish(), functional.mish),
        "Hardswish": (epilogue.Hardswish(), functional.hardswish),
        "Sigmoid": (epilogue.Sigmoid(), torch.sigmoid),
        "Tanh": (epilogue.Tanh(), torch.tanh),
        "Softplus": (epilogue.Softplus(), functional.softplus),
        "GELU": (epilogue.GELU(), functional.gelu),
        "GELU tanh": (epilogue.GELU("tanh"), lambda x: functional.gelu(x, approximate="tanh")),
    }


def _like(x, number):
    return torch.full((), number, dtype=x.dtype, device=x.device)


def _pointwise():
    for approximate in ("none", "tanh"):
        for dtype in DTYPES:
            inputs = lambda approximate=approximate: {"input": _corners(), "approximate": approximate}  # noqa: E731
            yield Case("gelu", approximate, dtype, inputs, _op("gelu"), functional.gelu)
    for name, (ours, theirs) in _vocabulary().items():
        inputs = lambda nan=name not in _UNDECIDED_AT_NAN: {"input": _corners(nan)}  # noqa: E731
        ours = _op("pointwise", chain=(ours,))
        yield Case("pointwise", name, torch.float32, inputs, ours, lambda input, f=theirs: f(input), elementwise=True)
    for dtype in DTYPES:
        yield Case("pointwise", "tensors of a chain", dtype, _chain_inputs, _chain, _torch_chain)


def _chain_inputs():
    return {"input": _draw("input", 3, 5, 7, 6), "scale": _draw("scale", 5, 1, 1) + 2, "shift": _draw("shift", 5, 1, 1)}


def _chain(input, scale, shift):
    return rawkern.pointwise(input, (epilogue.Mul(scale), epilogue.SiLU(), epilogue.Add(shift), epilogue.Clamp(-1, 2)))


def _torch_chain(input, scale, shift):
    return (functional.silu(input * scale) + shift).clamp(-1, 2)
