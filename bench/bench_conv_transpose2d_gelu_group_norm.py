"""The second model: transposed convolution, GELU, group normalisation."""

from .convolutions import MODEL_GROUP_NORM, QUICK, elements
from .data import Input, to_float64
from .floors import Cost, Phase
from .normalization import EPS, affine_checks, statistics_inputs
from .oracle import (
    convolution_rows,
    gelu,
    gelu_derivative,
    group_norm_image,
    group_norm_image_gradient,
    input_gradient_rows,
    library,
    weight_gradient_rows,
)
from .problems import Operation, Problem
from .windows import channel_pick, image_pick

NAME = "conv_transpose2d_gelu_group_norm"


class ConvTranspose2dGELUGroupNorm(Operation):
    name = NAME
    has_precision = True
    differentiable = ("input", "weight", "conv_bias", "norm_weight", "norm_bias")
    problems = (
        Problem(NAME, "model", MODEL_GROUP_NORM, {"groups": 8}, ("model",)),
        Problem(NAME, "channels-last", MODEL_GROUP_NORM, {"groups": 8}, ("layout",)),
        Problem(NAME, "quick", QUICK, {"groups": 2}, ("quick",)),
    )

    def inputs(self, problem, direction):
        conv = problem.size
        channels = (conv.out_channels,)
        image = Input(conv.input_shape, channels_last=problem.channels_last)
        weight = Input(conv.weight_shape, conv.weight_scale)
        norm_weight = Input(channels, 0.5, 1.0)
        if direction == "forward":
            vectors = {"conv_bias": Input(channels, 0.5), "norm_weight": norm_weight, "norm_bias": Input(channels, 0.5)}
            return {"input": image, "weight": weight, **vectors}
        return {
            "grad_output": Input(conv.output_shape),
            "input": image,
            "weight": weight,
            "saved": Input(conv.output_shape),
            **statistics_inputs(conv.batch, problem["groups"], True),
            "norm_weight": norm_weight,
        }

    def cost(self, problem, direction, itemsize):
        """Two phases: normalising needs the statistics of the whole, so the convolution is stored and read again.

        Backward: the group's means come first (one pass over grad_output and the convolution), then the gradient of
        the convolution, which its two gradients then read.
        """
        conv = problem.size
        image, weight, output = (
            elements(s) * itemsize for s in (conv.input_shape, conv.weight_shape, conv.output_shape)
        )
        values = elements(conv.output_shape)
        if direction == "forward":
            return Cost((Phase(image + weight, output, conv.flop, 2 * values), Phase(output, output, 0, 6 * values)))
        sums = Phase(2 * output, 0, 0, 6 * values)
        gradients = Phase(2 * output + image + weight, image + weight, 2 * conv.flop, 6 * values)
        return Cost((sums, gradients))

    def call(self, problem, direction, arrays, precision, out=None):
        from rawkern.launchers.conv_transpose2d_gelu_group_norm import (
            conv_transpose2d_gelu_group_norm as launch_conv_transpose2d_gelu_group_norm,
        )
        from rawkern.launchers.conv_transpose2d_gelu_group_norm import (
            conv_transpose2d_gelu_group_norm_backward as launch_conv_transpose2d_gelu_group_norm_backward,
        )
        from rawkern.launchers.geometry import Geometry

        conv, a = problem.size, arrays
        if direction == "forward":
            return (
                launch_conv_transpose2d_gelu_group_norm(
                    a["input"], a["weight"], a["conv_bias"], problem["groups"], a["norm_weight"], a["norm_bias"], EPS,
                    *conv.arguments, precision=precision, out=out[0] if out else None,
                ),
            )  # fmt: skip
        geometry = Geometry.of(conv.input_shape, conv.weight_shape, *conv.arguments)
        options = {"outs": tuple(out)} if out else {}
        return launch_conv_transpose2d_gelu_group_norm_backward(*a.values(), geometry, precision=precision, **options)

    def checks(self, problem, direction, arrays, results, pick):
        conv = problem.size
        for image in image_pick(conv.batch, pick):
            compute = self._forward if direction == "forward" else self._grad_input
            yield (
                f"image {image}",
                to_float64(results[0][image]),
                lambda rounding, image=image, compute=compute: compute(problem, arrays, image, rounding),
            )
        if direction == "forward":
            return
        for channel in channel_pick(conv.in_channels, pick, 2):
            columns = channel_pick(conv.out_channels // conv.groups, pick, 2)
            yield (
                f"grad_weight[{channel}, {columns}]",
                to_float64(results[1][channel])[columns],
                lambda rounding, channel=channel, columns=columns: self._grad_weight(
                    problem, arrays, channel, columns, rounding
                ),
            )
        chosen = channel_pick(conv.out_channels, pick)
        yield (
            f"grad_conv_bias{chosen}",
            to_float64(results[2])[chosen],
            lambda rounding: rounding.computed(
                library(arrays["input"]).stack(
                    [self._grad_convolved(problem, arrays, channel, rounding).sum() for channel in chosen]
                ),
                elements(conv.output_shape) // conv.out_channels,
            ),
        )
        a = arrays
        yield from affine_checks(
            problem["groups"], a["grad_output"], a["saved"], a["mean"], a["rstd"], True, results[3], results[4], pick
        )

    def _forward(self, problem, arrays, image, rounding):
        conv, a = problem.size, arrays
        rows = range(conv.out_size[0])
        convolved = convolution_rows(conv, a["input"][image], a["weight"], a["conv_bias"], rows, rounding)
        affine = to_float64(a["norm_weight"]), to_float64(a["norm_bias"])
        return group_norm_image(gelu(rounding.stored(convolved)), problem["groups"], *affine, EPS)

    def _grad_input(self, problem, arrays, image, rounding):
        conv, a = problem.size, arrays
        saved = rounding.computed(to_float64(a["saved"][image]))
        grad = group_norm_image_gradient(
            to_float64(a["grad_output"][image]), gelu(saved), a["mean"][image], a["rstd"][image],
            to_float64(a["norm_weight"]),
        )  # fmt: skip
        grad = rounding.stored(grad * gelu_derivative(saved))
        return input_gradient_rows(conv, grad, a["weight"], range(conv.size[0]), rounding)

    def _grad_convolved(self, problem, arrays, channel, rounding):
        """The gradient of one channel of the convolution's output for all images: (N, H_out, W_out)."""
        conv, a = problem.size, arrays
        per_group = conv.out_channels // problem["groups"]
        group = channel // per_group
        members = slice(group * per_group, (group + 1) * per_group)
        grads = []
        for n in range(conv.batch):
            saved = rounding.computed(to_float64(a["saved"][n, members]))
            statistics = (a[name][n, group : group + 1] for name in ("mean", "rstd"))
            grad = group_norm_image_gradient(
                to_float64(a["grad_output"][n, members]),
                gelu(saved),
                *statistics,
                to_float64(a["norm_weight"][members]),
            )
            own = channel - members.start
            grads.append(grad[own] * gelu_derivative(saved[own]))
        return rounding.stored(library(grads[0]).stack(grads))

    def _grad_weight(self, problem, arrays, channel, columns, rounding):
        conv = problem.size
        first = channel // (conv.in_channels // conv.groups) * (conv.out_channels // conv.groups)
        grads = {first + c: self._grad_convolved(problem, arrays, first + c, rounding) for c in columns}
        return weight_gradient_rows(conv, arrays["input"], grads, channel, columns, rounding)

    def output_shape(self, problem):
        return problem.size.output_shape

    def torch(self, problem):
        import torch

        functional, arguments, groups = torch.nn.functional, problem.size.arguments, problem["groups"]

        def model(input, weight, conv_bias, norm_weight, norm_bias):
            y = functional.conv_transpose2d(input, weight, conv_bias, *arguments)
            return functional.group_norm(functional.gelu(y), groups, norm_weight, norm_bias, EPS)

        return model

    def rawkern(self, problem, precision, input, weight, conv_bias, norm_weight, norm_bias):
        import rawkern

        return rawkern.conv_transpose2d_gelu_group_norm(
            input, weight, conv_bias, problem["groups"], norm_weight, norm_bias, EPS, *problem.size.arguments,
            precision=precision,
        )  # fmt: skip


OPERATION = ConvTranspose2dGELUGroupNorm()
