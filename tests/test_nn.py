"""Modules: torch's constructors, representations and checkpoints, and the plain PyTorch models' results."""

import copy
import io

import pytest
import torch
from torch import nn as tnn

import rawkern.nn as rnn
from rawkern import epilogue
from rawkern.testing import assert_parity


class PlainMinSumGELUAdd(tnn.Module):
    def __init__(self, *args, bias_shape=(1, 1, 1), **kwargs):
        super().__init__()
        self.conv_transpose = tnn.ConvTranspose2d(*args, **kwargs)
        self.bias = tnn.Parameter(torch.randn(bias_shape))

    def forward(self, x):
        x = self.conv_transpose(x).min(dim=1, keepdim=True)[0].sum(dim=2, keepdim=True)
        return tnn.functional.gelu(x) + self.bias


class PlainGELUGroupNorm(tnn.Module):
    def __init__(self, in_channels, out_channels, *args, num_groups, **kwargs):
        super().__init__()
        self.conv_transpose = tnn.ConvTranspose2d(in_channels, out_channels, *args, **kwargs)
        self.group_norm = tnn.GroupNorm(num_groups, out_channels)

    def forward(self, x):
        return self.group_norm(tnn.functional.gelu(self.conv_transpose(x)))


class PlainAddMinGELUMul(tnn.Module):
    def __init__(self, *args, add_value, multiply_value, **kwargs):
        super().__init__()
        self.conv_transpose = tnn.ConvTranspose2d(*args, **kwargs)
        self.add_value, self.multiply_value = add_value, multiply_value

    def forward(self, x):
        x = torch.min(self.conv_transpose(x) + self.add_value, torch.tensor(0.0, device=x.device, dtype=x.dtype))
        return tnn.functional.gelu(x) * self.multiply_value


CONV = (6, 8, 3)
CONV_OPTIONS = {"stride": (2, 1), "padding": 1, "output_padding": (1, 0)}
MODELS = [
    pytest.param(rnn.ConvTranspose2dMinSumGELUAdd, PlainMinSumGELUAdd, {}, id="min_sum"),
    pytest.param(rnn.ConvTranspose2dMinSumGELUAdd, PlainMinSumGELUAdd, {"bias_shape": (4, 1, 1)}, id="min_sum-wide"),
    pytest.param(rnn.ConvTranspose2dGELUGroupNorm, PlainGELUGroupNorm, {"num_groups": 4}, id="group_norm"),
    pytest.param(
        rnn.ConvTranspose2dAddMinGELUMul, PlainAddMinGELUMul, {"add_value": 0.125, "multiply_value": 2.0}, id="add_min"
    ),
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def exact(*shape):
    """Centred eighths: products and sums are exact in every dtype, so that all agree on minima and kinks."""
    return torch.randint(-8, 9, shape).double() / 8


def call_as_function(module):
    """The module as a function of its input and parameters, for assert_parity."""
    return lambda x, **state: torch.func.functional_call(
        module, {name.replace("__", "."): value for name, value in state.items()}, (x,)
    )


def state_of(module):
    """Parameters for `call_as_function`. The convolution's bias puts sums of minima near zero, where GELU is alive."""
    state = {name.replace(".", "__"): exact(*value.shape) for name, value in module.named_parameters()}
    if "conv_transpose__bias" in state and "bias" in state:
        state["conv_transpose__bias"] += 2.75
    return state


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ours, plain, options", MODELS)
def test_model_agrees_with_plain_pytorch(ours, plain, options, dtype, device):
    """Output and every gradient, within twice PyTorch's own error."""
    torch.manual_seed(1)
    ours, plain = ours(*CONV, **CONV_OPTIONS, **options), plain(*CONV, **CONV_OPTIONS, **options)
    inputs = {"x": exact(2, 6, 5, 7), **state_of(plain)}
    compared = assert_parity(call_as_function(ours), call_as_function(plain), inputs, dtype=dtype, device=device)
    assert compared.keys() == {"output", "grad x"} | {f"grad {name}" for name in state_of(plain)}


@pytest.mark.parametrize("ours, plain, options", MODELS)
def test_checkpoint_of_the_plain_model_loads(ours, plain, options):
    plain, ours = plain(*CONV, **CONV_OPTIONS, **options), ours(*CONV, **CONV_OPTIONS, **options)
    file = io.BytesIO()
    torch.save(plain.state_dict(), file)
    file.seek(0)
    ours.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert list(ours.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(ours.state_dict(), strict=True)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
    x = torch.randn(2, 6, 5, 7)
    torch.testing.assert_close(ours(x), plain(x))


@pytest.mark.parametrize("ours, plain, options", MODELS)
def test_same_seed_gives_the_same_parameters(ours, plain, options):
    torch.manual_seed(3)
    first = plain(*CONV, **options).state_dict()
    torch.manual_seed(3)
    second = ours(*CONV, **options).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_constructor_arguments_in_torchs_order():
    arguments = (6, 8, (3, 2), (2, 3), (1, 0), (1, 2), 2, False, (1, 3), "zeros", None, torch.float64)
    expected = tnn.ConvTranspose2d(*arguments)
    for module in (
        rnn.ConvTranspose2d(*arguments),
        rnn.ConvTranspose2dMinSumGELUAdd(*arguments).conv_transpose,
        rnn.ConvTranspose2dGELUGroupNorm(*arguments, num_groups=2).conv_transpose,
        rnn.ConvTranspose2dAddMinGELUMul(*arguments, add_value=1.0, multiply_value=2.0).conv_transpose,
    ):
        assert module.extra_repr() == expected.extra_repr()
        assert module.bias is None
        assert module.weight.dtype is torch.float64
    assert rnn.ConvTranspose2dGELUGroupNorm(*arguments, num_groups=2).group_norm.weight.dtype is torch.float64
    assert rnn.ConvTranspose2dMinSumGELUAdd(*arguments).bias.dtype is torch.float64


@pytest.mark.parametrize("ours, plain, options", MODELS)
def test_what_follows_the_convolution_is_keyword_only(ours, plain, options):
    with pytest.raises(TypeError):
        ours(6, 8, 3, 1, 0, 0, 1, True, 1, "zeros", None, None, *options.values(), 4)


@pytest.mark.parametrize("ours, plain, options", MODELS)
def test_other_padding_modes_are_an_error(ours, plain, options):
    with pytest.raises(ValueError, match="zeros"):
        ours(*CONV, padding_mode="reflect", **options)


def test_representations():
    epilogued = rnn.ConvTranspose2d(4, 8, 3, epilogue=(epilogue.Add(0.5), epilogue.GELU()), precision="ieee")
    assert repr(rnn.ConvTranspose2d(4, 8, 3, stride=2)) == "ConvTranspose2d(4, 8, kernel_size=(3, 3), stride=(2, 2))"
    assert "Add(other=0.5)" in repr(epilogued) and "GELU" in repr(epilogued) and "precision='ieee'" in repr(epilogued)
    assert repr(rnn.GELU("tanh")) == "GELU(approximate='tanh')"
    assert repr(rnn.GroupNorm(2, 8)) == repr(tnn.GroupNorm(2, 8))
    model = rnn.ConvTranspose2dAddMinGELUMul(4, 8, 3, add_value=0.5, multiply_value=2.0)
    assert "add_value=0.5, multiply_value=2.0" in repr(model) and "(conv_transpose): ConvTranspose2d(4, 8" in repr(
        model
    )
    assert "bias_shape=(16, 1, 1)" in repr(rnn.ConvTranspose2dMinSumGELUAdd(4, 8, 3, bias_shape=(16, 1, 1)))
    assert "approximate='tanh'" in repr(rnn.ConvTranspose2dGELUGroupNorm(4, 8, 3, num_groups=2, approximate="tanh"))


@pytest.mark.parametrize("ours, plain", [(rnn.GELU(), tnn.GELU()), (rnn.GELU("tanh"), tnn.GELU("tanh"))])
def test_gelu(ours, plain, device):
    assert isinstance(ours, tnn.GELU)
    assert_parity(ours.forward, plain.forward, {"input": torch.randn(3, 50) * 3}, device=device)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 0.1}], ids=str)
def test_group_norm(options, device):
    ours, plain = rnn.GroupNorm(2, 6, **options), tnn.GroupNorm(2, 6, **options)
    assert isinstance(ours, tnn.GroupNorm) and list(ours.state_dict()) == list(plain.state_dict())
    inputs = {"x": torch.randn(3, 6, 5) + 1, **state_of(plain)}
    assert_parity(call_as_function(ours), call_as_function(plain), inputs, device=device)


@pytest.mark.parametrize("output_size", [None, (9, 13), [10, 14], (2, 8, 9, 14), torch.Size((2, 8, 10, 13))], ids=str)
def test_output_size(output_size, device):
    ours, plain = (
        module(6, 8, 3, stride=2, padding=1).to(device) for module in (rnn.ConvTranspose2d, tnn.ConvTranspose2d)
    )
    ours.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(2, 6, 5, 7, device=device)
    arguments = () if output_size is None else (output_size,)
    torch.testing.assert_close(ours(x, *arguments), plain(x, *arguments))


@pytest.mark.parametrize("output_size", [(8, 13), (11, 13), (9,), (1, 2, 3, 4, 5)], ids=str)
def test_impossible_output_size_is_torchs_error(output_size):
    ours, plain = (module(6, 8, 3, stride=2, padding=1) for module in (rnn.ConvTranspose2d, tnn.ConvTranspose2d))
    x = torch.randn(2, 6, 5, 7)
    with pytest.raises(ValueError) as expected:
        plain(x, output_size)
    with pytest.raises(ValueError) as found:
        ours(x, output_size)
    assert str(found.value) == str(expected.value)


class TestEpilogueOperands:
    """Tensors in an epilogue become part of the module."""

    @staticmethod
    def module():
        scale = tnn.Parameter(torch.randn(8, 1, 1))
        functions = (epilogue.Add(torch.randn(8, 1, 1)), epilogue.ReLU(), epilogue.Mul(scale), epilogue.Add(1.5))
        return rnn.ConvTranspose2d(*CONV, epilogue=functions)

    @staticmethod
    def expected(module, x):
        x = tnn.functional.conv_transpose2d(x, module.weight, module.bias)
        return (x + module.epilogue_0).relu() * module.epilogue_2 + 1.5

    def test_names(self):
        module = self.module()
        assert list(module.state_dict()) == ["weight", "bias", "epilogue_2"]
        assert [name for name, _ in module.named_buffers()] == ["epilogue_0"]

    def test_result_and_gradients(self, device):
        module = self.module().double().to(device)
        x = torch.randn(2, 6, 5, 7, device=device, dtype=torch.float64)
        plain = copy.deepcopy(module)
        output, expected = module(x), self.expected(plain, x)
        torch.testing.assert_close(output, expected)
        output.square().sum().backward()
        expected.square().sum().backward()
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(dict(module.named_parameters())[name].grad, parameter.grad, msg=name)

    def test_they_move_with_the_module(self):
        module = self.module().double()
        assert [f.tensor.dtype for f in module.epilogue if f.tensor is not None] == [torch.float64] * 2
        x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
        torch.testing.assert_close(module(x), self.expected(module, x))

    def test_a_loaded_value_is_used(self):
        module = self.module()
        state = {name: torch.randn_like(value) for name, value in module.state_dict().items()}
        module.load_state_dict(state, assign=True)
        x = torch.randn(2, 6, 5, 7)
        torch.testing.assert_close(module(x), self.expected(module, x))


def test_training_steps_agree_with_plain_pytorch(device):
    """Ten steps of Adam from the same state stay together."""
    torch.manual_seed(0)
    models = [
        module(4, 8, 3, stride=2, padding=1, output_padding=1, num_groups=2).to(device)
        for module in (rnn.ConvTranspose2dGELUGroupNorm, PlainGELUGroupNorm)
    ]
    models[0].load_state_dict(models[1].state_dict())
    x, target = torch.randn(2, 4, 6, 6, device=device), torch.randn(2, 8, 12, 12, device=device)
    losses = []
    for model in models:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses.append([])
        for _ in range(10):
            optimizer.zero_grad()
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0]
