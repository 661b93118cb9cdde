"""torch.func: grad, vjp, jvp, vmap, jacobians, hessians; and forward-mode derivatives by gradcheck."""

import itertools

import pytest
import torch
from public_ops import OPS
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import rawkern
import rawkern.nn
from rawkern.autograd.dlpack import Plan
from rawkern.autograd.operator import Operator, forget_plans

TWICE = [name for name, op in OPS.items() if op.last > 1]


def scalar(function):
    return lambda *tensors: function(*tensors).sin().sum()


def assert_same(transform, op, *arguments):
    torch.testing.assert_close(transform(op.ours)(*arguments), transform(op.theirs)(*arguments), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", TWICE)
def test_forward_mode(name, device):
    op = OPS[name]
    inputs = op.inputs(device=device, requires_grad=True)
    assert torch.autograd.gradcheck(op.ours, inputs, check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize("name", TWICE)
def test_forward_over_reverse(name, device):
    op = OPS[name]
    inputs = op.inputs(device=device, requires_grad=True)
    assert torch.autograd.gradgradcheck(op.ours, inputs, check_fwd_over_rev=True, fast_mode=True)


def test_forward_mode_without_parameters(device):
    x, w, _ = OPS["conv_transpose2d"].inputs(device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rawkern.group_norm(x, 2), (x,), check_forward_ad=True)
    assert torch.autograd.gradcheck(rawkern.conv_transpose2d, (x, w[:, :, :1, :1]), check_forward_ad=True)


@pytest.mark.parametrize("name", OPS)
def test_grad_and_vjp(name, device):
    op = OPS[name]
    inputs = op.inputs(device=device)
    every = tuple(range(len(inputs)))
    assert_same(lambda function: grad(scalar(function), every), op, *inputs)
    assert_same(lambda function: lambda *x: vjp(function, *x)[1](function(*x).detach().cos()), op, *inputs)


@pytest.mark.parametrize("name", TWICE)
def test_jvp(name, device):
    op = OPS[name]
    inputs = op.inputs(device=device)
    tangents = tuple(tensor.cos() for tensor in inputs)
    assert_same(lambda function: lambda *x: jvp(function, x, tangents), op, *inputs)
    assert_same(lambda function: jacfwd(function, len(inputs) - 1), op, *inputs)


def test_jvp_where_there_is_none():
    inputs = OPS["min_sum_gelu_add"].inputs()
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        jvp(rawkern.min_sum_gelu_add, tuple(inputs), tuple(inputs))


@pytest.mark.parametrize("name", OPS)
def test_jacrev(name, device):
    op = OPS[name]
    inputs = op.inputs(device=device)
    assert_same(lambda function: jacrev(function, tuple(range(len(inputs)))), op, *inputs)


@pytest.mark.parametrize("name", TWICE)
def test_second_derivatives(name, device):
    op = OPS[name]
    inputs = op.inputs(device=device)
    last = len(inputs) - 1
    assert_same(lambda function: hessian(scalar(function), last), op, *inputs)
    assert_same(lambda function: jacrev(grad(scalar(function), last), 0), op, *inputs)


def batched(op, dims, device):
    """Inputs, those in `dims` with a batch of 3 at that place."""
    result = []
    for tensor, dim in zip(op.inputs(device=device), dims, strict=True):
        if dim is None:
            result.append(tensor)
        else:
            result.append(torch.stack([tensor, tensor.cos(), tensor.sin() + 0.5], dim))
    return result


def places(op):
    """In which inputs a batch may be: in one, in all, in the first two; at the front, and elsewhere."""
    count = len(op.shapes)
    wanted = {tuple(0 if i == j else None for i in range(count)) for j in range(count)}
    wanted |= {(0,) * count, (1, *[None] * (count - 1)), (2, 0, *[None] * (count - 2))[:count]}
    return sorted(wanted, key=str)


CASES = list(itertools.chain.from_iterable(((name, dims) for dims in places(op)) for name, op in OPS.items()))


@pytest.mark.parametrize(("name", "dims"), CASES, ids=str)
def test_vmap(name, dims, device):
    op = OPS[name]
    inputs = batched(op, dims, device)
    assert_same(lambda function: vmap(function, dims), op, *inputs)
    every = tuple(range(len(inputs)))
    assert_same(lambda function: vmap(grad(scalar(function), every), dims), op, *inputs)


def test_vmap_in_vmap(device):
    op = OPS["conv_transpose2d"]
    x, w, b = op.inputs(device=device)
    xs, ws = torch.stack([x, x.cos()]), torch.stack([w, w.cos(), w.sin()])
    assert_same(lambda f: vmap(vmap(f, (None, 0, None)), (0, None, None)), op, xs, ws, b)


def test_a_batch_is_one_launch(device, monkeypatch):
    """Not a loop: batched inputs are more images, batched weights more groups."""
    calls = []
    decide = Operator._decide
    note = lambda *arguments: calls.append(arguments[0].name) or decide(*arguments)  # noqa: E731
    monkeypatch.setattr(Operator, "_decide", note)
    monkeypatch.setattr(Plan, "repeat", lambda *_: pytest.fail("a second call of the same kind"))
    conv, norm = OPS["conv_transpose2d"], OPS["group_norm"]
    for op, dims in ((conv, (0, None, None)), (conv, (None, 0, None)), (conv, (0, 0, 0)), (norm, (0, None, None))):
        inputs = batched(op, dims, device)
        forget_plans()
        calls.clear()
        vmap(op.ours, dims)(*inputs)
        assert len(calls) == 1, (op.name, dims)
    forget_plans()
    calls.clear()
    per_sample = vmap(grad(scalar(conv.ours), (0, 1, 2)), (0, None, None))
    per_sample(*batched(conv, (0, None, None), device))
    assert sorted(calls) == sorted(
        ["conv_transpose2d", "conv_transpose2d_input_gradient", "conv_transpose2d_weight_gradient", "channel_sum"]
    )


def test_an_empty_batch(device):
    x, bias = OPS["min_sum_gelu_add"].inputs(device=device)
    assert vmap(rawkern.min_sum_gelu_add, (0, None))(x.expand(0, *x.shape), bias).shape == (0, 2, 3, 1, 5)
    assert vmap(rawkern.gelu)(x[:0]).shape == (0, *x.shape[1:])


def test_the_older_way_to_batch_is_refused(device):
    x = torch.randn(3, 4, device=device, requires_grad=True)
    y = rawkern.gelu(x)
    with pytest.raises(RuntimeError, match="are batched by"):
        torch.autograd.grad(y, x, torch.ones(2, 3, 4, device=device), is_grads_batched=True)


def test_gradients_per_sample_of_a_module(device):
    torch.manual_seed(0)
    net = torch.nn.Sequential(rawkern.nn.ConvTranspose2d(4, 6, 3), rawkern.nn.GELU(), rawkern.nn.GroupNorm(2, 6))
    plain = torch.nn.Sequential(torch.nn.ConvTranspose2d(4, 6, 3), torch.nn.GELU(), torch.nn.GroupNorm(2, 6))
    plain.load_state_dict(net.state_dict())
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64, device=device)
    results = []
    for model in (net.to(device, torch.float64), plain.to(device, torch.float64)):
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        loss = lambda p, x, m=model: functional_call(m, p, (x[None],)).sin().sum()  # noqa: E731
        results.append(vmap(grad(loss), (None, 0))(parameters, x))
    torch.testing.assert_close(*results)
