"""Transposed convolution, minimum over channels, sum over height, GELU, plus bias."""

import importlib
import math

import numpy as np
import pytest
import sweep
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.nn import functional

import rawkern
from rawkern.autograd.dlpack import to_array
from rawkern.testing import assert_as_accurate_as_torch, assert_parity, forward_backward

launchers = importlib.import_module("rawkern.launchers.conv_transpose2d_min_sum_gelu_add")

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

# Input, weight, and the convolution's parameters.
CASES = {
    "the model's parameters": ((2, 5, 4, 6), (5, 7, 3, 3), dict(stride=2, padding=1, output_padding=1)),
    "defaults": ((1, 3, 3, 4), (3, 4, 2, 3), {}),
    "more channels than a block": ((1, 37, 3, 5), (37, 33, 2, 1), dict(stride=(2, 1))),
    "more outputs than a block's rows": ((2, 3, 4, 5), (3, 150, 2, 2), dict(stride=2, padding=(1, 0))),
    "groups in one block": ((2, 12, 3, 4), (12, 3, 3, 3), dict(groups=4, padding=1)),
    "groups across blocks": ((1, 60, 3, 4), (60, 2, 2, 2), dict(groups=3, stride=2)),
    "depthwise": ((2, 40, 3, 4), (40, 1, 3, 2), dict(groups=40, stride=(1, 2))),
    "more taps than a block looks up at once": ((1, 4, 6, 5), (4, 3, 5, 7), dict(padding=(2, 3), stride=2)),
    "stride beyond the kernel": ((2, 4, 3, 3), (4, 3, 2, 1), dict(stride=(4, 3), output_padding=(3, 2))),
    "dilation": ((1, 4, 5, 4), (4, 5, 3, 2), dict(dilation=(2, 3), padding=(2, 1), stride=(1, 2))),
    "output padding below dilation": ((1, 2, 3, 3), (2, 3, 2, 2), dict(dilation=3, output_padding=(2, 1))),
    "padding beyond the kernel": ((1, 3, 6, 7), (3, 4, 2, 2), dict(padding=2)),
    "one pixel": ((1, 1, 1, 1), (1, 1, 1, 1), {}),
}


def torchs(input, weight, conv_bias, bias, **options):
    minimum = torch.min(functional.conv_transpose2d(input, weight, conv_bias, **options), dim=1, keepdim=True)[0]
    return functional.gelu(minimum.sum(dim=2, keepdim=True)) + bias


def draw(*shape, seed=0, scale=8):
    """Eighths, or other numbers of few digits: sums of their products are exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator, dtype=torch.float64) / scale


def model_inputs(shape, weight, *, bias=(1, 1, 1), seed=0, **options):
    """Arguments whose products and sums are exact in every dtype's arithmetic, so that all of them choose the same
    channel, and for which the sums lie where GELU is curved, so that the output depends on the input (trap 11)."""
    x, w = draw(*shape, seed=seed), draw(*weight, seed=seed + 1, scale=16)
    conv_bias = draw(weight[1] * options.get("groups", 1), seed=seed + 2)
    y = functional.conv_transpose2d(x, w, conv_bias, **options)
    if y.numel():
        conv_bias -= (y.amin(1).mean() * 8).round() / 8
    return {"input": x, "weight": w, "conv_bias": conv_bias, "bias": draw(*bias, seed=seed + 3)}


def both(options, precision="ieee"):
    """Ours and torch's with these options."""
    ours = lambda **inputs: rawkern.conv_transpose2d_min_sum_gelu_add(**inputs, **options, precision=precision)  # noqa: E731
    return ours, lambda **inputs: torchs(**inputs, **options)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """PyTorch multiplies in full float32, as we are asked to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_parity(device, case, dtype):
    shape, weight, options = CASES[case]
    assert_parity(*both(options), model_inputs(shape, weight, **options), dtype=dtype, device=device)


@pytest.mark.parametrize("case", list(CASES)[:5])
@pytest.mark.parametrize("dtype", DTYPES[2:])
def test_parity_16_bit(device, case, dtype):
    shape, weight, options = CASES[case]
    assert_parity(*both(options), model_inputs(shape, weight, **options), dtype=dtype, device=device)


@pytest.mark.parametrize("bias", [(), (1,), (16, 1, 1), (3, 1, 1, 1), (2, 1, 1, 1, 1)], ids=str)
def test_bias_broadcasts_and_enlarges(device, bias):
    shape, weight, options = CASES["the model's parameters"]
    shape = (3, *shape[1:])
    assert_parity(*both(options), model_inputs(shape, weight, bias=bias, **options), device=device)


def test_without_conv_bias(device):
    shape, weight, options = CASES["defaults"]
    inputs = {**model_inputs(shape, weight, **options), "conv_bias": None}
    inputs["input"] = inputs["input"] / 16
    judged = assert_parity(*both(options), inputs, device=device)
    assert judged.keys() == {"output", "grad input", "grad weight", "grad bias"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_layouts(device, dtype):
    shape, weight, options = CASES["the model's parameters"]
    inputs = model_inputs(shape, weight, **options)
    arranged = {
        "channels-last": inputs["input"].to(memory_format=torch.channels_last),
        "transposed": inputs["input"].transpose(2, 3).contiguous().transpose(2, 3),
        "strided": inputs["input"].repeat_interleave(2, -1)[..., ::2],
        "expanded": inputs["input"][:, :, :1].expand(shape),
    }
    for x in arranged.values():
        changed = {**inputs, "input": x, "weight": inputs["weight"].transpose(0, 1).contiguous().transpose(0, 1)}
        assert_parity(*both(options), changed, dtype=dtype, device=device)
    x = arranged["channels-last"].to(device).requires_grad_()
    others = {name: value.to(device) for name, value in inputs.items() if name != "input"}
    output = rawkern.conv_transpose2d_min_sum_gelu_add(x, **others, **options)
    output.sum().backward()
    assert output.is_contiguous()
    assert x.grad.stride() == x.stride()


def test_output_depends_on_input(device):
    shape, weight, options = CASES["the model's parameters"]
    inputs = {name: value.to(device) for name, value in model_inputs(shape, weight, **options).items()}
    ours, _ = both(options)
    output = ours(**inputs)
    assert output.std() > 0.05
    for name in ("input", "weight", "conv_bias"):
        assert not torch.equal(output, ours(**{**inputs, name: inputs[name] + 0.125}))


def test_gradient_goes_to_the_first_of_equals(device):
    """Equal weights make all channels equal: only the first has a gradient."""
    x = draw(1, 3, 4, 5).to(device)
    w = torch.full((3, 9, 3, 3), 0.25, dtype=torch.float64, device=device, requires_grad=True)
    conv_bias = torch.zeros(9, dtype=torch.float64, device=device, requires_grad=True)
    rawkern.conv_transpose2d_min_sum_gelu_add(x, w, conv_bias, torch.zeros_like(x[0, 0, 0, 0])).sum().backward()
    assert w.grad[:, 0].abs().sum() > 0
    assert w.grad[:, 1:].abs().sum() == 0
    assert conv_bias.grad[0] != 0
    assert conv_bias.grad[1:].abs().sum() == 0


def test_nan(device):
    """A NaN spreads to the columns it reaches and to the gradients that go through them, and no further."""
    shape, weight, options = CASES["defaults"]
    inputs = model_inputs(shape, weight, **options)
    inputs["input"][0, 1, 1, 1] = math.nan
    results = forward_backward(both(options)[0], inputs, device=device)
    expected = forward_backward(both(options)[1], inputs, device="cpu")
    assert torch.equal(results["output"].isnan().cpu(), expected["output"].isnan())
    assert results["output"].isnan().any()
    assert not results["output"].isnan().all()
    assert results["grad conv_bias"].isnan().any()


def test_infinities(device):
    """An infinite bias of one channel: it is never, or always, the minimum."""
    shape, weight, options = CASES["defaults"]
    inputs = model_inputs(shape, weight, **options)
    inputs["conv_bias"][2] = math.inf
    assert_parity(*both(options), inputs, device=device)
    inputs["conv_bias"][:] = math.inf
    assert torch.equal(both(options)[0](**inputs), both(options)[1](**inputs))


#: What makes minima equal, infinite or no numbers: what it does to the input and the bias.
SPECIAL = {
    "ties": lambda x, bias: None,
    "zeros of both signs": lambda x, bias: (x.zero_(), bias.zero_(), bias[1::2].neg_()),
    "infinite input": lambda x, bias: x[0, 0, 1].fill_(math.inf),
    "all infinite": lambda x, bias: bias.fill_(math.inf),
    "NaN in the input": lambda x, bias: x[0, 0, 1, 2:].fill_(math.nan),
    "NaN in the bias": lambda x, bias: (bias[70:72].fill_(math.nan), bias[5].fill_(-math.inf)),
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("width", [3, 40])
@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_first_minimum_by_warpgroups(device, precision, special, width, groups):
    """Values and channels of the kernels for Hopper: several units of 64 channels, the last one not whole."""
    generator = torch.Generator().manual_seed(width + groups)
    x = torch.randint(-2, 3, (2, 4 * groups, 3, width), generator=generator) / 2
    weight = torch.randint(-1, 2, (4 * groups, 150 // groups, 3, 2), generator=generator) / 2
    bias = torch.randint(-1, 2, (150,), generator=generator) / 2
    SPECIAL[special](x, bias)
    expected, first = functional.conv_transpose2d(x, weight, bias, stride=2, groups=groups).double().min(1)
    geometry = launchers.geometry_of(x.shape, weight.shape, stride=2, groups=groups)
    arrays = [to_array(value.to(device)) for value in (x, weight, bias)]
    with sweep.architecture("sm_90a"):
        values, index = launchers.channel_min(*arrays, geometry, precision=precision)
    values, index = (torch.from_dlpack(result).cpu().view(first.shape) for result in (values, index))
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(index.long(), first)


@pytest.mark.parametrize("case", ["the model's parameters", "groups in one block", "dilation", "one pixel"])
def test_gradcheck(device, case):
    shape, weight, options = CASES[case]
    inputs = model_inputs((1, *shape[1:]), weight, bias=(2, 1, 1), **options)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(inputs["conv_bias"].shape, generator=generator, dtype=torch.float64)  # no two channels tie
    inputs["conv_bias"] = inputs["conv_bias"] + noise / 8
    inputs = [value.to(device).requires_grad_() for value in inputs.values()]
    function = lambda x, w, c, b: rawkern.conv_transpose2d_min_sum_gelu_add(x, w, c, b, **options)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("needed", ["input", "weight", "conv_bias", "bias"])
def test_only_what_is_needed_is_computed(device, monkeypatch, needed):
    shape, weight, options = CASES["the model's parameters"]
    inputs = {name: value.to(device) for name, value in model_inputs(shape, weight, **options).items()}
    expected = forward_backward(both(options)[0], inputs)[f"grad {needed}"]
    for name in ("input", "weight", "conv_bias"):
        if name != needed:
            monkeypatch.setattr(f"rawkern.autograd.conv_transpose2d_min_sum_gelu_add.launch_{name}_gradient", None)
    inputs[needed].requires_grad_()
    output = both(options)[0](**inputs)
    grad = torch.randint(-16, 17, output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 8
    output.backward(grad.to(device))
    assert torch.equal(inputs[needed].grad, expected)
    assert all(value.grad is None for name, value in inputs.items() if name != needed)


@pytest.mark.parametrize("bias", [(1, 1, 1), (4, 1, 1)])
def test_empty_batch(device, bias):
    shape, weight, options = CASES["the model's parameters"]
    inputs = model_inputs((0, *shape[1:]), weight, bias=bias, **options)
    judged = assert_parity(*both(options), inputs, device=device)
    assert "grad weight" in judged


def test_many_slices(device, monkeypatch):
    """The weights' and the bias' gradient, cut into slices as those of large inputs are, agree with torch's."""
    monkeypatch.setattr(launchers, "_SLICE_PIXELS", 128)
    monkeypatch.setattr(launchers, "_BIAS_ROWS", 10)
    options = dict(stride=2, padding=1, output_padding=1)
    inputs = model_inputs((2, 4, 13, 17), (4, 6, 3, 3), **options)
    assert_parity(*both(options), inputs, device=device)


def test_two_runs_agree_bit_for_bit(device):
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "input": torch.randn(2, 33, 9, 8, generator=generator),
        "weight": torch.randn(33, 6, 3, 3, generator=generator) / 8,
        "conv_bias": torch.randn(6, generator=generator) + 3,
        "bias": torch.randn(4, 1, 1, generator=generator),
    }
    first, second = (forward_backward(both(dict(stride=2))[0], inputs, device=device) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_precision(device, precision):
    """Exact in both modes, since the products of eighths are exact in TF32."""
    shape, weight, options = CASES["the model's parameters"]
    assert_parity(*both(options, precision), model_inputs(shape, weight, **options), device=device)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(st.integers(0, 2), st.integers(1, 5), st.integers(1, 5)),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    output_padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    channels_last=st.booleans(),
)
@example((1, 2, 2), (2, 2, 2), (3, 3), (2, 2), (1, 1), (1, 1), (1, 1), True)
def test_hypothesis(device, sizes, channels, kernel, stride, padding, output_padding, dilation, channels_last):
    batch, height, width = sizes
    into, out, groups = channels
    output_padding = tuple(min(o, max(s, d) - 1) for o, s, d in zip(output_padding, stride, dilation, strict=True))
    options = dict(stride=stride, padding=padding, output_padding=output_padding, groups=groups, dilation=dilation)
    size = [
        (i - 1) * s - 2 * p + d * (k - 1) + o + 1
        for i, s, p, d, k, o in zip((height, width), stride, padding, dilation, kernel, output_padding, strict=True)
    ]
    if min(size) < 1:
        return
    inputs = model_inputs((batch, into * groups, height, width), (into * groups, out, *kernel), **options)
    if channels_last:
        inputs["input"] = inputs["input"].to(memory_format=torch.channels_last)
    assert_parity(*both(options), inputs, device=device)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.zeros(4, 5, 6)}, RuntimeError, r"expected 4 dimensions \(N, C, H, W\)"),
        ({"input": torch.zeros(1, 2, 5, 6)}, RuntimeError, "to have 4 channels"),
        ({"conv_bias": torch.zeros(4)}, RuntimeError, "expected bias to be 1-dimensional with 3 elements"),
        ({"bias": torch.zeros(3, 1, 2)}, RuntimeError, "does not broadcast"),
        ({"weight": torch.zeros(4, 3, 2, 2).double()}, RuntimeError, "float32 and float64"),
        ({"bias": torch.zeros(1).half()}, RuntimeError, "float32 and float16"),
        ({"bias": None}, TypeError, "'bias' must be Tensor, not NoneType"),
        ({"weight": None}, TypeError, "'weight' must be Tensor"),
        ({"output_padding": 1}, RuntimeError, "output padding must be smaller"),
        ({"stride": 0}, RuntimeError, "stride"),
        ({"groups": 3}, RuntimeError, "divisible by 3"),
        ({"padding": 9}, RuntimeError, "too small"),
        ({"precision": "half"}, ValueError, "precision"),
    ],
    ids=str,
)
def test_errors(device, change, error, message):
    inputs = {
        "input": torch.zeros(1, 4, 5, 6),
        "weight": torch.zeros(4, 3, 2, 2),
        "conv_bias": torch.zeros(3),
        "bias": torch.zeros(1),
        **change,
    }
    inputs = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    with pytest.raises(error, match=message):
        rawkern.conv_transpose2d_min_sum_gelu_add(**inputs)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_arrays(device, dtype):
    shape, weight, options = CASES["the model's parameters"]
    inputs = model_inputs(shape, weight, bias=(4, 1, 1), **options)
    inputs = {name: value.to(getattr(torch, dtype)).to(device) for name, value in inputs.items()}
    xp = np if device == "cpu" else pytest.importorskip("cupy")
    arrays = {name: to_array(value) for name, value in inputs.items()}
    geometry = launchers.geometry_of(shape, weight, **options)
    index = xp.empty((geometry.batch, *geometry.output_size), "int32")
    sums = xp.empty((geometry.batch, geometry.output_size[1]), dtype)
    output = launchers.conv_transpose2d_min_sum_gelu_add(**arrays, **options, index=index, sums=sums)
    grad = draw(*output.shape, seed=9).to(inputs["input"])
    grad_sum = launchers.sum_gradient(to_array(grad), sums)
    results = {
        "output": output,
        "grad input": launchers.input_gradient(grad_sum, index, arrays["weight"], geometry),
        "grad weight": launchers.weight_gradient(grad_sum, index, arrays["input"], geometry),
        "grad conv_bias": launchers.conv_bias_gradient(grad_sum, index, geometry, dtype),
        "grad bias": launchers.bias_gradient(to_array(grad), (4, 1, 1)),
    }
    theirs = forward_backward(both(options)[1], inputs, grad=grad)
    oracle = forward_backward(both(options)[1], inputs, dtype=torch.float64, device="cpu", grad=grad)
    for name, result in results.items():
        assert_as_accurate_as_torch(torch.from_dlpack(result), theirs[name], oracle[name], name=name)


def test_array_errors():
    geometry = launchers.geometry_of((1, 4, 5, 6), (4, 3, 2, 2))
    grad, index = np.zeros((1, 7), "f4"), np.zeros((1, 6, 7), "i4")
    weight = np.zeros((4, 3, 2, 2), "f4")
    with pytest.raises(RuntimeError, match="index: expected a contiguous int32"):
        launchers.input_gradient(grad, index.astype("i8"), weight, geometry)
    with pytest.raises(RuntimeError, match="grad_sum: expected"):
        launchers.input_gradient(grad[:, :-1], index, weight, geometry)
    with pytest.raises(RuntimeError, match="expected weight of shape"):
        launchers.input_gradient(grad, index, weight[:3], geometry)
    with pytest.raises(RuntimeError, match="expected input of shape"):
        launchers.weight_gradient(grad, index, np.zeros((1, 4, 5, 5), "f4"), geometry)
    with pytest.raises(ValueError, match="out has shape"):
        launchers.weight_gradient(grad, index, np.zeros((1, 4, 5, 6), "f4"), geometry, out=weight[:2])
