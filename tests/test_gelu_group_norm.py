"""Group normalisation of gelu(input) against torch's composition and a float64 oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import rawkern
from rawkern.launchers.gelu_group_norm import gelu_group_norm as launch_gelu_group_norm
from rawkern.testing import assert_parity

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def drawn(*shape, seed=0, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) + mean


def affine(channels):
    return {"weight": drawn(channels, seed=1), "bias": drawn(channels, seed=2)}


def composed(input, num_groups, weight=None, bias=None, eps=1e-5, approximate="none"):
    # torch's backward pass on a CPU crashes for a bias without a weight.
    weight = torch.ones_like(bias) if weight is None and bias is not None else weight
    return functional.group_norm(functional.gelu(input, approximate=approximate), num_groups, weight, bias, eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(
    ("shape", "num_groups"), [((3, 6, 7, 9), 2), ((2, 8, 4, 8), 8), ((5, 12), 4), ((1, 2, 5003), 1)], ids=str
)
def test_parity(device, dtype, approximate, shape, num_groups):
    inputs = {"input": drawn(*shape), "num_groups": num_groups, "approximate": approximate, **affine(shape[1])}
    assert_parity(rawkern.gelu_group_norm, composed, inputs, dtype=dtype, device=device)


@settings(max_examples=40, deadline=None)
@given(
    num_groups=st.integers(1, 4),
    per_group=st.integers(1, 4),
    batch=st.integers(1, 3),
    spatial=st.lists(st.integers(2, 8), min_size=1, max_size=3),
    channels_last=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    names=st.sets(st.sampled_from(["weight", "bias"])),
)
def test_any_shape(num_groups, per_group, batch, spatial, channels_last, scale, names):
    channels = num_groups * per_group
    input = drawn(batch, channels, *spatial) * scale
    if channels_last:
        input = input.movedim(1, -1).contiguous().movedim(-1, 1)
    vectors = {name: vector for name, vector in affine(channels).items() if name in names}
    inputs = {"input": input, "num_groups": num_groups, **vectors}
    assert_parity(rawkern.gelu_group_norm, composed, inputs)


def test_the_two_forms_differ(device):
    input = drawn(1, 4, 50).to(device)
    assert not torch.allclose(
        rawkern.gelu_group_norm(input, 2), rawkern.gelu_group_norm(input, 2, approximate="tanh"), atol=1e-5
    )


def test_large_values(device):
    """gelu is the identity or zero far out: a large mean stays, a large negative one vanishes."""
    input = drawn(2, 6, 300, mean=1e5)
    input[:, 2:4] -= 2e5
    inputs = {"input": input, "num_groups": 3, **affine(6)}
    assert_parity(rawkern.gelu_group_norm, composed, inputs, device=device)


def test_channels_last_is_kept(device):
    inputs = {"input": drawn(2, 40, 5, 6).contiguous(memory_format=torch.channels_last), "num_groups": 5}
    assert_parity(rawkern.gelu_group_norm, composed, inputs, device=device)
    input = inputs["input"].to(device).requires_grad_()
    output = rawkern.gelu_group_norm(input, 5)
    output.sum().backward()
    assert output.stride() == input.grad.stride() == input.stride()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(device, value):
    input = drawn(2, 4, 30)
    input[1, 2, 3] = value
    inputs = {"input": input, "num_groups": 2, **affine(4)}
    assert_parity(rawkern.gelu_group_norm, composed, inputs, device=device, backward=False)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gradcheck(device, approximate):
    def function(input, weight, bias):
        return rawkern.gelu_group_norm(input, 2, weight, bias, approximate=approximate)

    inputs = [tensor.to(device).requires_grad_() for tensor in (drawn(2, 4, 3), *affine(4).values())]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    assert torch.autograd.gradcheck(lambda x: rawkern.gelu_group_norm(x, 2, approximate=approximate), inputs[:1])


def test_second_order_of_shared_tensors(device):
    """Weight and bias are one tensor: its gradient is the sum of both, also where it is differentiated again."""
    results = []
    for function in (rawkern.gelu_group_norm, composed):
        input, both = (tensor.to(device).requires_grad_() for tensor in (drawn(2, 4, 6), drawn(4, seed=1)))
        output = function(input, 2, both, both)
        grads = torch.autograd.grad(output.square().sum(), (input, both), create_graph=True)
        results.append((*grads, *torch.autograd.grad(sum(grad.square().sum() for grad in grads), (input, both))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 6, 3), (2, 6, 0)], ids=str)
def test_empty(device, shape):
    results = []
    for function in (rawkern.gelu_group_norm, composed):
        input, weight, bias = (torch.ones(s, device=device, requires_grad=True) for s in (shape, 6, 6))
        output = function(input, 2, weight, bias)
        output.sum().backward()
        results.append((output, input.grad, weight.grad, bias.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_errors():
    input = torch.randn(2, 6, 3)
    with pytest.raises(RuntimeError, match="approximate"):
        rawkern.gelu_group_norm(input, 2, approximate="erf")
    with pytest.raises(TypeError, match="approximate"):
        rawkern.gelu_group_norm(input, 2, approximate=None)
    with pytest.raises(RuntimeError, match="divisible"):
        rawkern.gelu_group_norm(input, 4)
    with pytest.raises(RuntimeError, match="input and bias"):
        rawkern.gelu_group_norm(input, 2, None, torch.ones(6).double())
    with pytest.raises(RuntimeError, match="int32"):
        rawkern.gelu_group_norm(input.int(), 2)


def test_two_runs_are_equal(device):
    input = drawn(2, 4, 5003).float().to(device).requires_grad_()
    outputs = [rawkern.gelu_group_norm(input, 2) for _ in range(2)]
    assert torch.equal(*outputs)
    assert torch.equal(*(torch.autograd.grad(output.square().sum(), input)[0] for output in outputs))


def test_arrays():
    input = drawn(2, 6, 4, 5)
    result = launch_gelu_group_norm(input.numpy(), 3, approximate="tanh")
    torch.testing.assert_close(torch.from_numpy(result), composed(input, 3, approximate="tanh"))
