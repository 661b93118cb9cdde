"""Group normalisation against torch and a float64 oracle: forward, backward, twice backward."""

import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional

import rawkern
from rawkern import runtime
from rawkern.autograd.dlpack import to_array
from rawkern.epilogue import GELU
from rawkern.launchers.chain import chain_of
from rawkern.runtime import Kernel
from rawkern.testing import assert_as_accurate_as_torch, assert_parity, forward_backward

launchers = importlib.import_module("rawkern.launchers.group_norm")
held = importlib.import_module("rawkern.launchers.group_norm_held")
repeat = importlib.import_module("rawkern.launchers.repeat")

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def drawn(*shape, seed=0, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) + mean


def torchs(input, num_groups, weight=None, bias=None, eps=1e-5):
    """torch's group_norm; its backward pass on a CPU crashes for a bias without a weight."""
    weight = torch.ones_like(bias) if weight is None and bias is not None else weight
    return functional.group_norm(input, num_groups, weight, bias, eps)


def affine(channels):
    return {"weight": drawn(channels, seed=1), "bias": drawn(channels, seed=2)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [
        ((3, 6, 7, 9), 2),
        ((2, 8, 4, 8), 8),  # one channel a group
        ((5, 12), 4),  # no spatial axes
        ((2, 4, 3, 2, 5), 1),
        ((2, 6, 39, 61), 2),  # too large to be held: rows no multiple of a vector
        ((2, 3, 5003), 3),  # several slots a row
        ((1, 2, 96, 96), 1),  # several slots and vectors
        ((1, 520, 20), 2),  # more partial results per group than a warp combines
    ],
    ids=str,
)
def test_parity(device, dtype, shape, num_groups):
    inputs = {"input": drawn(*shape), "num_groups": num_groups, **affine(shape[1])}
    assert_parity(rawkern.group_norm, functional.group_norm, inputs, dtype=dtype, device=device)


@st.composite
def problems(draw):
    """Arguments of group_norm, input in any layout."""
    num_groups, per_group, batch = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    spatial = draw(st.lists(st.integers(1, 9), max_size=3))
    channels = num_groups * per_group
    input = drawn(batch, channels, *spatial, seed=draw(st.integers(0, 99)), mean=draw(st.sampled_from([0.0, 30.0])))
    layout = draw(st.sampled_from(["contiguous", "channels_last", "permuted", "strided"]))
    if layout == "channels_last":
        input = input.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "permuted":
        input = input.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "strided":
        input = input.repeat_interleave(2, dim=-1)[..., ::2]
    arguments = {"input": input, "num_groups": num_groups, "eps": draw(st.sampled_from([1e-5, 0.1]))}
    for name, vector in affine(channels).items():
        if draw(st.booleans()):
            arguments[name] = vector
    return arguments


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([torch.float32, torch.bfloat16]))
@example({"input": drawn(1, 1, 2, 1), "num_groups": 1}, torch.float32)
@example({"input": drawn(3, 2), "num_groups": 2, **affine(2)}, torch.bfloat16)  # groups of one value: no gradient
def test_any_shape_and_layout(problem, dtype):
    batch, channels, *spatial = problem["input"].shape
    per_group = channels // problem["num_groups"] * math.prod(spatial)
    if batch * per_group == 1:
        with pytest.raises(ValueError, match="more than 1 value"):
            rawkern.group_norm(**problem)
        return
    assert_parity(rawkern.group_norm, torchs, problem, dtype=dtype)


@pytest.mark.parametrize(
    "memory_format", [torch.channels_last, torch.channels_last_3d, torch.contiguous_format], ids=str
)
def test_memory_format_is_kept(device, memory_format):
    shape = (2, 70, 3, 5, 4) if memory_format == torch.channels_last_3d else (2, 70, 9, 5)
    inputs = {"input": drawn(*shape).contiguous(memory_format=memory_format), "num_groups": 7, **affine(70)}
    assert_parity(rawkern.group_norm, functional.group_norm, inputs, device=device)
    input = inputs["input"].float().to(device).requires_grad_()
    output = rawkern.group_norm(input, 7)
    output.backward(torch.ones(shape, device=device))
    assert output.stride() == input.grad.stride() == input.stride()


def test_expanded_input_and_gradient(device):
    inputs = {"input": drawn(1, 4, 5, 1).expand(3, 4, 5, 6), "num_groups": 2, **affine(4)}
    grad = torch.tensor(0.5, dtype=torch.float64).expand(3, 4, 5, 6)
    assert_parity(rawkern.group_norm, functional.group_norm, inputs, device=device, grad=grad)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mean_a_million_deviations(device, dtype, layout):
    """As exact as without the mean. torch is no measure here: on a CPU it loses digits, all of them channels-last."""
    input = drawn(2, 6, 16, 40, mean=1e6).to(dtype).contiguous(memory_format=layout)
    inputs = {"input": input.to(device), "num_groups": 2}
    inputs |= {name: vector.to(device, dtype) for name, vector in affine(6).items()}
    ours = forward_backward(rawkern.group_norm, inputs)
    exact = {"input": input.double().contiguous() - 1e6, "num_groups": 2}  # the difference is exact
    exact |= {name: vector.to(dtype).double() for name, vector in affine(6).items()}
    oracle = forward_backward(functional.group_norm, exact)
    # The mean itself has 10 digits after the point in double; in float the differences are exact.
    tolerance = 3e-7 if dtype == torch.float32 else 1e-9
    for name, value in ours.items():
        error = (value.cpu().double() - oracle[name]).abs().max() / oracle[name].abs().max()
        assert error < tolerance, name


def test_outlier_comes_first(device):
    """Statistics are taken around the first values met: these may lie far from all others."""
    input = drawn(2, 4, 3000)
    input[:, 0, 0] = 1e6
    inputs = {"input": input, "num_groups": 1, **affine(4)}
    assert_parity(rawkern.group_norm, functional.group_norm, inputs, device=device)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_spoil_their_group_only(device, value):
    input = drawn(2, 6, 4, 5)
    input[1, 2, 3, 4] = value
    inputs = {"input": input, "num_groups": 3, **affine(6)}
    assert_parity(rawkern.group_norm, functional.group_norm, inputs, device=device, backward=False)
    output = rawkern.group_norm(input.to(device), 3).cpu()
    assert output[1, 2:4].isnan().all()
    assert output[0].isfinite().all() and output[1, :2].isfinite().all() and output[1, 4:].isfinite().all()


@pytest.mark.parametrize("eps", [-10.0, -0.1, 0.0, 1, 1e-12])
def test_eps(device, eps):
    inputs = {"input": drawn(2, 6, 30), "num_groups": 2, "eps": eps, **affine(6)}
    assert_parity(rawkern.group_norm, functional.group_norm, inputs, device=device)


def test_constant_input(device):
    constant = torch.full((2, 4, 50), 0.1, device=device)
    assert torch.equal(rawkern.group_norm(constant, 2), torch.zeros_like(constant))
    assert rawkern.group_norm(constant, 2, eps=0.0).isnan().all()


@pytest.mark.parametrize("shape", [(0, 6, 3), (2, 6, 0), (0, 6, 0), (2, 0, 3), (0, 6)], ids=str)
def test_empty(device, shape):
    results = []
    # torch on the CPU: on a GPU its own group_norm fails where there are no channels.
    for function, place in ((rawkern.group_norm, device), (functional.group_norm, "cpu")):
        input = torch.ones(shape, device=place, requires_grad=True)
        weight, bias = (torch.ones(shape[1], device=place, requires_grad=True) for _ in range(2))
        output = function(input, 2, weight, bias)
        output.sum().backward()
        results.append((output, input.grad, weight.grad, bias.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (lambda x: (x, 4), RuntimeError),
        (lambda x: (x, 0), ZeroDivisionError),
        (lambda x: (x, -2), RuntimeError),
        (lambda x: (x, 2.0), TypeError),
        (lambda x: (x[0, 0], 1), RuntimeError),
        (lambda x: (x[0, 0, 0], 1), RuntimeError),
        (lambda x: (x, 2, torch.ones(5)), RuntimeError),
        (lambda x: (x, 2, torch.ones(1)), RuntimeError),
        (lambda x: (x, 2, torch.ones(6, 1)), RuntimeError),
        (lambda x: (x, 2, None, torch.ones(5)), RuntimeError),
        (lambda x: (x, 2, [1.0] * 6), TypeError),
        (lambda x: (x, 2, None, None, None), TypeError),
        (lambda x: (x[:1, :1, :1], 1), ValueError),
        (lambda x: (x.int(), 2), RuntimeError),
        (lambda x: (x.to(torch.complex64), 2), RuntimeError),
        (lambda x: (x.double(), 2, torch.ones(6)), RuntimeError),
        (lambda x: (x, 2, torch.ones(6).bfloat16()), RuntimeError),
    ],
)
def test_errors_are_torchs(arguments, error):
    arguments = arguments(torch.randn(2, 6, 3))
    with pytest.raises(error):
        functional.group_norm(*arguments)
    with pytest.raises(error):
        rawkern.group_norm(*arguments)


def test_mixed_dtypes_are_named():
    with pytest.raises(RuntimeError, match=r"input and weight.*bfloat16 and float32"):
        rawkern.group_norm(torch.ones(2, 4, 3, dtype=torch.bfloat16), 2, torch.ones(4))
    with pytest.raises(TypeError, match="input"):
        rawkern.group_norm([1.0, 2.0], 1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("vectors", [("weight", "bias"), ("weight",), ("bias",), ()], ids=str)
def test_gradcheck(device, vectors, layout):
    def function(input, *given):
        return rawkern.group_norm(input, 2, **dict(zip(vectors, given, strict=True)), eps=0.1)

    inputs = [drawn(2, 4, 2, 3, mean=0.3).contiguous(memory_format=layout), *(affine(4)[name] for name in vectors)]
    inputs = [tensor.to(device).requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 6, 8, 9), (1, 4, 5003), (7, 6), (2, 40, 3, 3)], ids=str)
@pytest.mark.parametrize("part", ["all", "input", "weight", "bias"])
def test_second_order_parity(device, dtype, shape, part):
    """The derivative of each of the three gradients, one at a time and all together."""
    channels = shape[1]
    tensors = [drawn(*shape, mean=1.0), drawn(channels, seed=1), drawn(channels, seed=2), drawn(*shape, seed=3)]
    cotangents = [drawn(*shape, seed=4), drawn(channels, seed=5), drawn(channels, seed=6)]
    chosen = {"all": (0, 1, 2), "input": (0,), "weight": (1,), "bias": (2,)}[part]

    def second_order(function, dtype, device):
        cast = lambda tensor: tensor.to(globals_dtype).to(device, dtype, copy=True)  # noqa: E731
        x, w, b, g = (cast(tensor).requires_grad_() for tensor in tensors)
        first = torch.autograd.grad(function(x, 2, w, b), (x, w, b), g, create_graph=True)
        picked = [first[i] for i in chosen]
        return torch.autograd.grad(picked, (x, w, g), [cast(cotangents[i]) for i in chosen], allow_unused=True)

    globals_dtype = dtype
    ours = second_order(rawkern.group_norm, dtype, device)
    theirs = second_order(functional.group_norm, dtype, device)
    oracle = second_order(functional.group_norm, torch.float64, "cpu")
    for name, mine, torchs, exact in zip(("input", "weight", "grad"), ours, theirs, oracle, strict=True):
        if exact is None or not exact.any():
            assert mine is None or not mine.any()
        else:
            assert_as_accurate_as_torch(mine, torchs, exact, dtype, name=name)


@pytest.mark.parametrize("shape", [(3, 6, 5003), (300, 6), (9, 6, 10)], ids=str)
def test_two_runs_are_equal(device, shape):
    def run():
        input = drawn(*shape).float().to(device).requires_grad_()
        weight, bias = (vector.float().to(device).requires_grad_() for vector in affine(6).values())
        output = rawkern.group_norm(input, 3, weight, bias)
        grads = torch.autograd.grad(output.square().sum(), (input, weight, bias), create_graph=True)
        seconds = torch.autograd.grad(grads[0].square().sum() + grads[1].square().sum(), (input, weight))
        return [output, *grads, *seconds]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def launched(monkeypatch, action):
    """Names of the kernels that `action` launches."""
    names = []
    launch = Kernel.launch

    def record(kernel, *arguments, **fields):
        names.append(kernel.name)
        launch(kernel, *arguments, **fields)

    monkeypatch.setattr(Kernel, "launch", record)
    action()
    return names


def test_unneeded_gradients_are_not_computed(device, monkeypatch):
    def tensors(*needs):
        values = drawn(2, 4, 2056), *affine(4).values()  # groups too large to be held
        return [value.to(device).requires_grad_(need) for value, need in zip(values, needs, strict=True)]

    input, weight, bias = tensors(True, False, False)
    output = rawkern.group_norm(input, 2, weight, bias).sum()
    names = launched(monkeypatch, output.backward)
    assert "group_norm_grad_input" in names and "group_norm_channel_gradients" not in names
    assert weight.grad is None and bias.grad is None

    input, weight, bias = tensors(False, True, False)
    output = rawkern.group_norm(input, 2, weight, bias).sum()
    names = launched(monkeypatch, output.backward)
    assert "group_norm_grad_input" not in names and "group_norm_channel_gradients" in names
    assert input.grad is None and bias.grad is None and weight.grad is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [
        ((70, 97), 1),  # half a warp a group, more images than a block takes at once
        ((70, 8), 2),  # several groups of an image in a block
        ((3, 33, 1, 1), 11),  # one group is left over
        ((5, 64, 13, 11), 4),  # teams of several warps, no vectors
        ((5, 64, 8, 8), 4),  # with vectors
        ((2, 32, 16, 16), 2),  # as large as can be held
        ((1, 4096), 1),
        ((33, 2048), 1),
    ],
    ids=str,
)
def test_held_groups(device, dtype, layout, shape, num_groups):
    if layout == torch.channels_last and len(shape) != 4:
        pytest.skip("has no channels-last layout")
    inputs = {"input": drawn(*shape).contiguous(memory_format=layout), "num_groups": num_groups}
    assert_parity(rawkern.group_norm, functional.group_norm, inputs | affine(shape[1]), dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("shape", "num_groups", "backward"), [((9, 388), 4, 1), ((500, 97), 1, 2), ((59, 64, 13, 11), 16, 2)], ids=str
)
def test_held_groups_take_few_launches(device, monkeypatch, shape, num_groups, backward):
    channels = shape[1]
    tensors = drawn(*shape), *affine(channels).values()
    input, weight, bias = (tensor.float().to(device).requires_grad_() for tensor in tensors)
    outputs = []
    assert launched(monkeypatch, lambda: outputs.append(rawkern.group_norm(input, num_groups, weight, bias))) == [
        "group_norm_held"
    ]
    names = launched(monkeypatch, lambda: outputs[0].backward(torch.ones_like(outputs[0])))
    assert names == ["group_norm_held_gradients", "group_norm_channel_gradients"][:backward]


def test_more_partial_results_than_a_warp_combines_in_channels_last(device):
    inputs = {"input": drawn(1, 520, 4, 5).contiguous(memory_format=torch.channels_last), "num_groups": 2}
    assert_parity(rawkern.group_norm, functional.group_norm, inputs | affine(520), device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("which", ["input", "grad_output", "grad_input"])
def test_held_groups_in_memory_that_begins_anywhere(device, dtype, layout, which):
    """Such memory is read by single elements, with the results of vectors."""

    def begins_anywhere(tensor):
        memory = torch.empty(tensor.numel() + 1, dtype=dtype, device=device)[1:]
        return memory.as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    tensors = [drawn(3, 64, 8, 8, seed=seed).to(device, dtype).contiguous(memory_format=layout) for seed in (0, 3)]
    input, grad_output = tensors
    expected = held_gradients(input, grad_output, torch.empty_like(input))
    grad_input = torch.empty_like(input)
    moved = {"input": input, "grad_output": grad_output, "grad_input": grad_input}
    moved[which] = begins_anywhere(moved[which])
    assert moved[which].data_ptr() % 16
    for mine, exact in zip(held_gradients(**moved), expected, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-3 if dtype == torch.float16 else 1e-5, atol=1e-5)


def held_gradients(input, grad_output, grad_input):
    """(output, gradients of input, weight and bias), by the launchers, of groups in teams of 64 threads and more."""
    arrays = [to_array(tensor) for tensor in (input, grad_output, grad_input)]
    xp = runtime.device_of(arrays[0]).xp
    mean, rstd = xp.empty((3, 4)), xp.empty((3, 4))
    output = launchers.group_norm(arrays[0], 4, mean=mean, rstd=rstd)
    grads = launchers.group_norm_backward(arrays[1], arrays[0], mean, rstd, grad_input=arrays[2])
    return [torch.from_dlpack(array) for array in (output, *grads)]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
def test_held_groups_of_several_rounds_in_other_types(monkeypatch, channels_last, dtype):
    """As test_held_groups_of_several_rounds, for what is summed and laid out in other ways."""
    input, grad = (drawn(40, 64, 8, 8, seed=seed).numpy().astype(dtype) for seed in (0, 3))
    if channels_last:
        input, grad = (np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) for a in (input, grad))
    results = []
    for blocks in (held._BLOCKS, 1):
        monkeypatch.setattr(held, "_BLOCKS", blocks)
        repeat.forget_plans()
        mean, rstd = np.empty((40, 4)), np.empty((40, 4))
        launchers.group_norm(input, 4, mean=mean, rstd=rstd)
        results.append(launchers.group_norm_backward(grad, input, mean, rstd))
    repeat.forget_plans()
    tolerance = 2e-3 if dtype == "float16" else 1e-5
    for several, one in zip(*results, strict=True):
        np.testing.assert_allclose(several, one, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("blocks", [1, 2, 7])
@pytest.mark.parametrize(("shape", "num_groups"), [((130, 97), 1), ((40, 6, 5), 3), ((9, 64, 13, 11), 4)], ids=str)
def test_held_groups_of_several_rounds(monkeypatch, blocks, shape, num_groups):
    """As many images one after the other as huge batches have: the same sums up to rounding."""
    monkeypatch.setattr(held, "_BLOCKS", blocks)
    repeat.forget_plans()
    input, grad, weight = drawn(*shape), drawn(*shape, seed=3), drawn(shape[1], seed=1)
    leaves = [tensor.clone().requires_grad_() for tensor in (input, weight, torch.zeros(shape[1], dtype=input.dtype))]
    expected = torch.autograd.grad(functional.group_norm(leaves[0], num_groups, *leaves[1:]), leaves, grad)
    mean, rstd = np.empty((shape[0], num_groups)), np.empty((shape[0], num_groups))
    launchers.group_norm(input.numpy(), num_groups, mean=mean, rstd=rstd)
    ours = launchers.group_norm_backward(grad.numpy(), input.numpy(), mean, rstd, weight.numpy())
    for mine, exact in zip(ours, expected, strict=True):
        np.testing.assert_allclose(mine, exact, atol=1e-11)
    for needs in [(True, False, False), (False, True, False), (False, False, True)]:
        some = launchers.group_norm_backward(grad.numpy(), input.numpy(), mean, rstd, weight.numpy(), needs=needs)
        for one, all_of_them, need in zip(some, ours, needs, strict=True):
            assert np.array_equal(one, all_of_them) if need else one is None
    repeat.forget_plans()


@pytest.mark.parametrize("divisor", [1, 2, 3, 97, 143, 1000, 4095, 4096])
def test_division_by_a_reciprocal(divisor):
    """That of group_norm_held.cu, for all elements of a group."""
    elements, reciprocal = np.arange(4096 + 8, dtype=np.uint64), np.uint64(-(-(2**31) // divisor))
    assert ((2 * elements * reciprocal >> np.uint64(32)) == elements // np.uint64(divisor)).all()


def test_arrays():
    """The launchers on NumPy arrays, with and without arrays for the results."""
    input, grad = drawn(2, 6, 4, 5).numpy(), drawn(2, 6, 4, 5, seed=3).numpy()
    weight, bias = (vector.numpy() for vector in affine(6).values())
    expected = functional.group_norm(*map(torch.from_numpy, (input,)), 3, *map(torch.from_numpy, (weight, bias)))
    np.testing.assert_allclose(launchers.group_norm(input, 3, weight, bias), expected, atol=1e-13)
    # Vectors and inputs may be strided; out decides the layout.
    out = np.empty((2, 4, 5, 6)).transpose(0, 3, 1, 2)
    mean, rstd = np.empty((2, 3)), np.empty((2, 3))
    result = launchers.group_norm(input, 3, np.repeat(weight, 2)[::2], bias, out=out, mean=mean, rstd=rstd)
    assert result is out
    np.testing.assert_allclose(out, expected, atol=1e-13)
    np.testing.assert_allclose(mean, input.reshape(2, 3, -1).mean(-1), atol=1e-14)
    np.testing.assert_allclose(rstd, (input.reshape(2, 3, -1).var(-1) + 1e-5) ** -0.5, rtol=1e-13)
    whole = launchers.group_norm_backward(grad, input, mean, rstd, weight)
    other = launchers.group_norm_backward(
        grad.astype("f8", order="F"), input, mean, rstd, weight, needs=(True, False, True)
    )
    assert other[1] is None
    np.testing.assert_array_equal(whole[0], other[0])
    np.testing.assert_array_equal(whole[2], other[2])
    with pytest.raises(ValueError, match="out has shape"):
        launchers.group_norm(input, 3, out=np.empty((2, 6, 4)))
    with pytest.raises(ValueError, match="mean has dtype"):
        launchers.group_norm(input, 3, mean=np.empty((2, 3), "f4"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 6, 30, 47), (3, 6, 37, 131), (1, 3002, 1, 3), (2, 6, 9, 11), (0, 6, 3, 3), (2, 6, 0, 3), (2, 0, 3, 3)],
    ids=["one slot", "many slots", "lanes without a row", "held", "no image", "no pixel", "no channel"],
)
@pytest.mark.parametrize("chain", [chain_of(()), chain_of(GELU())], ids=["plain", "GELU"])
def test_sums_of_the_input_gradient(device, dtype, layout, shape, chain):
    """The gradient of a bias added to the input: what is stored, summed, and nothing but its own memory written."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    x, grad = (tensor.to(device).contiguous(memory_format=layout) for tensor in (x, grad))
    statistics = torch.ones(2, shape[0], 2, dtype=torch.float64, device=device)
    weight, guarded = (torch.full((count,), 7, dtype=dtype, device=device) for count in (shape[1], shape[1] + 2))
    arrays = [to_array(tensor) for tensor in (grad, x, *statistics, weight)]
    sums = to_array(guarded)[1:-1]
    alone, result = torch.empty_like(x), torch.empty_like(x)
    launchers.group_norm_backward(*arrays, grad_input=to_array(alone), chain=chain)
    options = dict(needs=(True, False, False), grad_input=to_array(result), chain=chain)
    launchers.group_norm_backward(*arrays, grad_input_sum=sums, **options)
    assert torch.equal(result, alone)
    exact = result.double()
    rounding = exact.abs().sum((0, 2, 3)) * (2 * torch.finfo(torch.float32).eps) if dtype != torch.float64 else 1e-9
    error = (guarded[1:-1].double() - exact.sum((0, 2, 3)).to(dtype).double()).abs()
    assert bool((error <= rounding + exact.sum((0, 2, 3)).abs() * torch.finfo(dtype).eps).all())
    assert guarded[0] == guarded[-1] == 7


def test_sums_of_a_gradient_that_is_not_wanted():
    x, statistics = np.ones((2, 4, 3), np.float32), np.ones((2, 2))
    with pytest.raises(ValueError, match="grad_input_sum needs grad_input"):
        launchers.group_norm_backward(
            x, x, statistics, statistics, needs=(False, True, True), grad_input_sum=np.ones(4, np.float32)
        )
    with pytest.raises(ValueError, match="grad_input_sum"):
        launchers.group_norm_backward(x, x, statistics, statistics, grad_input_sum=np.ones(5, np.float32))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("takes 40 GiB of GPU memory")
    input = torch.empty(3, 4, 2**28 + 24, device="cuda", dtype=torch.float16)
    for image in input:
        image.normal_()
    weight, bias = (torch.randn(4, device="cuda", dtype=torch.float16) for _ in range(2))
    output = rawkern.group_norm(input, 2, weight, bias)
    groups = input[2].view(2, -1)
    mean, deviation = groups.mean(1, dtype=torch.float64), groups.std(1)
    tail = (input[2, 3, -1000:].double() - mean[1]) / deviation[1].double() * weight[3].double() + bias[3].double()
    torch.testing.assert_close(output[2, 3, -1000:].double(), tail, rtol=2e-3, atol=2e-3)
