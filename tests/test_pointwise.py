"""rawkern.pointwise: chains with operands, layouts, derivatives, arrays and errors. Single functions: test_epilogue."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import rawkern
from rawkern.autograd.dlpack import to_array
from rawkern.epilogue import GELU, Add, Div, Minimum, Mish, Mul, ReLU, Softplus, Sub
from rawkern.launchers.pointwise import pointwise as launch_pointwise
from rawkern.launchers.pointwise import pointwise_backward as launch_pointwise_backward
from rawkern.launchers.pointwise import pointwise_double_backward as launch_pointwise_double_backward
from rawkern.testing import assert_as_accurate_as_torch, assert_parity, forward_backward

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def ours(input, bias, scale, divisor):
    return rawkern.pointwise(input, (Add(bias), GELU(), Mul(scale), Div(divisor), Sub(bias)))


def theirs(input, bias, scale, divisor):
    return F.gelu(input + bias) * scale / divisor - bias


def ours_exact(input, bias, scale, divisor):
    return rawkern.pointwise(input, (Add(bias), ReLU(), Mul(scale), Div(divisor), Sub(bias)))


def theirs_exact(input, bias, scale, divisor):
    return torch.relu(input + bias) * scale / divisor - bias


def assert_exact(x, axis, device):
    """With whole numbers and powers of two nothing rounds, so that every element and every sum must be right."""
    after = x.dim() - 1 - axis
    shape = (x.shape[axis],) + (1,) * after
    tensors = {
        "bias": randn(*shape, seed=1).mul(3).round(),
        "scale": torch.tensor(3.0),
        "divisor": 2.0 ** randn(*shape, seed=2).round().clamp(-2, 2),
    }
    inputs = {"input": x, **tensors}
    mine, torchs = (forward_backward(f, inputs, dtype=torch.float32, device=device) for f in (ours_exact, theirs_exact))
    for name, expected in torchs.items():
        assert torch.equal(mine[name], expected), name


def randn(*shape, seed=0, **options):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(**options)


def operands(channels, axes_after, **options):
    """bias, scale and divisor for a tensor with `axes_after` axes behind the one with the channels."""
    shape = (channels,) + (1,) * axes_after
    bias, divisor = randn(*shape, seed=1), randn(*shape, seed=2)
    divisor = divisor.sign() * (divisor.abs() + 0.5)
    return {"bias": bias.to(**options), "scale": torch.tensor(1.3).to(**options), "divisor": divisor.to(**options)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_parity(dtype, memory_format, device):
    x = randn(3, 20, 9, 8).to(memory_format=memory_format)
    assert_parity(ours, theirs, {"input": x, **operands(20, 2)}, dtype=dtype, device=device)


@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple), data=st.data())
def test_shapes(shape, data):
    axis = data.draw(st.integers(0, len(shape) - 1), "axis")
    order = data.draw(st.permutations(range(len(shape))), "order in memory")
    memory = randn(*(shape[i] for i in order)).mul(3).round()
    x = memory.permute([order.index(i) for i in range(len(shape))])
    assert x.shape == shape
    assert_exact(x, axis, "cpu")


# Each is a path of its own: long rows and short ones, aligned and not, several blocks, several slots, wide matrices.
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((2, 3, 64, 65), 1),
        ((2, 3, 63, 67), 1),
        ((40, 6, 3, 3), 1),
        ((1, 5000), 1),
        ((5000, 1), 1),
        ((1300, 7), 1),
        ((33, 2048), 1),
        ((17, 3, 101), 1),
        ((7, 9001), 0),
        ((9001,), 0),
        ((2, 1, 50, 50), 1),
    ],
)
def test_paths(shape, axis, device):
    x = randn(*shape).mul(3).round()
    assert_exact(x, axis, device)
    # The same in memory that does not start at a multiple of 16 bytes.
    memory = torch.empty(x.numel() + 1, dtype=torch.float32, device=device)
    shifted = memory[1:].view(shape).copy_(x)
    bias = torch.ones((shape[axis],) + (1,) * (len(shape) - 1 - axis), device=device, requires_grad=True)
    y = rawkern.pointwise(shifted, Add(bias))
    assert torch.equal(y, shifted + 1)
    y.backward(shifted)
    others = [i for i in range(len(shape)) if i != axis]
    assert torch.equal(bias.grad.flatten(), shifted.sum(others) if others else shifted)


def views():
    x = randn(4, 6, 10, 12).mul(3).round()
    return {
        "sliced": x[:, :, ::2, 1:],
        "channels_last_sliced": x.to(memory_format=torch.channels_last)[:, :, 2:],
        "transposed": x.transpose(2, 3),
        "expanded": randn(4, 6, 1, 1).round().expand(4, 6, 10, 12),
        "expanded_batch": randn(6, 10, 12).round().expand(4, 6, 10, 12),
        "permuted": x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
        "ones": randn(4, 6, 10, 1).round().as_strided((4, 6, 10, 1), (60, 10, 1, 7)),
        "empty_batch": randn(0, 6, 3, 3),
        "empty_pixels": randn(2, 6, 0, 3),
    }


@pytest.mark.parametrize("name", views())
def test_views(name, device):
    x = views()[name]
    assert_exact(x, 1, device)
    x = x.float().to(device)
    result, expected = rawkern.pointwise(x, GELU()), F.gelu(x)
    assert [s for n, s in zip(x.shape, result.stride(), strict=True) if n != 1] == [
        s for n, s in zip(x.shape, expected.stride(), strict=True) if n != 1
    ]


def test_scalar_input(device):
    scalars = {name: torch.tensor(value) for name, value in (("bias", 0.4), ("scale", 1.5), ("divisor", -0.7))}
    assert_parity(ours, theirs, {"input": torch.tensor(0.3), **scalars}, device=device)


def test_operands_of_a_neighbouring_axis(device):
    """An operand aligns at the last axis, as everywhere in torch: (C,) is the last axis, not the channels."""
    x, bias = randn(2, 5, 5, dtype=torch.float32, device=device), randn(5, seed=1, dtype=torch.float32, device=device)
    assert torch.equal(rawkern.pointwise(x, Add(bias)), x + bias)
    assert torch.equal(rawkern.pointwise(x, Add(bias.view(5, 1))), x + bias.view(5, 1))


def test_operands_that_are_views(device):
    bias = randn(12, seed=1, dtype=torch.float32, device=device)[::2].view(6, 1, 1).requires_grad_()
    x = randn(2, 6, 3, 3, dtype=torch.float32, device=device)
    (gradient,) = torch.autograd.grad(rawkern.pointwise(x, Mul(bias)).sum(), bias)
    expected, exact = (t.sum((0, 2, 3)).view(6, 1, 1) for t in (x, x.double()))
    assert_as_accurate_as_torch(gradient, expected, exact, ulps=8)


def grad_inputs(device, x):
    named = operands(3, 2, dtype=torch.float64, device=device)
    return [tensor.requires_grad_() for tensor in (x, named["bias"], named["scale"], named["divisor"])]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradcheck(memory_format, device):
    x = randn(2, 3, 2, 3, device=device).to(memory_format=memory_format)
    assert torch.autograd.gradcheck(ours, grad_inputs(device, x))
    assert torch.autograd.gradgradcheck(ours, grad_inputs(device, x))


def test_gradcheck_of_views(device):
    x = randn(4, 3, 1, 3, device=device)
    inputs = grad_inputs(device, x.detach())
    for view in (lambda x: x[::2], lambda x: x[:2].expand(2, 3, 2, 3), lambda x: x.transpose(0, 3).transpose(2, 3)):

        def function(x, *others, view=view):
            return ours(view(x), *others)

        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_second_order_parity(device):
    def second(function):
        def run(input, bias, scale, divisor):
            tensors = (input, bias, scale, divisor)
            output = function(*tensors)
            grads = torch.autograd.grad(output, tensors, torch.cos(input.detach()), create_graph=True)
            return sum((g * torch.sin(t.detach() + 1)).sum() for g, t in zip(grads, tensors, strict=True))

        return run

    x = randn(3, 20, 9, 8)
    assert_parity(second(ours), second(theirs), {"input": x, **operands(20, 2)}, device=device, ulps=16)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 3)])
def test_unneeded_gradients_are_not_computed(wanted, device, monkeypatch):
    tensors = [randn(2, 6, 3, 3), *operands(6, 2).values()]
    tensors = [tensor.float().to(device).requires_grad_(i in wanted) for i, tensor in enumerate(tensors)]
    expected = torch.autograd.grad(theirs(*tensors).sum(), [tensors[i] for i in wanted])
    asked = []

    def watch(*arguments, needs, out, **others):
        asked.append((needs, tuple(array is not None for array in out)))
        return original(*arguments, needs=needs, out=out, **others)

    original = launch_pointwise_backward
    monkeypatch.setattr("rawkern.autograd.pointwise.launch_pointwise_backward", watch)
    ours(*tensors).sum().backward()
    pattern = tuple(i in wanted for i in (0, 1, 2, 3, 1))  # the bias is used twice
    assert asked == [(pattern, pattern)]
    for i, gradient in zip(wanted, expected, strict=True):
        torch.testing.assert_close(tensors[i].grad, gradient, rtol=1e-4, atol=1e-5)
    assert all(tensors[i].grad is None for i in range(4) if i not in wanted)


def test_one_tensor_in_two_places(device):
    bias = randn(3, 1, 1, dtype=torch.float64, device=device).requires_grad_()
    x = randn(2, 3, 4, 4, seed=1, dtype=torch.float64, device=device).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b: rawkern.pointwise(x, (Mul(b), Mish(), Mul(b))), (x, bias))


def test_identity(device):
    x = randn(5, 7, dtype=torch.float32, device=device).requires_grad_()
    y = rawkern.pointwise(x, ())
    assert torch.equal(y, x) and y.data_ptr() != x.data_ptr()
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_empty_gives_zero_gradients(device):
    bias = torch.ones(6, 1, 1, device=device, requires_grad=True)
    rawkern.pointwise(torch.empty(0, 6, 2, 2, device=device), Add(bias)).sum().backward()
    assert torch.equal(bias.grad, torch.zeros_like(bias))


def test_two_runs_agree(device):
    x = randn(5, 7, 61, 67, dtype=torch.float32, device=device)

    def run():
        tensors = [t.requires_grad_() for t in operands(7, 2, dtype=torch.float32, device=device).values()]
        output = ours(x, *tensors)
        return [output.detach(), *torch.autograd.grad(output, tensors, torch.sin(x))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_operand_gradients_of_long_sums(device):
    """Sums over 300,000 elements with a mean far from zero lose nothing."""
    x = torch.rand(2, 3, 50_000, generator=torch.Generator().manual_seed(0)) + 1
    scale = torch.ones(3, 1)
    assert_parity(
        lambda x, scale: rawkern.pointwise(x, Mul(scale)),
        lambda x, scale: x * scale,
        {"x": x, "scale": scale},
        device=device,
        grad=torch.ones_like(x),
    )


def test_arrays(device):
    """The launchers: arrays in, arrays out, with and without out=."""
    x = randn(4, 6, 3, 5, dtype=torch.float32, device=device).to(memory_format=torch.channels_last)
    bias, g, gg = (randn(*s, seed=i).float().to(device) for i, s in enumerate(((6, 1, 1), x.shape, x.shape)))
    chain = (Add(to_array(bias)), Softplus())
    array = to_array(x)
    result = launch_pointwise(array, chain)
    assert result.strides == array.strides
    out = array.copy(order="C")
    assert launch_pointwise(array, chain, out=out) is out
    assert (out == result).all()
    gradients = launch_pointwise_backward(to_array(g), array, chain)
    assert [gradient.shape for gradient in gradients] == [(4, 6, 3, 5), (6, 1, 1)]
    outs = out, to_array(torch.empty_like(bias))
    again = launch_pointwise_backward(to_array(g), array, chain, out=outs)
    assert again[0] is outs[0] and again[1] is outs[1]
    assert all((a == b).all() for a, b in zip(again, gradients, strict=True))
    assert launch_pointwise_backward(to_array(g), array, chain, needs=(False, True))[0] is None
    second = launch_pointwise_double_backward(to_array(g), array, chain, to_array(gg), (None,))
    z = (x + bias).double()
    expected = gg * torch.sigmoid(z), g * gg * torch.sigmoid(z) * torch.sigmoid(-z)
    for a, b in zip(second[:2], expected, strict=True):
        np.testing.assert_allclose(a.tolist(), b.tolist(), rtol=1e-5, atol=1e-6)
    total = expected[1].sum((0, 2, 3)).view(6, 1, 1)
    np.testing.assert_allclose(second[2].tolist(), total.tolist(), rtol=1e-4, atol=1e-5)
    launch_pointwise(array, chain, out=array)  # in place
    assert (array == result).all()


X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: rawkern.pointwise(3.0, ReLU()), TypeError, "'input' must be a torch.Tensor, not float"),
        (lambda: rawkern.pointwise(X.long(), ReLU()), RuntimeError, "int64"),
        (lambda: rawkern.pointwise(X.to(torch.complex64), ReLU()), RuntimeError, "complex64"),
        (lambda: rawkern.pointwise(X, Add(X.double()[0, 0])), RuntimeError, "float32 and float64"),
        (lambda: rawkern.pointwise(X, Add(torch.ones(3))), RuntimeError, "does not broadcast"),
        (lambda: rawkern.pointwise(X, Add(torch.ones(1, 1, 1, 1))), RuntimeError, "does not broadcast"),
        (lambda: rawkern.pointwise(X, Add(torch.ones(3, 4))), ValueError, "along one axis"),
        (lambda: rawkern.pointwise(X, (Add(torch.ones(3, 1)), Mul(torch.ones(4)))), ValueError, "axis 1 is in use"),
        (lambda: rawkern.pointwise(X, Add(np.ones(4, np.float32))), TypeError, "torch.Tensor"),
        (lambda: rawkern.pointwise(X.to_sparse(), ReLU()), RuntimeError, "parse"),
        (lambda: launch_pointwise([1.0], ReLU()), TypeError, "numpy.ndarray"),
        (lambda: launch_pointwise(X.numpy(), ReLU(), out=X.numpy()[0]), ValueError, r"out has shape \(3, 4\)"),
        (lambda: launch_pointwise(X.numpy(), ReLU(), out=X.double().numpy()), ValueError, "out has dtype float64"),
        (lambda: launch_pointwise_backward(X.numpy()[:1], X.numpy(), ReLU()), RuntimeError, "grad_output has shape"),
        (lambda: launch_pointwise_backward(X.numpy(), X.numpy(), ReLU(), needs=()), ValueError, "expected 1 entries"),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_tensors_on_different_devices():
    with pytest.raises(RuntimeError, match=r"cuda:0 and cpu"):
        rawkern.pointwise(X.cuda(), Add(torch.ones(4)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_more_than_two_to_the_31_elements():
    x = torch.zeros(3, 2**30, dtype=torch.float16, device="cuda")
    x[2, -5:] = torch.arange(5).to(x)
    bias = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float16, device="cuda", requires_grad=True)
    y = rawkern.pointwise(x, (Add(bias), Minimum(6.5)))
    assert y[2, -6:].tolist() == [3, 3, 4, 5, 6, 6.5] and y[0, -1] == 1 and y[1].min() == 2
    y.backward(torch.full_like(y, 2.0**-20))
    assert bias.grad.flatten().tolist() == [1024, 1024, 1024]
