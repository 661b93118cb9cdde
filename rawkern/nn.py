"""Modules with the constructor arguments and state_dict keys of their torch.nn counterparts.

`ConvTranspose2d`, `GELU` and `GroupNorm` are subclasses of torch's modules with another forward. The three models are
convolutions with all that follows them fused; a checkpoint of the plain PyTorch model loads with `strict=True`.
"""

import torch

from . import epilogue as functions
from .autograd.conv_transpose2d import conv_transpose2d
from .autograd.conv_transpose2d_gelu_group_norm import conv_transpose2d_gelu_group_norm
from .autograd.conv_transpose2d_min_sum_gelu_add import conv_transpose2d_min_sum_gelu_add
from .autograd.gelu import gelu
from .autograd.group_norm import group_norm
from .launchers.chain import functions_of

__all__ = [
    "GELU",
    "ConvTranspose2d",
    "ConvTranspose2dAddMinGELUMul",
    "ConvTranspose2dGELUGroupNorm",
    "ConvTranspose2dMinSumGELUAdd",
    "GroupNorm",
]


class GELU(torch.nn.GELU):
    """torch.nn.GELU with rawkern's kernel."""

    def forward(self, input):
        return gelu(input, approximate=self.approximate)


class GroupNorm(torch.nn.GroupNorm):
    """torch.nn.GroupNorm with rawkern's kernels."""

    def forward(self, input):
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d with rawkern's kernel, and a chain of pointwise functions that runs inside it.

    Args:
        epilogue: functions of `rawkern.epilogue`, applied to the output in this order.
        precision: "ieee", "tf32" or None, which follows torch's own switch (see `rawkern.conv_transpose2d`).

    A tensor operand of the i-th function of the epilogue becomes part of the module under the name `epilogue_<i>`: a
    torch.nn.Parameter as a parameter, in the state_dict; any other tensor as a buffer that moves with the module and
    is not in the state_dict. With numbers only, the state_dict is that of torch.nn.ConvTranspose2d.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        output_padding=0,
        groups=1,
        bias=True,
        dilation=1,
        padding_mode="zeros",
        device=None,
        dtype=None,
        *,
        epilogue=(),
        precision=None,
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
        )
        self.precision = precision
        self._functions = functions_of(epilogue)
        for index, function in enumerate(self._functions):
            if isinstance(function.tensor, torch.nn.Parameter):
                self.register_parameter(f"epilogue_{index}", function.tensor)
            elif function.tensor is not None:
                self.register_buffer(f"epilogue_{index}", function.tensor, persistent=False)

    @property
    def epilogue(self):
        """The functions applied to the output, with the operands as they are now."""
        return tuple(
            [
                function if function.tensor is None else type(function)(getattr(self, f"epilogue_{index}"))
                for index, function in enumerate(self._functions)
            ]
        )

    def forward(self, input, output_size=None):
        """output_size, if given, chooses among the sizes that the stride makes possible, as in torch."""
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
        )
        return conv_transpose2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
            epilogue=self.epilogue,
            precision=self.precision,
        )

    def extra_repr(self):
        text = super().extra_repr()
        if self._functions:
            text += f", epilogue={self._functions}"
        return text + _precision_repr(self.precision)


class _FusedModel(torch.nn.Module):
    """A torch.nn.ConvTranspose2d that holds the parameters, and what the three models share.

    The submodules are plain PyTorch's and are never called, so forward hooks on them do not run.
    """

    def __init__(self, conv_arguments, precision):
        super().__init__()
        self.conv_transpose = torch.nn.ConvTranspose2d(**conv_arguments)
        self.precision = precision

    def _geometry(self):
        conv = self.conv_transpose
        return {
            "stride": conv.stride,
            "padding": conv.padding,
            "output_padding": conv.output_padding,
            "groups": conv.groups,
            "dilation": conv.dilation,
        }


class ConvTranspose2dMinSumGELUAdd(_FusedModel):
    """conv_transpose2d, minimum over channels, sum over height, GELU, plus a parameter `bias` of shape `bias_shape`.

    (N, C_in, H, W) to what broadcasting (N, 1, 1, W_out) with the bias gives. The convolution's output is never stored.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        output_padding=0,
        groups=1,
        bias=True,
        dilation=1,
        padding_mode="zeros",
        device=None,
        dtype=None,
        *,
        bias_shape=(1, 1, 1),
        precision=None,
    ):
        super().__init__(_arguments(locals()), precision)
        self.bias = torch.nn.Parameter(torch.randn(bias_shape, device=device, dtype=dtype))

    def forward(self, input):
        conv = self.conv_transpose
        return conv_transpose2d_min_sum_gelu_add(
            input, conv.weight, conv.bias, self.bias, **self._geometry(), precision=self.precision
        )

    def extra_repr(self):
        return f"bias_shape={tuple(self.bias.shape)}" + _precision_repr(self.precision)


class ConvTranspose2dGELUGroupNorm(_FusedModel):
    """conv_transpose2d, GELU, GroupNorm; GELU and the statistics are computed where the convolution's output arises.

    num_groups are the groups of the normalisation, `groups` those of the convolution.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        output_padding=0,
        groups=1,
        bias=True,
        dilation=1,
        padding_mode="zeros",
        device=None,
        dtype=None,
        *,
        num_groups,
        eps=1e-5,
        affine=True,
        approximate="none",
        precision=None,
    ):
        super().__init__(_arguments(locals()), precision)
        self.approximate = approximate
        self.group_norm = torch.nn.GroupNorm(num_groups, out_channels, eps, affine, device=device, dtype=dtype)

    def forward(self, input):
        conv, norm = self.conv_transpose, self.group_norm
        return conv_transpose2d_gelu_group_norm(
            input,
            conv.weight,
            conv.bias,
            norm.num_groups,
            norm.weight,
            norm.bias,
            norm.eps,
            **self._geometry(),
            approximate=self.approximate,
            precision=self.precision,
        )

    def extra_repr(self):
        return f"approximate={self.approximate!r}" + _precision_repr(self.precision)


class ConvTranspose2dAddMinGELUMul(_FusedModel):
    """conv_transpose2d, plus add_value, minimum with 0, GELU (erf form), times multiply_value: one kernel."""

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        output_padding=0,
        groups=1,
        bias=True,
        dilation=1,
        padding_mode="zeros",
        device=None,
        dtype=None,
        *,
        add_value,
        multiply_value,
        precision=None,
    ):
        super().__init__(_arguments(locals()), precision)
        self.add_value = add_value
        self.multiply_value = multiply_value

    def forward(self, input):
        epilogue = (
            functions.Add(self.add_value),
            functions.Minimum(0.0),
            functions.GELU(),
            functions.Mul(self.multiply_value),
        )
        conv = self.conv_transpose
        return conv_transpose2d(
            input, conv.weight, conv.bias, **self._geometry(), epilogue=epilogue, precision=self.precision
        )

    def extra_repr(self):
        text = f"add_value={self.add_value}, multiply_value={self.multiply_value}"
        return text + _precision_repr(self.precision)


_CONV_ARGUMENTS = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "output_padding",
    "groups",
    "bias",
    "dilation",
    "padding_mode",
    "device",
    "dtype",
)


def _arguments(values):
    """The constructor arguments of torch.nn.ConvTranspose2d among `values`."""
    return {name: values[name] for name in _CONV_ARGUMENTS}


def _precision_repr(precision):
    return "" if precision is None else f", precision={precision!r}"
