"""rawkern.gelu, the chain of one function: parity, derivatives, errors. Kinks and tails: test_epilogue."""

import inspect

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
