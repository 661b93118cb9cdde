"""rawkern.gelu, the chain of one function: parity, derivatives, errors. Kinks and tails: test_epilogue."""

import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import rawkern
from rawkern.autograd.dlpack import to_array
from rawkern.launchers.gelu import gelu as launch_gelu
from rawkern.launchers.gelu import gelu_backward as launch_gelu_backward
from rawkern.launchers.gelu import gelu_double_backward as launch_gelu_double_backward
from rawkern.testing import assert_as_accurate_as_torch, assert_parity

FORMS = ["none", "tanh"]


def randn(*shape, scale=2.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("approximate", FORMS)
def test_parity(approximate, dtype, device):
    x = randn(3, 5, 33, 31)
    assert_parity(
        lambda x: rawkern.gelu(x, approximate=approximate),
        lambda x: F.gelu(x, approximate=approximate),
        {"x": x},
        dtype=dtype,
        device=device,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("approximate", FORMS)
def test_every_16_bit_number(approximate, dtype, device):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    theirs = F.gelu(x.to(device), approximate=approximate)
    # The oracle in float64 has no infinities where x has none; NaN and infinities are checked against torch's.
    oracle = F.gelu(x.double(), approximate=approximate)
    assert_as_accurate_as_torch(rawkern.gelu(x.to(device), approximate), theirs, oracle)


def orders(gelu, x, approximate):
    """Value, first and second derivative."""
    x = x.detach().clone().requires_grad_()
    value = gelu(x, approximate=approximate)
    (first,) = torch.autograd.grad(value, x, torch.ones_like(x), create_graph=True)
    (second,) = torch.autograd.grad(first, x, torch.ones_like(x))
    return [order.detach().cpu() for order in (value, first, second)]


def every_magnitude():
    """All finite float32 magnitudes with either sign, some thousand bit patterns apart; densely where GELU bends."""
    infinity = torch.tensor(math.inf).view(torch.int32).item()
    bits = torch.cat([torch.arange(0, infinity, 16381), torch.tensor([1, infinity - 1])]).to(torch.int32)
    magnitude = torch.cat([bits.view(torch.float32), torch.linspace(0, 14, 2**17)])
    return torch.cat([magnitude, -magnitude])


def exact(x, approximate):
    """GELU in float64 without the cancellation of 1 + erf and 1 + tanh at negative numbers."""
    if approximate == "none":
        return x * torch.special.erfc(-x / math.sqrt(2)) / 2
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def exact_orders(x, approximate):
    """From negative numbers, where nothing cancels, as GELU(x) - GELU(-x) = x."""
    value, first, second = orders(exact, -x.double().abs(), approximate)
    negative = x.signbit()
    return torch.where(negative, value, x + value), torch.where(negative, first, 1 - first), second


def assert_near(x, mine, theirs, expected, name):
    """An error of at most 3 ulp and twice their largest near x: the same sign, the same eighth of a binade."""
    # Close to the largest number torch's CPU kernel overflows, and its second derivative is NaN.
    their_error = torch.where(theirs.isfinite(), (theirs - expected).abs(), 0.0)
    place = ((x.view(torch.int32) >> 20) + 2**11).long()
    largest = torch.zeros(2**12, dtype=torch.float64).scatter_reduce(0, place, their_error, "amax")
    ulp = (expected.abs() * torch.finfo(torch.float32).eps).clamp_min(2.0**-149)
    good = (mine - expected).abs() <= 2 * largest[place] + 3 * ulp
    assert good.all(), (name, x[~good], mine[~good], expected[~good])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_results_are_rightly_rounded(dtype, device):
    """Value and derivative of the cheaper functions for 16 bits: hardly more than half an ulp off, also in the tail."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    least = 0.55 * 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).smallest_normal
    ours = orders(rawkern.gelu, x.to(device), "none")
    for name, mine, expected in zip(("value", "first"), ours, exact_orders(x, "none"), strict=False):
        # Beyond -7.5, where torch has long been at 0, the value falls faster than it should.
        keep = (x > -7.5) | (x < -15) if name == "value" else torch.ones_like(x, dtype=torch.bool)
        limit = (0.55 * torch.finfo(dtype).eps * expected.abs()).clamp_min(least)
        wrong = keep & ~((mine.double() - expected).abs() <= limit)
        assert not wrong.any(), (name, x[wrong], mine[wrong], expected[wrong])


@pytest.mark.parametrize("approximate", FORMS)
def test_error_at_every_magnitude(approximate, device):
    x = every_magnitude()
    ours, torchs = orders(rawkern.gelu, x.to(device), approximate), orders(F.gelu, x.to(device), approximate)
    for *results, name in zip(ours, torchs, exact_orders(x, approximate), ("value", "first", "second"), strict=True):
        assert_near(x, *results, name)


def test_error_is_that_of_a_perfect_erf(device):
    """The erf of torch's CPU kernels leaves much room, and differs between processors: one that rounds correctly."""
    x = every_magnitude()
    erf = torch.erf((x * math.sqrt(0.5)).double()).float()
    assert_near(x, rawkern.gelu(x.to(device)).cpu(), x * 0.5 * (1 + erf), exact_orders(x, "none")[0], "value")


@pytest.mark.parametrize("approximate", FORMS)
def test_signs(approximate, device):
    """x * Phi(x) has the sign of x, zeros and numbers whose result vanishes included."""
    x = every_magnitude()
    assert torch.equal(rawkern.gelu(x.to(device), approximate).cpu().signbit(), x.signbit())


@pytest.mark.parametrize("approximate", FORMS)
def test_gradcheck(approximate, device):
    x = randn(2, 3, 4).to(device).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rawkern.gelu(x, approximate), (x,))
    assert torch.autograd.gradgradcheck(lambda x: rawkern.gelu(x, approximate), (x,))


def test_the_two_forms_differ_by_what_they_should(device):
    x = torch.linspace(-4, 4, 4001, dtype=torch.float64, device=device)
    difference = (rawkern.gelu(x) - rawkern.gelu(x, approximate="tanh")).abs().max().item()
    assert 4.6e-4 < difference < 4.8e-4
    torch.testing.assert_close(rawkern.gelu(x), F.gelu(x))  # the default is erf


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(()),
        lambda: torch.empty(0, 4),
        lambda: torch.randn(7),
        lambda: torch.randn(2, 3, 4, 5, 6, 7),
        lambda: torch.randn(4, 6, 8)[:, ::2],
        lambda: torch.randn(4, 1).expand(4, 9),
        lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        lambda: torch.randn(65)[1:],
    ],
)
def test_shapes_and_strides(make, device):
    x = make().to(device)
    ours, theirs = rawkern.gelu(x), F.gelu(x)
    assert ours.shape == theirs.shape and ours.stride() == theirs.stride()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((torch.ones(3), "erf"), RuntimeError, "must be either none or tanh"),
        ((torch.ones(3), None), TypeError, "must be str"),
        ((torch.ones(3).int(),), RuntimeError, "int32"),
        ((torch.ones(3).bool(),), RuntimeError, "bool"),
        ((torch.ones(3).to(torch.complex64),), RuntimeError, "complex64"),
        ((1.0,), TypeError, "must be a torch.Tensor"),
    ],
)
def test_errors(arguments, error, text):
    with pytest.raises(error, match=text):
        rawkern.gelu(*arguments)


def test_signature():
    assert str(inspect.signature(rawkern.gelu)) == "(input, approximate='none')"


def test_arrays(device):
    x, g, gg = (torch.randn(5, 7).to(device).requires_grad_() for _ in range(3))
    arrays = [to_array(t) for t in (x, g, gg)]
    for approximate in FORMS:
        y = F.gelu(x, approximate=approximate)
        (gx,) = torch.autograd.grad(y, x, g, create_graph=True)
        expected = [y, gx, *torch.autograd.grad(gx, (g, x), gg)]
        results = [
            launch_gelu(arrays[0], approximate),
            launch_gelu_backward(arrays[1], arrays[0], approximate),
            *launch_gelu_double_backward(arrays[1], arrays[0], arrays[2], approximate),
        ]
        for ours, theirs in zip(results, expected, strict=True):
            np.testing.assert_allclose(ours.tolist(), theirs.tolist(), rtol=1e-4, atol=1e-6)
        out = arrays[0].copy()
        assert launch_gelu(arrays[0], approximate, out=out) is out and (out == results[0]).all()
