"""Minimum over channels, sum over height, GELU, plus bias."""

import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.nn import functional

import rawkern
from rawkern.testing import assert_as_accurate_as_torch, assert_parity, forward_backward

launchers = importlib.import_module("rawkern.launchers.min_sum_gelu_add")

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "channels_last", "width_slowest", "channels_slowest", "strided", "expanded"]


def torchs(input, bias):
    return functional.gelu(torch.min(input, dim=1, keepdim=True)[0].sum(dim=2, keepdim=True)) + bias


def draw(*shape, seed=0):
    """Sixteenths, exact in every dtype, such that the sums of the minima lie where GELU is curved (trap 11)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-24, 25, shape, generator=generator, dtype=torch.float64) / 16
    if len(shape) == 4 and x.numel():
        x -= (x.amin(1).mean() * 16).round() / 16
    return x


def laid_out(x, layout):
    """The same values in another order of memory."""
    orders = {"channels_last": (0, 2, 3, 1), "width_slowest": (3, 0, 1, 2), "channels_slowest": (1, 0, 2, 3)}
    if layout in orders:
        order = orders[layout]
        return x.permute(order).contiguous().permute([order.index(axis) for axis in range(4)])
    if layout == "strided":
        holes = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
        holes[..., ::2] = x
        return holes[..., ::2]
    if layout == "cut":
        return torch.cat([x, x[..., :2]], 3)[..., : x.shape[-1]]
    if layout == "expanded":
        return x[:, :, :1].expand(x.shape)
    return x.contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity(device, dtype, layout):
    for shape in ((2, 16, 3, 8), (3, 5, 4, 7)):  # packs of 16 bytes are whole and aligned, and are not
        inputs = {"input": laid_out(draw(*shape), layout), "bias": draw(1, 1, 1, seed=1)}
        assert_parity(rawkern.min_sum_gelu_add, torchs, inputs, dtype=dtype, device=device)


@pytest.mark.parametrize(
    "shape",
    [(), (1,), (5,), (1, 1, 1), (16, 1, 1), (3, 16, 1, 5), (1, 4, 1), (2, 1, 1, 1, 1), (2, 1, 16, 7, 1), (3, 1, 1, 1)],
    ids=str,
)
def test_bias_broadcasts_and_enlarges(device, shape):
    inputs = {"input": draw(3, 6, 4, 5), "bias": draw(*shape, seed=1)}
    judged = assert_parity(rawkern.min_sum_gelu_add, torchs, inputs, device=device)
    assert judged.keys() == {"output", "grad input", "grad bias"}


def test_output_depends_on_input(device):
    x, bias = draw(2, 6, 4, 5).to(device), torch.zeros(1, 1, 1, dtype=torch.float64, device=device)
    output = rawkern.min_sum_gelu_add(x, bias)
    assert output.std() > 0.1
    assert not torch.equal(output, rawkern.min_sum_gelu_add(x + 0.125, bias))


def test_many_dimensions(device):
    """Ten dimensions of a bias none of which can be merged with its neighbour, in the bias and in the gradient."""
    bias = draw(2, 2, 2, 2, 2, 2, 2, 2, 1, 2, seed=1).permute(*reversed(range(8)), 8, 9)
    grad = draw(2, 2, 2, 2, 2, 2, 2, 2, 1, 2, seed=2).permute(*reversed(range(8)), 8, 9)
    inputs = {"input": draw(2, 3, 2, 2), "bias": bias}
    assert_parity(rawkern.min_sum_gelu_add, torchs, inputs, device=device, grad=grad)
    with pytest.raises(RuntimeError, match="8 separate dimensions"):
        launchers.min_sum_gelu_add(
            inputs["input"].numpy(), bias.numpy().transpose(*range(0, 8, 2), *range(1, 8, 2), 8, 9)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cut"])
@pytest.mark.parametrize("plane", [(3, 16), (5, 211)], ids=str)
@pytest.mark.parametrize("channels", [1, 7, 32, 70])
def test_minimum_is_that_of_torch(device, dtype, layout, plane, channels):
    """Ties, NaN, infinities and signed zeros in every lane's share of the channels.

    In a plane of odd size no pack is aligned: warps whose pixels are all in one row of the pixels, and others.
    """
    values = torch.tensor([-1.0, -1.0, 0.0, -0.0, math.inf, math.inf, -math.inf, math.nan, 3.0])
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 30.0, 30.0, 0.2, 0.2, 30.0])
    generator = torch.Generator().manual_seed(channels)
    drawn = torch.multinomial(weights, 2 * channels * math.prod(plane), replacement=True, generator=generator)
    x = laid_out(values[drawn].to(dtype).reshape(2, channels, *plane), layout).to(device)
    x[0, :, 0, 0] = math.inf
    x[0, :, 0, 1] = math.nan
    minima, places = launchers.channel_min(as_array(x))
    expected = torch.min(x, dim=1)
    assert torch.equal(as_tensor(places, device), expected.indices.int())
    torch.testing.assert_close(as_tensor(minima, device), expected.values.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinities_go_where_torchs_go(device, value):
    x = draw(2, 5, 3, 6)
    x[0, 1, 2, 3] = value
    x[1, :, 0, 1] = value
    assert_parity(rawkern.min_sum_gelu_add, torchs, {"input": x, "bias": draw(4, 1, 1, seed=1)}, device=device)


def test_gradient_goes_to_the_first_of_equals(device):
    x = torch.zeros(1, 40, 2, 4, device=device, requires_grad=True)
    rawkern.min_sum_gelu_add(x, torch.zeros(1, device=device)).sum().backward()
    assert torch.equal(x.grad[:, 0], torch.full((1, 2, 4), 0.5, device=device))
    assert x.grad[:, 1:].abs().sum() == 0


@pytest.mark.parametrize("shape", [(2, 3, 3, 4), (1, 1, 1, 1)])
@pytest.mark.parametrize("bias_shape", [(1, 1, 1), (3, 1, 1), (2, 1, 1, 1, 1)])
def test_gradcheck(device, shape, bias_shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randperm(math.prod(shape), generator=generator).double().reshape(shape) / 8  # no ties
    x -= x.amin(1).mean()
    bias = draw(*bias_shape)
    tensors = tuple(tensor.to(device).requires_grad_() for tensor in (x, bias))
    assert torch.autograd.gradcheck(rawkern.min_sum_gelu_add, tensors)


def test_only_what_is_needed_is_computed(device, monkeypatch):
    x, bias = draw(2, 3, 4, 5).float().to(device), draw(3, 1, 1).float().to(device)
    monkeypatch.setattr("rawkern.autograd.min_sum_gelu_add.launch_input_gradient", None)
    monkeypatch.setattr("rawkern.autograd.min_sum_gelu_add.launch_sum_gradient", None)
    bias.requires_grad_()
    rawkern.min_sum_gelu_add(x, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((3, 1, 1), 10.0, device=device))
    monkeypatch.undo()
    monkeypatch.setattr("rawkern.autograd.min_sum_gelu_add.launch_bias_gradient", None)
    x.requires_grad_()
    rawkern.min_sum_gelu_add(x, bias.detach()).sum().backward()
    assert x.grad.abs().sum() > 0


def test_second_derivative_is_refused(device):
    x = draw(1, 2, 2, 3).to(device).requires_grad_()
    output = rawkern.min_sum_gelu_add(x, torch.zeros(1, dtype=x.dtype, device=device))
    (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 4, 0), (2, 3, 0, 5), (0, 3, 0, 5)], ids=str)
@pytest.mark.parametrize("bias_shape", [(4, 1, 1), (0, 1, 1)], ids=str)
def test_empty(device, shape, bias_shape):
    inputs = {"input": torch.zeros(shape), "bias": torch.ones(bias_shape)}
    assert_parity(rawkern.min_sum_gelu_add, torchs, inputs, device=device)


def test_empty_output_gives_zero_gradient(device):
    inputs = {"input": draw(2, 3, 4, 5), "bias": torch.zeros(0, 1, 1)}
    assert_parity(rawkern.min_sum_gelu_add, torchs, inputs, device=device)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "width_slowest"])
def test_layouts_are_torchs(device, layout):
    x = laid_out(draw(2, 8, 3, 4), layout).float().to(device).requires_grad_()
    output = rawkern.min_sum_gelu_add(x, torch.zeros(1, device=device))
    assert output.is_contiguous()
    output.sum().backward()
    assert x.grad.stride() == x.stride()


def test_expanded_gradient(device):
    inputs = {"input": draw(2, 3, 4, 5), "bias": draw(6, 1, 1)}
    grad = torch.full((), 0.5, dtype=torch.float64).expand(2, 6, 1, 5)
    assert_parity(rawkern.min_sum_gelu_add, torchs, inputs, device=device, grad=grad)


def test_long_sums(device):
    """More terms than a block sums at once, in rows and in columns, so that slices are used: still as exact."""
    generator = torch.Generator().manual_seed(0)
    for bias_shape, shape in (
        ((1, 1, 1), (3, 1, 1, 30011)),
        ((70,), (1500, 1, 1, 70)),
        ((70001, 1, 1), (1, 1, 1, 1)),
    ):
        x = torch.randn(shape, generator=generator)
        inputs = {"input": x, "bias": torch.randn(bias_shape, generator=generator)}
        grad = torch.rand(torch.broadcast_shapes((shape[0], 1, 1, shape[3]), bias_shape), generator=generator)
        assert_parity(rawkern.min_sum_gelu_add, torchs, inputs, device=device, grad=grad)


@pytest.mark.parametrize("height", [3, 1000])
def test_tall(device, height):
    generator = torch.Generator().manual_seed(0)
    inputs = {"input": torch.randn(1, 2, height, 3, generator=generator) + 0.56, "bias": torch.zeros(1)}
    assert_parity(rawkern.min_sum_gelu_add, torchs, inputs, device=device)


def test_two_runs_agree_bit_for_bit(device):
    generator = torch.Generator().manual_seed(0)
    inputs = {"input": torch.randn(2, 33, 5, 40, generator=generator) + 2, "bias": torch.randn(7, 1, 1)}
    first, second = (forward_backward(rawkern.min_sum_gelu_add, inputs, device=device) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 20), st.integers(0, 4), st.integers(0, 9)),
    kept=st.lists(st.booleans(), max_size=4),
    extra=st.integers(1, 3),
    layout=st.sampled_from(LAYOUTS[:4]),
)
@example(shape=(2, 128, 2, 8), kept=[], extra=1, layout="channels_last")
@example(shape=(1, 33, 1, 1), kept=[True], extra=2, layout="contiguous")
def test_hypothesis(device, shape, kept, extra, layout):
    """Any shape with any bias that broadcasts; `extra` enlarges channels and height."""
    full = (shape[0], extra, extra, shape[3])[4 - len(kept) :] if kept else ()
    bias = draw(*(size if keep else 1 for size, keep in zip(full, kept, strict=True)), seed=1)
    inputs = {"input": laid_out(draw(*shape), layout), "bias": bias}
    assert_parity(rawkern.min_sum_gelu_add, torchs, inputs, device=device)


@pytest.mark.parametrize(
    ("x", "bias", "error", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(1), RuntimeError, "4 dimensions"),
        (torch.zeros(2, 3, 4, 5, 6), torch.zeros(1), RuntimeError, "4 dimensions"),
        (torch.zeros(2, 0, 4, 5), torch.zeros(1), IndexError, "non-zero size"),
        (torch.zeros(2, 3, 4, 5), torch.zeros(16, 1, 3), RuntimeError, r"\(16, 1, 3\).*does not broadcast"),
        (torch.zeros(2, 3, 4, 5), torch.zeros(1).double(), RuntimeError, "float32 and float64"),
        (torch.zeros(2, 3, 4, 5).int(), torch.zeros(1).int(), RuntimeError, "int32"),
        (torch.zeros(2, 3, 4, 5), 1.0, TypeError, "'bias' must be Tensor, not float"),
    ],
)
def test_errors(device, x, bias, error, message):
    bias = bias.to(device) if isinstance(bias, torch.Tensor) else bias
    with pytest.raises(error, match=message):
        rawkern.min_sum_gelu_add(x.to(device), bias)


# Arrays -----------------------------------------------------------------------------------------------------------


def as_array(tensor):
    from rawkern.autograd.dlpack import to_array

    return to_array(tensor)


def as_tensor(array, device):
    return torch.from_dlpack(array).to(device)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_arrays(device, dtype):
    x, bias = draw(2, 5, 3, 6).to(getattr(torch, dtype)).to(device), draw(4, 1, 1).to(getattr(torch, dtype)).to(device)
    xp = np if device == "cpu" else pytest.importorskip("cupy")
    index, sums = xp.empty((2, 3, 6), "int32"), xp.empty((2, 6), dtype)
    wide = xp.empty((2, 4, 1, 12), dtype)
    out = launchers.min_sum_gelu_add(as_array(x), as_array(bias), out=wide[..., ::2], index=index, sums=sums)
    assert out.base is wide
    x.requires_grad_()
    bias.requires_grad_()
    expected = torchs(x, bias)
    grad = draw(2, 4, 1, 6, seed=3).to(expected)
    expected.backward(grad)
    grad_sum = launchers.sum_gradient(as_array(grad), sums)
    results = (
        (out, expected.detach()),
        (launchers.input_gradient(grad_sum, index, x.shape, dtype), x.grad),
        (launchers.bias_gradient(as_array(grad), bias.shape), bias.grad),
    )
    for ours, theirs in results:
        assert_as_accurate_as_torch(as_tensor(xp.ascontiguousarray(ours), device), theirs, theirs.double())


def test_array_errors():
    x, bias = np.zeros((2, 3, 4, 5), "f4"), np.zeros(1, "f4")
    with pytest.raises(ValueError, match="out has shape"):
        launchers.min_sum_gelu_add(x, bias, out=np.empty((2, 1, 1, 4), "f4"))
    with pytest.raises(RuntimeError, match="index: expected a contiguous int32 array"):
        launchers.min_sum_gelu_add(x, bias, index=np.empty((2, 4, 5), "i8"))
    with pytest.raises(RuntimeError, match="sums: expected a contiguous float32 array"):
        launchers.min_sum_gelu_add(x, bias, sums=np.empty((2, 10), "f4")[:, ::2])
    with pytest.raises(RuntimeError, match="different dtypes"):
        launchers.min_sum_gelu_add(x, bias.astype("f8"))
    with pytest.raises(RuntimeError, match="grad_output"):
        launchers.bias_gradient(np.zeros((2, 4, 1, 5), "f4"), (3, 1, 1))


def test_negative_strides():
    x, bias = draw(2, 5, 3, 6).numpy(), draw(4, 1, 1).numpy()
    ours = launchers.min_sum_gelu_add(x[::-1, ::-1, :, ::-1], bias[::-1])
    theirs = torchs(torch.from_numpy(x[::-1, ::-1, :, ::-1].copy()), torch.from_numpy(bias[::-1].copy()))
    assert_as_accurate_as_torch(torch.from_numpy(ours), theirs, theirs)
