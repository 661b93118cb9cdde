"""rawkern.fuse: the same results as the model it was given, whatever that does, and chains where there are some."""

import copy
import functools
import inspect
import io
import pickle
import random
import re
import threading
import types
from collections import OrderedDict, defaultdict, deque, namedtuple
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from fusing import fuse_and_compare, fused_functions, step, use_stand_ins
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_nn import PlainAddMinGELUMul, PlainGELUGroupNorm, PlainMinSumGELUAdd
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rawkern
import rawkern.nn as rnn
from rawkern.autograd.operator import forget_plans
from rawkern.fusion.report import rows_of
from rawkern.runtime.kernel import Kernel

CONV, NORM, MIN = "conv_transpose2d", "conv_transpose2d_gelu_group_norm", "conv_transpose2d_min_sum_gelu_add"


@pytest.fixture
def calls(monkeypatch):
    return use_stand_ins(monkeypatch)


def images(*shape):
    return torch.randn(shape, dtype=torch.float64)


class Model(nn.Module):
    """A transposed convolution from 3 to 4 channels, whose output is as wide as it has channels, and a function of it.

    `function(self, y)` is given the convolution's output, `function(self, y, x)` also the input.
    """

    def __init__(self, function, **modules):
        super().__init__()
        self.conv = nn.ConvTranspose2d(3, 4, 3)
        self.bias = nn.Parameter(torch.randn(4, 1, 1))
        self.scale = nn.Parameter(torch.randn(1, 4, 1, 1))
        self.one = nn.Parameter(torch.randn(1))
        self.number = nn.Parameter(torch.randn(()))
        self.row = nn.Parameter(torch.randn(4))
        self.full = nn.Parameter(torch.randn(1, 4, 6, 4))
        self.register_buffer("shift", torch.randn(4, 1, 1))
        self.plain = torch.randn(4, 1, 1, dtype=torch.float64)
        for name, module in modules.items():
            setattr(self, name, module)
        self._function = [function, len(inspect.signature(function).parameters) == 3]
        self.double()

    def forward(self, x):
        function, takes_input = self._function
        y = self.conv(x)
        return function(self, y, x) if takes_input else function(self, y)


X = (2, 3, 4, 2)

#: What follows the convolution, each of which is one call with it.
POINTWISE = {
    "add": lambda m, y: y + 0.5,
    "add-reversed": lambda m, y: 1 + y,
    "add-inplace": lambda m, y: y.add_(0.25),
    "add-method": lambda m, y: y.add(0.25, alpha=1),
    "add-torch": lambda m, y: torch.add(y, other=2),
    "bias": lambda m, y: y + m.bias,
    "bias-reversed": lambda m, y: m.bias + y,
    "buffer": lambda m, y: y - m.shift,
    "attribute": lambda m, y: y * m.plain,
    "viewed": lambda m, y: y * m.row.view(-1, 1, 1),
    "indexed": lambda m, y: y + m.row[None, :, None, None],
    "unsqueezed": lambda m, y: y + m.row.unsqueeze(-1).unsqueeze(-1),
    "scale": lambda m, y: y * m.scale,
    "one": lambda m, y: y + m.one,
    "number": lambda m, y: y * m.number,
    "sub": lambda m, y: y - 0.5,
    "sub-reversed": lambda m, y: 1.5 - y,
    "rsub": lambda m, y: torch.rsub(y, 2.0),
    "mul": lambda m, y: y * -1.5,
    "div": lambda m, y: y / 3,
    "div-tensor": lambda m, y: torch.div(y, m.scale),
    "min": lambda m, y: torch.min(y, torch.tensor(0.25)),
    "min-like": lambda m, y: torch.min(y, torch.tensor(0.0, device=y.device, dtype=y.dtype)),
    "max-new": lambda m, y: torch.maximum(y.new_tensor(0.3), y),
    "min-zeros": lambda m, y: y.minimum(torch.zeros((), device=y.device)),
    "clamp": lambda m, y: y.clamp(-0.5, 0.5),
    "clamp-min": lambda m, y: torch.clamp(y, min=0.1),
    "clamp_max_": lambda m, y: y.clamp_max_(0.2),
    "relu": lambda m, y: F.relu(y),
    "relu_": lambda m, y: F.relu_(y),
    "relu-inplace": lambda m, y: F.relu(y, inplace=True),
    "relu-position": lambda m, y: F.relu(y, True),
    "relu6": lambda m, y: F.relu6(y),
    "leaky": lambda m, y: F.leaky_relu(y, 0.2),
    "elu": lambda m, y: F.elu(y, alpha=2.0),
    "silu": lambda m, y: F.silu(y),
    "mish": lambda m, y: F.mish(y),
    "hardswish": lambda m, y: F.hardswish(y),
    "hardtanh": lambda m, y: F.hardtanh(y, -0.25, 0.5),
    "sigmoid": lambda m, y: y.sigmoid(),
    "tanh": lambda m, y: torch.tanh(y),
    "softplus": lambda m, y: F.softplus(y, 2.0),
    "gelu": lambda m, y: F.gelu(y),
    "gelu-tanh": lambda m, y: F.gelu(y, approximate="tanh"),
}
#: The same for modules.
LAYERS = {
    "ReLU": lambda: nn.ReLU(inplace=True), "ReLU6": nn.ReLU6, "LeakyReLU": lambda: nn.LeakyReLU(0.2), "ELU": nn.ELU,
    "SiLU": nn.SiLU, "Mish": nn.Mish, "Hardswish": nn.Hardswish, "Hardtanh": lambda: nn.Hardtanh(-0.25, 0.5),
    "Sigmoid": nn.Sigmoid, "Tanh": nn.Tanh, "Softplus": lambda: nn.Softplus(2.0), "GELU": lambda: nn.GELU("tanh"),
}  # fmt: skip


@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_functions(name, calls):
    fused = fuse_and_compare(Model(POINTWISE[name]), images(*X))
    assert calls == [CONV]
    assert fused_functions(fused) == [CONV]


@pytest.mark.parametrize("name", LAYERS)
def test_pointwise_layers(name, calls):
    fuse_and_compare(Model(lambda m, y: m.layer(y), layer=LAYERS[name]()), images(*X))
    assert calls == [CONV]


#: What may follow but is not one call with the convolution, and how many calls there are.
NOT_FUSED = {
    "nothing": (lambda m, y: y, 0),
    "row": (lambda m, y: y + m.row, 0),
    "full": (lambda m, y: y + m.full, 0),
    "enlarging": (lambda m, y: y + m.row.view(4, 1, 1, 1, 1), 0),
    "another value": (lambda m, y: y + torch.mean(y), 0),
    "the input": (lambda m, y, x: y * x.mean(), 0),
    "twice in one": (lambda m, y: y * y, 0),
    "twice": (lambda m, y: y * torch.sigmoid(y), 0),
    "after one": (lambda m, y: (lambda z: z * z)(F.relu(y)), 1),
    "reciprocal": (lambda m, y: 1 / (y + 10), 1),
    "parameter less": (lambda m, y: m.bias - y, 0),
    "alpha": (lambda m, y: torch.add(y, 1.0, alpha=2), 0),
    "floor": (lambda m, y: torch.div(y, 2, rounding_mode="floor"), 0),
    "limit of a parameter": (lambda m, y: torch.min(y, m.number), 0),
    "limit of a tensor": (lambda m, y: y.clamp(max=m.number), 0),
    "made from another type": (lambda m, y: torch.min(y, torch.tensor(0.5, dtype=m.row.dtype)), 0),
    "dtype": (lambda m, y: y.float().relu().double(), 0),
    "dtype after": (lambda m, y: y.relu().float() * 2, 1),
    "amin": (lambda m, y: torch.amin(y, dim=1), 0),
    "output": (lambda m, y: F.relu(y).sum() + y.sum(), 0),
    "alias": (lambda m, y: (y.view(-1).add_(1.0), F.relu(y))[1], 0),
    "in place, then the same": (lambda m, y: (F.relu_(y), y * 2)[1], 0),
    "in place between": (lambda m, y, x: (x.clone(), y)[1].relu(), 1),
}


@pytest.mark.parametrize("name", NOT_FUSED)
def test_what_does_not_fit(name, calls):
    function, expected = NOT_FUSED[name]
    fuse_and_compare(Model(function), images(*X))
    assert len(calls) == expected


def test_an_input_changed_between_is_read_before(calls):
    """The fused call reads the input where the chain ends; it may not have changed since the convolution read it."""

    def function(m, y, x):
        z = x * 1.0
        w = m.conv(z)
        z.detach().add_(1.0)
        return F.relu(w) + y.sum()

    model = Model(function).eval().requires_grad_(False)
    x = images(*X)
    torch.testing.assert_close(rawkern.fuse(model)(x), model(x))
    assert not calls


def test_a_value_renamed_in_place(calls):
    """`x += 1` changes what other names of the tensor show."""

    def function(m, y):
        z = y * 2
        alias = z
        z += 1
        return alias * 3 + z

    fuse_and_compare(Model(function), images(*X))
    assert calls == [CONV]  # the first product, and y * 2 + 1 has two users


class TestStandalone:
    """Chains that no convolution begins."""

    def test_numbers(self, calls):
        fuse_and_compare(nn.Sequential(nn.ReLU(), nn.Tanh()), images(2, 3))
        assert calls == ["pointwise"]

    def test_one_function_is_left_alone(self, calls):
        fuse_and_compare(nn.Sequential(nn.ReLU()), images(2, 3))
        assert not calls

    def test_in_place_reaches_the_input(self, calls):
        model = nn.Sequential(nn.ReLU(inplace=True), nn.Tanh())
        x, y = images(2, 3), None
        y = x.clone()
        torch.testing.assert_close(rawkern.fuse(model)(x), model(y))
        torch.testing.assert_close(x, y)
        assert (x >= 0).all() and not calls

    def test_sizes_are_no_tensors(self, calls):
        class Sizes(nn.Module):
            def forward(self, x):
                return x.new_full((x.shape[0] * 2 + 1,), 1.0)

        x = images(2, 3)
        assert rawkern.fuse(Sizes())(x).shape == (5,)
        assert not calls

    def test_integers_stay_integers(self, calls):
        model = rawkern.fuse(Function(lambda m, x: x * 2 + 1))
        torch.testing.assert_close(model(torch.arange(3)), torch.tensor([1, 3, 5]))
        assert not calls

    def test_gelu_group_norm(self, calls):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU("tanh"), nn.GroupNorm(2, 4)).double()
        fuse_and_compare(model, images(2, 3, 5, 4))
        assert calls == ["gelu_group_norm"]

    def test_min_sum_gelu_add(self, calls):
        def function(m, x):
            return F.gelu(x.min(dim=1, keepdim=True).values.sum((2,), keepdim=True)) + m.bias

        fuse_and_compare(Function(function), images(2, 3, 5, 4))
        assert calls == ["min_sum_gelu_add"]


class Function(nn.Module):
    """A function of (self, *inputs), and parameters for it."""

    def __init__(self, function):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(3, 1, 1, dtype=torch.float64))
        self._function = [function]

    def forward(self, *inputs):
        return self._function[0](self, *inputs)


class TestTails:
    """Normalisation and the channel minimum."""

    @pytest.mark.parametrize("approximate", ["none", "tanh"])
    def test_group_norm(self, approximate, calls):
        model = Model(lambda m, y: m.norm(F.gelu(y, approximate=approximate)), norm=nn.GroupNorm(2, 4))
        fuse_and_compare(model, images(*X))
        assert calls == [NORM]

    def test_group_norm_function(self, calls):
        fuse_and_compare(Model(lambda m, y: F.group_norm(F.gelu(y), 2, m.row, None, 0.1)), images(*X))
        assert calls == [NORM]

    def test_longer_chain_before_group_norm(self, calls):
        model = Model(lambda m, y: m.norm(F.gelu(y * 2)), norm=nn.GroupNorm(2, 4, affine=False))
        fuse_and_compare(model, images(*X))
        assert calls == [CONV, "gelu_group_norm"]

    def test_minimum_of_everything(self, calls):
        """`min` and `max` without another tensor are no functions of the vocabulary."""
        for function in (lambda m, y: y.min(), lambda m, y: F.relu(y).max(), lambda m, y: torch.min(input=y) * 2):
            fuse_and_compare(Model(function), images(*X))
        assert calls == [CONV]

    @pytest.mark.parametrize("before", [False, True])
    def test_layers_that_change_nothing_before_group_norm(self, before, calls):
        function = (lambda m, y: m.norm(m.same(F.gelu(y * 2)))) if before else (lambda m, y: m.norm(m.same(F.gelu(y))))
        fuse_and_compare(Model(function, same=nn.Identity(), norm=nn.GroupNorm(2, 4)), images(*X))
        assert calls == ([CONV, "gelu_group_norm"] if before else [NORM])

    def test_what_is_not_gelu_before_group_norm(self, calls):
        fuse_and_compare(Model(lambda m, y: m.norm(torch.rsub(F.gelu(y), 1)), norm=nn.GroupNorm(2, 4)), images(*X))
        assert calls == [CONV]

    def test_group_norm_alone(self, calls):
        fuse_and_compare(Model(lambda m, y: m.norm(y), norm=nn.GroupNorm(2, 4)), images(*X))
        assert not calls

    @pytest.mark.parametrize(
        "function",
        [
            lambda m, y: F.gelu(y.min(dim=1, keepdim=True)[0].sum(dim=2, keepdim=True)) + m.bias,
            lambda m, y: m.one + F.gelu(torch.sum(torch.min(y, 1, True).values, 2, keepdim=True)),
            lambda m, y: torch.add(F.gelu(torch.min(y, -3, keepdim=True)[0].sum(-2, True)), m.full),
        ],
    )
    def test_channel_minimum(self, function, calls):
        fuse_and_compare(Model(function), images(*X))
        assert calls == [MIN]

    def test_channel_minimum_unpacked(self, calls):
        def function(m, y):
            values, _ = y.min(dim=1, keepdim=True)
            return F.gelu(values.sum(dim=2, keepdim=True)) + m.bias

        fuse_and_compare(Model(function), images(*X))
        assert calls == [MIN]

    @pytest.mark.parametrize(
        "function",
        [
            lambda m, y: F.gelu(y.min(dim=2, keepdim=True)[0].sum(dim=2, keepdim=True)) + m.bias,
            lambda m, y: F.gelu(y.min(dim=1, keepdim=True)[0].sum(dim=3, keepdim=True)) + m.bias,
            lambda m, y: F.gelu(y.min(dim=1)[0].sum(dim=1, keepdim=True)) + m.row,
            lambda m, y: F.gelu(torch.amin(y, 1, keepdim=True).sum(dim=2, keepdim=True)) + m.bias,
            lambda m, y: F.gelu(y.min(dim=1, keepdim=True)[0].sum(dim=2, keepdim=True), approximate="tanh") + m.bias,
        ],
    )
    def test_similar_ones_are_left_alone(self, function, calls):
        fuse_and_compare(Model(function), images(*X))
        assert MIN not in calls and "min_sum_gelu_add" not in calls

    def test_the_indices_are_wanted_too(self, calls):
        def function(m, y):
            values, indices = y.min(dim=1, keepdim=True)
            return F.gelu(values.sum(dim=2, keepdim=True)) + m.bias + indices.sum()

        fuse_and_compare(Model(function), images(*X))
        assert not calls


class TestBatchNorm:
    @staticmethod
    def model(**options):
        model = Model(lambda m, y: F.relu(m.norm(y)), norm=nn.BatchNorm2d(4, **options))
        if model.norm.running_mean is not None:
            model.norm.running_mean.normal_(), model.norm.running_var.uniform_(0.5, 2)
        return model

    @pytest.mark.parametrize("affine", [True, False])
    def test_evaluation(self, affine, calls):
        fuse_and_compare(self.model(affine=affine).eval(), images(*X))
        assert calls == [CONV]

    def test_training_then_evaluation(self, calls):
        model = self.model()
        fused, x = rawkern.fuse(model), images(*X)
        torch.testing.assert_close(fused(x), model(x), rtol=0, atol=1)  # the statistics moved in between
        assert not calls
        fused.eval(), model.eval()
        torch.testing.assert_close(fused(x), model(x))
        assert calls == [CONV]
        fused.norm.train(), model.norm.train()
        torch.testing.assert_close(step(fused, x), step(model, x))
        assert calls == [CONV]

    def test_other_shapes_and_types_are_torchs(self, calls):
        model = self.model().eval()
        with pytest.raises(ValueError, match="expected 4D input"):
            rawkern.fuse(model)(images(*X[1:]))
        x = torch.randn(X).bfloat16()
        model.bfloat16()
        assert torch.equal(rawkern.fuse(model)(x), model(x))
        assert not calls

    def test_without_statistics(self, calls):
        fuse_and_compare(self.model(track_running_stats=False).eval(), images(*X))
        assert not calls


class TestConvolutions:
    """What may be special about the convolution."""

    def test_function(self, calls):
        model = Model(lambda m, y, x: F.relu(F.conv_transpose2d(x, m.conv.weight, None, 2, padding=1)) + y.sum())
        fuse_and_compare(model, images(*X))
        assert calls == [CONV]

    def test_function_of_a_computed_weight(self, calls):
        model = Model(lambda m, y, x: F.relu(F.conv_transpose2d(x, m.conv.weight * 2)) + y.sum())
        fuse_and_compare(model, images(*X))
        assert calls == [CONV]

    def test_called_twice(self, calls):
        model = Model(lambda m, y, x: F.relu(y) + torch.tanh(m.conv(x + 1)))
        fuse_and_compare(model, images(*X))
        assert calls == [CONV, CONV]

    def test_shared(self, calls):
        conv = nn.ConvTranspose2d(4, 4, 1)
        model = nn.Sequential(nn.Sequential(conv, nn.ReLU()), nn.Sequential(conv, nn.Tanh())).double()
        fused = fuse_and_compare(model, images(2, 4, 3, 3))
        assert fused[0][0] is fused[1][0]
        assert calls == [CONV, CONV]

    @pytest.mark.parametrize("size", [(9, 5), [10, 6], torch.Size((2, 4, 9, 6))], ids=str)
    def test_output_size(self, size, calls):
        model = Model(lambda m, y, x: F.relu(m.up(x, size)), up=nn.ConvTranspose2d(3, 4, 3, stride=2))
        fuse_and_compare(model, images(*X))
        assert calls == [CONV]

    def test_output_size_of_another_tensor(self, calls):
        def function(m, y, x):
            return F.relu(m.up(x, output_size=x.repeat(1, 1, 2, 2).shape[-2:])) + y.sum()

        model = Model(function, up=nn.ConvTranspose2d(3, 4, 2, stride=2))
        fuse_and_compare(model, images(*X))
        assert calls == [CONV]

    def test_impossible_output_size_is_torchs_error(self, calls):
        model = Model(lambda m, y, x: F.relu(m.up(x, (50, 50))), up=nn.ConvTranspose2d(3, 4, 3, stride=2))
        with pytest.raises(ValueError, match="requested an output size"):
            rawkern.fuse(model)(images(*X))

    def test_no_bias_groups_dilation(self, calls):
        conv = nn.ConvTranspose2d(4, 6, (2, 3), (2, 1), 1, (1, 0), groups=2, bias=False, dilation=(1, 2))
        fuse_and_compare(nn.Sequential(conv, nn.SiLU()).double(), images(2, 4, 5, 6))
        assert calls == [CONV]

    def test_no_batch(self, calls):
        fuse_and_compare(Model(lambda m, y: F.relu(y) + m.bias), images(*X[1:]))
        assert calls == [CONV]

    @pytest.mark.parametrize(
        "function",
        [
            lambda m, y: F.relu(y) * m.scale,
            lambda m, y: F.gelu(y.min(dim=1, keepdim=True)[0].sum(dim=2, keepdim=True)) + m.one,
        ],
    )
    def test_no_batch_where_it_matters(self, function, calls):
        fuse_and_compare(Model(function), images(*X[1:]))
        assert not calls

    def test_subclasses_are_what_their_forward_is(self, calls):
        class Doubled(nn.ConvTranspose2d):
            def forward(self, input, output_size=None):
                return 2 * super().forward(input, output_size)

        fused = fuse_and_compare(nn.Sequential(Doubled(3, 4, 3), nn.ReLU()).double(), images(*X))
        assert [row.chain for row in rows_of(fused)] == [("conv_transpose2d", "mul", "ReLU 1")]

        class Normed(nn.ConvTranspose2d):
            def forward(self, input, output_size=None):
                return super().forward(input / input.norm(), output_size) if input.numel() else input

        calls.clear()
        fused = fuse_and_compare(nn.Sequential(Normed(3, 4, 3), nn.ReLU()).double(), images(*X))
        assert not calls
        assert rows_of(fused)[0].result == "it is a Normed, a class of its own"

    def test_our_own_modules_are_left_alone(self):
        model = nn.Sequential(rnn.ConvTranspose2d(3, 4, 3), nn.ReLU(), nn.Tanh()).double()
        assert fused_functions(fuse_and_compare(model, images(*X))) == ["pointwise"]

    @pytest.mark.parametrize(
        "parametrized",
        [
            nn.utils.parametrizations.weight_norm,
            nn.utils.parametrizations.spectral_norm,
            nn.utils.spectral_norm,
            lambda conv: nn.utils.prune.l1_unstructured(conv, "weight", 0.5),
        ],
    )
    def test_parametrized_weights_are_left_alone(self, parametrized, calls):
        model = nn.Sequential(parametrized(nn.ConvTranspose2d(3, 4, 3)), nn.ReLU()).double().eval()
        fused = rawkern.fuse(model)
        torch.testing.assert_close(step(fused, images(*X)), step(model, images(*X)), rtol=1, atol=100)
        x = images(*X)
        torch.testing.assert_close(fused(x), model(x))
        assert not calls

    def test_parameters_to_come(self, calls):
        model = nn.Sequential(nn.LazyConvTranspose2d(4, 3), nn.ReLU())
        fused, x = rawkern.fuse(model), torch.randn(X)
        torch.testing.assert_close(fused(x), model(x))
        assert not calls
        fuse_and_compare(model, x)
        assert calls == [CONV]


class TestHooks:
    @pytest.mark.parametrize("name", ["conv", "layer"])
    def test_layers_with_hooks_are_left_alone(self, name, calls):
        model = Model(lambda m, y: m.layer(y), layer=nn.ReLU())
        seen = []
        getattr(model, name).register_forward_hook(lambda module, args, output: seen.append(module))
        fused = fuse_and_compare(model, images(*X))
        assert len(seen) == 2 and not calls
        assert name != "conv" or rows_of(fused)[0].result == "it has hooks"

    def test_backward_hooks(self, calls):
        model = Model(lambda m, y: F.relu(y))
        seen = []
        model.conv.register_full_backward_hook(lambda *args: seen.append(args))
        fuse_and_compare(model, images(*X))
        assert len(seen) == 2 and not calls

    def test_hooks_that_come_and_go(self, calls):
        """On either model: they share hooks."""
        model = Model(lambda m, y: F.relu(y))
        fused, x, seen = rawkern.fuse(model), images(*X), []
        fused(x)
        handle = model.conv.register_forward_hook(lambda *args: seen.append(args))
        torch.testing.assert_close(fused(x), model(x))
        assert len(seen) == 2 and calls == [CONV]
        handle.remove()
        fused(x)
        assert len(seen) == 2 and calls == [CONV] * 2

    def test_hooks_of_the_model_and_of_blocks(self, calls):
        inner = Model(lambda m, y: F.relu(y))
        model, seen = nn.Sequential(inner, nn.Tanh()), []
        for module in (inner, model):
            module.register_forward_hook(lambda module, args, output: output * 2)
            module.register_forward_pre_hook(lambda module, args: seen.append(type(module)))
        fuse_and_compare(model, images(*X))
        assert seen == [nn.Sequential, Model] * 2 and calls == [CONV]


class Block(nn.Module):
    """An up-sampling block with a forward of the test's choice."""

    def __init__(self, forward):
        super().__init__()
        self.up = nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.ReLU())
        self.conv = nn.ConvTranspose2d(4, 4, 1)
        self.gain, self.calls, self.kept = 2.0, 0, []
        self.register_buffer("count", torch.zeros(()))
        self._forward = [forward]
        self.double()

    def forward(self, x, *args, **kwargs):
        return self._forward[0](self, x, *args, **kwargs)


def _branch_on_value(m, x):
    y = m.up(x)
    return F.relu(m.conv(y)) if y.sum() > 0 else m.conv(y)


def _branch_on_shape(m, x):
    return F.relu(m.conv(m.up(x))) if x.shape[0] == 2 else m.up(x)


def _assertion(m, x):
    assert x.dim() == 4 and len(x) == 2
    return F.relu(m.conv(m.up(x)))


def _counter(m, x):
    m.calls += 1
    return F.relu(m.conv(m.up(x))) * m.calls


def _buffer_counter(m, x):
    m.count += 1
    return F.relu(m.conv(m.up(x)))


def _kept_in_a_list(m, x):
    y = m.up(x)
    m.kept.append(y)
    return F.relu(m.conv(y))


def _kept_in_an_attribute(m, x):
    m.last = m.up(x)
    return F.relu(m.conv(m.last))


def _coin(m, x):
    y = m.up(x)
    return F.relu(m.conv(y)) if random.random() < 0.5 else y


def _torch_coin(m, x):
    return F.relu(m.conv(m.up(x))) * (2.0 if torch.rand(()) < 0.5 else 1.0)


def _without_gradients(m, x):
    with torch.no_grad():
        y = m.up(x)
    return F.relu(m.conv(y))


def _asks_for_gradients(m, x):
    return F.relu(m.conv(m.up(x))) if torch.is_grad_enabled() else m.up(x)


def _inner_autocast(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.relu(m.conv(m.up(x))).double()


def _outer_autocast_off(m, x):
    with torch.autocast("cpu", enabled=False):
        return F.relu(m.conv(m.up(x)))


def _asks_for_autocast(m, x):
    return F.relu(m.conv(m.up(x))) * (2.0 if torch.is_autocast_enabled("cpu") else 1.0)


def _inference_mode_off(m, x):
    with torch.inference_mode(False):
        return F.relu(m.conv(m.up(x)))


def _seeds(m, x):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return F.relu(m.conv(m.up(x)) * torch.rand_like(x[:1, :1, :1, :1]))


def _accumulates(m, x):
    total = torch.zeros(4, 1, 1, dtype=torch.float64)
    total = total.index_fill(0, torch.tensor([1]), 1.0)
    return F.relu(m.conv(m.up(x)) + total)


def _changes_what_it_made(m, x):
    limit = torch.zeros((), dtype=torch.float64)
    limit += 0.5
    return torch.min(m.conv(m.up(x)), limit)


def _loops_over_a_tensor(m, x):
    return torch.stack([F.relu(m.conv(y)) for y in m.up(x)])


def _asks_for_a_type(m, x):
    y = m.up(x)
    return F.relu(m.conv(y)) if isinstance(y, torch.Tensor) else y


def _asks_torch_for_a_type(m, x):
    y = m.up(x)
    return F.relu(m.conv(y)) if torch.is_tensor(y) else y


@pytest.mark.parametrize(
    "forward",
    [
        _branch_on_value, _branch_on_shape, _assertion, _counter, _buffer_counter, _kept_in_a_list,
        _kept_in_an_attribute, _coin, _torch_coin, _without_gradients, _asks_for_gradients, _inner_autocast,
        _outer_autocast_off, _asks_for_autocast, _inference_mode_off, _seeds,
        _accumulates, _changes_what_it_made, _loops_over_a_tensor, _asks_for_a_type, _asks_torch_for_a_type,
    ],
)  # fmt: skip
def test_what_cannot_be_traced_is_run_as_it_is(forward, calls):
    """Several times, in several modes; what the submodule `up` has in it is fused all the same."""
    model, plain = Block(forward), Block(forward)
    plain.load_state_dict(model.state_dict())
    before = {name: copy.copy(value) for name, value in model.__dict__.items() if name in ("kept", "calls", "last")}
    state = random.getstate()
    fused = rawkern.fuse(model)
    assert all(model.__dict__[name] == value for name, value in before.items())
    assert random.getstate() == state and fused.count == 0
    for seed, shape in enumerate([X, X, (1, *X[1:])]):
        if forward is _assertion and shape != X:
            continue
        x = images(*shape)
        results = []
        for candidate in (fused, plain):
            random.seed(seed)
            results.append(step(candidate, x))
        torch.testing.assert_close(*results)
        with torch.no_grad():
            for candidate in (fused, plain):
                random.seed(seed)
                torch.manual_seed(seed)
                results.append(candidate(x))
        torch.testing.assert_close(*results[2:])
        assert fused.count == plain.count and fused.calls == plain.calls and len(fused.kept) == len(plain.kept)
    rows = rows_of(fused)
    assert [row.module for row in rows if row.fused] == ["up"]
    assert set(calls) == ({CONV} if forward is not _inner_autocast else set())  # which does nothing to float64
    assert "cannot be traced" in rows[-1].result
    assert forward is not _accumulates or "neither an argument nor an attribute" in rows[-1].result


def test_autocast_inside_counts_under_autocast_outside(calls):
    """A forward that switches it off, or asks for it, does so at every call, not once when it was traced."""
    for forward in (_outer_autocast_off, _asks_for_autocast):
        model, x = Block(forward).float(), torch.randn(X)
        fused = rawkern.fuse(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, theirs = fused(x), model(x)
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)


def test_what_is_kept_elsewhere_is_no_proxy(calls):
    """In an object, in a list in a dictionary: a forward that keeps a value there keeps it at every call."""
    kept = types.SimpleNamespace(last=None)

    def in_an_object(m, x):
        kept.last = m.up(x)
        return F.relu(m.conv(kept.last))

    def in_a_nested_list(m, x):
        m.table["lists"][0].append(m.up(x))
        return F.relu(m.conv(m.table["lists"][0][-1]))

    x = images(*X)
    for forward in (in_an_object, in_a_nested_list):
        model = Block(forward)
        model.table = {"lists": ([],)}
        fused = rawkern.fuse(model)
        assert model.table == {"lists": ([],)}
        torch.testing.assert_close(fused(x), model(x))
        assert forward is in_a_nested_list or type(kept.last) is torch.Tensor
        assert forward is in_an_object or [type(value) for value in model.table["lists"][0]] == [torch.Tensor] * 2


def test_a_parameter_that_an_untraceable_submodule_read_first(calls):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.full((4, 1, 1), 0.5))

        def forward(self, x):
            return x * self.gain if x.sum() < 1e9 else x

    class Outer(Inner):
        def __init__(self):
            super().__init__()
            self.conv, self.inner = nn.ConvTranspose2d(3, 4, 3), Inner()

        def forward(self, x):
            return self.inner(torch.relu(self.conv(x)) * self.inner.gain) * self.inner.gain

    fuse_and_compare(Outer().double(), images(*X))
    assert calls == [CONV]


def test_an_untraceable_submodule_does_not_hide_its_parent(calls):
    model = nn.Sequential(Block(_branch_on_value), nn.ConvTranspose2d(4, 2, 1), nn.ReLU()).double()
    fused = fuse_and_compare(model, images(*X))
    assert sorted(row.module for row in rows_of(fused) if row.fused) == ["", "0.up"]


class TestArguments:
    """One forward, different calls."""

    @staticmethod
    def model():
        class Optional(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.ConvTranspose2d(3, 4, 3)
                self.double()

            def forward(self, x, skip=None, *, gain=1.0, flag=False):
                if isinstance(x, (list, tuple)):
                    x = torch.cat(x)
                else:
                    assert isinstance(x, torch.Tensor)
                y = F.relu(self.conv(x)) * gain
                if skip is not None:
                    y = torch.cat([y, skip])
                return (y, x) if flag else y

        return Optional()

    def test_each_call_is_its_own(self, calls):
        model = self.model()
        fused, x, skip = rawkern.fuse(model), images(*X), images(1, 4, 6, 4)
        for args, kwargs in [
            ((x,), {}),
            ((x, skip), {}),
            ((x,), {"skip": skip}),
            ((x, None), {"gain": 2.0}),
            ((x,), {"gain": 2}),
            ((x,), {"gain": True}),
            (([x, x],), {}),
            (((x, x, x), skip), {"flag": False}),
            ((x,), {"flag": True, "gain": images(1)}),
        ] * 2:
            torch.testing.assert_close(fused(*args, **kwargs), model(*args, **kwargs))
        assert calls == [CONV] * 18

    def test_unknown_arguments_run_the_model_as_it_is(self, calls):
        fused = rawkern.fuse(Function(lambda m, x, f: f(x * 2 + 1)))
        torch.testing.assert_close(fused(images(3), torch.sin).shape, torch.Size([3]))
        assert not calls

    def test_wrong_arguments_are_the_models_error(self):
        model = self.model()
        for args in ((), (images(*X),) * 4, (images(2, 5, 4, 2),)):
            with pytest.raises((TypeError, RuntimeError)) as expected:
                model(*args)
            with pytest.raises(expected.type) as found:
                rawkern.fuse(model)(*args)
            assert str(found.value) == str(expected.value)

    def test_signature(self):
        model = self.model()
        assert inspect.signature(rawkern.fuse(model).forward) == inspect.signature(model.forward)

    def test_dtypes(self, calls):
        """Of inputs and operands: where rawkern does not take them, torch promotes or raises."""
        model = Model(lambda m, y: F.relu(y) + m.number)
        model.number = nn.Parameter(torch.tensor(0.1))  # float32, which does not count beside float64
        fuse_and_compare(model, images(*X))
        assert not calls
        with pytest.raises(RuntimeError, match=r"expected|same"):
            rawkern.fuse(model)(torch.randn(X))


class TestState:
    """The two models and what they share."""

    @staticmethod
    def model():
        inner = Model(lambda m, y: F.relu(y) + m.shift)
        return nn.Sequential(inner, nn.Dropout(0.5), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 3), nn.Tanh()).double()

    def test_training_the_one_trains_the_other(self, calls):
        model, x = self.model(), images(*X)
        fused = rawkern.fuse(model)
        assert [id(p) for p in fused.parameters()] == [id(p) for p in model.parameters()]
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.SGD(fused.parameters(), 0.1)
        fused(x).square().sum().backward()
        optimizer.step()
        after = model.state_dict()
        assert not torch.equal(after["0.conv.weight"], before["0.conv.weight"])
        assert not torch.equal(after["2.running_mean"], before["2.running_mean"])
        model.eval(), fused.eval()
        torch.testing.assert_close(fused(x), model(x))

    def test_modes_are_their_own(self, calls):
        model, x = self.model(), images(*X)
        fused = rawkern.fuse(model).eval()
        assert model.training and model[1].training and not fused[1].training
        torch.testing.assert_close(fused(x), fused(x))
        torch.manual_seed(0)
        first = fused.train()(x)
        torch.manual_seed(0)
        model[2].reset_running_stats()
        torch.testing.assert_close(first, model(x))
        assert not torch.equal(fused(x), fused(x))

    def test_loading(self, calls):
        model, other, x = self.model(), self.model(), images(*X)
        fused = rawkern.fuse(model)
        fused.load_state_dict(other.state_dict(), strict=True)
        other.load_state_dict(model.state_dict(), strict=True)
        model.load_state_dict(other.state_dict(), strict=True, assign=True)
        other[0].plain = model[0].plain
        results = [candidate.eval()(x) for candidate in (fused, model, other)]
        torch.testing.assert_close(results[0], results[1])
        torch.testing.assert_close(results[0], results[2])

    def test_on_meta(self, calls):
        model = self.model().to("meta")
        x = images(*X).to("meta")
        assert rawkern.fuse(model)(x).shape == model(x).shape

    def test_moving(self, calls):
        model = self.model()
        fused = rawkern.fuse(model)
        fused.float()
        assert {value.dtype for value in model.state_dict().values()} == {torch.float32, torch.int64}
        x = torch.randn(X)
        torch.testing.assert_close(fused.eval()(x), model.eval()(x))

    def test_copies_are_independent_and_fused(self, calls):
        model, x = self.model().eval(), images(*X)
        fused = rawkern.fuse(model)
        expected = fused(x)
        copied = copy.deepcopy(fused)
        with torch.no_grad():
            copied[0].conv.weight.zero_()
        torch.testing.assert_close(fused(x), expected)
        assert not torch.equal(copied(x), expected)
        assert len(calls) == 6

    def test_pickle(self, calls):
        model, x = nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.ReLU()), torch.randn(X)
        fused = rawkern.fuse(model)
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        for loaded in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(fused))):
            torch.testing.assert_close(loaded(x), model(x))
        assert calls == [CONV] * 2

    def test_the_original_is_as_it_was(self, calls):
        model = self.model()
        before = {module: dict(module.__dict__) for module in model.modules()}
        fused = rawkern.fuse(model)
        fused(images(*X))
        calls.clear()
        for module, attributes in before.items():
            assert module.__dict__ == attributes
        model(images(*X))
        assert not calls

    def test_attributes_may_change(self, calls):
        model = Model(lambda m, y: m.layer(y) * m.gain, layer=nn.LeakyReLU(0.1))
        model.gain = 2.0
        fused, x = rawkern.fuse(model), images(*X)
        for candidate in (fused, model):
            candidate(x)
            candidate.gain = 3.0
        torch.testing.assert_close(fused(x), model(x))
        for candidate in (fused, model):
            candidate.layer.negative_slope = 0.5
        torch.testing.assert_close(fused(x), model(x))
        model.conv.bias = None  # of both
        torch.testing.assert_close(fused(x), model(x))
        assert calls == [CONV] * 4
        for candidate in (fused, model):
            candidate.layer = nn.Softsign()
        torch.testing.assert_close(fused(x), model(x))
        assert calls == [CONV] * 4

    def test_attributes_may_change_at_every_call(self, calls):
        model = Model(lambda m, y: F.relu(y) * m.gain)
        model.gain = 0.0
        fused, x = rawkern.fuse(model), images(*X)
        for gain in range(40):
            model.gain = fused.gain = float(gain)
            torch.testing.assert_close(fused(x), model(x))
        assert calls == [CONV] * 40
        assert sum(len(plans) for plans in fused.forward._plans.values()) <= 16

    def test_containers_in_attributes_may_change(self, calls):
        model = Model(lambda m, y: F.relu(y) * m.gains["all"][0][0])
        model.gains = {"all": ([2.0],)}
        fused, x = rawkern.fuse(model), images(*X)
        torch.testing.assert_close(fused(x), model(x))
        model.gains["all"][0][0] = 3.0
        torch.testing.assert_close(fused(x), model(x))
        assert calls == [CONV] * 2

    def test_a_circle_of_containers(self, calls):
        model = Model(lambda m, y: F.relu(y))
        model.circle = []
        model.circle.append(model.circle)
        fused, x = rawkern.fuse(model), images(*X)
        made = fused.forward.plan(1)
        torch.testing.assert_close(fused(x), model(x))
        assert fused.forward.plan(1) is made and calls == [CONV]

    @pytest.mark.parametrize("traceable", [True, False])
    def test_something_new_at_every_call(self, traceable, calls):
        """Making plans takes milliseconds: few are made, and fewer kept."""

        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.count = nn.ConvTranspose2d(3, 4, 3).double(), 0

            def forward(self, x, scale):
                self.count += not traceable
                return F.relu(self.conv(x)) * scale

        model, x = Scaled(), images(*X)
        fused = rawkern.fuse(model)
        for time in range(400):
            torch.testing.assert_close(fused(x, time / 7), model(x, time / 7))
        assert len(calls) <= 80 and fused.count == model.count
        assert 1 <= sum(len(plans) for plans in fused.forward._plans.values()) <= 80
        calls.clear()
        for _ in range(200):  # and when nothing is new any more, there soon is a plan
            fused(x, 0.5)
        assert calls or not traceable

    def test_methods_and_lists_speak_of_the_copy(self, calls):
        class Listing(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.ConvTranspose2d(3, 4, 3), nn.ReLU()
                self.order = [self.first, self.second]
                self.activate = self.helper

            def helper(self, x):
                return x if self.training else -x

            def forward(self, x):
                for module in self.order:
                    x = module(x)
                return self.activate(x)

        model, x = Listing().double(), images(*X)
        fused = rawkern.fuse(model).eval()
        assert fused.order[0] is fused.first and fused.activate.__self__ is fused
        torch.testing.assert_close(fused(x), -model(x))
        assert calls == [CONV]

    @pytest.mark.parametrize(
        "contained",
        [
            lambda module: OrderedDict(a=module),
            lambda module: defaultdict(list, a=[module]),
            lambda module: deque([module], 2),
            lambda module: {module},
            lambda module: (types.SimpleNamespace, [{"a": (module,)}]),
            lambda module: namedtuple("Layers", "first")(module),
            lambda module: functools.partial(nn.Module.__call__, module),
        ],
    )
    def test_containers_speak_of_the_copy(self, contained, calls):
        """What is called from a container is the fused model's, in its own mode."""

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.drop = nn.Dropout(0.5)
                self.contained = contained(self.drop)

            def forward(self, x):
                if isinstance(self.contained, functools.partial):
                    return self.contained(x)
                (module,) = (m for m in leaves(self.contained) if isinstance(m, nn.Module))
                return module(x)

        def leaves(value):
            if isinstance(value, dict):
                value = list(value.values())
            return [x for v in value for x in leaves(v)] if isinstance(value, (list, tuple, set, deque)) else [value]

        model, x = Model(), images(3, 4)
        assert torch.equal(rawkern.fuse(model).eval()(x), x)
        assert type(model.contained) is type(rawkern.fuse(model).contained) and model.training

    def test_twice(self, calls):
        model, x = Model(lambda m, y: F.relu(y)), images(*X)
        twice = rawkern.fuse(rawkern.fuse(model))
        torch.testing.assert_close(twice(x), model(x))
        assert calls == [CONV]

    def test_opaque_modules_are_used_as_they_are(self, calls):
        def twice(x):
            return 2 * nn.ConvTranspose2d.forward(patched, x)

        patched, scripted = nn.ConvTranspose2d(4, 4, 1), torch.jit.script(nn.Sequential(nn.ReLU(), nn.Tanh()))
        patched.forward = twice
        model = nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.ReLU(), patched, scripted).double()
        fuse_and_compare(model, images(*X))
        assert calls == [CONV]

    def test_threads(self, calls):
        """While one thread makes plans, others call models."""
        model, x = Model(lambda m, y: F.relu(y)), images(*X)
        expected, wrong = model(x), []

        def work():
            for _ in range(5):
                if not torch.equal(model(x), expected) or not torch.allclose(rawkern.fuse(model)(x), expected):
                    wrong.append(threading.get_ident())

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong and calls == [CONV] * 20


class TestAutocast:
    @staticmethod
    def compare(model, x):
        fused = rawkern.fuse(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results = [step(candidate, x) for candidate in (fused, model)]
        assert results[0][0].dtype == results[1][0].dtype
        torch.testing.assert_close(*results)

    def test_numbers(self, calls):
        self.compare(Model(lambda m, y: F.relu(y) * 2).float(), torch.randn(X))
        assert calls == [CONV]

    @pytest.mark.parametrize(
        "function",
        [lambda m, y: F.relu(y) + m.bias, lambda m, y: F.softplus(y), lambda m, y: F.group_norm(F.gelu(y), 2)],
    )
    def test_what_leaves_the_lower_precision(self, function, calls):
        self.compare(Model(function).float(), torch.randn(X))
        assert not calls

    def test_float64(self, calls):
        self.compare(Model(lambda m, y: F.relu(y)), images(*X))
        assert not calls


def test_report(capsys):
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.ReLU())
            self.last = nn.ConvTranspose2d(4, 2, 3)

        def forward(self, x):
            return self.last(self.up(x))

    rawkern.fuse(Decoder(), report=True)
    printed = capsys.readouterr().out
    for text in ("rawkern.fuse(Decoder)", "up", "ConvTranspose2d up.0 → ReLU", "rawkern.conv_transpose2d", "unchanged"):
        assert text in printed
    rawkern.fuse(nn.Linear(2, 2), report=True)
    assert "nothing to fuse was found" in capsys.readouterr().out
    rawkern.fuse(Decoder())
    assert capsys.readouterr().out == ""


def test_example_of_the_readme(capsys, monkeypatch):
    """It runs, and prints what the README says."""
    monkeypatch.setenv("COLUMNS", "120")
    text = (Path(__file__).parents[1] / "README.md").read_text()
    example, report = (
        re.search(rf"<!-- fuse {name} -->\n```.*?\n(.*?)```", text, re.DOTALL).group(1)
        for name in ("example", "report")
    )
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip() == report.strip()


def test_data_parallel(calls, tmp_path):
    """DistributedDataParallel around a fused model gives the gradients of the model alone."""
    model, x = TestState.model().eval(), images(*X)
    expected = step(model, x)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(rawkern.fuse(model), find_unused_parameters=True)
        gradients = step(wrapped, x)
        del wrapped  # or the group ends with it, and waits for a thread that waits for the interpreter
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(gradients, expected)
    assert calls == [CONV, CONV]


def test_errors():
    with pytest.raises(TypeError, match=r"must be torch\.nn\.Module, not function"):
        rawkern.fuse(F.relu)


def test_compiles_without_a_graph_break(calls):
    """torch.compile looks through a fused model; here with stand-ins in the place of the kernels."""
    model = Model(lambda m, y: m.layer(y) * 2 + m.bias, layer=nn.ReLU())
    fused, x = rawkern.fuse(model), images(*X)
    calls.clear()
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    fused.eval()
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    """With the kernels: the program has their operators in it."""
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.ReLU()).double()
    x = images(*X)
    program = torch.export.export(rawkern.fuse(model), (x,), strict=strict)
    assert any("rawkern.conv_transpose2d" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), model(x))


# Randomly generated chains ------------------------------------------------------------------------------------------

LINKS = {
    **{name: function for name, function in POINTWISE.items()},
    **{name: (lambda m, y, name=name: m.layers[name](y)) for name in LAYERS},
    "identity": lambda m, y: m.layers["identity"](y),
    "dropout": lambda m, y: m.layers["dropout"](y),
    "norm": lambda m, y: m.layers["norm"](y),
    "batch_norm": lambda m, y: m.layers["batch_norm"](y),
    "gelu-norm": lambda m, y: F.group_norm(F.gelu(y), 2, m.row, m.row),
    "row": lambda m, y: y + m.row,
    "swish": lambda m, y: y * torch.sigmoid(y),
    "square": lambda m, y: y * y,
    "cat": lambda m, y: torch.cat([y, y], 0)[: y.shape[0]],
    "float": lambda m, y: y.float().double(),
    "detach": lambda m, y: y + y.detach() * 0.5,
    "again": lambda m, y: m.again(y),
    "again-relu": lambda m, y: F.relu(m.again(y)),
    "minimum": lambda m, y: F.gelu(y.min(dim=1, keepdim=True)[0].sum(dim=2, keepdim=True)) + m.bias,
    "view": lambda m, y: y.reshape(y.shape),
    "alias": lambda m, y: _alias(y),
}


def _alias(y):
    z = y + 0.0
    alias = z
    z += 1
    return alias * 2 + z


class RandomModel(Model):
    def __init__(self, names):
        super().__init__(lambda m, y: y)
        self.again = nn.ConvTranspose2d(4, 4, 1)
        layers = {name: make() for name, make in LAYERS.items()}
        layers |= {"identity": nn.Identity(), "dropout": nn.Dropout(0.3), "norm": nn.GroupNorm(2, 4)}
        self.layers = nn.ModuleDict({**layers, "batch_norm": nn.BatchNorm2d(4)})
        self.names = names
        self.double()

    def forward(self, x):
        y = self.conv(x)
        for name in self.names:
            y = LINKS[name](self, y)
        return y


def random_chains(longest):
    return st.lists(st.sampled_from(sorted(LINKS)), min_size=1, max_size=longest)


QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def _agree(names, mode):
    torch.manual_seed(0)
    model = RandomModel(names).train(mode)
    x = images(*X)
    try:
        expected = step(model, x)
    except RuntimeError:  # torch forbids what this does in place
        assume(False)
    model.layers["batch_norm"].reset_running_stats()
    fused = rawkern.fuse(model)
    torch.testing.assert_close(step(fused, x), expected, rtol=1e-6, atol=1e-7)
    return fused


@settings(max_examples=150, **QUIET)
@given(names=random_chains(7), mode=st.booleans())
def test_random_chains(names, mode, calls):
    calls.clear()
    fused = _agree(names, mode)
    assert calls == fused_functions(fused)
    assert names[0] not in (*POINTWISE, *LAYERS, "gelu-norm") or calls


#: Steps of a program on a list of values: what they append to it, given two of its values.
STEPS = {
    **{name: (lambda m, a, b, name=name: LINKS[name](m, a)) for name in ("gelu", "relu_", "mul", "bias", "clamp_max_")},
    **{name: (lambda m, a, b, name=name: m.layers[name](a)) for name in ("ReLU", "Tanh", "identity", "norm")},
    "add": lambda m, a, b: a + b,
    "add_": lambda m, a, b: a.add_(b),
    "sub": lambda m, a, b: torch.sub(a, b),
    "conv": lambda m, a, b: m.again(a),
    "alias": lambda m, a, b: a,
    "view": lambda m, a, b: a.view(a.shape),
    "part": lambda m, a, b: _changed_in_part(a),
    "copy": lambda m, a, b: a.clone(),
    "inner": lambda m, a, b: m.inner(a),
}


def _changed_in_part(a):
    a.select(1, 0).mul_(2)
    return a


class RandomProgram(RandomModel):
    """`steps` are (name, position, position) in the list of values; those at the positions `results` are the output."""

    def __init__(self, steps, results):
        super().__init__(())
        self.inner = nn.Sequential(nn.ConvTranspose2d(4, 4, 1), nn.Sequential(nn.ReLU(inplace=True), nn.Tanh()))
        self.steps, self.results = steps, results
        self.double()

    def forward(self, x):
        values = [self.conv(x)]
        for name, a, b in self.steps:
            values.append(STEPS[name](self, values[a % len(values)], values[b % len(values)]))
        return torch.cat([values[-1], *(values[i % len(values)] for i in self.results)])


POSITIONS = st.one_of(st.just(-1), st.integers(0, 5))


@settings(max_examples=150, **QUIET)
@given(
    steps=st.lists(st.tuples(st.sampled_from(sorted(STEPS)), POSITIONS, POSITIONS), min_size=1, max_size=7),
    results=st.lists(POSITIONS, max_size=1),
)
def test_random_programs(steps, results, calls):
    """Values that are used again, changed in place, seen under two names."""
    torch.manual_seed(0)
    model, x = RandomProgram(steps, results), images(*X)
    try:
        expected = step(model, x)
    except RuntimeError:  # torch forbids what this does in place
        assume(False)
    torch.testing.assert_close(step(rawkern.fuse(model), x), expected, rtol=1e-6, atol=1e-7)


@settings(max_examples=4, **QUIET)
@given(names=random_chains(4), mode=st.booleans())
def test_random_chains_with_kernels(names, mode):
    _agree(names, mode)


# The three models ---------------------------------------------------------------------------------------------------


class Computing(TorchDispatchMode):
    """Records torch's own operators that read or write what is in tensors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").partition(".")[0]
        if not name.startswith(
            ("empty", "detach", "view", "_to_copy", "zeros", "alias", "lift", "unbind", "as_strided")
        ):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


MODELS = [
    pytest.param(PlainMinSumGELUAdd, rnn.ConvTranspose2dMinSumGELUAdd, {}, MIN, id="min_sum"),
    pytest.param(PlainGELUGroupNorm, rnn.ConvTranspose2dGELUGroupNorm, {"num_groups": 4}, NORM, id="group_norm"),
    pytest.param(
        PlainAddMinGELUMul,
        rnn.ConvTranspose2dAddMinGELUMul,
        {"add_value": 0.125, "multiply_value": 2.0},
        CONV,
        id="add_min",
    ),
]


@pytest.mark.parametrize("plain, ours, options, function", MODELS)
def test_the_three_models_are_one_call_each(plain, ours, options, function, device, monkeypatch):
    """The launches of the model of rawkern.nn, and no operator of torch that computes anything."""
    launched, launch = [], Kernel.launch

    def recorded(kernel, *args, **kwargs):
        launched.append(kernel.name)
        return launch(kernel, *args, **kwargs)

    monkeypatch.setattr(Kernel, "launch", recorded)
    plain = plain(6, 8, 3, stride=2, padding=1, output_padding=1, **options).to(device)
    ours = ours(6, 8, 3, stride=2, padding=1, output_padding=1, **options).to(device)
    ours.load_state_dict(plain.state_dict())
    fused = rawkern.fuse(plain)
    assert fused_functions(fused) == [function]
    x = torch.randn(2, 6, 5, 7, device=device)
    with torch.no_grad():
        expected = ours(x)
        wanted = launched.copy()
        launched.clear()
        forget_plans()
        with Computing() as computing:
            found = fused(x)
    assert launched == wanted
    assert computing.seen == [f"rawkern::{function}"]
    assert torch.equal(found, expected)
    plain.double()
    torch.testing.assert_close(step(fused, x.double()), step(plain, x.double()))
