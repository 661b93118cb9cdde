"""The first model: transposed convolution, minimum over channels, sum over height, GELU, plus bias."""

from dataclasses import replace

from .convolutions import MODEL_MIN_SUM, QUICK, elements
from .data import Input, to_float64
from .floors import Cost
from .minima import FORWARD_SCALE, expected_minimum, sum_gradient, sum_gradient_checks
from .oracle import convolution_rows, gelu, input_gradient_rows, library, weight_gradient_rows
from .problems import Operation, Problem
from .windows import channel_pick, image_pick

NAME = "conv_transpose2d_min_sum_gelu_add"


class ConvTranspose2dMinSumGELUAdd(Operation):
    name = NAME
    has_precision = True
    differentiable = ("input", "weight", "conv_bias", "bias")
    is_discontinuous = True
    problems = (
        Problem(NAME, "model", MODEL_MIN_SUM, tags=("model",)),
        Problem(NAME, "channels-last", MODEL_MIN_SUM, tags=("layout",)),
        Problem(NAME, "quick", QUICK, tags=("quick",)),
    )

    def inputs(self, problem, direction):
        conv = problem.size
        scale = FORWARD_SCALE / conv.out_size[0]
        image = Input(conv.input_shape, channels_last=problem.channels_last)
        if direction == "forward":
            return {
                "input": image,
                "weight": Input(conv.weight_shape, conv.weight_scale * scale),
                "conv_bias": Input((conv.out_channels,), 0.1 * scale, -expected_minimum(conv.out_channels) * scale),
                "bias": Input((1, 1, 1), 0.5),
            }
        return {
            "grad_output": Input(self.output_shape(problem)),
            "sums": Input((conv.batch, conv.out_size[1]), dtype="accumulator"),
            "index": Input((conv.batch, *conv.out_size), conv.out_channels, dtype="int32"),
            "input": image,
            "weight": Input(conv.weight_shape, conv.weight_scale),
        }

    def cost(self, problem, direction, itemsize):
        """The convolution's output need not move at all, and backward one channel of each pixel has a gradient."""
        conv = problem.size
        image, weight = elements(conv.input_shape), elements(conv.weight_shape)
        pixels, columns = conv.batch * conv.out_size[0] * conv.out_size[1], conv.batch * conv.out_size[1]
        if direction == "forward":
            vector = 2 * elements(conv.output_shape) + pixels + 2 * columns
            return Cost.of((image + weight + conv.out_channels + 1) * itemsize, columns * itemsize, conv.flop, vector)
        sums = 8 if itemsize == 8 else 4
        read = (image + weight) * itemsize + pixels * 4 + columns * (itemsize + sums)
        written = (image + weight + conv.out_channels + 1) * itemsize
        return Cost.of(read, written, vector=2 * conv.flop // conv.out_channels + pixels + 3 * columns)

    def output_shape(self, problem):
        return (problem.size.batch, 1, 1, problem.size.out_size[1])

    def call(self, problem, direction, arrays, precision, out=None):
        from rawkern.launchers.conv_transpose2d_min_sum_gelu_add import bias_gradient as launch_bias_gradient
        from rawkern.launchers.conv_transpose2d_min_sum_gelu_add import conv_bias_gradient as launch_conv_bias_gradient
        from rawkern.launchers.conv_transpose2d_min_sum_gelu_add import (
            conv_transpose2d_min_sum_gelu_add as launch_conv_transpose2d_min_sum_gelu_add,
        )
        from rawkern.launchers.conv_transpose2d_min_sum_gelu_add import geometry_of as launch_geometry_of
        from rawkern.launchers.conv_transpose2d_min_sum_gelu_add import input_gradient as launch_input_gradient
        from rawkern.launchers.conv_transpose2d_min_sum_gelu_add import sum_gradient as launch_sum_gradient
        from rawkern.launchers.conv_transpose2d_min_sum_gelu_add import weight_gradient as launch_weight_gradient

        conv = problem.size
        if direction == "forward":
            return (
                launch_conv_transpose2d_min_sum_gelu_add(
                    *arrays.values(), *conv.arguments, precision=precision, out=out[0] if out else None
                ),
            )
        outs = out or (None,) * 4
        grad_output, sums, index, input, weight = arrays.values()
        geometry = launch_geometry_of(conv.input_shape, conv.weight_shape, *conv.arguments)
        grad_sum = launch_sum_gradient(grad_output, sums)
        return (
            launch_input_gradient(grad_sum, index, weight, geometry, out=outs[0]),
            launch_weight_gradient(grad_sum, index, input, geometry, out=outs[1]),
            launch_conv_bias_gradient(grad_sum, index, geometry, input.dtype, out=outs[2]),
            launch_bias_gradient(grad_output, (1, 1, 1), out=outs[3]),
        )

    def checks(self, problem, direction, arrays, results, pick):
        conv = problem.size
        for image in image_pick(conv.batch, pick, 2):
            compute = self._forward if direction == "forward" else self._grad_input
            yield (
                f"image {image}",
                to_float64(results[0][image]),
                lambda rounding, image=image, compute=compute: compute(conv, arrays, image, rounding),
            )
        if direction == "forward":
            return
        for channel in channel_pick(conv.in_channels, pick):
            columns = channel_pick(conv.out_channels // conv.groups, pick)
            yield (
                f"grad_weight[{channel}, {columns}]",
                to_float64(results[1][channel])[columns],
                lambda rounding, channel=channel, columns=columns: self._grad_weight(
                    conv, arrays, channel, columns, rounding
                ),
            )
        chosen = channel_pick(conv.out_channels, pick)
        yield (
            f"grad_conv_bias{chosen}",
            to_float64(results[2])[chosen],
            lambda rounding: rounding.computed(
                library(arrays["index"]).stack([self._grad_channel(arrays, c, rounding).sum() for c in chosen]),
                elements(arrays["index"].shape) // conv.out_channels,
            ),
        )
        yield from sum_gradient_checks(arrays["grad_output"], results[3])

    def _forward(self, conv, arrays, image, rounding):
        y = convolution_rows(
            conv, arrays["input"][image], arrays["weight"], arrays["conv_bias"], range(conv.out_size[0]), rounding
        )
        sums = rounding.computed(y.min(axis=0).sum(axis=0), conv.out_size[0])
        return (gelu(sums) + to_float64(arrays["bias"]).reshape(1)).reshape(1, 1, -1)

    def _grad_input(self, conv, arrays, image, rounding):
        xp = library(arrays["index"])
        channels = xp.arange(conv.out_channels)[:, None, None]
        grad = sum_gradient(arrays, image, rounding)
        dense = xp.where(channels == arrays["index"][image][None], grad[None, None, :], 0.0)
        return input_gradient_rows(conv, dense, arrays["weight"], range(conv.size[0]), _full(rounding))

    def _grad_channel(self, arrays, channel, rounding):
        """The gradient of one channel of the convolution's output for all images: (N, H_out, W_out)."""
        xp = library(arrays["index"])
        grads = xp.stack([sum_gradient(arrays, n, rounding) for n in range(len(arrays["sums"]))])
        return xp.where(arrays["index"] == channel, grads[:, None, :], 0.0)

    def _grad_weight(self, conv, arrays, channel, columns, rounding):
        first = channel // (conv.in_channels // conv.groups) * (conv.out_channels // conv.groups)
        grads = {first + c: self._grad_channel(arrays, first + c, rounding) for c in columns}
        return weight_gradient_rows(conv, arrays["input"], grads, channel, columns, _full(rounding))

    def torch(self, problem):
        import torch

        arguments = problem.size.arguments

        def model(input, weight, conv_bias, bias):
            y = torch.nn.functional.conv_transpose2d(input, weight, conv_bias, *arguments)
            y = torch.min(y, dim=1, keepdim=True)[0]
            return torch.nn.functional.gelu(torch.sum(y, dim=2, keepdim=True)) + bias

        return model

    def rawkern(self, problem, precision, input, weight, conv_bias, bias):
        import rawkern

        return rawkern.conv_transpose2d_min_sum_gelu_add(
            input, weight, conv_bias, bias, *problem.size.arguments, precision=precision
        )


def _full(rounding):
    """The sparse gradients are not made by tensor cores: products in full float32, in every mode."""
    return replace(rounding, operand_bits=None)


OPERATION = ConvTranspose2dMinSumGELUAdd()
